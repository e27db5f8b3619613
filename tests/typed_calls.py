# pyright: reportUnnecessaryTypeIgnoreComment=true
"""Calls that a type checker must accept, and mistakes that it must find. `make lint` checks this file; nothing runs it.

A mistake that is no longer found makes its `pyright: ignore` unnecessary, which is an error here.
"""

from mindalle_jax import Dalle, ImageGPT


def accepted(model: Dalle, classes: ImageGPT) -> None:
    """Every option by its name and type."""
    model.generate("a cat", num_candidates=2, seed=None, top_k=None, top_p=0.9, temperature=0, mixed_batches=True)
    model.complete(["a cat"], None, keep_rows=2, ranker="likelihood", kept_codes=None)
    for generation in model.stream("a cat", every=None, callback=lambda progress: progress.codes > 8):
        generation.grid()
    classes.generate(3, num_candidates=2)


def refused(model: Dalle, classes: ImageGPT) -> None:
    """Misspelt names, and values of another type."""
    model.generate("a cat", topk=5)  # pyright: ignore[reportCallIssue]
    model.stream("a cat", temperature="hot")  # pyright: ignore[reportArgumentType]
    model.complete("a cat", None, keep_rows=2, seed=1.5)  # pyright: ignore[reportArgumentType]
    model.generate_codes("a cat", ranker=3)  # pyright: ignore[reportArgumentType]
    classes.generate(3, num_candidate=2)  # pyright: ignore[reportCallIssue]
