"""Tokenizers made from captions: the files that the readers take, the same ids everywhere, the same in each process."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import CharBPETokenizer

from mindalle_jax import cli
from mindalle_jax.errors import DataError, OutputError, UsageError
from mindalle_jax.models.clip import ClipTextConfig
from mindalle_jax.text.clip_tokenizer import read_clip_tokenizer
from mindalle_jax.text.known_words import WORDS_FILE, count_words
from mindalle_jax.text.tokenizer import MERGES_FILE, VOCAB_FILE, TextTokenizer
from mindalle_jax.training.tokenizers import MAX_CHARACTERS, train_char_bpe, train_clip_bpe, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = "a small Large striped red star circle, to the left of right on grey background 猫 café's !".split()
N, CHARS_SIZE, CLIP_SIZE = 24, 90, 560
"""Sizes of vocabularies; the captions would give a few more tokens."""


def captions(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Files of no picture with captions beside them: captions are read, and no pixels."""
    folder = tmp_path_factory.mktemp("data")
    for i, caption in enumerate(captions(300)):
        (folder / f"{i:03}.png").write_bytes(b"")
        (folder / f"{i:03}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(data, tmp_path_factory) -> dict[str, Path]:
    """What the command writes, of each kind."""
    out = tmp_path_factory.mktemp("out")
    for kind, size in (("mindalle", CHARS_SIZE), ("clip", CLIP_SIZE)):
        command = ["train-tokenizer", str(data), "--out", str(out / kind), "--vocab-size", str(size), "--kind", kind]
        assert cli.main(command) == 0
    return {kind: out / kind for kind in ("mindalle", "clip")}


NEW_TEXTS = [*captions(100, seed=1), "", "  the  STAR\tof\n", "zebra 東 !?", "café's [red]", "x" * 100]
"""Most are new only as sentences; some have characters that no caption had."""


def test_the_transformers_tokenizer_reads_the_ids_that_the_library_gives(folders):
    """As TextTokenizer reads the files, as CharBPETokenizer does, and before they were written."""
    folder = folders["mindalle"]
    ours = TextTokenizer(folder, N, CHARS_SIZE)
    library = CharBPETokenizer(str(folder / VOCAB_FILE), str(folder / MERGES_FILE), unk_token="[UNK]", lowercase=True)
    trained = train_char_bpe(captions(300), CHARS_SIZE)
    ids = ours(NEW_TEXTS)
    for text, row, length in zip(NEW_TEXTS, ids.ids, ids.num_tokens, strict=True):
        assert trained.encode(text).ids == library.encode(text).ids
        assert trained.encode(text).ids[:N] == row[: min(length, N)].tolist()
        assert (row[length:] == ours.pad_id).all()


def test_the_ids_are_below_the_size_and_the_special_ones_come_first(folders):
    vocab = json.loads((folders["mindalle"] / VOCAB_FILE).read_text(encoding="utf-8"))
    assert list(vocab.values()) == list(range(CHARS_SIZE))
    assert (vocab["[UNK]"], vocab["[PAD]"]) == (0, 1)


def test_captions_of_training_have_no_unknown_token(folders):
    tokenized = TextTokenizer(folders["mindalle"], N, CHARS_SIZE)(captions(300))
    assert sum(tokenized.num_unknown) == 0


@pytest.mark.parametrize(("train", "around"), [(train_char_bpe, 0), (train_clip_bpe, 2)])
def test_words_are_one_token_each_where_there_is_room(train, around):
    tokenizer = train(captions(300), 1_000)
    assert tokenizer.get_vocab_size() < 1_000
    assert len(tokenizer.encode("a small Large striped 猫 star !").ids) == 7 + around


def test_a_word_of_known_characters_is_never_unknown():
    """Each character is there as the last of a word too, though no caption ended a word with it."""
    tokenizer = train_char_bpe(["ab cb"], 100)
    assert 0 not in tokenizer.encode("ca ba bbbc").ids
    assert 0 in tokenizer.encode("d").ids


def test_rare_characters_become_unknown_and_not_symbols():
    """A vocabulary of web captions would be nothing but the characters of all scripts."""
    many = "".join(map(chr, range(0xAC00, 0xAC00 + MAX_CHARACTERS + 5)))  # syllables of Korean
    tokenizer = train_char_bpe([*many[5:], many], 2 + 2 * MAX_CHARACTERS)
    assert tokenizer.get_vocab_size() == 2 + 2 * MAX_CHARACTERS
    assert [tokenizer.encode(many[i]).ids == [0] for i in (0, 4, 5, -1)] == [True, True, False, False]


def test_the_clip_tokenizer_is_read_by_transformers_to_the_same_ids(folders):
    from transformers import CLIPTokenizer

    ours = read_clip_tokenizer(folders["clip"], ClipTextConfig(vocab_size=CLIP_SIZE, eos_token_id=CLIP_SIZE - 1))
    theirs = CLIPTokenizer.from_pretrained(folders["clip"])
    trained = train_clip_bpe(captions(300), CLIP_SIZE)
    for text in [*NEW_TEXTS, "<|startoftext|> star <|endoftext|>", "it's 12"]:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text).ids == trained.encode(text).ids == expected
        assert (expected[0], expected[-1]) == (CLIP_SIZE - 2, CLIP_SIZE - 1)
    assert set(ours.get_vocab().values()) == set(range(CLIP_SIZE))


