"""Stages: each ends within its limit, the budget is kept, and results survive whatever ends the run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from scripts.bench import stages
from scripts.bench.stages import Folder, Stage, run_stages


class Code(Stage):
    """A stage of Python code."""

    def argv(self):
        return [sys.executable, "-c", self.command[0]]


def code(name, text, limit_s=30.0, least_s=0.0):
    return Code("kind", name, (text,), limit_s, least_s)


def names(records):
    return "\n".join(f"{record.name}: {record.status}" for record in records)


def run(folder, *some, budget_s=None):
    records, interrupted = run_stages(some, Folder(folder), budget_s, names)
    assert not interrupted
    written = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [line["status"] for line in written] == [record.status for record in records]
    assert (folder / "table.md").read_text() == names(records) + "\n"
    return records


def is_gone(pid):
    """Whether a process has ended; a zombie has."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_result_is_the_last_line_and_a_failure_does_not_stop_the_next(tmp_path):
    first, second, third, fourth = run(
        tmp_path / "out",
        code("fails", "print('{\"x\": 1}'); raise RuntimeError('no cuDNN')"),
        code("killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        code("says nothing", "print('done')"),
        code("works", "print('a table'); print('{\"x\": 2}')"),
    )
    assert first.status == "failed" and first.reason == "exit code 1: RuntimeError: no cuDNN"
    assert first.result == {"x": 1}  # golden parity prints its differences before it fails
    assert second.status == "failed" and second.reason.startswith("exit code -9")
    assert third.status == "failed" and "not JSON" in third.reason
    assert fourth.status == "done" and fourth.result == {"x": 2} and fourth.reason == ""


def test_a_limit_ends_a_stage_and_all_that_it_started(tmp_path, monkeypatch):
    """A process that ignores SIGTERM, with a child of its own: both would hold the GPU's memory."""
    monkeypatch.setattr(stages, "GRACE_S", 0.5)
    text = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
print('{{"x": 1}}', flush=True)
time.sleep(60)
"""
    start = time.monotonic()
    late, after = run(tmp_path / "out", code("late", text, limit_s=2.0), code("after", "print('{}')"))
    assert (late.status, late.reason, late.result) == ("timed out", "after 2 s", {"x": 1})
    assert after.status == "done" and time.monotonic() - start < 20
    assert all(is_gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_a_budget_shortens_limits_and_says_what_was_not_reached(tmp_path):
    """A later stage that needs less still runs."""
    first, second, third = run(
        tmp_path / "out",
        code("long", "import time; time.sleep(60)", limit_s=50.0),
        code("no room", "print('{}')", least_s=3.0),
        code("short", "pass", least_s=0.5),
        budget_s=2.0,
    )
    assert first.status == "timed out" and first.seconds < 10
    assert second.status == "not reached" and "of the budget were left, 3 is the least" in second.reason
    assert third.status == "not reached"


def test_results_are_not_overwritten(tmp_path):
    run(tmp_path / "out", code("works", "print('{}')"))
    with pytest.raises(FileExistsError):
        Folder(tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_keeps_results_writes_the_table_and_exits_with_130(tmp_path, pytestconfig, number):
    """As when a machine is taken back: the running stage is lost, and nothing else. No JAX is imported here."""
    out = tmp_path / "out"
    sleep = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    driver = f"""
import sys
from scripts.bench import goals, stages
class Code(stages.Stage):
    def argv(self):
        return [sys.executable, "-c", self.command[0]]
result = '{{"codes_s": 0.5, "attention": "xla", "cache_lengths": [1], "dtype": "x", "batch": 1, "candidates": 96, '
result += '"device": "none", "share_of_floor": 0.5}}'
texts = {{"first": f"print({{result!r}})", "second": {sleep!r}, "third": "print(1)"}}
goals.stages = lambda preset, peer: [Code("codes 96", name, (text,), 50.0, 0.0) for name, text in texts.items()]
sys.argv = ["goals", "--out", {str(out)!r}]
try:
    goals.main()
finally:
    assert "jax" not in sys.modules
"""
    root = str(pytestconfig.rootpath)
    process = subprocess.Popen(
        [sys.executable, "-c", driver], cwd=root, env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "not reached" in (out / "table.md").read_text()  # before the signal: SIGKILL would leave this
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [record["status"] for record in records] == ["done", "interrupted", "not reached"]
    assert [record["reason"] for record in records] == ["", number.name, number.name]
    table = (out / "table.md").read_text()
    assert stdout == table and "| codes of 96, s | 0.64 | 0.5, met |" in table and "attention=xla" in table
    assert is_gone(int((tmp_path / "pid").read_text()))
