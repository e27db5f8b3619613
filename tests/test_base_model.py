"""Model: loading, what is kept of a folder, rankers by name, threads, and models made in memory."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from mindalle_jax import ClipRanker, Dalle, Generation, ImageGPT
from mindalle_jax.config.file import dump_config, parse_config
from mindalle_jax.errors import CheckpointError, ConfigError, UsageError
from mindalle_jax.storage.weights import MANIFEST, count_parameters, leaf_shapes, nest
from mindalle_jax.text.known_words import KnownWords

BATCH = 4  # one compiled size


@pytest.fixture
def copied(tiny_model_folder, tmp_path):
    """A copy of the converted model that may be changed."""
    return shutil.copytree(tiny_model_folder, tmp_path / "copy")


# ---------------------------------------- loading


def test_dtype_must_be_known(tiny_model_folder):
    with pytest.raises(UsageError, match="dtype must be 'bfloat16', 'float32' or None, not 'float16'"):
        Dalle.from_pretrained(tiny_model_folder, dtype="float16")  # type: ignore[arg-type]


def test_mesh_must_have_the_axis_data(tiny_model_folder):
    for shape, names in [((8,), ("batch",)), ((4, 2), ("data", "tensor"))]:
        with pytest.raises(UsageError, match="mesh must have the one axis 'data', not"):
            Dalle.from_pretrained(tiny_model_folder, mesh=jax.make_mesh(shape, names))


def test_the_axes_of_the_mesh_are_auto(tiny_model_folder, tiny_dalle):
    """jax.make_mesh gives explicit ones, with which weights do not go into a jitted function of somebody else."""
    explicit = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    for dalle in (tiny_dalle, Dalle.from_pretrained(tiny_model_folder, mesh=explicit)):
        assert dalle.mesh.axis_types == (jax.sharding.AxisType.Auto,)


def test_eight_devices_give_the_same_api(tiny_model_folder, tiny_dalle, tiny_images):
    """Padding of the last chunk is cut off again; weights lie on every device."""
    dalle = Dalle.from_pretrained(tiny_model_folder, mesh=jax.make_mesh((8,), ("data",)))
    assert all(len(leaf.devices()) == 8 for leaf in jax.tree.leaves(dalle._stage2))
    codes = np.random.default_rng(1).integers(0, 80, (11, 64))
    decoded = dalle.decode_codes(codes)
    np.testing.assert_array_equal(decoded[:3], dalle.decode_codes(codes[:3]))
    # Another compiled program than on one device: last bits may differ.
    np.testing.assert_allclose(decoded, tiny_dalle.decode_codes(codes), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(dalle.encode_images(tiny_images), tiny_dalle.encode_images(tiny_images))
    ids = dalle.tokenize("the cat")
    for a, b in zip(dalle.logits(ids, codes[:1]), tiny_dalle.logits(ids, codes[:1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_bfloat16(tiny_model_folder, tiny_dalle):
    """The compute dtype reaches the weights of stage 2 and the meta; codes of pictures stay those of float32."""
    dalle = Dalle.from_pretrained(tiny_model_folder, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(dalle._stage2)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(dalle._codec.params)} == {"float32"}
    generation = dalle.generate("the cat", num_candidates=3)
    assert generation.meta["dtype"] == "bfloat16"
    np.testing.assert_array_equal(dalle.encode_images(generation.images), tiny_dalle.encode_images(generation.images))
    exact = tiny_dalle.decode_codes(generation.codes)
    # 8 bits a value, about 30 roundings on the way: sqrt(30) * 2**-9 = 0.01 of [-1, 1], half of that in [0, 1].
    assert 1e-4 < np.sqrt(np.mean((dalle.decode_codes(generation.codes) - exact) ** 2)) < 0.01


@pytest.mark.parametrize(("dtype", "bytes_a_weight"), [("float32", 4), ("bfloat16", 2)])
def test_weights_are_held_once(tiny_model_folder, tiny_config, dtype, bytes_a_weight):
    """A second layout, or a float32 copy beside bfloat16, would double 2.6 GB. What was loaded is also let go."""

    def live_bytes() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    before = live_bytes()
    dalle = Dalle.from_pretrained(tiny_model_folder, dtype=dtype, mesh=jax.sharding.Mesh(jax.devices()[:1], ("data",)))
    stage1, stage2 = (count_parameters(tiny_config, stage) for stage in ("stage1", "stage2"))
    assert live_bytes() - before == 4 * stage1 + bytes_a_weight * stage2
    dalle.logits(dalle.tokenize("the cat"), np.zeros((1, 4), int))
    dalle.generate_codes("the cat", num_candidates=3)
    assert live_bytes() - before < 4 * stage1 + bytes_a_weight * stage2 + 10_000  # scalars and keys that JAX keeps
    del dalle
    assert live_bytes() - before < 10_000


@pytest.fixture
def conversions(cache_folder):
    """conversions(name): what was converted on the fly from a folder of that name, {folder: when its manifest was}."""

    def find(name: str) -> dict:
        folders = (cache_folder / "converted").glob(f"{name}-*")
        return {folder: (folder / MANIFEST).stat().st_mtime_ns for folder in folders}

    return find


def test_an_original_folder_is_converted_once(tiny_folder, tiny_dalle, tmp_path, conversions):
    """Into the cache, not beside it; 5 GB are not written at every start, but again when the source has changed."""
    source = shutil.copytree(tiny_folder, tmp_path / "downloaded")
    files = sorted(source.rglob("*"))
    first = Dalle.from_pretrained(source)
    done = conversions("downloaded")
    assert list(done) == [first.folder]
    codes = first.generate_codes("the cat", num_candidates=3)
    np.testing.assert_array_equal(codes, tiny_dalle.generate_codes("the cat", num_candidates=3))
    second = Dalle.from_pretrained(str(source))
    with contextlib.chdir(tmp_path):  # the same folder by another name
        third = Dalle.from_pretrained("downloaded")
    assert second.folder == third.folder == first.folder
    assert conversions("downloaded") == done
    assert sorted(source.rglob("*")) == files
    config = (source / "config.yaml").read_text(encoding="utf-8")
    (source / "config.yaml").write_text(config + "\n# changed\n", encoding="utf-8")
    assert Dalle.from_pretrained(source).folder != first.folder
    assert len(conversions("downloaded")) == 2


def test_a_converted_folder_is_taken_as_it_is(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MINDALLE_CACHE", str(tmp_path))
    assert Dalle.from_pretrained(tiny_model_folder).folder == tiny_model_folder
    assert Dalle.from_pretrained(str(tiny_model_folder)).folder == tiny_model_folder
    assert not (tmp_path / "converted").exists()


def test_a_failed_conversion_leaves_nothing_in_the_cache(tiny_folder, tmp_path, cache_folder):
    """Or the next start would take half a model for a whole one."""
    source = shutil.copytree(tiny_folder, tmp_path / "cut-short")
    data = (source / "stage2_last.ckpt").read_bytes()
    (source / "stage2_last.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="stage2_last.ckpt"):
        Dalle.from_pretrained(source)
    assert not [path for path in (cache_folder / "converted").glob("*") if "cut-short" in path.name]


@pytest.mark.parametrize("name", ["no/such/model", "minDALL-E"])
def test_an_unknown_name_tells_the_known_ones(name):
    with pytest.raises(CheckpointError, match=f"{name}: no such folder, .*minDALL-E/1.3B"):
        Dalle.from_pretrained(name)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises((CheckpointError, ConfigError), match=str(tmp_path)):
        Dalle.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_the_config_are_refused(copied):
    """All differences at once, not a shape error from inside a matrix product."""
    path = copied / "config.yaml"
    path.write_text(path.read_text().replace("n_layers: 2", "n_layers: 3"))
    with pytest.raises(CheckpointError) as raised:
        Dalle.from_pretrained(copied)
    assert str(copied) in str(raised.value) and "blocks/qkv" in str(raised.value)


def test_a_damaged_weight_is_named(copied):
    """One flipped bit: the CRC of its tensor is wrong."""
    data = bytearray((copied / "stage2.safetensors").read_bytes())
    data[-100] ^= 4
    (copied / "stage2.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: CRC-32"):
        Dalle.from_pretrained(copied)


def test_a_model_loads_without_a_warning(copied):
    """And reads only: the folder is as it was."""
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Dalle.from_pretrained(copied)
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before
    assert (copied / MANIFEST).is_file()


# ---------------------------------------- models made in memory


def test_the_wrong_kind_of_model_is_told_in_memory(tiny_dalle, tiny_igpt_config):
    params = {"stage1": tiny_dalle._codec.params, "stage2": tiny_dalle._stage2}
    with pytest.raises(CheckpointError, match="a text-to-image model; make it with Dalle"):
        ImageGPT(tiny_dalle.config, params)
    with pytest.raises(CheckpointError, match="an image-only model; make it with ImageGPT"):
        Dalle(tiny_igpt_config, params, tiny_dalle.tokenizer)


LARGER = ["stage2.hparams.embed_dim=512", "stage2.hparams.n_layers=16"]  # 205 MB of float32

MEMORY = """
import re, sys
from mindalle_jax import Dalle

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

