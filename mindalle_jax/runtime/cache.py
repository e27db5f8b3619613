"""The folder in which downloaded models, converted models and compiled programs are kept."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Returns `$MINDALLE_CACHE`, else `$XDG_CACHE_HOME/mindalle-jax`, else `~/.cache/mindalle-jax`."""
    if own := os.environ.get("MINDALLE_CACHE"):
        return Path(os.path.expanduser(own))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "mindalle-jax"
