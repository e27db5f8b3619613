"""What `mindalle sample` refuses: one line, an exit code, and nothing written."""

import os
import re
import shutil
from pathlib import Path

import jax
import pytest
from commands import edit_checkpoint, message, tree
from PIL import Image

from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.sampling import generate
from mindalle_jax.text.tokenizer import MERGES_FILE

# Arguments, before weights are loaded


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([""], "a prompt is blank"),
        ([" \t\n"], "a prompt is blank"),
        (["a cat", ""], "a prompt is blank"),
        (["x" * 10_000], r"has 10,000 characters; the limit is 2,000"),
        (["a cat", "x" * 1_000_000], r"has 1,000,000 characters; the limit is 2,000"),
        (["a\0cat"], r"the prompt 'a\\x00cat' holds a NUL character"),
        (["a \udc80 cat"], r"the prompt 'a \\udc80 cat' is not valid text: lone surrogate at character 2"),
        ([], "no prompt was given; write one in quotes, or name a file with --prompts-file"),
        (["a cat", "--class-id", 3], "samples from prompts; --class and --class-id are for image-only models"),
        (["a cat", "--class", "cat"], "samples from prompts; --class and --class-id are for image-only models"),
        (["a cat", "--top-k", 0], r"--top-k must be an integer in \[1, 80\] .*not 0$"),
        (["a cat", "--top-k", -1], r"--top-k must be an integer in \[1, 80\] .*not -1$"),
        (["a cat", "--top-k", 81], r"--top-k must be an integer in \[1, 80\] \(the number of codes\).*not 81$"),
        (["a cat", "--top-k", 256], "not 256$"),  # the default, when somebody asks for it
        (["a cat", "--top-p", 0], r"--top-p must be a number in \(0, 1\], or off; not 0.0"),
        (["a cat", "--top-p", -1], r"--top-p must be a number in \(0, 1\], or off; not -1.0"),
        (["a cat", "--top-p", "nan"], r"--top-p must be a number in \(0, 1\], or off; not nan"),
        (["a cat", "--top-p", 2], r"--top-p must be a number in \(0, 1\], or off; not 2.0"),
        (["a cat", "--temperature", -1], "--temperature must be a finite number > 0, or 0 for greedy; not -1.0"),
        (["a cat", "--temperature", "inf"], "--temperature must be a finite number > 0, or 0 for greedy; not inf"),
        (["a cat", "--temperature", "nan"], "--temperature must be a finite number > 0, or 0 for greedy; not nan"),
        (["a cat", "--num-candidates", 0], r"--num-candidates must be an integer in \[1, 1000\], not 0"),
        (["a cat", "--num-candidates", -1], r"--num-candidates must be an integer in \[1, 1000\], not -1"),
        (["a cat", "--num-candidates", 1_000_000], r"--num-candidates must be an integer in \[1, 1000\], not 1000000"),
        (["a cat", "--seed", -1], r"--seed must be an integer in \[0, 4294967296\), or random; not -1"),
        (["a cat", "--seed", 2**32 + 5], r"--seed must be an integer in \[0, 4294967296\), or random; not 4294967301"),
        (["a cat", "--seed", "1.5"], r"--seed must be an integer in \[0, 4294967296\), or random; not '1.5'"),
        (["a cat", "--batch-size", 0], r"--batch-size must be an integer in \[1, 4096\], not 0"),
        (["a cat", "--batch-size", -8], r"--batch-size must be an integer in \[1, 4096\], not -8"),
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
        (["--num-candidates", "1e3"], "argument -n/--num-candidates: invalid int value: '1e3'"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--topk", "5"], "unknown option --topk; did you mean --top-k?"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_no_number_or_option_is_a_usage_error(sample, not_loaded, arguments, text):
    code, stdout, err = sample("a cat", *arguments)
    assert (code, stdout) == (2, "") and text in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--image", "{dir}/good.png"], "--image needs --keep-rows, the number of rows of codes to keep from the top"),
        (["--keep-rows", "3"], "--keep-rows works only with --image or --vary"),
        (["--image", "{dir}/good.png", "--vary", "{dir}/good.png", "--keep-rows", "3"], "cannot be used together"),
        (["--image", "{dir}/good.png", "--keep-rows", "0"], "--keep-rows must be an integer in [1, 7]"),
        (["--image", "{dir}/good.png", "--keep-rows", "8"], "--keep-rows must be an integer in [1, 7]"),
        (
            ["--image", "{dir}/large.png", "--keep-rows", "3"],
            "large.png: the image is 64 x 48 pixels; this model knows",
        ),
        (["--image", "{dir}/grey.png", "--keep-rows", "3"], "grey.png: the image has the mode L; convert it to RGB"),
        (["--image", "{dir}/clear.png", "--keep-rows", "3"], "clear.png: the image has the mode RGBA; convert it"),
        (["--image", "{dir}/cut.png", "--keep-rows", "3"], "cut.png: cannot be read as PNG, JPEG or WebP"),
        (["--image", "{dir}/page.png", "--keep-rows", "3"], "page.png: cannot be read as PNG, JPEG or WebP"),
        (["--image", "{dir}/a.gif", "--keep-rows", "3"], "a.gif: cannot be read as PNG, JPEG or WebP"),
        (["--image", "{dir}/none.png", "--keep-rows", "3"], "none.png: no such file"),
        (["--image", "{dir}", "--keep-rows", "3"], "cannot be read as PNG, JPEG or WebP"),
        (["--vary", "{dir}/good.png", "--keep-rows", "3"], "good.png: has no record of how it was made"),
        (["--best", "0"], "--best must be at least 1, not 0"),
        (["--guidance-scale", "-1"], "--guidance-scale must be a finite number >= 0"),
        (["--guidance-scale", "nan"], "--guidance-scale must be a finite number >= 0"),
        (["--preview-every", "3"], "--preview-every must be a multiple of 8 codes"),
        (["--preview-every", "0"], "--preview-every must be a multiple of 8 codes"),
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


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a cat"], "samples without text; it takes no prompt, only --class or --class-id if it has classes"),
        (["a cat", "--class-id", 3], "samples without text; it takes no prompt, only --class or --class-id"),
        ([], r"this model is class-conditional: name a class in \[0, 5\)"),
        (["--class-id", 5], r"classes must lie in \[0, 5\), not \[5, 5\]"),
        (["--class-id", -1], r"classes must lie in \[0, 5\), not \[-1, -1\]"),
        (["--class-id", 2**70], "class"),
        (["--class", "cat"], "the classes of this model have no names; name one by its number, not 'cat'"),
        (["--class", "cat", "--class-id", 3], "--class and --class-id cannot be used together"),
    ],
    ids=["prompt", "prompt and class", "no class", "over", "negative", "huge", "named", "two"],
)
def test_a_class_that_does_not_work_is_told(sample, not_loaded, out, tiny_igpt_model_folder, arguments, text):
    code, stdout, err = sample(*arguments, model=tiny_igpt_model_folder)
    assert (code, stdout) == (2, "") and re.search(text, message(err))
    assert not out.exists()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: path.write_bytes("une tête".encode("latin-1")), "cannot be read as UTF-8 text: 'utf-8' codec"),
        (lambda path: path.write_bytes("a cat".encode("utf-16")), "cannot be read as UTF-8 text"),
        (lambda path: path.write_text("\n \n"), "prompts.txt: holds no prompt"),
        (lambda path: path.mkdir(), "cannot be read as UTF-8 text: .*directory"),
        (lambda path: None, "prompts.txt: no such file"),
        (lambda path: path.write_bytes(b"a cat\na\0dog\n"), "holds a NUL character"),
    ],
    ids=["latin-1", "utf-16", "blank", "folder", "missing", "NUL"],
)
def test_a_prompts_file_that_cannot_be_used_is_told(sample, not_loaded, tmp_path, make, text):
    make(tmp_path / "prompts.txt")
    code, _, err = sample("--prompts-file", tmp_path / "prompts.txt")
    assert code == 2 and re.search(text, message(err))


