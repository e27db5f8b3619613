"""minDALL-E in JAX/Flax: text to image on GPU, TPU and CPU."""

__version__ = "0.1.0"

from mindalle_jax.pipeline import Dalle, ImageGPT
from mindalle_jax.ranking.ranker import ClipRanker
from mindalle_jax.sampling.result import Generation, Progress

__all__ = ["ClipRanker", "Dalle", "Generation", "ImageGPT", "Progress", "__version__"]
