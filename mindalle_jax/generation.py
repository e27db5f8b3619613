"""What `generate` returns: pictures with their codes and seeds, and how they are written to a folder."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mindalle_jax.errors import OutputError


@dataclasses.dataclass(frozen=True)
class Generation:
    """Pictures in candidate order. For a list of P prompts every array has a leading axis P before the n candidates."""

    images: np.ndarray
    """uint8[(P,) n, H, W, 3]"""
    codes: np.ndarray
    """int32[(P,) n, h * w]"""
    seeds: np.ndarray
    """uint32[(P,) n]: candidate i of a seed is the same picture however many are drawn"""
    prompts: list[str]
    """P prompts, or one; what was drawn without text has the name of its class, or ``"""
    meta: dict[str, Any]
    """Settings, model, device and versions: everything needed to draw the same pictures again."""

    def grid(self) -> Image.Image:
        """A contact sheet: the pictures row by row, each with its candidate number; one block of rows a prompt."""
        blocks = self.images if self.images.ndim == 5 else self.images[None]
        _, n, height, width, _ = blocks.shape
        columns = min(n, max(4, math.ceil(math.sqrt(n * 1.5))))
        rows = math.ceil(n / columns)
        gap, label = 4, 14
        cell_w, cell_h = width + gap, height + label + gap
        sheet = Image.new("RGB", (columns * cell_w + gap, len(blocks) * rows * cell_h + gap), "white")
        pen = ImageDraw.Draw(sheet)
        for p, block in enumerate(blocks):
            for i, picture in enumerate(block):
                x, y = gap + i % columns * cell_w, gap + (p * rows + i // columns) * cell_h
                sheet.paste(Image.fromarray(picture), (x, y))
                pen.text((x + 2, y + height + 1), str(i), fill="black")
        return sheet

    def save(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Writes one PNG a picture, grid.png and meta.json; returns the paths of the pictures.

        Names hold the seed and the candidate: seed0_candidate003.png, after prompt00_ for a list of prompts. A folder
        that exists and is not empty is an OutputError; with overwrite, files of the same names in it are replaced.
        """
        folder = Path(folder)
        try:
            if not overwrite and folder.exists() and any(folder.iterdir()):
                raise OutputError(f"{folder} exists and is not empty; name another place or pass --overwrite")
            folder.mkdir(parents=True, exist_ok=True)
            paths, entries = [], []
            n = self.seeds.shape[-1]
            pictures = self.images.reshape(-1, *self.images.shape[-3:])
            codes = self.codes.reshape(len(pictures), -1)
            for at, (picture, code, seed) in enumerate(zip(pictures, codes, self.seeds.reshape(-1), strict=True)):
                p, candidate = divmod(at, n)
                prefix = f"prompt{p:02d}_" if self.images.ndim == 5 else ""
                path = folder / f"{prefix}seed{seed}_candidate{candidate:03d}.png"
                Image.fromarray(picture).save(path)
                paths.append(path)
                entries.append(
                    {
                        "file": path.name,
                        "prompt": self.prompts[p],
                        "seed": int(seed),
                        "candidate": candidate,
                        "codes": code.tolist(),
                    }
                )
            self.grid().save(folder / "grid.png")
            text = json.dumps({**self.meta, "prompts": self.prompts}, indent=1, ensure_ascii=False)
            lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
            (folder / "meta.json").write_text(f'{text[:-2]},\n "pictures": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from None
        return paths
