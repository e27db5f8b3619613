"""The result of `generate`: images with their codes, scores and seeds, and how they are written to a folder."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mindalle_jax.errors import OutputError, UsageError


@dataclasses.dataclass(frozen=True)
class Generation:
    """Images in candidate order. For a list of P prompts every array has a leading axis P before the n candidates."""

    images: np.ndarray
    """uint8[(P,) n, H, W, 3]"""
    codes: np.ndarray
    """int32[(P,) n, h * w]; -1 where drawing has not come yet, or was stopped"""
    scores: np.ndarray | None
    """f32[(P,) n], higher is better: cosines of CLIP or log-likelihoods. NaN for an image that is not complete. None
    without a ranker"""
    seeds: np.ndarray
    """uint32[(P,) n]: candidate i of a seed is the same image however many are drawn"""
    prompts: list[str]
    """P prompts, or one; what was drawn without text has the name of its class, or ``"""
    meta: dict[str, Any]
    """Settings, model, device and versions: everything needed to draw the same images again."""

    @property
    def order(self) -> np.ndarray:
        """int64[(P,) n]: candidates from best to worst, equal ones by number; without scores 0, 1, 2, ..."""
        if self.scores is None:
            return np.broadcast_to(np.arange(self.seeds.shape[-1]), self.seeds.shape)
        return np.argsort(-self.scores, axis=-1, stable=True)  # NaN comes last

    def of_prompt(self, p: int) -> "Generation":
        """The images of one of a list of prompts, as a call with that prompt alone gives them."""
        scores = None if self.scores is None else self.scores[p]
        meta = (
            self.meta | {"num_tokens": self.meta["num_tokens"][p : p + 1]} if "num_tokens" in self.meta else self.meta
        )
        return Generation(self.images[p], self.codes[p], scores, self.seeds[p], self.prompts[p : p + 1], meta)

    def grid(self, best: int | None = None) -> Image.Image:
        """A contact sheet, one block of rows a prompt: the images from best to worst, or at most `best` of them.

        Under each stands its candidate number; with scores its rank, its score, and the number.
        """
        blocks = self._ranked(best)
        n, height, width = len(blocks[0]), *self.images.shape[-3:-1]
        columns = min(n, max(4, math.ceil(math.sqrt(n * 1.5))))
        rows = math.ceil(n / columns)
        pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        captions = [[_caption(entry) for entry in block] for block in blocks]
        gap, label = 4, 14
        widest = max(math.ceil(pen.textlength(text)) + 4 for block in captions for text in block)
        cell_w, cell_h = max(width, widest) + gap, height + label + gap
        sheet = Image.new("RGB", (columns * cell_w + gap, len(blocks) * rows * cell_h + gap), "white")
        pen = ImageDraw.Draw(sheet)
        images = self.images.reshape(len(blocks), -1, *self.images.shape[-3:])
        for p, block in enumerate(blocks):
            for i, entry in enumerate(block):
                x, y = gap + i % columns * cell_w, gap + (p * rows + i // columns) * cell_h
                sheet.paste(Image.fromarray(images[p, entry["candidate"]]), (x, y))
                pen.text((x + 2, y + height + 1), captions[p][i], fill="black")
        return sheet

    def save(self, folder: str | Path, *, best: int | None = None, overwrite: bool = False) -> list[Path]:
        """Writes one PNG per image, grid.png and meta.json; returns the paths of the images, best first.

        Names hold seed and candidate: seed0_candidate003.png; with scores also rank and score, so that a file browser
        shows the best first: rank000_score0.2713_seed0_candidate003.png. For a list of prompts prompt00_ comes first.
        best: at most that many images of each prompt; None: all. Those that are not complete are not written.
        A folder that exists and is not empty is an OutputError; with overwrite, files of the same names in it are
        replaced.
        """
        folder = Path(folder)
        blocks = self._ranked(best)
        images = self.images.reshape(len(blocks), -1, *self.images.shape[-3:])
        codes = self.codes.reshape(len(blocks), -1, self.codes.shape[-1])
        try:
            if not overwrite and folder.exists() and any(folder.iterdir()):
                raise OutputError(
                    f"{folder} exists and is not empty; name another place, or overwrite (overwrite=True, --overwrite)"
                )
            folder.mkdir(parents=True, exist_ok=True)
            paths, entries = [], []
            for p, block in enumerate(blocks):
                for entry in block:
                    candidate = entry["candidate"]
                    if codes[p, candidate].min() < 0:
                        continue
                    path = folder / self._file_name(p, entry)
                    Image.fromarray(images[p, candidate]).save(path)
                    paths.append(path)
                    about = {"file": path.name, "prompt": self.prompts[p], **entry}
                    entries.append(about | {"codes": codes[p, candidate].tolist()})
            self.grid(best).save(folder / "grid.png")
            text = json.dumps({**self.meta, "prompts": self.prompts}, indent=1, ensure_ascii=False)
            lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
            (folder / "meta.json").write_text(f'{text[:-2]},\n "pictures": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from None
        return paths

    def _ranked(self, best: int | None) -> list[list[dict[str, Any]]]:
        """For each prompt what is said of its images, best first: seed, candidate, and rank and score if ranked."""
        n = self.seeds.shape[-1]
        if best is not None and (type(best) is not int or best < 1):
            raise UsageError(f"best must be an integer of at least 1, not {best!r}")
        blocks = []
        for p, order in enumerate(self.order.reshape(-1, n)):
            block = [{"seed": int(self.seeds.reshape(-1, n)[p, i]), "candidate": int(i)} for i in order[:best]]
            if self.scores is not None:
                for rank, entry in enumerate(block):
                    score = float(self.scores.reshape(-1, n)[p, entry["candidate"]])
                    entry |= {"rank": rank, "score": None if math.isnan(score) else score}
            blocks.append(block)
        return blocks

    def _file_name(self, p: int, entry: dict[str, Any]) -> str:
        name = f"seed{entry['seed']}_candidate{entry['candidate']:03d}.png"
        if "rank" in entry:
            name = f"rank{entry['rank']:03d}_score{_short(entry['score'])}_{name}"
        return f"prompt{p:02d}_{name}" if self.images.ndim == 5 else name


def _caption(entry: dict[str, Any]) -> str:
    if entry.get("score") is None:
        return f"{entry['candidate']}"
    return f"{entry['rank'] + 1}: {_short(entry['score'])} ({entry['candidate']})"


def _short(score: float) -> str:
    """Cosines with four decimals, log-likelihoods of hundreds with one."""
    return f"{score:.4f}" if abs(score) < 10 else f"{score:.1f}"
