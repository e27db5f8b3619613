"""The process belongs to its user: whatever it has set for JAX, models load, sample and rank the same bits."""

import contextlib
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mindalle_jax import ClipRanker, Dalle
from mindalle_jax.runtime.devices import pinned, pinned_steps

SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "transfer guard": lambda: jax.transfer_guard("disallow"),
    "debug flags": lambda: _all(jax.debug_nans(True), jax.debug_infs(True), jax.debug_key_reuse(True)),
    "no jit": lambda: jax.disable_jit(True),
    "matmul precision": lambda: jax.default_matmul_precision("bfloat16"),
    "other noise": lambda: jax.threefry_partitionable(False),
}


@contextlib.contextmanager
def _all(*options):
    with contextlib.ExitStack() as stack:
        for option in options:
            stack.enter_context(option)
        yield


def results(model_folder: Path, clip_folder: Path) -> str:
    """A digest of all that a model and a ranker give, from loading on."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    dalle, ranker = Dalle.from_pretrained(model_folder, mesh=mesh), ClipRanker.from_pretrained(clip_folder, mesh=mesh)
    options = {"num_candidates": 3, "batch_size": 4, "seed": 1, "ranker": ranker}
    made = [dalle.generate("the cat", **options), dalle.generate(["the", "dog"], mixed_batches=True, **options)]
    *_, last = dalle.stream("the cat", every=32, guidance_scale=2.0, **options)
    codes = dalle.encode_images(last.images)
    logits = dalle.logits(dalle.tokenize("the cat"), last.codes[:1])
    arrays = [array for one in [*made, last] for array in (one.images, one.codes, one.scores)]
    arrays += [codes, dalle.decode_codes(codes), ranker.encode_text("the cat"), *map(np.asarray, logits)]
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


@pytest.fixture(scope="module")
def plain(tiny_model_folder, tiny_clip_folder) -> str:
    return results(tiny_model_folder, tiny_clip_folder)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_bits_whatever_the_process_has_set(plain, tiny_model_folder, tiny_clip_folder, setting):
    """By themselves: float64, a traceback from inside a network, hours without compilation, or other images."""
    with SETTINGS[setting]():
        assert results(tiny_model_folder, tiny_clip_folder) == plain


def test_the_same_bits_in_a_process_with_everything_set(plain, tiny_model_folder, tiny_clip_folder):
    """As environment variables, with a JAX that was used before."""
    code = f"""
import jax, jax.numpy as jnp
jnp.ones(3).sum()
import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}
from test_process_settings import results
print(results({str(tiny_model_folder)!r}, {str(tiny_clip_folder)!r}))
"""
    variables = {
        "JAX_ENABLE_X64": "1",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_TRANSFER_GUARD": "log",  # jnp.ones above, the user's own, is a transfer
        "JAX_DEBUG_NANS": "1",
        "JAX_DISABLE_JIT": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == plain


def test_settings_come_back():
    """Also after an error, and between the items of a generator."""
    before = jax.config.jax_enable_x64, jax.config.jax_threefry_partitionable
    with pytest.raises(ValueError), pinned():
        raise ValueError
    with jax.enable_x64(True):
        seen = []

        def items():
            seen.append(jax.config.jax_enable_x64)
            yield 1
            seen.append(jax.config.jax_enable_x64)

        for _ in pinned_steps(items()):
            assert jax.config.jax_enable_x64
    assert seen == [False, False]
    assert (jax.config.jax_enable_x64, jax.config.jax_threefry_partitionable) == before


def test_a_ranker_of_ones_own_has_the_settings_of_the_process(tiny_dalle):
    """It is the user's code; so is a callback."""
    seen = []

    class Own:
        def scores(self, prompt, images):
            seen.append(jax.config.jax_enable_x64)
            return np.zeros(len(images), np.float32)

    with jax.enable_x64(True):
        tiny_dalle.generate(
            "the cat", num_candidates=1, ranker=Own(), callback=lambda _: seen.append(jax.config.jax_enable_x64)
        )
    assert seen == [True] * 9


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_a_platform_that_is_not_there_is_one_line(platform):
    """JAX_PLATFORMS of another machine, left in a profile: a traceback of a hundred lines by itself."""
    command = [sys.executable, "-m", "mindalle_jax", "sample", "a cat", "--warmup"]
    environment = os.environ | {"JAX_PLATFORMS": platform, "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert line.startswith(f"mindalle sample: JAX_PLATFORMS={platform}: ") and "unset it, or set it to cpu" in line
