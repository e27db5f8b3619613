"""Holds the torch oracle against arrays of the original implementation, so that comparing with it means something."""

import json

import numpy as np
import pytest
import yaml

torch = pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")

import torch_oracle as oracle  # noqa: E402  (imports torch, so it comes after the skip)

SMALL = oracle.TransformerConfig(
    embed_dim=32, n_layers=2, n_heads=4, ctx_len_txt=5, ctx_len_img=16, vocab_txt=60, vocab_img=40
)
SMALL_VQGAN = oracle.VQGANConfig(
    embed_dim=16,
    n_embed=40,
    z_channels=24,
    resolution=16,
    ch=32,
    ch_mult=(1, 2, 1),
    num_res_blocks=1,
    attn_resolutions=(4, 8),
)


def read_arrays(path):
    """The reference arrays of a file as tensors, ids as int64."""
    with np.load(path) as file:
        tensors = {key: torch.from_numpy(file[key]) for key in file.files}
    return {key: value.long() if value.dtype == torch.int32 else value for key, value in tensors.items()}


def load(module, path):
    """Strict: the keys of the checkpoint and of the oracle are the same."""
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    return module.eval()


def largest_difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Thousands of tiny operations: on a busy machine waiting for a second thread costs up to 40 times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def arrays(golden):
    return read_arrays(golden / "golden.npz")


@pytest.fixture(scope="module")
def igpt_arrays(golden):
    return read_arrays(golden / "golden_igpt.npz")


@pytest.fixture(scope="module")
def configs(golden):
    return oracle.configs_from_dict(yaml.safe_load((golden / "model/config.yaml").read_text()))


@pytest.fixture(scope="module")
def transformer(golden, configs):
    return load(oracle.Transformer(configs[0]), golden / "model/stage2_last.ckpt")


@pytest.fixture(scope="module")
def vqgan(golden, configs):
    return load(oracle.VQGAN(configs[1]), golden / "model/stage1_last.ckpt")


def image_transformer(golden, kind):
    cfg, _ = oracle.configs_from_dict(yaml.safe_load((golden / f"igpt_{kind}.yaml").read_text()))
    return load(oracle.ImageTransformer(cfg), golden / f"igpt_{kind}_init.ckpt")


# ---------------------------------------- text to image


@torch.inference_mode()
def test_logits_and_losses_are_the_originals(arrays, transformer):
    image_logits, text_logits = transformer(arrays["s2_txt"], arrays["s2_img"])
    assert largest_difference(image_logits, arrays["s2_logits_img"]) < 1e-4
    assert largest_difference(text_logits, arrays["s2_logits_txt"]) < 1e-4
    total, image, text = oracle.losses(image_logits, arrays["s2_img"], text_logits, arrays["s2_txt"])
    assert image.item() == pytest.approx(arrays["s2_loss_img"].item(), abs=1e-4)
    assert text.item() == pytest.approx(arrays["s2_loss_txt"].item(), abs=1e-4)
    assert total.item() == pytest.approx(image.item() + text.item() / 8, abs=1e-6)


@pytest.mark.parametrize("decoder", [oracle.ConcatCacheDecoder, oracle.PreallocatedCacheDecoder])
def test_cached_decoding_is_the_originals(arrays, transformer, decoder):
    decoder, expected = decoder(transformer), arrays["s2_cached_logits"]  # expected [3, 24, 128]
    logits = [decoder.prefill(arrays["s2_txt"])]
    logits += [decoder.step(arrays["s2_img"][:, t]) for t in range(expected.shape[1] - 1)]
    assert largest_difference(torch.stack(logits, dim=1), expected) < 1e-4
    assert torch.equal(decoder.greedy(arrays["s2_txt"]), arrays["s2_greedy"])
    with pytest.raises(ValueError, match="prefill"):
        for _ in range(2):  # greedy leaves the last position free
            decoder.step(arrays["s2_greedy"][:, -1])


def test_greedy_without_a_cache_is_the_originals(arrays, transformer):
    codes = oracle.greedy(lambda codes: transformer(arrays["s2_txt"], codes)[0], 3, 64)
    assert torch.equal(codes, arrays["s2_greedy"][:, :64])


