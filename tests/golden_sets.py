"""Where the arrays of the original implementation lie: one set in every clone, a larger one beside some checkouts."""

from pathlib import Path

_TESTS = Path(__file__).resolve().parent
_LARGER = _TESTS.parents[1] / "shared" / "golden"

GOLDEN_SETS = {"small": _TESTS / "golden"} | ({"large": _LARGER} if _LARGER.is_dir() else {})
"""Name of a set -> its folder; README.md in it says what its files hold."""
