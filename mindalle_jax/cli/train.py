"""`mindalle finetune`, `train-vqgan`, `train-clip` and `train-tokenizer`."""

import argparse
from collections.abc import Callable

from mindalle_jax.errors import UsageError


def _finetune(arguments: argparse.Namespace) -> None:
    from mindalle_jax.training.finetune import finetune

    _run(finetune, arguments)
    print(f"{arguments.out}: a model; mindalle sample --model {arguments.out}")


def _train_vqgan(arguments: argparse.Namespace) -> None:
    from mindalle_jax.training.vqgan.run import train_vqgan

    _run(train_vqgan, arguments)
    print(f"{arguments.out}: a VQGAN; mindalle prepare-codes --model {arguments.out}, or training.vqgan of finetune")


def _train_clip(arguments: argparse.Namespace) -> None:
    from mindalle_jax.training.clip.run import train_clip

    _run(train_clip, arguments)
    print(f"{arguments.out}: a CLIP model; mindalle sample --ranker {arguments.out}")


def _run(train: Callable[..., bool], arguments: argparse.Namespace) -> None:
    if any("=" not in override for override in arguments.overrides):
        raise UsageError("overrides have the form section.key=value, such as data.train=photos")
    if arguments.distributed:
        from mindalle_jax.runtime.devices import join_processes

        join_processes()
    complete = train(
        arguments.config, arguments.overrides, arguments.out, ignore_fingerprint=arguments.ignore_fingerprint
    )
    if not complete:
        raise KeyboardInterrupt  # so that a script does not go on as if there were a model


def _train_tokenizer(arguments: argparse.Namespace) -> None:
    from mindalle_jax.training.tokenizers import train_tokenizer

    print(train_tokenizer(arguments.data, arguments.out, vocab_size=arguments.vocab_size, kind=arguments.kind))
