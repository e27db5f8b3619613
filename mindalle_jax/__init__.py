"""minDALL-E in JAX/Flax: text to image on GPU, TPU and CPU."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindalle_jax.image_gpt import ImageGPT
    from mindalle_jax.pipeline import Dalle
    from mindalle_jax.ranking.ranker import ClipRanker
    from mindalle_jax.sampling.options import Progress, SamplingOptions
    from mindalle_jax.sampling.result import Generation
    from mindalle_jax.training.api import finetune

__version__ = "0.1.0"
__all__ = ["ClipRanker", "Dalle", "Generation", "ImageGPT", "Progress", "SamplingOptions", "__version__", "finetune"]

_HOMES = {
    "ClipRanker": "ranking.ranker",
    "Dalle": "pipeline",
    "Generation": "sampling.result",
    "ImageGPT": "image_gpt",
    "Progress": "sampling.options",
    "SamplingOptions": "sampling.options",
    "finetune": "training.api",
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for: `import mindalle_jax` imports neither JAX nor Flax."""
    if name in ("set_seed", "clip_score"):  # of the original
        from mindalle_jax.interop.torch_calls import MOVED

        raise ImportError(f"{name} is not here: {MOVED[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
