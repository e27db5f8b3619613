"""minDALL-E in JAX/Flax: text to image on GPU, TPU and CPU."""

__version__ = "0.1.0"

from mindalle_jax.generation import Generation
from mindalle_jax.pipeline import Dalle, ImageGPT

__all__ = ["Dalle", "Generation", "ImageGPT", "__version__"]
