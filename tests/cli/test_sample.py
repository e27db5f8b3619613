"""`mindalle sample`: what it writes, ranks, completes and shows."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from commands import codes, meta, tree
from PIL import Image

from mindalle_jax import ClipRanker, Dalle, ImageGPT
from mindalle_jax.cli import sample as sample_module
from mindalle_jax.hub import resolve
from mindalle_jax.runtime.devices import CPU_DEVICES
from mindalle_jax.sampling.events import Sampled

# What it writes


def test_images_are_named_by_seed_and_candidate(sample, out, tiny_dalle):
    code, stdout, _ = sample("a cat and the dog", "--seed", 7)
    assert code == 0
    assert tree(out) == ["grid.png", "meta.json", "seed7_candidate000.png", "seed7_candidate001.png"]
    assert stdout == f"2 images, {out / 'grid.png'} and {out / 'meta.json'}\n"
    expected = tiny_dalle.generate("a cat and the dog", num_candidates=2, seed=7)
    np.testing.assert_array_equal(codes(out), expected.codes)
    for i in range(2):
        with Image.open(out / f"seed7_candidate00{i}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), expected.images[i])
    with Image.open(out / "grid.png") as grid:
        assert min(grid.size) >= 32


def test_meta_json_is_enough_to_draw_again(sample, out, tiny_dalle, tiny_model_folder):
    assert sample("a cat", "--seed", 3, "--top-k", 20, "--top-p", 0.9, "--temperature", 0.8)[0] == 0
    m = meta(out)
    assert (m["seed"], m["top_k"], m["top_p"], m["temperature"]) == (3, 20, 0.9, 0.8)
    assert (m["num_candidates"], m["batch_size"], m["dtype"], m["prompts"]) == (2, 1, "float32", ["a cat"])
    assert m["model"] == str(tiny_model_folder) and set(m["versions"]) == {"mindalle-jax", "jax", "python"}
    assert [(p["file"], p["prompt"], p["seed"], p["candidate"]) for p in m["pictures"]] == [
        (f"seed3_candidate00{i}.png", "a cat", 3, i) for i in range(2)
    ]
    settings = {key: m[key] for key in ("seed", "top_k", "top_p", "temperature", "num_candidates", "batch_size")}
    np.testing.assert_array_equal(codes(out), tiny_dalle.generate_codes(m["prompts"][0], **settings))


def test_each_of_several_prompts_has_a_folder(sample, out, tmp_path):
    """Two that are the same, and what is no name for a file, included."""
    (tmp_path / "prompts.txt").write_text("The DOG!\n\n  a cat  \r\n../../etc\n!?\n", encoding="utf-8")
    code, stdout, _ = sample("a cat", "--prompts-file", tmp_path / "prompts.txt")
    assert code == 0
    names = ["000-a-cat", "001-the-dog", "002-a-cat", "003-etc", "004-prompt"]
    assert sorted(os.listdir(out)) == names and stdout.count("2 images") == 5
    prompts = ["a cat", "The DOG!", "a cat", "../../etc", "!?"]
    assert [meta(out / name)["prompts"] for name in names] == [[prompt] for prompt in prompts]
    np.testing.assert_array_equal(codes(out / names[0]), codes(out / names[2]))
    assert not np.array_equal(codes(out / names[0]), codes(out / names[1]))
    assert sorted(os.listdir(out / names[0]))[:2] == ["grid.png", "meta.json"]
    assert sorted(os.listdir(tmp_path)) == ["out", "prompts.txt"]


def test_a_prompts_file_from_windows(sample, out, tmp_path):
    """Its byte order mark was once an unknown character at the start of the first prompt."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\n".encode())
    assert sample("--prompts-file", tmp_path / "prompts.txt")[0] == 0
    assert meta(out)["prompts"] == ["a cat"]


def test_overwrite_replaces_files_of_the_same_names(sample, out):
    assert sample("a cat", "--seed", 1)[0] == 0
    (out / "mine.txt").write_text("mine")
    before = codes(out)
    assert sample("the dog", "--seed", 1)[0] == 6
    np.testing.assert_array_equal(codes(out), before)
    assert sample("the dog", "--seed", 1, "--overwrite")[0] == 0
    assert meta(out)["prompts"] == ["the dog"] and not np.array_equal(codes(out), before)
    assert (out / "mine.txt").read_text() == "mine"


def test_overwrite_needs_a_place(mindalle_cli):
    code, _, err = mindalle_cli("sample", "a cat", "--overwrite")
    assert code == 2 and "--overwrite works only with --out" in err


