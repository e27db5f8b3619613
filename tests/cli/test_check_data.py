"""`mindalle check-data`: facts on standard output, one per line; the task is found out."""

import pytest
from commands import message
from image_folders import fill
from PIL import Image


def test_facts_and_a_sheet(mindalle_cli, tmp_path, tiny_model_folder):
    fill(tmp_path / "photos", a_jpg=None, a_txt="the cat", b_jpg=None, b_txt="バ")
    sheet = tmp_path / "sheet.png"
    arguments = ("check-data", tmp_path / "photos", "--model", tiny_model_folder, "--sheet", sheet)
    code, stdout, err = mindalle_cli(*arguments)
    assert (code, err) == (0, "")
    assert stdout.splitlines() == [
        "task: text",
        "layout: images with caption files beside them",
        "2 samples",
        "images: 2 .jpg",
        "captions: 2, 1 per sample",
        "warning: 1 of 2 captions (50.0%) have characters or words that the tokenizer does not know, such as 'バ'",
        "readable: 2 images, 16 to 16 pixels wide and 16 to 16 high",
        f"sheet: {sheet}",
    ]
    with Image.open(sheet) as image:
        assert image.format == "PNG"
    code, _, err = mindalle_cli(*arguments)
    assert code == 6 and message(err, "check-data") == f"{sheet} exists; name another file or pass --overwrite"
    assert mindalle_cli(*arguments, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("files", "task"),
    [({"a_jpg": None, "a_txt": "x"}, "text"), ({"c__a_jpg": None}, "class"), ({"a_jpg": None}, "unconditional")],
)
def test_the_task_is_the_first_that_fits(mindalle_cli, tmp_path, files, task):
    fill(tmp_path, **files)
    assert mindalle_cli("check-data", tmp_path)[1].startswith(f"task: {task}\n")


def test_the_task_of_a_model(mindalle_cli, tmp_path, tiny_igpt_model_folder):
    fill(tmp_path, cat__a_jpg=None, cat__a_txt="x")
    assert mindalle_cli("check-data", tmp_path, "-m", tiny_igpt_model_folder)[1].startswith("task: class\n")


def test_columns_and_splits(mindalle_cli, tmp_path):
    fill(tmp_path / "train", metadata_csv="file_name,text,alt\na.jpg,cat,a cat\n", a_jpg=None)
    fill(tmp_path / "val", b_jpg=None, b_txt="a dog\ndogs")
    assert "captions: 2, 2 per sample" in mindalle_cli("check-data", tmp_path, "--valid")[1]
    assert mindalle_cli("check-data", tmp_path, "--caption-column", "alt")[0] == 0
    code, _, err = mindalle_cli("check-data", tmp_path, "--caption-column", "alta", "--task", "text")
    assert code == 9 and "there is no 'alta', only file_name, text, alt; did you mean alt?" in message(
        err, "check-data"
    )


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, "nothing to train on for the task 'text': 0 samples"),
        ({"a_jpg": b"x"}, "none of the 1 images can be read"),
        ({"0_tar_gz": b"x"}, "holds 1 .tar.gz files, which are not read; unpack them: gunzip -k "),
    ],
    ids=["empty", "damaged", "compressed"],
)
def test_nothing_to_train_on_is_an_error(mindalle_cli, tmp_path, files, text):
    fill(tmp_path, **files)
    code, _, err = mindalle_cli("check-data", tmp_path)
    assert code == 9 and text in message(err, "check-data")


def test_a_sheet_is_a_png(mindalle_cli, tmp_path):
    fill(tmp_path, a_jpg=None)
    code, _, err = mindalle_cli("check-data", tmp_path, "--sheet", tmp_path / "sheet.jpg")
    assert code == 2 and "--sheet must be the name of a .png" in message(err, "check-data")
