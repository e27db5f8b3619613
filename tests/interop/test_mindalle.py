"""interop/mindalle.py, key_maps.py: each weight arrives once, unchanged, and comes back equal; or nothing is left.

Sources are written by write_torch_archive and read back by TorchArchive, so that these tests run without torch; where
torch itself is the proof, the test asks for it.
"""

import collections
import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import yaml
from conftest import random_tensors
from golden_sets import GOLDEN_SETS

from mindalle_jax.config.file import dump_config, load_config
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import CheckpointError, ConfigError, MindalleError, OutputError
from mindalle_jax.interop import mindalle
from mindalle_jax.interop.mindalle import export_checkpoint, import_checkpoint
from mindalle_jax.interop.torch_archive import TorchArchive, write_torch_archive
from mindalle_jax.storage.model_folder import STAGE_FILES
from mindalle_jax.storage.weights import leaf_shapes
from mindalle_jax.text.tokenizer import MERGES_FILE, VOCAB_FILE


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    with TorchArchive(path) as archive:
        return {key: archive.read(ref) for key, ref in archive.state_dict().items()}


def write_checkpoint(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path.unlink(missing_ok=True)
    write_torch_archive(path, [(key, a.dtype, a.shape) for key, a in tensors.items()], tensors.__getitem__)
    return path


def edit_checkpoint(path: Path, edit) -> Path:
    """Rewrites a checkpoint after `edit(tensors)` has changed the dict of its tensors, or returned another."""
    tensors = read_checkpoint(path)
    return write_checkpoint(path, edit(tensors) or tensors)


def crcs(folder: Path) -> dict:
    """The manifest without the name and size of the source files, which are not the model."""
    return json.loads((folder / "manifest.json").read_text())["tensors"]


def as_float32(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What an export holds of a checkpoint: float32, of float16 too, all of whose values float32 has."""
    return {key: array.astype(np.float32) for key, array in tensors.items()}


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert set(first) == set(second)
    for key, array in first.items():
        assert second[key].dtype == array.dtype and second[key].shape == array.shape, key
        assert second[key].tobytes() == array.tobytes(), key


def tree(folder: Path) -> dict[str, int | None]:
    """Everything below a folder, hidden or not, with the size of files."""
    return {
        str(path.relative_to(folder)): path.stat().st_size if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def unchanged(folder: Path):
    before = tree(folder)
    yield
    assert tree(folder) == before, "something was left behind, or lost"


@pytest.fixture
def source(tmp_path, tiny_folder) -> Path:
    """A copy of the tiny model in the original's format, to change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "source"))


@pytest.fixture(scope="module")
def tiny_uncond_config(tiny_igpt_config) -> Config:
    hparams = dataclasses.replace(tiny_igpt_config.stage2.hparams, n_classes=None)
    stage2 = dataclasses.replace(tiny_igpt_config.stage2, use_cls_cond=False, hparams=hparams)
    return dataclasses.replace(tiny_igpt_config, stage2=stage2)


@pytest.fixture(params=[f"{origin} {kind}" for origin in ["tiny", *GOLDEN_SETS] for kind in ("text", "cls", "uncond")])
def any_source(request, tmp_path) -> Path:
    """A folder in the original's format: each kind of model with tiny random weights, and each reference model."""
    origin, kind = request.param.split()
    if origin == "tiny":
        name = {"text": "tiny_config", "cls": "tiny_igpt_config", "uncond": "tiny_uncond_config"}[kind]
        write = request.getfixturevalue("write_folder")
        return write(tmp_path / "source", request.getfixturevalue(name), seed=1)
    golden = GOLDEN_SETS[origin]
    source = Path(shutil.copytree(golden / "model", tmp_path / "source", copy_function=shutil.copyfile))
    if kind != "text":
        shutil.copyfile(golden / f"igpt_{kind}.yaml", source / "config.yaml")
        shutil.copyfile(golden / f"igpt_{kind}_init.ckpt", source / "stage2_last.ckpt")
        shutil.rmtree(source / "tokenizer")
    return source


# There and back


def test_import_export_import_loses_nothing(any_source, tmp_path):
    import_checkpoint(any_source, tmp_path / "a")
    export_checkpoint(tmp_path / "a", tmp_path / "b")
    import_checkpoint(tmp_path / "b", tmp_path / "c")
    assert crcs(tmp_path / "a") == crcs(tmp_path / "c")
    for stage in ("stage1", "stage2"):
        first, second = (tmp_path / x / f"{stage}.safetensors" for x in "ac")
        assert first.read_bytes() == second.read_bytes()
        first = as_float32(read_checkpoint(any_source / STAGE_FILES[stage]))
        assert_same_bits(first, read_checkpoint(tmp_path / "b" / STAGE_FILES[stage]))
    written, given = (load_config(folder / "config.yaml") for folder in (tmp_path / "b", any_source))
    assert written.stage2.hparams.n_dense_layers == given.stage2.hparams.n_layers  # which may be left out in `given`
    hparams = dataclasses.replace(written.stage2.hparams, n_dense_layers=given.stage2.hparams.n_dense_layers)
    assert dataclasses.replace(written, stage2=dataclasses.replace(written.stage2, hparams=hparams)) == given
    for name in (VOCAB_FILE, MERGES_FILE):
        if not load_config(any_source / "config.yaml").image_only:
            assert (tmp_path / "b/tokenizer" / name).read_bytes() == (any_source / "tokenizer" / name).read_bytes()


def test_torch_loads_the_export_and_finds_the_same_bits(any_source, tmp_path, torch):
    import_checkpoint(any_source, tmp_path / "a")
    export_checkpoint(tmp_path / "a", tmp_path / "b")
    for name in STAGE_FILES.values():
        first = torch.load(any_source / name, weights_only=True)["state_dict"]
        second = torch.load(tmp_path / "b" / name, weights_only=True, mmap=True)["state_dict"]
        assert_same_bits(
            as_float32({k: v.numpy() for k, v in first.items()}), {k: v.numpy() for k, v in second.items()}
        )


def test_the_oracle_loads_an_export(source, tmp_path, oracle, tiny_config, torch):
    """strict=True: the export has just the keys and shapes of the PyTorch modules."""
    import_checkpoint(source, tmp_path / "a")
    export_checkpoint(tmp_path / "a", tmp_path / "b")
    transformer, vqgan = oracle.configs_from_dict(yaml.safe_load((tmp_path / "b" / "config.yaml").read_text()))
    modules = {"stage1": oracle.VQGAN(vqgan), "stage2": oracle.Transformer(transformer)}
    for stage, module in modules.items():
        module.load_state_dict(torch.load(tmp_path / "b" / STAGE_FILES[stage], weights_only=True)["state_dict"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=lambda t: np.dtype(t).name)
def test_other_float_types_become_float32_of_equal_value(source, tmp_path, dtype):
    for name in STAGE_FILES.values():
        edit_checkpoint(source / name, lambda t: {key: array.astype(dtype) for key, array in t.items()})
    import_checkpoint(source, tmp_path / "a")
    assert {entry["dtype"] for stage in crcs(tmp_path / "a").values() for entry in stage.values()} == {"float32"}
    export_checkpoint(tmp_path / "a", tmp_path / "b")
    for name in STAGE_FILES.values():
        expected = {key: array.astype(np.float32) for key, array in read_checkpoint(source / name).items()}
        assert_same_bits(expected, read_checkpoint(tmp_path / "b" / name))


def test_the_parts_of_a_fused_leaf_are_where_they_belong(source, tmp_path):
    """One leaf holds queries, keys and values of all layers: exchanged, the shapes would still fit."""
    import_checkpoint(source, tmp_path / "a")
    torch_tensors = read_checkpoint(source / "stage2_last.ckpt")
    leaves = safetensors.numpy.load_file(tmp_path / "a" / "stage2.safetensors")
    for layer in range(2):
        for i, part in enumerate(("query", "key", "value")):
            for kind in ("weight", "bias"):
                expected = torch_tensors[f"blocks.{layer}.attn.{part}.{kind}"]
                np.testing.assert_array_equal(leaves[f"blocks/qkv/{kind}"][layer, i], expected)
    kernel = safetensors.numpy.load_file(tmp_path / "a" / "stage1.safetensors")["encoder/conv_in/kernel"]
    expected = read_checkpoint(source / "stage1_last.ckpt")["encoder.conv_in.weight"]  # [out, in, y, x]
    assert kernel.shape == (3, 3, 3, 32)
    assert all(kernel[y, x, i, o] == expected[o, i, y, x] for y, x, i, o in [(0, 1, 2, 3), (2, 0, 1, 31), (1, 2, 0, 7)])


def test_a_bfloat16_model_is_exported_as_float32(tmp_path, tiny_model_folder, tiny_config):
    """Nothing writes such folders yet; the reader takes them, so the exporter must."""
    from mindalle_jax.storage.weights import write_weights

    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "bf16"))
    manifest = json.loads((folder / "manifest.json").read_text())
    leaves = safetensors.numpy.load_file(folder / "stage2.safetensors")
    halves = {name: leaves[name].astype(ml_dtypes.bfloat16) for name in leaf_shapes(tiny_config, "stage2")}
    (folder / "stage2.safetensors").unlink()
    manifest["tensors"]["stage2"] = write_weights(
        folder / "stage2.safetensors", leaf_shapes(tiny_config, "stage2"), halves.items(), "bfloat16"
    )
    (folder / "manifest.json").write_text(json.dumps(manifest))
    export_checkpoint(folder, tmp_path / "out")
    found = read_checkpoint(tmp_path / "out" / "stage2_last.ckpt")
    np.testing.assert_array_equal(found["head_img.weight"], halves["head_img/weight"].astype(np.float32))
    assert {array.dtype.name for array in found.values()} == {"float32"}


# Other sources


@pytest.fixture(scope="module")
def transfer(tmp_path_factory, tiny_igpt_config) -> tuple[Path, dict[str, dict[str, np.ndarray]]]:
    """A checkpoint of transfer training, its keys under `stage1.` and `stage2.`, beside a config.yaml."""
    folder = tmp_path_factory.mktemp("transfer")
    stages = {stage: random_tensors(tiny_igpt_config, stage, seed=2) for stage in STAGE_FILES}
    both = {f"{stage}.{key}": array for stage, tensors in stages.items() for key, array in tensors.items()}
    write_checkpoint(folder / "epoch=7.ckpt", both)
    (folder / "config.yaml").write_text(dump_config(tiny_igpt_config))
    return folder, stages


@pytest.mark.parametrize("kind", ["folder", "file", "file and config"])
def test_a_transfer_checkpoint_is_an_image_only_model(transfer, tmp_path, kind):
    folder, stages = transfer
    if kind == "file and config":
        shutil.copyfile(folder / "epoch=7.ckpt", tmp_path / "alone.ckpt")
        with pytest.raises(
            ConfigError, match="config.yaml: missing; put it beside the weights or name it with --config"
        ):
            import_checkpoint(tmp_path / "alone.ckpt", tmp_path / "a")
        import_checkpoint(tmp_path / "alone.ckpt", tmp_path / "a", config=folder / "config.yaml")
    else:
        import_checkpoint(folder if kind == "folder" else folder / "epoch=7.ckpt", tmp_path / "a")
    export_checkpoint(tmp_path / "a", tmp_path / "b")
    for stage, tensors in stages.items():
        assert_same_bits(tensors, read_checkpoint(tmp_path / "b" / STAGE_FILES[stage]))
    assert not (tmp_path / "a" / "tokenizer").exists()
    assert "ImageGPT.from_pretrained" in (tmp_path / "a" / "README.md").read_text()


def test_a_transfer_checkpoint_with_keys_of_neither_stage_is_refused(transfer, tmp_path):
    folder = Path(shutil.copytree(transfer[0], tmp_path / "source"))
    edit_checkpoint(folder / "epoch=7.ckpt", lambda t: t.update({"ema.decay": np.ones(1, np.float32)}))
    with unchanged(tmp_path), pytest.raises(CheckpointError, match="keys that belong to neither stage: ema.decay"):
        import_checkpoint(folder, tmp_path / "a")


def test_the_vqgan_authors_checkpoint_is_stage_1_only(tmp_path, tiny_config):
    """Theirs holds the discriminator and the perceptual network too, some of it integers."""
    tensors = random_tensors(tiny_config, "stage1", seed=3)
    extra = {
        "loss.discriminator.main.0.weight": np.ones((2, 3, 4, 4), np.float32),
        "loss.discriminator.main.3.num_batches_tracked": np.asarray(5, np.int64),
        "loss.perceptual_loss.lin0.model.1.weight": np.full((1, 4), np.nan, np.float32),
    }
    path = write_checkpoint(tmp_path / "vqgan.ckpt", {**extra, **tensors})
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config))
    report = import_checkpoint(path, tmp_path / "a")
    assert report.tensors == len(tensors)
    assert sorted(os.listdir(tmp_path / "a")) == [
        "LICENSE", "README.md", "config.yaml", "manifest.json", "stage1.safetensors"
    ]  # fmt: skip
    assert list(crcs(tmp_path / "a")) == ["stage1"]
    assert "from_pretrained" not in (tmp_path / "a" / "README.md").read_text(), "there is nothing to load it with"
    export_checkpoint(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b" / "stage2_last.ckpt").exists()
    assert_same_bits(tensors, read_checkpoint(tmp_path / "b" / "stage1_last.ckpt"))
    import_checkpoint(tmp_path / "b" / "stage1_last.ckpt", tmp_path / "c")
    assert crcs(tmp_path / "a") == crcs(tmp_path / "c")


def test_a_vqgan_alone_needs_no_config_when_it_is_the_published_one(tmp_path, tiny_config):
    """f16 with 16384 codes is the default; another one is compared with that, as the first missing key shows."""
    path = write_checkpoint(tmp_path / "vqgan.ckpt", random_tensors(tiny_config, "stage1"))
    message = refused(path, tmp_path / "a", CheckpointError, "does not fit the stage1")
    assert "missing     decoder.up.0.block.2.conv1.weight [128, 128, 3, 3]" in message


def test_what_lightning_saves_beside_the_weights_is_ignored(source, tmp_path, torch):
    expected = read_checkpoint(source / "stage2_last.ckpt")
    for name in STAGE_FILES.values():
        torch.save(
            {
                "epoch": 7,
                "global_step": 12345,
                "pytorch-lightning_version": "1.2.10",
                "callbacks": {OddCallback: {"best": torch.tensor(0.5), "path": Path("/x"), "self": OddCallback()}},
                "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": []}],
                "lr_schedulers": [{"base_lrs": [1e-4]}],
                "hyper_parameters": {"config": OddCallback(), "namespace": collections.deque([1, 2])},
                "state_dict": collections.OrderedDict(
                    (key, torch.from_numpy(array)) for key, array in read_checkpoint(source / name).items()
                ),
            },
            source / name,
        )
    import_checkpoint(source, tmp_path / "a")
    export_checkpoint(tmp_path / "a", tmp_path / "b")
    assert_same_bits(expected, read_checkpoint(tmp_path / "b" / "stage2_last.ckpt"))


