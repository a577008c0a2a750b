"""Kinds of adapters, in one table from name to kind.

A kind says how its adapters begin, train, are measured, answer, and are kept in files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from fedmira.adapters import Adapter
from fedmira.config import AdapterSettings, EngineSettings, LocalSettings
from fedmira.errors import ModelError
from fedmira.model.base.memory import out_of_memory
from fedmira.model.base.options import with_engine_options
from fedmira.model.base.rows import Row
from fedmira.model.base.targets import find_targets, usual_names
from fedmira.model.base.types import BaseModel, TargetModule
from fedmira.model.kinds.lora import LoraKind
from fedmira.model.kinds.prompt_encoders import PromptModel
from fedmira.model.kinds.prompts import PromptKind
from fedmira.model.kinds.proof import check_wrapped
from fedmira.model.packed.probe import targets_in_use
from fedmira.model.training.measure import Choice, Contender
from fedmira.model.training.tasks import LocalOutcome, LocalTask

__all__ = ["AdapterKind", "adapter_kind"]


class AdapterKind(Protocol):
    """Adapters of one kind on one resident base.

    No state but how much memory was seen to hold, and no randomness but that of a seed.
    """

    @property
    def base(self) -> BaseModel:
        """The frozen base that all adapters of the run stand on."""
        ...

    @property
    def targets(self) -> Sequence[TargetModule]:
        """The linear layers that carry a LoRA branch; none for other kinds."""
        ...

    @property
    def packed(self) -> bool:
        """Whether steps are packed; if not, rows are padded."""
        ...

    @property
    def virtual_tokens(self) -> int:
        """Positions of the context that an adapter takes."""
        ...

    @property
    def summary(self) -> str:
        """What an adapter is, in a few words."""
        ...

    def scale(self, rank: int) -> float:
        """What a client's update is multiplied by."""
        ...

    def starts(self, ranks: Mapping[str, int], seed: int) -> dict[str, Adapter]:
        """What each client starts from.

        One common adapter, cut to the client's rank where adapters have one.
        """
        ...

    def train(
        self, tasks: Sequence[LocalTask], settings: LocalSettings, budget: int
    ) -> list[LocalOutcome]:
        """Train all tasks, each as if it were alone; one outcome a task, in order.

        Args:
            budget: most token positions in one forward pass; lowered when memory runs out, and so
                are those of later calls.
        """
        ...

    def losses(
        self,
        adapters: Sequence[Adapter],
        scales: Sequence[float],
        rows: Sequence[Sequence[Row]],
        budget: int,
    ) -> list[float]:
        """The sum of the response losses of each adapter on its rows, in nats."""
        ...

    def row_losses(
        self,
        adapters: Sequence[Adapter],
        scales: Sequence[float],
        rows: Sequence[Sequence[Row]],
        budget: int,
    ) -> list[list[float]]:
        """The sum of the response losses of each row under its client's adapter, in nats."""
        ...

    def changes_nothing(self, adapter: Adapter) -> bool:
        """Whether the base with this adapter is the base, to the bit."""
        ...

    def choose(self, contenders: Sequence[Contender], budget: int) -> list[Choice]:
        """For each client the adapter with the lowest loss on its rows."""
        ...

    def generate(
        self,
        adapters: Sequence[Adapter],
        scales: Sequence[float],
        prompts: Sequence[tuple[int, Sequence[int]]],
        max_new_tokens: int,
        budget: int,
    ) -> list[str]:
        """Greedy answers to (position of the adapter, prompt token ids) pairs, in their order."""
        ...

    def token_budget(self, step_tokens: float = 0.0, cohort: int = 1) -> int:
        """What `engine.token_budget` = "auto" means."""
        ...

    def write(self, folder: Path, adapter: Adapter, *, lasting: bool = True) -> None:
        """Write a folder that plain PEFT loads; `lasting`: the disk holds it on return."""
        ...

    def read(self, folder: Path) -> Adapter:
        """What was trained, from such a folder.

        Raises:
            RunFolderError: there is no such file, or it is damaged.
        """
        ...


def _targets(settings: AdapterSettings, base: BaseModel) -> list[TargetModule]:
    """The layers as named, or the first of the usual ones that text trains."""
    try:
        return targets_in_use(base, find_targets(base.model, settings.targets))
    except ModelError as error:
        for names in [] if settings.targets else usual_names(base.model)[1:]:
            try:
                return targets_in_use(base, find_targets(base.model, names))
            except ModelError:
                continue
        raise error


def _lora(settings: AdapterSettings, base: BaseModel, engine: EngineSettings) -> LoraKind:
    targets = _targets(settings, base)
    check_wrapped(base, targets, settings.alpha)
    return LoraKind(
        with_engine_options(base, engine, targets),
        targets,
        settings.alpha,
        settings.dropout,
        settings.rslora,
    )


def _prompts(settings: AdapterSettings, base: BaseModel, engine: EngineSettings) -> PromptKind:
    """Make the model and try it on two tokens.

    Not every architecture can read virtual tokens or a prefix.
    """
    base = with_engine_options(base, engine, ())
    try:
        model = PromptModel(base, settings)
        with torch.no_grad():
            ids = torch.full((1, 2), base.tokenizer.eos_token_id, device=base.device)
            model.greedy(ids, 2, torch.tensor([], dtype=torch.long, device=base.device))
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        LookupError,
        NotImplementedError,
    ) as error:
        if out_of_memory(error):
            raise  # says nothing about the architecture
        raise ModelError(
            f"adapter.kind = {settings.kind!r} does not work on {type(base.model).__name__} "
            f"({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}); set "
            "adapter.kind to 'lora'"
        ) from error
    return PromptKind(model)


_KINDS: Mapping[str, Callable[[AdapterSettings, BaseModel, EngineSettings], AdapterKind]] = {
    "lora": _lora,
    "p-tuning": _prompts,
    "prompt": _prompts,
    "prefix": _prompts,
}


def adapter_kind(settings: AdapterSettings, base: BaseModel, engine: EngineSettings) -> AdapterKind:
    """The kind that [adapter] asks for, on this base with its layers as [engine] asks for.

    Args:
        settings: the [adapter] section.
        base: the frozen base.
        engine: the [engine] section.

    Raises:
        ModelError: the base has no such layers, or cannot carry adapters of this kind.
    """
    return _KINDS[settings.kind](settings, base, engine)
