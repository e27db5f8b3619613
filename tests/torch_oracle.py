"""minDALL-E in plain PyTorch, the oracle of the parity tests: written from its specification, apart from the port.

Parameter names are the released checkpoints' torch keys. Float32 unless the caller casts; every dropout of the released
configs is 0 and left out. Images are NCHW in [-1, 1] as in the original.

Dimensions: b batch, n text positions, t image positions, s = n + t, d model, h heads, k head width, v image vocabulary,
u text vocabulary, l layers, c channels, y/x rows/columns of the code grid, z codebook width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

# ---------------------------------------- configuration


@dataclass(frozen=True)
class TransformerConfig:
    """Stage 2; defaults: the released model. `n_classes` concerns ImageTransformer only (None: unconditional)."""

    embed_dim: int = 1536
    n_layers: int = 42
    n_heads: int = 24
    ctx_len_txt: int = 64
    ctx_len_img: int = 256
    vocab_txt: int = 16384
    vocab_img: int = 16384
    mlp_bias: bool = True
    attn_bias: bool = True
    gelu_use_approx: bool = False
    n_classes: int | None = None


@dataclass(frozen=True)
class VQGANConfig:
    """Stage 1; the defaults are the released model."""

    embed_dim: int = 256
    n_embed: int = 16384
    double_z: bool = False
    z_channels: int = 256
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)


def config_dict(transformer: TransformerConfig, vqgan: VQGANConfig, stage2_type: str | None = None) -> dict:
    """The content of config.yaml. `stage2_type` defaults to igpt when `n_classes` is set, else transformer1d."""
    stage2_type = stage2_type or ("transformer1d" if transformer.n_classes is None else "igpt")
    hparams = asdict(transformer) | {"n_dense_layers": transformer.n_layers}
    hparams |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    vocab_txt, vocab_img = hparams.pop("vocab_txt"), hparams.pop("vocab_img")
    if stage2_type == "igpt":
        dataset = {"dataset": "imagenet", "image_resolution": vqgan.resolution}
        stage2 = {"use_cls_cond": transformer.n_classes is not None}
    else:
        dataset = {"tokenizer_type": "CharBPE", "context_length": transformer.ctx_len_txt}
        dataset |= {"image_resolution": vqgan.resolution}
        stage2 = {"vocab_size_txt": vocab_txt}
    stage1 = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(vqgan).items()} | {"pdrop": 0.0}
    top = {"type": "vqgan", "embed_dim": stage1.pop("embed_dim"), "n_embed": stage1.pop("n_embed")}
    return {
        "dataset": dataset,
        "stage1": top | {"hparams": stage1},
        "stage2": {"type": stage2_type, **stage2, "vocab_size_img": vocab_img, "hparams": hparams},
    }


def configs_from_dict(config: dict) -> tuple[TransformerConfig, VQGANConfig]:
    """The inverse of `config_dict`; absent fields take the released model's values."""
    stage1, stage2 = dict(config.get("stage1", {})), dict(config.get("stage2", {}))
    hparams = dict(stage2.get("hparams", {}))
    hparams |= {f"vocab_{m}": stage2[f"vocab_size_{m}"] for m in ("txt", "img") if f"vocab_size_{m}" in stage2}
    hparams["n_classes"] = hparams.get("n_classes") if stage2.get("use_cls_cond") else None
    fields1 = stage1 | stage1.get("hparams", {})
    fields1 = {k: tuple(v) if isinstance(v, list) else v for k, v in fields1.items()}
    return (
        TransformerConfig(**{k: v for k, v in hparams.items() if k in TransformerConfig.__dataclass_fields__}),
        VQGANConfig(**{k: v for k, v in fields1.items() if k in VQGANConfig.__dataclass_fields__}),
    )