class OddCallback:
    """Something that only its author can import, and that must not be asked for."""

    def __init__(self):
        self.secret = {1: ["a", (2.5, None)]}

    def __setstate__(self, state):
        raise AssertionError("code of the file was run")


# What a model folder holds


def test_the_manifest_lists_every_tensor(tmp_path, source):
    import_checkpoint(source, tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    config = load_config(source / "config.yaml")
    for stage in STAGE_FILES:
        assert {name: tuple(e["shape"]) for name, e in manifest["tensors"][stage].items()} == leaf_shapes(config, stage)
        assert all(set(e) == {"dtype", "shape", "crc32"} for e in manifest["tensors"][stage].values())
    assert manifest["source"] == {name: (source / name).stat().st_size for name in STAGE_FILES.values()}
    assert manifest["writer"].startswith("mindalle-jax ")


def test_the_report_counts(tmp_path, source):
    report = import_checkpoint(source, tmp_path / "a")
    arrays = [array for name in STAGE_FILES.values() for array in read_checkpoint(source / name).values()]
    assert (report.target, report.tensors) == (tmp_path / "a", len(arrays))
    assert report.parameters == sum(array.size for array in arrays) and report.weight_bytes == 4 * report.parameters
    assert f"{report.parameters:,} parameters" in str(report) and "verified in" in str(report)
    assert dataclasses.replace(export_checkpoint(tmp_path / "a", tmp_path / "b"), target=0, write_s=1, verify_s=1) == (
        dataclasses.replace(report, target=0, write_s=1, verify_s=1)
    )


def test_the_licence_of_the_source_goes_along(tmp_path, source):
    (source / "LICENSE").write_text("CC BY-NC-SA 4.0, and thanks", encoding="utf-8")
    import_checkpoint(source, tmp_path / "a")
    export_checkpoint(tmp_path / "a", tmp_path / "b")
    import_checkpoint(tmp_path / "b", tmp_path / "c")
    assert {(tmp_path / x / "LICENSE").read_text() for x in "abc"} == {"CC BY-NC-SA 4.0, and thanks"}


def test_without_a_licence_what_is_known_is_written_and_goes_along(tmp_path, source):
    import_checkpoint(source, tmp_path / "a")
    text = (tmp_path / "a" / "LICENSE").read_text()
    assert "CC BY-NC-SA 4.0" in text and "Kakao Brain" in text and '"source"' in text
    export_checkpoint(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "LICENSE").read_text() == text


def test_the_card_is_ready_for_the_hub(tmp_path, source):
    """The title of a folder named 1.3B was once "1"."""
    source.rename(source.with_name("1.3B"))
    import_checkpoint(source.with_name("1.3B"), tmp_path / "a")
    _, front, body = (tmp_path / "a" / "README.md").read_text().split("---\n")
    assert yaml.safe_load(front)["pipeline_tag"] == "text-to-image"
    assert body.startswith("\n# 1.3B\n") and "Dalle.from_pretrained" in body and "32 x 32 pixels" in body


# What is refused. Whatever it is: the file and the reason are named, and nothing is left behind.


def refused(source: Path, target: Path, error: type[MindalleError], message: str, **options) -> str:
    with unchanged(target.parent), pytest.raises(error, match=message) as caught:
        import_checkpoint(source, target, **options)
    return str(caught.value)


def test_all_differences_are_told_at_once(source, tmp_path):
    def edit(tensors):
        tensors["extra.one"] = tensors.pop("ln_f.weight")
        tensors["blocks.0.ln1.weight"] = np.ones(33, np.float32)
        del tensors["head_img.weight"]

    edit_checkpoint(source / "stage2_last.ckpt", edit)
    message = refused(source, tmp_path / "a", CheckpointError, "does not fit the stage2 of config.yaml, 4 differences")
    for line in (
        "missing     ln_f.weight [32]",
        "missing     head_img.weight [80, 32]",
        "unexpected  extra.one [32]",
        "shape       blocks.0.ln1.weight is [33], the config says [32]",
    ):
        assert f"\n  {line}" in message
    assert message.startswith(f"{source / 'stage2_last.ckpt'}: ")


def test_a_long_list_of_differences_is_cut(source, tmp_path):
    edit_checkpoint(source / "stage1_last.ckpt", lambda t: {f"x{i}": np.ones(1, np.float32) for i in range(50)})
    message = refused(source, tmp_path / "a", CheckpointError, "differences")
    assert message.count("\n") == 41 and message.splitlines()[-1].strip().startswith("... and ")


def change_config(folder: Path, **stage2) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["stage2"].update(stage2)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda s: shutil.copyfile(s / "stage1_last.ckpt", s / "stage2_last.ckpt"), "this is a checkpoint of stage1"),
        (lambda s: shutil.copyfile(s / "stage2_last.ckpt", s / "stage1_last.ckpt"), "this is a checkpoint of stage2"),
        (lambda s: change_config(s, type="igpt"), "this is a text-to-image model: set stage2.type to transformer1d"),
    ],
    ids=["stage 1 as 2", "stage 2 as 1", "text as igpt"],
)
def test_a_mix_up_is_guessed(source, tmp_path, change, hint):
    change(source)
    message = refused(source, tmp_path / "a", CheckpointError, "does not fit")
    assert hint in message.splitlines()[0]


