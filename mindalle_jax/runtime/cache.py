"""Where downloaded models, converted models and compiled programs are kept."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$MINDALLE_CACHE`, else `$XDG_CACHE_HOME/mindalle-jax`, else `~/.cache/mindalle-jax`."""
    if own := os.environ.get("MINDALLE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mindalle-jax"
