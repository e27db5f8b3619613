"""`mindalle finetune`, `train-vqgan`, `train-clip` and `train-tokenizer`."""

import argparse
import importlib.util
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindalle_jax.cli.parser import add_path
from mindalle_jax.errors import MindalleError, UsageError

TRAINING_MODULES = ("optax", "orbax", "grain", "tensorboardX")
"""Modules of the extra [train]."""
FINETUNE_EXAMPLE = "mindalle finetune --config finetune-captions data.train=photos --out runs/cats"
VQGAN_EXAMPLE = "mindalle train-vqgan --config emoji/vqgan data.train=photos --out runs/vqgan"
CLIP_EXAMPLE = (
    "mindalle train-clip --config emoji/clip data.train=photos training.tokenizer=clip-tokenizer --out runs/clip"
)
TOKENIZER_EXAMPLE = """
mindalle train-tokenizer photos --out tokenizer --vocab-size 8192 --kind mindalle
mindalle train-tokenizer photos --out clip-tokenizer --vocab-size 8192 --kind clip
"""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a training run."""
    text = "changes to the configuration, as data.train=photos"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)
    add_path(
        parser,
        "--config",
        required=True,
        metavar="FILE",
        help="a YAML file, or the name of a preset; `mindalle configs` lists them",
    )
    text = "folder of the run, in the end a model; a run that is there is resumed"
    add_path(parser, "-o", "--out", required=True, metavar="DIR", help=text)
    text = "resume although the data set has changed since the checkpoint"
    parser.add_argument("--ignore-fingerprint", action="store_true", help=text)
    text = "this is one of several processes with the same --out (docs/fine-tuning.md, Several processes)"
    parser.add_argument("--distributed", action="store_true", help=text)


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mindalle train-tokenizer`."""
    parser.add_argument("data", metavar="DATA", help="a folder or tars of images with captions, as for finetune")
    add_path(parser, "-o", "--out", required=True, metavar="DIR", help="where its files go; a new folder")
    parser.add_argument("--vocab-size", required=True, type=int, metavar="N", help="tokens at most")
    text = "for the transformer that samples codes, or for a CLIP model"
    parser.add_argument("--kind", required=True, choices=["mindalle", "clip"], help=text)


def run_finetune(arguments: argparse.Namespace) -> None:
    """Runs `mindalle finetune`."""
    from mindalle_jax.training.config import FinetuneConfig
    from mindalle_jax.training.finetune import finetune

    config = _run(finetune, FinetuneConfig, arguments)
    what = [*config.training.sample_prompts, *_captions(config, arguments.out)][:1]
    if config.image_only:
        what = ["--class-id", "0"] if config.stage2.use_cls_cond else []
    _tell(f"{arguments.out}: a model", "sample", *what, "--model", arguments.out)


def run_vqgan(arguments: argparse.Namespace) -> None:
    """Runs `mindalle train-vqgan`."""
    from mindalle_jax.training.vqgan.config import VqganTrainConfig
    from mindalle_jax.training.vqgan.run import train_vqgan

    config, out = _run(train_vqgan, VqganTrainConfig, arguments), arguments.out
    task = [] if _captions(config) else ["--task", "unconditional"]
    command = "prepare-codes", "--model", out, "--data", config.data.train, "--out", f"{out}-codes", *task
    _tell(f"{out}: a VQGAN, for training.vqgan of finetune", *command)


def run_clip(arguments: argparse.Namespace) -> None:
    """Runs `mindalle train-clip`."""
    from mindalle_jax.training.clip.run import ClipTrainConfig, train_clip

    config = _run(train_clip, ClipTrainConfig, arguments)
    _tell(f"{arguments.out}: a CLIP model", "sample", *_captions(config), "--ranker", arguments.out)


def _captions(config: Any, model: Path | None = None) -> list[str]:
    """A caption of the data that was trained on; none where it cannot be read any more. model: whose codes it holds."""
    from mindalle_jax.data.codes import vqgan_digest
    from mindalle_jax.data.sources import first_caption

    try:
        caption = first_caption(config.data.train, None if model is None else vqgan_digest(model))
        return [caption] if caption else []
    except (MindalleError, OSError):
        return []


def _tell(what: str, *command: Any) -> None:
    """Says what was made, and a command that uses it."""
    print(f"{what}; mindalle {shlex.join(map(str, command))}")


def _run(train: Callable[..., bool], kind: type[Any], arguments: argparse.Namespace) -> Any:
    """Trains, and returns the configuration of the run."""
    from mindalle_jax.config.file import load_config
    from mindalle_jax.training.run_dir import CONFIG_FILE

    if any("=" not in override for override in arguments.overrides):
        raise UsageError("overrides have the form section.key=value, such as data.train=photos")
    for module in TRAINING_MODULES:  # before gigabytes are downloaded
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    if arguments.distributed:
        from mindalle_jax.runtime.devices import join_processes

        join_processes()
    complete = train(
        arguments.config, arguments.overrides, arguments.out, ignore_fingerprint=arguments.ignore_fingerprint
    )
    if not complete:
        raise KeyboardInterrupt  # so that a script does not continue as if there were a model
    return load_config(arguments.out / CONFIG_FILE, kind=kind)


def run_tokenizer(arguments: argparse.Namespace) -> None:
    """Runs `mindalle train-tokenizer`."""
    from mindalle_jax.training.tokenizers import train_tokenizer

    print(train_tokenizer(arguments.data, arguments.out, vocab_size=arguments.vocab_size, kind=arguments.kind))
