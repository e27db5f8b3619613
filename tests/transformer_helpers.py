"""Small transformers and their logits, by the forward pass and by decoding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mindalle_jax.config.schema import Config, Stage2Config, Stage2Hparams
from mindalle_jax.models.transformer import Transformer

KINDS = ("text", "class", "free")


def config_of(kind: str, *, vocab_txt=50, vocab_img=40, n_classes=7, **hparams) -> Config:
    stage2 = Stage2Config(
        type="transformer1d" if kind == "text" else "igpt",
        vocab_size_txt=vocab_txt,
        vocab_size_img=vocab_img,
        use_cls_cond=kind == "class",
        hparams=Stage2Hparams(n_classes=n_classes if kind == "class" else None, **hparams),
    )
    return Config(stage2=stage2)


def small(kind: str, **changes) -> Config:
    sizes = {"embed_dim": 32, "n_layers": 2, "n_heads": 4, "ctx_len_img": 16, "ctx_len_txt": 5}
    return config_of(kind, **(sizes | changes))


def random_inputs(config: Config, batch: int, length: int | None = None, seed: int = 0):
    """Prefix ids [batch, p] and codes [batch, length]."""
    rng, c = np.random.default_rng(seed), config.stage2
    if c.type == "igpt":
        prefix_ids = rng.integers(0, (c.hparams.n_classes or 1) if c.use_cls_cond else 1, (batch, 1))
    else:
        prefix_ids = rng.integers(0, c.vocab_size_txt, (batch, c.hparams.ctx_len_txt))
    codes = rng.integers(0, c.vocab_size_img, (batch, length or c.hparams.ctx_len_img))
    return prefix_ids.astype(np.int32), codes.astype(np.int32)


# Of dozens of networks each is run once: LLVM need not optimise what takes 100 times as long to compile as to run.
@partial(jax.jit, static_argnames="model", compiler_options={"xla_backend_optimization_level": "0"})
def _forward(model, params, prefix_ids, codes):
    return model.apply({"params": params}, prefix_ids, codes)


def forward(model: Transformer, params, prefix_ids, codes):
    """Image and text logits of the forward pass, in full float32."""
    with jax.default_matmul_precision("highest"):
        return _forward(model, params, prefix_ids, codes)


@partial(jax.jit, static_argnames=("model", "width"))
def decode_jit(model, params, prefix_ids, codes, width):
    variables, (b, t) = {"params": params}, codes.shape
    logits, prefix, _ = model.apply(variables, prefix_ids, codes[0, :0], 0, method="prefill")

    def step(cache, at):
        logits, cache = model.apply(variables, at[0], at[1], prefix, cache, method="step")
        return cache, logits

    windows = codes.reshape(b, t // width, width).swapaxes(0, 1)
    _, rest = jax.lax.scan(step, model.new_cache(b, prefix=prefix), (windows, jnp.arange(0, t, width)))
    rest = rest.swapaxes(0, 1).reshape(b, t, -1)[:, :-1]
    return jnp.concatenate([jnp.broadcast_to(logits, (b, 1, len(logits))), rest], axis=1)


def decode(model: Transformer, params, prefix_ids, codes, width=1):
    """Image logits [b, t, v] by prefill and steps, fed the codes [b, t] `width` at a time; one prefix [p] for all."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(decode_jit(model, params, prefix_ids, codes, width))
