"""What int8 weights and an int8 cache change: logits, and how often pictures of scenes are right.

    python -m scripts.bench.quantization_effect --prompts 100 --accuracy
    python -m scripts.bench.quantization_effect --model minDALL-E/1.3B --prompts 4 --dtype bfloat16

Draws pictures of captions of scenes, and runs their codes through the network again as it is and quantised, row by row
against the cache. Reports, over all codes, the divergence KL(as it is || quantised) of the distribution of a code in
nats, and how often both find the same code most probable. --accuracy also draws with the quantised model, and counts
pictures in which the judge of scripts/scenes/judge.py finds everything right; it goes with a model of scenes. Prints a
table, then one JSON line.
"""

import argparse
import json
import platform
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mindalle_jax import Dalle
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.sampling.decode import prefill, row_length
from scripts.scenes.accuracy import accuracy, draw_scenes
from scripts.scenes.dataset import captions, make_scene

MODES: Any = (None, "weights", "weights+cache")


@partial(jax.jit, static_argnames=("model", "steps"))
def logits_of_rows(model: Transformer, steps: int, params: Any, text_ids: jax.Array, codes: jax.Array) -> jax.Array:
    """f32[n, h * w, v]: of each code int32[n, h * w] given those before it and text int32[p], by way of the cache."""
    prefix = prefill(model, params, text_ids, jnp.zeros(0, jnp.int32), jnp.int32(0))
    cache = model.new_cache(len(codes), prefix=prefix.kv)
    parts = [jnp.broadcast_to(prefix.logits, (len(codes), 1, len(prefix.logits)))]
    for t in range(0, codes.shape[1], steps):
        row = codes[:, t : t + steps]
        logits, cache = model.apply({"params": params}, row, t, prefix.kv, cache, method="step")  # type: ignore[misc]
        parts.append(logits)
    return jnp.concatenate(parts, axis=1)[:, :-1]


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as of mindalle sample (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=100, help="captions, one picture each (default: %(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: float32 on CPU, else bfloat16")
    parser.add_argument("--accuracy", action="store_true", help="draw with the quantised model too, and judge")
    arguments = parser.parse_args()

    figures: dict[str, Any] = {}
    logits: dict[Any, list[np.ndarray]] = {mode: [] for mode in MODES}
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    for mode in MODES:
        model = Dalle.from_pretrained(arguments.model, dtype=arguments.dtype, quantize=mode)
        steps = row_length(model.code_size**2)
        if mode is None:
            prompts = [captions(make_scene("valid", index))[0] for index in range(arguments.prompts)]
            for prompt in tqdm(prompts, desc="draw", unit="prompt", disable=None):
                drawn.append((model.tokenize(prompt)[0], model.generate_codes(prompt, num_candidates=1)))
        for text_ids, codes in tqdm(drawn, desc=f"logits, {mode}", unit="prompt", disable=None):
            logits[mode].append(np.asarray(logits_of_rows(model._transformer, steps, model._stage2, text_ids, codes)))
        if mode:
            figures[mode] = compare(logits[None], logits[mode])
        if arguments.accuracy:
            for split in ("valid", "heldout"):
                pictures = draw_scenes(model, split, arguments.prompts, num_candidates=1)
                right = accuracy(one.first_verdict for one in pictures)["all"]
                figures.setdefault(str(mode), {})[f"right, {split}"] = round(right, 4)
    for mode, values in figures.items():
        print(f"{mode:>16}  " + "  ".join(f"{name} {value}" for name, value in values.items()))
    conditions = {
        "bench": "quantization",
        "model": arguments.model,
        "prompts": arguments.prompts,
        "device": jax.devices()[0].device_kind,
        "dtype": model.dtype,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(conditions | figures))


def compare(exact: list[np.ndarray], other: list[np.ndarray]) -> dict[str, float]:
    """Of logits f32[n, t, v] a prompt: mean and largest KL in nats, share of equal arg max."""
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
