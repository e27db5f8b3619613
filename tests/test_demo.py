"""The model of emoji in the package: small, credited, and its images are of what was asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindalle_jax import ClipRanker, Dalle
from mindalle_jax.cli import main
from mindalle_jax.hub.resolve import find_clip, find_model
from mindalle_jax.storage.files import DEMO, IN_PACKAGE, RANKER
from scripts.emoji.dataset import Example, captions, full_caption
from scripts.emoji.judge import Judge, accuracy
from scripts.emoji.packages import PACKAGES
from scripts.emoji.things import STYLES, Thing, Things
from scripts.emoji.train_demo import CARD

FOLDER = IN_PACKAGE[DEMO]
MB = 10**6


@pytest.fixture(scope="module")
def demo() -> tuple[Dalle, ClipRanker]:
    return Dalle.from_pretrained(DEMO), ClipRanker.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def some_things() -> Things:
    """24 of the things that the model learned, evenly spaced, with pixels as of Things."""
    with np.load(Path(__file__).with_name("demo_things.npz")) as saved:
        return Things(tuple(Thing(name, (name,), ()) for name in saved["names"].tolist()), saved["pixels"])


@pytest.fixture(scope="module")
def samples(demo, some_things) -> tuple[list[Example], np.ndarray]:
    """One image of each thing, in a style and on a ground, in a wording that training does not have."""
    examples = [
        Example(thing, STYLES[thing % 3], "sky" if thing % 6 == 0 else "white")
        for thing in range(len(some_things.things))
    ]
    prompts = [captions(some_things.things, "valid", 0, example)[0] for example in examples]
    return examples, demo[0].generate(prompts, num_candidates=1, mixed_batches=True).images[:, 0]


def test_what_the_package_holds():
    """Both models, weights in half precision, and papers; the whole package at most 30 MB."""
    package = [path for path in FOLDER.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in package) <= 30 * MB
    names = {"config.yaml", "README.md", "LICENSE", "metrics.json", "stage1.safetensors", "stage2.safetensors"}
    assert names | {"ranker/model.safetensors", "ranker/tokenizer.json"} <= {
        path.relative_to(FOLDER).as_posix() for path in package if path.is_relative_to(FOLDER)
    }
    assert find_model("demo") == FOLDER and find_clip("demo") == FOLDER / RANKER


def test_the_card_credits_the_authors_of_the_images():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(package.credit in card for package in PACKAGES)
    assert [line for line in CARD.splitlines() if "{" not in line and line not in card] == []  # what the recipe writes
    assert all(text in card for text in ("Google", "Twitter", "Microsoft", "Apache-2.0", "CC-BY 4.0", "MIT"))


def test_it_samples_what_is_asked_for(samples, some_things):
    """Few prompts, which fail where images have come loose from their captions; see metrics.json."""
    examples, images = samples
    metrics = json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))
    right = accuracy(Judge(some_things).read(images), examples)
    expected = metrics["valid: one image per prompt"]
    assert right["thing and style"] >= expected["thing and style"] - 0.15
    assert right["ground"] >= expected["ground"] - 0.1


def test_the_ranker_knows_which_image_is_of_which_prompt(demo, samples, some_things):
    """The image of a prompt comes first of eight, with at most one exception."""
    examples, images = samples
    prompts = [full_caption(some_things.things, example) for example in examples[:8]]
    first = [int(demo[1].rank(prompt, images[:8])[0]) for prompt in prompts]
    assert sum(number == best for number, best in enumerate(first)) >= 7


def test_without_a_style_the_candidates_vary(demo, some_things):
    """All show the thing, and not all in one style."""
    name = some_things.things[0].names[0]
    seen = Judge(some_things).read(demo[0].generate(f"a {name}", num_candidates=16).images)
    assert sum(one.thing == 0 for one in seen) >= 12
    assert len({one.style for one in seen} - {None}) > 1


def test_the_command_uses_it_and_its_ranker(tmp_path):
    """Nothing but a prompt and a place is needed."""
    out = tmp_path / "out"
    assert main(["sample", "a parrot", "--out", str(out), "--num-candidates", "4"]) == 0
    assert len(list(out.glob("rank*_score*_seed0_candidate*.png"))) == 4
    with Image.open(next(out.glob("rank001*"))) as best:
        assert best.size == (64, 64)
