"""Prompts to ids: as the original's tokenizer, and clear errors for what is not a prompt or not a vocabulary."""

import json
import random
import shutil

import numpy as np
import pytest
from tokenizers import CharBPETokenizer

from mindalle_jax.errors import CheckpointError, UsageError
from mindalle_jax.text.tokenizer import MAX_PROMPT_CHARACTERS, MERGES_FILE, VOCAB_FILE, TextTokenizer

N, VOCAB_SIZE = 12, 110


@pytest.fixture(scope="module")
def folder(tiny_folder):
    return tiny_folder / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return TextTokenizer(folder, N, VOCAB_SIZE)


@pytest.fixture(scope="module")
def original(folder):
    return as_the_original(folder)


def as_the_original(folder):
    """As the original builds it: lower-casing, [PAD] added as a special token, padded and cut to N."""
    tokenizer = CharBPETokenizer(str(folder / VOCAB_FILE), str(folder / MERGES_FILE), unk_token="[UNK]", lowercase=True)
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.enable_padding(length=N, pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
    tokenizer.enable_truncation(max_length=N)
    return lambda prompts: np.array([encoding.ids for encoding in tokenizer.encode_batch(prompts)])


@pytest.fixture
def copy(folder, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(folder, tmp_path / "tokenizer")


ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz",
    "the cat and dog 12 CAT DoG",
    "ABCÉÜÄÖßéüñçİıſﬁ ǅ Σσς",
    "0123456789 ²³½ ٣ Ⅷ",
    " \t\n\r\u00a0\u2003\u200b\u3000\ufeff\u0085\u2028",
    "!?,.-'&()[]{}<>@#$%^*_+=~`\"\\/|;:—…«»¿„“",
    "東京日本 カタカナ 한국어 ไทย हिन्दी العربية עברית",
    "🎨👩‍👩‍👧🏳️‍🌈e\u0301u\u0308\u0327",
    "".join(map(chr, [*range(1, 32), *range(127, 160), 0xAD, 0x200D, 0xFFFD, 0xE000, 0x10FFFF])),
]


def random_prompts(count: int) -> list[str]:
    rng = random.Random(0)
    prompts = []
    for i in range(count):
        letters = "".join(rng.sample(ALPHABETS, rng.randint(1, 3))) + " " * rng.randint(0, 20)
        if i % 10 == 0:  # anywhere in Unicode but NUL and surrogates
            letters += "".join(
                chr(rng.choice([rng.randint(1, 0xD7FF), rng.randint(0xE000, 0x10FFFF)])) for _ in "x" * 50
            )
        prompts.append("".join(rng.choice(letters) for _ in range(rng.randint(0, 40))))
    return prompts


def test_ids_are_those_of_the_originals_tokenizer(tokenizer, original):
    """Spaces, control characters, accents, CJK, emoji, capitals that lower to two letters, lengths around N."""
    prompts = random_prompts(800)
    expected, actual = original(prompts), tokenizer(prompts).ids
    wrong = [prompt for prompt, a, b in zip(prompts, actual, expected, strict=True) if (a != b).any()]
    assert not wrong
    assert len(np.unique(actual)) > 80  # the prompts use the vocabulary


def test_a_prompt_has_the_ids_that_a_person_works_out(tokenizer, folder):
    """One by hand: merges apply, the last piece of a word carries </w>, capitals are lowered, the rest is [PAD]."""
    vocab = json.loads((folder / VOCAB_FILE).read_text(encoding="utf-8"))
    tokens = ["the</w>", "cat</w>", "ca", "n", "s</w>", "!</w>", "[UNK]"]
    ids = [vocab[token] for token in tokens] + [vocab["[PAD]"]] * (N - len(tokens))
    assert tokenizer(["The CAT cans! ж"]).ids.tolist() == [ids]


def test_an_empty_prompt_is_padding(tokenizer):
    """The unconditional prompt of the original; whitespace is the same."""
    tokenized = tokenizer(["", "  \n"])
    assert tokenized.ids.dtype == np.int32
    np.testing.assert_array_equal(tokenized.ids, np.full((2, N), tokenizer.pad_id))
    assert tokenized.num_tokens == [0, 0]
    assert tokenized.warnings(["", "  \n"]) == []


def test_no_prompts_are_no_rows(tokenizer):
    assert tokenizer([]).ids.shape == (0, N)


@pytest.mark.parametrize("special", ["[PAD]", "[UNK]"])
def test_special_tokens_typed_in_a_prompt_stay_text(tokenizer, special):
    """In the original they become the token: a prompt could cut itself off with [PAD]."""
    ids = tokenizer([special, f"a {special} b"]).ids
    letters = special.strip("[]").lower()
    inner = tokenizer([letters]).ids[0]
    inner = inner[inner != tokenizer.pad_id].tolist()
    # Brackets are not in this vocabulary: [UNK], the letters, [UNK].
    assert ids[0, : len(inner) + 2].tolist() == [tokenizer.unk_id, *inner, tokenizer.unk_id]
    assert ids[1, 1 : len(inner) + 3].tolist() == [tokenizer.unk_id, *inner, tokenizer.unk_id]


def test_a_long_prompt_is_cut_and_said(tokenizer):
    """64 tokens are silently all that the original reads."""
    prompts = ["x " * (N + 3), "x " * N]
    tokenized = tokenizer(prompts)
    assert tokenized.num_tokens == [N + 3, N]
    np.testing.assert_array_equal(tokenized.ids[0], tokenized.ids[1])
    (line,) = tokenized.warnings(prompts)
    assert f"has {N + 3} tokens" in line and f"first {N}" in line


def test_a_prompt_that_is_mostly_unknown_is_said(tokenizer):
    """A script that the vocabulary does not have gives a picture of nothing in particular."""
    prompts = ["женщина", "cat ж", "ж"]
    tokenized = tokenizer(prompts)
    assert tokenized.num_unknown == [7, 1, 1]
    lines = tokenized.warnings(prompts)
    assert len(lines) == 2 and all("unknown" in line for line in lines)  # half is not more than half
    assert "7 of the 7 tokens of 'женщина'" in lines[0]


def test_long_prompts_are_shortened_in_messages(tokenizer):
    """A message is one line."""
    prompts = ["ж" * 500]
    for line in tokenizer(prompts).warnings(prompts):
        assert len(line) < 250 and "\n" not in line


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("x" * (MAX_PROMPT_CHARACTERS + 1), "2,001 characters; the limit is 2,000"),
        ("a\0b", "NUL character"),
        ("a\ud800b", "lone surrogate at character 1"),
        (b"cat", "text, not bytes"),
        (None, "text, not NoneType"),
        (5, "text, not int"),
    ],
    ids=["long", "NUL", "surrogate", "bytes", "None", "int"],
)
def test_what_is_not_a_prompt_is_refused(tokenizer, prompt, message):
    """By itself the library drops, cuts or raises TypeError; a megabyte takes six seconds."""
    with pytest.raises(UsageError, match=message) as raised:
        tokenizer(["a cat", prompt])
    assert len(str(raised.value)) < 200
    str(raised.value).encode()  # printable: no surrogate in the message


