"""Runs every benchmark that this project has a goal for, the most useful first, and prints the table of goals.

    python -m scripts.bench.goals --out DIR --budget 600
    python -m scripts.bench.goals --out DIR --budget 600 --peer ~/minDALL-E      # and the original's loop beside ours
    python -m scripts.bench.goals --out DIR --preset tiny --only "96 candidates" # a rehearsal, on a CPU too

Use it if you have an accelerator for a quarter of an hour. It needs no data set and no checkpoint. The goals are for
the 1.3B model on one H100.

Each stage is a process of its own with a time limit. A stage that fails is recorded, and the next one runs. Stages that
no longer fit into the budget are listed as not reached. DIR gets results.jsonl (one line per stage, written when the
stage ends), table.md (replaced after every stage), and logs/. An interruption loses only the running stage, and exits
with 130. The last line names the best default.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mindalle_jax.cli.parser import path
from scripts.bench.peer import missing
from scripts.bench.stages import RESULTS, TABLE, Folder, Record, Stage, run_stages

BACKENDS = ("xla", "pallas", "cudnn", "xla-private")
TRAINING: tuple[tuple[str, ...], ...] = (
    ("training.flash_attention=true",),
    (),
    ("training.flash_attention=true", "training.remat=none"),
    ("training.flash_attention=true", "experiment.local_batch_size=32", "experiment.total_batch_size=32"),
)
LIMITS_S = {"golden": 120.0, "peer": 150.0, "images": 120.0, "training": 150.0}
"""Kind of a stage -> its time limit; 180 s for kinds that are not here."""
LEAST_S = {"1.3b": 20.0, "demo-scenes": 5.0, "tiny": 1.0}
"""Preset -> seconds of the budget that must be left to start a stage."""


# ---------------------------------------- stages


def stages(preset: str, peer: Path | None) -> list[Stage]:
    """All stages, the most useful first."""

    def stage(kind: str, name: str, *command: str) -> Stage:
        script, *options = command
        named = [] if script == "golden" else ["--preset", preset]
        if preset == "tiny" and script == "sampling":
            named += ["--rows", "1"]  # of 16: a rehearsal
        return Stage(kind, name, (script, *options, *named), LIMITS_S.get(kind, 180.0), LEAST_S[preset])

    found = [stage("golden", "golden parity", "golden")]
    if peer is not None:
        found.append(stage("peer", "the original's loop, 96", "peer_sampling", str(peer.resolve())))
    for kind, name, options in sampling_runs():
        found.append(stage(kind, name, "sampling", "--codes-only", *options))
    found.append(stage("images", "decoding and ranking, 96 images", "images", "--images", "96"))
    for changes in TRAINING:
        name = "training, " + (", ".join(change.partition(".")[2] for change in changes) or "defaults")
        found.append(stage("training", name, "training", "--steps", "5", *changes))
    return found


def sampling_runs() -> Iterator[tuple[str, str, list[str]]]:
    """(kind, name, options) of each run of the decoding loop."""
    modes = [(None, BACKENDS), ("weights+cache", ("xla", "pallas", "xla-private")), ("weights", BACKENDS)]
    for quantize, backends in modes:
        for attention in backends:
            yield sampling_run("96", quantize, attention)
    for attention in BACKENDS:
        yield sampling_run("1", None, attention)
    for attention in ("xla", "pallas"):
        yield sampling_run("1", "weights+cache", attention)
    yield sampling_run("1", None, None, jacobi=True)
    yield sampling_run("1", "weights+cache", None, jacobi=True)


def sampling_run(
    candidates: str, quantize: str | None, attention: str | None, jacobi: bool = False
) -> tuple[str, str, list[str]]:
    """One run of sampling_runs. attention None is the default of the device."""
    kind = f"codes {candidates}" + (" int8" if quantize == "weights+cache" else " int8 weights" if quantize else "")
    options = ["--candidates", candidates]
    options += ["--attention", attention] if attention else []
    options += ["--quantize", quantize] if quantize else []
    options += ["--jacobi"] if jacobi else []
    parts = [attention or "default attention", f"int8 {quantize}" if quantize else None, "jacobi" if jacobi else None]
    return (
        kind,
        f"{candidates} candidate{'s' if candidates != '1' else ''}, " + ", ".join(part for part in parts if part),
        options,
    )


# ---------------------------------------- the table of goals


@dataclasses.dataclass(frozen=True)
class Goal:
    """A row of the table."""

    what: str
    goal: float
    kind: str
    """The kind of the stages that measure it."""
    metric: str | Callable[[dict[str, Any]], float | None]
    """The value of a result: the name of a field, or a function of the result."""
    more: bool = False
    """Whether a larger value is better."""
    with_images: bool = False
    """Whether the seconds of decoding and ranking 96 images, from another stage, are added."""


def per_96(metric: str) -> Callable[[dict[str, Any]], float]:
    """Converts milliseconds per image to seconds for 96 images."""
    return lambda result: 96 * result[metric] / 1e3


GOALS = (
    Goal("codes of 96, s", 0.64, "codes 96", "codes_s"),
    Goal("codes of 96, int8 weights and cache, s", 0.40, "codes 96 int8", "codes_s"),
    Goal("prompt to 96 ranked images, s", 0.80, "codes 96", "codes_s", with_images=True),
    Goal("prompt to 96 ranked images, int8, s", 0.55, "codes 96 int8", "codes_s", with_images=True),
    Goal("share of the floor at 96", 0.75, "codes 96", "share_of_floor", more=True),
    Goal("codes of one, s", 0.40, "codes 1", "codes_s"),
    Goal("codes of one, int8 weights and cache, s", 0.20, "codes 1 int8", "codes_s"),
    Goal("decoding 96 images, s", 0.11, "images", per_96("decode_one_image_ms")),
    Goal("ranking 96 images, s", 0.008, "images", per_96("rank_one_image_ms")),
    Goal("fine-tuning, MFU", 0.45, "training", "MFU", more=True),
    Goal("fine-tuning, sequences/s", 188, "training", "sequences_per_s", more=True),
    Goal("largest difference from the original, float32", 1e-4, "golden", "largest_difference"),
    Goal("codes equal to the original's, float32", 1, "golden", "least_equal_share", more=True),
)
PEER = "times as fast as the original's loop at 96"


def measured(goal: Goal, records: list[Record]) -> list[tuple[float, Record]]:
    """The values of a goal's metric, the best first, each with its record."""
    found = []
    for record in of_kind(records, goal.kind):
        result = record.result or {}
        value = result.get(goal.metric) if isinstance(goal.metric, str) else goal.metric(result)
        if value is not None:
            found.append((float(value), record))
    return sorted(found, key=lambda pair: pair[0], reverse=goal.more)


