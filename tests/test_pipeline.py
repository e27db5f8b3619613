"""Dalle: shapes and ranges of what goes in and out, what is refused, and what is kept."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mindalle_jax import Dalle, Generation
from mindalle_jax.errors import CheckpointError, OutputError, UsageError
from mindalle_jax.interop.mindalle import import_checkpoint

BATCH = 4  # one compiled size; also the default for 3 or 4 candidates


@pytest.fixture(scope="module")
def generation(tiny_dalle) -> Generation:
    return tiny_dalle.generate("the cat", num_candidates=3, seed=5, temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def generations(tiny_dalle) -> Generation:
    """Of a list of prompts."""
    return tiny_dalle.generate(["the cat", "12"], num_candidates=3, seed=5, temperature=0.9, top_p=0.95)


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
        (np.zeros((2, 12), int), np.zeros((1, 4), int), "1 rows of codes want as many texts or classes, not 2"),
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
    with pytest.raises(UsageError, match=r"batch_size must be an integer in \[1, 4096\], not"):
        tiny_dalle.generate_codes("the cat", num_candidates=1, batch_size=batch_size)


@pytest.mark.parametrize(
    "wrong", [{"top_k": 81}, {"top_p": 0}, {"temperature": -1}, {"num_candidates": 0}, {"seed": -1}], ids=str
)
def test_wrong_settings_are_refused_by_every_call(tiny_dalle, wrong):
    """Before anything is drawn. Their values are tests/sampling/test_options.py's."""
    arguments = {"num_candidates": 1} | wrong
    for call, prompt in [
        (tiny_dalle.generate_codes, "the cat"),
        (tiny_dalle.generate, ["the cat"]),
        (tiny_dalle.sampling, "the cat"),
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


def test_a_vqgan_alone_is_refused(tiny_folder, tmp_path):
    shutil.copy(tiny_folder / "stage1_last.ckpt", tmp_path / "vqgan.ckpt")
    shutil.copy(tiny_folder / "config.yaml", tmp_path)
    import_checkpoint(tmp_path / "vqgan.ckpt", tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds a VQGAN only"):
        Dalle.from_pretrained(tmp_path / "model")
