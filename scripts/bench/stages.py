"""Runs benches one after the other, each in a process of its own with a time limit, and writes each result at once.

Imports no JAX, because the process that runs the stages must not take GPU memory from them.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS, TABLE, LOGS = "results.jsonl", "table.md", "logs"
GRACE_S = 3.0
"""Time for a stage to end after SIGTERM, before SIGKILL."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run of one bench."""

    kind: str
    """The quantity it measures; stages of one kind compete for the same goals."""
    name: str
    """Unique among all stages."""
    command: tuple[str, ...]
    """Script of scripts/bench, and its options."""
    limit_s: float
    """The process is ended after this many seconds."""
    least_s: float = 1.0
    """The stage is not started with less of the budget left."""

    def argv(self) -> list[str]:
        """The command line, to be run in the repository root."""
        return [sys.executable, "-m", f"scripts.bench.{self.command[0]}", *self.command[1:]]


@dataclasses.dataclass(frozen=True)
class Record:
    """The outcome of a stage."""

    kind: str
    name: str
    command: list[str]
    status: str
    """done, failed, timed out, interrupted, or not reached"""
    seconds: float = 0.0
    reason: str = ""
    """Why it is not done."""
    result: dict[str, Any] | None = None
    """The JSON line of the bench."""


class Interrupted(Exception):
    """A signal came while a stage ran."""


class Interruption:
    """Handles Ctrl-C, SIGTERM and SIGHUP: they end the running stage, but never the writing of a result.

    with Interruption() as interruption:
        with interruption.armed():      # here, and only here, a signal raises Interrupted
            process.wait()
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.signal = ""
        """Name of the first signal; empty if none came."""
        self._armed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        self.signal = self.signal or signal.Signals(number).name
        if self._armed:
            raise Interrupted

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Raises Interrupted for a signal that comes within the block, or has come before."""
        self._armed = True
        try:
            if self.signal:
                raise Interrupted
            yield
        finally:
            self._armed = False


class Folder:
    """The folder of the results: results.jsonl, one line per stage; table.md; logs/ with the output of each stage."""

    def __init__(self, path: Path):
        """path: a folder without results; it is created if it does not exist."""
        self.path = path.resolve()
        (self.path / LOGS).mkdir(parents=True, exist_ok=True)
        self._results = self.path / RESULTS
        self._results.touch(exist_ok=False)

    def append(self, record: Record) -> None:
        """Writes a line to disk at once, so that no later failure loses it."""
        with self._results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_table(self, text: str) -> None:
        """Replaces table.md as a whole."""
        partial = self.path / f"{TABLE}.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path / TABLE)


def run_stages(
    stages: Sequence[Stage], folder: Folder, budget_s: float | None, table: Callable[[list[Record]], str]
) -> tuple[list[Record], bool]:
    """Runs the stages within the budget; returns their records, and whether a signal interrupted them.

    table: makes the text of the records so far, including stages that are not started; written after every stage.
    """
    with Interruption() as interruption:
        records = _run_stages(stages, folder, budget_s, table, interruption)
    return records, bool(interruption.signal)


def _run_stages(
    stages: Sequence[Stage],
    folder: Folder,
    budget_s: float | None,
    table: Callable[[list[Record]], str],
    interruption: Interruption,
) -> list[Record]:
    start, records = time.monotonic(), []

    def keep(record: Record) -> None:
        records.append(record)
        folder.append(record)

    waiting = "the stages before it are not over yet"
    for number, stage in enumerate(stages):
        left_s = float("inf") if budget_s is None else budget_s - (time.monotonic() - start)
        if interruption.signal or left_s < stage.least_s:
            used_up = f"{max(left_s, 0):.0f} s of the budget were left, {stage.least_s:.0f} is the least"
            keep(not_reached(stage, interruption.signal or used_up))
            continue
        print(f"[{number + 1}/{len(stages)}] {stage.name}", file=sys.stderr, flush=True)
        record = run_stage(stage, min(stage.limit_s, left_s), folder, interruption)
        keep(record)
        print(f"    {record.status}, {record.seconds:.1f} s {record.reason}", file=sys.stderr, flush=True)
        folder.write_table(table(records + [not_reached(later, waiting) for later in stages[number + 1 :]]))
    folder.write_table(table(records))
    return records


def not_reached(stage: Stage, reason: str) -> Record:
    """The record of a stage that was not started."""
    return Record(stage.kind, stage.name, list(stage.command), "not reached", reason=reason)


def run_stage(stage: Stage, limit_s: float, folder: Folder, interruption: Interruption) -> Record:
    """Runs a stage until its end or its time limit, and ends all processes that it started."""
    log = folder.path / LOGS / re.sub(r"[^\w.+-]+", "-", stage.name)
    # Later stages and later runs reuse the compiled programs.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.path / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = cache | os.environ
    start, status, reason = time.monotonic(), "failed", ""
    with open(f"{log}.out", "w+b") as out, open(f"{log}.err", "w+b") as err:
        # A session of its own: Ctrl-C reaches only this process, and all processes of a stage can be ended together.
        process = subprocess.Popen(
            stage.argv(), stdout=out, stderr=err, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            with interruption.armed():
                code = process.wait(limit_s)
            status, reason = ("done", "") if code == 0 else ("failed", f"exit code {code}")
        except subprocess.TimeoutExpired:
            status, reason = "timed out", f"after {limit_s:.0f} s"
        except Interrupted:
            status, reason = "interrupted", interruption.signal
        finally:
            end_group(process)
        seconds = time.monotonic() - start
        result = last_json(out)
        if status == "failed":
            reason = f"{reason}: {last_error(err)}"
        if status == "done" and result is None:
            status, reason = "failed", "its last line is not JSON"
    return Record(stage.kind, stage.name, list(stage.command), status, round(seconds, 2), reason, result)


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process that leads a session, and all processes that it started: SIGTERM, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # nothing of the group is left
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def last_json(file: Any) -> dict[str, Any] | None:
    """The JSON object on the last line of a file; None without one."""
    lines = _lines(file)
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def last_error(file: Any) -> str:
    """The last line that names an error, or else the last line, cut to 300 characters."""
    lines = _lines(file)
    named = [line for line in lines if re.match(r"([\w.]+(Error|Exception|Exit)\b|scripts\.bench\.\w+): ?", line)]
    return (named or lines or ["it wrote nothing"])[-1][:300]


def _lines(file: Any) -> list[str]:
    file.seek(0)
    return [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