def test_the_longest_prompt_is_taken(tokenizer):
    assert tokenizer(["x" * MAX_PROMPT_CHARACTERS]).num_tokens == [MAX_PROMPT_CHARACTERS]


# ---------------------------------------- vocabularies


@pytest.mark.parametrize("name", [VOCAB_FILE, MERGES_FILE])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing; the folder needs"):
        TextTokenizer(copy, N, VOCAB_SIZE)


def test_a_vocabulary_larger_than_the_embedding_is_refused(copy, tokenizer):
    """An id beyond the table would be clamped to its last row, silently."""
    vocab = json.loads((copy / VOCAB_FILE).read_text(encoding="utf-8"))
    assert TextTokenizer(copy, N, len(vocab)).pad_id == tokenizer.pad_id
    with pytest.raises(CheckpointError, match=f"ids up to {len(vocab) - 1}.* {len(vocab) - 1} rows"):
        TextTokenizer(copy, N, len(vocab) - 1)


def without(copy, token: str) -> int:
    """Takes a token out of the vocabulary, whose ids close up; returns how many remain."""
    vocab = json.loads((copy / VOCAB_FILE).read_text(encoding="utf-8"))
    gone = vocab.pop(token)
    vocab = {k: i - 1 if i > gone else i for k, i in vocab.items()}
    (copy / VOCAB_FILE).write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    return len(vocab)


