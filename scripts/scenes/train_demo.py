"""Makes the small model that ships in the package, from nothing: pictures, tokenizers, VQGAN, transformer, CLIP.

    python -m scripts.scenes.train_demo --work DIR

Every stage goes on where it was interrupted when the same command is given again, and what is complete is not done
again: remove DIR/demo to have it packed and measured anew. DIR/demo is then the model with its ranker and card, and
DIR/demo/metrics.json what was measured of it.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from mindalle_jax.cli import main as mindalle
from mindalle_jax.cli import run_reporting
from mindalle_jax.cli.parser import HelpFormatter, path
from mindalle_jax.config.file import load_section
from mindalle_jax.config.schema import ExperimentConfig
from mindalle_jax.errors import MindalleError
from mindalle_jax.pipeline import Dalle
from mindalle_jax.ranking.ranker import ClipRanker
from mindalle_jax.runtime.devices import training_devices
from mindalle_jax.storage.model_folder import copy_model
from mindalle_jax.text.known_words import read_known_words
from scripts.scenes.accuracy import accuracy, draw_scenes, nearest
from scripts.scenes.dataset import captions, draw, make_scene, write_scenes
from scripts.scenes.judge import judge

ROOT = Path(__file__).resolve().parents[2]
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
    work, changes = arguments.work, CHANGES[arguments.size]

    def train(verb: str, name: str, *overrides: str) -> None:
        file, changed = ROOT / "configs" / "scenes" / f"{name}.yaml", changes.get(name, [])
        share = local_batch_size(file, changed)
        run("mindalle", verb, "--config", file, "--out", work / name, *overrides, share, *changed)

    stages: dict[str, Callable[[], None]] = {
        "scenes": lambda: make_scenes(work),
        "tokenizers": lambda: make_tokenizers(work),
        "vqgan": lambda: train(
            "train-vqgan", "vqgan", f"data.train={work}/scenes", f"data.valid={work}/scenes-valid"
        ),
        "codes": lambda: make_codes(work),
        "transformer": lambda: train(
            "finetune", "transformer", f"data.train={work}/codes", f"data.valid={work}/codes-valid",
            f"training.vqgan={work}/vqgan", f"training.tokenizer={work}/tokenizer",
        ),
        "clip": lambda: train(
            "train-clip", "clip", f"data.train={work}/scenes-clip", f"data.valid={work}/scenes-valid",
            f"training.tokenizer={work}/clip-tokenizer",
        ),
        "pack": lambda: pack(work),
        "measure": lambda: measure(work / "demo", arguments.prompts),
    }  # fmt: skip
    for name, stage in stages.items():
        if arguments.stage in ("all", name):
            start = time.perf_counter()
            print(f"== {name}", file=sys.stderr)
            stage()
            print(f"== {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def local_batch_size(file: Path, overrides: list[str]) -> str:
    """The override that gives each device its share of a batch at once: CLIP's cannot be split into micro-batches."""
    total = load_section(file, overrides, "experiment", ExperimentConfig).total_batch_size
    return f"experiment.local_batch_size={max(1, total // len(training_devices()))}"


def run(program: str, *arguments: Any) -> None:
    """A command of the package, in this process; raises MindalleError if it does not succeed."""
    print(f"$ {program} {' '.join(map(str, arguments))}", file=sys.stderr)
    if mindalle([str(argument) for argument in arguments]):
        raise MindalleError(f"{program} {arguments[0]} did not come to its end; the same command goes on")


def make_scenes(work: Path) -> None:
    """Pictures with captions, to train on, CLIP on pairs that differ little, and to validate by."""
    write_scenes(work / "scenes", "train", 0, NUM_TRAIN)
    write_scenes(work / "scenes-clip", "train", 0, NUM_TRAIN // 2, contrasts=True)
    write_scenes(work / "scenes-valid", "valid", 0, NUM_VALID)


def make_tokenizers(work: Path) -> None:
    """The transformer's and CLIP's, from the captions to train on."""
    for kind, name, size in (("mindalle", "tokenizer", 256), ("clip", "clip-tokenizer", 1024)):
        if not (work / name).exists():
            options = ["--out", work / name, "--vocab-size", size, "--kind", kind]
            run("mindalle", "train-tokenizer", work / "scenes", *options)


def make_codes(work: Path) -> None:
    """The codes of all pictures."""
    for name in ("scenes", "scenes-valid"):
        options = ["--model", work / "vqgan", "--data", work / name, "--out", work / name.replace("scenes", "codes")]
        run("mindalle", "prepare-codes", *options, "--batch-size", 32)


def pack(work: Path) -> None:
    """The model and its ranker in float16, with a licence and a card, which is written last."""
    from scripts.scenes import dataset as scenes

    demo = work / "demo"
    if (demo / "README.md").exists():
        return
    if demo.exists():
        shutil.rmtree(demo)
    copy_model(work / "transformer", demo, dtype="float16")
    ClipRanker.from_pretrained(work / "clip", dtype="float32").save_pretrained(demo / "ranker", dtype="float16")
    shutil.copyfile(ROOT / "LICENSE", demo / "LICENSE")
    known_words = read_known_words(demo / "tokenizer")
    assert known_words is not None  # train-tokenizer wrote them
    dataclasses.replace(known_words, about=ABOUT, examples=EXAMPLES).save(demo / "tokenizer")
    card = CARD.format(
        caption=captions(make_scene("valid", 1))[0],
        shapes=", ".join(scenes.SHAPES),
        colours=", ".join(scenes.COLOURS),
        backgrounds=", ".join(scenes.BACKGROUNDS),
    )
    (demo / "README.md").write_text(card, encoding="utf-8")


def measure(demo: Path, count: int) -> None:
    """Writes metrics.json: what the judge finds in what the model draws, and how near that is to training pictures."""
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
        columns = min(10, count)
        rows = [drawn[first : first + columns] for first in range(0, min(50, count) // columns * columns, columns)]
        sheet = [np.concatenate([one.first for one in row], 1) for row in rows]
        Image.fromarray(np.concatenate(sheet)).save(demo.parent / f"{split}.png")
    text = json.dumps(figures, indent=1)
    file.write_text(text + "\n", encoding="utf-8")
    print(text)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--work", required=True, type=path, metavar="DIR", help="where everything goes")
    parser.add_argument("--size", choices=list(CHANGES), default="cpu", help="by where it is trained")
    names = ["all", "scenes", "tokenizers", "vqgan", "codes", "transformer", "clip", "pack", "measure"]
    parser.add_argument("--stage", choices=names, default="all", help="only this stage; those before it must be done")
    parser.add_argument("--prompts", type=int, default=500, metavar="N", help="drawn to measure, of each split")
    return parser


if __name__ == "__main__":
    sys.exit(run_reporting("train_demo.py", lambda: main(parser().parse_args())))