@pytest.mark.parametrize("case", range(7))
def test_filters_are_the_originals(arrays, case):
    top_k, top_p, temperature = arrays[f"flt_{case}_args"].tolist()
    probs = oracle.filter_probs(arrays["flt_logits"], temperature, int(top_k) or None, top_p or None)
    expected = arrays[f"flt_{case}"]
    if case in (3, 4):  # the original's sort chose among the ten-way ties of row 4 by chance
        probs[4], expected = probs[4].sort().values, expected.clone()
        expected[4] = expected[4].sort().values
    assert largest_difference(probs, expected) < 1e-6


# ---------------------------------------- VQGAN


@torch.inference_mode()
def test_vqgan_is_the_originals(arrays, vqgan):
    features = vqgan.features(arrays["vq_x"])
    assert largest_difference(features, arrays["vq_h"]) < 1e-4
    assert torch.equal(vqgan.nearest(features), arrays["vq_codes"])
    assert torch.equal(vqgan.codes(arrays["vq_x"]), arrays["vq_codes"])
    assert largest_difference(vqgan(arrays["vq_x"]), arrays["vq_rec"]) < 1e-4
    assert largest_difference(vqgan.decode(arrays["vq_dec_codes"]), arrays["vq_dec"]) < 1e-4
    assert largest_difference(vqgan.pixels(arrays["vq_dec_codes"]), arrays["pixels"]) < 1e-4


# ---------------------------------------- image only


@pytest.mark.parametrize("kind", ["cls", "uncond"])
@torch.inference_mode()
def test_image_only_model_is_the_originals(golden, igpt_arrays, vqgan, kind):
    model, codes = image_transformer(golden, kind), igpt_arrays[f"{kind}_codes"]
    assert torch.equal(vqgan.codes(igpt_arrays[f"{kind}_x"]), codes)
    logits = model(codes, igpt_arrays.get(f"{kind}_labels"))
    assert largest_difference(logits, igpt_arrays[f"{kind}_logits"]) < 1e-4
    labels = torch.full((2,), 3) if kind == "cls" else None
    assert torch.equal(oracle.greedy(lambda codes: model(codes, labels), 2, 256), igpt_arrays[f"{kind}_greedy"])


@pytest.mark.parametrize("kind", ["cls", "uncond"])
def test_eight_training_steps_are_the_originals(golden, igpt_arrays, kind):
    """Two micro-batches averaged, clipped by global norm, AdamW, cosine stepped once an update."""
    settings = yaml.safe_load((golden / f"igpt_{kind}.yaml").read_text())["optimizer"]
    model, codes = image_transformer(golden, kind).train(), igpt_arrays[f"{kind}_codes"]
    labels = igpt_arrays.get(f"{kind}_labels", torch.zeros(4, dtype=torch.long))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["base_lr"],
        betas=settings["betas"],
        weight_decay=settings["weight_decay"],
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=0.0)
    for step in range(8):
        optimizer.zero_grad()
        loss = 0.0
        for rows in (slice(0, 2), slice(2, 4)):
            micro = oracle.losses(model(codes[rows], labels[rows]), codes[rows])[0] / 2
            micro.backward()
            loss += micro.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip_norm"])
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        assert loss == pytest.approx(igpt_arrays[f"{kind}_train_loss"][step].item(), abs=1e-4)
        assert norm.item() == pytest.approx(igpt_arrays[f"{kind}_train_gnorm"][step].item(), abs=1e-4)
        assert lr == pytest.approx(igpt_arrays[f"{kind}_train_lr"][step].item(), rel=1e-9)
    sos = model.sos.weight if kind == "cls" else model.sos
    assert largest_difference(sos, igpt_arrays[f"{kind}_after_sos"]) < 1e-4
    assert largest_difference(model.head.weight[0], igpt_arrays[f"{kind}_after_head_row0"]) < 1e-4


# ---------------------------------------- without the reference arrays


