"""Trains demo, the model of emoji in the package, from nothing: images, tokenizers, VQGAN, transformer, CLIP.

    python -m scripts.emoji.train_demo --work DIR

npm fetches the packages of the emoji into DIR/packages. If the script is interrupted, the same command resumes it, and
skips the stages that are complete. The result is DIR/demo: the model with its ranker, its card, and metrics.json with
its accuracy. Sheets of samples lie beside it. Remove DIR/demo to pack and measure it again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mindalle_jax.cli import run_reporting
from mindalle_jax.pipeline import Dalle
from mindalle_jax.ranking.ranker import ClipRanker
from scripts import recipe
from scripts.emoji import measure
from scripts.emoji.dataset import GROUNDS, ROUND, pairs, write_emoji
from scripts.emoji.packages import PACKAGES, fetch_packages
from scripts.emoji.things import STYLES, Things, read_things

NUM_VALID = 500
VOCAB_SIZE = 3072
SHARPNESS = 2.0
"""Factor of the logits in the model that ships. An emoji is learned by heart and has 256 codes. The doubt that is left
at each code would spoil a third of the images (docs/log.md)."""
# Size -> changes to the presets in configs/emoji. The changes for a GPU were chosen by arithmetic, and never run.
CHANGES: dict[str, dict[str, list[str]]] = {
    "cpu": {},
    "gpu": {
        "vqgan": [
            "experiment.total_batch_size=64", "optimizer.max_steps=4000", "training.quantise_from_step=1000",
        ],
        "transformer": [
            "experiment.total_batch_size=128", "experiment.use_amp=true", "optimizer.max_steps=6000",
            "stage2.hparams={embed_dim: 256, n_layers: 8, n_heads: 4, ctx_len_img: 256, ctx_len_txt: 16}",
        ],
        "clip": ["experiment.total_batch_size=512", "optimizer.max_steps=1500", "training.warmup_steps=100"],
    },
}  # fmt: skip
ABOUT = "samples emoji of animals, plants, food, vehicles and other things in three styles: 3d, flat and noto"
EXAMPLES = ("a parrot, 3d style", "a red apple", "flat rocket on sky")
CARD = """\
---
library_name: mindalle-jax
pipeline_tag: text-to-image
license: apache-2.0
---

# Emoji

This is a small text-to-image model of emoji. It samples one of {things} things in one of three styles, as images of
64 x 64 pixels. A CLIP model in `ranker/` orders its images. `scripts/emoji/train_demo.py` trained all parts from
nothing. No published weights and no photographs went into it.

    mindalle sample "a parrot, 3d style" --model FOLDER --out DIR

## What it knows

- Things: animals, plants, food, vehicles, buildings, tools, clothes, faces and more. `tokenizer/words.json` lists the
  words.
- Styles: {styles}. Without a style in the prompt, the candidates vary, and fewer of them are right.
- Grounds: {grounds}. The thing is on a white card, which has the ground around it. Without a ground in the prompt,
  all is white.

## What it is for, and its limits

It shows in seconds how the code works. It is not meant for anything else.

- It saw one image of each thing in each style, and repeats these images.
- It cannot combine: training never showed {heldout} pairs of a thing and a style, and the model rarely samples them
  right.
- It cannot sample two things in one image, or words that it does not know.
- Its logits are multiplied by {sharpness:g}. So temperature 1 is 1 / {sharpness:g} of the temperature of training.

`metrics.json` says how often its images are right. The program that measured this, `scripts/emoji/judge.py`, compares
an image with all things in all styles.

## Training data and licenses

It was trained on these images and names:

{credits}

The weights are under Apache-2.0, like the code. Samples resemble the images above. If you publish samples, give credit
to the authors of the images, as CC-BY 4.0 asks.
"""


def main(arguments: argparse.Namespace) -> None:
    """Runs all stages, or one."""
    made = recipe.Recipe(
        "emoji", "emoji-heldout", (VOCAB_SIZE, VOCAB_SIZE), CHANGES[arguments.size], make_emoji, pack, measure_model
    )
    recipe.run_recipe(made, arguments)


def all_things(work: Path) -> Things:
    """Reads the things, after fetching the packages that are missing."""
    fetch_packages(work / "packages")
    return read_things(work / "packages")


def make_emoji(work: Path) -> None:
    """Renders images with captions for training and validation, and for CLIP pairs that differ in one way."""
    things = all_things(work)
    learned, heldout = (len(ROUND) * len(pairs(things.things, held)) for held in (False, True))
    write_emoji(work / "emoji", things, "train", learned)
    write_emoji(work / "emoji-valid", things, "valid", NUM_VALID)
    write_emoji(work / "emoji-heldout", things, "heldout", heldout)
    write_emoji(work / "emoji-clip", things, "train", 4 * len(pairs(things.things, False)), contrasts=True)


def pack(work: Path) -> None:
    """Packs the folder that ships."""
    things = all_things(work).things
    card = CARD.format(
        things=len(things),
        styles=", ".join(STYLES),
        grounds=", ".join(GROUNDS),
        heldout=len(pairs(things, True)),
        sharpness=SHARPNESS,
        credits="\n".join(f"- {package.credit}" for package in PACKAGES),
    )
    recipe.pack_model(
        work / "transformer", work / "clip", work / "demo",
        card=card, about=ABOUT, examples=EXAMPLES, sharpness=SHARPNESS,
    )  # fmt: skip


def measure_model(work: Path, count: int) -> None:
    """Measures the model, and writes metrics.json and the sheets."""
    demo = work / "demo"
    file = demo / "metrics.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8"))["prompts"] == count:
        return
    mesh = Mesh(np.array(jax.devices()), ("data",))
    model, ranker = Dalle.from_pretrained(demo, mesh=mesh), ClipRanker.from_pretrained(demo / "ranker", mesh=mesh)
    things = all_things(work)
    metrics: dict[str, Any] = {"prompts": count, "defaults": "top_k 256, temperature 1, seed 0"}
    metrics |= measure.measure_judge(things)
    metrics |= measure.measure_reconstructions(model, things)
    metrics |= measure.measure_samples(model, ranker, things, count, work)
    measure.write_visitors(model, ranker, work / "visitors.png")
    recipe.write_metrics(file, metrics)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    return recipe.make_parser(__doc__, CHANGES)


if __name__ == "__main__":
    sys.exit(run_reporting("train_demo.py", lambda: main(parser().parse_args())))
