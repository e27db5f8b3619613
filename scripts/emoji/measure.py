"""Measures a model of emoji: the judge reads its samples, and sheets show them to people."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mindalle_jax.pipeline import Dalle
from mindalle_jax.ranking.ranker import ClipRanker
from scripts import recipe
from scripts.emoji.dataset import GROUNDS, ROUND, Example, Split, captions, make_example, pairs, render
from scripts.emoji.judge import Judge, accuracy
from scripts.emoji.things import STYLES, Things

BEST_OF = 16
AT_ONCE = 20
SHEET, COLUMNS = 64, 8
VISITOR_PROMPTS = Path(__file__).with_name("visitor_prompts.txt")


def measure_judge(things: Things) -> dict[str, Any]:
    """Judges every thing in every style on every ground, as rendered."""
    known = range(len(things.things))
    examples = [Example(*parts) for parts in itertools.product(known, STYLES, GROUNDS)]
    images = np.stack([render(things, example) for example in examples])
    return {"judge: all images as rendered": {"images": len(examples)} | accuracy(Judge(things).read(images), examples)}


def measure_reconstructions(model: Dalle, things: Things) -> dict[str, Any]:
    """Reconstructs held-out images and as many of training from their codes: PSNR, and what the judge reads."""
    metrics: dict[str, Any] = {}
    count = len(ROUND) * len(pairs(things.things, True))
    splits: tuple[Split, ...] = ("heldout", "train")
    for split in splits:
        examples = [make_example(things.things, split, index) for index in range(count)]
        images = np.stack([render(things, example) for example in examples])
        again = to_uint8(model.decode_codes(model.encode_images(images)))
        read = accuracy(Judge(things).read(again), examples)
        metrics[f"{split}: reconstructions"] = {"images": count, "dB": psnr(images, again)} | read
    return metrics


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Decibels, the mean over images: 10 log10(255² / mean squared difference), of uint8[n, S, S, 3]."""
    squares = ((images.astype(np.float64) - others) ** 2).mean((1, 2, 3))
    return round(float((10 * np.log10(255**2 / np.maximum(squares, 1e-9))).mean()), 2)


def to_uint8(images: Any) -> np.ndarray:
    """Converts f32 in [0, 1] to uint8."""
    return (np.asarray(images) * 255 + 0.5).astype(np.uint8)


def measure_samples(model: Dalle, ranker: ClipRanker, things: Things, count: int, folder: Path) -> dict[str, Any]:
    """Samples prompts in wordings that training does not have, and judges one image per prompt and the ranker's best.

    Writes three sheets into the folder: samples of each split, and samples above the nearest images of training.
    """
    judge, metrics = Judge(things), dict[str, Any]()
    heldout = len(ROUND) * len(pairs(things.things, True))
    sizes: tuple[tuple[Split, int], ...] = (("valid", count), ("heldout", min(count, heldout)))
    for split, size in sizes:
        examples = [make_example(things.things, split, index) for index in range(size)]
        prompts = [captions(things.things, split, index, one)[0] for index, one in enumerate(examples)]
        first, best = sample(model, ranker, prompts)
        metrics[f"{split}: one image per prompt"] = {"prompts": size} | accuracy(judge.read(first), examples)
        metrics[f"{split}: best of {BEST_OF}"] = {"prompts": size} | accuracy(judge.read(best), examples)
        recipe.write_sheet(first[:SHEET], folder / f"{split}.png", COLUMNS)
        if split == "valid":
            metrics |= write_nearest(things, first[:SHEET], folder / "nearest.png")
    return metrics


def sample(model: Dalle, ranker: ClipRanker, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """uint8[n, S, S, 3] twice: the first candidate of each prompt, and the best by the ranker."""
    first, best = [], []
    for at in tqdm(range(0, len(prompts), AT_ONCE), desc=f"{AT_ONCE} prompts, {BEST_OF} images each", disable=None):
        some = prompts[at : at + AT_ONCE]
        images = model.generate(some, num_candidates=BEST_OF, ranker=None, mixed_batches=True).images
        first.extend(images[:, 0])
        best.extend(own[ranker.rank(prompt, own)[0]] for prompt, own in zip(some, images, strict=True))
    return np.stack(first), np.stack(best)


def write_nearest(things: Things, images: np.ndarray, file: Path) -> dict[str, Any]:
    """Writes rows of samples, each above its nearest training image; returns how near these are."""
    count = len(ROUND) * len(pairs(things.things, False))
    train = np.stack([render(things, make_example(things.things, "train", index)) for index in range(count)])
    flat = train.reshape(len(train), -1).astype(np.int16)
    near, distances = [], []
    for image in tqdm(images, desc="nearest", disable=None):
        errors = np.abs(flat - image.reshape(-1).astype(np.int16)).mean(1, dtype=np.float32)
        near.append(train[errors.argmin()])
        distances.append(float(errors.min()) / 255)
    both = np.full((2, -(-len(images) // COLUMNS) * COLUMNS, *images.shape[1:]), 255, np.uint8)
    both[0, : len(images)], both[1, : len(images)] = images, np.stack(near)
    rows = both.reshape(2, -1, COLUMNS, *images.shape[1:]).swapaxes(0, 1)  # a row of samples, a row of nearest images
    recipe.write_sheet(rows.reshape(-1, *images.shape[1:]), file, COLUMNS)
    return {"distance to the nearest training image": {
        "median": round(float(np.median(distances)), 4), "least": round(min(distances), 4)}}  # fmt: skip


def write_visitors(model: Dalle, ranker: ClipRanker, file: Path) -> None:
    """Writes a sheet for visitor_prompts.txt: the ranker's best of 16 for each prompt, in that order.

    Also writes a text file with the unknown-word warning for each prompt.
    """
    prompts = VISITOR_PROMPTS.read_text(encoding="utf-8").splitlines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the text file has them
        recipe.write_sheet(sample(model, ranker, prompts)[1], file, COLUMNS)
    known_words = model.tokenizer.known_words
    assert known_words is not None
    lines = [f"{prompt}: {known_words.warning(prompt, 'demo') or 'all words known'}\n" for prompt in prompts]
    file.with_suffix(".txt").write_text("".join(lines), encoding="utf-8")
