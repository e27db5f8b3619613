"""Training of the transformer from nothing: what it starts from, what a run makes of it, and what is refused."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import checkpoint_arrays, metrics, weights_crc32, write_code_set, write_config

from mindalle_jax import Dalle, ImageGPT, cli
from mindalle_jax.config.file import load_config
from mindalle_jax.storage.initialize import CODE_ROWS, order_rows, place_rows, write_fresh
from mindalle_jax.storage.results import write_vqgan
from mindalle_jax.storage.weights import leaf_shapes, map_weights, read_manifest
from mindalle_jax.text.tokenizer import VOCAB_FILE
from mindalle_jax.training.finetune import FinetuneRun, read_finetune
from mindalle_jax.training.loop import Run
from mindalle_jax.training.run_dir import check_base, start_folder
from mindalle_jax.training.vqgan.run import vqgan_model_config

STAGE2 = {
    "type": "transformer1d", "vocab_size_txt": 110, "vocab_size_img": 80,
    "hparams": {"embed_dim": 48, "n_layers": 1, "n_heads": 2, "ctx_len_img": 64, "ctx_len_txt": 12},
}  # fmt: skip
"""Other sizes than those of the tiny model."""
FIXED = ("/bias", "/scale", "pos_emb_img/embedding", "pos_emb_txt/embedding")
"""Endings of what no seed changes."""
IMAGES = {"type": "igpt", "use_cls_cond": False, "hparams": {"n_layers": 1}}


def finetuned(config: Path, out: Path, *overrides: str) -> Path:
    assert cli.main(["finetune", "--config", str(config), "--out", str(out), *overrides]) == 0
    return out


def leaves(folder: Path, stage: str = "stage2") -> dict[str, np.ndarray]:
    """Parameters of a model folder by path."""
    return map_weights(folder / f"{stage}.safetensors", read_manifest(folder)["tensors"][stage])


def digits(folder: Path) -> dict[str, int]:
    """CRC-32s of the VQGAN."""
    return {path: entry["crc32"] for path, entry in read_manifest(folder)["tensors"]["stage1"].items()}


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory, tiny_model_folder, tiny_config) -> Path:
    """The tiny model's VQGAN alone, as `mindalle train-vqgan` leaves one. Read only."""
    folder = tmp_path_factory.mktemp("scratch") / "vqgan"
    folder.mkdir()
    write_vqgan(vqgan_model_config(tiny_config.stage1), folder, leaves(tiny_model_folder, "stage1"), "a test")
    return folder


@pytest.fixture(scope="module")
def codes(tmp_path_factory, vqgan) -> Path:
    """Twelve captioned pictures as codes. Read only."""
    return write_code_set(tmp_path_factory.mktemp("scratch-data") / "codes", vqgan, 12)


def write(path: Path, vqgan: Path, tokenizer: Path | str, codes: Path, stage2: dict[str, Any] = STAGE2) -> Path:
    """A configuration of two updates from nothing, with a checkpoint after each."""
    training: dict[str, Any] = {"init_from": "scratch", "vqgan": str(vqgan), "tokenizer": str(tokenizer)}
    training |= {"checkpoint_every_steps": 1, "remat": "none"}
    dataset = {"context_length": 12, "image_resolution": 32}
    optimizer = {"base_lr": 1e-3, "max_steps": 2}
    return write_config(path, vqgan, codes, training=training, dataset=dataset, optimizer=optimizer, stage2=stage2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, vqgan, tiny_model_folder, codes) -> tuple[Path, Path]:
    """(configuration, folder) of a run from a VQGAN alone and a tokenizer. Read only."""
    work = tmp_path_factory.mktemp("scratch-run")
    config = write(work / "run.yaml", vqgan, tiny_model_folder / "tokenizer", codes)
    return config, finetuned(config, work / "out")


# What it starts from


