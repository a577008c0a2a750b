"""Which client's adapter should answer: the one to which a text, or a few rows, come least odd."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmira.clients import CohortSettings, LocalClients
from fedmira.data import (
    ClientData,
    EncodedExample,
    Encoder,
    Example,
    asked,
    encode_few,
    make_encoder,
)
from fedmira.errors import ConfigError
from fedmira.messages import ClientId
from fedmira.metrics import TokenLoss
from fedmira.model import check_ids, most_side_by_side
from fedmira.studies.saved import SavedAdapters, quick_budget

__all__ = ["Router", "Score"]

_OTHER = ("Zqx vjk", "9 9 9 9")
"""Texts in place of the asked one, to find where it begins and ends among the tokens."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a client's adapter makes of a text or of rows.

    Attributes:
        client: whose adapter.
        loss: nats a token; the lowest answers.
        tokens: how many tokens that is.
    """

    client: ClientId
    loss: float
    tokens: int


class Router:
    """Measures a text, or rows, under every client's adapter, side by side.

    Args:
        saved: what the run has saved.

    Raises:
        ConfigError: the run has one client only.
    """

    def __init__(self, saved: SavedAdapters) -> None:
        if len(saved.adapters) < 2:
            raise ConfigError(
                f"route: {saved.path} has one client, {next(iter(saved.adapters))!r}; there is "
                "nothing to choose between"
            )
        self._saved = saved
        self._encoder: Encoder = make_encoder(saved.config.data, saved.kind.base.tokenizer)

    def by_text(self, text: str, *, whole: bool = False) -> list[Score]:
        """Clients by the loss of the text's tokens, the lowest first.

        Each client reads the text where its own rows have their input, behind its own instruction.

        Args:
            text: the input of a request.
            whole: the text is a whole request, with its instruction; no client's own is put in
                front of it.

        Raises:
            ConfigError: the text is empty, or longer than the base reads.
        """
        if not text.strip():
            raise ConfigError("route: the text is empty; give the request that is to be answered")
        return self._scored(
            {client: (self._text_row(client, text, whole),) for client in self._saved.adapters}
        )

    def by_rows(self, rows: Sequence[Example]) -> list[Score]:
        """Clients by the loss of the rows' answers, the lowest first.

        A row without an instruction is read behind each client's own.

        Args:
            rows: with their answers.

        Raises:
            DataError: a row cannot be encoded.
        """
        return self._scored(
            {
                client: encode_few(self._encoder, [self._own(client, row) for row in rows])
                for client in self._saved.adapters
            }
        )

    def _own(self, client: ClientId, row: Example) -> Example:
        """A row that has an input alone, as a row of the client."""
        shared = self._saved.prompts.get(client, {})
        if row.messages or row.input or not shared.get("instruction"):
            return row
        return Example(shared["instruction"], row.instruction, row.output, row.where)

    def _text_row(self, client: ClientId, text: str, whole: bool) -> EncodedExample:
        """The text's tokens as a response, and what stands before them as its prompt."""
        shared: Mapping[str, object] = {} if whole else self._saved.prompts.get(client, {})
        ids = self._encoder.prompt(asked(shared, text))
        others = [self._encoder.prompt(asked(shared, other)) for other in _OTHER]
        start = min(_common(ids, other) for other in others)
        behind = min(_common(ids[::-1], other[::-1]) for other in others)
        stop = max(len(ids) - behind, start + 1)
        longest = self._saved.kind.base.max_positions
        if longest is not None and len(ids) > longest:
            raise ConfigError(
                f"route: the text has {len(ids)} tokens with its prompt, and the base reads at "
                f"most {longest}; shorten it"
            )
        start = max(start, 1)
        return EncodedExample(ids[:start], ids[start:stop] or ids[-1:])

    def _scored(self, rows: Mapping[ClientId, tuple[EncodedExample, ...]]) -> list[Score]:
        kind, config = self._saved.kind, self._saved.config
        check_ids(kind.base, rows)
        data = {client: _client_of(client, several) for client, several in rows.items()}
        scales = {client: kind.scale(rank) for client, rank in self._saved.ranks.items()}
        settings = CohortSettings(config.local, scales, quick_budget(self._saved))
        widest = max(self._saved.ranks, key=lambda client: self._saved.ranks[client])
        size = sum(tensor.numel() for tensor in self._saved.adapters[widest].values())
        at_once = most_side_by_side(size, kind.base.device)
        found = LocalClients(None, kind, data, settings, at_once).losses(self._saved.adapters)
        return _ranked(found)


def _ranked(found: Mapping[ClientId, TokenLoss]) -> list[Score]:
    scores = [Score(client, loss.per_token, loss.tokens) for client, loss in found.items()]
    return sorted(scores, key=lambda score: (not math.isfinite(score.loss), score.loss))


def _client_of(client: ClientId, rows: tuple[EncodedExample, ...]) -> ClientData:
    return ClientData(
        client_id=client,
        task="",
        category="",
        train=(),
        validation=(),
        test=rows,
        references=("",) * len(rows),
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
