"""Prompt encoders as kinds of adapters.

P-tuning, prompt tuning and prefix tuning, one client after another on padded rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from fedmira.adapters import Adapter
from fedmira.config import LocalSettings
from fedmira.model.base.memory import PassLimits, within_memory
from fedmira.model.base.rows import Row
from fedmira.model.base.types import BaseModel, TargetModule
from fedmira.model.generation.generate import (
    answered,
    end_tokens,
    fit_prompts,
    texts_of,
)
from fedmira.model.generation.waves import Prompt
from fedmira.model.kinds.peft_files import ENCODER_WEIGHTS, encoder_files, read_adapter, write_files
from fedmira.model.kinds.prompt_encoders import EncoderBranch, PromptModel, StackedEncoders
from fedmira.model.packed.token_budget import usual_token_budget
from fedmira.model.training.measure import (
    Choice,
    Contender,
    Measured,
    choose_by,
    measure_with,
    row_losses_with,
)
from fedmira.model.training.steps import train_with
from fedmira.model.training.tasks import LocalOutcome, LocalTask

__all__ = ["PromptKind"]

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class PromptKind:
    """Prompt encoders; clients take turns on one resident PEFT model, rows are padded.

    Attributes:
        model: the PEFT model.
        limits: how much memory was seen to hold.
        targets: empty; prompt encoders change no layer.
    """

    model: PromptModel
    targets: Sequence[TargetModule] = ()
    limits: PassLimits = field(default_factory=PassLimits, repr=False, compare=False)

    @property
    def base(self) -> BaseModel:
        """The frozen base behind the prompt model."""
        return self.model.base

    @property
    def packed(self) -> bool:
        """False: rows of several clients never share a pass."""
        return False

    @property
    def virtual_tokens(self) -> int:
        """The number N of virtual tokens, which take places of the context."""
        return self.model.num_tokens

    @property
    def summary(self) -> str:
        """How many virtual tokens."""
        return f"{self.virtual_tokens} virtual tokens"

    def scale(self, rank: int) -> float:
        """Always 1, as an encoder has no rank."""
        return 1.0

    def starts(self, ranks: Mapping[str, int], seed: int) -> dict[str, Adapter]:
        """One encoder for all."""
        return dict.fromkeys(ranks, self.model.start(seed))

    def train(
        self, tasks: Sequence[LocalTask], settings: LocalSettings, budget: int
    ) -> list[LocalOutcome]:
        """In turns within each step."""
        branch = self._branch([task.start for task in tasks], trainable=True)
        return train_with(branch, branch.losses, tasks, settings, budget, self.limits.train)

    def losses(
        self,
        adapters: Sequence[Adapter],
        scales: Sequence[float],
        rows: Sequence[Sequence[Row]],
        budget: int,
    ) -> list[float]:
        """Losses of each client's rows, one client after another."""
        branch = self._branch(adapters)
        return measure_with(branch, branch.losses, rows, budget, self.limits.measure)[0]

    def row_losses(
        self,
        adapters: Sequence[Adapter],
        scales: Sequence[float],
        rows: Sequence[Sequence[Row]],
        budget: int,
    ) -> list[list[float]]:
        """Of each row, one client after another."""
        branch = self._branch(adapters)
        return row_losses_with(branch, branch.losses, rows, budget, self.limits.measure)

    def changes_nothing(self, adapter: Adapter) -> bool:
        """False: virtual tokens are read."""
        return False

    def choose(self, contenders: Sequence[Contender], budget: int) -> list[Choice]:
        """Which adapter each client takes, found out one client after another."""

        def measure(
            adapters: Sequence[Adapter],
            scales: Sequence[float],
            rows: Sequence[Sequence[Row]],
            budget: int,
        ) -> Measured:
            branch = self._branch(adapters)
            return measure_with(branch, branch.losses, rows, budget, self.limits.measure)

        return choose_by(measure, contenders, budget)

    def generate(
        self,
        adapters: Sequence[Adapter],
        scales: Sequence[float],
        prompts: Sequence[tuple[int, Sequence[int]]],
        max_new_tokens: int,
        budget: int,
    ) -> list[str]:
        """A client's prompts of one length at a time, so that none is padded."""

        def kind_of(prompt: Prompt) -> tuple[int, int, int]:
            return prompt.client, len(prompt.prompt), prompt.limit

        asked = sorted(
            fit_prompts(self.base, prompts, max_new_tokens, self.virtual_tokens),
            key=lambda one: (*kind_of(one), one.index),
        )
        found = []
        for (client, _, _), equals in groupby(asked, key=kind_of):
            self.model.load(adapters[client])
            answers, _ = within_memory(
                partial(self._continue, list(equals)), budget, self.limits.generate
            )
            found += answers
        return texts_of(self.base, answered(self.base, found))

    def token_budget(self, step_tokens: float = 0.0, cohort: int = 1) -> int:
        """The usual one for the device."""
        return usual_token_budget(self.base)

    def write(self, folder: Path, adapter: Adapter, *, lasting: bool = True) -> None:
        """The encoder's output for PEFT, and the encoder beside it."""
        write_files(folder, encoder_files(adapter, *self.model.exported(adapter)), lasting=lasting)

    def read(self, folder: Path) -> Adapter:
        """The encoder's parameters, from a PEFT folder."""
        return read_adapter(folder, ENCODER_WEIGHTS)

    def _branch(self, adapters: Sequence[Adapter], trainable: bool = False) -> EncoderBranch:
        return EncoderBranch(
            self.model,
            StackedEncoders(self.model.parameters, adapters, self.base.device, trainable),
        )

    def _continue(self, prompts: Sequence[Prompt], budget: int) -> list[tuple[Prompt, list[int]]]:
        """The new tokens of prompts of one length and limit."""
        ends = torch.tensor(end_tokens(self.base), device=self.base.device)
        size = self.virtual_tokens + len(prompts[0].prompt) + 1
        at_once = max(1, min(_ROWS_AT_ONCE, budget // size))
        found: list[tuple[Prompt, list[int]]] = []
        with torch.no_grad():
            for first in range(0, len(prompts), at_once):
                part = prompts[first : first + at_once]
                ids = torch.tensor(
                    [[*prompt.prompt, *prompt.response] for prompt in part], device=self.base.device
                )
                found += zip(
                    part, self.model.greedy(ids, part[0].limit, ends).tolist(), strict=True
                )
        return found
