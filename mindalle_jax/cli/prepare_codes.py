"""`mindalle prepare-codes`: defines its arguments, loads a VQGAN and computes the codes of a data set."""

import argparse
import sys

from mindalle_jax.cli.parser import add_path

EXAMPLE = "mindalle prepare-codes --model models/mindalle --data photos --out photos-codes"
NOTES = """Then train with data.train set to the folder --out. Each image is cropped in the
middle. Random crops, which training on images makes, are not possible with
codes. All captions are kept. If the run is interrupted, the same command
resumes it. Codes of another model or of other data are never mixed in or
overwritten."""


def add_prepare_codes_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mindalle prepare-codes`."""
    parser.description = f"{parser.description}\n\n{NOTES}"
    text = "the model, as for mindalle sample; only its VQGAN is loaded"
    parser.add_argument("-m", "--model", required=True, help=text)
    parser.add_argument("--data", required=True, help="a folder of images, or tar files: cc3m-{00000..00331}.tar")
    add_path(parser, "-o", "--out", required=True, metavar="DIR", help="folder for the codes: new, or one to resume")
    parser.add_argument(
        "--task",
        choices=["text", "class", "unconditional"],
        default="text",
        help="text takes images with captions, class those with a label, unconditional all",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images encoded at once")


def run_prepare_codes(arguments: argparse.Namespace) -> None:
    """Runs `mindalle prepare-codes`: loads only the VQGAN and writes the codes."""
    import jax.numpy as jnp

    from mindalle_jax.config.file import load_config
    from mindalle_jax.data.codes import vqgan_digest
    from mindalle_jax.data.prepare import open_images, prepare_codes
    from mindalle_jax.hub.resolve import find_model
    from mindalle_jax.runtime.devices import choose_devices, prepare_process
    from mindalle_jax.sampling.codec import ImageCodec
    from mindalle_jax.storage.weights import load_params

    source = open_images(arguments.data, arguments.task)
    print(f"{arguments.data}: {source.report}", file=sys.stderr)
    folder = find_model(arguments.model)
    config = load_config(folder / "config.yaml")
    mesh, _ = choose_devices(None, "float32")
    prepare_process()
    params = load_params(folder, "stage1", config, jnp.dtype("float32"), mesh)
    codec = ImageCodec(config.stage1, params, dtype="float32", mesh=mesh)
    report = prepare_codes(source, codec, arguments.out, vqgan=vqgan_digest(folder), batch_size=arguments.batch_size)
    print(f"{arguments.out}: {report}")
