"""Runs every benchmark that this project has a goal for on one GPU or TPU, one after the other, and prints the table.

    python -m scripts.bench.goals --out goals.jsonl
    python -m scripts.bench.goals --preset demo --only "attention xla" --out rehearsal.jsonl        # on a CPU too

Each is a process of its own, of which the last line is kept in --out as it ends, so that an interruption loses one. One
that fails, because a backend of attention is not for this device or an update does not fit, is told and left out of the
table. A goal that has been missed says so. The goals are for the 1.3B model on one H100.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent
BACKENDS = ("xla", "xla-private", "cudnn", "pallas")
TRAINING = (
    [],
    ["training.flash_attention=true"],
    ["training.flash_attention=true", "training.remat=none"],
    ["training.flash_attention=true", "experiment.local_batch_size=32", "experiment.total_batch_size=32"],
)

Figure = Callable[[dict[str, Any]], float | None]

# What, its goal, whether less is better, and the runs that it is the best of.
GOALS: list[tuple[str, float, bool, Figure]] = [
    ("codes of 96, s", 0.64, True, lambda run: sampling(run, "codes_s", 96, None)),
    ("codes of 96, int8 weights and cache, s", 0.40, True, lambda run: sampling(run, "codes_s", 96, "weights+cache")),
    ("prompt to 96 ranked pictures, s", 0.80, True, lambda run: sampling(run, "prompt_to_ranked_pictures_s", 96, None)),
    (
        "prompt to 96 ranked pictures, int8, s", 0.55, True,
        lambda run: sampling(run, "prompt_to_ranked_pictures_s", 96, "weights+cache"),
    ),
    ("codes of one, s", 0.40, True, lambda run: sampling(run, "codes_s", 1, None)),
    ("codes of one, int8 weights and cache, s", 0.20, True, lambda run: sampling(run, "codes_s", 1, "weights+cache")),
    ("share of the floor at 96", 0.75, False, lambda run: sampling(run, "share_of_floor", 96, None)),
    ("decoding 96 pictures, s", 0.11, True, lambda run: each(run, "decode_one_picture_ms")),
    ("ranking 96 pictures, s", 0.008, True, lambda run: each(run, "rank_one_picture_ms")),
    ("fine-tuning, MFU", 0.45, False, lambda run: run.get("MFU")),
    ("fine-tuning, sequences/s", 188, False, lambda run: run.get("sequences_per_s")),
]  # fmt: skip


def sampling(run: dict[str, Any], name: str, candidates: int, quantize: str | None) -> float | None:
    """A figure of a run of bench_sampling.py, if it is one of these."""
    same = run["bench"] == "sampling" and (run["candidates"], run["quantize"]) == (candidates, quantize)
    return run[name] if same else None


def each(run: dict[str, Any], name: str) -> float | None:
    """Seconds of 96 of what takes so many milliseconds."""
    value = sampling(run, name, 96, None)
    return None if value is None else 96 * value / 1e3


def commands(preset: str) -> list[list[str]]:
    """Those to run; what the headline needs comes first."""
    found = []
    for candidates in ("96", "1"):
        for quantize in (None, "weights+cache"):
            for attention in BACKENDS:
                if attention == "cudnn" and quantize:  # it reads no int8
                    continue
                command = ["sampling.py", "--candidates", candidates, "--attention", attention]
                found.append(command + (["--quantize", quantize] if quantize else []))
        found.append(["sampling.py", "--candidates", candidates, "--quantize", "weights"])
    found.append(["sampling.py", "--candidates", "1", "--jacobi"])
    found += [["training.py", *changes] for changes in TRAINING]
    return [[command[0], "--preset", preset, *command[1:]] for command in found]


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: each goal, the best of the runs that have to do with it, and how that run was made."""
    lines = ["| what | goal | measured | by |", "|---|---|---|---|"]
    for what, goal, less, figure in GOALS:
        values = [(value, run) for run in runs if (value := figure(run)) is not None]
        if not values:
            lines.append(f"| {what} | {goal:g} | not measured | |")
            continue
        best, run = (min if less else max)(values, key=lambda pair: pair[0])
        missed = "" if (best <= goal if less else best >= goal) else ", missed"
        lines.append(f"| {what} | {goal:g} | {best:.4g}{missed} | {run['device']}, {' '.join(run['command'][3:])} |")
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["1.3b", "demo"], default="1.3b", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="one JSON line a run; a new file")
    parser.add_argument("--only", metavar="TEXT", help="commands with this in them (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    arguments = parser.parse_args()
    todo = [command for command in commands(arguments.preset) if (arguments.only or "") in " ".join(command)]
    if arguments.dry_run:
        print("\n".join("python scripts/" + " ".join(command) for command in todo))
        return
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; name another file")
    runs = []
    with arguments.out.open("x") as out:
        for number, (script, *options) in enumerate(todo, 1):
            print(f"[{number}/{len(todo)}] {script} {' '.join(options)}", file=sys.stderr, flush=True)
            done = subprocess.run([sys.executable, str(SCRIPTS / script), *options], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"failed with {done.returncode}; the reason is above", file=sys.stderr)
                continue
            runs.append(json.loads(done.stdout.splitlines()[-1]) | {"command": [script, *options]})
            print(json.dumps(runs[-1]), file=out, flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
