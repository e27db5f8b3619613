"""Models and results that several files of sampling tests share."""

import pytest
from sampling_helpers import BATCH

from mindalle_jax import ImageGPT


@pytest.fixture(scope="session")
def plain(tiny_dalle):
    """Six candidates: two chunks, the second one padded."""
    return tiny_dalle.generate("the cat", num_candidates=6, batch_size=BATCH, seed=1, ranker="likelihood")


@pytest.fixture(scope="session")
def igpt(tiny_igpt_model_folder):
    return ImageGPT.from_pretrained(tiny_igpt_model_folder)
