"""Times `mindalle sample` as a person does: from the shell to pictures on disk, with nothing compiled and again.

    python -m scripts.bench.start
    python -m scripts.bench.start --model minDALL-E/1.3B --num-candidates 96 -- --ranker off

What is downloaded or converted has to be there already; compiled programs are kept in a folder of its own. Of the cold
run all is compiled, of the warm ones nothing. Prints a table, then one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as of mindalle sample (default: %(default)s)")
    parser.add_argument("--num-candidates", default="16", help="default: %(default)s")
    prompt = "a large striped green circle to the left of a small red heart on a grey background"
    parser.add_argument("--prompt", default=prompt, help="default: %(default)s")
    parser.add_argument("--warm", type=int, default=2, help="runs after the cold one (default: %(default)s)")
    parser.add_argument("options", nargs="*", help="more options of mindalle sample, after --")
    arguments = parser.parse_args()
    if arguments.warm < 1:
        parser.error("--warm must be at least 1")
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/xla"}
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # as mindalle sample does in its own cache
        command = [sys.executable, "-m", "mindalle_jax", "sample", arguments.prompt, "--model", arguments.model]
        command += ["--num-candidates", arguments.num_candidates, *arguments.options, "--out"]
        for run in range(1 + arguments.warm):
            start = time.perf_counter()
            subprocess.run([*command, str(Path(folder) / str(run))], env=environment, check=True, stdout=sys.stderr)
            seconds.append(time.perf_counter() - start)
    figures = {
        "bench": "start",
        "model": arguments.model,
        "candidates": int(arguments.num_candidates),
        "cold_s": round(seconds[0], 2),
        "warm_s": round(statistics.median(seconds[1:]), 2),
        "jax": version("jax"),
    }
    for name, value in figures.items():
        print(f"{name:>12}  {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