def test_overwrite_takes_the_images_of_before_away(sample, out):
    """Their names hold scores, so they would hardly ever be replaced, and stand between the new ones."""
    assert sample("a cat", "-n", 3, "--ranker", "likelihood")[0] == 0
    (out / "rank001_mine.png").touch()
    assert sample("the dog", "-n", 2, "--ranker", "likelihood", "--overwrite")[0] == 0
    names = sorted(path.name for path in out.glob("*.png"))
    assert names == sorted(["grid.png", "rank001_mine.png", *(image["file"] for image in meta(out)["pictures"])])


def test_an_empty_folder_is_as_good_as_none(sample, out):
    out.mkdir()
    assert sample("a cat")[0] == 0


def test_the_device_is_told_on_stderr(sample):
    _, stdout, err = sample("a cat")
    lines = err.splitlines()
    assert re.fullmatch(r"tiny, loaded in \d+\.\d s; cpu \(cpu\), float32", lines[0])
    assert lines[1] == 'No GPU or TPU is in use; for an NVIDIA GPU: pip install "jax[cuda13]"'
    assert err.count("GPU") == 2 and "GPU" not in stdout and "cpu" not in stdout


def test_temperature_0_is_greedy(sample, out, tiny_dalle):
    assert sample("a cat", "--temperature", 0)[0] == 0
    np.testing.assert_array_equal(codes(out)[0], codes(out)[1])
    np.testing.assert_array_equal(codes(out), tiny_dalle.generate_codes("a cat", num_candidates=2, top_k=1))


def test_a_random_seed_is_told(sample, out):
    assert sample("a cat", "--seed", "random")[0] == 0
    first = meta(out)
    assert 0 <= first["seed"] < 2**32
    assert (out / f"seed{first['seed']}_candidate000.png").is_file()
    shutil.rmtree(out)
    assert sample("a cat", "a dog", "--seed", "random")[0] == 0
    seeds = {meta(folder)["seed"] for folder in out.iterdir()}
    assert len(seeds) == 1 and first["seed"] not in seeds  # one for all prompts of a run


@pytest.mark.parametrize(
    "options",
    [
        ["--top-k", "off", "--top-p", "off", "--seed", 2**32 - 1],
        ["--top-k", 80, "--top-p", 1, "--temperature", 50, "--batch-size", 2],
    ],
    ids=["off", "limits"],
)
def test_the_ends_of_the_ranges_work(sample, options):
    assert sample("a cat", *options)[0] == 0


def test_special_tokens_in_a_prompt_are_text(sample, out, tiny_dalle):
    assert sample("a [PAD] cat")[0] == 0
    ids, pad = tiny_dalle.tokenize("a [PAD] cat")[0], tiny_dalle.tokenizer.pad_id
    text = ids[: np.flatnonzero(ids != pad)[-1] + 1]
    assert pad not in text and len(text) == 7  # a [ p a d ] cat
    np.testing.assert_array_equal(codes(out), tiny_dalle.generate_codes("a [PAD] cat", num_candidates=2))
    assert meta(out)["prompts"] == ["a [PAD] cat"]


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(
    ("prompt", "warning"),
    [
        ("cat " * 20, "warning: 'cat cat cat cat cat cat cat cat cat c...' has 20 tokens; the first 12 are used"),
        (
            "кот и пёс",
            "tokens of 'кот и пёс' are unknown to the vocabulary; the images will hardly follow it",
        ),
        ("🐈🐈", "tokens of '🐈🐈' are unknown to the vocabulary"),
    ],
    ids=["too long", "unknown script", "emoji"],
)
def test_a_prompt_that_is_hardly_followed_is_a_warning(sample, prompt, warning):
    code, stdout, err = sample(prompt)
    assert code == 0 and warning not in stdout
    assert sum(warning in line for line in err.splitlines()) == 1


def test_a_folder_in_the_originals_format_is_converted_into_the_cache(
    sample, out, tiny_folder, cache_folder, tiny_dalle
):
    assert sample("a cat", model=tiny_folder)[0] == 0
    np.testing.assert_array_equal(codes(out), tiny_dalle.generate_codes("a cat", num_candidates=2))
    converted = resolve.find_model(tiny_folder)
    assert converted.parent == cache_folder / "converted" and (converted / "manifest.json").is_file()


# Ranking, completion, previews