def demo_vocabulary() -> tuple[dict[str, int], list[str]]:
    """A CharBPE vocabulary of 60 tokens, enough to spell "a cat!"; [UNK] is 0, [PAD] is 1."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["[UNK]", "[PAD]", *letters, *(c + "</w>" for c in letters), "!", "!</w>", ",", ",</w>", "ca", "cat</w>"]
    return {token: i for i, token in enumerate(tokens)}, ["c a", "ca t</w>"]


def save_checkpoint_folder(
    folder, cfg_yaml_dict: dict, vqgan: nn.Module, transformer: nn.Module, vocab=None, merges=()
):
    """Writes the original's folder format: `vocab` {token: id}, `merges` "left right" lines; no vocab, no tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg_yaml_dict, sort_keys=False))
    if vocab is not None:
        (folder / "tokenizer").mkdir(exist_ok=True)
        (folder / "tokenizer/bpe-16k-vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        merges_text = "\n".join(["#version: 0.2", *merges, ""])
        (folder / "tokenizer/bpe-16k-merges.txt").write_text(merges_text, encoding="utf-8")
    for name, module in (("stage1_last.ckpt", vqgan), ("stage2_last.ckpt", transformer)):
        torch.save({"epoch": 3, "global_step": 77, "state_dict": module.state_dict()}, folder / name)
    return folder


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Moves every parameter off its initial value, in place and the same for a seed: kernels N(0, 1/fan_in), tables
    N(0, 0.25), biases N(0, 0.01), norm gains 1 + N(0, 0.04). Activations and logits stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name == "bias":
                mean, std = 0.0, 0.1
            elif isinstance(part, nn.LayerNorm | nn.GroupNorm):
                mean, std = 1.0, 0.2
            elif isinstance(part, nn.Linear | nn.Conv2d):
                mean, std = 0.0, 1 / math.sqrt(parameter[0].numel())
            else:  # embedding tables, the codebook and the unconditional sos
                mean, std = 0.0, 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)
    return module


# ---------------------------------------- stage 2: transformer

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [b, h, s, k] -> [b, h, s, k]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T * head_dim**-0.5) v over [b, h, s, k]; position i sees 0..i (for s = 3: 100, 110, 111)."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # [b, h, s, s]
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~visible, -math.inf).softmax(dim=-1) @ v


class SigmoidGELU(nn.Module):
    """x * sigmoid(1.702 x), for `gelu_use_approx`."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Separate query, key, value and output projections; head i owns the i-th contiguous slice of the width."""

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        for name in ("key", "query", "value", "proj"):
            setattr(self, name, nn.Linear(cfg.embed_dim, cfg.embed_dim, bias=cfg.attn_bias))

    def forward(self, x: Tensor, attend: Attend = causal_attention) -> Tensor:
        b, s, d = x.shape
        q, k, v = (
            linear(x).view(b, s, self.n_heads, d // self.n_heads).transpose(1, 2)  # [b, h, s, k]
            for linear in (self.query, self.key, self.value)
        )
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(b, s, d))


class Block(nn.Module):
    """x += attn(ln1(x)); x += mlp(ln2(x))."""

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        d = cfg.embed_dim
        self.ln1, self.ln2 = nn.LayerNorm(d, eps=1e-5), nn.LayerNorm(d, eps=1e-5)
        self.attn = Attention(cfg)
        self.mlp = nn.Sequential(
            nn.Linear(d, 4 * d, bias=cfg.mlp_bias),
            SigmoidGELU() if cfg.gelu_use_approx else nn.GELU(),
            nn.Linear(4 * d, d, bias=cfg.mlp_bias),
        )

    def forward(self, x: Tensor, attend: Attend = causal_attention) -> Tensor:
        x = x + self.attn(self.ln1(x), attend)
        return x + self.mlp(self.ln2(x))


