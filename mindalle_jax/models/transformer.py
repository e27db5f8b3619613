"""The transformer over image codes: one trunk for text-to-image (`transformer1d`) and image-only (`igpt`).

It is a pre-LN GPT over the sequence [prefix; codes]. The prefix is the text (N positions). For the image-only model it
is one start vector, chosen by class. This is a pure network: it reads no files and does not sample.

Dimensions: b batch, s sequence, d model, h heads, k head width, f MLP width, v vocabulary, l layer, p prefix length.

Linear weights are stored [out, in] as in PyTorch. On CPU a decoding step of one candidate is then a third faster; on
accelerators it makes no difference. Weights also need no transpose between the two formats.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mindalle_jax.config.schema import Stage2Config, Stage2Hparams
from mindalle_jax.models.attention import DECODE_ATTENTION, KV, new_cache

Remat = Literal["none", "dots", "full"]


class Transformer(nn.Module):
    """Embeddings, blocks and heads.

    stacked: True has the blocks as one module whose parameters have a leading layer axis (`blocks`). It has few leaves
    and compiles quickly; training and files use it. False has separate blocks (`blocks_0`, `blocks_1`, ...). Sampling
    uses it, because a loop would copy slices of stacked weights in every step. `unstack_blocks` turns the first layout
    into the second.

    dtype: compute dtype; softmax, LayerNorm statistics and logits are float32.

    remat: the results that the backward pass computes again to save memory (only with stacked=True). "none" keeps all;
    "dots" keeps only the results of matrix products with weights; "full" keeps nothing within a block.
    flash_attention: attention of the forward pass by cuDNN, which stores no weights [b, h, s, s]. It needs an NVIDIA
    GPU and bfloat16.
    constrain: a function of hidden states [b, s, d] in the forward pass, which can set their sharding.
    """

    config: Stage2Config
    stacked: bool = True
    dtype: Any = jnp.float32
    attention: str = "xla"
    """Backend of decode_attention: a key of attention.DECODE_ATTENTION."""
    int8_cache: bool = False
    """Whether keys and values of the image sampled so far are Quantized."""
    remat: Remat = "none"
    flash_attention: bool = False
    constrain: Callable[[jax.Array], jax.Array] = lambda x: x

    def setup(self) -> None:
        c, h = self.config, self.config.hparams

        def table(rows: int, stddev: float = 0.02) -> nn.Embed:
            init = nn.initializers.normal(stddev)
            return nn.Embed(rows, h.embed_dim, dtype=self.dtype, embedding_init=init)

        self.tok_emb_img = table(c.vocab_size_img)
        self.pos_emb_img = table(h.ctx_len_img)
        if c.type == "igpt":
            self.sos = table(h.n_classes or 1) if c.use_cls_cond else table(1, stddev=1.0)
            self.head = Linear(c.vocab_size_img, use_bias=False, dtype=self.dtype, out_dtype=jnp.float32)
        else:
            self.tok_emb_txt = table(c.vocab_size_txt)
            self.pos_emb_txt = table(h.ctx_len_txt)
            self.head_img = Linear(c.vocab_size_img, use_bias=False, dtype=self.dtype, out_dtype=jnp.float32)
            self.head_txt = Linear(c.vocab_size_txt, use_bias=False, dtype=self.dtype, out_dtype=jnp.float32)
        if self.stacked:
            block: Any = Block
            if self.remat != "none":
                policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
                # prevent_cse is not needed: within a scan XLA cannot merge the two computations.
                block = nn.remat(Block, policy=policy, prevent_cse=False, static_argnums=(2,))
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,  # type: ignore[arg-type]
                length=h.n_layers,
            )
            self.blocks: Any = scanned(h, self.dtype, self.attention, self.flash_attention, self.constrain)
        else:
            self.blocks = [
                Block(h, self.dtype, self.attention, self.flash_attention, self.constrain) for _ in range(h.n_layers)
            ]
        self.ln_f = _layer_norm(self.dtype)
        self.dropout = nn.Dropout(h.embd_pdrop)

    def __call__(
        self, prefix_ids: jax.Array, codes: jax.Array, train: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Computes the forward pass over a complete sequence (teacher forcing).

        prefix_ids: int32[b, p], text ids, or class labels [b, 1] (zeros without classes). codes: int32[b, t]. train:
        apply the dropout of the config, which needs rngs={"dropout": key} if a rate is not 0.
        Returns the logits of each code given all positions before it, f32[b, t, v], and the logits of the text ids
        1..p-1, f32[b, p-1, v] (None for the image-only model).
        """
        # The last position before a code predicts it, so the last code is not fed:
        # prefix a b, codes x y z:   input  a b x y
        #                            output . x y z   (and b at the first, from the text head)
        last, length = prefix_ids.shape[1] - 1, codes.shape[1]
        # cuDNN's backward pass takes no odd lengths. So the last code is fed too; no earlier position sees it.
        odd = (last + length) % 2 == 1
        inputs = codes if self.flash_attention and odd else codes[:, :-1]
        x = jnp.concatenate(
            [self.embed_prefix(prefix_ids), self.tok_emb_img(inputs) + self.pos_emb_img(jnp.arange(inputs.shape[1]))],
            axis=1,
        )
        x = self.dropout(self.constrain(x), deterministic=not train)
        x, _ = self._trunk(x, train)
        x = x[:, : last + length]
        text_logits = None if self.config.type == "igpt" else self.head_txt(x[:, :last])
        return self.image_head(x[:, last:]), text_logits

    def prefill(self, prefix_ids: jax.Array, codes: jax.Array, t: jax.Array) -> tuple[jax.Array, list[KV], list[KV]]:
        """Runs the prefix of one prompt, int32[p], and given codes int32[m], of which the first t count.

        Returns the logits of code t, f32[v], and per layer the keys and values of the prefix [h, p, k] and of the codes
        [h, m, k]. Keys and values from position t on have no meaning.
        """
        x = self.embed_prefix(prefix_ids[None])
        x = jnp.concatenate([x, (self.tok_emb_img(codes) + self.pos_emb_img(jnp.arange(len(codes))))[None]], axis=1)
        x, kvs = self._trunk(x, False)
        p = len(prefix_ids)
        kvs = [KV(*(a[0].transpose(1, 0, 2) for a in kv)) for kv in kvs]  # [h, p + m, k]
        prefix, given = ([KV(kv.k[:, part], kv.v[:, part]) for kv in kvs] for part in (slice(p), slice(p, None)))
        # prefix a b, codes x y: the hidden states are those of a b x y, and code t = 1 follows x, at p - 1 + t = 2.
        return self.image_head(x[0, p - 1 + t]), prefix, given

    def step(
        self, codes: jax.Array, t: jax.Array, prefix: list[KV] | int, cache: list[KV]
    ) -> tuple[jax.Array, list[KV]]:
        """Feeds codes t..t+w-1 of every row, int32[b, w].

        prefix: keys and values that the rows share, one KV per layer; or the length of a private prefix. cache: one KV
        per layer. Returns the logits after each code, f32[b, w, v], and the cache with these positions filled.
        """
        x = self.tok_emb_img(codes) + self.pos_emb_img(t + jnp.arange(codes.shape[1]))
        filled, shared_by_layer = [], [prefix] * len(cache) if isinstance(prefix, int) else prefix
        for block, shared, own in zip(self.blocks, shared_by_layer, cache, strict=True):
            x, own = block.decode(x, shared, own, t)
            filled.append(own)
        return self.image_head(self.ln_f(x)), filled

    @property
    def prefix_length(self) -> int:
        """p: the number of text positions, or 1 for the start vector of the image-only model."""
        return 1 if self.config.type == "igpt" else self.config.hparams.ctx_len_txt

    def new_cache(
        self, batch: int, length: int | None = None, prefix: list[KV] | None = None, given: list[KV] | None = None
    ) -> list[KV]:
        """Returns the cache for `length` codes (None: all codes of an image) of `batch` rows, one KV per layer.

        prefix, given: as prefill returns them; None is empty. The first `length` of `given` are put into the cache.
        """
        h = self.config.hparams
        empty = jnp.zeros((h.n_heads, 0, h.embed_dim // h.n_heads), self.dtype)
        nothing = [KV(empty, empty)] * h.n_layers
        return [
            new_cache(self.attention, batch, shared, own, length or h.ctx_len_img, int8=self.int8_cache)
            for shared, own in zip(prefix or nothing, given or nothing, strict=True)
        ]

    def embed_prefix(self, prefix_ids: jax.Array) -> jax.Array:
        """Embeds ids [b, p] -> [b, p, d]. The start vector of the image-only model has no positional embedding."""
        if self.config.type == "igpt":
            return self.sos(prefix_ids)
        return self.tok_emb_txt(prefix_ids) + self.pos_emb_txt(jnp.arange(prefix_ids.shape[1]))

    def image_head(self, x: jax.Array) -> jax.Array:
        """Returns the logits of codes, f32[..., v], from final hidden states [..., d]."""
        return self.head(x) if self.config.type == "igpt" else self.head_img(x)

    def _trunk(self, x: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        """Applies blocks and ln_f to [b, s, d]; also returns keys, values [b, s, h, k] (stacked: [l, b, s, h, k])."""
        if self.stacked:
            x, kvs = self.blocks(x, train)
        else:
            kvs = []
            for block in self.blocks:
                x, kv = block(x, train)
                kvs.append(kv)
        return self.ln_f(x), kvs


class Block(nn.Module):
    """x += attn(ln1(x)); x += mlp(ln2(x))."""

    hparams: Stage2Hparams
    dtype: Any
    attention: str
    flash_attention: bool
    constrain: Callable[[jax.Array], jax.Array]

    def setup(self) -> None:
        p, dtype = self.hparams, self.dtype
        self.ln1, self.ln2 = _layer_norm(dtype), _layer_norm(dtype)
        self.qkv = Linear((3, p.embed_dim), use_bias=p.attn_bias, dtype=dtype)
        self.proj = Linear(p.embed_dim, use_bias=p.attn_bias, dtype=dtype)
        self.fc1 = Linear(4 * p.embed_dim, use_bias=p.mlp_bias, dtype=dtype)
        self.fc2 = Linear(p.embed_dim, use_bias=p.mlp_bias, dtype=dtype)
        self.attn_dropout, self.resid_dropout = nn.Dropout(p.attn_pdrop), nn.Dropout(p.resid_pdrop)

    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, KV]:
        """Applies the block to a complete sequence [b, s, d]; also returns its keys and values [b, s, h, k]."""
        q, k, v = self._heads(x)
        if train and self.hparams.attn_pdrop > 0:
            attended = self._attention_with_dropout(q, k, v)
        else:
            implementation = "cudnn" if self.flash_attention else "xla"
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
        return self.constrain(self._rest(x, attended, train)), KV(k, v)

    def _attention_with_dropout(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Computes causal attention with dropout on the weights [b, h, s, t], which jax.nn does not have."""
        scores = jnp.einsum("bshk,bthk->bhst", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores, axis=-1, where=jnp.tri(q.shape[1], dtype=bool))
        weights = self.attn_dropout(weights.astype(q.dtype), deterministic=False)
        return jnp.einsum("bhst,bthk->bshk", weights, v)

    def decode(self, x: jax.Array, prefix: KV | int, cache: KV, t: jax.Array) -> tuple[jax.Array, KV]:
        """Applies the block to positions t..t+w-1, [b, w, d], with attention to the cache; returns both."""
        q, k, v = self._heads(x)
        attended, cache = DECODE_ATTENTION[self.attention](q, KV(k, v), prefix, cache, t)
        return self._rest(x, attended, train=False), cache

    def _heads(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns queries, keys and values, each [..., h, k]. Heads are contiguous parts of the width."""
        y = self.qkv(self.ln1(x))  # [..., 3, d]
        y = y.reshape(*y.shape[:-1], self.hparams.n_heads, -1)
        return tuple(y[..., i, :, :] for i in range(3))

    def _rest(self, x: jax.Array, attended: jax.Array, train: bool) -> jax.Array:
        """Applies the rest of the block after attention: the projection [..., h, k] -> [..., d], and the MLP."""
        x = x + self.resid_dropout(self.proj(attended.reshape(x.shape)), deterministic=not train)
        y = self.fc1(self.ln2(x))
        y = y * nn.sigmoid(1.702 * y) if self.hparams.gelu_use_approx else nn.gelu(y, approximate=False)
        return x + self.resid_dropout(self.fc2(y), deterministic=not train)


class Linear(nn.Module):
    """y = x W^T + b with W [*features, in], b [*features]."""

    features: int | tuple[int, ...]
    use_bias: bool
    dtype: Any
    out_dtype: Any = None
    """dtype of the product; None: `dtype`. Logits are float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = (self.features,) if isinstance(self.features, int) else self.features
        weight = self.param("weight", nn.initializers.normal(0.02), (*features, x.shape[-1]))
        out_dtype, quantized = self.out_dtype or self.dtype, self.has_variable("params", "weight_scale")
        y = jax.lax.dot_general(
            x.astype(self.dtype),
            weight.astype(self.dtype).reshape(-1, x.shape[-1]),
            (((x.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32 if quantized else out_dtype,
        ).reshape(*x.shape[:-1], *features)
        if quantized:  # the weight is int8: models/quantization.py
            y = (y * self.get_variable("params", "weight_scale")).astype(out_dtype)
        if self.has_variable("params", "lora_a"):  # a low-rank adapter: training/lora.py
            down = x.astype(self.dtype) @ self.get_variable("params", "lora_a").astype(self.dtype).T  # [..., r]
            up = self.get_variable("params", "lora_b").astype(self.dtype).reshape(-1, down.shape[-1])
            y = y + (down @ up.T).reshape(y.shape).astype(y.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, features).astype(self.dtype)
        return y


def unstack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """Converts nested parameters for stacked=True to those for stacked=False."""
    layers = {}
    for i in range(jax.tree.leaves(params["blocks"])[0].shape[0]):
        layers[f"blocks_{i}"] = jax.tree.map(lambda a, i=i: a[i], params["blocks"])
    return {name: leaf for name, leaf in params.items() if name != "blocks"} | layers


def _layer_norm(dtype: Any) -> nn.LayerNorm:
    # The two-pass variance, because E[x^2] - E[x]^2 loses digits that parity with the original needs.
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, use_fast_variance=False)
