"""What is read and what is asked, seen at the seams of the commands; a base for rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from data.templates import TEMPLATES, byte_tokenizer
from field.inputs import Asked, Reads, write_random_base


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Keeps the rows that commands read, after they were split and encoded."""
    build = import_module("fedmira.experiment.build")
    found, load = Reads(), build.load_clients

    def keep(*arguments: Any, **more: Any) -> Any:
        found.datasets.append(load(*arguments, **more))
        return found.datasets[-1]

    monkeypatch.setattr(build, "load_clients", keep)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Keeps the prompts with which adapters are asked, and their answers."""
    from fedmira.model.kinds.lora import LoraKind

    found, generate = Asked(), LoraKind.generate

    def keep(
        self: LoraKind, adapters: Any, scales: Any, prompts: Sequence[Any], *more: Any
    ) -> list[str]:
        answers = generate(self, adapters, scales, prompts, *more)
        found.prompts += [tuple(ids) for _, ids in prompts]
        found.answers += answers
        return answers

    monkeypatch.setattr(LoraKind, "generate", keep)
    return found


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Every byte a token, with a chat template of the commonest form."""
    return byte_tokenizer(TEMPLATES["chatml"][0])


@pytest.fixture(scope="session")
def plain_base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A small random Llama with that tokenizer."""
    return write_random_base(tmp_path_factory.mktemp("plain") / "base", tokenizer)
