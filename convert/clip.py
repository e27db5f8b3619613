"""Converts a CLIP model into a folder in the layout of Hugging Face, without PyTorch. The same as `mindalle convert`.

The source is a folder of Hugging Face, such as a copy of https://huggingface.co/openai/clip-vit-base-patch32 , or a .pt
file of https://github.com/openai/CLIP with a Vision Transformer. clip/clip.py there has the URLs of these files, and
clip/bpe_simple_vocab_16e6.txt.gz is the tokenizer that they lack. The SHA-256 of ViT-B-32.pt is
40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af

    python -m convert.clip clip-vit-base-patch32 models/clip
    python -m convert.clip ViT-B-32.pt models/clip --tokenizer bpe_simple_vocab_16e6.txt.gz
"""

import sys

from convert import run_script


def main() -> int:
    """Runs the conversion; returns the exit code of `mindalle convert`."""
    return run_script("convert.clip", __doc__)


if __name__ == "__main__":
    sys.exit(main())
