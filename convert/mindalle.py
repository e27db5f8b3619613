"""Converts minDALL-E weights from PyTorch, without PyTorch. The same as `mindalle convert`.

Source: Kakao Brain's release, `minDALL-E/1.3B` (about 5 GB), MD5 57b008f02ceaa02b779c8b7463143315:
https://arena.kakaocdn.net/brainrepo/models/minDALL-E/57b008f02ceaa02b779c8b7463143315/1.3B.tar.gz

    python -m convert.mindalle minDALL-E/1.3B models/mindalle                      # download and convert
    python -m convert.mindalle 1.3B models/mindalle                                # a folder that was unpacked by hand
    python -m convert.mindalle vqgan_imagenet_f16_16384.ckpt models/vqgan          # the VQGAN authors' checkpoint
    python -m convert.mindalle models/mindalle exported --to torch                 # back to the original's format
"""

import argparse
import sys

from mindalle_jax.cli import run_reporting
from mindalle_jax.cli.convert import add_convert_arguments, run_convert


def main() -> int:
    """Runs the conversion; returns the exit code of `mindalle convert`."""
    parser = argparse.ArgumentParser(
        prog="python -m convert.mindalle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_convert_arguments(parser)
    arguments = parser.parse_args()
    return run_reporting("convert.mindalle", lambda: run_convert(arguments))


if __name__ == "__main__":
    sys.exit(main())