Dalle.from_pretrained("demo")
before = peak()
model = Dalle.from_pretrained(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_loading_takes_the_memory_of_the_weights(tmp_path, tiny_dalle):
    """In a process of its own: what is mapped from disk counts too, so twice the weights, and a layer besides."""
    config = parse_config(dump_config(tiny_dalle.config), LARGER)
    rng = np.random.default_rng(0)
    stages = {}
    for stage in ("stage1", "stage2"):
        shapes = leaf_shapes(config, stage)
        stages[stage] = nest({name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()})
    made = Dalle(config, stages, tiny_dalle.tokenizer, mesh=tiny_dalle.mesh)
    made.save_pretrained(tmp_path / "larger")
    weights = sum(file.stat().st_size for file in (tmp_path / "larger").glob("*.safetensors"))
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "larger")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    grown = 1024 * int(done.stdout)
    assert weights > 200e6
    assert 0.9 * weights < grown < 2.3 * weights


# ---------------------------------------- names, and what lies beside the weights


@pytest.fixture(scope="module")
def ranked_folder(tmp_path_factory, tiny_model_folder, tiny_clip_folder) -> Path:
    """The tiny model with a ranker and a list of words, made for a folder named `ranked`."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path_factory.mktemp("models") / "ranked"))
    shutil.copytree(tiny_clip_folder, folder / "ranker")
    KnownWords(frozenset(["the", "cat"]), "draws cats", ("the cat",)).save(folder / "tokenizer")
    return folder


def test_a_relative_folder_survives_a_change_of_directory(ranked_folder, tmp_path):
    """Its ranker is loaded when it is first asked for, and saving copies from it."""
    with contextlib.chdir(ranked_folder.parent):
        model = Dalle.from_pretrained("ranked")
    with contextlib.chdir(tmp_path):
        generation = model("the cat", num_candidates=2)
        model.save_pretrained("copy")
    assert generation.meta["ranker"] == f"CLIP {ranked_folder}/ranker" and model.folder == ranked_folder
    assert (tmp_path / "copy" / "manifest.json").is_file()


def test_a_saved_model_keeps_its_ranker_and_its_words(ranked_folder, tmp_path):
    Dalle.from_pretrained(ranked_folder).save_pretrained(tmp_path / "copy")
    names = [path.relative_to(ranked_folder) for path in ranked_folder.rglob("*") if path.is_file()]
    assert {"ranker/model.safetensors", "tokenizer/words.json"} < {str(name) for name in names}
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (ranked_folder / name).read_bytes()


def test_a_model_from_arrays_keeps_its_words(ranked_folder, tmp_path):
    model = Dalle.from_pretrained(ranked_folder)
    params = {"stage1": model._codec.params, "stage2": model._stage2}
    made = Dalle(model.config, params, model.tokenizer)
    made.caption_dropout = 0.1
    made.save_pretrained(tmp_path / "made")
    again = Dalle.from_pretrained(tmp_path / "made")
    assert again.tokenizer.known_words == model.tokenizer.known_words and again.caption_dropout == 0.1


def test_rankers_have_names(ranked_folder, tiny_clip_folder, tiny_igpt_model_folder):
    """The model's own is the default; all are loaded once."""
    model = Dalle.from_pretrained(ranked_folder)
    settings = {"num_candidates": 3, "seed": 4}
    own = model.generate("the cat", **settings)
    scores = ClipRanker.from_pretrained(tiny_clip_folder).scores("the cat", own.images)
    np.testing.assert_array_equal(own.scores, scores)
    for name in ("auto", str(tiny_clip_folder), tiny_clip_folder):
        np.testing.assert_array_equal(model.generate("the cat", ranker=name, **settings).scores, scores)
    assert len(model._rankers) == 2
    for name in (None, "off"):
        assert model.generate("the cat", ranker=name, **settings).scores is None
    assert model.generate("the cat", ranker="likelihood", **settings).meta["ranker"] == "likelihood"
    assert ImageGPT.from_pretrained(tiny_igpt_model_folder).generate(0, num_candidates=1).scores is None


