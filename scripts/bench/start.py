"""Times `mindalle sample` from the shell to images on disk, first with nothing compiled, then again.

    python -m scripts.bench.start
    python -m scripts.bench.start --model minDALL-E/1.3B --num-candidates 96 -- --ranker off

The model must be in the cache already. Compiled programs are kept in a temporary folder: the cold run compiles all of
them, the warm runs none. Prints a table, then one JSON line.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.bench import common


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--model", default="demo", help="as for mindalle sample (default: %(default)s)")
    parser.add_argument("--num-candidates", default="16", help="default: %(default)s")
    parser.add_argument("--prompt", default="a parrot, 3d style", help="default: %(default)s")
    parser.add_argument("--warm", type=int, default=2, help="runs after the cold one (default: %(default)s)")
    parser.add_argument("options", nargs="*", help="more options of mindalle sample, after --")
    arguments = parser.parse_args()
    if arguments.warm < 1:
        parser.error("--warm must be at least 1")
    seconds, meta = [], {}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/xla"}
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # as mindalle sample does in its own cache
        command = [sys.executable, "-m", "mindalle_jax", "sample", arguments.prompt, "--model", arguments.model]
        command += ["--num-candidates", arguments.num_candidates, *arguments.options, "--out"]
        for run in range(1 + arguments.warm):
            out = Path(folder) / str(run)
            start = time.perf_counter()
            subprocess.run([*command, str(out)], env=environment, check=True, stdout=sys.stderr)
            seconds.append(time.perf_counter() - start)
            meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    head = common.conditions(
        "start", meta["device"], meta["dtype"], meta["batch_size"],
        model=arguments.model, candidates=int(arguments.num_candidates),
    )  # fmt: skip
    metrics = {"cold_s": round(seconds[0], 2), "warm_s": round(statistics.median(seconds[1:]), 2)}
    common.report(head, metrics)


if __name__ == "__main__":
    main()