def test_likelihood_ranks_names_and_meta(sample, out, tiny_dalle):
    code, stdout, _ = sample("a cat", "--ranker", "likelihood", "--num-candidates", 4, "--best", 3)
    expected = tiny_dalle.generate("a cat", num_candidates=4, ranker="likelihood")
    assert code == 0 and stdout.startswith("3 images, ")
    assert [image["candidate"] for image in meta(out)["pictures"]] == expected.order[:3].tolist()
    assert [image["score"] for image in meta(out)["pictures"]] == expected.scores[expected.order[:3]].tolist()
    assert meta(out)["ranker"] == "likelihood"
    first = f"rank001_score{expected.scores.max():.1f}_seed0_candidate{expected.order[0]:03d}.png"
    assert (out / first).is_file()


def test_a_clip_model_ranks(sample, out, tiny_dalle, tiny_clip_folder):
    code, _, err = sample("a cat", "--ranker", tiny_clip_folder)
    drawn = tiny_dalle.generate("a cat", num_candidates=2)
    scores = ClipRanker.from_pretrained(tiny_clip_folder).scores("a cat", drawn.images)
    assert code == 0, err
    assert [image["score"] for image in meta(out)["pictures"]] == sorted(scores.tolist(), reverse=True)
    assert meta(out)["ranker"] == f"CLIP {tiny_clip_folder}"


def test_the_clip_model_in_a_models_folder_ranks_unless_told_otherwise(
    sample, out, tmp_path, tiny_model_folder, tiny_clip_folder
):
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    shutil.copytree(tiny_clip_folder, model / "ranker")
    assert sample("a cat", model=model)[0] == 0 and meta(out)["ranker"] == f"CLIP {model / 'ranker'}"
    assert sample("a cat", "--ranker", "off", "--overwrite", model=model)[0] == 0 and meta(out)["ranker"] is None


def test_an_image_is_completed(sample, out, tiny_dalle, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), np.uint8)
    for name, options in (("a.png", {}), ("b.webp", {"lossless": True})):
        Image.fromarray(image).save(tmp_path / name, **options)
        assert sample("a cat", "--image", tmp_path / name, "--keep-rows", 3, "--overwrite")[0] == 0
        kept = tiny_dalle.encode_images(image[None]).reshape(-1)[:24]
        np.testing.assert_array_equal(codes(out), tiny_dalle.generate_codes("a cat", num_candidates=2, kept_codes=kept))
    assert meta(out)["keep_rows"] == 3