def test_words_that_a_model_does_not_know_are_a_warning_of_the_callers_line(ranked_folder):
    model = Dalle.from_pretrained(ranked_folder)
    for call in (model, model.generate, model.generate_codes, lambda *a, **k: list(model.stream(*a, **k))):
        with pytest.warns(UserWarning, match="ranked does not know dog .* It draws cats, such as") as warned:
            call("the cat and dog", num_candidates=1)
        assert [w.filename for w in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model("the cat", num_candidates=1)


def test_models_without_a_list_of_words_never_warn(tiny_dalle):
    assert tiny_dalle.tokenizer.known_words is None
    tiny_dalle("12 dogs", num_candidates=1)


def test_guidance_without_caption_dropout_is_a_warning(tiny_folder, tiny_dalle):
    """The published model was trained without it; a model of which nobody knows does not warn."""
    model = Dalle.from_pretrained(tiny_folder)
    assert model.caption_dropout == 0 and tiny_dalle.caption_dropout == 0.1
    with pytest.warns(UserWarning, match="guidance_scale 3 costs twice the time and does not make .* follow"):
        model("the cat", num_candidates=1, guidance_scale=3)
    model.caption_dropout = None
    model("the cat", num_candidates=1, guidance_scale=3)
    tiny_dalle("the cat", num_candidates=1, guidance_scale=3)


def test_threads_may_call_one_model(ranked_folder):
    """Each gets what it would get alone, and a ranker is loaded once."""
    model = Dalle.from_pretrained(ranked_folder)
    requests = [(prompt, seed) for prompt in ("the cat", "cat the", "the") for seed in range(4)]

    def draw(request: tuple[str, int]) -> Generation:
        return model(request[0], seed=request[1], num_candidates=3, batch_size=BATCH)

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(draw, requests))
    assert len(model._rankers) == 1
    for request, generation in zip(requests, together, strict=True):
        alone = draw(request)
        np.testing.assert_array_equal(generation.codes, alone.codes)
        np.testing.assert_array_equal(generation.images, alone.images)
        np.testing.assert_array_equal(generation.scores, alone.scores)


def test_a_name_does_not_tell_who_has_the_folder(ranked_folder, monkeypatch):
    """It stands in every PNG file that people share."""
    monkeypatch.setenv("HOME", str(ranked_folder.parent))
    model = Dalle.from_pretrained("~/ranked")
    assert model.name == "~/ranked" and model.folder == ranked_folder
    assert Dalle.from_pretrained(ranked_folder).name == "~/ranked"
    assert Dalle.from_pretrained("demo").name == "demo"
    assert repr(model).startswith("Dalle(~/ranked, float32, on ")
