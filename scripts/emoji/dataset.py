"""A data set of emoji in three styles on white cards, with plain grounds around them and captions in many wordings.

Image n of a split is always the same, and so are its captions. A pair is a thing in a style. There are three splits:

    train     pairs to learn, with captions of TRAIN_FORMS; some captions have a keyword instead of the name
    valid     the same pairs, with captions of UNSEEN_FORMS, a wording that train does not have
    heldout   pairs that train does not have; train has their things in the other two styles
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from mindalle_jax.errors import OutputError, UsageError
from mindalle_jax.storage.files import new_folder
from scripts.chance import Chance
from scripts.emoji.things import MARGIN, SIDE, STYLES, Thing, Things

Split = Literal["train", "valid", "heldout"]
SPLITS = ("train", "valid", "heldout")
GROUNDS = {"white": (255, 255, 255), "sky": (178, 216, 242), "sand": (243, 226, 184), "grey": (205, 207, 210)}
"""Name -> RGB of the ground around the card. A caption that names no ground means the first one."""
ROUND = ("white", "white", "white", "white", "sky", "sand", "grey")
"""The grounds of the images of a pair, one after another."""
HELDOUT_SHARE = 32
"""One thing in this many is held out in one of its styles."""
STYLE_WORDS = {"noto": ("noto", "noto", "google"), "flat": ("flat", "flat", "twemoji"), "3d": ("3d", "3d", "fluent")}
STYLED = 0.85
"""Share of the captions that name the style. A caption that determines the image is learned much sooner."""
KEYWORDS = 0.06
"""Share of the captions of train that have a keyword where the name would be."""
CORNER = 4
"""Radius of the corners of the card, in pixels. Things are always on white, and MARGIN is a whole number of codes, so
what the model learns about a thing on one ground holds on all grounds."""
CAPTIONS = 4
FORMAT_VERSION = 3
MANIFEST = "emoji.json"

# {n}: a name; {a}: the name with an article; {s}: a word of the style.
TRAIN_FORMS = {
    False: (
        "{a}", "{a}", "{a}", "{n}", "{n}", "{n}", "the {n}", "{a} emoji", "{n} emoji", "a picture of {a}",
        "a drawing of {a}", "a photo of {a}", "an emoji of {a}", "an icon of {a}", "an image of {a}", "draw {a}",
        "a cute {n}",
    ),
    True: (
        "{a}, {s} style", "{a}, {s} style", "{s} {n}", "{s} {n}", "a {s} {n}", "{n} in {s} style", "{a} in {s} style",
        "{a} in {s}", "{n}, {s}", "{s} style {n}", "a {s} picture of {a}", "a {s} emoji of {a}", "a cute {s} {n}",
    ),
}  # fmt: skip
"""Whether the style is named -> forms of captions."""
UNSEEN_FORMS = {
    False: ("one {n}", "an icon of the {n}", "a cute emoji of {a}", "draw a cute {n}", "a picture of the {n}"),
    True: (
        "a drawing of {a} in {s} style", "an icon of {a}, {s}", "{n} emoji, {s} style", "draw {a} in {s}",
        "the {n} in {s}", "a photo of {a}, {s} style", "a {s} style emoji of {a}", "an image of the {n} in {s} style",
    ),
}  # fmt: skip
GROUND_FORMS = ("{} on {g}", "{} on a {g} background", "{} on a {g} ground")


class Example(NamedTuple):
    """The content of an image."""

    thing: int
    """Position among all things."""
    style: str
    ground: str


def heldout_style(thing: Thing) -> str | None:
    """The style in which a thing is held out; None if it is in no style."""
    digest = hashlib.blake2b(thing.emoji.encode(), digest_size=8).digest()
    share, style = divmod(int.from_bytes(digest, "big"), len(STYLES))
    return STYLES[style] if share % HELDOUT_SHARE == 0 else None


@functools.lru_cache(maxsize=4)
def pairs(things: tuple[Thing, ...], heldout: bool) -> tuple[tuple[int, str], ...]:
    """(thing, style) of all pairs that are held out, or of all that are not, in an arbitrary fixed order."""
    found = [
        (number, style)
        for number, thing in enumerate(things)
        for style in STYLES
        if (style == heldout_style(thing)) == heldout
    ]
    key = lambda pair: hashlib.blake2b(f"{things[pair[0]].emoji} {pair[1]}".encode()).digest()  # noqa: E731
    return tuple(sorted(found, key=key))


def make_example(things: tuple[Thing, ...], split: Split, index: int) -> Example:
    """Example `index` of a split. A split has no end: it repeats all pairs, each on the next ground of ROUND.

    Raises UsageError.
    """
    if split not in SPLITS or index < 0:
        raise UsageError(f"split must be one of {', '.join(SPLITS)} and index at least 0, not {split!r} and {index}")
    all_pairs = pairs(things, split == "heldout")
    turn, number = divmod(index, len(all_pairs))
    thing, style = all_pairs[number]
    return Example(thing, style, ROUND[(turn + number) % len(ROUND)])


def make_contrast(things: tuple[Thing, ...], index: int) -> Example:
    """An example of train that differs from make_example(things, "train", index) in thing, style or ground.

    From such pairs in one batch CLIP learns what captions say besides the thing. A thing is exchanged for one of the 12
    things before or after it, which are of its kind.
    """
    example, chance = make_example(things, "train", index), Chance(f"contrast {index}")
    while True:
        field = chance.of(("thing", "style", "style", "ground"))
        near = range(max(0, example.thing - 12), min(len(things), example.thing + 13))
        value = chance.of({"thing": near, "style": STYLES, "ground": tuple(GROUNDS)}[field])
        other = example._replace(**{field: value})
        if other != example and other.style != heldout_style(things[other.thing]):
            return other


def captions(things: tuple[Thing, ...], split: Split, index: int, example: Example, count: int = CAPTIONS) -> list[str]:
    """Captions of an example, in lower case; some may be equal. The first has the usual name and the style.

    Each names the ground unless it is white.
    """
    chance, thing = Chance(f"captions {split} {index} {example}"), things[example.thing]
    forms = TRAIN_FORMS if split == "train" else UNSEEN_FORMS
    found = []
    for number in range(count):
        styled = number == 0 or chance.share(STYLED)
        name = thing.names[0] if number == 0 or chance.share(0.6) else chance.of(thing.names)
        if split == "train" and number and thing.keywords and chance.share(KEYWORDS):
            name = chance.of(thing.keywords)
        style = chance.of(STYLE_WORDS[example.style])
        text = chance.of(forms[styled]).format(n=name, a=with_article(name), s=style)
        if example.ground != "white" or chance.share(0.05):
            text = chance.of(GROUND_FORMS).format(text, g=example.ground)
        found.append(text)
    return found


def full_caption(things: tuple[Thing, ...], example: Example) -> str:
    """The caption that names thing, style and ground of an example."""
    return f"{with_article(things[example.thing].names[0])}, {example.style} style on {example.ground}"


def with_article(name: str) -> str:
    """A name with its article; a name that looks like a plural gets none."""
    if name.endswith("s") and not name.endswith(("ss", "us", "is")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@functools.cache
def blank_card(ground: str) -> np.ndarray:
    """uint8[SIDE, SIDE, 3] of a card without a thing."""
    fine = 4
    mask = Image.new("L", (fine * SIDE, fine * SIDE))
    low, high = fine * MARGIN, fine * (SIDE - MARGIN) - 1
    ImageDraw.Draw(mask).rounded_rectangle((low, low, high, high), fine * CORNER, fill=255)
    white = np.asarray(mask.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)[:, :, None] / 255
    color = np.array(GROUNDS[ground], np.float32)
    return (color + white * (255 - color) + 0.5).astype(np.uint8)


def render(things: Things, example: Example) -> np.ndarray:
    """The image of an example, uint8[SIDE, SIDE, 3]."""
    image = blank_card(example.ground).astype(np.float32)
    parts = things.pixels[example.thing, STYLES.index(example.style)].astype(np.float32)
    inner = image[MARGIN:-MARGIN, MARGIN:-MARGIN]
    inner += parts[:, :, :3] - inner * parts[:, :, 3:] / 255
    return (np.clip(image, 0, 255) + 0.5).astype(np.uint8)


def write_emoji(folder: Path, things: Things, split: Split, count: int, *, contrasts: bool = False) -> None:
    """Writes the images 0 to count - 1 of a split as a data set that data/folders.py reads.

    metadata.jsonl has the captions. contrasts: for train only, write 000123-contrast.png with make_contrast(123) beside
    each image, and add full_caption to the captions of both.
    Does nothing if the folder holds exactly this already. Raises OutputError if it holds anything else, or UsageError.
    """
    if contrasts and split != "train":
        raise UsageError("contrasts are of the split train")
    wanted = dict(version=FORMAT_VERSION, split=split, count=count, contrasts=contrasts, things=len(things.things))
    if (folder / MANIFEST).exists() and json.loads((folder / MANIFEST).read_text(encoding="utf-8")) == wanted:
        return
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} holds something else; name another folder, or remove it")
    with new_folder(folder, overwrite=folder.is_dir()) as new:
        rows = []
        for index in tqdm(range(count), desc=folder.name, unit="image", disable=None):
            example = make_example(things.things, split, index)
            shown = {f"{index:06}.png": example}
            if contrasts:
                shown[f"{index:06}-contrast.png"] = make_contrast(things.things, index)
            for name, one in shown.items():
                Image.fromarray(render(things, one)).save(new / name)
                texts = captions(things.things, split, index, one)
                if contrasts:
                    texts = [full_caption(things.things, one), *texts]
                rows.append({"file_name": name, "text": texts, "thing": things.things[one.thing].names[0]})
        (new / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (new / MANIFEST).write_text(json.dumps(wanted), encoding="utf-8")
