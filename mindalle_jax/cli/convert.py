"""`mindalle convert`: defines its arguments and calls the conversion that they ask for."""

import argparse
from pathlib import Path

from mindalle_jax.cli.parser import add_path
from mindalle_jax.errors import UsageError
from mindalle_jax.storage.files import check_output

EXAMPLE = """
mindalle convert minDALL-E/1.3B models/mindalle
mindalle convert models/mindalle exported --to torch
"""


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mindalle convert`; the scripts in convert/ use it too."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a folder in the original's format, the .ckpt of a transfer or a VQGAN, a converted folder, a CLIP model "
        "(a Hugging Face folder or OpenAI's .pt), or a model to download: minDALL-E/1.3B, OpenAI's name of a CLIP "
        "model such as ViT-B/32, or OWNER/NAME on the Hugging Face hub. With --to torch only a converted folder",
    )
    add_path(parser, "target", metavar="DST", help="the folder to make")
    parser.add_argument("--to", choices=["jax", "torch"], default="jax", help="the format to make")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="number type of the weights in DST (default: as in SRC if it is a converted folder, else float32)",
    )
    add_path(parser, "--config", metavar="FILE", help="config.yaml of the model, if it is not beside the weights")
    add_path(
        parser,
        "--tokenizer",
        metavar="PATH",
        help="tokenizer for a CLIP model without one, such as OpenAI's .pt: a Hugging Face folder with a tokenizer, or "
        "bpe_simple_vocab_16e6.txt.gz",
    )
    add_path(parser, "--adapters", metavar="FILE", help="add the adapters.safetensors of a run that started from SRC")
    text = "take the archive of minDALL-E/1.3B from this URL or local file instead"
    parser.add_argument("--download-from", metavar="URL", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a folder with such a model")


def run_convert(arguments: argparse.Namespace) -> None:
    """Runs `mindalle convert`: finds out what SRC is, and calls the conversion that makes DST from it."""
    from mindalle_jax.hub.resolve import find_source
    from mindalle_jax.interop.clip import CLIP_MARKS, is_clip
    from mindalle_jax.storage.model_folder import MODEL_MARKS

    # Checked here, before gigabytes are downloaded. Each conversion checks again, for the marks of its own kind only.
    check_output(arguments.target, arguments.overwrite, (*MODEL_MARKS, *CLIP_MARKS))
    if arguments.dtype and arguments.to == "torch":
        raise UsageError("--dtype works only with --to jax; the original's format is float32")
    if arguments.adapters:
        _add_adapters(arguments)
        return
    source = find_source(arguments.source, arguments.download_from)
    if is_clip(source):
        _convert_clip(arguments, source)
    else:
        _convert_model(arguments, source)


def _convert_model(arguments: argparse.Namespace, source: Path) -> None:
    from mindalle_jax.interop.mindalle import export_checkpoint, import_checkpoint
    from mindalle_jax.storage import weights
    from mindalle_jax.storage.model_folder import copy_model

    target, overwrite = arguments.target, arguments.overwrite
    if arguments.tokenizer:
        raise UsageError(f"--tokenizer is only for CLIP models; {source} is none, and has its tokenizer in tokenizer/")
    if arguments.to == "torch":
        print(export_checkpoint(source, target, overwrite=overwrite))
    elif (source / weights.MANIFEST).is_file():
        if arguments.config:
            raise UsageError(f"--config is only for weights from PyTorch; {source} has its own config.yaml")
        print(copy_model(source, target, dtype=arguments.dtype, overwrite=overwrite))
    else:
        dtype = arguments.dtype or "float32"
        print(import_checkpoint(source, target, config=arguments.config, dtype=dtype, overwrite=overwrite))


def _convert_clip(arguments: argparse.Namespace, source: Path) -> None:
    from mindalle_jax.interop.clip import convert_clip

    if arguments.to == "torch":
        raise UsageError(f"{source} is a CLIP model, and is written in Hugging Face's format; leave out --to torch")
    if arguments.config:
        raise UsageError(f"--config is only for models of minDALL-E; {source} is a CLIP model and has its own sizes")
    dtype = arguments.dtype or "float32"
    print(convert_clip(source, arguments.target, arguments.tokenizer, arguments.overwrite, dtype))


def _add_adapters(arguments: argparse.Namespace) -> None:
    from mindalle_jax.hub.resolve import find_model
    from mindalle_jax.storage.adapters import load_adapters
    from mindalle_jax.storage.model_folder import copy_model

    if arguments.to == "torch" or arguments.config or arguments.download_from or arguments.tokenizer:
        raise UsageError("--adapters works only with --dtype and --overwrite; convert its result in a second command")
    folder = find_model(arguments.source)  # found as in the run, so that both use the same weights
    adapters = load_adapters(arguments.adapters, folder)
    target, overwrite = arguments.target, arguments.overwrite
    print(copy_model(folder, target, dtype=arguments.dtype, adapters=adapters, overwrite=overwrite))
