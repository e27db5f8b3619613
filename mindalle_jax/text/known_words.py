"""The words that a model was trained on, if its folder has a list of them: tokenizer/words.json.

    {"about": "samples colored shapes", "examples": ["a red circle"], "words": ["a", "circle", "red"]}

A small model knows few words, but it samples an image for every prompt. The published model has no such list.
"""

import dataclasses
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mindalle_jax.errors import CheckpointError

WORDS_FILE = "words.json"
MAX_WORDS = 20_000
"""Maximum size of a list. Captions with more distinct words cover most of the language, so no list is written."""
MAX_BYTES = 4 << 20
MAX_LENGTH = 40
"""Longest word that is compared with the known ones, in characters."""
FUNCTION_WORDS = frozenset("a an and as at by for from in into is of on or s the to with".split())
"""Words that name nothing, so they do not count as known words of a prompt."""
LARGER_MODEL = "for photographs and paintings use the published model, minDALL-E/1.3B (a download of 5 GB)"


@dataclasses.dataclass(frozen=True)
class KnownWords:
    """The words of one model, in lower case."""

    words: frozenset[str]
    about: str = ""
    """The rest of a sentence that starts with the model: "samples colored shapes"."""
    examples: tuple[str, ...] = ()
    """Prompts that the model follows."""

    def warning(self, prompt: str, model: str) -> str | None:
        """Returns a warning that names unknown words of the prompt, with the nearest known ones; None without any.

        model: the name of the model.
        """
        content = [word for word in dict.fromkeys(split_words(prompt)) if word not in FUNCTION_WORDS]
        unknown = [word for word in content if word not in self.words]
        if not unknown:
            return None
        named = ", ".join(self._with_nearest(word) for word in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        if len(unknown) == len(content):
            said = f"{model} knows none of these words: {named}"
        else:
            said = f"{model} does not know {named}"
        about = self.about or f"was trained on {len(self.words):,} words"
        example = f', such as "{min(self.examples, key=len)}"' if self.examples else ""
        return f"{said} (in {_shortened(prompt)!r}). It {about}{example}; {LARGER_MODEL}"

    def extended(self, captions: Iterable[str]) -> "KnownWords":
        """Returns the list with the words of more captions added.

        If there are new words, `about` and `examples` may not be true any more, so they are dropped.
        """
        words = self.words | frozenset(count_words(captions))
        return self if words == self.words else KnownWords(words)

    def save(self, folder: Path) -> None:
        """Writes words.json into the folder of a tokenizer, or removes it if there are more than MAX_WORDS."""
        if len(self.words) > MAX_WORDS:
            (folder / WORDS_FILE).unlink(missing_ok=True)
            return
        tree = {"about": self.about, "examples": list(self.examples), "words": sorted(self.words)}
        (folder / WORDS_FILE).write_text(json.dumps(tree, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def _with_nearest(self, word: str) -> str:
        if len(word) > MAX_LENGTH:
            return f"{word[:20]}..."
        # Compares only words with the same first letter, because typing errors are seldom there.
        alike = [known for known in self.words if known[:1] == word[:1] and abs(len(known) - len(word)) <= 2]
        near = difflib.get_close_matches(word, alike, n=1, cutoff=0.7)
        return f"{word} (nearest: {near[0]})" if near else word


def read_known_words(folder: Path) -> KnownWords | None:
    """Returns the list of words in a tokenizer's folder, or None. Raises CheckpointError if the file is damaged."""
    path = folder / WORDS_FILE
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MB")
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree["examples"], list) or not isinstance(tree["words"], list):
            raise TypeError("examples and words must be lists")
        texts = [tree["about"], *tree["examples"], *tree["words"]]
        # The texts are shown on a terminal, where control characters are commands.
        if not all(isinstance(text, str) and text.isprintable() for text in texts):
            raise ValueError("about, examples and words must be text without control characters")
        if len(tree["about"]) > 200 or not all(0 < len(text.strip()) <= 200 for text in tree["examples"]):
            raise ValueError("about and examples have up to 200 characters, and examples at least one")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a list of words: {type(error).__name__}: {str(error)[:100]}") from None
    return KnownWords(frozenset(tree["words"]), tree["about"], tuple(tree["examples"]))


def count_words(captions: Iterable[str]) -> Counter[str]:
    """Counts how often each word occurs in the captions."""
    counts = Counter[str]()
    for caption in captions:
        counts.update(split_words(caption))
    return counts


def split_words(text: str) -> list[str]:
    """Returns the words of a text, which are runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= 60 else prompt[:57] + "..."
