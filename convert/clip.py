"""Converts a CLIP model into a folder in the layout of Hugging Face, without PyTorch.

Sources: folders of Hugging Face, such as a copy of https://huggingface.co/openai/clip-vit-base-patch32 , and the .pt
files of https://github.com/openai/CLIP with a Vision Transformer, where clip/clip.py has their URLs and
clip/bpe_simple_vocab_16e6.txt.gz is the tokenizer that they lack. SHA-256 of ViT-B-32.pt:
40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af

    python -m convert.clip clip-vit-base-patch32 models/clip
    python -m convert.clip ViT-B-32.pt models/clip --tokenizer bpe_simple_vocab_16e6.txt.gz
"""

import argparse
import sys
from pathlib import Path

from mindalle_jax.cli import run_reporting


def main() -> int:
    """Runs the conversion; returns an exit code of `mindalle`."""
    parser = argparse.ArgumentParser(
        prog="python -m convert.clip",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="a Hugging Face folder, or a .pt file of OpenAI")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to make")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="where SRC has none: a Hugging Face folder that has, or bpe_simple_vocab_16e6.txt.gz",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST, if it is a CLIP folder")
    arguments = parser.parse_args()
    return run_reporting("convert.clip", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    from mindalle_jax.interop.clip import convert_clip

    print(convert_clip(arguments.source, arguments.target, arguments.tokenizer, arguments.overwrite))


if __name__ == "__main__":
    sys.exit(main())