@pytest.mark.parametrize(
    ("written", "told", "hint"),
    [
        ("tiny_igpt_config", "tiny_config", "this is an image-only model: set stage2.type to igpt"),
        ("tiny_igpt_config", "tiny_uncond_config", "this is a class-conditional model: set stage2.use_cls_cond"),
        ("tiny_uncond_config", "tiny_igpt_config", "this is an unconditional model: set stage2.use_cls_cond to false"),
    ],
)
def test_a_wrong_kind_of_model_is_guessed(tmp_path, request, write_folder, written, told, hint):
    source = write_folder(tmp_path / "source", request.getfixturevalue(written))
    (source / "config.yaml").write_text(dump_config(request.getfixturevalue(told)))
    assert hint in refused(source, tmp_path / "a", CheckpointError, "does not fit").splitlines()[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("stage", "key"), [("stage1", "decoder.conv_out.bias"), ("stage2", "blocks.1.mlp.0.weight")])
def test_weights_that_are_not_finite_are_refused_by_name(source, tmp_path, stage, key, value):
    def edit(tensors):
        tensors[key].reshape(-1)[-1] = value

    edit_checkpoint(source / STAGE_FILES[stage], edit)
    refused(source, tmp_path / "a", CheckpointError, f"{STAGE_FILES[stage]}: {key} holds NaN or infinite values")


