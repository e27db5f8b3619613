"""Tokenizers of CLIP: Hugging Face's files and OpenAI's list of merges, read with `tokenizers` alone.

Texts are cleaned as openai/CLIP cleans them. The ids are then those of its SimpleTokenizer, and for most texts those of
transformers' CLIPTokenizer too, which takes seconds to import.
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
"""How many merges of its file OpenAI's tokenizer takes: the vocabulary has 49,408 entries, 512 of them bytes."""
MAX_BPE_BYTES = 16 << 20  # unpacked; the published file has 3 MB


def read_clip_tokenizer(path: Path, config: ClipTextConfig) -> Tokenizer:
    """The tokenizer of a folder or of OpenAI's file of merges; CheckpointError if it does not fit the network."""
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
                "that does, or OpenAI's bpe_simple_vocab_16e6.txt.gz"
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids = tokenizer.encode("").ids
    except (CheckpointError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the library raises bare Exception, and where its Rust panics not even that
        raise CheckpointError(f"{path}: the tokenizer cannot be read: {one_line(error)}") from None
    highest = max([*tokenizer.get_vocab().values(), *ids], default=-1)
    if highest >= config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has ids up to {highest}, but the token embedding has {config.vocab_size} rows; it "
            "belongs to another model"
        )
    if len(ids) != 2:
        raise CheckpointError(f"{path}: the tokenizer does not put a start and an end token around a text")
    # Or the network would take the feature of a text at another place than its end, without a word.
    expected = highest if config.eos_token_id == 2 else config.eos_token_id
    if ids[-1] != expected:
        raise CheckpointError(
            f"{path}: the tokenizer ends texts with id {ids[-1]}, but the network looks for {expected} "
            f"(eos_token_id {config.eos_token_id})"
        )
    return tokenizer


def clip_ids(tokenizer: Tokenizer, prompts: list[str], length: int) -> TokenizedPrompts:
    """Ids int32[P, length] of P prompts, which are cleaned first (clean_text).

    Each row is start token, text, end token, and more end tokens up to `length`. A text that is too long loses what is
    between; num_tokens counts all, with start and end. No text is unknown.
    """
    rows = np.empty((len(prompts), length), np.int32)
    encodings = tokenizer.encode_batch([clean_text(prompt) for prompt in prompts])
    for row, encoding in zip(rows, encodings, strict=True):
        ids, end = encoding.ids, encoding.ids[-1]
        row[:] = (ids[: length - 1] + [end] * length)[:length]
    return TokenizedPrompts(rows, [len(encoding.ids) for encoding in encodings], [0] * len(prompts))


def clean_text(text: str) -> str:
    """The text as openai/CLIP cleans it before it splits it into tokens (clip/simple_tokenizer.py, encode).

    ftfy mends curly quotes, full-width letters, ligatures and wrong encodings; HTML entities are replaced, twice; runs
    of whitespace become one space; letters become lower case.
    """
    # Both leave printable ASCII without an ampersand as it is, and ftfy takes a tenth of a second to import.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def make_clip_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer with the ids of OpenAI's for text that clean_text has cleaned.

    It differs from the one that transformers' CLIPTokenizer builds (transformers/models/clip/tokenization_clip.py) in
    three things. It does not compose accents (NFC): OpenAI composes them before it resolves entities and lowers, and
    not after. OpenAI's expression ignores case, so an apostrophe and a long s are one word, and U+0345, a mark whose
    capital is a letter, is in no word.
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
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),  # or it splits words again
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocab[END]), (START, vocab[START]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def _read_openai_merges(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as the SimpleTokenizer of OpenAI's clip/simple_tokenizer.py makes them."""
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
    """The first 512 tokens of a vocabulary: one for each byte, then one for each that ends a word.

    A byte is written as itself if it can be printed, else as a character from 256 on; in that order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(code) for code in [*printable, *range(256, 512 - len(printable))]]
    return [*symbols, *(symbol + "</w>" for symbol in symbols)]