def _initialise(module: nn.Module) -> None:
    """From scratch: linear and embedding weights N(0, 0.02), biases 0 (norms keep torch's 1 and 0)."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


class Transformer(nn.Module):
    """Text-to-image model (`transformer1d`): one causal sequence [text; codes]."""

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.cfg, d = cfg, cfg.embed_dim
        self.tok_emb_img = nn.Embedding(cfg.vocab_img, d)
        self.tok_emb_txt = nn.Embedding(cfg.vocab_txt, d)
        self.pos_emb_img = nn.Embedding(cfg.ctx_len_img, d)
        self.pos_emb_txt = nn.Embedding(cfg.ctx_len_txt, d)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_f = nn.LayerNorm(d, eps=1e-5)
        self.head_img = nn.Linear(d, cfg.vocab_img, bias=False)
        self.head_txt = nn.Linear(d, cfg.vocab_txt, bias=False)
        _initialise(self)

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """[b, n] -> [b, n, d]."""
        return self.tok_emb_txt(text_ids) + self.pos_emb_txt.weight[: text_ids.shape[1]]

    def forward(self, text_ids: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """text_ids [b, n], codes [b, t] -> logits [b, t, v] of codes 0..t-1, logits [b, n-1, u] of text ids 1..n-1.

        n = 3, t = 2: hidden states h0 h1 h2 | h3 h4; h2, h3 predict the codes (h4 nothing), h0, h1 the ids 1 and 2.
        """
        n, t = text_ids.shape[1], codes.shape[1]
        image = self.tok_emb_img(codes) + self.pos_emb_img.weight[:t]  # [b, t, d]
        x = torch.cat([self.embed_text(text_ids), image], dim=1)  # [b, n + t, d]
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        return self.head_img(x[:, n - 1 : n - 1 + t]), self.head_txt(x[:, : n - 1])


class ImageTransformer(nn.Module):
    """Image-only model (`igpt`): one causal sequence [sos; codes[:-1]], sos a class row or one learned vector."""

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.cfg, d = cfg, cfg.embed_dim
        self.sos = nn.Parameter(torch.randn(1, 1, d)) if cfg.n_classes is None else nn.Embedding(cfg.n_classes, d)
        self.tok_emb_img = nn.Embedding(cfg.vocab_img, d)
        self.pos_emb_img = nn.Embedding(cfg.ctx_len_img, d)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_f = nn.LayerNorm(d, eps=1e-5)
        self.head = nn.Linear(d, cfg.vocab_img, bias=False)
        _initialise(self)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """codes [b, t], labels [b] (class-conditional only) -> logits [b, t, v] of codes 0..t-1."""
        b, t = codes.shape
        sos = self.sos.expand(b, 1, -1) if self.cfg.n_classes is None else self.sos(labels)[:, None]  # [b, 1, d]
        image = self.tok_emb_img(codes[:, :-1]) + self.pos_emb_img.weight[: t - 1]  # [b, t - 1, d]
        x = torch.cat([sos, image], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


def losses(image_logits, codes, text_logits=None, text_ids=None, *, w_txt: float = 1 / 8, pad_id: int | None = None):
    """(image + w_txt * text, image, text): mean cross-entropies of [b, t, v] for codes [b, t] and of [b, n-1, u] for
    text ids [b, n]. With `pad_id` the text mean runs over the targets that are not PAD (0 when all are)."""
    image = F.cross_entropy(image_logits.flatten(0, 1), codes.flatten())
    if text_logits is None:
        return image, image, torch.zeros_like(image)
    target = text_ids[:, 1:].flatten()
    each = F.cross_entropy(text_logits.flatten(0, 1), target, reduction="none")
    kept = torch.ones_like(each) if pad_id is None else (target != pad_id).to(each)
    text = (each * kept).sum() / kept.sum().clamp(min=1)
    return image + w_txt * text, image, text


# ---------------------------------------- sampling


def filter_probs(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """logits [..., v] -> float32 probabilities [..., v] after temperature, top-k and top-p.

    Top-k keeps ties of the k-th largest. Top-p keeps a token iff the mass strictly before it, in descending order, is
    below p, the first always; among equals the lower id comes first: [.4 .2 .2 .2], p = .5 -> [.667 .333 0 0]."""
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
        before = F.pad(ordered.cumsum(dim=-1)[..., :-1], (1, 0))  # mass strictly before each token
        keep = before < top_p
        keep[..., 0] = True
        probs = torch.zeros_like(probs).scatter(-1, ids, ordered * keep)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


@torch.inference_mode()
def greedy(image_logits: Callable[[Tensor], Tensor], batch: int, n_steps: int) -> Tensor:
    """Most likely codes [batch, n_steps] without a cache; `image_logits` maps codes [b, t] to logits [b, t, v]."""
    codes = torch.zeros(batch, n_steps, dtype=torch.long)
    for t in range(n_steps):  # code t is not seen by logits 0..t, so its place may hold anything
        codes[:, t] = image_logits(codes[:, : t + 1])[:, t].argmax(dim=-1)
    return codes


class _CacheDecoder:
    """One position at a time: `prefill(text_ids)` gives the logits of code 0, `step(code t)` those of code t + 1."""

    def __init__(self, model: Transformer):
        self.model, self.position = model, 0  # position: codes seen so far

    def _image_logits(self, x: Tensor) -> Tensor:
        """Embeddings [b, s, d] of the new positions -> image logits [b, v] after the last of them."""
        for layer, block in enumerate(self.model.blocks):
            x = block(x, self._attend(layer))
        return self.model.head_img(self.model.ln_f(x[:, -1]))

    @torch.inference_mode()
    def step(self, codes: Tensor) -> Tensor:
        """codes [b] of the current position -> logits [b, v] of the next."""
        if self.position >= self.model.cfg.ctx_len_img:
            raise ValueError(f"all {self.model.cfg.ctx_len_img} image positions are filled; call prefill again")
        x = self.model.tok_emb_img(codes)[:, None] + self.model.pos_emb_img.weight[self.position]  # [b, 1, d]
        self.position += 1
        return self._image_logits(x)

    @torch.inference_mode()
    def _loop(self, logits: Tensor, pick: Callable[[Tensor], Tensor], max_steps: int | None) -> Tensor:
        codes = [pick(logits)]  # each [b]
        for _ in range((max_steps or self.model.cfg.ctx_len_img) - 1):
            codes.append(pick(self.step(codes[-1])))
        return torch.stack(codes, dim=1)

    def greedy(self, text_ids: Tensor, max_steps: int | None = None) -> Tensor:
        """text_ids [b, n] -> most likely codes [b, max_steps] (default: ctx_len_img)."""
        return self._loop(self.prefill(text_ids), lambda logits: logits.argmax(dim=-1), max_steps)

    def sample(
        self, text_ids: Tensor, num_candidates: int, top_k: int | None, generator=None, max_steps=None
    ) -> Tensor:
        """One prompt, text_ids [n] or [1, n] -> drawn codes [num_candidates, max_steps]."""
        text_ids = text_ids.reshape(1, -1).expand(num_candidates, -1)

        def draw(logits: Tensor) -> Tensor:
            return torch.multinomial(filter_probs(logits, top_k=top_k), 1, generator=generator)[:, 0]

        return self._loop(self.prefill(text_ids), draw, max_steps)


class ConcatCacheDecoder(_CacheDecoder):
    """The original's loop: the new keys and values of all layers are appended to a list, the whole list is concatenated
    every step, every block concatenates its past again, and attention multiplies a scaled copy of the keys."""

    @torch.inference_mode()
    def prefill(self, text_ids: Tensor) -> Tensor:
        self.position, self.past = 0, []  # past: tensors [l, 2, b, h, new positions, k], one per call
        return self._image_logits(self.model.embed_text(text_ids))

    def _image_logits(self, x: Tensor) -> Tensor:
        self.joined = torch.cat(self.past, dim=-2) if self.past else None  # [l, 2, b, h, filled, k]
        self.present: list[Tensor] = []
        logits = super()._image_logits(x)
        self.past.append(torch.stack(self.present))
        return logits

    def _attend(self, layer: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.present.append(torch.stack([k, v]))
            if self.joined is None:
                return causal_attention(q, k, v)
            k = torch.cat([self.joined[layer, 0], k], dim=-2)  # [b, h, filled + 1, k]
            v = torch.cat([self.joined[layer, 1], v], dim=-2)
            return (q @ (k.transpose(-2, -1) * q.shape[-1] ** -0.5)).softmax(dim=-1) @ v

        return attend


class PreallocatedCacheDecoder(_CacheDecoder):
    """Buffers [b, h, n + ctx_len_img, k] per layer written in place; attention reads the filled part only."""

    @torch.inference_mode()
    def prefill(self, text_ids: Tensor) -> Tensor:
        self.position, self.n_text = 0, text_ids.shape[1]
        cfg, weight = self.model.cfg, self.model.tok_emb_txt.weight
        length = self.n_text + cfg.ctx_len_img
        shape = (2, text_ids.shape[0], cfg.n_heads, length, cfg.embed_dim // cfg.n_heads)  # [2, b, h, n + t, k]
        self.buffers = [weight.new_empty(shape) for _ in range(cfg.n_layers)]
        return self._image_logits(self.model.embed_text(text_ids))

    def _attend(self, layer: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            end = self.n_text + self.position
            k_buffer, v_buffer = self.buffers[layer]
            k_buffer[:, :, end - k.shape[2] : end], v_buffer[:, :, end - v.shape[2] : end] = k, v
            if self.position == 0:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return F.scaled_dot_product_attention(q, k_buffer[:, :, :end], v_buffer[:, :, :end])

        return attend


# ---------------------------------------- stage 1: VQGAN


def _conv(c_in: int, c_out: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, padding=size // 2)


def _norm(c: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, c, eps=1e-6)


class ResnetBlock(nn.Module):
    """Norm, swish, conv3x3, twice, plus the input (through a 1x1 convolution when the widths differ)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(c_in), _conv(c_in, c_out, 3)
        self.norm2, self.conv2 = _norm(c_out), _conv(c_out, c_out, 3)
        self.nin_shortcut = _conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttnBlock(nn.Module):
    """Self-attention of one head over all positions of a feature map, plus the input."""

    def __init__(self, c: int):
        super().__init__()
        self.norm = _norm(c)
        self.q, self.k, self.v, self.proj_out = (_conv(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # [b, y * x, c]
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(dim=-1)  # [b, y * x, y * x]
        return x + self.proj_out((weights @ v).transpose(1, 2).reshape(x.shape))


class Resample(nn.Module):
    """Up: nearest x2, conv3x3. Down: one row of zeros at the bottom, one column at the right, conv3x3 stride 2."""

    def __init__(self, c: int, up: bool):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(c, c, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention or not, then the change of resolution if any."""

    def __init__(self, c_in: int, c_out: int, n_blocks: int, with_attn: bool, resample: str | None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if j == 0 else c_out, c_out) for j in range(n_blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) if with_attn else nn.Identity() for _ in range(n_blocks))
        if resample:
            setattr(self, resample, Resample(c_out, up=resample == "upsample"))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return getattr(self, self.resample)(x) if self.resample else x


class Middle(nn.Module):
    """The coarsest resolution."""

    def __init__(self, c: int):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResnetBlock(c, c), AttnBlock(c), ResnetBlock(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images [b, 3, H, W] -> [b, z_channels, y, x]."""

    def __init__(self, cfg: VQGANConfig):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = _conv(cfg.in_channels, cfg.ch, 3)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([cfg.ch, *widths], widths, strict=False)):
            resample = "downsample" if i < len(widths) - 1 else None
            with_attn = cfg.resolution >> i in cfg.attn_resolutions
            self.down.append(Level(c_in, c_out, cfg.num_res_blocks, with_attn, resample))
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), _conv(widths[-1], cfg.z_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[b, z_channels, y, x] -> images [b, 3, H, W]; `up` is indexed by level, so it runs backwards."""

    def __init__(self, cfg: VQGANConfig):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = _conv(cfg.z_channels, widths[-1], 3)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            with_attn = cfg.resolution >> i in cfg.attn_resolutions
            self.up.append(Level(c_in, c_out, cfg.num_res_blocks + 1, with_attn, "upsample" if i > 0 else None))
        self.norm_out, self.conv_out = _norm(widths[0]), _conv(widths[0], cfg.out_ch, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """Images <-> codes in [0, n_embed), flattened row by row."""

    def __init__(self, cfg: VQGANConfig):
        super().__init__()
        if cfg.double_z:
            raise ValueError("double_z=True is not in the specification; use False")
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(cfg.n_embed, cfg.embed_dim)
        nn.init.uniform_(self.quantize.embedding.weight, -1 / cfg.n_embed, 1 / cfg.n_embed)
        self.quant_conv = _conv(cfg.z_channels, cfg.embed_dim, 1)
        self.post_quant_conv = _conv(cfg.embed_dim, cfg.z_channels, 1)

    def features(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W] in [-1, 1] -> [b, z, y, x] before quantisation."""
        return self.quant_conv(self.encoder(images))

    def nearest(self, features: Tensor) -> Tensor:
        """features [b, z, y, x] -> codes [b, y * x] of the closest codebook rows (squared Euclidean distance)."""
        points = features.flatten(2).transpose(1, 2)  # [b, y * x, z]
        rows = self.quantize.embedding.weight  # [n, z]
        distance = points.pow(2).sum(-1, keepdim=True) + rows.pow(2).sum(-1) - 2 * points @ rows.T  # [b, y * x, n]
        return distance.argmin(dim=-1)

    def codes(self, images: Tensor) -> Tensor:
        """images [b, 3, H, W] in [-1, 1] -> codes [b, y * x]."""
        return self.nearest(self.features(images))

    def decode(self, codes: Tensor) -> Tensor:
        """codes [b, y, x], or [b, y * x] of a square grid -> images [b, 3, H, W], about [-1, 1]."""
        if codes.ndim == 2:
            codes = codes.unflatten(1, (math.isqrt(codes.shape[1]), -1))
        return self.decoder(self.post_quant_conv(self.quantize.embedding(codes).permute(0, 3, 1, 2)))

    def pixels(self, codes: Tensor) -> Tensor:
        """Decoded codes as [b, 3, H, W] in [0, 1]."""
        return (self.decode(codes) * 0.5 + 0.5).clamp(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruction [b, 3, H, W] of images [b, 3, H, W]."""
        return self.decode(self.codes(images))
