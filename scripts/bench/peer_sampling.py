"""Times the sampling loop of the original PyTorch repository, with the code of a clone and random weights.

    python -m scripts.bench.peer_sampling ~/minDALL-E --preset 1.3b --candidates 96

Imports dalle/models/stage2 and dalle/utils/sampling.py of the clone unchanged, and needs their imports: PyTorch,
omegaconf and tqdm. Runs under autocast on a GPU, which is the original's default, and in float32 elsewhere. Times the
second of two runs, from a tokenized prompt to the codes of all candidates, over --rows rows of the image. Prints a
table, then one JSON line. scripts.bench.sampling --peer and scripts.bench.goals --peer call it.
"""

import argparse
import dataclasses
import importlib
import sys
import time
import types
from pathlib import Path
from typing import Any

from scripts.bench import common
from scripts.bench.peer import NETWORK, SAMPLING, missing


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = common.make_parser(__doc__, "1.3b")
    parser.add_argument("clone", type=Path, metavar="DIR", help="a clone of the original repository")
    parser.add_argument("--candidates", type=int, default=96, help="images of one prompt (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=0, help="rows of an image to time, 0 for all (default: 0)")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="default: the device that PyTorch finds")
    arguments = parser.parse_args()
    if reason := missing(arguments.clone):
        sys.exit(f"scripts.bench.peer_sampling: {reason}")
    common.report(*measure(arguments))


def import_original(clone: Path) -> tuple[Any, Any]:
    """(class Transformer1d, function sampling) of a clone, which need not be installed."""
    # Packages of our own, because the original's import Lightning, which these files do not need.
    for name, file in (("peer_stage2", NETWORK), ("peer_utils", SAMPLING)):
        package = types.ModuleType(name)
        package.__path__ = [str((clone / file).parent)]
        sys.modules[name] = package
    network = importlib.import_module(f"peer_stage2.{Path(NETWORK).stem}").Transformer1d
    return network, importlib.import_module(f"peer_utils.{Path(SAMPLING).stem}").sampling


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The conditions, and the seconds of a run."""
    import torch

    network, sampling = import_original(arguments.clone)
    config = common.load_preset(arguments.preset)
    c, side = config.stage2, config.stage1.code_size
    h = types.SimpleNamespace(**dataclasses.asdict(c.hparams) | {"n_dense_layers": c.hparams.n_layers})
    gpu = torch.cuda.is_available() if arguments.device is None else arguments.device == "gpu"
    device = torch.device("cuda" if gpu else "cpu")
    model = network(c.vocab_size_txt, c.vocab_size_img, h).to(device).eval()
    text = torch.zeros((arguments.candidates, h.ctx_len_txt), dtype=torch.long, device=device)
    positions = (arguments.rows or side) * side

    def run(count: int) -> float:
        start = time.perf_counter()
        sampling(
            model, text, top_k=min(256, c.vocab_size_img), softmax_temperature=1.0, is_tqdm=False, use_fp16=gpu,
            max_seq_len=count,
        ).cpu()  # fmt: skip
        return time.perf_counter() - start

    run(min(positions, 16))
    name = torch.cuda.get_device_name() if gpu else "cpu"
    head = common.conditions(
        "peer_sampling", name, "float16" if gpu else "float32", arguments.candidates,
        {"torch": str(torch.__version__)}, preset=arguments.preset, candidates=arguments.candidates,
    )  # fmt: skip
    return head, {"peer_codes_s": round(run(positions), 4), "positions": positions}


if __name__ == "__main__":
    main()
