"""Fine-tunes demo-scenes in minutes on a CPU, and samples from it before and after.

    python -m scripts.scenes.finetune_demo --kind captions --out DIR

DIR/pictures has the images to train on, DIR/run the run of `mindalle finetune` and in the end the model, DIR/before.png
and DIR/after.png the samples. If it is interrupted, the same command resumes it.
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
from scripts.scenes.accuracy import accuracy, sample_scenes
from scripts.scenes.dataset import SHAPES, Style, write_scenes

NUM_IMAGES = 2000
COLUMNS, ROWS = 10, len(SHAPES)


class Kind(NamedTuple):
    """One kind of fine-tuning: its preset, and the images to train on."""

    config: str
    style: Style
    classes: bool


KINDS = {
    "captions": Kind("captions.yaml", "tiled", False),
    "classes": Kind("transfer-clscond.yaml", "flat", True),
    "unconditional": Kind("transfer-uncond.yaml", "flat", False),
}


def main(arguments: argparse.Namespace) -> None:
    """Renders images, samples, runs `mindalle finetune`, and samples again."""
    kind, out = KINDS[arguments.kind], arguments.out
    config = CONFIGS / "scenes" / kind.config
    write_scenes(out / "pictures", "train", 0, NUM_IMAGES, style=kind.style, classes=kind.classes)

    if not (out / "before.png").exists():
        read, base = read_finetune(config, arguments.overrides)
        if read.image_only:
            write_samples(ImageGPT.from_upstream(base, read.model_config()), out / "before.png")
        else:
            write_judged(Dalle.from_pretrained(base), kind.style, out / "before.png")
    run = out / "run"
    if mindalle(
        ["finetune", "--config", str(config), "--out", str(run), f"data.train={out}/pictures", *arguments.overrides]
    ):
        raise MindalleError("mindalle finetune did not finish; the same command resumes it")
    if arguments.kind == "captions":
        write_judged(Dalle.from_pretrained(run), kind.style, out / "after.png")
    else:
        write_samples(ImageGPT.from_pretrained(run), out / "after.png")


def write_judged(model: Dalle, style: Style, path: Path) -> None:
    """Samples captions that training has not seen, and prints how many images the judge finds right in that style."""
    judged = sample_scenes(model, "valid", COLUMNS * ROWS, style=style)
    right = accuracy(one.first_verdict for one in judged)
    print(f"{path.name}: {right['all']:.0%} of {len(judged)} images right in everything, {right}")
    write_sheet([one.first for one in judged], path, COLUMNS)


def write_samples(model: ImageGPT, path: Path) -> None:
    """Writes a row of samples per class, or as many rows without a class."""
    classes: range | list[None] = range(model.num_classes) if model.num_classes else [None] * ROWS
    rows = [model.generate(label, num_candidates=COLUMNS, seed=i).images for i, label in enumerate(classes)]
    write_sheet(np.concatenate(rows), path, COLUMNS)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--kind",
        choices=list(KINDS),
        required=True,
        help="what the model learns to sample from",
    )
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="where everything goes")
    text = "changes to the configuration, as optimizer.max_steps=100"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(run_reporting("finetune_demo.py", lambda: main(parser().parse_args())))