SCRIPT = """
import hashlib, sys
sys.path.insert(0, "tests/training")
from test_tokenizers import captions
from mindalle_jax.training.tokenizers import train_char_bpe, train_clip_bpe
for tokenizer in (train_char_bpe(captions(300), 70), train_clip_bpe(captions(300), 540)):
    print(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())
"""


def test_each_process_makes_the_same_tokenizer():
    """The library orders symbols as its hash tables do, which start at random in every process; 70 and 540 cut off
    among merges that are equally frequent."""
    other = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=os.environ | {"RAYON_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    here = (train_char_bpe(captions(300), 70), train_clip_bpe(captions(300), 540))
    assert other.split() == [hashlib.sha256(tokenizer.to_str().encode()).hexdigest() for tokenizer in here]


@pytest.mark.parametrize("train", [train_char_bpe, train_clip_bpe])
@pytest.mark.parametrize("texts", [[], [""], [" \n\t"]])
def test_captions_without_text_are_refused(train, texts):
    with pytest.raises(DataError, match="no caption has any text"):
        train(texts, 1_000)


@pytest.mark.parametrize(("train", "least"), [(train_char_bpe, 2 + 2 * 3), (train_clip_bpe, 514)])
def test_the_least_size_is_named_and_works(train, least):
    with pytest.raises(UsageError, match=f"{least - 1} is too small: at least {least} tokens are needed"):
        train(["abc"], least - 1)
    assert train(["abc"], least).get_vocab_size() == least
    with pytest.raises(UsageError, match="too small"):
        train(["abc"], -1)


def test_a_folder_that_holds_something_stays_as_it_is(data, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="exists and is not empty; name another folder"):
        train_tokenizer(data, tmp_path, vocab_size=CHARS_SIZE, kind="mindalle")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_the_command_says_what_is_wrong_in_one_line(data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for place, size, code, words in [
        (data, "20", 2, "too small"),
        (tmp_path / "empty", "130", 9, "nothing to train on"),
        (tmp_path / "none", "130", 9, "does not exist"),
    ]:
        out = tmp_path / "out"
        command = ["train-tokenizer", str(place), "--out", str(out), "--vocab-size", size, "--kind", "mindalle"]
        assert cli.main(command) == code
        err = capsys.readouterr().err
        assert err.startswith("mindalle train-tokenizer: ") and words in err and err.count("\n") == 1
        assert not out.exists()


def test_the_longest_caption_is_told_for_the_context_length(data, tmp_path):
    line = train_tokenizer(data, tmp_path / "out", vocab_size=CHARS_SIZE, kind="mindalle")
    longest = max(TextTokenizer(tmp_path / "out", N, CHARS_SIZE)(captions(300)).num_tokens)
    assert line.endswith(f"{CHARS_SIZE} tokens, from 300 captions; the longest of them has {longest} tokens")


def test_the_words_of_the_captions_are_written(data, tmp_path):
    """So that a model over this tokenizer can say what it does not know. CLIP knows no words, but bytes."""
    train_tokenizer(data, tmp_path / "out", vocab_size=CHARS_SIZE, kind="mindalle")
    known_words = TextTokenizer(tmp_path / "out", N, CHARS_SIZE).known_words
    assert known_words is not None and known_words.words == set(count_words(captions(300)))
    assert known_words.warning("a zeppelin", "it") is not None
    train_tokenizer(data, tmp_path / "clip", vocab_size=540, kind="clip")
    assert not (tmp_path / "clip" / WORDS_FILE).exists()
