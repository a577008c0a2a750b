"""A conversation with a client's adapter, beside its base and the adapters of other runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedmira.adapters import Adapter
from fedmira.data import ObjectRows, asked, make_encoder
from fedmira.errors import ConfigError
from fedmira.messages import ClientId
from fedmira.model import LoraKind, check_prompt_ids
from fedmira.studies.referring import Referring, referring_of
from fedmira.studies.saved import (
    SavedAdapters,
    quick_budget,
    refuse_unknown,
    shared_prompt,
)

__all__ = ["BASE", "Conversation"]

BASE = "base"
"""The name of the voice without an adapter."""


@dataclass(slots=True)
class _Voice:
    """Who answers: an adapter on its base, and what it has said so far."""

    name: str
    saved: SavedAdapters
    adapter: Adapter
    scale: float
    said: tuple[tuple[str, str], ...] = field(default=())


class Conversation:
    """Asks base and adapters the same, each in the prompt form of its run's training.

    A client whose training rows are conversations is told what was said before, each voice its own
    answers. Others were trained on single requests, so every question is asked alone.

    Args:
        saved: the run whose adapter is talked to.
        client: its id.
        beside: other runs on the same base, whose adapters for the client answer too.
        instruction: in place of the client's own.
        max_new_tokens: longest answer in tokens; None takes evaluation.max_new_tokens.
        rows: of a run whose rows were objects.
        reference_share: of each token's probability that comes from the client's training rows;
            None takes each run's evaluation.reference_share. The base has none.

    Raises:
        ConfigError: there is no such client, its instruction is not known here, or the share cannot
            be used.
        RunFolderError: a share is asked for, and the rows here are not those of the run.
    """

    def __init__(
        self,
        saved: SavedAdapters,
        client: ClientId,
        *,
        beside: Sequence[SavedAdapters] = (),
        instruction: str | None = None,
        max_new_tokens: int | None = None,
        rows: ObjectRows | None = None,
        reference_share: float | None = None,
    ) -> None:
        self._runs = (*beside, saved)
        self._referring = [referring_of(run, reference_share, rows) for run in self._runs]
        self._instruction, self._rows = instruction, rows
        self._limit = max_new_tokens or saved.config.evaluation.max_new_tokens
        self._names = _names(self._runs)
        self.switch(client)

    @property
    def voices(self) -> tuple[str, ...]:
        """Who answers, in order; the run's own adapter is the last."""
        return tuple(voice.name for voice in self._voices)

    @property
    def remembers(self) -> bool:
        """Whether what was said before is part of the next question."""
        return bool(self._shared.get("conversation"))

    def switch(self, client: ClientId) -> None:
        """Talks to another client's adapter from here on; what was said is forgotten.

        Args:
            client: its id; where it is not known, nothing changes.

        Raises:
            ConfigError: a run has no such client, or its instruction is not known here.
        """
        for run in self._runs:
            refuse_unknown(run, client)
        own = self._runs[-1]
        shared = shared_prompt(own, client, self._instruction, self._rows)
        voices = [
            _Voice(name, run, run.adapters[client], run.kind.scale(run.ranks[client]))
            for name, run in zip(self._names, self._runs, strict=True)
        ]
        if isinstance(own.kind, LoraKind):  # others have no adapter that does nothing
            voices.insert(0, _Voice(BASE, own, voices[-1].adapter, 0.0))
        self.client, self._shared, self._voices = client, shared, voices

    def reset(self) -> None:
        """Forgets what was said."""
        for voice in self._voices:
            voice.said = ()

    def ask(self, text: str) -> dict[str, str]:
        """What each voice answers.

        Args:
            text: the question.

        Raises:
            ConfigError: the text is empty, or a token of it is unknown to the base.
        """
        if not text.strip():
            raise ConfigError("there is no question; type one")
        found: dict[str, str] = {}
        for run, referring in zip(self._runs, self._referring, strict=True):
            voices = [voice for voice in self._voices if voice.saved is run]
            found |= zip(
                (voice.name for voice in voices),
                self._answers(run, referring, voices, text),
                strict=True,
            )
        if self.remembers:
            for voice in self._voices:
                turns = (("user", text), ("assistant", found[voice.name]))
                voice.said = (*voice.said, *turns)
        return {voice.name: found[voice.name] for voice in self._voices}

    def _answers(
        self,
        run: SavedAdapters,
        referring: Referring | None,
        voices: Sequence[_Voice],
        text: str,
    ) -> list[str]:
        """Answers of one run's voices, side by side."""
        encoder = make_encoder(run.config.data, run.kind.base.tokenizer)
        prompts = [encoder.prompt(asked(self._shared, text, voice.said)) for voice in voices]
        for prompt in prompts:
            check_prompt_ids(run.kind.base, prompt)
        told: dict[int, str] = {}
        if referring is not None:
            told = {
                place: referring.answers(self.client, [prompts[place]], self._limit)[0]
                for place, voice in enumerate(voices)
                if voice.name != BASE
            }
        plain = [place for place in range(len(voices)) if place not in told]
        answers = self._plain(run, [voices[i] for i in plain], [prompts[i] for i in plain])
        told |= zip(plain, answers, strict=True)
        return [told[place] for place in range(len(voices))]

    def _plain(
        self, run: SavedAdapters, voices: Sequence[_Voice], prompts: Sequence[Sequence[int]]
    ) -> list[str]:
        return run.kind.generate(
            [voice.adapter for voice in voices],
            [voice.scale for voice in voices],
            list(enumerate(prompts)),
            self._limit,
            quick_budget(run),
        )


def _names(runs: Sequence[SavedAdapters]) -> list[str]:
    """Each run by its method, or by its folder or path where that says too little."""
    methods = [str(run.config.algorithm.name) for run in runs]
    names: Mapping[str, int] = {name: methods.count(name) for name in methods}
    found = [
        name if names[name] == 1 and name != BASE else run.path.resolve().name
        for name, run in zip(methods, runs, strict=True)
    ]
    for told in (found, [str(run.path) for run in runs]):
        if len({*told, BASE}) == len(told) + 1:
            return told
    return [f"{place}: {name}" for place, name in enumerate(found, start=1)]
