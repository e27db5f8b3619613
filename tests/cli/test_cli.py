"""cli.py: what a person types, and what they get: files, one message, and an exit code."""

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mindalle_jax import ClipRanker, Dalle, ImageGPT, cli, errors
from mindalle_jax.cli import sample as sample_module
from mindalle_jax.hub import resolve
from mindalle_jax.interop import mindalle
from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.interop.torch_archive import TorchArchive, write_torch_archive
from mindalle_jax.sampling import generate
from mindalle_jax.text.tokenizer import MERGES_FILE, VOCAB_FILE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mindalle_cli(capsys):
    """mindalle_cli("sample", ...) -> (exit code, standard output, standard error)."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse
            code = exit.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def sample(mindalle_cli, tiny_model_folder, out):
    """Draws two candidates with the tiny model; two everywhere, so that one program is compiled."""

    def run(*arguments, model=tiny_model_folder) -> tuple[int, str, str]:
        return mindalle_cli("sample", "--model", model, "--out", out, "--num-candidates", 2, *arguments)

    return run


@pytest.fixture
def not_loaded(monkeypatch):
    """Fails when weights are loaded: what is wrong with a command is told before."""

    def fail(*_, **__):
        pytest.fail("the weights were loaded")

    monkeypatch.setattr(Dalle, "from_pretrained", fail)
    monkeypatch.setattr(ImageGPT, "from_pretrained", fail)


def message(err: str, verb: str = "sample") -> str:
    """The one line of an error, where there is nothing else."""
    assert err.startswith(f"mindalle {verb}: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err[len(f"mindalle {verb}: ") : -1]


def meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def codes(folder: Path) -> np.ndarray:
    """Codes [n, h * w] by meta.json."""
    return np.asarray([picture["codes"] for picture in meta(folder)["pictures"]])


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# What sample writes


def test_pictures_are_named_by_seed_and_candidate(sample, out, tiny_dalle):
    code, stdout, _ = sample("a cat and the dog", "--seed", 7)
    assert code == 0
    assert tree(out) == ["grid.png", "meta.json", "seed7_candidate000.png", "seed7_candidate001.png"]
    assert stdout == f"2 pictures, {out / 'grid.png'} and {out / 'meta.json'}\n"
    expected = tiny_dalle.generate("a cat and the dog", num_candidates=2, seed=7)
    np.testing.assert_array_equal(codes(out), expected.codes)
    for i in range(2):
        with Image.open(out / f"seed7_candidate00{i}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), expected.images[i])
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
    assert sorted(os.listdir(out)) == names and stdout.count("2 pictures") == 5
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


def test_an_empty_folder_is_as_good_as_none(sample, out):
    out.mkdir()
    assert sample("a cat")[0] == 0


def test_the_device_is_told_on_stderr(sample):
    _, stdout, err = sample("a cat")
    lines = err.splitlines()
    assert re.fullmatch(r"tiny, loaded in \d+\.\d s; cpu \(cpu\), float32", lines[0])
    assert "No GPU or TPU is in use" in lines[1] and "pip install 'mindalle-jax[cuda]'" in lines[1]
    assert "GPU" not in stdout and "cpu" not in stdout


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
            "tokens of 'кот и пёс' are unknown to the vocabulary; the pictures will hardly follow it",
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


# Image-only models


# Ranking, completion, previews


def test_likelihood_ranks_names_and_meta(sample, out, tiny_dalle):
    code, stdout, _ = sample("a cat", "--ranker", "likelihood", "--num-candidates", 4, "--best", 3)
    expected = tiny_dalle.generate("a cat", num_candidates=4, ranker="likelihood")
    assert code == 0 and stdout.startswith("3 pictures, ")
    assert [picture["candidate"] for picture in meta(out)["pictures"]] == expected.order[:3].tolist()
    assert [picture["score"] for picture in meta(out)["pictures"]] == expected.scores[expected.order[:3]].tolist()
    assert meta(out)["ranker"] == "likelihood"
    first = f"rank000_score{expected.scores.max():.1f}_seed0_candidate{expected.order[0]:03d}.png"
    assert (out / first).is_file()


def test_a_clip_model_ranks(sample, out, tiny_dalle, tiny_clip_folder):
    code, _, err = sample("a cat", "--ranker", tiny_clip_folder)
    drawn = tiny_dalle.generate("a cat", num_candidates=2)
    scores = ClipRanker.from_pretrained(tiny_clip_folder).scores("a cat", drawn.images)
    assert code == 0, err
    assert [picture["score"] for picture in meta(out)["pictures"]] == sorted(scores.tolist(), reverse=True)
    assert meta(out)["ranker"] == f"CLIP {tiny_clip_folder}"


def test_the_clip_model_in_a_models_folder_ranks_unless_told_otherwise(
    sample, out, tmp_path, tiny_model_folder, tiny_clip_folder
):
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    shutil.copytree(tiny_clip_folder, model / "ranker")
    assert sample("a cat", model=model)[0] == 0 and meta(out)["ranker"] == f"CLIP {model / 'ranker'}"
    assert sample("a cat", "--ranker", "off", "--overwrite", model=model)[0] == 0 and meta(out)["ranker"] is None


@pytest.mark.parametrize(
    ("ranker", "code", "text"),
    [
        ("nowhere", 4, "nowhere: no such file or folder"),
        ("{model}", 4, "config.json"),
    ],
)
def test_a_ranker_that_is_none_is_told_before_the_model_is_loaded(
    sample, not_loaded, tiny_model_folder, ranker, code, text
):
    got, _, err = sample("a cat", "--ranker", ranker.format(model=tiny_model_folder))
    assert got == code and text in message(err)


def test_a_picture_is_completed(sample, out, tiny_dalle, tmp_path):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 32, 3), np.uint8)
    for name, options in (("a.png", {}), ("b.webp", {"lossless": True})):
        Image.fromarray(picture).save(tmp_path / name, **options)
        assert sample("a cat", "--image", tmp_path / name, "--keep-rows", 3, "--overwrite")[0] == 0
        kept = tiny_dalle.encode_images(picture[None]).reshape(-1)[:24]
        np.testing.assert_array_equal(codes(out), tiny_dalle.generate_codes("a cat", num_candidates=2, kept_codes=kept))
    assert meta(out)["keep_rows"] == 3


def test_a_picture_turned_by_its_camera_is_turned_back(sample, out, tiny_dalle, tmp_path):
    """Its pixels lie on their side, and EXIF says so; another half of it would be kept."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert sample("a cat", "--image", tmp_path / "a.png", "--keep-rows", 3)[0] == 0
    kept = tiny_dalle.encode_images(np.rot90(picture, -1)[None]).reshape(-1)[:24]
    np.testing.assert_array_equal(codes(out)[:, :24], np.stack([kept, kept]))


