"""Makes the small model that ships in the package, from nothing: pictures, tokenizers, VQGAN, transformer, CLIP.

    python -m scripts.scenes.train_demo --work DIR

Every stage goes on where it was interrupted when the same command is given again, and what is complete is not done
again: remove DIR/demo to have it packed and measured anew. DIR/demo is then the model with its ranker and card, and
DIR/demo/metrics.json what was measured of it.
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
from scripts.scenes.accuracy import accuracy, draw_scenes, nearest
from scripts.scenes.dataset import captions, draw, make_scene, write_scenes
from scripts.scenes.judge import judge

NUM_TRAIN, NUM_VALID = 40_000, 500
BEST_OF = 16
# What a size changes in the configurations of configs/scenes. That of a GPU was chosen by arithmetic, and never run.
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
ABOUT = "draws one or two coloured shapes on a plain background"
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

A small text-to-image model, with its ranker in `ranker/`: one or two coloured shapes on a plain background, 64 x 64
pixels. Made from nothing by `scripts/scenes/train_demo.py`; no published weights and no photographs went into it.

    mindalle sample "{caption}" --model FOLDER --out DIR

- Things: {shapes}; small or large; plain or striped; {colours}. Two of them left of, right of, above or below each
  other, on {backgrounds}.
- It knows no other words.
- metrics.json: how often its pictures are right.
- Licence: Apache-2.0, as the code.
"""


def main(arguments: argparse.Namespace) -> None:
    """Runs all stages, or one."""
    made = recipe.Recipe("scenes", "scenes-valid", (256, 1024), CHANGES[arguments.size], make_scenes, pack, measure)
    recipe.run_recipe(made, arguments)


def make_scenes(work: Path) -> None:
    """Pictures with captions, to train on, CLIP on pairs that differ little, and to validate by."""
    write_scenes(work / "scenes", "train", 0, NUM_TRAIN)
    write_scenes(work / "scenes-clip", "train", 0, NUM_TRAIN // 2, contrasts=True)
    write_scenes(work / "scenes-valid", "valid", 0, NUM_VALID)


def pack(work: Path) -> None:
    """The folder that ships."""
    card = CARD.format(
        caption=captions(make_scene("valid", 1))[0],
        shapes=", ".join(scenes.SHAPES),
        colours=", ".join(scenes.COLOURS),
        backgrounds=", ".join(scenes.BACKGROUNDS),
    )
    recipe.pack_model(work / "transformer", work / "clip", work / "demo", card=card, about=ABOUT, examples=EXAMPLES)


def measure(work: Path, count: int) -> None:
    """Writes metrics.json: what the judge finds in what the model draws, and how near that is to training pictures."""
    demo = work / "demo"
    file = demo / "metrics.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8"))["prompts"] == count:
        return
    mesh = Mesh(np.array(jax.devices()), ("data",))
    model, ranker = Dalle.from_pretrained(demo, mesh=mesh), ClipRanker.from_pretrained(demo / "ranker", mesh=mesh)
    figures: dict[str, Any] = {"prompts": count, "defaults": "top_k 256, temperature 1, seed 0"}
    for split in ("valid", "heldout"):
        pictures = np.stack([draw(make_scene(split, index)) for index in range(count)])
        scenes = [make_scene(split, index) for index in range(count)]
        decoded = model.decode_codes(model.encode_images(pictures))
        again = (np.asarray(decoded) * 255 + 0.5).astype(np.uint8)
        figures[f"{split}: pictures of the generator"] = accuracy(map(judge, pictures, scenes))
        figures[f"{split}: reconstructions by the VQGAN"] = accuracy(map(judge, again, scenes))
        share = max(1, BEST_OF // mesh.size)  # of candidates, to each device
        drawn = draw_scenes(model, split, count, ranker=ranker, num_candidates=BEST_OF, batch_size=share)
        figures[f"{split}: one picture a prompt"] = accuracy(one.first_verdict for one in drawn)
        figures[f"{split}: best of {BEST_OF}"] = accuracy(one.best_verdict for one in drawn)
        if split == "valid":
            train = np.stack([draw(make_scene("train", index)) for index in tqdm(range(NUM_TRAIN), desc="nearest")])
            for name, some in (("drawn", np.stack([one.first for one in drawn])), ("of the generator", pictures)):
                distances = nearest(some[:50], train)
                figures[f"distance to the nearest training picture: {name}"] = {
                    "median": round(float(np.median(distances)), 4), "least": round(float(distances.min()), 4)
                }  # fmt: skip
        recipe.write_sheet([one.first for one in drawn[:50]], work / f"{split}.png", 10)
    recipe.write_metrics(file, figures)


def parser() -> argparse.ArgumentParser:
    """The options."""
    return recipe.make_parser(__doc__, CHANGES)


if __name__ == "__main__":
    sys.exit(run_reporting("train_demo.py", lambda: main(parser().parse_args())))
