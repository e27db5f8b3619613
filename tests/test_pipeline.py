"""Dalle and ImageGPT: shapes and ranges of what goes in and out, what is refused, and what is kept."""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from mindalle_jax import Dalle, Generation, ImageGPT
from mindalle_jax.config.file import dump_config, parse_config
from mindalle_jax.errors import CheckpointError, ConfigError, OutputError, UsageError
from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.storage.weights import MANIFEST, count_parameters, leaf_shapes, nest

BATCH = 4  # one compiled size; also the default for 3 or 4 candidates


@pytest.fixture(scope="module")
def generation(tiny_dalle) -> Generation:
    return tiny_dalle.generate("the cat", num_candidates=3, seed=5, temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def generations(tiny_dalle) -> Generation:
    """Of a list of prompts."""
    return tiny_dalle.generate(["the cat", "12"], num_candidates=3, seed=5, temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def igpt(tiny_igpt_model_folder) -> ImageGPT:
    """Class-conditional, 5 classes."""
    return ImageGPT.from_pretrained(tiny_igpt_model_folder)


@pytest.fixture(scope="module")
def free_igpt(tmp_path_factory, tiny_igpt_config, write_folder) -> ImageGPT:
    """Unconditional."""
    hparams = dataclasses.replace(tiny_igpt_config.stage2.hparams, n_classes=None)
    stage2 = dataclasses.replace(tiny_igpt_config.stage2, use_cls_cond=False, hparams=hparams)
    config = dataclasses.replace(tiny_igpt_config, stage2=stage2)
    return ImageGPT.from_pretrained(write_folder(tmp_path_factory.mktemp("free") / "free-igpt", config))


@pytest.fixture
def copied(tiny_model_folder, tmp_path):
    """A copy of the converted model that may be changed."""
    return shutil.copytree(tiny_model_folder, tmp_path / "copy")


# ---------------------------------------- text


def test_tokenize(tiny_dalle):
    """A bare string is one prompt; "" is padding only and no error here."""
    ids = tiny_dalle.tokenize("the cat")
    assert ids.shape == (1, 12) and ids.dtype == np.int32
    both = tiny_dalle.tokenize(["", "the cat"])
    np.testing.assert_array_equal(both[1:], ids)
    np.testing.assert_array_equal(both[0], [tiny_dalle.tokenizer.pad_id] * 12)
    np.testing.assert_array_equal(tiny_dalle.tokenize(""), both[:1])


def test_tokenize_warns_of_prompts_that_are_cut_or_unknown(tiny_dalle):
    """Of the caller's line; good prompts pass in silence (warnings are errors here)."""
    with pytest.warns(UserWarning) as warned:
        tiny_dalle.tokenize(["x " * 20, "ж ж ж", "the cat"])
    assert ["has 20 tokens" in str(w.message) for w in warned] == [True, False]
    assert "unknown" in str(warned[1].message)
    assert {w.filename for w in warned} == {__file__}


@pytest.mark.parametrize("blank", ["", " ", "\n\t\u3000"])
def test_a_blank_prompt_is_refused_unless_allowed(tiny_dalle, blank):
    """64 times [PAD] draws something, and nobody asked for it."""
    for prompt in (blank, ["the cat", blank]):
        for call in (tiny_dalle.generate_codes, tiny_dalle.generate):
            with pytest.raises(UsageError, match="blank.*allow_empty"):
                call(prompt, num_candidates=1)
    codes = tiny_dalle.generate_codes(blank, num_candidates=3, allow_empty=True)
    assert codes.shape == (3, 64)


def test_no_prompts_are_refused(tiny_dalle):
    with pytest.raises(UsageError, match="no prompt"):
        tiny_dalle.generate_codes([], num_candidates=1)


# ---------------------------------------- logits


def test_logits(tiny_dalle):
    """Both heads in float32, for whole and for part pictures; [B, T] is free."""
    ids = np.repeat(tiny_dalle.tokenize("the cat"), 2, axis=0)
    for length in (64, 3):
        image, text = tiny_dalle.logits(ids, np.zeros((2, length), np.int64))
        assert image.shape == (2, length, 80) and image.dtype == np.float32
        assert text.shape == (2, 11, 110) and text.dtype == np.float32
        assert np.isfinite(image).all() and np.isfinite(text).all()


@pytest.mark.parametrize(
    ("ids", "codes", "message"),
    [
        (np.zeros((1, 11), int), np.zeros((1, 4), int), r"text_ids must be \[B, 12\], not \[1, 11\]"),
        (np.zeros(12, int), np.zeros((1, 4), int), r"text_ids must be \[B, 12\], not \[12\]"),
        (np.zeros((1, 12)), np.zeros((1, 4), int), "text_ids must be integers, not float64"),
        (np.full((1, 12), 110), np.zeros((1, 4), int), r"text_ids must lie in \[0, 110\), not \[110, 110\]"),
        (np.full((1, 12), -1), np.zeros((1, 4), int), r"text_ids must lie in \[0, 110\)"),
        (
            np.zeros((1, 12), int),
            np.zeros((1, 65), int),
            r"codes must be \[B, T\] .* or \[B, 8, 8\], not \[1, 65\]",
        ),
        (np.zeros((1, 12), int), np.zeros((1, 0), int), r"codes must be \[B, T\]"),
        (np.zeros((1, 12), int), np.zeros((1, 8, 7), int), r"codes must be \[B, T\]"),
        (np.zeros((1, 12), int), np.full((1, 4), 80), r"codes must lie in \[0, 80\), not \[80, 80\]"),
        (np.zeros((1, 12), int), np.zeros((1, 4), bool), "codes must be integers, not bool"),
        (np.zeros((2, 12), int), np.zeros((1, 4), int), "2 prefixes do not go with 1 rows of codes"),
    ],
)
def test_logits_of_wrong_arrays_are_refused(tiny_dalle, ids, codes, message):
    """JAX clamps an id out of range to the table's last row."""
    with pytest.raises(UsageError, match=message):
        tiny_dalle.logits(ids, codes)


# ---------------------------------------- generate


def test_generate_gives_pictures_of_its_codes(tiny_dalle, generation):
    """uint8 by truncation, as the original does before it saves and ranks."""
    assert generation.images.shape == (3, 32, 32, 3) and generation.images.dtype == np.uint8
    assert generation.codes.shape == (3, 64) and generation.codes.dtype == np.int32
    assert generation.seeds.tolist() == [5, 5, 5] and generation.seeds.dtype == np.uint32
    assert generation.prompts == ["the cat"]
    settings = {"num_candidates": 3, "seed": 5, "temperature": 0.9, "top_p": 0.95}
    np.testing.assert_array_equal(generation.codes, tiny_dalle.generate_codes("the cat", **settings))
    pixels = tiny_dalle.decode_codes(generation.codes)
    np.testing.assert_array_equal(generation.images, (pixels * 255).astype(np.uint8))


def test_generate_on_a_list_has_an_axis_of_prompts(generation, generations):
    assert generations.images.shape == (2, 3, 32, 32, 3)
    assert generations.codes.shape == (2, 3, 64)
    assert generations.seeds.shape == (2, 3)
    assert generations.prompts == ["the cat", "12"]
    np.testing.assert_array_equal(generations.images[0], generation.images)


def test_sampling_is_the_originals_call(tiny_dalle):
    """Its argument names and defaults; channels last. The same pictures as generate."""
    codes = tiny_dalle.generate_codes("the cat", num_candidates=3, top_k=9, temperature=0.5, seed=2)
    pixels = tiny_dalle.sampling(prompt="the cat", top_k=9, softmax_temperature=0.5, num_candidates=3, seed=2)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, tiny_dalle.decode_codes(codes))


def test_seed_none_is_drawn_and_told(tiny_dalle):
    a, b = (tiny_dalle.generate("the cat", num_candidates=3, seed=None) for _ in range(2))
    assert a.meta["seed"] != b.meta["seed"] and (a.seeds == a.meta["seed"]).all()
    again = tiny_dalle.generate_codes("the cat", num_candidates=3, seed=a.meta["seed"])
    np.testing.assert_array_equal(a.codes, again)


@pytest.mark.parametrize("batch_size", [0, -1, 1.0, True, "4"])
def test_a_wrong_batch_size_is_refused(tiny_dalle, batch_size):
    with pytest.raises(UsageError, match="batch_size must be an integer of at least 1, not"):
        tiny_dalle.generate_codes("the cat", num_candidates=1, batch_size=batch_size)


@pytest.mark.parametrize(
    "wrong", [{"top_k": 81}, {"top_p": 0}, {"temperature": -1}, {"num_candidates": 0}, {"seed": -1}], ids=str
)
def test_wrong_settings_are_refused_by_every_call(tiny_dalle, igpt, wrong):
    """Before anything is drawn. Their values are tests/sampling/test_options.py's."""
    arguments = {"num_candidates": 1} | wrong
    for call, prompt in [
        (tiny_dalle.generate_codes, "the cat"),
        (tiny_dalle.generate, ["the cat"]),
        (tiny_dalle.sampling, "the cat"),
        (igpt.generate, 1),
    ]:
        renamed = {"softmax_temperature" if call == tiny_dalle.sampling and k == "temperature" else k: v
                   for k, v in arguments.items()}  # fmt: skip
        with pytest.raises(UsageError, match=f"{next(iter(wrong))} must be"):
            call(prompt, **renamed)


def test_progress_bars_go_to_stderr(tiny_dalle, capsys):
    """Standard output belongs to what the user prints."""
    tiny_dalle.generate("the cat", num_candidates=3, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "192/192" in err and "3/3" in err
    tiny_dalle.generate("the cat", num_candidates=3)
    assert capsys.readouterr() == ("", "")


# ---------------------------------------- saving


def test_save_writes_pictures_grid_and_meta(tiny_dalle, generation, tmp_path):
    folder = tmp_path / "new" / "out"
    paths = generation.save(folder)
    assert [path.name for path in paths] == [f"seed5_candidate00{i}.png" for i in range(3)]
    assert sorted(p.name for p in folder.iterdir()) == sorted([p.name for p in paths] + ["grid.png", "meta.json"])
    for path, image in zip(paths, generation.images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert meta["prompts"] == ["the cat"] and meta["num_tokens"] == tiny_dalle.tokenizer(["the cat"]).num_tokens
    assert [entry["file"] for entry in meta["pictures"]] == [path.name for path in paths]
    assert [entry["codes"] for entry in meta["pictures"]] == generation.codes.tolist()
    assert [entry["candidate"] for entry in meta["pictures"]] == [0, 1, 2]


def test_save_of_a_list_names_the_prompt(generations, tmp_path):
    paths = generations.save(tmp_path / "out")
    assert [path.name for path in paths] == [
        f"prompt{p:02d}_seed5_candidate{i:03d}.png" for p in range(2) for i in range(3)
    ]
    meta = json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))
    assert [entry["prompt"] for entry in meta["pictures"]] == ["the cat"] * 3 + ["12"] * 3
    np.testing.assert_array_equal(np.asarray(Image.open(paths[4])), generations.images[1, 1])


def test_meta_is_enough_to_draw_the_same_codes(generations, tmp_path):
    """From nothing but meta.json: model, dtype, settings, batch size and prompts."""
    generations.save(tmp_path / "out")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))
    dalle = Dalle.from_pretrained(meta["model"], dtype=meta["dtype"])
    names = ("num_candidates", "top_k", "top_p", "temperature", "seed", "batch_size")
    codes = dalle.generate_codes(meta["prompts"], **{name: meta[name] for name in names})
    assert codes.reshape(-1, 64).tolist() == [entry["codes"] for entry in meta["pictures"]]
    assert meta["batch_size"] == 2 and meta["top_k"] == 80  # what was used, not what was left out
    assert set(meta["versions"]) == {"mindalle-jax", "jax", "python"}
    assert len(meta["model_sha256"]) == 64 and "threefry2x32" in meta["noise"]