def test_an_image_turned_by_its_camera_is_turned_back(sample, out, tiny_dalle, tmp_path):
    """Its pixels lie on their side, and EXIF says so; another half of it would be kept."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    assert sample("a cat", "--image", tmp_path / "a.png", "--keep-rows", 3)[0] == 0
    kept = tiny_dalle.encode_images(np.rot90(image, -1)[None]).reshape(-1)[:24]
    np.testing.assert_array_equal(codes(out)[:, :24], np.stack([kept, kept]))


def test_an_image_drawn_before_is_varied(sample, out, tmp_path, tiny_dalle):
    """By the codes in the file, which decoding and encoding again would change; wherever the file is now."""
    sample("a cat", "--seed", 5)
    source = (out / "seed5_candidate001.png").rename(tmp_path / "best.png")
    kept = codes(out)[1, :32]
    code, _, err = sample("--vary", source, "--keep-rows", 4, "--seed", 6, "--out", out.with_name("varied"))
    assert code == 0, err
    assert meta(out.with_name("varied"))["prompts"] == ["a cat"]  # that of the file, where none is given
    varied = codes(out.with_name("varied"))
    np.testing.assert_array_equal(varied, tiny_dalle.generate_codes("a cat", num_candidates=2, seed=6, kept_codes=kept))


def test_previews_are_seen_and_go(sample, out, monkeypatch):
    """preview.png is there while it draws, and the folder is as without in the end."""
    seen = []
    write = sample_module._write_preview

    def spy(generation, path):
        write(generation, path)
        with Image.open(path) as image:
            seen.append((image.size, (generation.codes >= 0).sum(axis=-1).tolist()))

    monkeypatch.setattr(sample_module, "_write_preview", spy)
    assert sample("a cat", "--preview-every", 24)[0] == 0
    with Image.open(out / "grid.png") as image:
        size = image.size
    assert seen == [(size, [24, 24]), (size, [48, 48])]
    assert tree(out) == ["grid.png", "meta.json", "seed0_candidate000.png", "seed0_candidate001.png"]


def test_guidance_reaches_the_model(sample, out, tiny_dalle):
    assert sample("a cat", "--guidance-scale", 3)[0] == 0
    np.testing.assert_array_equal(codes(out), tiny_dalle.generate_codes("a cat", num_candidates=2, guidance_scale=3))


@pytest.mark.parametrize("arguments", [(), ("a cat", "--guidance-scale", "2"), ("--quantize", "weights+cache")])
def test_warmup_compiles_all_that_drawing_takes(
    mindalle_cli, tiny_model_folder, tiny_clip_folder, out, compilations, arguments
):
    """The images that are then drawn compile nothing; the warm-up itself writes nothing."""
    shared = ("--model", tiny_model_folder, "--num-candidates", 2, "--ranker", tiny_clip_folder, *arguments)
    code, stdout, _ = mindalle_cli("sample", "--warmup", "--out", out, *shared)
    assert code == 0 and stdout.startswith("compiled, or loaded, the programs that sample 2 candidates at once: ")
    assert not out.exists()
    prompt = () if arguments[:1] == ("a cat",) else ("the dog",)
    compilations.clear()
    assert mindalle_cli("sample", *prompt, "--out", out, *shared)[0] == 0
    assert compilations == []


@pytest.mark.filterwarnings("always")
def test_an_image_of_another_model_is_varied_with_a_warning(sample, out, tmp_path, tiny_dalle):
    generation = tiny_dalle.generate("a cat", num_candidates=1)
    meta = generation.meta | {"model_sha256": "0" * 64}
    (path,) = dataclasses.replace(generation, meta=meta).save(tmp_path / "other")
    code, _, err = sample("--vary", path, "--keep-rows", 2)
    assert (
        code == 0 and f"warning: {path} was sampled by another model, whose codes may stand for other patches\n" in err
    )


# Where it writes to, prompts, and interruptions


def test_images_go_to_a_new_folder_below_out(mindalle_cli, tmp_path, monkeypatch, tiny_model_folder):
    """Named by prompt and seed, numbered if it exists, and told in the end: the same command works twice."""
    monkeypatch.chdir(tmp_path)
    options = ["-m", tiny_model_folder, "-n", 1]
    for expected in ("a-cat-seed0", "a-cat-seed0-2", "a-cat-seed0-3"):
        code, stdout, _ = mindalle_cli("sample", "A cat!", *options)
        assert (code, stdout) == (0, f"1 image, out/{expected}/grid.png and out/{expected}/meta.json\n")
    code, stdout, _ = mindalle_cli("sample", "the dog", "a cat", *options, "--seed", 3)
    assert code == 0 and "out/the-dog-and-1-more-seed3/001-a-cat/grid.png" in stdout
    assert mindalle_cli("sample", "!?", *options)[1].startswith("1 image, out/prompt-seed0/grid.png")


def test_a_default_folder_goes_if_nothing_is_written(mindalle_cli, tmp_path, monkeypatch, tiny_model_folder):
    """It is made before the model is loaded, so that no other process takes it meanwhile."""
    monkeypatch.chdir(tmp_path)
    seen = []
    interrupting(monkeypatch, rows=1, also=lambda: seen.append(os.listdir("out")))
    assert mindalle_cli("sample", "a cat", "-m", tiny_model_folder, "-n", 1)[0] == 130
    assert seen == [["a-cat-seed0"]] and os.listdir(tmp_path) == []


def test_prompts_come_in_any_place_and_form(sample, out, tmp_path):
    (tmp_path / "prompts.txt").write_text("the dog\n")
    code, stdout, err = sample("a cat", "--prompts-file", tmp_path / "prompts.txt", "12", "--prompt", "a dog")
    assert code == 0 and "prompts:" not in err
    assert sorted(os.listdir(out)) == ["000-a-cat", "001-12", "002-a-dog", "003-the-dog"]


@pytest.mark.parametrize(
    ("prompts", "noted"),
    [(["a", "cat"], "2 prompts: a, cat"), (["a", "red", "cat"], "3 prompts: a, red, cat"), (["a cat", "dog"], ""),
     (["cat"], "")],
)  # fmt: skip
def test_words_without_quotes_are_noted(sample, prompts, noted):
    """One word each may be meant so; it is noted, and nobody has to answer."""
    code, _, err = sample(*prompts)
    line = f"mindalle sample: {noted}; if you meant one prompt, put it in quotes\n"
    assert code == 0 and (line in err if noted else "prompts:" not in err)


def test_the_hint_about_gpus_is_not_for_demo(mindalle_cli, out):
    code, _, err = mindalle_cli("sample", "a red apple", "-n", 1, "-o", out)
    assert code == 0 and "demo, loaded in" in err and "GPU" not in err


@pytest.mark.filterwarnings("always")
def test_unknown_words_and_the_remedy_are_told(mindalle_cli, out):
    code, _, err = mindalle_cli("sample", "a gray cat", "-n", 1, "-o", out, "-m", "demo-scenes", "--guidance-scale", 2)
    assert code == 0
    told = [line.removeprefix("warning: ") for line in err.splitlines() if line.startswith("warning: ")]
    assert len(told) == 2 and told[1].startswith("--guidance-scale 2 costs twice the time")
    assert told[0].startswith(
        "demo-scenes knows none of these words: gray (nearest: grey), cat (in 'a gray cat'). It samples "
    )
    assert "minDALL-E/1.3B" in told[0]


def interrupting(monkeypatch, rows: int, also=lambda: None) -> None:
    """Ctrl-C after so many rows of codes, and what is done besides."""
    seen = []
    write = Sampled.add

    def add(self, event):
        write(self, event)
        seen.append(event.kind)
        if event.kind == "codes" and seen.count("codes") == rows:
            also()
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Sampled, "add", add)


def test_ctrl_c_keeps_the_finished_candidates(sample, out, monkeypatch, tiny_dalle):
    """Five batches; the signal comes in the fourth."""
    interrupting(monkeypatch, rows=3 * 8 + 2)
    wanted, finished = 5 * CPU_DEVICES, 3 * CPU_DEVICES
    code, stdout, err = sample("a cat", "-n", wanted, "--batch-size", 1, "--ranker", "likelihood")
    assert code == 130
    told = f"mindalle sample: interrupted: {finished} of {wanted} candidates were finished; they are in {out}"
    assert err.splitlines()[-1] == told and stdout.startswith(f"{finished} images, ")
    settings = {"num_candidates": finished, "batch_size": 1, "ranker": "likelihood"}
    expected = tiny_dalle.generate("a cat", **settings)
    np.testing.assert_array_equal(codes(out), expected.codes[expected.order])


def test_ctrl_c_that_gets_lost_while_the_model_is_loaded_stops_all_the_same(sample, out, monkeypatch):
    """As JAX loses it when it collects garbage."""
    load = Dalle.from_pretrained

    def interrupted(*arguments, **options):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        return load(*arguments, **options)

    monkeypatch.setattr(Dalle, "from_pretrained", interrupted)
    code, stdout, err = sample("a cat")
    assert (code, stdout) == (130, "") and err.splitlines()[-1] == "mindalle sample: interrupted"
    assert not out.exists()


def test_ctrl_c_before_a_candidate_is_finished_writes_nothing(sample, out, monkeypatch):
    interrupting(monkeypatch, rows=2)
    code, stdout, err = sample("a cat", "-n", 20, "--batch-size", 2)
    assert (code, stdout) == (130, "") and not out.exists()
    assert err.splitlines()[-1] == (
        "mindalle sample: interrupted: 0 of 20 candidates were finished; nothing was written"
    )


@pytest.mark.parametrize("mixed", [[], ["--mixed-batches"]])
def test_ctrl_c_keeps_the_prompts_before(sample, out, monkeypatch, mixed):
    """A batch per prompt; also in the mode in which a batch may hold rows of several."""
    interrupting(monkeypatch, rows=2 * 8 + 1)
    code, stdout, err = sample("a cat", "the dog", "12", "-n", CPU_DEVICES, "--batch-size", 1, *mixed)
    told = f"interrupted: {2 * CPU_DEVICES} of {3 * CPU_DEVICES} candidates were finished; they are in"
    assert code == 130 and told in err
    assert sorted(os.listdir(out)) == ["000-a-cat", "001-the-dog"]
    assert stdout.count(f"{CPU_DEVICES} image") == 2


# Image-only models


def test_a_class_is_drawn(sample, out, tiny_igpt_model_folder):
    code, _, err = sample("--class-id", 3, model=tiny_igpt_model_folder)
    assert code == 0 and "tiny-igpt, loaded in" in err
    assert meta(out)["prompts"] == ["class 3"]
    expected = ImageGPT.from_pretrained(tiny_igpt_model_folder).generate(3, num_candidates=2)
    np.testing.assert_array_equal(codes(out), expected.codes)
