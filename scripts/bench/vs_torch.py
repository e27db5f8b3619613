"""Times a decoding step on CPU beside PyTorch: the same network with random weights, in two processes that take turns.

    python -m scripts.bench.vs_torch --preset 1.3b --candidates 1 8 --rounds 3
    python -m scripts.bench.vs_torch --preset demo-scenes --candidates 1 8 16

Compares three loops. Each step runs the network and samples a code (top-k 256).

  jax       mindalle_jax.sampling.decode, which always reads its full buffer of keys and values, on the devices that
            mindalle sample would use
  concat    a PyTorch loop that concatenates its cache, as the original implementation does
  prealloc  a PyTorch loop over preallocated buffers, of which it reads only the filled part

Each turn is a whole image, or some rows. PyTorch decodes the rows in the middle, where its cost is the average. Needs
the test extra (PyTorch, and tests/torch_oracle.py of this checkout). At full size each process holds 5 GB. Prints a
table, then one JSON line.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from mindalle_jax.models.transformer import Transformer
from mindalle_jax.runtime.devices import CPU_DEVICES, first_devices
from scripts.bench import common

LOOPS = {"jax": "jax", "concat": "torch", "prealloc": "torch"}
"""Loop -> the process that runs it."""


def jax_worker(config: Any, rows: int) -> Callable[[str, int], float]:
    """A function (loop, candidates) -> seconds per step."""
    all_devices = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    model = Transformer(config.stage2, stacked=False)
    all_params = common.random_params(common.sampling_shapes(config), model.dtype, all_devices)
    prefix_ids = np.zeros(config.stage2.hparams.ctx_len_txt, np.int32)
    states: dict[int, Any] = {}

    def run(loop: str, candidates: int) -> float:
        mesh, _ = common.split_candidates(all_devices, candidates, small=all_devices.size > 1)
        mesh, params = first_devices(all_devices, mesh.size, all_params)
        decoder = common.DecodeLoop(model, params, mesh, math.ceil(candidates / mesh.size))
        prefix = decoder.prefill(prefix_ids)
        first, state, codes = states.pop(candidates, (decoder.rows, None, None))
        if first + rows > decoder.rows:
            first, (state, codes) = 0, decoder.start(prefix)
        jax.block_until_ready((prefix, state))
        start = time.perf_counter()
        for row in range(first, first + rows):
            state, codes = decoder.decode_row(prefix, row, state, codes)
        jax.block_until_ready(codes)
        seconds = time.perf_counter() - start
        states[candidates] = first + rows, state, codes
        return seconds / (rows * decoder.side)

    return run


def torch_worker(config: Any, rows: int) -> Callable[[str, int], float]:
    """A function (loop, candidates) -> seconds per step, for the two PyTorch loops."""
    sys.path.insert(0, str(common.ROOT / "tests"))
    import torch
    from torch_oracle import ConcatCacheDecoder, PreallocatedCacheDecoder, Transformer, TransformerConfig, filter_probs

    h, steps = config.stage2.hparams, rows * config.stage1.code_size
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
    """Reads lines `LOOP CANDIDATES` from stdin, and writes the seconds per step to stdout."""
    run = (jax_worker if kind == "jax" else torch_worker)(config, rows)
    print("ready", flush=True)
    for line in sys.stdin:
        loop, candidates = line.split()
        print(run(loop, int(candidates)), flush=True)


def start_workers(preset: str, rows: int, devices: int) -> dict[str, subprocess.Popen[str]]:
    """Starts both processes; they are not ready yet."""
    root = str(common.ROOT)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root, "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "scripts.bench.vs_torch", "--preset", preset, "--rows", str(rows), "--worker"]
    pipe = subprocess.PIPE
    return {
        kind: subprocess.Popen([*command, kind], stdin=pipe, stdout=pipe, text=True, env=environment, cwd=root)
        for kind in ("jax", "torch")
    }


def take_turns(workers: dict[str, subprocess.Popen[str]], candidates: int, rounds: int) -> dict[str, float]:
    """Median seconds per step of each loop, and the median per-round ratio of ours to each PyTorch loop."""
    times: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    for turn in range(rounds + 1):
        for loop, kind in LOOPS.items():
            worker = workers[kind]
            assert worker.stdin and worker.stdout
            worker.stdin.write(f"{loop} {candidates}\n")
            worker.stdin.flush()
            seconds = float(worker.stdout.readline())
            if turn:  # the first turn compiles and warms up
                times[loop].append(seconds)
    row = {loop: round(statistics.median(values), 5) for loop, values in times.items()}
    for other in ("concat", "prealloc"):
        pairs = [ours / theirs for ours, theirs in zip(times["jax"], times[other], strict=True)]
        row[f"jax/{other}"] = round(statistics.median(pairs), 3)
    return row


def parse_arguments() -> argparse.Namespace:
    """The command line, with rows and devices filled in."""
    parser = common.make_parser(__doc__, "1.3b")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--rounds", type=int, default=3, help="counted turns of each loop (default: %(default)s)")
    text = "rows of codes per turn (default: one row for 1.3b, a whole image for other presets)"
    parser.add_argument("--rows", type=int, help=text)
    text = "number of virtual CPU devices that share the candidates (default: as mindalle sample)"
    parser.add_argument("--devices", type=int, help=text)
    parser.add_argument("--worker", choices=["jax", "torch"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    large = arguments.preset == "1.3b"
    arguments.rows = arguments.rows or (1 if large else common.load_preset(arguments.preset).stage1.code_size)
    arguments.devices = arguments.devices or (1 if large else CPU_DEVICES)
    return arguments


def main() -> None:
    """Starts both processes and lets them take turns."""
    arguments = parse_arguments()
    if arguments.worker:
        work(arguments.worker, common.load_preset(arguments.preset), arguments.rows)
        return
    workers = start_workers(arguments.preset, arguments.rows, arguments.devices)
    results: dict[str, Any] = {}
    try:
        for worker in workers.values():
            assert worker.stdout
            if worker.stdout.readline().strip() != "ready":
                raise SystemExit("a worker did not start; its message is above")
        for candidates in arguments.candidates:
            row = results[str(candidates)] = take_turns(workers, candidates, arguments.rounds)
            line = "  ".join(f"{name} {value}" for name, value in row.items())
            print(f"{candidates:3} candidates, s/step: {line}", flush=True)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    head = common.conditions(
        "vs_torch", f"cpu, {os.cpu_count()} cores", "float32", arguments.candidates, {"torch": version("torch")},
        preset=arguments.preset, jax_devices=arguments.devices, rounds=arguments.rounds, rows=arguments.rows,
    )  # fmt: skip
    common.report(head, {"s_per_step": results})


if __name__ == "__main__":
    main()
