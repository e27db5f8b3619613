"""Times the sampling loop of the original PyTorch repository: random weights, the network and loop of a clone of it.

    python -m scripts.bench.peer_sampling ~/minDALL-E --preset 1.3b --candidates 96

Reads dalle/models/stage2 and dalle/utils/sampling.py of the clone as they are, and needs PyTorch, omegaconf and tqdm.
On a GPU under autocast, which is the original's default, else in float32. What is timed is the second of two runs, from
a tokenised prompt to the codes of all candidates, over --rows rows of the picture. Prints one JSON line.
bench_sampling.py --peer calls it.
"""

import argparse
import dataclasses
import importlib
import json
import sys
import time
import types
from pathlib import Path


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, metavar="DIR", help="a clone of the original repository")
    parser.add_argument("--preset", default="1.3b", help="as of bench_sampling.py (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=96, help="pictures of one prompt (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=0, help="rows of a picture to time, 0 for all (default: 0)")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="default: what PyTorch finds")
    arguments = parser.parse_args()
    files = [arguments.clone / "dalle" / part for part in ("models/stage2/transformer.py", "utils/sampling.py")]
    for file in files:
        if not file.is_file():
            sys.exit(f"peer_sampling.py: {file} is missing; {arguments.clone} is no clone of the original repository")
    print(json.dumps(measure(files, arguments.preset, arguments.candidates, arguments.rows, arguments.device)))


def measure(files: list[Path], preset: str, candidates: int, rows: int, device_name: str | None) -> dict:
    """Seconds of a run, and what it ran on."""
    import torch

    from mindalle_jax.config.file import load_config
    from mindalle_jax.sampling.decode import row_length

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from scripts.bench.sampling import PRESETS

    # Packages of their own: the original's import Lightning, and this one needs two files of them.
    for name, folder in (("peer_stage2", files[0].parent), ("peer_utils", files[1].parent)):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    network = importlib.import_module("peer_stage2.transformer").Transformer1d
    sampling = importlib.import_module("peer_utils.sampling").sampling

    c = load_config(PRESETS[preset]).stage2
    h = types.SimpleNamespace(**dataclasses.asdict(c.hparams) | {"n_dense_layers": c.hparams.n_layers})
    gpu = torch.cuda.is_available() if device_name is None else device_name == "gpu"
    device = torch.device("cuda" if gpu else "cpu")
    model = network(c.vocab_size_txt, c.vocab_size_img, h).to(device).eval()
    text = torch.zeros((candidates, h.ctx_len_txt), dtype=torch.long, device=device)
    length = (rows or h.ctx_len_img // row_length(h.ctx_len_img)) * row_length(h.ctx_len_img)

    def run(steps: int) -> float:
        start = time.perf_counter()
        sampling(
            model, text, top_k=min(256, c.vocab_size_img), softmax_temperature=1.0, is_tqdm=False,
            use_fp16=device.type == "cuda", max_seq_len=steps,
        ).cpu()  # fmt: skip
        return time.perf_counter() - start

    run(min(length, 16))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"peer_codes_s": round(run(length), 4), "positions": length, "device": name, "torch": torch.__version__}


if __name__ == "__main__":
    main()
