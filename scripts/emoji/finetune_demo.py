"""Fine-tunes demo on 200 captioned emoji that it does not know, in minutes on a CPU, and samples before and after.

    python -m scripts.emoji.finetune_demo --out DIR

DIR/packages has the package of Noto Emoji, which npm fetches; DIR/images the images with their captions; DIR/run the
run of `mindalle finetune`, and in the end the model. DIR/sheet.png shows, of each prompt, the image of training, a
sample before and a sample after. DIR/metrics.json says how often the nearest of the 200 images to a sample is the one
that was asked for. If it is interrupted, the same command resumes it.
"""

import argparse
import io
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mindalle_jax import Dalle
from mindalle_jax.cli import run_reporting
from mindalle_jax.cli.parser import HelpFormatter, path
from mindalle_jax.errors import DataError
from mindalle_jax.storage.files import DEMO, IN_PACKAGE, new_folder
from mindalle_jax.text.known_words import KnownWords, read_known_words
from scripts.emoji.packages import NOTO, fetch_packages, read_members
from scripts.emoji.things import LEFT_OUT, NEAR, SIDE
from scripts.recipe import run, write_metrics, write_sheet

PRESET = "finetune-demo"
FACES = "Smileys & Emotion"
"""A category that is left out too: its images are nearly the same, and differ in a mouth or an eye."""
NUM_IMAGES, NUM_PROMPTS = 200, 50
SHOWN, COLUMNS = 16, 8
"""Prompts on the sheet, and images in a row."""


class Emoji(NamedTuple):
    """One captioned image."""

    name: str
    pixels: np.ndarray
    """uint8[SIDE, SIDE, 3], on white."""

    @property
    def caption(self) -> str:
        """The caption of training, which is also the prompt."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


def main(arguments: argparse.Namespace) -> None:
    """Writes the images, checks them, samples, runs `mindalle finetune`, and samples again."""
    out = arguments.out
    fetch_packages(out / "packages", [NOTO])
    emoji = read_emoji(out / "packages" / NOTO.archive)
    if not (out / "images").exists():
        write_images(emoji, out / "images")
    run("check-data", out / "images", "--model", DEMO)

    prompts = emoji[:: len(emoji) // NUM_PROMPTS][:NUM_PROMPTS]
    before = sample(Dalle.from_pretrained(DEMO), prompts)
    start = time.perf_counter()
    run("finetune", "--config", PRESET, f"data.train={out}/images", "--out", out / "run", *arguments.overrides)
    seconds = time.perf_counter() - start
    after = sample(Dalle.from_pretrained(out / "run"), prompts)

    summary = json.loads((out / "run" / "summary.json").read_text(encoding="utf-8"))
    metrics: dict[str, Any] = {
        "seconds of mindalle finetune": round(seconds),
        "first loss": summary["first_loss"],
        "last loss": summary["last_loss"],
        "prompts": len(prompts),
        "nearest image is the one asked for, before": share_right(before, prompts, emoji),
        "nearest image is the one asked for, after": share_right(after, prompts, emoji),
    }
    shown = [one.pixels for one in prompts], before, after
    rows = [images[at : at + COLUMNS] for at in range(0, SHOWN, COLUMNS) for images in shown]
    write_sheet(np.concatenate(rows), out / "sheet.png", COLUMNS)
    write_metrics(out / "metrics.json", metrics)


def read_emoji(archive: Path) -> list[Emoji]:
    """Returns the NUM_IMAGES first emoji, in the order of Unicode, that differ and whose name demo does not know."""
    known = read_known_words(IN_PACKAGE[DEMO] / "tokenizer")
    assert known is not None  # demo has a list of words
    entries = json.loads(read_members(archive, ["emoji.json"])[0])
    rows = [row for row in sorted(entries, key=lambda row: row["sort_order"]) if _is_new(row, known)]
    files = read_members(archive, [f"img/google/64/{row['image']}" for row in rows])
    emoji: list[Emoji] = []
    limit = 255**2 * 10 ** (-NEAR / 10)
    for row, file in zip(rows, files, strict=True):
        pixels = _on_white(file)
        if all(((one.pixels.astype(np.float32) - pixels) ** 2).mean() > limit for one in emoji):
            emoji.append(Emoji(_name(row), pixels))
    if len(emoji) < NUM_IMAGES:
        raise DataError(f"{archive}: only {len(emoji)} of its images can be used")
    return emoji[:NUM_IMAGES]


def _is_new(row: dict[str, Any], known: KnownWords) -> bool:
    name = _name(row)
    usable = row["has_img_google"] and row["category"] not in {*LEFT_OUT, FACES} and re.fullmatch("[a-z ]+", name)
    return bool(usable) and known.warning(name, DEMO) is not None


def _name(row: dict[str, Any]) -> str:
    return row["short_names"][0].replace("_", " ").replace("-", " ")


def _on_white(file: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(file)).convert("RGBA").resize((SIDE, SIDE))
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def write_images(emoji: list[Emoji], folder: Path) -> None:
    """Writes the images and their captions into a new folder: 000.png, 000.txt, ..."""
    with new_folder(folder) as partial:
        for number, one in enumerate(emoji):
            Image.fromarray(one.pixels).save(partial / f"{number:03d}.png")
            (partial / f"{number:03d}.txt").write_text(f"{one.caption}\n", encoding="utf-8")


def sample(model: Dalle, emoji: list[Emoji]) -> np.ndarray:
    """Returns one image of each caption: uint8[n, SIDE, SIDE, 3]."""
    prompts = [one.caption for one in emoji]
    return model.generate(prompts, num_candidates=1, ranker=None, seed=0).images[:, 0]


def share_right(images: np.ndarray, asked: list[Emoji], emoji: list[Emoji]) -> float:
    """Returns the share of images uint8[n, ...] to which, of all emoji, the asked one is the nearest.

    Nearest is the lowest mean squared difference of pixels.
    """
    all_pixels = np.stack([one.pixels for one in emoji]).astype(np.float32)
    nearest = [int(((all_pixels - image) ** 2).mean((1, 2, 3)).argmin()) for image in images]
    return float(np.mean([emoji[index].name == one.name for index, one in zip(nearest, asked, strict=True)]))


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="where everything goes")
    text = "changes to the configuration, as optimizer.max_steps=100"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(run_reporting("finetune_demo.py", lambda: main(parser().parse_args())))
