"""Reads the things: emoji that exist in all three styles, with their images, names and keywords."""

import functools
import io
import json
import re
import tarfile
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from scripts.emoji.packages import EMOJIBASE, EMOJILIB, FLUENT, NOTO, TWEMOJI, read_members

STYLES = ("noto", "flat", "3d")
SIDE = 64
"""Side of an image in pixels; MARGIN pixels on each side are ground. Both are multiples of the side of a code."""
MARGIN = 4
LEFT_OUT = frozenset(("People & Body", "Flags", "Symbols", "Component"))
CLOCK_FACES = range(0x1F550, 0x1F568)
"""Code points of 24 times of day, which are left out."""
NEAR = 24.0
"""Decibels. If two things are nearer than this to each other in any style, one of them is left out."""
MAX_WORDS = 2
"""The usual name of a thing has at most this many words, and so has a keyword."""
ALL_OF = "Animals & Nature"
"""All things of this category are taken. Things of other categories need a name of one word: that is what people type,
and training has no time for more images."""
NO_KEYWORDS = frozenset("and no not of off on or the to with 3d flat noto style emoji above beside below".split())


class Thing(NamedTuple):
    """The object that an emoji shows."""

    emoji: str
    names: tuple[str, ...]
    """The first is the usual name. No other thing has any of these names."""
    keywords: tuple[str, ...]
    """Words that describe the thing; other things may have them too."""


class Things(NamedTuple):
    """All things of the data set."""

    things: tuple[Thing, ...]
    pixels: np.ndarray
    """uint8[things, STYLES, s, s, 4], s = SIDE - 2 MARGIN: red, green, blue, alpha, the colors times alpha."""


@functools.lru_cache(maxsize=2)
def read_things(packages: Path) -> Things:
    """All things, in the order of Unicode, from the archives in a folder. Raises DataError."""
    entries = json.loads(read_members(packages / NOTO.archive, ["emoji.json"])[0])
    labels = {
        row["hexcode"]: row for row in json.loads(read_members(packages / EMOJIBASE.archive, ["en/data.json"])[0])
    }
    words = json.loads(read_members(packages / EMOJILIB.archive, ["dist/emoji-en-US.json"])[0])
    with tarfile.open(packages / FLUENT.archive) as archive:
        fluent = {name.removeprefix("package/") for name in archive.getnames()}
    rows, files = [], []
    for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
        code = entry["unified"].lower()
        asset = f"assets/{code}.webp" if f"assets/{code}.webp" in fluent else f"assets/{code.replace('-fe0f', '')}.webp"
        shown = entry["has_img_google"] and entry["has_img_twitter"] and asset in fluent
        if shown and entry["category"] not in LEFT_OUT and int(code.split("-")[0], 16) not in CLOCK_FACES:
            rows.append(entry)
            files.append((f"img/google/64/{entry['image']}", f"img/twitter/64/{entry['image']}", asset))
    styles = [
        [read_image(data) for data in read_members(packages / package.archive, [row[style] for row in files])]
        for style, package in enumerate((NOTO, TWEMOJI, FLUENT))
    ]
    pixels = np.stack([np.stack(images) for images in styles], axis=1)
    texts = [_texts(row, labels, words) for row in rows]
    near = _near_ones(pixels, [len(names[0].split()) for _, names, _ in texts])
    kept = [number for number, row in enumerate(rows) if number not in near and _is_short(row, texts[number][1])]
    return Things(_name_all([texts[number] for number in kept]), pixels[kept])


def read_image(data: bytes) -> np.ndarray:
    """Decodes an image: uint8[s, s, 4], premultiplied, so that scaling mixes in no color of transparent pixels."""
    inner = SIDE - 2 * MARGIN
    image = Image.open(io.BytesIO(data)).convert("RGBA").convert("RGBa")
    return np.asarray(image.resize((inner, inner), Image.Resampling.LANCZOS, reducing_gap=None))


def on_white(pixels: np.ndarray) -> np.ndarray:
    """f32[..., s, s, 3] in [0, 1] of premultiplied uint8[..., s, s, 4] on a white ground."""
    parts = pixels.astype(np.float32) / 255
    return np.clip(parts[..., :3] + 1 - parts[..., 3:], 0, 1)


def _near_ones(pixels: np.ndarray, num_words: list[int]) -> frozenset[int]:
    """Positions of the things to leave out: of two things that look alike, the name with fewer words is kept."""
    limit = 10 ** (-NEAR / 10)
    near = np.zeros((len(pixels), len(pixels)), bool)
    for style in range(len(STYLES)):
        flat = on_white(pixels[:, style]).reshape(len(pixels), -1)
        squares = (flat**2).sum(1)
        near |= (squares[:, None] + squares - 2 * flat @ flat.T) / flat.shape[1] < limit
    kept: list[int] = []
    for number in sorted(range(len(pixels)), key=lambda number: (num_words[number], number)):
        if not near[number, kept].any():
            kept.append(number)
    return frozenset(range(len(pixels))) - frozenset(kept)


def _is_short(entry: dict[str, Any], names: list[str]) -> bool:
    one_word = any(len(name.split()) == 1 for name in names)
    return len(names[0].split()) <= MAX_WORDS and (one_word or entry["category"] == ALL_OF)


def _texts(
    entry: dict[str, Any], labels: dict[str, Any], words: dict[str, list[str]]
) -> tuple[str, list[str], list[str]]:
    """(emoji, names with the usual name first, keywords) from the packages."""
    code = entry["unified"]
    emoji = "".join(chr(int(part, 16)) for part in code.split("-"))
    label = labels.get(code) or labels[code.replace("-FE0F", "")]
    lib = words.get(emoji) or words.get(emoji.replace("\ufe0f", "")) or []
    names = [*_clean([label["label"]], "0-9"), *_clean([*lib[:1], *entry["short_names"]])]
    return emoji, list(dict.fromkeys(names)), _clean([*label.get("tags", []), *lib[1:]])


def _clean(texts: list[str], digits: str = "") -> list[str]:
    """Plain lower-case texts, each once and without accents; texts with signs or other digits are left out."""
    plain = (unicodedata.normalize("NFKD", text.lower().replace("_", " ").replace("’", "'")) for text in texts)
    found = ("".join(letter for letter in text if not unicodedata.combining(letter)).strip() for text in plain)
    return list(dict.fromkeys(text for text in found if re.fullmatch(rf"[a-z{digits}][a-z{digits}' -]*[a-z]", text)))


def _name_all(texts: list[tuple[str, list[str], list[str]]]) -> tuple[Thing, ...]:
    """Makes things whose names are unique; the usual name of a thing is never a further name of another thing."""
    usual = {names[0] for _, names, _ in texts}
    further = [name for _, names, _ in texts for name in dict.fromkeys(names[1:])]
    things = []
    for emoji, names, keywords in texts:
        own = [name for name in names[1:] if name not in usual and further.count(name) == 1]
        words = [
            word for word in keywords
            if word not in names and len(word) > 2 and len(word.split()) <= MAX_WORDS
            and not NO_KEYWORDS & set(word.split())
        ]  # fmt: skip
        things.append(Thing(emoji, (names[0], *own), tuple(words)))
    return tuple(things)