def test_a_picture_drawn_before_is_varied(sample, out, tiny_dalle):
    """By the codes in meta.json, which decoding and encoding again would change."""
    sample("a cat", "--seed", 5)
    source = out / "seed5_candidate001.png"
    kept = codes(out)[1, :32]
    code, _, err = sample("a cat", "--vary", source, "--keep-rows", 4, "--seed", 6, "--out", out.with_name("varied"))
    assert code == 0, err
    varied = codes(out.with_name("varied"))
    np.testing.assert_array_equal(varied, tiny_dalle.generate_codes("a cat", num_candidates=2, seed=6, kept_codes=kept))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--image", "{dir}/good.png"], "--keep-rows goes with --image or --vary, and they need it"),
        (["--keep-rows", "3"], "--keep-rows goes with --image or --vary"),
        (["--image", "{dir}/good.png", "--vary", "{dir}/good.png", "--keep-rows", "3"], "exclude each other"),
        (["--image", "{dir}/good.png", "--keep-rows", "0"], "keep_rows must be an integer in [1, 7]"),
        (["--image", "{dir}/good.png", "--keep-rows", "8"], "keep_rows must be an integer in [1, 7]"),
        (
            ["--image", "{dir}/large.png", "--keep-rows", "3"],
            "large.png: the image is 64 x 48 pixels; this model knows",
        ),
        (["--image", "{dir}/grey.png", "--keep-rows", "3"], "grey.png: the image has the mode L; convert it to RGB"),
        (["--image", "{dir}/clear.png", "--keep-rows", "3"], "clear.png: the image has the mode RGBA; convert it"),
        (["--image", "{dir}/cut.png", "--keep-rows", "3"], "cut.png: cannot be read as PNG, JPEG or WebP"),
        (["--image", "{dir}/page.png", "--keep-rows", "3"], "page.png: cannot be read as PNG, JPEG or WebP"),
        (["--image", "{dir}/a.gif", "--keep-rows", "3"], "a.gif: cannot be read as PNG, JPEG or WebP"),
        (["--image", "{dir}/none.png", "--keep-rows", "3"], "none.png: cannot be read as PNG, JPEG or WebP"),
        (["--image", "{dir}", "--keep-rows", "3"], "cannot be read as PNG, JPEG or WebP"),
        (["--vary", "{dir}/good.png", "--keep-rows", "3"], "meta.json does not hold its codes"),
        (["--best", "0"], "--best must be at least 1, not 0"),
        (["--guidance-scale", "-1"], "guidance_scale must be a finite number >= 0"),
        (["--guidance-scale", "nan"], "guidance_scale must be a finite number >= 0"),
        (["--preview-every", "3"], "every must be a multiple of 8 codes"),
        (["--preview-every", "0"], "every must be a multiple of 8 codes"),
    ],
)
def test_what_cannot_be_completed_is_told_before_the_model_is_loaded(sample, not_loaded, tmp_path, arguments, text):
    good = Image.new("RGB", (32, 32))
    good.save(tmp_path / "good.png")
    good.save(tmp_path / "a.gif")
    Image.new("RGB", (64, 48)).save(tmp_path / "large.png")
    Image.new("L", (32, 32)).save(tmp_path / "grey.png")
    Image.new("RGBA", (32, 32)).save(tmp_path / "clear.png")
    Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / "noise.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "noise.png").read_bytes()[:200])
    (tmp_path / "page.png").write_text("<html>")
    code, _, err = sample("a cat", *(argument.format(dir=tmp_path) for argument in arguments))
    assert code == 2 and text in message(err)


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


