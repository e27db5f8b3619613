"""Computes the codes of a data set once, so that fine-tuning need not run the VQGAN in every step.

    python scripts/prepare_codes.py --model models/mindalle --data pictures --out pictures-codes

Then train with --data pictures-codes. Pictures are cropped in the middle, where training on pictures crops at random:
random crops are gone. All captions are kept. An interrupted run goes on when the same command is given again; codes of
another model or of other data are never mixed in or overwritten.
"""

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp

from mindalle_jax.cli import HelpFormatter, run_reporting
from mindalle_jax.config.file import load_config
from mindalle_jax.data.codes import vqgan_digest, write_codes
from mindalle_jax.data.samples import TASKS
from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import UsageError
from mindalle_jax.hub.resolve import find_model
from mindalle_jax.runtime.devices import choose_devices, prepare_process
from mindalle_jax.sampling.codec import ImageCodec
from mindalle_jax.storage.weights import load_params


def main(arguments: argparse.Namespace) -> None:
    """Loads the VQGAN alone and writes the codes."""
    source = open_source(arguments.data, arguments.task)
    if source.has_codes:
        raise UsageError(f"{arguments.data} holds codes already")
    print(f"{arguments.data}: {source.report}", file=sys.stderr)
    folder = find_model(arguments.model)
    config = load_config(folder / "config.yaml")
    mesh, _ = choose_devices(None, "float32")
    prepare_process()
    params = load_params(folder, "stage1", config, jnp.dtype("float32"), mesh)
    codec = ImageCodec(config.stage1, params, dtype="float32", mesh=mesh)
    vqgan = vqgan_digest(folder)
    write_codes(source, codec, arguments.out, vqgan=vqgan, batch_size=arguments.batch_size)
    written = open_source(arguments.out, arguments.task, vqgan=vqgan)  # checks every CRC-32
    print(f"{arguments.out}: {written.report}")


def parser() -> argparse.ArgumentParser:
    """The options."""
    description, _, notes = (__doc__ or "").strip().split("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=notes, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="as mindalle sample takes it; its VQGAN alone is loaded")
    parser.add_argument("--data", required=True, help="a folder of pictures, or tars: cc3m-{00000..00331}.tar")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new folder, or one to go on with")
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="text",
        help="samples without captions, or without a label, are left out; unconditional takes all",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures encoded at once")
    return parser


if __name__ == "__main__":
    sys.exit(run_reporting("prepare_codes.py", lambda: main(parser().parse_args())))