def of_kind(records: list[Record], kind: str) -> list[Record]:
    """The records of a kind that have a result. Golden parity has one even if it failed."""
    return [record for record in records if record.kind == kind and record.result is not None]


def table(records: list[Record]) -> str:
    """Markdown: each goal with its best run, the stages that are not done, and the best default."""
    lines = ["| what | goal | measured | by |", "|---|---|---|---|"]
    for goal in GOALS:
        lines.append(goal_line(goal, records))
    lines += peer_line(records)
    undone = [record for record in records if record.status != "done"]
    if undone:
        lines += ["", "| stage that is not done | how it ended | why |", "|---|---|---|"]
        lines += [f"| {record.name} | {record.status} | {cell(record.reason)} |" for record in undone]
    return "\n".join([*lines, "", best_default(records)])


def goal_line(goal: Goal, records: list[Record]) -> str:
    """A row of the table."""
    found, images = measured(goal, records), of_kind(records, "images")
    if not found or (goal.with_images and not images):
        reason = why_not(records, goal.kind if not found else "images")
        return f"| {goal.what} | {goal.goal:g} | not measured | {cell(reason)} |"
    best, record = found[0]
    by = command(record)
    if goal.with_images:
        result = images[0].result or {}
        best += per_96("decode_one_image_ms")(result) + per_96("rank_one_image_ms")(result)
        by += f" + {command(images[0])}"
    reached = best >= goal.goal if goal.more else best <= goal.goal
    return f"| {goal.what} | {goal.goal:g} | {best:.4g}, {'met' if reached else 'missed'} | {cell(by)} |"


