"""adapters.safetensors of a run, and `mindalle convert --adapters`: the base model and they give the run's model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from training_runs import weights_crc32, write_code_set, write_config

from mindalle_jax import cli
from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.storage.weights import fingerprint, read_manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_folder) -> Path:
    """The folder of a run of three updates with adapters in the blocks and on the head. Read only."""
    work = tmp_path_factory.mktemp("lora")
    codes = write_code_set(work / "codes", tiny_model_folder, 8)
    targets = ["blocks/qkv/weight", "blocks/fc2/weight", "head_img/weight"]
    training = {"lora": {"rank": 3, "alpha": 5.0, "targets": targets}}
    optimizer = {"base_lr": 0.1, "max_steps": 3}
    config = write_config(work / "run.yaml", tiny_model_folder, codes, training=training, optimizer=optimizer)
    assert cli.main(["finetune", "--config", str(config), "--out", str(work / "out")]) == 0
    return work / "out"


@pytest.fixture
def convert(capsys):
    """convert(source, target, *more) -> (exit code, the error without the name of the command)."""

    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main(["convert", *map(str, arguments)])
        err = capsys.readouterr().err
        assert "Traceback" not in err
        errors = [line for line in err.splitlines() if line.startswith("mindalle convert: ")]
        assert len(errors) == (code != 0), err
        return code, errors[0].removeprefix("mindalle convert: ") if errors else ""

    return call


def changed(run: Path, target: Path, edit) -> Path:
    """The run's adapters after edit(tensors, metadata)."""
    file = run / "adapters.safetensors"
    tensors = safetensors.numpy.load_file(file)
    with safetensors.safe_open(file, framework="numpy") as opened:
        about = dict(opened.metadata())
    edit(tensors, about)
    safetensors.numpy.save_file(tensors, target, metadata=about)
    return target


def test_base_and_adapters_are_the_runs_model(convert, run, tiny_model_folder, tmp_path):
    """Bit for bit, and the adapters did change something."""
    assert convert(tiny_model_folder, tmp_path / "a", "--adapters", run / "adapters.safetensors") == (0, "")
    assert weights_crc32(tmp_path / "a") == weights_crc32(run)
    before = weights_crc32(tiny_model_folder)
    touched = {path for path, crc32 in weights_crc32(run).items() if before[path] != crc32}
    assert touched == {"blocks/qkv/weight", "blocks/fc2/weight", "head_img/weight"}
    assert (tmp_path / "a" / "stage1.safetensors").read_bytes() == (run / "stage1.safetensors").read_bytes()
    assert (tmp_path / "a" / "tokenizer").is_dir()


def test_the_base_may_be_named_as_for_the_run(convert, run, tiny_folder, tmp_path):
    """A folder in the original's format is the converted one in the cache, as it is for a run."""
    code, err = convert(tiny_folder, tmp_path / "a", "--adapters", run / "adapters.safetensors")
    # Its weights are those of tiny_model_folder.
    assert (code, err) == (0, "") and weights_crc32(tmp_path / "a") == weights_crc32(run)


def test_with_dtype_it_is_the_runs_model_in_that_dtype(convert, run, tiny_model_folder, tmp_path):
    assert convert(run, tmp_path / "a", "--dtype", "bfloat16")[0] == 0
    more = ["--dtype", "bfloat16", "--adapters", run / "adapters.safetensors"]
    assert convert(tiny_model_folder, tmp_path / "b", *more)[0] == 0
    assert weights_crc32(tmp_path / "a") == weights_crc32(tmp_path / "b")


def test_a_base_in_half_precision_gives_float32(convert, run, tiny_model_folder, tmp_path):
    """As after a run from such a base, whose weights are rounded but not the sum."""
    assert convert(tiny_model_folder, tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    base = fingerprint_of(tmp_path / "half")
    file = changed(run, tmp_path / "a.safetensors", lambda _, about: about.update(base_fingerprint=base))
    assert convert(tmp_path / "half", tmp_path / "a", "--adapters", file)[0] == 0
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())["tensors"]
    assert {entry["dtype"] for entry in manifest["stage2"].values()} == {"float32"}
    assert {entry["dtype"] for entry in manifest["stage1"].values()} == {"bfloat16"}
    rounded, exact = (safetensors.numpy.load_file(f / "stage2.safetensors") for f in (tmp_path / "a", run))
    np.testing.assert_allclose(rounded["head_img/weight"], exact["head_img/weight"], rtol=0, atol=2**-8)
    assert (rounded["head_img/weight"] != exact["head_img/weight"]).any()


def fingerprint_of(folder: Path) -> str:
    return fingerprint(read_manifest(folder)["tensors"])


def test_another_base_is_refused_with_both_fingerprints(
    convert, run, tiny_model_folder, tiny_config, write_folder, tmp_path
):
    other = import_checkpoint(write_folder(tmp_path / "original", tiny_config, seed=5), tmp_path / "model").target
    code, err = convert(other, tmp_path / "a", "--adapters", run / "adapters.safetensors")
    assert code == 4 and "adapters of another model" in err
    assert fingerprint_of(tiny_model_folder) in err and fingerprint_of(other) in err
    assert not (tmp_path / "a").exists()