def test_out_of_memory_is_exit_code_8(sample, monkeypatch, tmp_path):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.")

    monkeypatch.setattr(generate, "start_decode", exhausted)
    code, stdout, err = sample("a cat", "--batch-size", 2)
    assert (code, stdout) == (8, "") and "try batch_size 1 " in err.splitlines()[-1]
    assert tree(tmp_path) == []


def test_a_class_is_drawn(sample, out, tiny_igpt_model_folder):
    code, _, err = sample("--class-id", 3, model=tiny_igpt_model_folder)
    assert code == 0 and "tiny-igpt, loaded in" in err
    assert meta(out)["prompts"] == ["class 3"]
    expected = ImageGPT.from_pretrained(tiny_igpt_model_folder).generate(3, num_candidates=2)
    np.testing.assert_array_equal(codes(out), expected.codes)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a cat"], "draws without text; it takes --class-id at most, not a prompt"),
        (["a cat", "--class-id", 3], "draws without text; it takes --class-id at most, not a prompt"),
        ([], r"this model is class-conditional: name a class in \[0, 5\)"),
        (["--class-id", 5], r"classes must lie in \[0, 5\), not \[5, 5\]"),
        (["--class-id", -1], r"classes must lie in \[0, 5\), not \[-1, -1\]"),
        (["--class-id", 2**70], "class"),
    ],
    ids=["prompt", "prompt and class", "no class", "over", "negative", "huge"],
)
def test_a_class_that_does_not_work_is_told(sample, not_loaded, out, tiny_igpt_model_folder, arguments, text):
    code, stdout, err = sample(*arguments, model=tiny_igpt_model_folder)
    assert (code, stdout) == (2, "") and re.search(text, message(err))
    assert not out.exists()


