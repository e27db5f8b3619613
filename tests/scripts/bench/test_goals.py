"""The goals: all stages in the order of their worth, and a table that tells the best of them, or why there is none."""

import json
import os
import subprocess
import sys

import pytest

from scripts.bench import goals
from scripts.bench.stages import Record


def sampled(codes_s, attention, kind="codes 96", quantize=None, **more):
    result = {"bench": "sampling", "candidates": 96, "attention": attention, "quantize": quantize, "codes_s": codes_s}
    result |= {"device": "H100", "dtype": "bfloat16", "batch": 96, "cache_lengths": [64, 256]}
    result |= {"share_of_floor": 0.48 / codes_s}
    command = ["sampling", "--codes-only", "--attention", attention]
    return Record(kind, f"{attention} {kind}", command, "done", 1.0, "", result | more)


def images(decode_ms=1.0, rank_ms=0.1):
    result = {"decode_one_image_ms": decode_ms, "rank_one_image_ms": rank_ms, "device": "H100"}
    return Record("images", "images", ["images", "--images", "96"], "done", 1.0, "", result)


def trained(mfu, sequences_per_s):
    result = {"MFU": mfu, "sequences_per_s": sequences_per_s, "device": "H100"}
    return Record("training", "training", ["training"], "done", 1.0, "", result)


def undone(kind, status, reason):
    return Record(kind, f"{kind} {status}", ["sampling"], status, 1.0, reason)


def rows(records):
    return {line.split("|")[1].strip(): line for line in goals.table(records).splitlines() if line.startswith("|")}


def test_each_goal_has_the_best_of_its_runs():
    found = rows(
        [
            sampled(0.7, "xla"),
            sampled(0.6, "cudnn"),
            sampled(0.5, "xla", "codes 96 int8", "weights+cache"),
            sampled(0.45, "pallas", "codes 96 int8 weights", "weights"),
            sampled(0.3, "xla", "codes 1"),
            images(),
            trained(None, 190.0),
        ]
    )
    assert found["codes of 96, s"] == "| codes of 96, s | 0.64 | 0.6, met | H100: sampling --attention cudnn |"
    assert "| 0.5, missed | H100: sampling --attention xla |" in found["codes of 96, int8 weights and cache, s"]
    assert "| 0.8, met |" in found["share of the floor at 96"]
    assert "| 0.096, met |" in found["decoding 96 images, s"] and "0.0096, missed" in found["ranking 96 images, s"]
    # 0.6 s for codes, and 96 times 1.1 ms for images, of another stage.
    assert "| 0.7056, met |" in found["prompt to 96 ranked images, s"]
    assert found["prompt to 96 ranked images, s"].endswith("cudnn + H100: images --images 96 |")
    assert "| not measured | not asked for |" in found["codes of one, int8 weights and cache, s"]
    assert "| not measured | not known for this device |" in found["fine-tuning, MFU"]
    assert "| 190, met |" in found["fine-tuning, sequences/s"]


def test_a_goal_that_was_not_measured_says_why():
    records = [
        undone("codes 96", "failed", "exit code 1: a | b\nc"),
        undone("codes 96", "timed out", "after 180 s"),
        undone("codes 96", "not reached", "0 s of the budget were left"),
        undone("images", "not reached", "SIGTERM"),
        sampled(0.5, "xla", "codes 96 int8", "weights+cache"),
        undone("peer", "failed", "exit code 1"),
    ]
    found = rows(records)
    expected = "| not measured | 1 failed: exit code 1: a \\| b c; 1 timed out: after 180 s; 1 not reached: 0 s of"
    assert expected in found["codes of 96, s"]
    assert "| not measured | 1 not reached: SIGTERM |" in found["prompt to 96 ranked images, int8, s"]
    assert "| not measured | 1 failed: exit code 1 |" in found[goals.PEER]
    assert "| codes 96 timed out | timed out | after 180 s |" in goals.table(records)
    assert goals.table(records).splitlines()[-1].startswith("best default: not known; 1 failed")


