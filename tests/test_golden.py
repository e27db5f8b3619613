"""The port against arrays of the original implementation, in float32 and through the public API where it reaches.

Tolerances: 1e-4 absolute for logits, features and pixels, and 1e-6 for probabilities. Two correct float32 programs
differ because they add in another order: by 1e-6 in logits, 4e-6 in features, 1e-5 in pixels and 1e-7 in probabilities,
measured; the smallest slip tried, the tanh form of GELU, moves logits by 4e-4. Ids, codes and greedy samples are equal.
"""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindalle_jax import Dalle, ImageGPT
from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.sampling.filters import filter_logits
from mindalle_jax.sampling.generate import request_rows
from mindalle_jax.sampling.options import SamplingOptions

CODES_TOLERANCE, PROBABILITY_TOLERANCE = 1e-4, 1e-6


def close(actual, expected, tolerance=CODES_TOLERANCE):
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def channels_last(images):
    return np.moveaxis(images, 1, -1)


def host(params):
    return jax.tree.map(np.asarray, params)


def mean_cross_entropy(logits, ids):
    log_probs = jax.nn.log_softmax(jnp.asarray(logits), axis=-1)
    return -np.take_along_axis(np.asarray(log_probs), np.asarray(ids)[..., None], axis=-1).mean()


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "golden.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def prompts(golden):
    return json.loads((golden / "prompts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dalle(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "model"
    import_checkpoint(golden / "model", folder)
    return Dalle.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module", params=["cls", "uncond"])
def igpt(golden, request, tmp_path_factory):
    """Each image-only variant: its model and its arrays, without the name in front."""
    kind = request.param
    source = tmp_path_factory.mktemp("golden") / kind
    source.mkdir()
    shutil.copy(golden / f"igpt_{kind}.yaml", source / "config.yaml")
    shutil.copy(golden / "model" / "stage1_last.ckpt", source)
    shutil.copy(golden / f"igpt_{kind}_init.ckpt", source / "stage2_last.ckpt")
    import_checkpoint(source, source.parent / "converted")
    with np.load(golden / "golden_igpt.npz") as file:
        arrays = {key.removeprefix(f"{kind}_"): file[key] for key in file.files if key.startswith(kind)}
    model = ImageGPT.from_pretrained(source.parent / "converted", dtype="float32")
    return SimpleNamespace(kind=kind, model=model, arrays=arrays)


# ---------------------------------------- tokenizer


def test_token_ids_are_the_originals(dalle, arrays, prompts):
    """Mixed case, empty, CJK and emoji, over-long, punctuation; what is cut or unknown is also said."""
    with pytest.warns(UserWarning) as warned:
        ids = dalle.tokenize(prompts)
    np.testing.assert_array_equal(ids, arrays["tok_ids"])
    assert [str(w.message).partition(" has ")[0][:4] for w in warned] == ["'x x"]


# ---------------------------------------- text-to-image transformer


def test_logits_and_losses_are_the_originals(dalle, arrays):
    """A swapped query and key, a bias left out, a shifted position, or the wrong GELU."""
    image_logits, text_logits = dalle.logits(arrays["s2_txt"], arrays["s2_img"])
    close(image_logits, arrays["s2_logits_img"])
    close(text_logits, arrays["s2_logits_txt"])
    assert mean_cross_entropy(image_logits, arrays["s2_img"]) == pytest.approx(arrays["s2_loss_img"], abs=1e-4)
    assert mean_cross_entropy(text_logits, arrays["s2_txt"][:, 1:]) == pytest.approx(arrays["s2_loss_txt"], abs=1e-4)


def test_cached_logits_are_the_originals(dalle, arrays):
    """24 positions by prefill and steps, teacher-forced: code t must enter at position t of pos_emb_img."""
    model, params, expected = dalle._transformer, host(dalle._stage2), arrays["s2_cached_logits"]

    @jax.jit
    def decode(params, text_ids, codes):
        variables = {"params": params}
        logits, prefix, _ = model.apply(variables, text_ids, codes[:0], 0, method="prefill")

        def step(cache, at):
            code, t = at
            logits, cache = model.apply(variables, code[None, None], t, prefix, cache, method="step")
            return cache, logits[0, 0]

        steps = (codes, jnp.arange(len(codes)))
        _, rest = jax.lax.scan(step, model.new_cache(1), steps)
        return jnp.concatenate([logits[None], rest])

    with jax.default_matmul_precision("highest"):
        for text_ids, codes, logits in zip(arrays["s2_txt"], arrays["s2_img"], expected, strict=True):
            close(decode(params, text_ids, codes[: len(logits) - 1]), logits)


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"temperature": 0}], ids=["top_k=1", "temperature=0"])
def test_greedy_codes_are_the_originals(dalle, arrays, prompts, settings):
    """All 256 codes of three prompts: one slip anywhere in sampling, and the rest of the picture differs."""
    chosen = [prompts[i] for i in (0, 1, 5)]
    np.testing.assert_array_equal(dalle.tokenize(chosen), arrays["s2_txt"])
    codes = dalle.generate_codes(chosen, num_candidates=2, batch_size=2, **settings)
    for candidate in range(2):
        np.testing.assert_array_equal(codes[:, candidate], arrays["s2_greedy"])


