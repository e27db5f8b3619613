"""Runs the recipes of the models in the package: stages, which run commands, and the folder that ships."""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mindalle_jax.cli import main as mindalle
from mindalle_jax.cli.parser import HelpFormatter, path
from mindalle_jax.config.file import load_config, load_section
from mindalle_jax.config.schema import ExperimentConfig
from mindalle_jax.errors import MindalleError
from mindalle_jax.ranking.ranker import ClipRanker
from mindalle_jax.runtime.devices import training_devices
from mindalle_jax.storage.files import RANKER
from mindalle_jax.storage.model_folder import copy_model
from mindalle_jax.storage.results import write_model
from mindalle_jax.storage.weights import map_weights, read_manifest
from mindalle_jax.text.known_words import read_known_words

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


STAGES = ("data", "tokenizers", "vqgan", "codes", "transformer", "clip", "pack", "measure")


class Recipe(NamedTuple):
    """A model that is trained from nothing, with its ranker."""

    name: str
    """Name of the folder in configs/ and of the data set in the work folder; NAME-valid and NAME-clip lie beside it."""
    vqgan_valid: str
    """Folder of the data set that the VQGAN is validated with."""
    vocab_sizes: tuple[int, int]
    """Tokens of the transformer's tokenizer and of CLIP's."""
    changes: Mapping[str, list[str]]
    """Name of a configuration -> changes to it."""
    make_data: Callable[[Path], None]
    """Writes the data sets into the work folder."""
    pack: Callable[[Path], None]
    """Writes the folder that ships, WORK/demo."""
    measure: Callable[[Path, int], None]
    """Measures WORK/demo with this many prompts."""


