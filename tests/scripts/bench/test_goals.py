"""The table of goals: the best run of each, told apart by what it drew."""

import pytest


@pytest.fixture
def script(request, monkeypatch):
    """scripts/bench/goals.py as a module."""
    from scripts.bench import goals as bench_goals

    return bench_goals


def run(candidates, codes_s, attention, quantize=None):
    figures = {
        "bench": "sampling",
        "candidates": candidates,
        "quantize": quantize,
        "codes_s": codes_s,
        "device": "H100",
    }
    figures |= {"prompt_to_ranked_pictures_s": codes_s + 0.1, "share_of_floor": 0.48 / codes_s}
    figures |= {"decode_one_picture_ms": 1.0, "rank_one_picture_ms": 0.1}
    return figures | {"command": ["sampling.py", "--preset", "1.3b", "--attention", attention]}


def test_each_goal_has_the_best_of_its_runs(script):
    training = {
        "bench": "training",
        "MFU": None,
        "sequences_per_s": 190.0,
        "device": "H100",
        "command": ["a", "b", "c"],
    }
    runs = [
        run(96, 0.7, "xla"),
        run(96, 0.6, "cudnn"),
        run(96, 0.5, "xla", "weights+cache"),
        run(1, 0.3, "xla"),
        training,
    ]
    rows = {line.split("|")[1].strip(): line for line in script.table(runs).splitlines()[2:]}
    assert rows["codes of 96, s"] == "| codes of 96, s | 0.64 | 0.6 | H100, --attention cudnn |"
    assert "| 0.5, missed | H100, --attention xla |" in rows["codes of 96, int8 weights and cache, s"]
    assert "| 0.8 |" in rows["share of the floor at 96"] and "missed" not in rows["share of the floor at 96"]
    assert "| 0.096 |" in rows["decoding 96 pictures, s"] and "0.0096, missed" in rows["ranking 96 pictures, s"]
    assert "| not measured |" in rows["codes of one, int8 weights and cache, s"]
    assert "| not measured |" in rows["fine-tuning, MFU"] and "| 190 |" in rows["fine-tuning, sequences/s"]
    assert len(rows) == len(script.GOALS)


def test_every_run_is_there_once(script):
    found = [" ".join(command) for command in script.commands("1.3b")]
    assert len(found) == len(set(found)) == 21
    assert not [command for command in found if "cudnn" in command and "quantize" in command]
