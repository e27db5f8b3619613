"""`mindalle convert`: its arguments, and which conversion they ask for."""

import argparse
from pathlib import Path

from mindalle_jax.errors import UsageError
from mindalle_jax.storage.files import check_output


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mindalle convert`, shared with `python -m convert.mindalle`."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a folder in the original's format, a transfer or VQGAN .ckpt, a converted folder, or a name "
        "(minDALL-E/1.3B, or OWNER/NAME on the Hugging Face hub, is downloaded); with --to torch a converted folder",
    )
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to make")
    parser.add_argument("--to", choices=["jax", "torch"], default="jax", help="the format to make")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of the weights in DST (default: that of a converted SRC, else float32)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.yaml, where it is not beside the weights")
    parser.add_argument(
        "--adapters", type=Path, metavar="FILE", help="add adapters.safetensors of a run that began from SRC"
    )
    parser.add_argument(
        "--download-from", metavar="URL", help="another source of the same archive: a URL or a local file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST, if it is a model folder")


def run_convert(arguments: argparse.Namespace) -> None:
    """What `mindalle convert` does."""
    from mindalle_jax.hub.download import RELEASES, fetch_release
    from mindalle_jax.hub.huggingface import fetch_repo, is_repo_id
    from mindalle_jax.hub.resolve import find_model
    from mindalle_jax.interop.mindalle import export_checkpoint, import_checkpoint
    from mindalle_jax.storage.adapters import load_adapters
    from mindalle_jax.storage.model_folder import MODEL_FILES, MODEL_MARKS, copy_model
    from mindalle_jax.storage.weights import MANIFEST

    check_output(arguments.target, arguments.overwrite, MODEL_MARKS)  # before gigabytes are downloaded
    source = arguments.source
    if arguments.dtype and arguments.to == "torch":
        raise UsageError("--dtype goes with --to jax; the original's format is float32")
    if arguments.adapters:
        if arguments.to == "torch" or arguments.config or arguments.download_from:
            raise UsageError("--adapters goes with --dtype and --overwrite alone; convert what it makes once more")
        folder = find_model(source)  # as the run did
        adapters = load_adapters(arguments.adapters, folder)
        print(
            copy_model(
                folder, arguments.target, dtype=arguments.dtype, adapters=adapters, overwrite=arguments.overwrite
            )
        )
        return
    if not (source in RELEASES or arguments.download_from or Path(source).exists()) and is_repo_id(source):
        source = str(fetch_repo(source, MODEL_FILES))
    if arguments.to == "torch":
        print(export_checkpoint(source, arguments.target, overwrite=arguments.overwrite))
        return
    if source in RELEASES and not Path(source).exists():
        source = fetch_release(source, source=arguments.download_from)
    elif arguments.download_from:
        raise UsageError(f"--download-from goes with a name to download ({', '.join(RELEASES)}), not {source!r}")
    if (Path(source) / MANIFEST).is_file():
        if arguments.config:
            raise UsageError(f"--config goes with weights from PyTorch; {source} holds a config.yaml")
        print(copy_model(source, arguments.target, dtype=arguments.dtype, overwrite=arguments.overwrite))
        return
    dtype = arguments.dtype or "float32"
    print(
        import_checkpoint(source, arguments.target, config=arguments.config, dtype=dtype, overwrite=arguments.overwrite)
    )