# ---------------------------------------- filters


@pytest.mark.parametrize("case", range(7))
def test_filtered_probabilities_are_the_originals(arrays, case):
    """Row 4 has ten-way ties. In cases 3 and 4 the original's unstable sort chose among them: compared sorted there."""
    top_k, top_p, temperature = arrays[f"flt_{case}_args"].tolist()
    logits, expected = arrays["flt_logits"], arrays[f"flt_{case}"].copy()
    options = SamplingOptions.of(temperature=temperature, top_k=int(top_k) or None, top_p=top_p or None)
    options = dataclasses.replace(options, num_candidates=len(logits), prompts=("",)).check()
    rows = request_rows(options, np.zeros((1, 1), np.int32), logits.shape[1], 1).rows
    probs = np.array(jax.nn.softmax(filter_logits(jnp.asarray(logits), rows)))
    if case in (3, 4):
        probs[4].sort()
        expected[4].sort()
    np.testing.assert_array_equal(probs > 0, expected > 0)
    close(probs, expected, PROBABILITY_TOLERANCE)


# ---------------------------------------- VQGAN


def test_vqgan_is_the_originals(dalle, arrays):
    """Features, codes and reconstruction of pictures: padding on the wrong side of a downsampling shows first."""

    @jax.jit
    def run(params, images, codes):  # one program, because compiling is what takes the time
        def apply(x, method):
            return dalle._codec.encoder.apply({"params": params}, x, method=method)

        own_codes = apply(images, "encode")
        pictures = apply(jnp.concatenate([own_codes, codes]), "decode")
        return apply(images, "features"), own_codes, pictures

    with jax.default_matmul_precision("highest"):
        images = channels_last(arrays["vq_x"])
        features, codes, pictures = run(host(dalle._codec.params), images, arrays["vq_dec_codes"])
    close(features, channels_last(arrays["vq_h"]))
    np.testing.assert_array_equal(np.asarray(codes).reshape(2, -1), arrays["vq_codes"])
    close(pictures, channels_last(np.concatenate([arrays["vq_rec"], arrays["vq_dec"]])))


def test_encode_images_gives_the_originals_codes(dalle, arrays):
    """Pictures in [0, 1] are scaled to [-1, 1], once."""
    codes = dalle.encode_images(channels_last(arrays["vq_x"]) * 0.5 + 0.5)
    np.testing.assert_array_equal(codes.reshape(2, -1), arrays["vq_codes"])


def test_pixels_are_the_originals(dalle, arrays):
    """decode_codes scales and clips to [0, 1]; flat codes and a grid of codes are the same picture."""
    pixels = dalle.decode_codes(arrays["vq_dec_codes"])
    close(pixels, channels_last(arrays["pixels"]))
    np.testing.assert_array_equal(dalle.decode_codes(arrays["vq_dec_codes"].reshape(2, -1)), pixels)


# ---------------------------------------- image-only transformers


def test_image_only_codes_and_logits_are_the_originals(igpt):
    """The start vector gets no positional embedding; code t gets position t."""
    a, images = igpt.arrays, channels_last(igpt.arrays["x"]) * 0.5 + 0.5
    np.testing.assert_array_equal(igpt.model.encode_images(images).reshape(4, -1), a["codes"])
    close(igpt.model.logits(a["codes"], a["labels"] if igpt.kind == "cls" else None), a["logits"])


def test_image_only_greedy_codes_are_the_originals(igpt):
    """Two samples at top_k = 1; class 3 of the class-conditional model."""
    class_id = 3 if igpt.kind == "cls" else None
    generation = igpt.model.generate(class_id, num_candidates=2, top_k=1, batch_size=2)
    np.testing.assert_array_equal(generation.codes, igpt.arrays["greedy"])