@pytest.mark.parametrize("kind", ["text", "classes", "unconditional"])
def test_fresh_weights_follow_the_rule(kind, tmp_path, request, tiny_model_folder, tiny_config):
    """N(0, 0.02), biases 0, gains 1, the start vector without classes N(0, 1): by five deviations of each estimate.

    Of n numbers from N(0, s) the mean has the deviation s / sqrt(n), and the deviation found s / sqrt(2 n). What has a
    row for each code is a projection of the codebook: a linear function of its rows without their mean, and no more.
    """
    config = tiny_config if kind == "text" else request.getfixturevalue("tiny_igpt_config")
    if kind == "unconditional":
        write_config(tmp_path / "igpt.yaml", tiny_model_folder, tmp_path, stage2={"type": "igpt"})
        config = read_finetune(tmp_path / "igpt.yaml", [])[0].model_config()
    write_fresh(tiny_model_folder, tiny_model_folder / "tokenizer", config, tmp_path / "fresh")
    found = leaves(tmp_path / "fresh")
    assert {path: leaf.shape for path, leaf in found.items()} == leaf_shapes(config, "stage2")
    codebook = leaves(tiny_model_folder, "stage1")["codebook"].astype(np.float64)
    codebook -= codebook.mean(axis=0)
    drawn, of_codes = 0, []
    for path, leaf in found.items():
        if path.endswith(("/bias", "/scale")):
            np.testing.assert_array_equal(leaf, float(path.endswith("/scale")), err_msg=path)
            continue
        if path in CODE_ROWS:
            assert abs(leaf.std() * math.sqrt(leaf.shape[1]) - 1) < 0.25, path
            projection = np.linalg.lstsq(codebook, leaf, rcond=None)[0]
            assert np.abs(codebook @ projection - leaf).max() < 1e-5, path
            of_codes.append(path)
            continue
        if path == "pos_emb_img/embedding":
            np.testing.assert_array_equal(leaf, place_rows(config.stage1.code_size, leaf.shape[1]))
            continue
        if path == "pos_emb_txt/embedding":
            np.testing.assert_array_equal(leaf, order_rows(*leaf.shape))
            continue
        std = 1.0 if path.startswith("sos") and kind == "unconditional" else 0.02
        if path == "tok_emb_txt/embedding":
            std = 1 / math.sqrt(leaf.shape[1])
        assert abs(leaf.mean()) < 5 * std / math.sqrt(leaf.size), path
        assert abs(leaf.std() / std - 1) < 5 / math.sqrt(2 * leaf.size), path
        drawn += leaf.size
    assert len(of_codes) == 2
    fixed = (*FIXED, *CODE_ROWS)
    others = [leaf for path, leaf in found.items() if not path.endswith(fixed)]
    values = np.concatenate([leaf.ravel() for leaf in others])
    assert len(np.unique(values)) > 0.98 * drawn, "parameters share their numbers"  # float32 has few equal by chance
    assert load_config(tmp_path / "fresh" / "config.yaml") == config
    assert (tmp_path / "fresh" / "tokenizer").exists() == (kind == "text")


def test_a_run_starts_from_fresh_weights_of_its_seed_beside_the_vqgan(finished, vqgan, tmp_path):
    """Which are there for whoever asks what a run began with, and are made again, bit by bit, by the same seed."""
    config_file, out = finished
    assert digits(out / "start") == digits(out) == digits(vqgan)
    starts = {}
    for seed in (3, 4):
        config, base = read_finetune(config_file, [f"training.seed={seed}"])
        check_base(config, base)
        starts[seed] = weights_crc32(start_folder(config, base, tmp_path / str(seed)))
    assert starts[3] == weights_crc32(out / "start")
    drawn = {path for path in starts[3] if not path.endswith(FIXED)}
    assert drawn and all(starts[3][path] != starts[4][path] for path in drawn)


def test_a_whole_model_gives_its_vqgan_and_its_tokenizer(finished, tiny_model_folder, tmp_path, codes):
    """And none of its transformer: what the run starts from is as from the VQGAN alone."""
    file = write(tmp_path / "run.yaml", tiny_model_folder, "", codes)
    config, base = read_finetune(file, [])
    check_base(config, base)
    start = start_folder(config, base, tmp_path / "out")
    assert weights_crc32(start) == weights_crc32(finished[1] / "start")
    for file in (tiny_model_folder / "tokenizer").iterdir():
        assert (start / "tokenizer" / file.name).read_bytes() == file.read_bytes()


# What comes of it


def test_the_first_loss_is_that_of_guessing_and_the_result_draws(finished, tmp_path):
    """The logits of n features of about 1 and weights of N(0, s^2) vary by n s^2, half of which is added to ln 80.

    For codes n s^2 is 1, and their logits go together; for words it is 0.14^2. Captions have few tokens, the same over
    and over.
    """
    _, out = finished
    first = metrics(out)[0]
    assert first["image_loss"] == pytest.approx(math.log(80) + 0.5, abs=0.25)
    assert first["text_loss"] == pytest.approx(math.log(110), abs=0.14)
    model = Dalle.from_pretrained(out)
    assert (model.config.stage2.hparams.embed_dim, model.config.stage2.hparams.n_layers) == (48, 1)
    drawn = model.generate("the cat", num_candidates=2)
    assert drawn.images.shape == (2, 32, 32, 3) and len(np.unique(drawn.codes)) > 20


def test_a_run_that_was_stopped_ends_as_one_that_was_not(finished, tmp_path, monkeypatch):
    """From its own start folder, whatever would be drawn now."""
    config, straight = finished
    make_batch = FinetuneRun.make_batch

    def stop_and_make_batch(self, rows):
        signal.raise_signal(signal.SIGTERM)
        return make_batch(self, rows)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneRun, "make_batch", stop_and_make_batch)
        assert cli.main(["finetune", "--config", str(config), "--out", str(out)]) == 130
    assert not (out / "summary.json").exists() and [line["step"] for line in metrics(out)] == [1]
    finetuned(config, out)
    assert weights_crc32(out) == weights_crc32(straight)
    expected, found = checkpoint_arrays(straight), checkpoint_arrays(out)
    assert [path for path in expected if found[path].tobytes() != expected[path].tobytes()] == []