# Arguments of sample that are refused, before weights are loaded and with nothing written


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([""], "a prompt is blank"),
        ([" \t\n"], "a prompt is blank"),
        (["a cat", ""], "a prompt is blank"),
        (["x" * 10_000], r"has 10,000 characters; at most 2,000 are taken"),
        (["a cat", "x" * 1_000_000], r"has 1,000,000 characters; at most 2,000 are taken"),
        (["a\0cat"], r"the prompt 'a\\x00cat' holds a NUL character"),
        (["a \udc80 cat"], r"the prompt 'a \\udc80 cat' is not valid text: lone surrogate at character 2"),
        ([], "no prompt was given; write one in quotes, or name a file with --prompts-file"),
        (["a cat", "--class-id", 3], "draws from text; --class-id is for image-only models"),
        (["a cat", "--top-k", 0], r"top_k must be an integer in \[1, 80\] .*not 0$"),
        (["a cat", "--top-k", -1], r"top_k must be an integer in \[1, 80\] .*not -1$"),
        (["a cat", "--top-k", 81], r"top_k must be an integer in \[1, 80\] \(the number of codes\).*not 81$"),
        (["a cat", "--top-k", 256], "not 256$"),  # the default, when somebody asks for it
        (["a cat", "--top-p", 0], r"top_p must be a number in \(0, 1\], or off \(None\); not 0.0"),
        (["a cat", "--top-p", -1], r"top_p must be a number in \(0, 1\], or off \(None\); not -1.0"),
        (["a cat", "--top-p", "nan"], r"top_p must be a number in \(0, 1\], or off \(None\); not nan"),
        (["a cat", "--top-p", 2], r"top_p must be a number in \(0, 1\], or off \(None\); not 2.0"),
        (["a cat", "--temperature", -1], "temperature must be a finite number > 0, or 0 for greedy; not -1.0"),
        (["a cat", "--temperature", "inf"], "temperature must be a finite number > 0, or 0 for greedy; not inf"),
        (["a cat", "--temperature", "nan"], "temperature must be a finite number > 0, or 0 for greedy; not nan"),
        (["a cat", "--num-candidates", 0], r"num_candidates must be an integer in \[1, 1000\], not 0"),
        (["a cat", "--num-candidates", -1], r"num_candidates must be an integer in \[1, 1000\], not -1"),
        (["a cat", "--num-candidates", 1_000_000], r"num_candidates must be an integer in \[1, 1000\], not 1000000"),
        (["a cat", "--seed", -1], r"seed must be an integer in \[0, 4294967296\), not -1"),
        (["a cat", "--seed", 2**32 + 5], r"seed must be an integer in \[0, 4294967296\), not 4294967301"),
        (["a cat", "--seed", "1.5"], r"--seed must be an integer in \[0, 4294967296\), or random; not '1.5'"),
        (["a cat", "--batch-size", 0], "batch_size must be an integer of at least 1, not 0"),
        (["a cat", "--batch-size", -8], "batch_size must be an integer of at least 1, not -8"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "_".join(str(part)[:12] for part in value if part != "a cat"),
)
def test_an_argument_out_of_range_is_one_line(sample, not_loaded, tmp_path, arguments, text):
    code, stdout, err = sample(*arguments)
    assert (code, stdout) == (2, "")
    assert re.search(text, message(err)) and len(err) < 300
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--top-k", "many"], "argument --top-k: invalid int or off value: 'many'"),
        (["--top-k", "1.5"], "argument --top-k: invalid int or off value: '1.5'"),
        (["--top-p", "much"], "argument --top-p: invalid float or off value: 'much'"),
        (["--temperature", "hot"], "argument --temperature: invalid float value: 'hot'"),
        (["--num-candidates", "1e3"], "argument --num-candidates: invalid int value: '1e3'"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--topk", "5"], "unrecognized arguments: --topk"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_no_number_or_option_is_a_usage_error(sample, not_loaded, arguments, text):
    code, stdout, err = sample("a cat", *arguments)
    assert (code, stdout) == (2, "") and text in err.splitlines()[-1]


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["convert", "x"]])
def test_an_incomplete_command_is_a_usage_error(mindalle_cli, arguments):
    code, stdout, err = mindalle_cli(*arguments)
    assert (code, stdout) == (2, "") and err.startswith("usage: mindalle")


def test_pictures_need_a_place(mindalle_cli, not_loaded):
    code, stdout, err = mindalle_cli("sample", "a cat")
    assert (code, stdout) == (2, "") and message(err) == "--out is missing: a folder for the pictures"


@pytest.mark.parametrize("arguments", [(), ("a cat", "--guidance-scale", "2"), ("--quantize", "weights+cache")])
def test_warmup_compiles_all_that_drawing_takes(
    mindalle_cli, tiny_model_folder, tiny_clip_folder, out, compilations, arguments
):
    """The pictures that are then drawn compile nothing; the warm-up itself writes nothing."""
    shared = ("--model", tiny_model_folder, "--num-candidates", 2, "--ranker", tiny_clip_folder, *arguments)
    code, stdout, _ = mindalle_cli("sample", "--warmup", "--out", out, *shared)
    assert code == 0 and stdout.startswith("compiled, or loaded, what draws 2 candidates at once: ")
    assert not out.exists()
    prompt = () if arguments[:1] == ("a cat",) else ("the dog",)
    compilations.clear()
    assert mindalle_cli("sample", *prompt, "--out", out, *shared)[0] == 0
    assert compilations == []


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.write_bytes("une tête".encode("latin-1")), "cannot be read as UTF-8 text: 'utf-8' codec"),
        (lambda path: path.write_bytes("a cat".encode("utf-16")), "cannot be read as UTF-8 text"),
        (lambda path: path.write_text("\n \n"), "prompts.txt: holds no prompt"),
        (lambda path: path.mkdir(), "cannot be read as UTF-8 text: .*directory"),
        (lambda path: None, "cannot be read as UTF-8 text: .*No such file"),
        (lambda path: path.write_bytes(b"a cat\na\0dog\n"), "holds a NUL character"),
    ],
    ids=["latin-1", "utf-16", "blank", "folder", "missing", "NUL"],
)
def test_a_prompts_file_that_cannot_be_used_is_told(sample, not_loaded, tmp_path, make, text):
    make(tmp_path / "prompts.txt")
    code, _, err = sample("--prompts-file", tmp_path / "prompts.txt")
    assert code == 2 and re.search(text, message(err))


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (lambda out: (out.mkdir(), (out / "old.txt").touch()), [], "exists and is not empty; .* or pass --overwrite"),
        (lambda out: out.write_text("mine"), [], "is not a folder that can be written to; name another place"),
        (
            lambda out: out.write_text("mine"),
            ["--overwrite"],
            "is not a folder that can be written to; name another place",
        ),
    ],
    ids=["not empty", "file", "file, overwrite"],
)
def test_a_place_that_is_taken_is_told_before_the_model_is_loaded(
    sample, not_loaded, tmp_path, out, make, options, text
):
    make(out)
    before = tree(tmp_path)
    code, stdout, err = sample("a cat", *options)
    assert (code, stdout) == (6, "") and re.search(text, message(err))
    assert tree(tmp_path) == before


