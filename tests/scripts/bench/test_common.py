"""What the benches share: the loop that is timed is the one that users run, and every script has help and a report."""

import importlib
import json
import sys

import jax
import numpy as np
import pytest

from scripts.bench import common

SCRIPTS = [
    "golden", "goals", "images", "mixed", "peer_sampling", "plan_sampling", "plan_training", "quantization_effect",
    "rehearse_full_size", "sampling", "start", "training", "vs_torch",
]  # fmt: skip


def test_the_loop_gives_the_codes_of_the_public_api(tiny_dalle):
    """Two chunks of two candidates. A loop of its own would be timed for nothing."""
    model, prompt = tiny_dalle, "the cat and the dog"
    loop = common.DecodeLoop(model._transformer, model._stage2, model.mesh, 2)
    with jax.threefry_partitionable(True), jax.default_matmul_precision("highest"):
        prefix, chunks = loop.prefill(model.tokenize(prompt)[0]), []
        for chunk in range(2):
            (state, codes), parts = loop.start(prefix), []
            for row in range(loop.rows):
                state, codes = loop.decode_row(prefix, row, state, codes, chunk)
                parts.append(np.asarray(codes))
            chunks.append(np.concatenate(parts, axis=1))
            assert np.asarray(state.passes).tolist() == [64, 64]
    expected = model.generate_codes(prompt, num_candidates=4, batch_size=2)
    np.testing.assert_array_equal(np.concatenate(chunks), expected)


def test_tracing_runs_nothing_and_gives_the_program_of_a_row(tiny_dalle):
    model = tiny_dalle
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model._stage2)
    loop = common.DecodeLoop(model._transformer, shapes, model.mesh, 2, guidance_scale=2.0)
    traced, state = loop.trace((2, 12))
    assert f"length={loop.side}" in str(traced.jaxpr) and state.logits.shape == (2, 2, 80)


def test_a_report_is_a_table_and_then_one_json_line(capsys):
    head = common.conditions("start", "cpu: cpu", "float32", 8, {"torch": "2"}, preset="tiny")
    common.report(head, {"x_s": 0.5, "by_mode": {"a": {"y": 1}, "b": {"y": 2}}, "rows": [{"z": 3}, {"z": 4}]})
    *lines, last = capsys.readouterr().out.splitlines()
    assert {"bench", "device", "dtype", "batch", "versions", "preset", "x_s", "by_mode", "rows"} == json.loads(
        last
    ).keys()
    assert json.loads(last)["versions"].keys() == {"mindalle-jax", "jax", "python", "torch"}
    assert ["x_s", "0.5"] in [line.split() for line in lines]
    assert ["by_mode", "b", "y", "2"] in [line.split() for line in lines]
    assert ["rows", "z", "4"] in [line.split() for line in lines]
    device = jax.devices()[0]
    assert common.conditions("x", device, "bfloat16", None)["platform"] == "cpu"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_an_example_and_defaults(name, capsys, monkeypatch):
    module = importlib.import_module(f"scripts.bench.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    text = capsys.readouterr().out
    assert ended.value.code == 0 and f"python -m scripts.bench.{name}" in text and "default" in text


def test_every_script_is_tested_for_help(pytestconfig):
    files = (pytestconfig.rootpath / "scripts" / "bench").glob("*.py")
    assert {file.stem for file in files if "\ndef main()" in file.read_text(encoding="utf-8")} == set(SCRIPTS)
