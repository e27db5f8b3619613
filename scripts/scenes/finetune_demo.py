"""Fine-tunes the model in the package in minutes on CPU, and draws with it before and after.

    python -m scripts.scenes.finetune_demo --kind captions --out DIR

DIR/pictures is what it learns from, DIR/run the run of `mindalle finetune` and in the end the model, DIR/before.png and
DIR/after.png what it draws. Every part goes on where it was interrupted when the same command is given again.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindalle_jax import Dalle, ImageGPT
from mindalle_jax.cli import main as mindalle
from mindalle_jax.cli import run_reporting
from mindalle_jax.cli.parser import HelpFormatter, path
from mindalle_jax.errors import MindalleError
from mindalle_jax.training.finetune import read_finetune
from scripts.recipe import CONFIGS, write_sheet
from scripts.scenes.accuracy import accuracy, draw_scenes
from scripts.scenes.dataset import SHAPES, Style, write_scenes

NUM_PICTURES = 2000
COLUMNS, ROWS = 10, len(SHAPES)


class Kind(NamedTuple):
    """What is learned, and from which pictures."""

    config: str
    style: Style
    classes: bool


KINDS = {
    "captions": Kind("captions.yaml", "tiled", False),
    "classes": Kind("transfer-clscond.yaml", "flat", True),
    "unconditional": Kind("transfer-uncond.yaml", "flat", False),
}


def main(arguments: argparse.Namespace) -> None:
    """Pictures, before, the run, after."""
    kind, out = KINDS[arguments.kind], arguments.out
    config = CONFIGS / "scenes" / kind.config
    write_scenes(out / "pictures", "train", 0, NUM_PICTURES, style=kind.style, classes=kind.classes)

    if not (out / "before.png").exists():
        read, base = read_finetune(config, arguments.overrides)
        if read.image_only:
            draw_images(ImageGPT.from_upstream(base, read.model_config()), out / "before.png")
        else:
            draw_captions(Dalle.from_pretrained(base), kind.style, out / "before.png")
    run = out / "run"
    if mindalle(
        ["finetune", "--config", str(config), "--out", str(run), f"data.train={out}/pictures", *arguments.overrides]
    ):
        raise MindalleError("mindalle finetune did not come to its end; the same command goes on")
    if arguments.kind == "captions":
        draw_captions(Dalle.from_pretrained(run), kind.style, out / "after.png")
    else:
        draw_images(ImageGPT.from_pretrained(run), out / "after.png")


def draw_captions(model: Dalle, style: Style, path: Path) -> None:
    """Pictures of captions that training has not seen, and how many the judge finds right in that style."""
    drawn = draw_scenes(model, "valid", COLUMNS * ROWS, style=style)
    right = accuracy(one.first_verdict for one in drawn)
    print(f"{path.name}: of {len(drawn)} pictures {right['all']:.0%} right in everything, {right}")
    write_sheet([one.first for one in drawn], path, COLUMNS)


def draw_images(model: ImageGPT, path: Path) -> None:
    """A row for each class, or as many pictures of none."""
    classes: range | list[None] = range(model.num_classes) if model.num_classes else [None] * ROWS
    rows = [model.generate(label, num_candidates=COLUMNS, seed=i).images for i, label in enumerate(classes)]
    write_sheet(np.concatenate(rows), path, COLUMNS)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--kind", choices=list(KINDS), required=True, help="to captions in a new style, or without text"
    )
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="where everything goes")
    text = "changes to the configuration, as optimizer.max_steps=100"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(run_reporting("finetune_demo.py", lambda: main(parser().parse_args())))