def test_the_decoders_agree_with_the_forward_pass_and_sample_alike():
    torch.manual_seed(0)
    model = oracle.randomize(oracle.Transformer(SMALL), 0).eval()
    text, codes = torch.randint(60, (3, 5)), torch.randint(40, (3, 16))
    with torch.inference_mode():
        expected = model(text, codes)[0]  # [3, 16, 40]
    drawn = []
    for decoder in (oracle.ConcatCacheDecoder(model), oracle.PreallocatedCacheDecoder(model)):
        logits = [decoder.prefill(text), *(decoder.step(codes[:, t]) for t in range(15))]
        assert largest_difference(torch.stack(logits, dim=1), expected) < 1e-5
        drawn.append(decoder.sample(text[0], 4, 8, torch.Generator().manual_seed(1), max_steps=12))
    assert drawn[0].shape == (4, 12)
    assert torch.equal(*drawn)


def test_top_p_keeps_the_lower_id_among_equals():
    logits = torch.tensor([0.2, 0.4, 0.2, 0.2]).log()
    probs = oracle.filter_probs(logits, top_p=0.5)
    assert torch.allclose(probs, torch.tensor([1 / 3, 2 / 3, 0.0, 0.0]))
    assert (oracle.filter_probs(logits, top_k=2) > 0).all()  # ties of the second largest stay


def test_pad_targets_do_not_count():
    logits, ids = torch.randn(2, 4, 60), torch.tensor([[3, 4, 5, 1, 1], [6, 1, 1, 1, 1]])
    image = torch.randn(2, 16, 40), torch.randint(40, (2, 16))
    text = oracle.losses(*image, logits, ids, pad_id=1)[2]
    kept = torch.nn.functional.cross_entropy(logits[0, :2], ids[0, 1:3])  # the only two targets that are not PAD
    assert text.item() == pytest.approx(kept.item(), abs=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: oracle.Transformer(SMALL),
        lambda: oracle.ImageTransformer(SMALL),
        lambda: oracle.VQGAN(SMALL_VQGAN),
    ],
    ids=["transformer", "image_transformer", "vqgan"],
)
def test_randomize_moves_every_element_and_repeats(make):
    before, a, b = make(), oracle.randomize(make(), 7), oracle.randomize(make(), 7)
    for (name, old), new, again in zip(before.named_parameters(), a.parameters(), b.parameters(), strict=True):
        assert (old != new).all(), name
        assert torch.equal(new, again), name


@torch.inference_mode()
def test_vqgan_shapes_follow_the_configuration():
    torch.manual_seed(0)
    vqgan = oracle.randomize(oracle.VQGAN(SMALL_VQGAN), 0).eval()
    codes = vqgan.codes(torch.randn(2, 3, 16, 16))
    assert codes.shape == (2, 16)
    assert codes.unique().numel() > 4  # a random codebook is used, not one row of it
    assert vqgan.decode(codes).shape == (2, 3, 16, 16)
    keys = vqgan.state_dict()
    assert "encoder.down.1.attn.0.q.weight" in keys and "encoder.down.2.attn.0.q.weight" in keys
    assert "encoder.down.0.attn.0.q.weight" not in keys and "decoder.up.0.upsample.conv.weight" not in keys


def test_checkpoint_folder_reads_back(tmp_path):
    vocab, merges = oracle.demo_vocabulary()
    transformer, vqgan = oracle.Transformer(SMALL), oracle.VQGAN(SMALL_VQGAN)
    oracle.save_checkpoint_folder(
        tmp_path / "m", oracle.config_dict(SMALL, SMALL_VQGAN), vqgan, transformer, vocab, merges
    )
    config = yaml.safe_load((tmp_path / "m/config.yaml").read_text())
    assert oracle.configs_from_dict(config) == (SMALL, SMALL_VQGAN)
    assert json.loads((tmp_path / "m/tokenizer/bpe-16k-vocab.json").read_text(encoding="utf-8")) == vocab
    for name, module in (("stage1_last.ckpt", vqgan), ("stage2_last.ckpt", transformer)):
        state = torch.load(tmp_path / "m" / name, weights_only=True)["state_dict"]
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_the_released_sizes_have_the_published_parameter_counts():
    with torch.device("meta"):
        transformer, vqgan = oracle.Transformer(oracle.TransformerConfig()), oracle.VQGAN(oracle.VQGANConfig())
    assert sum(p.numel() for p in transformer.parameters()) == 1_291_081_728
    assert sum(p.numel() for p in vqgan.parameters()) == 76_073_859
