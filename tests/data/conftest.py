"""Real tokenizers and real data from the folder `shared` beside the repository; tests that need them are skipped without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[2].parent / "shared"


def _shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_shared("models", folder))


@pytest.fixture(scope="session")
def natural_instructions_folder() -> Path:
    return _shared("data", "natural-instructions")


@pytest.fixture(scope="session")
def dolly_folder() -> Path:
    return _shared("data", "dolly")


@pytest.fixture(scope="session")
def gpt2() -> Any:
    """Byte-level, adds no special token of its own, and has no chat template."""
    return _tokenizer("gpt2-tokenizer")


@pytest.fixture(scope="session")
def stories() -> Any:
    """512 tokens, puts <s> before every text."""
    return _tokenizer("stories260K-hf")


@pytest.fixture
def words() -> Any:
    """A real fast tokenizer with one token per word and one per other character, made here: needs no file."""
    return word_tokenizer()


def word_tokenizer(frame: str = "<s> $A") -> Any:
    """A word-level tokenizer.

    Args:
        frame: the special tokens that it puts around a text.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\n": 3, " ": 4} | {f"w{i}": 5 + i for i in range(100)}
    vocabulary |= {word: 105 + i for i, word in enumerate(["###", "Response", "Instruction", "Input", ":", "user", "assistant", "a"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|###|.|\n"), "isolated")
    if frame != "$A":
        backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", name_or_path="words")
