"""Measures how int8 weights and an int8 cache change the logits, and how often images of scenes are right.

    python -m scripts.bench.quantization_effect --prompts 100 --accuracy
    python -m scripts.bench.quantization_effect --model minDALL-E/1.3B --prompts 4 --dtype bfloat16

Samples captions of scenes. Then runs the codes through the network again in full precision and quantized, row by row
against the cache. Reports over all codes the divergence KL(full precision || quantized) of the distribution of a code,
in nats, and how often both have the same most probable code. Prints a table, then one JSON line.

--accuracy also samples with the quantized model, and counts the images in which the judge of scripts/scenes/judge.py
finds everything right. Use it with a model of scenes.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mindalle_jax import Dalle
from mindalle_jax.models.transformer import Transformer
from scripts.bench import common
from scripts.scenes.accuracy import accuracy, sample_scenes
from scripts.scenes.dataset import captions, make_scene

MODES: Any = (None, "weights", "weights+cache")


@partial(jax.jit, static_argnames=("model", "steps"))
def logits_of_rows(model: Transformer, steps: int, params: Any, text_ids: jax.Array, codes: jax.Array) -> jax.Array:
    """Logits f32[n, h * w, v] of codes int32[n, h * w], given text int32[p] and, through the cache, earlier codes."""
    none = jnp.zeros(0, jnp.int32)
    outputs: Any = model.apply({"params": params}, text_ids, none, jnp.int32(0), method="prefill")
    first, prefix, _ = outputs
    cache = model.new_cache(len(codes), prefix=prefix)
    parts = [jnp.broadcast_to(first, (len(codes), 1, len(first)))]
    for t in range(0, codes.shape[1], steps):
        row = codes[:, t : t + steps]
        logits, cache = model.apply({"params": params}, row, t, prefix, cache, method="step")  # type: ignore[misc]
        parts.append(logits)
    return jnp.concatenate(parts, axis=1)[:, :-1]


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--model", default="demo-scenes", help="as for mindalle sample (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=100, help="captions, one image each (default: %(default)s)")
    parser.add_argument("--dtype", choices=common.DTYPES, help="default: float32 on CPU, else bfloat16")
    parser.add_argument("--accuracy", action="store_true", help="also judge images of the quantized model")
    arguments = parser.parse_args()

    metrics: dict[str, Any] = {}
    logits: dict[Any, list[np.ndarray]] = {mode: [] for mode in MODES}
    sampled: list[tuple[np.ndarray, np.ndarray]] = []
    for mode in MODES:
        model = Dalle.from_pretrained(arguments.model, dtype=arguments.dtype, quantize=mode)
        if mode is None:
            sampled = sample_captions(model, arguments.prompts)
        for text_ids, codes in tqdm(sampled, desc=f"logits, {mode}", unit="prompt", disable=None):
            steps = math.isqrt(codes.shape[1])
            logits[mode].append(np.asarray(logits_of_rows(model._transformer, steps, model._stage2, text_ids, codes)))
        if mode:
            metrics[mode] = compare(logits[None], logits[mode])
        if arguments.accuracy:
            metrics.setdefault(str(mode), {}).update(share_right(model, arguments.prompts))
    dtype = model.dtype
    common.report(
        common.conditions("quantization", jax.devices()[0], dtype, 1, model=arguments.model, prompts=arguments.prompts),
        {"by_mode": metrics},
    )


def sample_captions(model: Dalle, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(text ids, codes of one image) of each of the first `count` captions."""
    prompts = [captions(make_scene("valid", index))[0] for index in range(count)]
    return [
        (model.tokenize(prompt)[0], model.generate_codes(prompt, num_candidates=1))
        for prompt in tqdm(prompts, desc="sample", unit="prompt", disable=None)
    ]


def share_right(model: Dalle, count: int) -> dict[str, float]:
    """The share of images in which the judge finds everything right, by split."""
    shares = {}
    for split in ("valid", "heldout"):
        judged = sample_scenes(model, split, count, num_candidates=1)
        shares[f"right, {split}"] = round(accuracy(one.first_verdict for one in judged)["all"], 4)
    return shares


def compare(exact: list[np.ndarray], other: list[np.ndarray]) -> dict[str, float]:
    """Mean and largest KL in nats, and share of equal arg max, of two lists of logits f32[n, t, v], one per prompt."""
    divergence, same = [], []
    for a, b in zip(exact, other, strict=True):
        p, q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
        divergence.append(np.asarray(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))
        same.append(a.argmax(-1) == b.argmax(-1))
    return {
        "KL, mean": float(f"{np.mean(divergence):.2g}"),
        "KL, largest": float(f"{np.max(divergence):.2g}"),
        "same most probable code": round(float(np.mean(same)), 6),
    }


if __name__ == "__main__":
    main()
