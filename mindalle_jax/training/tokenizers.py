"""Makes tokenizers from captions: the transformer's character-level BPE, and CLIP's byte-level BPE.

A vocabulary is: its symbols, each also as the last of a word (`a`, `a</w>`), then what merges give, the most frequent
first; [UNK] and [PAD] come before them, <|startoftext|> and <|endoftext|> after them. The order of the symbols is fixed
before training. Left to the library it would be another in each process, and so would be the choice among merges that
are equally frequent.
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
"""This many of the most frequent characters become symbols, the rest is [UNK]; as in CharBPETokenizer.train."""
MIN_FREQUENCY = 2
"""A pair of tokens is merged if it is at least this frequent."""


def train_tokenizer(data: str | Path, out: Path, *, vocab_size: int, kind: Kind) -> str:
    """Trains on the captions of a data set and writes the folder `out`; returns one line that says what was made.

    kind mindalle: bpe-16k-vocab.json, bpe-16k-merges.txt, and words.json with the words of the captions, for
    text.tokenizer. kind clip: tokenizer.json, for text.clip_tokenizer and for transformers' CLIPTokenizer.
    Raises OutputError if `out` holds something, DataError for data without captions, UsageError as the functions below.
    """
    if kind not in KINDS:
        raise UsageError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    out = Path(os.path.expanduser(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty; name another place")
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
    """The transformer's tokenizer: ids 0 [UNK], 1 [PAD], and up to vocab_size - 1 what the captions need.

    Fewer tokens than vocab_size are made where the captions have no more pairs that come twice.
    Raises DataError for captions without text, UsageError for a vocab_size below 2 + 2 * characters.
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
    """CLIP's tokenizer: 512 tokens of bytes, so that no text is unknown, what merges give, and last start and end.

    Otherwise as train_char_bpe; vocab_size is at least 514.
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
    """Vocabulary and merges; `symbols` have the first ids. bare: normalizes and splits. characters: the alphabet."""
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
    """Vocabulary in the order of its ids, and merges in the order in which they apply."""
    model = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(model["vocab"].items(), key=lambda item: item[1])
    return dict(vocab), [(left, right) for left, right in model["merges"]]


def _check_size(vocab_size: int, least: int, what: str) -> None:
    if vocab_size < least:
        raise UsageError(f"a vocabulary of {vocab_size} is too small: {least} are needed at least, {what}")
