"""Pictures and captions as people have them, given to `mindalle finetune`: what is used, left out, counted and said."""

import io
import logging
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_runs import metrics, write_config, write_pictures

from mindalle_jax import cli

UPDATES = {"max_steps": 3, "base_lr": 1e-3}


@pytest.fixture
def finetune(tmp_path, tiny_model_folder, capsys):
    """finetune(data, **sections) -> (exit code, standard error, folder of the run)."""

    def run(data: Path, /, **sections) -> tuple[int, str, Path]:
        config = write_config(tmp_path / "run.yaml", tiny_model_folder, data, **{"optimizer": UPDATES} | sections)
        code = cli.main(["finetune", "--config", str(config), "--out", str(tmp_path / "out")])
        stdout, err = capsys.readouterr()
        assert "Traceback" not in err and bool(stdout) == (code == 0)
        return code, err, tmp_path / "out"

    return run


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twelve sound pictures with captions."""
    return write_pictures(tmp_path / "photos", 12)


def add(folder: Path, name: str, image: Image.Image, caption: str = "a cat", **options) -> None:
    image.save(folder / name, **options)
    (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 13,000 x 13,000 pixels."""
    buffer = io.BytesIO()
    Image.new("L", (16, 16)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = (13_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_every_mode_of_picture_trains(finetune, photos):
    """Grey, CMYK, palette, alpha, 16 bits, rotated, oblong: none is damaged, none is left out."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (48, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    add(photos, "grey.png", colour.convert("L"))
    add(photos, "cmyk.jpg", colour.convert("CMYK"))
    add(photos, "palette.png", colour.convert("P"))
    add(photos, "la.png", colour.convert("LA"))
    add(photos, "rgba.png", Image.merge("RGBA", [*colour.split(), Image.new("L", colour.size, 0)]))
    add(photos, "deep.png", Image.fromarray(rng.integers(0, 65536, (40, 40), np.uint16)))
    add(photos, "turned.jpg", colour, exif=exif)
    add(photos, "wide.webp", colour.resize((300, 33)))
    code, err, out = finetune(photos, experiment={"local_batch_size": 1, "total_batch_size": 16})
    assert code == 0 and "20 samples\n" in err and "3 steps of 16" in err
    lines = metrics(out)
    assert [line["bad_images"] for line in lines] == [0, 0, 0] and all(line["loss"] > 0 for line in lines)


def test_a_few_that_cannot_be_read_are_replaced_counted_and_named(finetune, photos, caplog):
    add(photos, "speck.png", Image.new("RGB", (1, 1)))
    (photos / "000.png").write_bytes((photos / "000.png").read_bytes()[:60])
    (photos / "001.png").write_bytes(bomb())
    with caplog.at_level(logging.WARNING, "mindalle_jax"):
        code, err, out = finetune(photos)
    assert code == 0 and "13 samples" in err
    assert metrics(out)[-1]["bad_images"] == 3 and all(line["skipped"] == 0 for line in metrics(out))
    said = "\n".join(record.getMessage() for record in caplog.records)
    for name, reason in (("000.png", "damaged"), ("001.png", "too many pixels"), ("speck.png", "1 x 1 pixels")):
        lines = {line for line in said.splitlines() if f"left out: {name}: " in line}
        assert all(line.startswith(f"{photos}: ") and reason in line for line in lines) and len(lines) == 1


def test_too_many_that_cannot_be_read_end_the_run(finetune, photos):
    for path in sorted(photos.glob("*.png"))[:4]:
        path.write_bytes(b"<html>404 not found</html>")
    code, err, out = finetune(photos)
    assert code == 9
    last = err.rstrip().splitlines()[-1]
    assert (
        last.startswith(f"mindalle finetune: {photos}: 4 of the ") and "cannot be read, over 5%; the last one: " in last
    )
    assert not (out / "manifest.json").exists()


def test_what_lacks_a_caption_is_left_out_and_said(finetune, photos):
    (photos / "000.txt").unlink()
    (photos / "001.txt").write_text(" \n\n")
    (photos / "002.png").rename(photos / "002.gif")
    code, err, _ = finetune(photos)
    assert code == 0
    assert (
        "9 samples; left out: 1 without a caption (first: '000.png'), 1 with an empty caption (first: '001.png'), "
        "1 in a format other than JPEG, PNG and WebP (first: '002.gif'), 1 captions without an image" in err
    )


@pytest.mark.parametrize(
    ("left", "expected", "message"),
    [
        (
            "nothing",
            9,
            "nothing to train on for the task 'text': 0 samples; left out: 12 without a caption (first: '000.png')",
        ),
        ("five", 3, "8 devices share a batch, and the data has 5 samples; left out: 7 without a caption"),
    ],
)
def test_too_few_with_a_caption(finetune, photos, left, expected, message):
    for path in sorted(photos.glob("*.txt"))[5 if left == "five" else 0 :]:
        path.unlink()
    code, err, out = finetune(photos)
    assert code == expected and message in err.rstrip().splitlines()[-1]
    assert not out.exists()


def test_a_validation_set_without_samples(finetune, photos, tmp_path):
    (tmp_path / "valid").mkdir()
    code, err, out = finetune(photos, data={"valid": str(tmp_path / "valid")})
    assert code == 9 and str(tmp_path / "valid") in err.rstrip().splitlines()[-1] and not out.exists()
