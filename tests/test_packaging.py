"""The wheel and the source distribution: what is in them, what an index shows, and that the wheel works alone."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from commands import ROOT

import mindalle_jax


@pytest.fixture(scope="module")
def wheel(distributions) -> zipfile.ZipFile:
    return zipfile.ZipFile(distributions / f"mindalle_jax-{mindalle_jax.__version__}-py3-none-any.whl")


@pytest.fixture(scope="module")
def sdist(distributions) -> tarfile.TarFile:
    return tarfile.open(distributions / f"mindalle_jax-{mindalle_jax.__version__}.tar.gz")


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    return email.message_from_bytes(wheel.read(f"mindalle_jax-{mindalle_jax.__version__}.dist-info/METADATA"))


def files_below(*folders: str) -> set[str]:
    """Files of the checkout that belong to it, by their paths."""
    files = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    hidden = ("__pycache__", ".ipynb_checkpoints")
    return {path.relative_to(ROOT).as_posix() for path in files if not set(hidden) & set(path.parts)}


def test_the_wheel_holds_the_package_its_models_and_the_presets_and_nothing_else(wheel):
    presets = {f"mindalle_jax/{path}" for path in files_below("configs")}
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files_below("mindalle_jax") | presets
    assert {
        "mindalle_jax/py.typed",
        "mindalle_jax/configs/finetune-captions.yaml",
        "mindalle_jax/configs/emoji/vqgan.yaml",
        "mindalle_jax/demo/stage2.safetensors",
        "mindalle_jax/demo/LICENSE",
        "mindalle_jax/demo-scenes/ranker/model.safetensors",
    } <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())
    assert wheel.read("mindalle_jax/demo/manifest.json") == (ROOT / "mindalle_jax/demo/manifest.json").read_bytes()


def test_the_source_distribution_holds_everything_that_builds_and_tests(sdist):
    names = {name.partition("/")[2] for name in sdist.getnames()}
    folders = files_below(
        "mindalle_jax", "configs", "convert", "docs", "notebooks", "scripts", "tests", ".ci", ".github"
    )
    alone = ("pyproject.toml", "setup.py", "MANIFEST.in", "Makefile", "README.md", "LICENSE", "CHANGELOG.md",
             "CITATION.cff", "CONTRIBUTING.md", "mkdocs.yml", ".pre-commit-config.yaml")  # fmt: skip
    assert sorted((folders | set(alone)) - names) == []
    kept_out = [name for name in names if name.startswith((".venv", "out/", ".git/", "site/")) or "__pycache__" in name]
    assert kept_out == []


def test_an_index_takes_them(distributions):
    files = map(str, sorted(distributions.iterdir()))
    check = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True, timeout=60
    )
    assert check.returncode == 0 and check.stdout.count("PASSED") == 2, check.stdout + check.stderr


def test_links_that_an_index_shows_are_absolute(metadata):
    targets = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", metadata.get_payload())
    repository = dict(entry.split(", ") for entry in metadata.get_all("Project-URL"))["Repository"]
    assert len(targets) > 10 and [target for _, target in targets if not target.startswith(("https://", "#"))] == []
    images = [target for image, target in targets if image]
    assert images and all(target.startswith(f"{repository}/raw/v{mindalle_jax.__version__}/docs/") for target in images)


def test_metadata_agrees_with_the_package(metadata):
    assert metadata["Version"] == mindalle_jax.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Keywords"] and len(metadata.get_all("Classifier")) > 5
    for file in ("CITATION.cff", "CHANGELOG.md"):
        assert mindalle_jax.__version__ in (ROOT / file).read_text(encoding="utf-8")


def test_presets_of_the_wheel_have_names_everywhere(installed, tmp_path):
    ran = installed.run("-m", "mindalle_jax", "configs", cwd=tmp_path)
    assert ran.returncode == 0 and "finetune-captions" in ran.stdout and "emoji/vqgan" in ran.stdout
    code = "import mindalle_jax, mindalle_jax.configs as c; print(mindalle_jax.__file__, c.__file__, sep='\\n')"
    shown = installed.run("-c", code, cwd=tmp_path).stdout.split()
    assert [Path(path).is_relative_to(installed.folder) for path in shown] == [True, True]


def test_the_package_samples_without_modules_that_windows_lacks(tmp_path):
    """Nothing was run on Windows itself."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('fcntl', 'resource', 'pwd')); import mindalle_jax.hub.download\n"
        "from mindalle_jax.cli import main\n"
        "sys.exit(main(['sample', 'a parrot', '-n', '1', '--out', 'parrot', '--batch-size', '1']))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
                         timeout=120)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert len(list((tmp_path / "parrot").glob("rank001_*.png"))) == 1