def test_a_place_that_cannot_be_written_is_told(mindalle_cli, not_loaded, tmp_path, tiny_model_folder):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    code, _, err = mindalle_cli("sample", "a cat", "--model", tiny_model_folder, "--out", out)
    assert code == 6
    assert message(err) == f"{out}: {tmp_path / 'file'} is not a folder that can be written to; name another place"


# Models that sample refuses


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (lambda m: shutil.rmtree(m), 4, r"no such folder, and no known name \(demo, minDALL-E/1.3B\)"),
        (lambda m: (m / "manifest.json").unlink(), 4, "not a checkpoint folder of the original"),
        (lambda m: (m / "manifest.json").write_text("{"), 4, "manifest.json: not a manifest"),
        (lambda m: (m / "config.yaml").unlink(), 3, "config.yaml: cannot be read"),
        (lambda m: (m / "config.yaml").write_text("stage2: {vocab_size: 5}"), 3, "unknown field stage2.vocab_size;"),
        (lambda m: (m / "stage2.safetensors").unlink(), 4, "stage2.safetensors: missing"),
        (lambda m: os.truncate(m / "stage1.safetensors", 9999), 4, "stage1.safetensors: truncated or damaged"),
        (lambda m: shutil.rmtree(m / "tokenizer"), 4, "bpe-16k-vocab.json: missing"),
        (lambda m: (m / "tokenizer" / MERGES_FILE).write_text("a b c\n"), 4, "line 1 is not a pair of tokens: 'a b c'"),
    ],
    ids=[
        "no folder", "no manifest", "bad manifest", "no config", "bad config", "no weights", "truncated",
        "no tokenizer", "bad merges",
    ],
)  # fmt: skip
def test_a_damaged_model_is_one_line(sample, tmp_path, tiny_model_folder, out, change, code, text):
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    change(model)
    got, stdout, err = sample("a cat", model=model)
    assert (got, stdout) == (code, "") and re.search(text, message(err))
    assert not out.exists()


def test_a_vqgan_alone_does_not_draw(sample, tmp_path, tiny_folder):
    shutil.copyfile(tiny_folder / "config.yaml", tmp_path / "config.yaml")
    shutil.copyfile(tiny_folder / "stage1_last.ckpt", tmp_path / "vqgan.ckpt")
    import_checkpoint(tmp_path / "vqgan.ckpt", tmp_path / "model")
    code, _, err = sample("a cat", model=tmp_path / "model")
    assert code == 4 and "holds a VQGAN only" in message(err)


def test_weights_that_overflow_are_an_error_and_no_picture(sample, tmp_path, tiny_folder, out):
    """Finite in the file, infinite when multiplied."""
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    edit_checkpoint(source / "stage2_last.ckpt", lambda t: t["head_img.weight"].fill(3e38))
    code, stdout, err = sample("a cat", model=source)
    assert (code, stdout) == (7, "")
    assert "mindalle sample: NaN or infinite logits at step 0 of candidate 0: the weights are damaged" in err
    assert not out.exists()


# Convert


