"""Times one decoding step on CPU against PyTorch: random weights, the same network, two processes taking turns.

    python -m scripts.bench.vs_torch --preset 1.3b --candidates 1 8 --rounds 3
    python -m scripts.bench.vs_torch --preset demo --candidates 1 8 16

Compares three loops, each step being the network and the draw (top-k 256):
  jax       mindalle_jax.sampling.decode, which always reads its whole buffer of keys and values, on the devices that
            mindalle sample would take
  concat    a PyTorch loop that concatenates its cache, as the original implementation does
  prealloc  a PyTorch loop over preallocated buffers, reading the filled part only
They take turns of whole pictures, or of some rows: PyTorch then in the middle, where its cost is the average. Needs the
test extra (PyTorch, and tests/torch_oracle.py of this checkout). Prints a table and one JSON line; at full size each
process holds 5 GB.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindalle_jax.config.file import load_config
from mindalle_jax.runtime.devices import CPU_DEVICES

ROOT = Path(__file__).parents[2]
PRESETS = {
    "1.3b": "configs/mindalle-1.3b.yaml",
    "demo": "mindalle_jax/demo/config.yaml",
    "tiny": "configs/tiny.yaml",
}
LOOPS = {"jax": "jax", "concat": "torch", "prealloc": "torch"}
"""Loop -> the process that runs it."""


def jax_worker(config: Any, steps: int) -> Callable[[str, int], float]:
    """A function (loop, candidates) -> seconds a step."""
    import jax
    import numpy as np

    from mindalle_jax.models.transformer import Transformer
    from mindalle_jax.runtime.devices import first_devices
    from mindalle_jax.sampling.decode import (
        Settings,
        cache_lengths,
        decode_segment,
        default_batch_size,
        make_room,
        prefill,
        row_length,
        start_state,
    )
    from scripts.bench.sampling import random_params, sampling_shapes

    all_devices = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    model = Transformer(config.stage2, stacked=False)
    all_params = random_params(sampling_shapes(config), model.dtype, all_devices)
    vocab_size, lengths = config.stage2.vocab_size_img, cache_lengths(model, "cpu")
    settings = Settings.make(vocab_size, seed=0, temperature=1.0, top_k=min(256, vocab_size), top_p=None)
    states: dict[int, Any] = {}

    def run(loop: str, candidates: int) -> float:
        small = all_devices.size > 1
        devices = math.ceil(candidates / default_batch_size(candidates, "cpu", small=small))
        mesh, params = first_devices(all_devices, min(devices, all_devices.size), all_params)
        batch = math.ceil(candidates / mesh.size)
        prefix = prefill(model, params, np.zeros(config.stage2.hparams.ctx_len_txt, np.int32), np.zeros(0, np.int32), 0)
        state = states.pop(candidates, None)
        if state is None or int(state.t) + steps > config.stage2.hparams.ctx_len_img:
            state = start_state(model, mesh, batch, lengths[0], prefix, 0)
        ids = np.arange(batch * mesh.size, dtype=np.int32)
        row = row_length(config.stage2.hparams.ctx_len_img)
        part: Any = np.full((len(ids), row), -1, np.int32)
        jax.block_until_ready((prefix, state))
        start = time.perf_counter()
        traced = settings.traced(vocab_size)
        for _ in range(steps // row):
            state = make_room(model, mesh, state, int(state.t) + row, lengths)
            state, part = decode_segment(model, mesh, row, False, params, prefix.kv, ids, traced, state, part)
        jax.block_until_ready(part)
        seconds = time.perf_counter() - start
        states[candidates] = state
        return seconds / steps

    return run


def torch_worker(config: Any, steps: int) -> Callable[[str, int], float]:
    """The same for the two PyTorch loops."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from torch_oracle import ConcatCacheDecoder, PreallocatedCacheDecoder, Transformer, TransformerConfig, filter_probs

    h = config.stage2.hparams
    with torch.device("meta"):
        model = Transformer(
            TransformerConfig(
                embed_dim=h.embed_dim,
                n_layers=h.n_layers,
                n_heads=h.n_heads,
                ctx_len_txt=h.ctx_len_txt,
                ctx_len_img=h.ctx_len_img,
                vocab_txt=config.stage2.vocab_size_txt,
                vocab_img=config.stage2.vocab_size_img,
            )
        )
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "ln" in name and "weight" in name else torch.nn.init.normal_(
            parameter, 0, 0.02
        )
    middle = h.ctx_len_img // 2 - steps // 2
    head_dim = h.embed_dim // h.n_heads

    @torch.inference_mode()
    def run(loop: str, candidates: int) -> float:
        decoder: Any = (ConcatCacheDecoder if loop == "concat" else PreallocatedCacheDecoder)(model)
        shape = (h.n_layers, 2, candidates, h.n_heads, h.ctx_len_txt + middle, head_dim)
        if loop == "concat":
            decoder.past = [torch.randn(shape)]
        else:
            decoder.n_text = h.ctx_len_txt
            full = h.ctx_len_txt + h.ctx_len_img
            decoder.buffers = [torch.randn(2, *shape[2:4], full, head_dim) for _ in range(h.n_layers)]
        decoder.position = middle
        codes = torch.zeros(candidates, dtype=torch.long)
        start = time.perf_counter()
        for _ in range(steps):
            probs = filter_probs(decoder.step(codes), top_k=min(256, config.stage2.vocab_size_img))
            codes = torch.multinomial(probs, 1)[:, 0]
        return (time.perf_counter() - start) / steps

    return run


