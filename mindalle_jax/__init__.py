"""minDALL-E in JAX/Flax: text to image on GPU, TPU and CPU."""

__version__ = "0.1.0"

from mindalle_jax.generation import Generation, Progress
from mindalle_jax.pipeline import Dalle, ImageGPT
from mindalle_jax.ranking.ranker import ClipRanker

__all__ = ["ClipRanker", "Dalle", "Generation", "ImageGPT", "Progress", "__version__"]
