"""Known words: what a model does not know is named, with the nearest; models without a list never warn."""

import json
import time

import pytest

from mindalle_jax.errors import CheckpointError
from mindalle_jax.storage.files import IN_PACKAGE
from mindalle_jax.text.known_words import MAX_WORDS, WORDS_FILE, KnownWords, count_words, read_known_words, split_words

WORDS = KnownWords(
    frozenset(["a", "large", "red", "grey", "circle"]), "draws circles", ("a large red circle", "a circle")
)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a cat", "demo knows none of these words: cat (in 'a cat'). It draws circles, such as \"a circle\"; for "),
        ("cats on the mats", "demo knows none of these words: cats, mats ("),
        ("a gray circle", "demo does not know gray (nearest: grey) (in "),
        ("A Large, RED cirlce!", "demo does not know cirlce (nearest: circle) (in "),
        ("a cat, a cat and a dog", "demo knows none of these words: cat, dog ("),
        ("red " + " ".join("abcdefghij"), "demo does not know b, c, d, e, f, g, h, i, ... (in "),
        ("rcircle", "demo knows none of these words: rcircle (in "),  # a slip is seldom in the first letter
        ("東京", "demo knows none of these words: 東京 ("),
    ],
)
def test_unknown_words_are_named_with_the_nearest(prompt, said):
    """Words that name nothing (a, the, on) are neither known nor unknown."""
    warning = WORDS.warning(prompt, "demo")
    assert warning is not None and warning.startswith(said)
    assert warning.endswith("use the published model, minDALL-E/1.3B (a download of 5 GB)")


def test_a_prompt_reaches_a_terminal_escaped():
    warning = WORDS.warning("\x1b[2J zork \u202e", "demo")
    assert warning is not None and warning.isprintable()


def test_long_words_and_lists_take_no_time():
    """Every unknown word is compared with the known ones: 20,000 of them, or few of thousands of characters."""
    words = frozenset(f"{i:x}word{i}" for i in range(MAX_WORDS))
    start = time.perf_counter()
    KnownWords(words).warning(" ".join(f"unword{i}" for i in range(150)), "it")
    KnownWords(frozenset(chr(0x4E00 + i) * 1990 for i in range(300))).warning("東" * 1990, "it")
    assert time.perf_counter() - start < 5  # half a second on an idle machine


@pytest.mark.parametrize("prompt", ["a red circle", "the large, grey circle?", "RED", "", "of the", "!?"])
def test_known_words_are_passed_in_silence(prompt):
    assert WORDS.warning(prompt, "demo") is None


def test_words_are_runs_of_letters_and_digits():
    assert split_words("A T-shirt, 50's; grey_ish") == ["a", "t", "shirt", "50", "s", "grey", "ish"]
    assert count_words(["a cat", "A dog."]) == {"a": 2, "cat": 1, "dog": 1}


def test_a_list_is_read_as_it_was_saved(tmp_path):
    WORDS.save(tmp_path)
    assert read_known_words(tmp_path) == WORDS


def test_words_join_the_list(tmp_path):
    """What was said about the model does not hold for one that has learned more."""
    more = WORDS.extended(["a blue circle"])
    assert more == KnownWords(WORDS.words | {"blue"})
    warning = more.warning("a cat", "mine")
    assert warning is not None and "It was trained on 6 words; for photographs" in warning
    assert WORDS.extended(["a red circle"]) == WORDS


def test_the_language_at_large_has_no_list(tmp_path):
    """A list that has grown too long goes: nearly every word would be in it."""
    WORDS.save(tmp_path)
    WORDS.extended(f"w{i}" for i in range(MAX_WORDS)).save(tmp_path)
    assert not (tmp_path / WORDS_FILE).exists() and read_known_words(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"words": ["a"]}',
        '{"about": 1, "examples": [], "words": []}',
        '{"about": "", "examples": [], "words": [["a"]]}',
        json.dumps({"about": "\x1b[2J", "examples": [], "words": []}),
        json.dumps({"about": "", "examples": [], "words": ["a\nb"]}),
        "[" * 100_000,
        '{"about": "", "examples": [""], "words": ["a"]}',
        '{"about": "", "examples": "abc", "words": ["a"]}',
        '{"about": "", "examples": [], "words": "abc"}',
        json.dumps({"about": "x" * 1000, "examples": [], "words": []}),
    ],
    ids=["cut", "list", "fields", "number", "nested", "terminal", "line", "deep", "blank", "text", "words", "long"],
)
def test_a_damaged_list_is_told(tmp_path, text):
    (tmp_path / WORDS_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="words.json: not a list of words"):
        read_known_words(tmp_path)


def test_a_list_of_megabytes_is_not_read(tmp_path):
    (tmp_path / WORDS_FILE).write_text(json.dumps({"about": "", "examples": [], "words": ["x" * 5_000_000]}))
    with pytest.raises(CheckpointError, match="more than 4 MB"):
        read_known_words(tmp_path)


@pytest.mark.parametrize(
    ("name", "least", "most", "about"),
    [
        ("demo", 500, 3000, "samples emoji of animals, plants, food, vehicles and other things in three styles"),
        ("demo-scenes", 30, 60, "samples one or two colored shapes on a plain background"),
    ],
)
def test_the_models_in_the_package_know_their_examples(name, least, most, about):
    known_words = read_known_words(IN_PACKAGE[name] / "tokenizer")
    assert known_words is not None and least < len(known_words.words) < most
    assert known_words.about.startswith(about)
    assert len(known_words.examples) == 3
    assert [known_words.warning(example, name) for example in known_words.examples] == [None] * 3
