"""Commands as functions, with the tiny model."""

from pathlib import Path

import pytest

from mindalle_jax import Dalle, ImageGPT, cli


@pytest.fixture
def mindalle_cli(capsys):
    """mindalle_cli("sample", ...) -> (exit code, standard output, standard error)."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse
            code = exit.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def sample(mindalle_cli, tiny_model_folder, out):
    """Draws two candidates with the tiny model; two everywhere, so that one program is compiled."""

    def run(*arguments, model=tiny_model_folder) -> tuple[int, str, str]:
        return mindalle_cli("sample", "--model", model, "--out", out, "--num-candidates", 2, *arguments)

    return run


@pytest.fixture
def not_loaded(monkeypatch):
    """Fails when weights are loaded: what is wrong with a command is told before."""

    def fail(*_, **__):
        pytest.fail("the weights were loaded")

    monkeypatch.setattr(Dalle, "from_pretrained", fail)
    monkeypatch.setattr(ImageGPT, "from_pretrained", fail)
