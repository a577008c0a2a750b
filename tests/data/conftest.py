"""Tokenizers and real data.

What comes from the folder `shared` beside the repository skips its tests where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def load_tokenizer(shared_folder: Path) -> Callable[[str], Any]:
    def load(folder: str) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(shared_folder / "models" / folder)

    return load


@pytest.fixture(scope="session")
def natural_instructions_folder(shared_folder: Path) -> Path:
    return shared_folder / "data" / "natural-instructions"


@pytest.fixture(scope="session")
def dolly_folder(shared_folder: Path) -> Path:
    return shared_folder / "data" / "dolly"


@pytest.fixture(scope="session")
def gpt2(load_tokenizer: Callable[[str], Any]) -> Any:
    """Byte-level, adds no special token of its own, and has no chat template."""
    return load_tokenizer("gpt2-tokenizer")


@pytest.fixture(scope="session")
def stories(load_tokenizer: Callable[[str], Any]) -> Any:
    """512 tokens, puts <s> before every text."""
    return load_tokenizer("stories260K-hf")


@pytest.fixture(scope="session")
def make_words() -> Callable[..., Any]:
    """Makes a real fast tokenizer with one token per word and one per other character.

    Needs no file.
    """
    return _word_tokenizer


@pytest.fixture
def words() -> Any:
    """Such a tokenizer that puts <s> before every text; the test may change it."""
    return _word_tokenizer()


def _word_tokenizer(frame: str = "<s> $A") -> Any:
    """A word-level tokenizer.

    Args:
        frame: the special tokens that it puts around a text.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\n": 3, " ": 4} | {
        f"w{i}": 5 + i for i in range(100)
    }
    vocabulary |= {
        word: 105 + i
        for i, word in enumerate(
            ["###", "Response", "Instruction", "Input", ":", "user", "assistant", "a"]
        )
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|###|.|\n"), "isolated")
    if frame != "$A":
        backend.post_processor = processors.TemplateProcessing(
            single=frame, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        name_or_path="words",
    )
