"""Prompt -> int32[N]: character-level BPE in lower case, padded with [PAD] to a fixed length.

The ids are the same as those of the original's `tokenizers.CharBPETokenizer`, with one intended difference: `[PAD]` or
`[UNK]` typed in a prompt stays text here. The original turns it into the special token.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from mindalle_jax.errors import CheckpointError, UsageError
from mindalle_jax.text.known_words import KnownWords, read_known_words

VOCAB_FILE = "bpe-16k-vocab.json"
MERGES_FILE = "bpe-16k-merges.txt"
UNKNOWN, PAD, WORD_END = "[UNK]", "[PAD]", "</w>"
MAX_PROMPT_CHARACTERS = 2_000
"""Longer prompts are refused before they are tokenized: a megabyte takes seconds, and only 64 tokens are used."""


@dataclasses.dataclass(frozen=True)
class TokenizedPrompts:
    """The ids of P prompts, and the counts for warnings. Everything has one row or entry per prompt."""

    ids: np.ndarray
    """int32[P, N]"""
    num_tokens: list[int]
    """Number of tokens before padding and cutting."""
    num_unknown: list[int]
    """Number of [UNK] among the kept tokens."""

    def warnings(self, prompts: list[str]) -> list[str]:
        """Returns one line per prompt that was cut, and one per prompt whose tokens are mostly unknown."""
        lines = []
        context_length = self.ids.shape[1]
        for prompt, tokens, unknown in zip(prompts, self.num_tokens, self.num_unknown, strict=True):
            name = quote_prompt(prompt)
            if tokens > context_length:
                lines.append(f"{name} has {tokens} tokens; the first {context_length} are used and the rest is ignored")
            if 2 * unknown > min(tokens, context_length):
                lines.append(
                    f"{unknown} of the {min(tokens, context_length)} tokens of {name} are unknown to the vocabulary; "
                    "the images will hardly follow it (the published model knows English)"
                )
        return lines


class TextTokenizer:
    """The tokenizer of one model folder."""

    def __init__(self, folder: str | Path, context_length: int, vocab_size: int):
        """Reads `bpe-16k-vocab.json` and `bpe-16k-merges.txt` from `folder`.

        context_length: N, in tokens. vocab_size: number of rows of the model's text embedding; every id must be below
        it. Raises CheckpointError if a file is missing, damaged or does not fit.
        """
        folder = Path(os.path.expanduser(folder))
        vocab, merges = _read_vocab(folder / VOCAB_FILE), _read_merges(folder / MERGES_FILE)
        if max(vocab.values(), default=-1) >= vocab_size:
            raise CheckpointError(
                f"{folder / VOCAB_FILE}: has ids up to {max(vocab.values())}, but the text embedding has {vocab_size} "
                "rows; the tokenizer belongs to another model"
            )
        if UNKNOWN not in vocab:
            raise CheckpointError(f"{folder / VOCAB_FILE}: has no {UNKNOWN} token")
        self.unk_id, self.pad_id = vocab[UNKNOWN], _pad_id(folder, vocab, vocab_size)
        self.context_length = context_length
        self.known_words: KnownWords | None = read_known_words(folder)
        """The words that the model was trained on; None if the folder has no list."""
        try:
            bpe = models.BPE(vocab, merges, unk_token=UNKNOWN, end_of_word_suffix=WORD_END)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{folder / MERGES_FILE}: does not fit {VOCAB_FILE}: {error}") from None
        self._tokenizer = char_bpe(bpe)

    def __call__(self, prompts: list[str]) -> TokenizedPrompts:
        """Returns the ids of P prompts, int32[P, N]. An empty prompt gives N times [PAD].

        Raises UsageError for a prompt with more than 2,000 characters, with NUL characters or lone surrogates, and for
        anything but text.
        """
        for prompt in prompts:
            check_prompt(prompt)
        rows, num_tokens, num_unknown = [], [], []
        for encoding in self._tokenizer.encode_batch(prompts):
            kept = encoding.ids[: self.context_length]
            rows.append(kept + [self.pad_id] * (self.context_length - len(kept)))
            num_tokens.append(len(encoding.ids))
            num_unknown.append(kept.count(self.unk_id))
        return TokenizedPrompts(
            np.asarray(rows, np.int32).reshape(len(prompts), self.context_length), num_tokens, num_unknown
        )

    def save(self, folder: Path) -> None:
        """Writes the vocabulary and the known words into a new folder, which TextTokenizer can read."""
        folder.mkdir(parents=True)
        self._tokenizer.model.save(str(folder), VOCAB_FILE.removesuffix("-vocab.json"))
        if self.known_words is not None:
            self.known_words.save(folder)


def char_bpe(model: models.BPE) -> Tokenizer:
    """Makes the tokenizer of CharBPETokenizer(lowercase=True), but does not look for special tokens in texts."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def quote_prompt(prompt: str) -> str:
    """Returns the prompt in quotes, or the first 37 characters of a long one, for messages."""
    return repr(prompt if len(prompt) <= 40 else prompt[:37] + "...")


def check_prompt(prompt: str) -> None:
    """Raises UsageError for a prompt that TextTokenizer.__call__ refuses."""
    if not isinstance(prompt, str):
        raise UsageError(f"a prompt is text, not {type(prompt).__name__}")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UsageError(
            f"the prompt {prompt[:30]!r}... has {len(prompt):,} characters; the limit is {MAX_PROMPT_CHARACTERS:,}"
        )
    if "\0" in prompt:
        raise UsageError(f"the prompt {prompt[:40]!r} holds a NUL character")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt {prompt[:40]!r} is not valid text: lone surrogate at character {error.start}; "
            "was it read with the wrong encoding?"
        ) from None


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = None
    try:
        vocab = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the folder needs tokenizer/{VOCAB_FILE} and {MERGES_FILE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise CheckpointError(f"{path}: must be a JSON object of token -> id")
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the folder needs tokenizer/{VOCAB_FILE} and {MERGES_FILE}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise CheckpointError(f"{path}: line {number} is not a pair of tokens: {line!r:.60}")
        merges.append((pair[0], pair[1]))
    return merges


def _pad_id(folder: Path, vocab: dict[str, int], vocab_size: int) -> int:
    """Returns the id of [PAD]. If the vocabulary does not have it, it gets a new id, as in the original.

    The new id is the number of tokens, or the id after [UNK] if that is higher. With a 0, b 5 and [UNK] 7 it is 8.
    """
    pad_id = vocab.get(PAD, max(len(vocab), vocab[UNKNOWN] + 1))
    if pad_id >= vocab_size or (PAD not in vocab and pad_id in vocab.values()):
        why = f"the text embedding has {vocab_size} rows" if pad_id >= vocab_size else "another token has it"
        raise CheckpointError(f"{folder / VOCAB_FILE}: has no {PAD} token, whose id would be {pad_id}, but {why}")
    return pad_id