def test_a_float64_beyond_float32_is_refused(source, tmp_path):
    edit_checkpoint(source / "stage2_last.ckpt", lambda t: t.update({"ln_f.bias": np.full(32, 1e300)}))
    refused(source, tmp_path / "a", CheckpointError, r"ln_f.bias holds NaN or infinite values \(in float32\)")


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.complex64], ids=lambda t: np.dtype(t).name)
def test_a_tensor_that_is_not_of_floats_is_refused(source, tmp_path, dtype):
    edit_checkpoint(source / "stage2_last.ckpt", lambda t: t.update({"ln_f.bias": np.ones(32, dtype)}))
    refused(source, tmp_path / "a", CheckpointError, f"ln_f.bias is {np.dtype(dtype)}, not floating point")


def edit_vocab(source: Path, edit) -> None:
    path = source / "tokenizer" / VOCAB_FILE
    vocab = json.loads(path.read_text(encoding="utf-8"))
    edit(vocab)
    path.write_text(json.dumps(vocab), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: shutil.rmtree(s), CheckpointError, "source: no such file or folder"),
        (
            lambda s: (s / "stage1_last.ckpt").unlink(),
            CheckpointError,
            "stage1_last.ckpt missing; .* needs both stages",
        ),
        (
            lambda s: (s / "stage2_last.ckpt").unlink(),
            CheckpointError,
            "stage2_last.ckpt missing; .* needs both stages",
        ),
        (lambda s: [p.unlink() for p in s.glob("*.ckpt")], CheckpointError, r"it needs .*\(0 .ckpt files found\)"),
        (lambda s: (s / "config.yaml").unlink(), ConfigError, "config.yaml: missing; put it beside the weights"),
        (
            lambda s: (s / "config.yaml").write_text("stage3: {}"),
            ConfigError,
            "unknown field stage3; did you mean stage",
        ),
        (
            lambda s: change_config(s, vocab_size_imgs=5),
            ConfigError,
            "unknown field stage2.vocab_size_imgs; did you mean",
        ),
        (lambda s: (s / "config.yaml").write_bytes(b"\xff\xfe"), ConfigError, "config.yaml: cannot be read"),
        (lambda s: (s / "config.yaml").write_text("a: [1"), ConfigError, "config.yaml: not valid YAML"),
        (
            lambda s: shutil.rmtree(s / "tokenizer"),
            CheckpointError,
            f"{VOCAB_FILE}: missing; the folder needs tokenizer",
        ),
        (lambda s: (s / "tokenizer" / VOCAB_FILE).unlink(), CheckpointError, f"{VOCAB_FILE}: missing"),
        (lambda s: (s / "tokenizer" / MERGES_FILE).unlink(), CheckpointError, f"{MERGES_FILE}: missing"),
        (
            lambda s: edit_vocab(s, lambda v: v.update({"another": 110})),
            CheckpointError,
            "has ids up to 110, but the text embedding has 110 rows; the tokenizer belongs to another model",
        ),
        (lambda s: edit_vocab(s, lambda v: v.pop("[PAD]")), CheckpointError, r"has no \[PAD\] token"),
        (lambda s: edit_vocab(s, lambda v: v.pop("cat</w>")), CheckpointError, f"{MERGES_FILE}: does not fit"),
    ],
    ids=lambda value: value.replace("\\", "")[:30] if isinstance(value, str) else "",
)
def test_a_damaged_folder_is_refused(source, tmp_path, change, error, message):
    change(source)
    refused(source, tmp_path / "a", error, message)


