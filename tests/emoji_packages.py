"""Archives as npm packs them, with a few emoji of our own."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.emoji.packages import EMOJIBASE, EMOJILIB, FLUENT, NOTO, PACKAGES, TWEMOJI, Package

EMOJI = {
    "1F600": ("grinning face", ["grinning"], ["happy", "face"], "Smileys & Emotion"),
    "1F408": ("cat", ["cat2"], ["animal", "kitten"], "Animals & Nature"),
    "1F415": ("dog", ["dog2"], ["animal", "puppy", "3d", "not"], "Animals & Nature"),
    "1F34E": ("red apple", ["apple"], ["fruit", "food"], "Food & Drink"),
    "1F355": ("pizza", ["pizza"], ["food", "a slice of it"], "Food & Drink"),
    "1F680": ("rocket", ["rocket"], ["space"], "Travel & Places"),
    "2744-FE0F": ("snowflake", ["snowflake"], ["cold"], "Travel & Places"),
    "1FA85": ("piñata", ["pinata"], ["party"], "Activities"),
    "1F43B-200D-2744-FE0F": ("polar bear", ["polar_bear"], ["arctic"], "Animals & Nature"),
    "1F947": ("1st medal", ["medal"], ["gold"], "Activities"),
}
"""Code points -> name, short names, keywords, category."""
LEFT_OUT = {
    "1F3B1": ("pool 8 ball", ["8ball"], ["game"], "Activities"),
    "1F550": ("one o’clock", ["clock1"], ["time"], "Travel & Places"),
    "1F468": ("man", ["man"], ["person"], "People & Body"),
    "1F1EB-1F1F7": ("flag: France", ["fr"], ["flag"], "Flags"),
    "1F4AF": ("hundred points", ["100"], ["score"], "Symbols"),
    "1F63A": ("grinning cat face", ["smiley_cat"], ["cat"], "Animals & Nature"),  # looks like the cat
    "1F389": ("party popper", ["party_popper"], ["celebrate"], "Activities"),  # more than people type
    "1F9F6": ("yarn", ["yarn"], ["wool"], "Activities"),  # is not in all packages
}


def image_of(code: str, style: str, side: int) -> Image.Image:
    """RGBA: a disc with a bar, of colours and places of their own for each emoji and style."""
    seed = hashlib.sha256(("1F408" if code == "1F63A" else code).encode()).digest() + style.encode()
    random = np.random.default_rng(list(seed))
    y, x = np.mgrid[:side, :side] / side - 0.5
    image = np.zeros((side, side, 4), np.uint8)
    image[x**2 + y**2 < random.uniform(0.1, 0.24)] = [*random.integers(0, 230, 3), 255]
    turn, bar = random.uniform(0, np.pi), [*random.integers(0, 230, 3), 255]
    image[np.abs(x * np.cos(turn) + y * np.sin(turn)) < random.uniform(0.05, 0.2)] = bar
    return Image.fromarray(image)


def write_packages(folder: Path) -> tuple[Package, ...]:
    """Writes the archives; the packages with the digests that these have."""
    everything = EMOJI | LEFT_OUT
    entries, labels, words = [], [], {}
    for order, (code, (name, short_names, keywords, category)) in enumerate(everything.items()):
        entries.append({
            "unified": code, "image": f"{code.lower()}.png", "sort_order": order, "category": category,
            "short_names": short_names, "has_img_google": True, "has_img_twitter": code != "1F9F6",
        })  # fmt: skip
        labels.append({"hexcode": code.replace("-FE0F", ""), "label": name, "tags": keywords[:1]})
        words["".join(chr(int(part, 16)) for part in code.split("-"))] = [name.replace(" ", "_"), *keywords]
    members: dict[str, dict[str, bytes]] = {package.name: {} for package in PACKAGES}
    members[NOTO.name]["emoji.json"] = json.dumps(entries[::-1]).encode()
    members[EMOJIBASE.name]["en/data.json"] = json.dumps(labels).encode()
    members[EMOJILIB.name]["dist/emoji-en-US.json"] = json.dumps(words).encode()
    for code in everything:
        members[NOTO.name][f"img/google/64/{code.lower()}.png"] = _encoded(image_of(code, "noto", 64), "PNG")
        members[TWEMOJI.name][f"img/twitter/64/{code.lower()}.png"] = _encoded(image_of(code, "flat", 64), "PNG")
        asset = f"assets/{code.lower().replace('-fe0f', '')}.webp"
        members[FLUENT.name][asset] = _encoded(image_of(code, "3d", 256), "WEBP")
    return tuple(write_package(folder, package, members[package.name]) for package in PACKAGES)


def write_package(folder: Path, package: Package, files: dict[str, bytes]) -> Package:
    """Writes an archive with these files and the licence; the package with its digest."""
    files = {package.licence_file: package.licence_words.encode()} | files
    path = folder / package.archive
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return package._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()
