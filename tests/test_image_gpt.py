"""ImageGPT: images of a class, or of nothing; shapes and ranges of what goes in and out, and what is refused."""

import dataclasses

import numpy as np
import pytest

from mindalle_jax import Dalle, ImageGPT
from mindalle_jax.errors import CheckpointError, UsageError


@pytest.fixture(scope="module")
def igpt(tiny_igpt_model_folder) -> ImageGPT:
    """Class-conditional, 5 classes."""
    return ImageGPT.from_pretrained(tiny_igpt_model_folder)


@pytest.fixture(scope="module")
def free_igpt(tmp_path_factory, tiny_igpt_config, write_folder) -> ImageGPT:
    """Unconditional."""
    hparams = dataclasses.replace(tiny_igpt_config.stage2.hparams, n_classes=None)
    stage2 = dataclasses.replace(tiny_igpt_config.stage2, use_cls_cond=False, hparams=hparams)
    config = dataclasses.replace(tiny_igpt_config, stage2=stage2)
    return ImageGPT.from_pretrained(write_folder(tmp_path_factory.mktemp("free") / "free-igpt", config))


def test_class_conditional_model(igpt):
    generation = igpt.generate(3, num_candidates=3)
    assert generation.images.shape == (3, 32, 32, 3) and generation.codes.shape == (3, 64)
    assert generation.prompts == ["class 3"]
    assert igpt.num_classes == 5
    other = igpt.generate(4, num_candidates=3)
    assert (generation.codes != other.codes).any(axis=-1).all()
    logits = igpt.logits(generation.codes, [3, 3, 4])
    assert logits.shape == (3, 64, 80) and logits.dtype == np.float32
    assert np.abs(logits[1, 0] - logits[0, 0]).max() == 0 < np.abs(logits[2, 0] - logits[0, 0]).max()


def test_unconditional_model(free_igpt):
    generation = free_igpt.generate(num_candidates=3)
    assert generation.images.shape == (3, 32, 32, 3)
    assert generation.prompts == [""]
    assert free_igpt.num_classes is None
    assert free_igpt.logits(generation.codes[:, :4]).shape == (3, 4, 80)


@pytest.mark.parametrize(
    ("class_id", "message"),
    [(None, r"class-conditional: name a class in \[0, 5\)"), (5, r"\[0, 5\), not \[5, 5\]"), (-1, r"\[0, 5\)"),
     (1.0, "integers"), ("one", "no names"), (True, "integers")],
)  # fmt: skip
def test_wrong_classes_are_refused(igpt, class_id, message):
    """Class 5 of 5 would be clamped to class 4."""
    with pytest.raises(UsageError, match=message):
        igpt.generate(class_id, num_candidates=1)


def test_wrong_labels_are_refused(igpt, free_igpt):
    codes = np.zeros((2, 4), int)
    for labels, message in [([1], "2 rows of codes want as many texts"), ([[1], [2]], r"labels must be \[B\]"),
                            ([0, 5], r"\[0, 5\)"), (None, "class-conditional")]:  # fmt: skip
        with pytest.raises(UsageError, match=message):
            igpt.logits(codes, labels)
    with pytest.raises(UsageError, match="unconditional and takes no class"):
        free_igpt.logits(codes, [0, 0])
    with pytest.raises(UsageError, match="unconditional and takes no class"):
        free_igpt.generate(0)


def test_a_model_of_the_other_kind_is_refused(tiny_model_folder, tiny_igpt_model_folder):
    with pytest.raises(CheckpointError, match="text-to-image model; load it with Dalle"):
        ImageGPT.from_pretrained(tiny_model_folder)
    with pytest.raises(CheckpointError, match="image-only model; load it with ImageGPT"):
        Dalle.from_pretrained(tiny_igpt_model_folder)


@pytest.mark.parametrize("wrong", [{"top_k": 81}, {"temperature": -1}, {"num_candidates": 0}], ids=str)
def test_wrong_settings_are_refused(igpt, wrong):
    """Before anything is sampled. The values are those of tests/sampling/test_options.py."""
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} must be"):
        igpt.generate(1, **({"num_candidates": 1} | wrong))


def test_a_class_by_its_name(igpt):
    """The same image as by its number; names come with the folder, from the classes of the training data."""
    igpt.class_names = ("ant", "bee", "cow", "doe", "elk")
    by_name, by_number = (igpt.generate(name, num_candidates=1, seed=1) for name in ("doe", 3))
    assert (by_name.codes == by_number.codes).all() and by_name.prompts == ["class 3"]
    with pytest.raises(UsageError, match="the model has no class 'dow', only ant, bee, cow, doe, elk"):
        igpt.generate("dow")
    igpt.class_names = None
    with pytest.raises(UsageError, match="the classes of this model have no names; name one by its number, not 'doe'"):
        igpt.generate("doe")