def test_a_transformer_alone_is_refused(source, tmp_path):
    refused(
        source / "stage2_last.ckpt", tmp_path / "a", CheckpointError, "neither a VQGAN nor a checkpoint of both stages"
    )


def test_two_files_in_a_folder_are_not_guessed_between(transfer, tmp_path):
    folder = Path(shutil.copytree(transfer[0], tmp_path / "source"))
    shutil.copyfile(folder / "epoch=7.ckpt", folder / "epoch=8.ckpt")
    refused(folder, tmp_path / "a", CheckpointError, r"2 .ckpt files found")


@pytest.mark.parametrize("position", [0.3, 0.6, 0.9])
def test_one_flipped_bit_in_the_source_is_refused(source, tmp_path, position):
    path = source / "stage2_last.ckpt"
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 4
    path.write_bytes(data)
    refused(source, tmp_path / "a", CheckpointError, "stage2_last.ckpt: storage .*CRC does not match")


# The export


@pytest.fixture
def model(tmp_path, tiny_model_folder) -> Path:
    """A copy of the tiny converted model, to change."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: shutil.rmtree(m), CheckpointError, "is not a converted model"),
        (lambda m: (m / "manifest.json").unlink(), CheckpointError, "is not a converted model"),
        (lambda m: (m / "config.yaml").unlink(), ConfigError, "config.yaml: cannot be read"),
        (lambda m: (m / "stage2.safetensors").unlink(), CheckpointError, "stage2.safetensors: missing"),
        (
            lambda m: os.truncate(m / "stage2.safetensors", 5000),
            CheckpointError,
            "stage2.safetensors: truncated or dam",
        ),
        (
            lambda m: change_config(m, vocab_size_txt=111),
            CheckpointError,
            "stage2 do not fit config.yaml: head_txt/weight",
        ),
    ],
    ids=["no folder", "no manifest", "no config", "no weights", "truncated", "other config"],
)
def test_a_damaged_model_is_not_exported(model, tmp_path, change, error, message):
    """A config.yaml edited after the conversion once ended in an AssertionError."""
    change(model)
    with unchanged(tmp_path), pytest.raises(error, match=message):
        export_checkpoint(model, tmp_path / "out")


def test_groups_that_the_original_does_not_have_are_not_exported(model, tmp_path):
    """It would take the weights, and draw other images with them."""
    text = (model / "config.yaml").read_text(encoding="utf-8")
    assert "num_groups" not in text, "the original knows no such field"
    hparams = dataclasses.replace(load_config(model / "config.yaml").stage1.hparams, num_groups=8)
    config = load_config(model / "config.yaml")
    config = dataclasses.replace(config, stage1=dataclasses.replace(config.stage1, hparams=hparams))
    (model / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(model / "config.yaml") == config
    with unchanged(tmp_path), pytest.raises(ConfigError, match="GroupNorm of 8 groups; the original's has 32"):
        export_checkpoint(model, tmp_path / "out")


def test_a_flipped_bit_in_the_model_is_not_exported(model, tmp_path):
    """In the last tensor of a file it once was: the check came after the last part, when nobody asked any more."""
    path = model / "stage2.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with unchanged(tmp_path), pytest.raises(CheckpointError, match="tok_emb_txt/embedding is damaged"):
        export_checkpoint(model, tmp_path / "out")


# The target


def convert(kind: str, source: Path, model: Path, target: Path, **options):
    return (
        import_checkpoint(source, target, **options)
        if kind == "import"
        else export_checkpoint(model, target, **options)
    )


kinds = pytest.mark.parametrize("kind", ["import", "export"])


@kinds
def test_a_target_that_exists_is_kept(source, model, tmp_path, kind):
    (tmp_path / "a").mkdir()
    with unchanged(tmp_path), pytest.raises(OutputError, match="exists already"):
        convert(kind, source, model, tmp_path / "a")


@kinds
@pytest.mark.parametrize("old", ["empty", "manifest.json", "stage1_last.ckpt"])
def test_overwrite_replaces_a_model(source, model, tmp_path, kind, old):
    (tmp_path / "a").mkdir()
    if old != "empty":
        (tmp_path / "a" / old).write_text("old")
        (tmp_path / "a" / "more").write_text("old")
    convert(kind, source, model, tmp_path / "a", overwrite=True)
    convert(kind, source, model, tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@kinds
def test_overwrite_does_not_replace_what_is_no_model(source, model, tmp_path, kind):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("mine")
    with (
        unchanged(tmp_path),
        pytest.raises(OutputError, match="documents is not empty and holds none of manifest.json"),
    ):
        convert(kind, source, model, tmp_path / "documents", overwrite=True)


@kinds
def test_overwrite_does_not_replace_the_source(source, model, tmp_path, kind):
    """`convert X X --overwrite` would be the end of X."""
    place = source if kind == "import" else model
    (tmp_path / "link").symlink_to(place)
    for target in (place, place / ".." / place.name, tmp_path / "link"):
        with unchanged(tmp_path), pytest.raises(OutputError, match="is, or holds, the source of the conversion"):
            convert(kind, source, model, target, overwrite=True)


@kinds
def test_too_little_disk_is_told_before_anything_is_written(source, model, tmp_path, monkeypatch, kind):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 60 << 20))
    with unchanged(tmp_path), pytest.raises(OutputError, match="needs 0.1 GB under .*, where 0.1 GB are free"):
        convert(kind, source, model, tmp_path / "a")


@kinds
@pytest.mark.parametrize("limit_bytes", [0, 100, 100_000, 900_000])
def test_a_disk_that_fills_up_leaves_nothing(source, model, tmp_path, monkeypatch, kind, limit_bytes):
    """The kernel itself refuses to write on, here for a limit of the size of a file."""
    monkeypatch.setattr(
        mindalle, "weights_progress", lambda *_: Interrupter(0, AssertionError())
    )  # output may be a file too
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with unchanged(tmp_path), pytest.raises(OutputError, match="File too large") as caught:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
        try:
            convert(kind, source, model, tmp_path / "a")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "a") in str(caught.value) and "partial" not in str(caught.value)


class Interrupter:
    """Stands for the progress bar, and raises at an update (from 1 on): in the middle of the work."""

    def __init__(self, at: int, error: BaseException):
        self.at, self.error, self.updates = at, error, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, _):
        self.updates += 1
        if self.updates == self.at:
            raise self.error


@kinds
@pytest.mark.parametrize("at", [1, 2, 60, 130, 160, 200], ids=lambda at: f"update {at}")
@pytest.mark.parametrize(
    ("error", "expected"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left on device"), OutputError)],
    ids=["Ctrl-C", "disk full"],
)
def test_an_interruption_leaves_nothing(source, model, tmp_path, monkeypatch, kind, at, error, expected):
    """First and second tensor, the middle of each stage, and the verification."""
    bar = Interrupter(at, error)
    monkeypatch.setattr(mindalle, "weights_progress", lambda *_: bar)
    with unchanged(tmp_path), pytest.raises(expected) as caught:
        convert(kind, source, model, tmp_path / "deep" / "a")
    if expected is OutputError:
        assert str(caught.value).startswith(str(tmp_path / "deep" / "a"))
        assert "No space left on device" in str(caught.value)


@kinds
def test_an_interruption_keeps_the_model_that_was_to_be_replaced(source, model, tmp_path, monkeypatch, kind):
    shutil.copytree(model, tmp_path / "old")
    monkeypatch.setattr(mindalle, "weights_progress", lambda *_: Interrupter(20, KeyboardInterrupt()))
    with unchanged(tmp_path), pytest.raises(KeyboardInterrupt):
        convert(kind, source, model, tmp_path / "old", overwrite=True)


# Memory


def test_memory_stays_far_below_the_size_of_the_file(tiny_config, write_folder):
    """200 MB of weights in tensors of at most 4 MB. The whole released model must convert on a laptop."""
    hparams = dataclasses.replace(tiny_config.stage2.hparams, embed_dim=512, n_layers=16)
    config = dataclasses.replace(tiny_config, stage2=dataclasses.replace(tiny_config.stage2, hparams=hparams))
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, which is kept for a while
        folder = Path(name)
        write_folder(folder / "source", config)
        size = (folder / "source" / "stage2_last.ckpt").stat().st_size
        peaks = []
        for kind, args in [("import", ("source", "", "a")), ("export", ("", "a", "b"))]:
            tracemalloc.start()
            try:
                convert(kind, *(folder / arg for arg in args))
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
    assert size > 200e6
    assert max(peaks) < 60e6, f"peaks of {[f'{peak / 1e6:.0f} MB' for peak in peaks]}"
