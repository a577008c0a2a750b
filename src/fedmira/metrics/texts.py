"""How close a generated text comes to its reference: Rouge-L in two dialects, and exact match."""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["exact_match", "rouge_l", "rouge_l_package"]

_WITHOUT_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(prediction: str, reference: str, *, use_stemmer: bool = False) -> float:
    """Rouge-L F1 as package `rouge_score` has it, 0..1.

    Longest common subsequence over tokens, lower case, letters and digits only. The package knows
    ASCII only; where a text has other letters, words are those of Unicode, and each character of a
    script that is written without blanks (Han, Kana, Thai, Lao, Khmer, Burmese) is one.

    Of two texts without any letter or digit (an emoji, a sign) none has a word to share: 1 where
    they are equal, else 0.

    Most papers report this one. Natural Instructions' own script also stems (`use_stemmer=True`).
    Not comparable with `rouge_l_package`.

    >>> from fedmira.metrics import rouge_l
    >>> round(rouge_l("the cat sat", "the cat ran"), 3)  # two words of three in common
    0.667

    Args:
        prediction: the generated text.
        reference: the row's response.
        use_stemmer: whether words are cut to their stems first.
    """
    if not any(letter.isalnum() for text in (prediction, reference) for letter in text):
        return float(prediction.strip() == reference.strip() != "")
    foreign = any(
        not letter.isascii() and letter.isalnum()
        for text in (prediction, reference)
        for letter in text
    )
    return float(_scorer(use_stemmer, foreign)(reference, prediction))


def rouge_l_package(prediction: str, reference: str) -> float:
    """Rouge-L F1 as package `rouge` 1.0.1 has it, 0..1.

    Union of subsequences over sentences, counted in unique words.

    FedKSeed and MIRA report this one, after lower case and strip; so do we. Sentences end at every
    full stop, also within a number. A text without a word (empty, or full stops only) scores 0. Not
    comparable with `rouge_l`: 'a a a a' against 'a' scores 1 here.

    Args:
        prediction: the generated text.
        reference: the row's response.
    """
    prediction, reference = prediction.lower().strip(), reference.lower().strip()
    if not prediction.strip(". \n\t") or not reference.strip(". \n\t"):
        return 0.0
    scorer = _package_scorer()
    # The package walks back through its table by recursion, a frame for each word of the two texts.
    with _recursion_room(2 * (len(prediction.split()) + len(reference.split()))):
        return float(scorer(prediction, reference))


def exact_match(prediction: str, reference: str) -> float:
    """1.0 where the normalised texts are equal, else 0.0.

    Normalised: lower case, without ASCII punctuation, white space joined. This is the normalisation
    of Natural Instructions; articles stay. A prediction and a reference that both become empty
    count as equal.

    >>> from fedmira.metrics import exact_match
    >>> exact_match("Yes.", "yes"), exact_match("yes", "no")
    (1.0, 0.0)

    Args:
        prediction: the generated text.
        reference: the row's response.
    """
    return float(_normalise(prediction) == _normalise(reference))


def _normalise(text: str) -> str:
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


# The Rouge packages are imported when they are first needed: one of them pulls in a language
# toolkit, which takes long to start.


class _UnicodeWords:
    """Splits texts of any script into words, as `rouge_score` asks its tokenizers to."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text; a stemmer for English leaves those of other scripts alone."""
        words = [""]
        for character in unicodedata.normalize("NFKC", text).lower():
            if unicodedata.category(character)[0] not in "LMN":
                words.append("")
            elif _WITHOUT_BLANKS.match(character) and unicodedata.category(character)[0] != "M":
                words += [character, ""]
            elif unicodedata.category(character)[0] == "M" and not words[-1] and len(words) > 1:
                words[-2] += character
            else:
                words[-1] += character
        return [word for word in words if word]


@cache
def _scorer(use_stemmer: bool, foreign: bool) -> Callable[[str, str], float]:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    # Without one the package logs a line, and with it sets up logging for the whole process.
    words = _UnicodeWords() if foreign else DefaultTokenizer(use_stemmer)
    scorer = RougeScorer(["rougeL"], use_stemmer=use_stemmer, tokenizer=words)
    return lambda reference, prediction: scorer.score(reference, prediction)["rougeL"].fmeasure


@cache
def _package_scorer() -> Callable[[str, str], float]:
    from rouge import Rouge

    scorer = Rouge(metrics=["rouge-l"], stats=["f"])
    return lambda prediction, reference: scorer.get_scores(prediction, reference)[0]["rouge-l"]["f"]


@contextmanager
def _recursion_room(frames: int) -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + frames)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
