"""Tokenizers of CLIP, from Hugging Face's files or from OpenAI's list of merges. Only `tokenizers` is needed.

Texts are cleaned as in openai/CLIP. So the ids are the same as with its SimpleTokenizer. For most texts they are also
the same as with transformers' CLIPTokenizer, which takes seconds to import.
"""

import gzip
import html
import re
import zlib
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from mindalle_jax.errors import CheckpointError, one_line
from mindalle_jax.models.clip import ClipTextConfig
from mindalle_jax.text.tokenizer import TokenizedPrompts

START, END = "<|startoftext|>", "<|endoftext|>"
BPE_MERGES = 49_152 - 256 - 2
"""Number of merges that OpenAI's tokenizer takes from its file. The vocabulary has 49,408 entries; 512 are bytes."""
MAX_BPE_BYTES = 16 << 20  # unpacked; the published file has 3 MB


def read_clip_tokenizer(path: Path, config: ClipTextConfig) -> Tokenizer:
    """Reads the tokenizer of a folder or of OpenAI's file of merges.

    config: sizes of the text tower. Raises CheckpointError if the tokenizer is missing, damaged, or does not fit them.
    """
    try:
        if path.is_file() and path.suffix == ".gz":
            tokenizer = make_clip_tokenizer(*_read_openai_merges(path))
        elif (path / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            tokenizer = make_clip_tokenizer(*models.BPE.read_file(str(path / "vocab.json"), str(path / "merges.txt")))
        else:
            raise CheckpointError(
                f"{path}: holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt; name a folder "
                "that has one, or OpenAI's bpe_simple_vocab_16e6.txt.gz"
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids = tokenizer.encode("").ids
    except (CheckpointError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the library raises bare Exception, and its Rust panics a BaseException
        raise CheckpointError(f"{path}: the tokenizer cannot be read: {one_line(error)}") from None
    highest = max([*tokenizer.get_vocab().values(), *ids], default=-1)
    if highest >= config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has ids up to {highest}, but the token embedding has {config.vocab_size} rows; it "
            "belongs to another model"
        )
    if len(ids) != 2:
        raise CheckpointError(f"{path}: the tokenizer does not put a start and an end token around a text")
    # Without this check the network would take the feature of a text at a wrong position, without an error.
    expected = highest if config.eos_token_id == 2 else config.eos_token_id
    if ids[-1] != expected:
        raise CheckpointError(
            f"{path}: the tokenizer ends texts with id {ids[-1]}, but the network looks for {expected} "
            f"(eos_token_id {config.eos_token_id})"
        )
    return tokenizer


def clip_ids(tokenizer: Tokenizer, prompts: list[str], length: int) -> TokenizedPrompts:
    """Cleans P prompts (clean_text) and returns their ids int32[P, length].

    Each row is start token, text, end token, and more end tokens up to `length`. A text that is too long is cut before
    the end token. num_tokens counts all tokens before the cut, with start and end. No token is unknown.
    """
    rows = np.empty((len(prompts), length), np.int32)
    encodings = tokenizer.encode_batch([clean_text(prompt) for prompt in prompts])
    for row, encoding in zip(rows, encodings, strict=True):
        ids, end = encoding.ids, encoding.ids[-1]
        row[:] = (ids[: length - 1] + [end] * length)[:length]
    return TokenizedPrompts(rows, [len(encoding.ids) for encoding in encodings], [0] * len(prompts))


def clean_text(text: str) -> str:
    """Cleans a text as openai/CLIP does before it splits it into tokens (clip/simple_tokenizer.py, encode).

    ftfy repairs curly quotes, full-width letters, ligatures and wrong encodings. HTML entities are replaced, twice.
    Each run of whitespace becomes one space. Letters become lower case.
    """
    # ftfy takes a tenth of a second to import. It and unescape do not change printable ASCII without an ampersand.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def make_clip_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Makes a tokenizer that gives the same ids as OpenAI's for text that clean_text has cleaned.

    It differs in three points from the tokenizer of transformers' CLIPTokenizer (in
    transformers/models/clip/tokenization_clip.py). First, it does not compose accents (NFC): OpenAI composes them only
    before it resolves entities and lowers letters. OpenAI's expression ignores case, hence the other two: an apostrophe
    with a long s is one word, and U+0345, a mark whose capital is a letter, is in no word.

    vocab: token -> id. merges: pairs of tokens, in their order. Raises ValueError without start and end tokens.
    """
    for token in (START, END):
        if token not in vocab:
            raise ValueError(f"it has no {token}")
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{345}]+"
    pattern = Regex(rf"{re.escape(START)}|{re.escape(END)}|{words}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),  # else it splits words again
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocab[END]), (START, vocab[START]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def _read_openai_merges(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns vocabulary and merges, as the SimpleTokenizer of OpenAI's clip/simple_tokenizer.py makes them."""
    try:
        with gzip.open(file) as stream:
            data = stream.read(MAX_BPE_BYTES + 1)
        lines = data.decode("utf-8").split("\n")[1 : 1 + BPE_MERGES]  # the first line is a heading
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {one_line(error)}") from None
    if len(data) > MAX_BPE_BYTES:
        raise CheckpointError(f"{file}: more than {MAX_BPE_BYTES >> 20} MB unpacked; it is not OpenAI's file of merges")
    pairs = []
    for number, line in enumerate(lines, 2):
        pair = line.split()
        if len(pair) == 2:
            pairs.append((pair[0], pair[1]))
        elif line:
            raise CheckpointError(f"{file}: line {number} is not a pair of tokens: {line!r:.60}")
    tokens = [*byte_tokens(), *("".join(pair) for pair in pairs), START, END]
    return {token: i for i, token in enumerate(tokens)}, pairs


def byte_tokens() -> list[str]:
    """Returns the first 512 tokens of a vocabulary: one per byte, then one per byte that ends a word.

    A printable byte is written as itself, and these come first. The rest are written as characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(code) for code in [*printable, *range(256, 512 - len(printable))]]
    return [*symbols, *(symbol + "</w>" for symbol in symbols)]
