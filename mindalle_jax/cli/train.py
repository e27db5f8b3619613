"""`mindalle finetune`, `train-vqgan`, `train-clip` and `train-tokenizer`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mindalle_jax.errors import UsageError


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a training run."""
    text = "changes to the configuration, as data.train=photos"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="configs/ has some to start from")
    text = "folder of the run, in the end a model; a run that is there is resumed"
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=text)
    text = "resume although the data set has changed since the checkpoint"
    parser.add_argument("--ignore-fingerprint", action="store_true", help=text)
    text = "this is one of several processes with the same --out (docs/fine-tuning.md, Several processes)"
    parser.add_argument("--distributed", action="store_true", help=text)


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mindalle train-tokenizer`."""
    parser.add_argument("data", metavar="DATA", help="a folder or tars of images with captions, as for finetune")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where its files go; a new folder")
    parser.add_argument("--vocab-size", required=True, type=int, metavar="N", help="tokens at most")
    text = "for the transformer that draws, or for a CLIP model"
    parser.add_argument("--kind", required=True, choices=["mindalle", "clip"], help=text)


def run_finetune(arguments: argparse.Namespace) -> None:
    """Runs `mindalle finetune`."""
    from mindalle_jax.training.finetune import finetune

    _run(finetune, arguments)
    print(f"{arguments.out}: a model; mindalle sample --model {arguments.out}")


def run_vqgan(arguments: argparse.Namespace) -> None:
    """Runs `mindalle train-vqgan`."""
    from mindalle_jax.training.vqgan.run import train_vqgan

    _run(train_vqgan, arguments)
    print(f"{arguments.out}: a VQGAN; mindalle prepare-codes --model {arguments.out}, or training.vqgan of finetune")


def run_clip(arguments: argparse.Namespace) -> None:
    """Runs `mindalle train-clip`."""
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
        raise KeyboardInterrupt  # so that a script does not continue as if there were a model


def run_tokenizer(arguments: argparse.Namespace) -> None:
    """Runs `mindalle train-tokenizer`."""
    from mindalle_jax.training.tokenizers import train_tokenizer

    print(train_tokenizer(arguments.data, arguments.out, vocab_size=arguments.vocab_size, kind=arguments.kind))