def peer_line(records: list[Record]) -> list[str]:
    """The row that compares with the original's loop; none without --peer."""
    peers = [record for record in records if record.kind == "peer"]
    if not peers:
        return []
    ours = measured(GOALS[0], records)
    if not of_kind(peers, "peer") or not ours:
        reason = why_not(records, "codes 96" if of_kind(peers, "peer") else "peer")
        return [f"| {PEER} | 1 | not measured | {cell(reason)} |"]
    ratio = (peers[0].result or {})["peer_codes_s"] / ours[0][0]
    by = f"{command(peers[0])} beside {command(ours[0][1])}"
    return [f"| {PEER} | 1 | {ratio:.4g}, {'met' if ratio >= 1 else 'missed'} | {cell(by)} |"]


def why_not(records: list[Record], kind: str) -> str:
    """Why no stage of a kind measured anything."""
    counts: dict[str, list[Record]] = {}
    for record in records:
        if record.kind == kind:
            counts.setdefault(record.status, []).append(record)
    if not counts:
        return "not asked for"
    if list(counts) == ["done"]:
        return "not known for this device"
    undone = {status: some for status, some in counts.items() if status != "done"}
    return "; ".join(f"{len(some)} {status}: {some[0].reason}" for status, some in undone.items())


def command(record: Record) -> str:
    """The device, and the command without the options that all runs have."""
    device = (record.result or {}).get("device", "")
    return f"{device}: {' '.join(word for word in record.command if word != '--codes-only')}"


def one_line(text: str) -> str:
    """Text without line breaks."""
    return " ".join(text.split())


def cell(text: str) -> str:
    """Text for a cell of a Markdown table, on one line and with | escaped."""
    return one_line(text).replace("|", "\\|")


def best_default(records: list[Record]) -> str:
    """The attention backend that is fastest for the codes of 96 without quantization, and the second."""
    found = measured(GOALS[0], records)
    if not found:
        return f"best default: not known; {one_line(why_not(records, 'codes 96'))}"
    (seconds, record), *others = found
    result = record.result or {}
    text = f"best default: attention={result['attention']}, cache sizes={len(result['cache_lengths'])}, "
    text += f"dtype={result['dtype']}, batch={result['batch']}: codes of {result['candidates']} in {seconds:.4g} s on "
    text += str(result["device"])
    if others:
        text += f"; next {(others[0][1].result or {})['attention']}, {others[0][0]:.4g} s"
    return text


# ---------------------------------------- the command


def parse_arguments() -> argparse.Namespace:
    """The command line, checked before anything runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path, metavar="DIR", help="folder for the results; must have none yet")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="time for all stages, kept to within 6 s (default: no limit)"
    )
    parser.add_argument("--preset", choices=LEAST_S, default="1.3b", help="the network (default: %(default)s)")
    parser.add_argument("--peer", type=path, metavar="DIR", help="also time this clone of the original repository")
    text = "run only stages with one of these in their name or command (default: all)"
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help=text)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    arguments = parser.parse_args()
    if arguments.peer and (reason := missing(arguments.peer)):
        parser.error(f"--peer {arguments.peer}: {reason}")
    arguments.stages = [
        stage
        for stage in stages(arguments.preset, arguments.peer)
        if any(text in stage.name or text in " ".join(stage.command) for text in arguments.only)
    ]
    if not arguments.stages:
        texts = " or ".join(map(repr, arguments.only))
        parser.error(f"no stage has {texts} in its name or command; --dry-run lists them")
    if not arguments.dry_run and arguments.out is None:
        parser.error("--out DIR is needed, for the results")
    if arguments.out is not None and (arguments.out / RESULTS).exists():
        parser.error(f"{arguments.out} has results already; name another folder")
    return arguments


def main() -> None:
    """Parses the command line, runs the stages, prints the table."""
    arguments = parse_arguments()
    if arguments.dry_run:
        for stage in arguments.stages:
            print(f"python -m scripts.bench.{' '.join(stage.command)}    # {stage.name}, {stage.limit_s:.0f} s at most")
        return
    folder = Folder(arguments.out)
    records, interrupted = run_stages(arguments.stages, folder, arguments.budget, table)
    print((folder.path / TABLE).read_text(encoding="utf-8"), end="")
    done = sum(record.status == "done" for record in records)
    print(f"{done} of {len(records)} stages done; results in {folder.path}", file=sys.stderr)
    if interrupted:
        sys.exit(130)


if __name__ == "__main__":
    main()
