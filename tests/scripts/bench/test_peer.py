"""The original's loop: what it lacks is said at once, and a stand-in with its interface is timed."""

import json
import subprocess
import sys

import pytest

from scripts.bench import goals
from scripts.bench.peer import missing

TRANSFORMER = """
import torch
from torch import nn
from omegaconf import OmegaConf
from .layers import Block

class Transformer1d(nn.Module):
    def __init__(self, vocab_size_txt, vocab_size_img, hparams):
        super().__init__()
        assert hparams.n_dense_layers == hparams.n_layers == 3 and hparams.ctx_len_img == 256
        self.head, self.vocab_size = Block(hparams.embed_dim, vocab_size_img), vocab_size_img
"""
LAYERS = """
from torch import nn

class Block(nn.Linear):
    pass
"""
SAMPLING = """
import torch
from typing import Optional
from tqdm import tqdm
from torch.nn import functional as F

@torch.no_grad()
def sampling(model, tokens, top_k: Optional[int] = None, top_p=None, softmax_temperature=1.0, is_tqdm=True,
             use_fp16=True, max_seq_len=256):
    assert top_k == 64 and not is_tqdm and not use_fp16 and tokens.shape == (2, 16)
    probs = F.softmax(model.head(torch.zeros(len(tokens), model.head.in_features)), dim=-1)
    return torch.cat([torch.multinomial(probs, 1) for _ in range(max_seq_len)], dim=1)
"""


@pytest.fixture
def clone(tmp_path):
    """A stand-in for a clone of the original: the files that are read, with its names, arguments and imports."""
    stage2, utils = tmp_path / "clone" / "dalle" / "models" / "stage2", tmp_path / "clone" / "dalle" / "utils"
    for folder in (stage2, utils):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise ImportError('Lightning, which is not needed')")
    (stage2 / "transformer.py").write_text(TRANSFORMER)
    (stage2 / "layers.py").write_text(LAYERS)
    (utils / "sampling.py").write_text(SAMPLING)
    return tmp_path / "clone"


@pytest.fixture
def omegaconf(tmp_path, monkeypatch):
    """A stand-in for the package omegaconf, on the path."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "omegaconf.py").write_text("class OmegaConf:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return tmp_path / "packages"


def test_what_is_not_installed_is_named_with_the_command(clone):
    (clone / "dalle" / "models" / "stage2" / "layers.py").write_text("import no_such_package.part, json")
    reason = missing(clone)
    assert reason is not None and "no-such-package" in reason and reason.endswith(reason.partition("pip install ")[2])
    assert "imports no_such_package" in reason or "no_such_package, omegaconf" in reason
    assert "json" not in reason and "typing" not in reason


def test_a_file_that_is_not_there_is_named(clone, tmp_path):
    (clone / "dalle" / "models" / "stage2" / "layers.py").unlink()
    assert f"{clone}/dalle/models/stage2/layers.py is missing" in (missing(clone) or "")
    assert "sampling.py is missing" in (missing(tmp_path) or "")


def test_goals_says_so_before_anything_runs(clone, tmp_path, capsys, monkeypatch):
    (clone / "dalle" / "utils" / "sampling.py").write_text("import no_such_package")
    monkeypatch.setattr(sys, "argv", ["goals", "--out", str(tmp_path / "out"), "--peer", str(clone)])
    with pytest.raises(SystemExit):
        goals.main()
    assert "pip install no-such-package" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_stand_in_is_timed_beside_our_loop(clone, omegaconf, pytestconfig):
    """scripts.bench.sampling --peer: the original first, in a process of its own, then ours."""
    pytest.importorskip("torch", reason="the original is torch, pinned for Python 3.11 only")
    assert missing(clone) is None
    import os

    root = str(pytestconfig.rootpath)
    command = [sys.executable, "-m", "scripts.bench.sampling", "--preset", "tiny", "--candidates", "2", "--rows", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, str(omegaconf)])}
    done = subprocess.run(
        [*command, "--codes-only", "--peer", str(clone), "--device", "cpu"], cwd=root, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["peer_device"] == "cpu" and result["peer_codes_s"] > 0
    # 32 of 256 positions were timed of both.
    assert result["peer_ratio"] == pytest.approx(result["peer_codes_s"] / (result["codes_s"] / 8), rel=0.1, abs=0.02)