def test_the_best_default_is_the_fastest_that_is_not_quantized():
    text = goals.table([sampled(0.7, "xla"), sampled(0.6, "cudnn"), sampled(0.1, "pallas", "codes 96 int8")])
    expected = "best default: attention=cudnn, cache sizes=2, dtype=bfloat16, batch=96: codes of 96 in 0.6 s on H100"
    assert text.splitlines()[-1] == f"{expected}; next xla, 0.7 s"


def test_the_original_is_compared_with_our_best():
    peer = Record("peer", "peer", ["peer_sampling", "DIR"], "done", 1.0, "", {"peer_codes_s": 3.0, "device": "H100"})
    expected = "| 5, met | H100: peer_sampling DIR beside H100: sampling --attention cudnn |"
    assert expected in rows([peer, sampled(0.7, "xla"), sampled(0.6, "cudnn")])[goals.PEER]


def test_every_stage_is_there_once_in_the_order_of_worth(tmp_path):
    found = goals.stages("1.3b", tmp_path)
    assert len({stage.name for stage in found}) == len({stage.command for stage in found}) == len(found) == 26
    kinds = list(dict.fromkeys(stage.kind for stage in found))
    codes = ["codes 96", "codes 96 int8", "codes 96 int8 weights", "codes 1", "codes 1 int8"]
    assert kinds == ["golden", "peer", *codes, "images", "training"]
    assert {goal.kind for goal in goals.GOALS} <= set(kinds)
    # cuDNN reads no int8 cache.
    assert not [stage for stage in found if {"cudnn", "weights+cache"} <= set(stage.command)]


def test_dry_run_lists_what_would_run(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["goals", "--dry-run", "--preset", "demo-scenes", "--only", "jacobi", "golden"])
    goals.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python -m scripts.bench.golden    # golden parity, 120 s")
    assert len(lines) == 3 and all("--preset demo-scenes" in line and "--jacobi" in line for line in lines[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nothing at all", "--out", "x"], "no stage has 'nothing at all'"),
        (["--preset", "tiny"], "--out DIR is needed"),
        (["--peer", "nowhere", "--out", "x"], "nowhere is no clone of the original repository"),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(capsys, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["goals", *options])
    with pytest.raises(SystemExit) as ended:
        goals.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_of_it_on_a_cpu(tmp_path, pytestconfig, golden_small):
    """One stage or more of every kind, with the smallest network; cuDNN fails, as on any device that has none."""
    only = [
        "golden",
        "96 candidates, xla-private",
        "96 candidates, cudnn",
        "1 candidate, default",
        "ranking",
        "training, defaults",
    ]
    command = [sys.executable, "-m", "scripts.bench.goals", "--preset", "tiny", "--out", str(tmp_path / "out")]
    # Not the eight devices of the tests: a batch of training has so many sequences per device.
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [*command, "--budget", "500", "--only", *only], cwd=pytestconfig.rootpath, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    records = {record["name"]: record for record in map(json.loads, lines)}
    assert len(records) == 10
    failed = {name for name, record in records.items() if record["status"] != "done"}
    assert failed == {name for name in records if "cudnn" in name}, done.stderr
    for record in records.values():
        if record["status"] == "done":
            assert {"bench", "device", "dtype", "batch", "versions"} <= record["result"].keys()
    table = done.stdout
    assert table == (tmp_path / "out" / "table.md").read_text()
    assert "best default: attention=xla-private" in table
    assert table.count("not measured") == 1  # MFU: no peak of a CPU is known
    assert "| largest difference from the original, float32 | 0.0001 |" in table and "e-06, met" in table


@pytest.fixture
def golden_small():
    from scripts.bench.golden import FOLDERS

    assert any((folder / "golden.npz").is_file() for folder in FOLDERS)  # tests/golden is in every clone
