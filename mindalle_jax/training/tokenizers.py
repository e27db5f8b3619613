"""Makes tokenizers from captions: the transformer's character-level BPE, and CLIP's byte-level BPE.

A vocabulary holds the symbols first, each also in the form that ends a word (`a`, `a</w>`). Then come the tokens that
merges make, the most frequent first. [UNK] and [PAD] come before all of these in the transformer's vocabulary;
<|startoftext|> and <|endoftext|> come after them in CLIP's. The order of the symbols is fixed here, before training.
The library would choose another order in each process, and with it other merges among equally frequent ones.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, models, trainers

from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import DataError, OutputError, UsageError
from mindalle_jax.storage.files import check_writable, new_folder
from mindalle_jax.text.clip_tokenizer import END, START, byte_tokens, clean_text, make_clip_tokenizer
from mindalle_jax.text.known_words import KnownWords, count_words
from mindalle_jax.text.tokenizer import MERGES_FILE, PAD, UNKNOWN, VOCAB_FILE, WORD_END, char_bpe

Kind = Literal["mindalle", "clip"]
KINDS = ("mindalle", "clip")
MAX_CHARACTERS = 1_000
"""Maximum number of characters that become symbols; rarer characters are [UNK]. As in CharBPETokenizer.train."""
MIN_FREQUENCY = 2
"""A pair of tokens is merged only if it occurs at least this often."""


def train_tokenizer(data: str | Path, out: Path, *, vocab_size: int, kind: Kind) -> str:
    """Trains a tokenizer on the captions of a data set and writes the folder `out`; returns a line that describes it.

    data: as for open_source. vocab_size: maximum number of tokens. kind "mindalle" writes bpe-16k-vocab.json,
    bpe-16k-merges.txt and words.json, which lists the words of the captions; text.tokenizer reads them. kind "clip"
    writes tokenizer.json, which text.clip_tokenizer and transformers' CLIPTokenizer read.

    Raises OutputError if `out` is not empty or cannot be written to, DataError for data without captions, and
    UsageError for another kind or a vocab_size that is too small.
    """
    if kind not in KINDS:
        raise UsageError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    out = Path(os.path.expanduser(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty; name another folder")
    check_writable(out)
    captions = [caption for sample in open_source(data, "text").samples for caption in sample.captions]
    if kind == "clip":
        captions = [clean_text(caption) for caption in captions]
    tokenizer = (train_char_bpe if kind == "mindalle" else train_clip_bpe)(captions, vocab_size)
    with new_folder(out, overwrite=out.is_dir()) as folder:
        if kind == "mindalle":
            vocab, merges = _learned(tokenizer)
            (folder / VOCAB_FILE).write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
            lines = ["#version: 0.2", *map(" ".join, merges), ""]
            (folder / MERGES_FILE).write_text("\n".join(lines), encoding="utf-8")
            KnownWords(frozenset(count_words(captions))).save(folder)
        else:
            tokenizer.save(str(folder / "tokenizer.json"))
    longest = max(len(encoding.ids) for encoding in tokenizer.encode_batch(captions))
    return (
        f"{out}: a tokenizer of {tokenizer.get_vocab_size()} tokens, from {len(captions):,} captions; "
        f"the longest of them has {longest} tokens"
    )


def train_char_bpe(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains the transformer's tokenizer: id 0 is [UNK], 1 is [PAD], and the rest are learned from the captions.

    The vocabulary has fewer than vocab_size tokens if no more pairs occur twice. Raises DataError for captions without
    text, and UsageError for a vocab_size below 2 + 2 * number of characters.
    """
    captions, bare = list(captions), char_bpe(models.BPE())
    normalizer, pre_tokenizer = bare.normalizer, bare.pre_tokenizer
    assert normalizer is not None and pre_tokenizer is not None
    counts = Counter[str]()
    for caption in captions:
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(caption)):
            counts.update(word)
    if not counts:
        raise DataError("no caption has any text: a tokenizer needs some")
    frequent = sorted(counts, key=lambda character: (-counts[character], character))[:MAX_CHARACTERS]
    symbols = [UNKNOWN, PAD, *sorted(frequent), *(character + WORD_END for character in sorted(frequent))]
    _check_size(vocab_size, len(symbols), f"[UNK], [PAD] and two for each of {len(frequent)} characters")
    vocab, merges = _train(bare, captions, vocab_size, symbols, frequent)
    return char_bpe(models.BPE(vocab, merges, unk_token=UNKNOWN, end_of_word_suffix=WORD_END))


def train_clip_bpe(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains CLIP's tokenizer: 512 tokens of bytes, then the tokens that merges make, then start and end.

    No text is unknown to it. The rest is as in train_char_bpe, but vocab_size must be at least 514.
    """
    captions, symbols = list(captions), byte_tokens()
    _check_size(vocab_size, len(symbols) + 2, "two for each byte, and the start and the end of a text")
    if not any(caption.strip() for caption in captions):
        raise DataError("no caption has any text: a tokenizer needs some")
    bare = make_clip_tokenizer({START: 0, END: 1}, [])
    vocab, merges = _train(bare, captions, vocab_size - 2, symbols, symbols[:256])
    size = len(vocab)
    return make_clip_tokenizer(vocab | {START: size, END: size + 1}, merges)


def _train(
    bare: Tokenizer, captions: list[str], vocab_size: int, symbols: list[str], characters: list[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learns vocabulary and merges; `symbols` get the first ids.

    bare: a tokenizer that only normalizes and splits. characters: the alphabet.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=symbols,  # the only ones whose ids do not depend on the order of a hash table
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    bare.train_from_iterator(captions, trainer)
    return _learned(bare)


def _learned(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns the vocabulary in the order of its ids, and the merges in the order in which they apply."""
    model = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(model["vocab"].items(), key=lambda item: item[1])
    return dict(vocab), [(left, right) for left, right in model["merges"]]


def _check_size(vocab_size: int, least: int, what: str) -> None:
    if vocab_size < least:
        raise UsageError(f"a vocabulary of {vocab_size} is too small: at least {least} tokens are needed, {what}")