def work(kind: str, config: Any, rows: int) -> None:
    """Answers lines `LOOP CANDIDATES` on stdin with seconds a step on stdout."""
    steps = rows * math.isqrt(config.stage2.hparams.ctx_len_img)
    run = (jax_worker if kind == "jax" else torch_worker)(config, steps)
    print("ready", flush=True)
    for line in sys.stdin:
        loop, candidates = line.split()
        print(run(loop, int(candidates)), flush=True)


def main() -> None:
    """Starts both processes and lets them take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="1.3b", help="which network (default: %(default)s)")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8], help="batches (default: 1 8)")
    parser.add_argument("--rounds", type=int, default=3, help="counted turns of each loop (default: %(default)s)")
    text = "rows of codes a turn (default: one of 1.3b, else a whole picture)"
    parser.add_argument("--rows", type=int, help=text)
    text = "devices that the CPU makes, each with a part of the candidates (default: as mindalle sample)"
    parser.add_argument("--devices", type=int, help=text)
    parser.add_argument("--worker", choices=["jax", "torch"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = load_config(ROOT / PRESETS[arguments.preset])
    if arguments.worker:
        work(arguments.worker, config, arguments.rows)
        return
    rows = arguments.rows or (1 if arguments.preset == "1.3b" else math.isqrt(config.stage2.hparams.ctx_len_img))
    devices = arguments.devices or (1 if arguments.preset == "1.3b" else CPU_DEVICES)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)}
    workers: dict[str, subprocess.Popen[str]] = {}
    for kind in ("jax", "torch"):
        command = [sys.executable, __file__, "--preset", arguments.preset, "--rows", str(rows)]
        workers[kind] = subprocess.Popen(
            [*command, "--worker", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(loop: str, candidates: int) -> float:
        worker = workers[LOOPS[loop]]
        assert worker.stdin and worker.stdout
        worker.stdin.write(f"{loop} {candidates}\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())

    results: dict[str, Any] = {}
    try:
        for worker in workers.values():
            assert worker.stdout
            if worker.stdout.readline().strip() != "ready":
                raise SystemExit("a worker did not start; its message is above")
        for candidates in arguments.candidates:
            times: dict[str, list[float]] = {loop: [] for loop in LOOPS}
            for turn in range(arguments.rounds + 1):
                for loop in LOOPS:
                    seconds = ask(loop, candidates)
                    if turn:  # the first turn compiles and warms up
                        times[loop].append(seconds)
            row: dict[str, Any] = {loop: round(statistics.median(values), 5) for loop, values in times.items()}
            for other in ("concat", "prealloc"):
                pairs = [mine / theirs for mine, theirs in zip(times["jax"], times[other], strict=True)]
                row[f"jax/{other}"] = round(statistics.median(pairs), 3)
            results[str(candidates)] = row
            print(
                f"{candidates:3} candidates, s/step:", *(f"{name} {value}" for name, value in row.items()), flush=True
            )
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    from importlib.metadata import version

    conditions = {
        "bench": "vs_torch",
        "preset": arguments.preset,
        "device": f"cpu, {os.cpu_count()} cores",
        "dtype": "float32",
        "jax_devices": devices,
        "rounds": arguments.rounds,
        "rows": rows,
        "jax": version("jax"),
        "torch": version("torch"),
        "python": platform.python_version(),
    }
    print(json.dumps(conditions | {"s_per_step": results}))


if __name__ == "__main__":
    main()