@pytest.mark.slow
def test_images_alone_are_learned_from_scratch_too(tiny_model_folder, tmp_path, codes):
    """Over the VQGAN of a model with text, whose tokenizer is left behind."""
    config = write(tmp_path / "run.yaml", tiny_model_folder, "", codes, IMAGES)
    out = finetuned(config, tmp_path / "out", "training.checkpoint_every_steps=2")
    # The start vector of N(0, 1) is of no account: what follows it is normalised.
    assert metrics(out)[0]["loss"] == pytest.approx(math.log(80) + 0.5, abs=0.25)
    assert digits(out) == digits(tiny_model_folder) and not (out / "tokenizer").exists()
    assert ImageGPT.from_pretrained(out).generate(num_candidates=2).images.shape == (2, 32, 32, 3)


# What is refused

WRONG = {
    # name: overrides, exit code, message; a run that would do is left over when they are taken away
    "no vqgan": (["training.vqgan=''"], 3, "training.vqgan names the model whose codes are learned: it"),
    "vqgan without scratch": (["training.init_from={model}"], 3, "must be set with init_from: scratch, and only then"),
    "tokenizer without scratch": (
        ["training.init_from={model}", "training.vqgan=''"], 3, "training.tokenizer works only with init_from: scratch",
    ),
    "freeze": (["training.freeze=['ln_f/.*']"], 3, "training.freeze and training.lora keep weights that a model has"),
    "lora": (["training.lora.rank=2"], 3, "training.freeze and training.lora keep weights that a model has"),
    "no tokenizer": (["training.tokenizer={work}/none"], 4, "none/bpe-16k-vocab.json: missing"),
    "no tokenizer beside the vqgan": (
        ["training.tokenizer=''"], 3, "vqgan has no tokenizer; name one under training.tokenizer",
    ),
    "ids of the tokenizer": (
        ["stage2.vocab_size_txt=100"], 4, "has ids up to 103, but the text embedding has 100 rows",
    ),
    "another stage 1": (["stage1.embed_dim=17"], 3, "does not fit: stage1.embed_dim was 16 and is 17"),
    "another number of codes": (
        ["stage1.n_embed=81", "stage2.vocab_size_img=81"], 3, "does not fit: stage1.n_embed was 80 and is 81",
    ),
    "no such vqgan": (["training.vqgan=nowhere/at/all"], 4, "nowhere/at/all"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_told_and_nothing_is_written(fault, vqgan, tiny_model_folder, codes, tmp_path, capsys):
    overrides, code, text = WRONG[fault]
    config = write(tmp_path / "run.yaml", vqgan, tiny_model_folder / "tokenizer", codes)
    given = [each.format(model=tiny_model_folder, work=tmp_path) for each in overrides]
    assert cli.main(["finetune", "--config", str(config), "--out", str(tmp_path / "out"), *given]) == code
    stdout, err = capsys.readouterr()
    last = err.rstrip("\n").splitlines()[-1]
    assert stdout == "" and last.startswith("mindalle finetune: ") and text in last, err
    assert not (tmp_path / "out").exists()


def test_a_larger_vocabulary_than_the_tokenizer_has_is_no_fault(vqgan, tiny_model_folder, codes, tmp_path):
    """Rows for tokens that never come cost memory alone; a tokenizer that came out small needs no other file."""
    file = write(tmp_path / "run.yaml", vqgan, tiny_model_folder / "tokenizer", codes)
    config, base = read_finetune(file, ["stage2.vocab_size_txt=128"])
    start = start_folder(config, base, tmp_path / "out")
    assert leaves(start)["tok_emb_txt/embedding"].shape == (128, 48)
    assert max(json.loads((start / "tokenizer" / VOCAB_FILE).read_text(encoding="utf-8")).values()) < 128


# A file that says some sizes alone


def test_a_file_may_say_some_sizes_of_a_small_base_alone(tiny_model_folder, codes, tmp_path, monkeypatch):
    """The rest is the base's, not the published model's, whose codes would be 16384 and fit no 80."""
    stage1, stage2 = {"n_embed": 80}, {"hparams": {"n_layers": 2}}
    file = write_config(tmp_path / "run.yaml", tiny_model_folder, codes, stage1=stage1, stage2=stage2)
    config, base = read_finetune(file, [])
    check_base(config, base)
    theirs = load_config(tiny_model_folder / "config.yaml")
    assert (config.dataset, config.stage1, config.stage2) == (theirs.dataset, theirs.stage1, theirs.stage2)
    monkeypatch.setattr(Run, "__call__", lambda *_, **__: True)
    finetuned(file, tmp_path / "out")


def test_a_size_that_is_not_the_bases_is_told(tiny_model_folder, codes, tmp_path, capsys):
    file = write_config(tmp_path / "run.yaml", tiny_model_folder, codes, stage2={"hparams": {"n_layers": 1}})
    assert cli.main(["finetune", "--config", str(file), "--out", str(tmp_path / "out")]) == 3
    assert "does not fit: stage2.hparams.n_layers was 2 and is 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