def test_a_base_with_another_manifest_and_the_same_weights_is_the_base(convert, run, tiny_model_folder, tmp_path):
    """The fingerprint is of the tensors. Another version writes the manifest with other words."""
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    manifest = json.loads((base / "manifest.json").read_text())
    (base / "manifest.json").write_text(json.dumps(manifest | {"source": "a copy", "writer": "another"}))
    assert convert(base, tmp_path / "a", "--adapters", run / "adapters.safetensors") == (0, "")
    assert weights_crc32(tmp_path / "a") == weights_crc32(run)


def cut(tensors: dict, about: dict) -> None:
    tensors["blocks/qkv/lora_a"] = np.ascontiguousarray(tensors["blocks/qkv/lora_a"][:, :2])


def rename(tensors: dict, about: dict) -> None:
    for half in "ab":
        tensors[f"blocks/gate/lora_{half}"] = tensors.pop(f"blocks/fc2/lora_{half}")


WRONG = {
    "shape": (cut, "blocks/qkv/lora_b is float32[2, 3, 32, 3], wanted float32[2, 3, 32, 2]"),
    "one number": (
        lambda tensors, _: tensors.update({"head_img/lora_a": np.zeros((), np.float32)}),
        "head_img/lora_a is float32[], wanted float32[1, 32]",
    ),
    "dtype": (
        lambda tensors, _: tensors.update({"head_img/lora_a": tensors["head_img/lora_a"].astype(np.float16)}),
        "head_img/lora_a is float16[3, 32], wanted float32[3, 32]",
    ),
    "unknown": (rename, "blocks/gate/lora_a is unknown"),
    "half": (lambda tensors, _: tensors.pop("head_img/lora_a"), "head_img/lora_b is unknown, or without its other"),
    "weights": (lambda tensors, _: tensors.update({"ln_f/scale": np.ones(32, np.float32)}), "ln_f/scale is unknown"),
    "empty": (lambda tensors, _: tensors.clear(), "it is empty"),
    "no base": (lambda _, about: about.pop("base_fingerprint"), "not the adapters of a run"),
    "no scale": (lambda _, about: about.update(lora_scale="large"), "not the adapters of a run"),
    "infinite scale": (lambda _, about: about.update(lora_scale="inf"), "NaN or infinite values in lora_scale"),
    "infinite": (
        lambda tensors, _: tensors["blocks/fc2/lora_b"].fill(np.nan), "NaN or infinite values in blocks/fc2/lora_b"
    ),
    "overflow": (
        lambda tensors, _: tensors["head_img/lora_b"].fill(3e38), "head_img/weight holds NaN or infinite values"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_does_not_fit_is_one_line(convert, run, tiny_model_folder, tmp_path, fault):
    edit, text = WRONG[fault]
    file = changed(run, tmp_path / "adapters.safetensors", edit)
    code, err = convert(tiny_model_folder, tmp_path / "a", "--adapters", file)
    assert code == 4 and text in err and not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["missing", "text", "cut"])
def test_a_file_that_is_none(convert, run, tiny_model_folder, tmp_path, kind):
    file = tmp_path / "adapters.safetensors"
    if kind == "text":
        file.write_text("<html>404</html>")
    elif kind == "cut":
        file.write_bytes((run / "adapters.safetensors").read_bytes()[:-8])
    code, err = convert(tiny_model_folder, tmp_path / "a", "--adapters", file)
    assert code == 4 and err.startswith(f"{file}: {'missing' if kind == 'missing' else 'truncated or damaged'}")


@pytest.mark.parametrize("more", [["--to", "torch"], ["--config", "x.yaml"], ["--download-from", "x.tar.gz"]])
def test_what_adapters_do_not_go_with(convert, run, tiny_model_folder, tmp_path, more):
    code, err = convert(tiny_model_folder, tmp_path / "a", "--adapters", run / "adapters.safetensors", *more)
    assert code == 2 and err.startswith("--adapters works only with --dtype and --overwrite")


def test_a_vqgan_alone_has_nothing_to_adapt(convert, run, tiny_model_folder, tmp_path):
    vqgan = shutil.copytree(tiny_model_folder, tmp_path / "vqgan")
    manifest = json.loads((vqgan / "manifest.json").read_text())
    del manifest["tensors"]["stage2"]
    (vqgan / "manifest.json").write_text(json.dumps(manifest))
    (vqgan / "stage2.safetensors").unlink()
    file = changed(
        run, tmp_path / "a.safetensors", lambda _, about: about.update(base_fingerprint=fingerprint_of(vqgan))
    )
    code, err = convert(vqgan, tmp_path / "a", "--adapters", file)
    assert code == 4 and err == f"{vqgan}: a VQGAN alone has no transformer, to which adapters belong"
