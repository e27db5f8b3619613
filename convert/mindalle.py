"""Converts minDALL-E weights from PyTorch, without PyTorch. The same as `mindalle convert`.

The source is the release of Kakao Brain, `minDALL-E/1.3B` (about 5 GB), with the MD5 57b008f02ceaa02b779c8b7463143315:
https://arena.kakaocdn.net/brainrepo/models/minDALL-E/57b008f02ceaa02b779c8b7463143315/1.3B.tar.gz

    python -m convert.mindalle minDALL-E/1.3B models/mindalle                      # download and convert
    python -m convert.mindalle 1.3B models/mindalle                                # a folder that was unpacked by hand
    python -m convert.mindalle vqgan_imagenet_f16_16384.ckpt models/vqgan          # the VQGAN authors' checkpoint
    python -m convert.mindalle models/mindalle exported --to torch                 # back to the original's format
"""

import sys

from convert import run_script


def main() -> int:
    """Runs the conversion; returns the exit code of `mindalle convert`."""
    return run_script("convert.mindalle", __doc__)


if __name__ == "__main__":
    sys.exit(main())