def test_save_never_replaces_silently(generation, tmp_path):
    """An empty folder is fine, a used one is not; with overwrite, other files stay."""
    folder = tmp_path / "out"
    folder.mkdir()
    generation.save(folder)
    (folder / "notes.txt").write_text("mine")
    before = (folder / "meta.json").read_bytes()
    with pytest.raises(OutputError, match="exists and is not empty; .*--overwrite"):
        dataclasses.replace(generation, meta={}).save(folder)
    assert (folder / "meta.json").read_bytes() == before
    generation.save(folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_save_to_a_place_that_cannot_be_written(generation, tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=str(tmp_path / "file")):
            generation.save(target)


def test_prompts_of_any_script_are_saved_readably(generation, tmp_path):
    odd = 'a "cat" — 東京 🎨\n\\'
    dataclasses.replace(generation, prompts=[odd]).save(tmp_path / "out")
    text = (tmp_path / "out" / "meta.json").read_text(encoding="utf-8")
    assert json.loads(text)["prompts"] == [odd] and "東京" in text


@pytest.mark.parametrize("count", [1, 3, 4, 5, 30])
def test_grid_shows_every_picture_once(generation, count):
    """Marked pictures: none is missing, covered or beyond the edge."""
    images = np.zeros((count, 16, 16, 3), np.uint8)
    images[..., 0], images[..., 1] = 200, np.arange(count)[:, None, None]
    others = {"codes": np.zeros((count, 64), np.int32), "seeds": np.zeros(count, np.uint32)}
    sheet = np.asarray(dataclasses.replace(generation, images=images, **others).grid())
    seen, pixels = np.unique(sheet[sheet[..., 0] == 200][:, 1], return_counts=True)
    np.testing.assert_array_equal(seen[pixels >= 256], np.arange(count))


def test_grid_of_a_list_has_a_block_a_prompt(generations):
    one = generations.of_prompt(0).grid()
    both = generations.grid()
    assert both.width == one.width and both.height > 1.8 * one.height


# ---------------------------------------- image-only models


def test_class_conditional_model(igpt):
    generation = igpt.generate(3, num_candidates=3)
    assert generation.images.shape == (3, 32, 32, 3) and generation.codes.shape == (3, 64)
    assert generation.prompts == ["class 3"]
    assert igpt.num_classes == 5
    other = igpt.generate(4, num_candidates=3)
    assert (generation.codes != other.codes).any(axis=-1).all()
    logits = igpt.logits(generation.codes, [3, 3, 4])
    assert logits.shape == (3, 64, 80) and logits.dtype == np.float32
    assert np.abs(logits[1, 0] - logits[0, 0]).max() == 0 < np.abs(logits[2, 0] - logits[0, 0]).max()


def test_unconditional_model(free_igpt):
    generation = free_igpt.generate(num_candidates=3)
    assert generation.images.shape == (3, 32, 32, 3)
    assert generation.prompts == [""]
    assert free_igpt.num_classes is None
    assert free_igpt.logits(generation.codes[:, :4]).shape == (3, 4, 80)


@pytest.mark.parametrize(
    ("class_id", "message"),
    [(None, r"class-conditional: name a class in \[0, 5\)"), (5, r"\[0, 5\), not \[5, 5\]"), (-1, r"\[0, 5\)"),
     (1.0, "integers"), ("1", "integers"), (True, "integers")],
)  # fmt: skip
def test_wrong_classes_are_refused(igpt, class_id, message):
    """Class 5 of 5 would be clamped to class 4."""
    with pytest.raises(UsageError, match=message):
        igpt.generate(class_id, num_candidates=1)


def test_wrong_labels_are_refused(igpt, free_igpt):
    codes = np.zeros((2, 4), int)
    for labels, message in [([1], "1 prefixes do not go with 2 rows"), ([[1], [2]], r"labels must be \[B\]"),
                            ([0, 5], r"\[0, 5\)"), (None, "class-conditional")]:  # fmt: skip
        with pytest.raises(UsageError, match=message):
            igpt.logits(codes, labels)
    with pytest.raises(UsageError, match="unconditional and takes no class"):
        free_igpt.logits(codes, [0, 0])
    with pytest.raises(UsageError, match="unconditional and takes no class"):
        free_igpt.generate(0)


def test_a_model_of_the_other_kind_is_refused(tiny_model_folder, tiny_igpt_model_folder):
    with pytest.raises(CheckpointError, match="text-to-image model; load it with Dalle"):
        ImageGPT.from_pretrained(tiny_model_folder)
    with pytest.raises(CheckpointError, match="image-only model; load it with ImageGPT"):
        Dalle.from_pretrained(tiny_igpt_model_folder)


def test_a_vqgan_alone_is_refused(tiny_folder, tmp_path):
    shutil.copy(tiny_folder / "stage1_last.ckpt", tmp_path / "vqgan.ckpt")
    shutil.copy(tiny_folder / "config.yaml", tmp_path)
    import_checkpoint(tmp_path / "vqgan.ckpt", tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds a VQGAN only"):
        Dalle.from_pretrained(tmp_path / "model")


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
