"""`mindalle show`: what it prints, that its command makes the image again, and files of somebody who means harm."""

import dataclasses
import re
import shlex

import numpy as np
import pytest
from commands import message
from PIL import Image

from mindalle_jax.cli.show import remake_command
from mindalle_jax.sampling.image_file import read_image_record, write_image


def again(stdout: str) -> str:
    """The command that is printed, a line of its own, for one to copy."""
    (line,) = [line for line in stdout.splitlines() if line.startswith("mindalle sample ")]
    return line


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("the cat", []),
        ('cat\'s "do" & $H', ["--seed", 7, "--top-k", "off", "--top-p", 0.9, "--temperature", 0.8]),
        ("-cat", ["--guidance-scale", 2, "--batch-size", 2]),
        ("the cat", ["--quantize", "weights", "--jacobi"]),
        ("the cat", ["--mixed-batches", "--prompt", "a dog"]),
    ],
    ids=["plain", "odd prompt", "dash", "int8", "mixed"],
)
def test_the_command_makes_the_image_again(sample, mindalle_cli, out, tmp_path, prompt, options):
    assert sample("-n", 3, "--ranker", "likelihood", *options, "--", prompt)[0] == 0
    file = sorted(out.rglob("rank001*"))[-1]
    code, stdout, err = mindalle_cli("show", file)
    assert (code, err) == (0, "")
    words = shlex.split(again(stdout))
    assert words[0] == "mindalle"
    if "--mixed-batches" in options:  # of the last prompt, where a mode fills batches across prompts
        assert "--mixed-batches" in words
    assert mindalle_cli(*words[1:], "--out", tmp_path / "again")[0] == 0
    record = read_image_record(file)
    made = tmp_path / "again" / f"seed{record.seed}_candidate{record.candidate:03d}.png"
    np.testing.assert_array_equal(read_image_record(made).codes, record.codes)
    np.testing.assert_array_equal(np.asarray(Image.open(made)), np.asarray(Image.open(file)))


def test_a_completion_is_made_again_from_its_own_codes(sample, mindalle_cli, out, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    assert sample("a cat", "--image", tmp_path / "a.png", "--keep-rows", 3, "--seed", 2)[0] == 0
    file = out / "seed2_candidate001.png"
    words = shlex.split(again(mindalle_cli("show", file)[1]))
    assert mindalle_cli(*words[1:], "--out", tmp_path / "again")[0] == 0
    made = read_image_record(tmp_path / "again" / "seed2_candidate001.png")
    np.testing.assert_array_equal(made.codes, read_image_record(file).codes)


def test_a_class_is_made_again(sample, mindalle_cli, out, tmp_path, tiny_igpt_model_folder):
    assert sample("--class-id", 3, model=tiny_igpt_model_folder)[0] == 0
    words = shlex.split(again(mindalle_cli("show", out / "seed0_candidate001.png")[1]))
    assert mindalle_cli(*words[1:], "--out", tmp_path / "again")[0] == 0
    made = read_image_record(tmp_path / "again" / "seed0_candidate001.png")
    np.testing.assert_array_equal(made.codes, read_image_record(out / "seed0_candidate001.png").codes)


def test_what_is_shown(sample, mindalle_cli, out, tiny_dalle, tiny_model_folder):
    sample("a cat", "--ranker", "likelihood")
    file = sorted(out.glob("rank001*"))[0]
    stdout = mindalle_cli("show", file)[1]
    rows = dict(line.split(None, 1) for line in stdout.splitlines()[:-1])
    record = read_image_record(file)
    assert rows["file"] == str(file) and rows["prompt"] == "a cat"
    assert rows["seed"] == f"0, candidate {record.candidate}"
    assert rows["score"] == f"{record.score:.4f}, likelihood"
    assert rows["model"] == f"{tiny_model_folder}, sha256 {tiny_dalle._fingerprint}"
    assert rows["versions"].startswith("mindalle-jax ")
    assert mindalle_cli("show", file, file)[1] == 2 * stdout


def test_an_image_of_a_blank_prompt_has_no_command(mindalle_cli, tiny_dalle, tmp_path):
    (file,) = tiny_dalle.generate("", num_candidates=1, allow_empty=True).save(tmp_path / "out")
    code, stdout, _ = mindalle_cli("show", file)
    assert code == 0 and stdout.splitlines()[-1].startswith(
        "# no command: a blank prompt can be sampled only from Python"
    )


def test_a_hostile_file_reaches_neither_terminal_nor_shell(sample, mindalle_cli, out, tmp_path):
    """Control characters are commands to a terminal, and what is printed is pasted into a shell."""
    sample("a cat")
    record = read_image_record(out / "seed0_candidate000.png")
    prompt, model = "\x1b]0;owned\x07'; touch owned; '\n$(touch owned)", "demo; touch owned\n"
    evil = dataclasses.replace(record, prompt=prompt, settings=record.settings | {"model": model, "device": "\x1b[2J"})
    write_image(tmp_path / "evil.png", np.zeros((32, 32, 3), np.uint8), evil)
    code, stdout, _ = mindalle_cli("show", tmp_path / "evil.png")
    assert code == 0 and all(line.isprintable() for line in stdout.splitlines())
    assert "'demo; touch owned" not in again(stdout).replace("$'demo; touch owned\\x0a'", "")
    assert again(stdout).startswith("mindalle sample $'\\x1b]0;owned\\x07\\x27; touch owned; \\x27\\x0a$(touch owned)'")
    assert again(stdout).count("'") % 2 == 0  # each word is one pair of quotes in any shell


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": "5; touch owned"},
        {"top_p": 2},
        {"temperature": "1"},
        {"batch_size": 0},
        {"jacobi": "yes"},
        {"dtype": "$(touch owned)"},
        {"quantize": "all"},
        {"keep_rows": "3"},
        {"model": 5},
        {"model": "\ud800"},
        {"class_id": "abc"},
        {"class_id": [1]},
        {"class_id": float("inf")},
        {"temperature": 10**400},
        {"guidance_scale": 10**400},
        {"top_k": 10**300},
        {"revision": {"a": 1}},
        {"keep_rows": -5},
    ],
    ids=str,
)
def test_damaged_settings_are_told(sample, mindalle_cli, out, tmp_path, change):
    sample("a cat", "--overwrite")
    record = read_image_record(out / "seed0_candidate000.png")
    write_image(tmp_path / "a.png", np.zeros((32, 32, 3), np.uint8), record)
    assert remake_command(record, tmp_path / "a.png").startswith("mindalle sample 'a cat' --model ")
    bad = dataclasses.replace(record, settings=record.settings | change)
    write_image(tmp_path / "a.png", np.zeros((32, 32, 3), np.uint8), bad)
    code, _, err = mindalle_cli("show", tmp_path / "a.png")
    assert code == 2 and re.search("a.png: its (settings are|record is) damaged: ", message(err, "show"))