def edit_checkpoint(path: Path, edit) -> None:
    """Rewrites a checkpoint after `edit(tensors)` has changed the dict of its tensors, or returned another."""
    with TorchArchive(path) as archive:
        tensors = {key: archive.read(ref) for key, ref in archive.state_dict().items()}
    result = edit(tensors)
    tensors = result if isinstance(result, dict) else tensors
    path.unlink()
    write_torch_archive(path, [(key, a.dtype, a.shape) for key, a in tensors.items()], tensors.__getitem__)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Code:
    """Makes a folder named `ran` beside the checkpoint, when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path.with_name("ran")),)


def hide_code(path: Path, among_tensors: bool) -> None:
    """In the place of the tensors, or beside them, where Lightning puts its state."""
    edit_checkpoint(path, lambda t: t)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    code = pickle.dumps(Code(path), 2)[2:-1]  # without its header and its end
    tree = members["archive/data.pkl"]
    members["archive/data.pkl"] = (
        b"\x80\x02}X\x0a\0\0\0state_dict" + code + b"s."
        if among_tensors
        else tree[:-1] + b"X\x09\0\0\0callbacks" + code + b"s."
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


STAGE2 = "stage2_last.ckpt"
DAMAGE = {
    "truncated": (lambda s: os.truncate(s / STAGE2, 50_000), 4, f"{STAGE2}: truncated or damaged"),
    "web page": (lambda s: (s / STAGE2).write_text("<!DOCTYPE html><p>Sign in"), 4, f"{STAGE2}: looks like a web page"),
    "empty": (lambda s: (s / STAGE2).write_bytes(b""), 4, f"{STAGE2}: is empty"),
    "flipped bit": (lambda s: flip_bit(s / STAGE2), 4, f"{STAGE2}: .*CRC does not match"),
    "wrong keys": (
        lambda s: edit_checkpoint(s / STAGE2, lambda t: {f"module.{k}": a for k, a in t.items()}),
        4,
        r"does not fit the stage2 of config.yaml, \d+ differences \(all keys start with 'module.'",
    ),
    "wrong shapes": (
        lambda s: edit_checkpoint(s / STAGE2, lambda t: t.update({"ln_f.bias": np.ones(31, np.float32)})),
        4,
        "1 differences:\n  shape       ln_f.bias is .31., the config says .32.",
    ),
    "other stage": (
        lambda s: shutil.copyfile(s / "stage1_last.ckpt", s / STAGE2), 4, r"\(this is a checkpoint of stage1\)"
    ),
    "NaN weights": (
        lambda s: edit_checkpoint(s / STAGE2, lambda t: t["ln_f.bias"].fill(np.nan)), 4, "ln_f.bias holds NaN"
    ),
    "pickled code": (lambda s: hide_code(s / STAGE2, True), 4, f"{STAGE2}: holds .* where a dict of tensors should be"),
    "no tokenizer": (lambda s: shutil.rmtree(s / "tokenizer"), 4, f"{VOCAB_FILE}: missing; the folder needs"),
    "vocabulary too large": (
        lambda s: (s / "tokenizer" / VOCAB_FILE).write_text(json.dumps({f"t{i}": i for i in range(111)})),
        4,
        "has ids up to 110, but the text embedding has 110 rows",
    ),
    "unknown field": (
        lambda s: (s / "config.yaml").write_text("stage2: {hparams: {n_layer: 2}}"),
        3,
        "unknown field stage2.hparams.n_layer; did you mean n_layers",
    ),
    "no config": (lambda s: (s / "config.yaml").unlink(), 3, "config.yaml: missing; put it beside the weights"),
    "no source": (lambda s: shutil.rmtree(s), 4, "source: no such file or folder"),
    "one stage": (lambda s: (s / STAGE2).unlink(), 4, f"{STAGE2} missing; the folder needs both stages"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_source_is_told_and_leaves_nothing(mindalle_cli, tmp_path, tiny_folder, damage):
    change, code, text = DAMAGE[damage]
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    change(source)
    before = tree(tmp_path)
    got, stdout, err = mindalle_cli("convert", source, tmp_path / "deep" / "target")
    assert (got, stdout) == (code, "")
    (start,) = re.finditer("^mindalle convert: ", err, re.MULTILINE)  # after the progress, where there was some
    told = err[start.start() :]
    assert re.search(text, told) and str(source) in told
    assert told.count("\n") == 1 or "differences" in told.splitlines()[0]
    assert tree(tmp_path) == before, "something was left behind, or code in the file was run"


def test_code_beside_the_weights_is_ignored(mindalle_cli, tmp_path, tiny_folder):
    """pickle.load would run it; that is what the file is made for."""
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    hide_code(source / STAGE2, False)
    assert mindalle_cli("convert", source, tmp_path / "a")[0] == 0
    assert not (source / "ran").exists()
    with zipfile.ZipFile(source / STAGE2) as archive, archive.open("archive/data.pkl") as file:
        Naive(file).load()
    assert (source / "ran").exists(), "the file is harmless, and this test proves nothing"


class Naive(pickle.Unpickler):
    """Does what it is told, but for tensors."""

    def persistent_load(self, _):
        return None

    def find_class(self, module, name):
        return (lambda *_: None) if module.startswith("torch") else super().find_class(module, name)


def test_convert_and_back(mindalle_cli, tmp_path, tiny_folder):
    code, stdout, err = mindalle_cli("convert", tiny_folder, tmp_path / "a")
    assert code == 0 and stdout.startswith(f"{tmp_path / 'a'}: ") and stdout.count("\n") == 1
    assert "converting: 100%" in err and "verifying: 100%" in err
    assert mindalle_cli("convert", tmp_path / "a", tmp_path / "b", "--to", "torch")[0] == 0
    assert mindalle_cli("convert", tmp_path / "b", tmp_path / "c")[0] == 0
    assert (tmp_path / "a" / "stage2.safetensors").read_bytes() == (tmp_path / "c" / "stage2.safetensors").read_bytes()


def test_convert_takes_the_config_from_elsewhere(mindalle_cli, tmp_path, tiny_folder):
    shutil.copyfile(tiny_folder / "stage1_last.ckpt", tmp_path / "vqgan.ckpt")
    assert mindalle_cli("convert", tmp_path / "vqgan.ckpt", tmp_path / "a")[0] == 4  # not the published VQGAN
    arguments = ["convert", tmp_path / "vqgan.ckpt", tmp_path / "a", "--config", tiny_folder / "config.yaml"]
    assert mindalle_cli(*arguments)[0] == 0


def test_convert_to_a_place_that_is_taken(mindalle_cli, tmp_path, tiny_folder, tiny_model_folder):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("mine")
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    before = tree(tmp_path)
    code, _, err = mindalle_cli("convert", tiny_folder, tmp_path / "model")
    assert code == 6 and message(err, "convert").endswith(
        "exists already; name another place or pass --overwrite to replace it"
    )
    code, _, err = mindalle_cli("convert", tiny_folder, tmp_path / "documents", "--overwrite")
    assert code == 6 and "--overwrite does not replace it" in message(err, "convert")
    assert tree(tmp_path) == before
    assert mindalle_cli("convert", tiny_folder, tmp_path / "model", "--overwrite")[0] == 0


def test_the_target_is_looked_at_before_anything_is_downloaded(mindalle_cli, tmp_path, monkeypatch):
    from mindalle_jax.hub import download

    monkeypatch.setattr(download, "fetch_release", lambda *_, **__: pytest.fail("5 GB were downloaded"))
    code, _, err = mindalle_cli("convert", "minDALL-E/1.3B", tmp_path)
    assert code == 6 and "exists already" in message(err, "convert")


def test_a_download_that_fails_is_told(mindalle_cli, tmp_path):
    arguments = ["convert", "minDALL-E/1.3B", tmp_path / "a", "--download-from", tmp_path / "missing.tar.gz"]
    code, _, err = mindalle_cli(*arguments)
    assert code == 5 and "missing.tar.gz': no such file" in message(err, "convert")
    assert not (tmp_path / "a").exists()


def test_download_from_goes_with_a_name(mindalle_cli, tmp_path, tiny_folder):
    code, _, err = mindalle_cli("convert", tiny_folder, tmp_path / "a", "--download-from", "x.tar.gz")
    assert code == 2 and "--download-from goes with a name to download (minDALL-E/1.3B)" in message(err, "convert")


# Whatever the verb


@pytest.mark.parametrize("verb", ["sample", "convert"])
def test_an_interruption_is_exit_code_130(sample, mindalle_cli, monkeypatch, tmp_path, tiny_folder, verb):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Dalle, "stream", interrupt)
    monkeypatch.setattr(mindalle, "write_weights", interrupt)
    code, stdout, err = sample("a cat") if verb == "sample" else mindalle_cli("convert", tiny_folder, tmp_path / "a")
    assert (code, stdout) == (130, "") and err.splitlines()[-1] == f"mindalle {verb}: interrupted"
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error", "/some/file"), errors.MindalleError("said so")],
    ids=["OSError", "MindalleError"],
)
def test_an_error_without_a_code_of_its_own_is_1(mindalle_cli, monkeypatch, tmp_path, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(mindalle, "import_checkpoint", fail)
    code, _, err = mindalle_cli("convert", "x", tmp_path / "a")
    assert code == 1 and message(err, "convert") == str(error)


def test_the_process_keeps_its_own_warnings(sample):
    """main() may be called from a program, which has its own way to show them."""
    import warnings

    before = warnings.showwarning
    assert sample("")[0] == 2
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ([], ["sample", "convert"]),
        (
            ["sample"],
            ["--prompts-file", "N images per prompt (default: 16)", "(default: 256, or all codes", "(default: off)",
             "the lowest id on a tie (default: 1.0)", "random draws one and reports it (default: 0)",
             "(default: float32 on CPU, bfloat16 elsewhere)"],
        ),
        (["convert"], ["SRC", "DST", "the format to make (default: jax)"]),
    ],
    ids=["mindalle", "sample", "convert"],
)  # fmt: skip
def test_help_shows_the_defaults(mindalle_cli, arguments, texts):
    code, stdout, err = mindalle_cli(*arguments, "--help")
    text = " ".join(stdout.split())
    assert (code, err) == (0, "")
    assert [part for part in texts if part not in text] == []
    assert "default: None" not in text and "default: False" not in text


# As processes


def python(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def test_the_command_in_a_process(tmp_path, tiny_folder):
    (tmp_path / "out").write_text("taken")
    done = python("-m", "mindalle_jax", "sample", "a cat", "--model", "x", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (6, "")
    out = tmp_path / "out"
    assert message(done.stderr) == f"{out}: {out} is not a folder that can be written to; name another place"


def test_the_conversion_script_does_the_same(tmp_path, tiny_folder, tiny_model_folder):
    done = python("-m", "convert.mindalle", tiny_folder, tmp_path / "a")
    assert done.returncode == 0 and done.stdout.startswith(f"{tmp_path / 'a'}: ")
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "a", tiny_model_folder)]
    assert manifests[0] == manifests[1]


def test_ctrl_c_in_a_process(tmp_path):
    """A named pipe as prompts file: the command waits in it for as long as the test likes."""
    pipe = tmp_path / "prompts"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "mindalle_jax", "sample", "--model", "x", "--out", str(tmp_path / "out")]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    child = subprocess.Popen([*command, "--prompts-file", str(pipe)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with open(pipe, "w"):  # returns when the child has opened it too
        child.send_signal(signal.SIGINT)
    # Closed before waiting: a signal that came just before the child began to read waits for the read to return.
    _, err = child.communicate(timeout=60)
    assert (child.returncode, message(err)) == (130, "interrupted")


# The documentation


def test_the_table_of_exit_codes_is_errors_py():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\w*) ?\| (.+) \|$", text, re.MULTILINE)
    classes = [errors.MindalleError, *errors.MindalleError.__subclasses__()]
    expected = {cls.exit_code: cls.__name__ for cls in classes} | {0: "", 130: ""}
    assert len(expected) == len(classes) + 2, "two errors have the same code"
    assert [(int(code), name) for code, name, _ in rows] == sorted(expected.items())


def test_the_table_of_what_may_change_in_a_run_is_the_loops():
    from mindalle_jax.training.run_dir import FREE_FIELDS

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(data|experiment|training|sharding)` \| (.+) \|$", text, re.MULTILINE)
    fields = [f"{section}.{name}" for section, names in rows for name in re.findall(r"`(\w+)`", names)]
    assert sorted([*fields, "sharding"]) == sorted(FREE_FIELDS) and ("sharding", "all") in rows


def test_the_examples_of_the_documentation_are_commands():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert {command[1] for command in commands} == {
        "sample", "finetune", "train-tokenizer", "train-vqgan", "train-clip", "prepare-codes", "convert"
    }  # fmt: skip
    for command in commands:
        assert command[0] == "mindalle"
        cli._parser().parse_args(command[1:])  # exits where it does not parse


@pytest.mark.parametrize("module", ["optax", "orbax.checkpoint", "grain"])
def test_a_missing_extra_is_one_sentence(capsys, module):
    def train():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    assert cli.run_reporting("mindalle finetune", train) == 2
    told = f"mindalle finetune: needs {module.split('.')[0]}: pip install 'mindalle-jax[train]'\n"
    assert capsys.readouterr().err == told


def test_a_missing_module_of_another_kind_is_a_fault_of_ours():
    def train():
        raise ModuleNotFoundError("No module named 'mindalle_jax.none'", name="mindalle_jax.none")

    with pytest.raises(ModuleNotFoundError):
        cli.run_reporting("mindalle finetune", train)