def run_recipe(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Runs all stages, or the one that --stage names."""
    work, data = arguments.work, arguments.work / recipe.name

    def train(verb: str, name: str, *overrides: str) -> None:
        config = CONFIGS / recipe.name / f"{name}.yaml"
        run_training(verb, config, work / name, *overrides, *recipe.changes.get(name, []))

    stages: dict[str, Callable[[], None]] = {
        "data": lambda: recipe.make_data(work),
        "tokenizers": lambda: make_tokenizers(data, recipe.vocab_sizes),
        "vqgan": lambda: train("train-vqgan", "vqgan", f"data.train={data}", f"data.valid={work}/{recipe.vqgan_valid}"),
        "codes": lambda: make_codes(data),
        "transformer": lambda: train(
            "finetune", "transformer", f"data.train={work}/codes", f"data.valid={work}/codes-valid",
            f"training.vqgan={work}/vqgan", f"training.tokenizer={work}/tokenizer",
        ),
        "clip": lambda: train(
            "train-clip", "clip", f"data.train={data}-clip", f"data.valid={data}-valid",
            f"training.tokenizer={work}/clip-tokenizer",
        ),
        "pack": lambda: recipe.pack(work),
        "measure": lambda: recipe.measure(work, arguments.prompts),
    }  # fmt: skip
    run_stages(stages, arguments.stage)


def run_stages(stages: Mapping[str, Callable[[], None]], wanted: str) -> None:
    """Runs all stages one after another, or the one that is wanted, and says how long each took."""
    for name, stage in stages.items():
        if wanted in ("all", name):
            start = time.perf_counter()
            print(f"== {name}", file=sys.stderr)
            stage()
            print(f"== {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def run(*arguments: Any) -> None:
    """Runs a command of the package in this process. Raises MindalleError if it does not succeed."""
    print(f"$ mindalle {' '.join(map(str, arguments))}", file=sys.stderr)
    if mindalle([str(argument) for argument in arguments]):
        raise MindalleError(f"mindalle {arguments[0]} did not finish; the same command resumes it")


def run_training(verb: str, config: Path, out: Path, *overrides: str) -> None:
    """Runs a training of the package, in which each device computes its share of a batch at once.

    The reason is that the batch of CLIP cannot be split into micro-batches.
    """
    total = load_section(config, overrides, "experiment", ExperimentConfig).total_batch_size
    share = max(1, total // len(training_devices()))
    run(verb, "--config", config, "--out", out, f"experiment.local_batch_size={share}", *overrides)


def make_tokenizers(data: Path, vocab_sizes: tuple[int, int]) -> None:
    """Trains the tokenizers of the transformer and of CLIP on the training captions, beside the data set."""
    for kind, name, size in zip(("mindalle", "clip"), ("tokenizer", "clip-tokenizer"), vocab_sizes, strict=True):
        out = data.with_name(name)
        if not out.exists():
            run("train-tokenizer", data, "--out", out, "--vocab-size", size, "--kind", kind)


def make_codes(data: Path) -> None:
    """Computes the codes of all training and validation images, beside the data set."""
    for end in ("", "-valid"):
        source, out = data.with_name(data.name + end), data.with_name("codes" + end)
        run("prepare-codes", "--model", data.with_name("vqgan"), "--data", source, "--out", out, "--batch-size", 32)


def pack_model(
    transformer: Path,
    clip: Path,
    folder: Path,
    *,
    card: str,
    about: str,
    examples: tuple[str, ...],
    sharpness: float = 1.0,
) -> None:
    """Packs the model and its ranker in float16, with its known words, a license, and a card, which is written last.

    Does nothing if the card exists already. about, examples: see KnownWords. sharpness: see write_sharpened.
    """
    if (folder / "README.md").exists():
        return
    if folder.exists():
        shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent) as sharpened:
        write_sharpened(transformer, Path(sharpened), sharpness)
        (Path(sharpened) / "README.md").unlink(missing_ok=True)  # the card of the run would mark the folder as packed
        copy_model(sharpened, folder, dtype="float16")
    ClipRanker.from_pretrained(clip, dtype="float32").save_pretrained(folder / RANKER, dtype="float16")
    shutil.copyfile(CONFIGS.parent / "LICENSE", folder / "LICENSE")
    known_words = read_known_words(folder / "tokenizer")
    assert known_words is not None  # train-tokenizer wrote them
    dataclasses.replace(known_words, about=about, examples=examples).save(folder / "tokenizer")
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_sharpened(model: Path, folder: Path, sharpness: float) -> None:
    """Writes a model into an existing folder, with `sharpness` times its logits of codes.

    Temperature 1 of the result is 1 / sharpness of the model.
    """
    manifest = read_manifest(model)
    params = map_weights(model / "stage2.safetensors", manifest["tensors"]["stage2"])
    params["head_img/weight"] = params["head_img/weight"] * np.float32(sharpness)
    about = {"caption_dropout": manifest.get("caption_dropout")}
    config = load_config(model / "config.yaml")
    write_model(model, config, folder, lambda path, _: params[path], manifest["source"], about=about)


def write_metrics(file: Path, metrics: Mapping[str, Any]) -> None:
    """Writes metrics.json, and prints it."""
    text = json.dumps(metrics, indent=1)
    file.write_text(text + "\n", encoding="utf-8")
    print(text)


def write_sheet(images: Any, file: Path, columns: int) -> None:
    """Writes images uint8[n, S, S, 3] in rows of `columns` to one PNG; the last row is filled up with white."""
    images = np.asarray(images)
    blank = np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)
    all_images = np.concatenate([images, blank])
    rows = [np.concatenate(list(all_images[i : i + columns]), axis=1) for i in range(0, len(all_images), columns)]
    Image.fromarray(np.concatenate(rows)).save(file)


def make_parser(description: str | None, sizes: Collection[str]) -> argparse.ArgumentParser:
    """The parser of the command line of a recipe."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--work", required=True, type=path, metavar="DIR", help="where everything goes")
    parser.add_argument("--size", choices=list(sizes), default="cpu", help="the device to train on")
    parser.add_argument(
        "--stage",
        choices=["all", *STAGES],
        default="all",
        help="run only this stage, after those before it",
    )
    parser.add_argument("--prompts", type=int, default=500, metavar="N", help="prompts per split to measure with")
    return parser