def test_a_vocabulary_without_unk_is_refused(copy):
    without(copy, "[UNK]")
    with pytest.raises(CheckpointError, match=rf"{VOCAB_FILE}: has no \[UNK\] token"):
        TextTokenizer(copy, N, VOCAB_SIZE)


def test_a_vocabulary_without_pad_gets_the_next_id(copy, tmp_path):
    """As in the original, which adds it as a special token; it is kept when the files are written again."""
    count = without(copy, "[PAD]")
    tokenizer, original = TextTokenizer(copy, N, VOCAB_SIZE), as_the_original(copy)
    assert tokenizer.pad_id == count
    prompts = ["the cat", "", "a dog and 12"]
    np.testing.assert_array_equal(tokenizer(prompts).ids, original(prompts))
    tokenizer.save(tmp_path / "again")
    np.testing.assert_array_equal(TextTokenizer(tmp_path / "again", N, VOCAB_SIZE)(prompts).ids, original(prompts))


def test_a_pad_comes_after_an_unk_beyond_the_number_of_tokens(copy):
    """A vocabulary with holes once gave [PAD] the number of its tokens, where the original counts on from [UNK]."""
    count = without(copy, "[PAD]")
    vocab = json.loads((copy / VOCAB_FILE).read_text(encoding="utf-8"))
    (copy / VOCAB_FILE).write_text(json.dumps(vocab | {"[UNK]": count + 3}, ensure_ascii=False), encoding="utf-8")
    tokenizer, original = TextTokenizer(copy, N, count + 5), as_the_original(copy)
    assert tokenizer.pad_id == count + 4
    prompts = ["the cat", "", "ж dog"]
    np.testing.assert_array_equal(tokenizer(prompts).ids, original(prompts))


def test_a_pad_without_a_row_or_an_id_of_its_own_is_refused(copy):
    """The original would look up another token's row, or fail deep in torch."""
    count = without(copy, "[PAD]")
    message = rf"{VOCAB_FILE}: has no \[PAD\] token, whose id would be {count}, but the text embedding has {count} rows"
    with pytest.raises(CheckpointError, match=message):
        TextTokenizer(copy, N, count)
    vocab = json.loads((copy / VOCAB_FILE).read_text(encoding="utf-8"))
    (copy / VOCAB_FILE).write_text(json.dumps({k: i if i < count - 1 else i + 1 for k, i in vocab.items()}))
    with pytest.raises(CheckpointError, match=f"whose id would be {count}, but another token has it"):
        TextTokenizer(copy, N, VOCAB_SIZE)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b'{"a": "b"}', b'{"a": -1}', b'{"a": 1.5}', b'{"a": true}', b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "cut", "list", "text id", "negative", "float", "bool", "not UTF-8", "deep"],
)
def test_a_damaged_vocabulary_is_refused(copy, content):
    (copy / VOCAB_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=VOCAB_FILE) as raised:
        TextTokenizer(copy, N, VOCAB_SIZE)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a b c\n", "line 1 is not a pair"),
        (b"#version: 0.2\nc a\nca\n", "line 3 is not a pair"),
        (b"q zz\n", "does not fit"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_damaged_merges_are_refused(copy, content, message):
    """A cut or foreign merges file would give other ids without a word."""
    (copy / MERGES_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        TextTokenizer(copy, N, VOCAB_SIZE)
    assert MERGES_FILE in str(raised.value) and "\n" not in str(raised.value)


def test_windows_line_ends_in_merges_change_nothing(copy, tokenizer):
    """A checkout or an editor may have rewritten the file."""
    merges = (copy / MERGES_FILE).read_bytes()
    (copy / MERGES_FILE).write_bytes(merges.replace(b"\n", b"\r\n"))
    prompts = ["the cat and the dog 12"]
    np.testing.assert_array_equal(TextTokenizer(copy, N, VOCAB_SIZE)(prompts).ids, tokenizer(prompts).ids)
