"""The result of `generate`: images with their codes, scores and seeds, and how they are written to a folder."""

import dataclasses
import io
import json
import math
import numbers
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mindalle_jax.errors import OutputError, UsageError
from mindalle_jax.sampling.image_file import ImageRecord, write_image

NOT_SAMPLED = (128, 128, 128)
"""Color on a sheet of what is not sampled yet."""
FILE_NAME = re.compile(r"(prompt\d+_)?(rank\d+_score(-?\d+\.\d+|nan)_)?seed\d+_candidate\d+\.png")
"""Names of the images that `save` writes."""
SHOWN_PIXELS = 128
"""Smaller images are enlarged to about this width where a notebook shows them."""


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Generation:
    """The images of one prompt, with their codes, scores and seeds. A notebook shows it as a sheet.

    Arrays are in the order of the candidates. `len`, index and iteration give PIL images, the best first.

    For a list of P prompts, every array has a leading axis P before the n candidates. Index and iteration then give
    the Generation of each prompt.
    """

    images: np.ndarray
    """Images uint8[(P,) n, H, W, 3]."""
    codes: np.ndarray
    """Codes int32[(P,) n, h * w] in [0, V); -1 for a code that is not sampled yet."""
    scores: np.ndarray | None
    """Scores f32[(P,) n], higher is better: cosines by CLIP in [-1, 1], or log-likelihoods in nats. NaN for an image
    that is not complete. None without a ranker."""
    seeds: np.ndarray
    """Seeds uint32[(P,) n]. A candidate of a seed is the same image however many are sampled."""
    prompts: list[str]
    """The P prompts, or the one. For an image-only model, the name of the class, or the empty string."""
    meta: dict[str, Any]
    """Options, model, device and versions: everything that is needed to sample the same images again."""

    def __len__(self) -> int:
        """Number of images; for a list, number of prompts."""
        return len(self.images)

    def __getitem__(self, index: int | slice) -> Any:
        """Gives one image by its rank.

        Args:
            index: 0 is the best image. For a list of prompts, the number of a prompt. A slice gives a list.

        Returns:
            A PIL image; for a list of prompts, a Generation.

        Raises:
            IndexError: there is no such image or prompt.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)}, not {index}")
        if self.images.ndim == 5:
            return self.of_prompt(index % len(self))
        return Image.fromarray(self.images[self.order[index]])

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        height, width = self.images.shape[-3:-1]
        prompts = ", ".join(map(repr, self.prompts[:2])) + (", ..." if len(self.prompts) > 2 else "")
        ranked = ""
        if self.scores is not None and np.isfinite(self.scores).any():
            ranked = f", ranked by {self.meta.get('ranker')}, best {_short(float(np.nanmax(self.scores)))}"
        count, complete = self.seeds.size, int((self.codes >= 0).all(axis=-1).sum())
        unfinished = "" if complete == count else f", {complete} complete"
        images = "1 image" if count == 1 else f"{count} images"
        return f"<Generation of {prompts}: {images} of {width} x {height}{unfinished}{ranked}>"

    def _repr_png_(self) -> bytes:
        """The sheet that a notebook shows."""
        file = io.BytesIO()
        self.grid(scale=max(1, SHOWN_PIXELS // self.images.shape[-2])).save(file, format="PNG")
        return file.getvalue()

    def best(self, n: int) -> list[Any]:
        """Gives the best images.

        Args:
            n: how many, at most.

        Returns:
            PIL images, the best first; for a list of prompts, one such list for each prompt.

        Raises:
            UsageError: n is not an integer of at least 1.
        """
        if self.images.ndim == 5:
            return [one.best(n) for one in self]
        return [Image.fromarray(self.images[entry["candidate"]]) for entry in self._ranked(n)[0]]

    @property
    def order(self) -> np.ndarray:
        """Candidates int64[(P,) n] from best to worst, equal ones by number; without scores 0, 1, 2, ..."""
        if self.scores is None:
            return np.broadcast_to(np.arange(self.seeds.shape[-1]), self.seeds.shape)
        return np.argsort(-self.scores, axis=-1, stable=True)  # NaN comes last

    def of_prompt(self, p: int) -> "Generation":
        """Gives the images of one prompt of a list.

        Args:
            p: number of the prompt, from 0.

        Returns:
            What a call with that prompt alone gives.

        Raises:
            IndexError: there is no such prompt.
        """
        if self.images.ndim == 4:
            if p != 0:
                raise IndexError(f"there is one prompt, number 0, and none of number {p}")
            return self
        scores = None if self.scores is None else self.scores[p]
        meta = (
            self.meta | {"num_tokens": self.meta["num_tokens"][p : p + 1]} if "num_tokens" in self.meta else self.meta
        )
        return Generation(self.images[p], self.codes[p], scores, self.seeds[p], self.prompts[p : p + 1], meta)

    def grid(self, best: int | None = None, *, scale: int = 1) -> Image.Image:
        """Makes a sheet of the images, from best to worst, with one block of rows per prompt.

        Below each image stands the number of its candidate; with scores, its rank, its score and the number. What is
        not sampled yet is grey.

        Args:
            best: at most this many images of each prompt; None is all.
            scale: enlarges images this many times.

        Returns:
            The sheet, a PIL image in RGB.

        Raises:
            UsageError: best is not an integer of at least 1.
        """
        blocks = self._ranked(best)
        n, height, width = len(blocks[0]), *(scale * side for side in self.images.shape[-3:-1])
        # From a square to twice as wide as high, whichever leaves the fewest cells empty: 16 are 4 x 4, 96 are 12 x 8.
        widths = range(math.ceil(math.sqrt(n)), math.ceil(math.sqrt(2 * n)) + 1)
        columns = min(n, max(4, min(widths, key=lambda width: (-n % width, -width))))
        rows = math.ceil(n / columns)
        pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        captions = [[_caption(entry) for entry in block] for block in blocks]
        gap, label = 4, 14
        widest = max(math.ceil(pen.textlength(text)) + 4 for block in captions for text in block)
        cell_w, cell_h = max(width, widest) + gap, height + label + gap
        sheet = Image.new("RGB", (columns * cell_w + gap, len(blocks) * rows * cell_h + gap), "white")
        pen = ImageDraw.Draw(sheet)
        for p, block in enumerate(blocks):
            for i, entry in enumerate(block):
                image = Image.fromarray(self._sampled_part(p, entry["candidate"]))
                image = image if scale == 1 else image.resize((width, height), Image.Resampling.BICUBIC)
                x, y = gap + i % columns * cell_w, gap + (p * rows + i // columns) * cell_h
                sheet.paste(image, (x, y))
                pen.text((x + 2, y + height + 1), captions[p][i], fill="black")
        return sheet

    def save(self, folder: str | os.PathLike[str], *, best: int | None = None, overwrite: bool = False) -> list[Path]:
        """Writes one PNG per image, `grid.png` and `meta.json`.

        Without a ranker, a file is named by seed and candidate: `seed0_candidate003.png`. With scores, rank and score
        come first, so that a file browser shows the best first: `rank001_score0.2713_seed0_candidate003.png`. For a
        list of prompts, `prompt00_` comes before that. Every PNG says how it was made; `mindalle show FILE` prints
        this. Images that are not complete are not written.

        Args:
            folder: a new or empty folder.
            best: at most this many images of each prompt; None is all.
            overwrite: if True, the images that `meta.json` in the folder names are removed, and files of the same
                names are replaced. Other files stay.

        Returns:
            Paths of the images, the best first.

        Raises:
            OutputError: the folder is not empty and overwrite is False, or it cannot be written.
            UsageError: no image is complete, best is out of range, or folder is the name of an image file.
        """
        folder = Path(os.path.expanduser(folder))
        if folder.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            raise UsageError(f"{folder}: save writes a folder; images[0].save({str(folder)!r}) writes one image")
        if not (self.codes >= 0).all(axis=-1).any():
            raise UsageError("no image is complete: there is nothing to save")
        blocks = self._ranked(best)
        images = self.images.reshape(len(blocks), -1, *self.images.shape[-3:])
        codes = self.codes.reshape(len(blocks), -1, self.codes.shape[-1])
        try:
            if not overwrite and folder.exists() and any(folder.iterdir()):
                raise OutputError(
                    f"{folder} exists and is not empty; name another folder, or overwrite (overwrite=True, --overwrite)"
                )
            folder.mkdir(parents=True, exist_ok=True)
            for path in _images_of_before(folder):
                path.unlink(missing_ok=True)
            paths, entries = [], []
            for p, block in enumerate(blocks):
                for entry in block:
                    candidate = entry["candidate"]
                    if codes[p, candidate].min() < 0:
                        continue
                    path = folder / self._file_name(p, entry)
                    record = ImageRecord(
                        prompt=self.prompts[p],
                        seed=entry["seed"],
                        candidate=candidate,
                        codes=codes[p, candidate],
                        score=entry.get("score"),
                        settings=self.meta,
                    )
                    write_image(path, images[p, candidate], record)
                    paths.append(path)
                    about = {"file": path.name, "prompt": self.prompts[p], **entry}
                    entries.append(about | {"codes": codes[p, candidate].tolist()})
            finished = max(1, int((codes >= 0).all(axis=-1).sum(axis=-1).max()))
            self.grid(min(best or finished, finished)).save(folder / "grid.png")
            text = json.dumps({**self.meta, "prompts": self.prompts}, indent=1, ensure_ascii=False)
            lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
            (folder / "meta.json").write_text(f'{text[:-2]},\n "pictures": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from None
        return paths

    def _ranked(self, best: int | None) -> list[list[dict[str, Any]]]:
        """Returns an entry per image, best first, for each prompt: seed, candidate; if ranked, rank and score."""
        n = self.seeds.shape[-1]
        if best is not None and (not isinstance(best, numbers.Integral) or isinstance(best, bool) or best < 1):
            raise UsageError(f"best must be an integer of at least 1, not {best!r}")
        blocks = []
        for p, order in enumerate(self.order.reshape(-1, n)):
            block = [{"seed": int(self.seeds.reshape(-1, n)[p, i]), "candidate": int(i)} for i in order[:best]]
            if self.scores is not None:
                for rank, entry in enumerate(block, 1):
                    score = float(self.scores.reshape(-1, n)[p, entry["candidate"]])
                    entry |= {"rank": rank, "score": None if math.isnan(score) else score}
            blocks.append(block)
        return blocks

    def _sampled_part(self, p: int, candidate: int) -> np.ndarray:
        """One image uint8[H, W, 3] whose patches without a code have the color NOT_SAMPLED."""
        image = self.images.reshape(-1, *self.seeds.shape[-1:], *self.images.shape[-3:])[p, candidate]
        codes = self.codes.reshape(-1, *self.seeds.shape[-1:], self.codes.shape[-1])[p, candidate]
        if codes.min() >= 0:
            return image
        side = math.isqrt(len(codes))
        missing = np.kron(codes.reshape(side, side) < 0, np.ones((len(image) // side,) * 2, bool))
        return np.where(missing[..., None], np.array(NOT_SAMPLED, np.uint8), image)

    def _file_name(self, p: int, entry: dict[str, Any]) -> str:
        name = f"seed{entry['seed']}_candidate{entry['candidate']:03d}.png"
        if "rank" in entry:
            name = f"rank{entry['rank']:03d}_score{_short(entry['score'])}_{name}"
        return f"prompt{p:02d}_{name}" if self.images.ndim == 5 else name


def _caption(entry: dict[str, Any]) -> str:
    if entry.get("score") is None:
        return f"{entry['candidate']}"
    return f"{entry['rank']}: {_short(entry['score'])} ({entry['candidate']})"


def _images_of_before(folder: Path) -> list[Path]:
    """Returns the images that meta.json in a folder names. New files have other scores and do not replace them."""
    try:
        tree = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        names = [entry["file"] for entry in tree["pictures"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [folder / name for name in names if isinstance(name, str) and FILE_NAME.fullmatch(name)]


def _short(score: float | None) -> str:
    """Returns a score as text: cosines with four decimals, log-likelihoods with one."""
    if score is None:
        return "nan"
    return f"{score:.4f}" if abs(score) < 10 else f"{score:.1f}"
