"""storage/initialize.py: tables of positions; what a whole model starts from is in training/test_scratch.py."""

import itertools

import numpy as np
import pytest

from mindalle_jax.storage.initialize import order_rows, place_rows


@pytest.mark.parametrize("side, width", [(4, 48), (16, 192), (16, 1536)])
def test_places_look_alike_by_how_far_they_are_apart(side, width):
    """The product of two rows follows from the distance in rows and columns alone, and is largest at none."""
    rows = place_rows(side, width).astype(np.float64)
    products = (rows @ rows.T).reshape(side, side, side, side)
    assert abs(products[0, 0, 0, 0] - 0.5) < 1e-6
    for down, right in itertools.product(range(side), repeat=2):
        apart = [products[y, x, y + down, x + right] for y in range(side - down) for x in range(side - right)]
        assert np.ptp(apart) < 1e-6
        assert down == right == 0 or max(apart) < 0.499


@pytest.mark.parametrize("length, width", [(24, 192), (64, 1536)])
def test_positions_of_text_look_alike_by_how_far_they_are_apart(length, width):
    rows = order_rows(length, width).astype(np.float64)
    assert rows.shape == (length, width)
    products = rows @ rows.T
    assert abs(products[0, 0] - 0.5) < 1e-6
    for apart in range(1, length):
        found = np.diagonal(products, apart)
        assert np.ptp(found) < 1e-6 and found[0] < 0.499
