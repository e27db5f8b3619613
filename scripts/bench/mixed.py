"""Times many prompts with one image each: one prompt after the other, and prompts mixed in the rows of one batch.

    python -m scripts.bench.mixed --prompts 64 --rounds 5
    python -m scripts.bench.mixed --model minDALL-E/1.3B --batch-sizes 32 96

Prompts are captions of scenes. Each round runs generate for one prompt after the other, and then generate with
mixed_batches=True for each batch size. Decoding of images is included. Compilation is done before the first round.
Reports the median seconds of each way, and the median of their ratio per round. Over 1, mixed batches are faster.
Prints a table, then one JSON line.
"""

import statistics
import time
from typing import Any

import jax

from mindalle_jax import Dalle
from scripts.bench import common
from scripts.scenes.dataset import captions, make_scene


def sample_one_by_one(model: Any, prompts: list[str]) -> float:
    """Seconds of one call per prompt."""
    start = time.perf_counter()
    for prompt in prompts:
        model.generate(prompt, num_candidates=1, ranker=None)
    return time.perf_counter() - start


def sample_mixed(model: Any, prompts: list[str], batch_size: int | None) -> float:
    """Seconds of one call for all prompts. batch_size: rows per device; None is the default of the model."""
    start = time.perf_counter()
    model.generate(prompts, num_candidates=1, batch_size=batch_size, mixed_batches=True, ranker=None)
    return time.perf_counter() - start


def compare(model: Any, prompts: list[str], batch_sizes: list[int | None], rounds: int) -> dict[str, Any]:
    """Times all rounds; returns the medians, by way and batch size."""
    one_by_one: list[float] = []
    mixed: dict[int | None, list[float]] = {batch_size: [] for batch_size in batch_sizes}
    sample_one_by_one(model, prompts[:1])  # compiles
    for batch_size in batch_sizes:
        sample_mixed(model, prompts, batch_size)
    for _ in range(rounds):
        one_by_one.append(sample_one_by_one(model, prompts))
        for batch_size, times in mixed.items():
            times.append(sample_mixed(model, prompts, batch_size))
    return {
        "one_by_one_s": round(statistics.median(one_by_one), 3),
        "mixed": {
            str(batch_size or "default"): {
                "seconds": round(statistics.median(times), 3),
                "images_per_s": round(len(prompts) / statistics.median(times), 3),
                "ratio": round(statistics.median(a / b for a, b in zip(one_by_one, times, strict=True)), 3),
            }
            for batch_size, times in mixed.items()
        },
    }


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--model", default="demo-scenes", help="as for mindalle sample (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=64, help="captions, one image each (default: %(default)s)")
    text = "rows per device of a mixed batch, 0 for the default of the model (default: 16 0)"
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 0], metavar="N", help=text)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: %(default)s)")
    parser.add_argument("--dtype", choices=common.DTYPES, help="default: float32 on CPU, else bfloat16")
    arguments = parser.parse_args()
    model = Dalle.from_pretrained(arguments.model, dtype=arguments.dtype)
    prompts = [captions(make_scene("valid", index))[0] for index in range(arguments.prompts)]
    metrics = compare(model, prompts, [size or None for size in arguments.batch_sizes], arguments.rounds)
    head = common.conditions(
        "mixed", jax.devices()[0], model.dtype, arguments.batch_sizes,
        model=arguments.model, prompts=arguments.prompts, rounds=arguments.rounds, devices=model.mesh.size,
    )  # fmt: skip
    common.report(head, metrics)


if __name__ == "__main__":
    main()
