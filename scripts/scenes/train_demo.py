"""Trains demo-scenes, a small model in the package, from nothing: images, tokenizers, VQGAN, transformer, CLIP.

    python -m scripts.scenes.train_demo --work DIR

If it is interrupted, the same command resumes it, and skips the stages that are complete. The result is DIR/demo: the
model with its ranker, its card, and metrics.json with its accuracy. Remove DIR/demo to pack and measure it again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from mindalle_jax.cli import run_reporting
from mindalle_jax.pipeline import Dalle
from mindalle_jax.ranking.ranker import ClipRanker
from scripts import recipe
from scripts.scenes import dataset as scenes
from scripts.scenes.accuracy import accuracy, nearest, sample_scenes
from scripts.scenes.dataset import captions, make_scene, render, write_scenes
from scripts.scenes.judge import judge

NUM_TRAIN, NUM_VALID = 40_000, 500
BEST_OF = 16
# Size -> changes to the presets in configs/scenes. The changes for a GPU were chosen by arithmetic, and never run.
CHANGES: dict[str, dict[str, list[str]]] = {
    "cpu": {},
    "gpu": {
        "vqgan": [
            "experiment.total_batch_size=64", "optimizer.max_steps=4000", "training.quantise_from_step=1000",
            "stage1.hparams.ch=32", "stage1.hparams.num_res_blocks=2",
        ],
        "transformer": [
            "experiment.total_batch_size=128", "experiment.use_amp=true", "optimizer.max_steps=4000",
            "stage2.hparams={embed_dim: 288, n_layers: 8, n_heads: 4, ctx_len_img: 256, ctx_len_txt: 24}",
        ],
        "clip": ["experiment.total_batch_size=512", "optimizer.max_steps=1500", "training.warmup_steps=100"],
    },
}  # fmt: skip
ABOUT = "samples one or two colored shapes on a plain background"
EXAMPLES = (
    "a large striped green circle to the left of a small red heart on a grey background",
    "a large yellow star above a small blue ring on white",
    "a small pink diamond on a sky background",
)
CARD = """\
---
library_name: mindalle-jax
pipeline_tag: text-to-image
license: apache-2.0
---

# Scenes

This is a small text-to-image model of colored shapes. It samples one or two shapes on a plain background, as images of
64 x 64 pixels. A CLIP model in `ranker/` orders its images. `scripts/scenes/train_demo.py` trained all parts from
nothing. No published weights and no photographs went into it.

    mindalle sample "{caption}" --model FOLDER --out DIR

- Shapes: {shapes}. They are small or large, and plain or striped.
- Colors: {colours}.
- Two shapes are left of, right of, above or below each other.
- Backgrounds: {backgrounds}.
- It knows no other words.

It is an experiment whose answers a program can check exactly. `metrics.json` says how often its images are right. The
weights are under Apache-2.0, like the code.
"""


def main(arguments: argparse.Namespace) -> None:
    """Runs all stages, or one."""
    made = recipe.Recipe("scenes", "scenes-valid", (256, 1024), CHANGES[arguments.size], make_scenes, pack, measure)
    recipe.run_recipe(made, arguments)


def make_scenes(work: Path) -> None:
    """Renders images with captions for training and validation, and for CLIP pairs that differ little."""
    write_scenes(work / "scenes", "train", 0, NUM_TRAIN)
    write_scenes(work / "scenes-clip", "train", 0, NUM_TRAIN // 2, contrasts=True)
    write_scenes(work / "scenes-valid", "valid", 0, NUM_VALID)


def pack(work: Path) -> None:
    """Packs the folder that ships."""
    card = CARD.format(
        caption=captions(make_scene("valid", 1))[0],
        shapes=", ".join(scenes.SHAPES),
        colours=", ".join(scenes.COLORS),
        backgrounds=", ".join(scenes.BACKGROUNDS),
    )
    recipe.pack_model(work / "transformer", work / "clip", work / "demo", card=card, about=ABOUT, examples=EXAMPLES)


def measure(work: Path, count: int) -> None:
    """Writes metrics.json: how often samples are right by the judge, and how near they are to training images."""
    demo = work / "demo"
    file = demo / "metrics.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8"))["prompts"] == count:
        return
    mesh = Mesh(np.array(jax.devices()), ("data",))
    model, ranker = Dalle.from_pretrained(demo, mesh=mesh), ClipRanker.from_pretrained(demo / "ranker", mesh=mesh)
    metrics: dict[str, Any] = {"prompts": count, "defaults": "top_k 256, temperature 1, seed 0"}
    for split in ("valid", "heldout"):
        images = np.stack([render(make_scene(split, index)) for index in range(count)])
        scenes = [make_scene(split, index) for index in range(count)]
        decoded = model.decode_codes(model.encode_images(images))
        again = (np.asarray(decoded) * 255 + 0.5).astype(np.uint8)
        metrics[f"{split}: pictures of the generator"] = accuracy(map(judge, images, scenes))
        metrics[f"{split}: reconstructions by the VQGAN"] = accuracy(map(judge, again, scenes))
        share = max(1, BEST_OF // mesh.size)  # candidates per device
        judged = sample_scenes(model, split, count, ranker=ranker, num_candidates=BEST_OF, batch_size=share)
        metrics[f"{split}: one picture a prompt"] = accuracy(one.first_verdict for one in judged)
        metrics[f"{split}: best of {BEST_OF}"] = accuracy(one.best_verdict for one in judged)
        if split == "valid":
            train = np.stack([render(make_scene("train", index)) for index in tqdm(range(NUM_TRAIN), desc="nearest")])
            for name, some in (("drawn", np.stack([one.first for one in judged])), ("of the generator", images)):
                distances = nearest(some[:50], train)
                metrics[f"distance to the nearest training picture: {name}"] = {
                    "median": round(float(np.median(distances)), 4), "least": round(float(distances.min()), 4)
                }  # fmt: skip
        recipe.write_sheet([one.first for one in judged[:50]], work / f"{split}.png", 10)
    recipe.write_metrics(file, metrics)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    return recipe.make_parser(__doc__, CHANGES)


if __name__ == "__main__":
    sys.exit(run_reporting("train_demo.py", lambda: main(parser().parse_args())))
