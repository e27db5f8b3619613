"""`mindalle finetune`, `train-vqgan`, `train-clip`, `train-tokenizer`: what reaches the functions that do the work."""

import importlib
import shlex

import pytest
from commands import message
from image_folders import fill

from mindalle_jax.data import codes
from mindalle_jax.errors import DataError
from mindalle_jax.runtime import devices

RUNS = {
    "finetune": ("training.finetune", "finetune", "{out}: a model; mindalle sample {caption} --model {out}\n"),
    "train-vqgan": (
        "training.vqgan.run",
        "train_vqgan",
        "{out}: a VQGAN, for training.vqgan of finetune; mindalle prepare-codes --model {out} --data {data} "
        "--out {out}-codes\n",
    ),
    "train-clip": (
        "training.clip.run",
        "train_clip",
        "{out}: a CLIP model; mindalle sample {caption} --ranker {out}\n",
    ),
}
"""Module and name of the function of a verb, and what is printed in the end."""


@pytest.fixture
def trained(monkeypatch):
    """trained(verb, complete=True) -> list of the calls of the verb's function, which gives `complete` or raises it."""

    monkeypatch.setattr(codes, "vqgan_digest", lambda folder: "of the model that was trained")

    def replace(verb: str, complete=True) -> list:
        calls = []

        def train(*arguments, **options):
            calls.append((arguments, options))
            if isinstance(complete, Exception):
                raise complete
            out = arguments[2]
            out.mkdir(exist_ok=True)
            tokenizer = "training: {tokenizer: t}\n" if verb == "train-clip" else ""
            text = f"data: {{train: {out.parent / 'photos'}}}\n{tokenizer}"
            (out / "run.yaml").write_text(text, encoding="utf-8")
            return complete

        module, name, _ = RUNS[verb]
        monkeypatch.setattr(importlib.import_module(f"mindalle_jax.{module}"), name, train)
        return calls

    return replace


@pytest.mark.parametrize("verb", RUNS)
def test_a_run_gets_its_arguments(mindalle_cli, trained, tmp_path, verb):
    """And tells what to do with its result, on standard output."""
    calls, out, config = trained(verb), tmp_path / "run", tmp_path / "a.yaml"
    fill(tmp_path / "photos", a_jpg=None, a_txt="it's a cat\n")
    told = RUNS[verb][2].format(out=out, data=tmp_path / "photos", caption=shlex.quote("it's a cat"))
    options, overrides = ["--config", config, "--out", out], ["data.train=photos", "training.seed=3"]
    for arguments in ([*options, *overrides], [*overrides, *options]):
        assert mindalle_cli(verb, *arguments) == (0, told, "")
        assert calls.pop() == ((config, overrides, out), {"ignore_fingerprint": False, "extend": False})
    assert mindalle_cli(verb, *options, "--ignore-fingerprint", "--extend")[0] == 0
    assert calls == [((config, [], out), {"ignore_fingerprint": True, "extend": True})]


@pytest.mark.parametrize("verb", RUNS)
def test_a_run_that_is_not_complete_is_an_interruption(mindalle_cli, trained, tmp_path, verb):
    """A script with `&&` must not go on as if there were a model."""
    trained(verb, complete=False)
    code, stdout, err = mindalle_cli(verb, "--config", tmp_path / "a.yaml", "--out", tmp_path / "run")
    assert (code, stdout, message(err, verb)) == (130, "", "interrupted")


@pytest.mark.parametrize("verb", RUNS)
def test_an_override_without_a_value_is_refused(mindalle_cli, trained, tmp_path, verb):
    """`data.train photos` has two of them. Nothing is read before."""
    calls = trained(verb)
    code, stdout, err = mindalle_cli(
        verb, "data.train", "photos", "--config", tmp_path / "missing.yaml", "--out", tmp_path / "run"
    )
    assert (code, stdout, calls) == (2, "", [])
    assert message(err, verb) == "overrides have the form section.key=value, such as data.train=photos"


@pytest.mark.parametrize("missing", ["--config", "-o/--out"])
@pytest.mark.parametrize("verb", RUNS)
def test_configuration_and_folder_are_required(mindalle_cli, trained, verb, missing):
    calls, given = trained(verb), {"--config": "a.yaml", "-o/--out": "run"}
    del given[missing]
    code, stdout, err = mindalle_cli(verb, *(part.rpartition("/")[2] for pair in given.items() for part in pair))
    assert (code, stdout, calls) == (2, "", []) and f"the following arguments are required: {missing}" in err


def test_an_error_of_a_run_is_its_message_and_code(mindalle_cli, trained, tmp_path):
    trained("finetune", DataError("photos: no such folder"))
    code, stdout, err = mindalle_cli("finetune", "--config", tmp_path / "a.yaml", "--out", tmp_path / "run")
    assert (code, stdout, message(err, "finetune")) == (9, "", "photos: no such folder")


@pytest.mark.parametrize("distributed", [False, True])
def test_processes_are_joined_before_anything_else(mindalle_cli, trained, tmp_path, monkeypatch, distributed):
    """JAX cannot be told of other processes once it has used a device."""
    calls, joined = trained("finetune"), []
    monkeypatch.setattr(devices, "join_processes", lambda: joined.append(len(calls)))
    options = ["--distributed"] if distributed else []
    assert mindalle_cli("finetune", "--config", tmp_path / "a.yaml", "--out", tmp_path / "run", *options)[0] == 0
    assert joined == [0] * distributed and len(calls) == 1


def test_a_tokenizer_is_trained(mindalle_cli, tmp_path, monkeypatch):
    """Its report goes to standard output."""
    module, calls = importlib.import_module("mindalle_jax.training.tokenizers"), []

    def train(*arguments, **options):
        calls.append((arguments, options))
        return "512 tokens"

    monkeypatch.setattr(module, "train_tokenizer", train)
    arguments = ["photos", "--out", tmp_path / "tokenizer", "--vocab-size", 512]
    assert mindalle_cli("train-tokenizer", *arguments, "--kind", "clip")[:2] == (0, "512 tokens\n")
    assert calls == [(("photos", tmp_path / "tokenizer"), {"vocab_size": 512, "kind": "clip"})]
    code, _, err = mindalle_cli("train-tokenizer", *arguments, "--kind", "bert")
    assert code == 2 and "argument --kind: invalid choice: 'bert'" in err and len(calls) == 1
