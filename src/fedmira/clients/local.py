"""Clients whose rows are in this process, on one resident base model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TypeVar

from fedmira.adapters import Adapter, LazyAdapters, known_hash
from fedmira.clients.base import Candidates, Measuring, SplitName, Work
from fedmira.clients.base_losses import BaseLosses
from fedmira.clients.cohort import Cohort, CohortSettings
from fedmira.clients.crews import Crew, InTurn, Share, threads_of
from fedmira.clients.owners import Owner, dealt, drawn_rows, owners_of
from fedmira.clients.references import References
from fedmira.data import ClientData, ClientSummary, EncodedExample, summary_of
from fedmira.messages import ClientId, Failure, Payload, Reply, Request
from fedmira.methods import Method
from fedmira.metrics import TokenLoss, text_scores
from fedmira.model import AdapterKind, Choice, Contender, Row
from fedmira.seeds import row_seed
from fedmira.storage import remembered

__all__ = ["LocalClients"]

Result = TypeVar("Result")

_BUDGETS_OF_A_SHARE = 16
"""Full passes with which a share of rows to be measured is complete, however few the owners are."""

_Trained = tuple[list[Reply | Failure], dict[ClientId, Payload]]


@dataclass(eq=False)
class LocalClients:
    """Trains and measures a few clients side by side, in shares that a crew does.

    Memories stay where `restore` put them: a `MemoryTable` keeps those of clients that do not train
    on disk.

    Attributes:
        method: whose client half they run; None where nobody will train.
        kind: the adapters, on their base.
        data: the rows of each client.
        settings: how they train, the scale of each client's adapter, and the most tokens in one
            pass.
        at_once: clients of a share, whose passes are made together.
        references: where losses and answers are to lean on the clients' training rows.
        crew: who does the shares.
        base_losses: where losses of the base are kept from run to run.
        heard: is called when a measurement begins, and as its shares are done.
    """

    method: Method | None
    kind: AdapterKind
    data: Mapping[ClientId, ClientData]
    settings: CohortSettings
    at_once: int = 64
    references: References | None = None
    crew: Crew = field(default_factory=InTurn)
    base_losses: BaseLosses | None = None
    heard: Callable[[Measuring], None] = lambda measuring: None
    _memories: Mapping[ClientId, Payload] = field(default_factory=dict)

    @cached_property
    def parties(self) -> Mapping[ClientId, ClientSummary]:
        """What each client says of itself."""
        return {name: summary_of(client) for name, client in self.data.items()}

    @property
    def memories(self) -> Mapping[ClientId, Payload]:
        """The clients' private memories as they are now."""
        return self._memories

    def restore(self, memories: Mapping[ClientId, Payload]) -> None:
        """Takes these memories, and keeps later ones in a mapping of the same kind."""
        self._memories = memories

    def unmeasured(self) -> list[Failure]:
        """Nobody: all rows are here."""
        return []

    def few(self, most: int, seed: int) -> LocalClients:
        """The same clients with at most so many test and validation rows each.

        Which ones depends on the seed and the client alone.

        Args:
            most: rows of a split, 1 or more.
            seed: of the run.
        """
        data = {
            name: replace(
                client,
                test=drawn_rows(client.test, most, row_seed(seed, "evaluate", "test", name)),
                validation=drawn_rows(
                    client.validation, most, row_seed(seed, "evaluate", "validation", name)
                ),
                references=(),
            )
            for name, client in self.data.items()
        }
        return replace(self, data=data)

    def train(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """Trains the requested clients and stores what they keep for themselves."""
        method = self.method
        assert method is not None, "these clients have no method to train by"
        parts = [
            requests[start : start + self.at_once]
            for start in range(0, len(requests), self.at_once)
        ]

        def begun(part: Sequence[Request]) -> Callable[[AdapterKind], _Trained]:
            names = [request.client_id for request in part]
            before = {name: self._memories[name] for name in names if name in self._memories}
            return partial(
                _trained,
                method,
                {name: self.data[name] for name in names},
                self.settings.of(names),
                part,
                before,
            )

        shares = [
            Share(
                [request.client_id for request in part],
                sum(self._length(request.client_id, "train") for request in part),
                partial(begun, part),
            )
            for part in parts
        ]
        answers: list[Reply | Failure] = []
        for of_share, after in self.crew.do(self.kind, shares):
            answers += of_share
            self._memories = remembered(self._memories, after)
        return answers

    def losses(
        self, adapters: Mapping[ClientId, Adapter], split: SplitName = "test"
    ) -> dict[ClientId, TokenLoss]:
        """The response loss of each given client's own adapter on its own rows."""
        return {
            name: TokenLoss(
                math.fsum(found), sum(len(row.response) for row in getattr(self.data[name], split))
            )
            for name, found in self.row_losses(adapters, split).items()
        }

    def row_losses(
        self, adapters: Mapping[ClientId, Adapter], split: SplitName = "validation"
    ) -> dict[ClientId, list[float]]:
        """The summed response loss of each row of each given client, in nats, in their order.

        Rows do not leave the machine that they are on, and neither do figures of single rows: other
        clients than these do not offer it.

        Args:
            adapters: by client id; each is read once.
            split: which rows; clients without such rows are left out.
        """
        asked = [name for name in adapters if getattr(self.data[name], split)]
        if self.references is not None:
            return {
                name: self.references.losses(
                    self.data[name],
                    adapters[name],
                    self.settings.scales[name],
                    getattr(self.data[name], split),
                )
                for name in asked
            }

        if self.base_losses is None or not self._says_base(adapters, asked):
            return self._row_losses(adapters, asked, split, self.settings.scales)
        first = asked[0]
        alone = LazyAdapters(asked, lambda _: adapters[first], lambda _: "the base")
        with threads_of(self.crew.threads):
            return self.base_losses.rows(
                self.kind.base,
                {name: self._rows(split, name) for name in asked},
                split,
                (self.settings.token_budget, self.at_once),
                partial(self._row_losses, alone, asked, split, dict.fromkeys(asked, 1.0)),
            )

    def _says_base(self, adapters: Mapping[ClientId, Adapter], asked: Sequence[ClientId]) -> bool:
        """Whether all these adapters leave the base as it is; stops at the first that does not."""
        one_of = {known_hash(adapters, name): name for name in reversed(asked)}
        return bool(one_of) and all(
            self.kind.changes_nothing(adapters[name]) for name in one_of.values()
        )

    def _row_losses(
        self,
        adapters: Mapping[ClientId, Adapter],
        asked: Sequence[ClientId],
        split: SplitName,
        scales: Mapping[ClientId, float],
    ) -> dict[ClientId, list[float]]:
        """The losses of rows, measured."""

        def begun(owners: Sequence[Owner]) -> Callable[[AdapterKind], list[list[float]]]:
            rows = [
                [getattr(self.data[name], split)[i] for name, i in own.places] for own in owners
            ]
            names = [own.client for own in owners]
            return partial(
                _row_losses,
                [adapters[name] for name in names],
                [scales[name] for name in names],
                self.settings.token_budget,
                rows,
            )

        return self._by_owner(adapters, asked, split, scales, "evaluating", begun)

    def choose(self, clients: Sequence[ClientId], candidates: Candidates) -> dict[ClientId, float]:
        """The candidate with the lowest loss on each client's validation rows."""
        several: dict[ClientId, list[float]] = {}

        def begun(names: Sequence[ClientId]) -> Callable[[AdapterKind], list[Choice]]:
            contenders = []
            for name in names:
                found = candidates(name)
                several[name] = list(found)
                contenders.append(
                    Contender(
                        list(found.values()),
                        self.settings.scales[name],
                        self.data[name].validation,
                    )
                )
            return partial(_choices, contenders, self.settings.token_budget)

        chosen = self._in_shares(clients, "validation", begun)
        return {
            name: several[name][choice.index]
            for name, choice in chosen.items()
            if len(several[name]) > 1
        }

    def generations(
        self, adapters: Mapping[ClientId, Adapter], max_new_tokens: int
    ) -> dict[ClientId, list[str]]:
        """Greedy answers to each given client's test prompts, in the order of its test rows.

        Args:
            adapters: by client id; each is read once.
            max_new_tokens: longest answer in tokens.
        """
        if self.references is not None:
            return {
                name: self.references.answers(
                    self.data[name],
                    adapter,
                    self.settings.scales[name],
                    [row.prompt for row in self.data[name].test],
                    max_new_tokens=max_new_tokens,
                    budget=self.settings.token_budget,
                )
                for name, adapter in adapters.items()
            }

        def begun(owners: Sequence[Owner]) -> Callable[[AdapterKind], list[list[str]]]:
            prompts = [[self.data[name].test[i].prompt for name, i in own.places] for own in owners]
            names = [own.client for own in owners]
            return partial(
                _answers,
                [adapters[name] for name in names],
                [self.settings.scales[name] for name in names],
                self.settings.token_budget,
                prompts,
                max_new_tokens,
            )

        scales = self.settings.scales
        return self._by_owner(adapters, list(adapters), "test", scales, "answering", begun)

    def score(
        self, adapters: Mapping[ClientId, Adapter], max_new_tokens: int
    ) -> dict[ClientId, dict[str, float]]:
        """The text metrics of each given client's answers against its references."""
        texts = self.generations(adapters, max_new_tokens)
        return {
            client: text_scores(predictions, self.data[client].references)
            for client, predictions in texts.items()
        }

    def _by_owner(
        self,
        adapters: Mapping[ClientId, Adapter],
        clients: Sequence[ClientId],
        split: SplitName,
        scales: Mapping[ClientId, float],
        work: Work,
        begun: Callable[[Sequence[Owner]], Callable[[AdapterKind], Sequence[Sequence[Result]]]],
    ) -> dict[ClientId, list[Result]]:
        """What the work on each row gives, by client, where equal adapters are one owner."""
        # Clients that take turns share nothing, so that no bit of one depends on another's rows.
        known = adapters if self.at_once > 1 else LazyAdapters(clients, adapters.__getitem__)
        most = _BUDGETS_OF_A_SHARE * self.settings.token_budget
        rows_of = partial(self._rows, split)
        turns = dealt(owners_of(known, clients, rows_of, scales, most), self.at_once, most)
        shares = [
            Share(
                list(dict.fromkeys(name for own in turn for name, _ in own.places)),
                sum(own.tokens for own in turn),
                partial(begun, turn),
            )
            for turn in turns
        ]
        by_place: dict[tuple[ClientId, int], Result] = {}
        done = self._counted(split, turns, work)
        for turn, found in zip(turns, self.crew.do(self.kind, shares, done), strict=True):
            for own, results in zip(turn, found, strict=True):
                by_place |= zip(own.places, results, strict=True)
        return {name: [by_place[name, i] for i in range(len(rows_of(name)))] for name in clients}

    def _counted(
        self, split: SplitName, turns: Sequence[Sequence[Owner]], work: Work
    ) -> Callable[[int], None]:
        """Tells how far a measurement is; is called with the place of each share that is done."""
        rows = [sum(len(own.places) for own in turn) for turn in turns]
        tokens = [sum(own.tokens for own in turn) for turn in turns]
        finished: list[int] = []
        begun = time.monotonic()

        def told(place: int) -> None:
            finished.append(place)
            done = sum(tokens[place] for place in finished)
            spent = time.monotonic() - begun
            left = spent * (sum(tokens) - done) / max(1, done)
            some = sum(rows[place] for place in finished)
            self.heard(Measuring(work, split, some, sum(rows), left))

        self.heard(Measuring(work, split, 0, sum(rows), None))
        return told

    def _rows(self, split: SplitName, client: ClientId) -> Sequence[EncodedExample]:
        rows: tuple[EncodedExample, ...] = getattr(self.data[client], split)
        return rows

    def _in_shares(
        self,
        clients: Sequence[ClientId],
        split: SplitName,
        begun: Callable[[Sequence[ClientId]], Callable[[AdapterKind], Sequence[Result]]],
    ) -> dict[ClientId, Result]:
        """What the work on a few clients at a time gives for each, in their order."""
        turns = [
            clients[start : start + self.at_once] for start in range(0, len(clients), self.at_once)
        ]
        shares = [
            Share(names, sum(self._length(name, split) for name in names), partial(begun, names))
            for names in turns
        ]
        result: dict[ClientId, Result] = {}
        for names, found in zip(turns, self.crew.do(self.kind, shares), strict=True):
            result |= dict(zip(names, found, strict=True))
        return result

    def _length(self, client: ClientId, split: SplitName) -> int:
        """Tokens of a client's rows."""
        return sum(len(row.prompt) + len(row.response) for row in getattr(self.data[client], split))


def _trained(
    method: Method,
    data: Mapping[ClientId, ClientData],
    settings: CohortSettings,
    requests: Sequence[Request],
    before: Mapping[ClientId, Payload],
    kind: AdapterKind,
) -> _Trained:
    """A share of a round: the answers, and the memories that changed."""
    worked = Cohort(method, kind, data, settings).work(requests, before)
    after = {
        request.client_id: memory
        for request, (_, memory) in zip(requests, worked, strict=True)
        if memory is not None and memory is not before.get(request.client_id)
    }
    return [answer for answer, _ in worked], after


def _row_losses(
    adapters: Sequence[Adapter],
    scales: Sequence[float],
    budget: int,
    rows: Sequence[Sequence[Row]],
    kind: AdapterKind,
) -> list[list[float]]:
    return kind.row_losses(adapters, scales, rows, budget)


def _choices(contenders: Sequence[Contender], budget: int, kind: AdapterKind) -> list[Choice]:
    return kind.choose(contenders, budget)


def _answers(  # noqa: PLR0913 - what an adapter kind generates from
    adapters: Sequence[Adapter],
    scales: Sequence[float],
    budget: int,
    prompts: Sequence[Sequence[Sequence[int]]],
    max_new_tokens: int,
    kind: AdapterKind,
) -> list[list[str]]:
    """Of each client the answers to its prompts."""
    of_clients = [(i, prompt) for i, own in enumerate(prompts) for prompt in own]
    texts = iter(kind.generate(adapters, scales, of_clients, max_new_tokens, budget))
    return [[next(texts) for _ in own] for own in prompts]
