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
"""Modules that pip install 'mindalle-jax[train]' adds."""
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
    """Adds the arguments of the verbs that train from a configuration file."""
    text = "a change to the configuration, such as data.train=photos"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=text)
    add_path(
        parser,
        "--config",
        required=True,
        metavar="FILE",
        help="a YAML file, or the name of a preset; `mindalle configs` lists them",
    )
    text = "folder of the run, which at the end is also a model; a run in it is resumed"
    add_path(parser, "-o", "--out", required=True, metavar="DIR", help=text)
    text = "resume even if the data set has changed since the checkpoint"
    parser.add_argument("--ignore-fingerprint", action="store_true", help=text)
    text = "resume a run, also a complete one, with more optimizer.max_steps or experiment.epochs than it had"
    parser.add_argument("--extend", action="store_true", help=text)
    text = "run as one of several processes with the same --out (docs/fine-tuning.md, Several processes)"
    parser.add_argument("--distributed", action="store_true", help=text)


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mindalle train-tokenizer`."""
    parser.add_argument("data", metavar="DATA", help="a folder or tar files of images with captions, as for finetune")
    add_path(parser, "-o", "--out", required=True, metavar="DIR", help="a new folder for the tokenizer")
    text = "maximum number of tokens in the vocabulary"
    parser.add_argument("--vocab-size", required=True, type=int, metavar="N", help=text)
    text = "mindalle: for the transformer, which turns prompts into codes; clip: for a CLIP model, which ranks images"
    parser.add_argument("--kind", required=True, choices=["mindalle", "clip"], help=text)


def run_finetune(arguments: argparse.Namespace) -> None:
    """Runs `mindalle finetune`."""
    from mindalle_jax.storage.weights import read_manifest
    from mindalle_jax.training.config import FinetuneConfig
    from mindalle_jax.training.finetune import finetune

    config = _run(finetune, FinetuneConfig, arguments)
    what = [*config.training.sample_prompts, *_captions(config, arguments.out)][:1]
    if config.image_only:
        names = read_manifest(arguments.out).get("classes")
        what = ["--class", names[0]] if names else ["--class-id", "0"] if config.stage2.use_cls_cond else []
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
    """Returns [caption], with one caption of the training data; [] if the data cannot be read any more.

    model: the model whose codes the data set may hold; None if it holds images.
    """
    from mindalle_jax.data.codes import vqgan_digest
    from mindalle_jax.data.sources import first_caption

    try:
        caption = first_caption(config.data.train, None if model is None else vqgan_digest(model))
        return [caption] if caption else []
    except (MindalleError, OSError):
        return []


def _tell(what: str, *command: Any) -> None:
    """Prints what was made, and a command that uses it."""
    print(f"{what}; mindalle {shlex.join(map(str, command))}")


def _run(train: Callable[..., bool], kind: type[Any], arguments: argparse.Namespace) -> Any:
    """Trains, and returns the configuration of the run. Raises KeyboardInterrupt if the run was stopped early."""
    from mindalle_jax.config.file import load_config
    from mindalle_jax.training.run_dir import CONFIG_FILE

    if any("=" not in override for override in arguments.overrides):
        raise UsageError("overrides have the form section.key=value, such as data.train=photos")
    for module in TRAINING_MODULES:  # checked here, before gigabytes are downloaded
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    if arguments.distributed:
        from mindalle_jax.runtime.devices import join_processes

        join_processes()
    complete = train(
        arguments.config,
        arguments.overrides,
        arguments.out,
        ignore_fingerprint=arguments.ignore_fingerprint,
        extend=arguments.extend,
    )
    if not complete:
        raise KeyboardInterrupt  # so that the exit code tells a script that no model was made
    return load_config(arguments.out / CONFIG_FILE, kind=kind)


def run_tokenizer(arguments: argparse.Namespace) -> None:
    """Runs `mindalle train-tokenizer`."""
    from mindalle_jax.training.tokenizers import train_tokenizer

    print(train_tokenizer(arguments.data, arguments.out, vocab_size=arguments.vocab_size, kind=arguments.kind))