# Places to write to


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", "dmeo"], "dmeo: no such folder"),
        (["--ranker", "likelyhood"], "likelyhood: no such file or folder"),
        (["--image", "none.png", "--keep-rows", 3], "none.png: no such file"),
        (["--vary", "none.png", "--keep-rows", 3], "none.png: no such file"),
        (["--top-k", 0], "--top-k must be"),
    ],
    ids=["model", "ranker", "image", "vary", "option"],
)
def test_what_is_wrong_with_the_request_is_told_before_the_place(sample, not_loaded, out, options, text):
    """Who mends the place first would have to mend the request after that."""
    out.mkdir()
    (out / "mine.txt").touch()
    assert text in message(sample("a cat", *options)[2])
    assert "exists and is not empty" in message(sample("a cat")[2])


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (lambda out: (out.mkdir(), (out / "old.txt").touch()), [], "exists and is not empty; .* or pass --overwrite"),
        (lambda out: out.write_text("mine"), [], "is not a folder that can be written to; name another folder"),
        (
            lambda out: out.write_text("mine"),
            ["--overwrite"],
            "is not a folder that can be written to; name another folder",
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
    assert message(err) == f"{out}: {tmp_path / 'file'} is not a folder that can be written to; name another folder"


# Models


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (lambda m: shutil.rmtree(m), 4, r"no such folder, and no known name \(demo, demo-scenes, minDALL-E/1.3B\)"),
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


def test_weights_that_overflow_are_an_error_and_no_image(sample, tmp_path, tiny_folder, out):
    """Finite in the file, infinite when multiplied."""
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    edit_checkpoint(source / "stage2_last.ckpt", lambda t: t["head_img.weight"].fill(3e38))
    code, stdout, err = sample("a cat", model=source)
    assert (code, stdout) == (7, "")
    assert "mindalle sample: NaN or infinite logits at step 0 of candidate 0: the weights are damaged" in err
    assert not out.exists()


def test_out_of_memory_is_exit_code_8(sample, monkeypatch, tmp_path):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.")

    monkeypatch.setattr(generate, "start_decode", exhausted)
    code, stdout, err = sample("a cat", "--batch-size", 2)
    assert (code, stdout) == (8, "") and "try --batch-size 1 " in err.splitlines()[-1]
    assert tree(tmp_path) == []
