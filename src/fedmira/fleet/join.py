"""A newcomer to a run that is over: it finds a start among the run's adapters, and trains alone.

Which way to start is chosen by what it leads to. For each fold of the newcomer's rows, the other
folds score the run's adapters, each way makes its start of these scores, trains from it on the
other folds, and is measured on the fold; so no row measures what it chose or trained. The way with
the lowest loss then makes the start from all rows, and all rows train. Few rows are soon learned by
heart: where the folds show that the best start, as it is, has a lower loss than the best way behind
training by more than a standard error of their difference between rows, it is kept as it is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from fedmira.adapters import Adapter, LazyAdapters
from fedmira.clients import CohortSettings, LocalClients
from fedmira.config import LocalSettings
from fedmira.data import ClientData, EncodedExample, Newcomer
from fedmira.errors import DataError, RunError
from fedmira.fleet.starts import FRESH, RULES, SHARED, Pool, Score, scored
from fedmira.messages import Payload, Reply, Request
from fedmira.methods import Local
from fedmira.metrics import Judgement, TokenLoss, judge, mean_and_error
from fedmira.metrics.gate import FEWEST_ROWS, FOLDS
from fedmira.model import AdapterKind, most_side_by_side
from fedmira.seeds import seed_for

__all__ = [
    "MOST_SCORED",
    "JoinSettings",
    "Joined",
    "Joining",
    "Trained",
    "Trial",
    "best_way",
    "check_enough",
]

MOST_SCORED = 64
"""So many rows of a newcomer score and choose at most; all of them train."""

_BARE = "*fresh"
"""Among names of clients: a fresh adapter, which is the base alone."""


@dataclass(frozen=True)
class JoinSettings:
    """How a newcomer trains.

    Attributes:
        local: [local] of the run.
        steps: local steps in all; 0 trains nothing.
        seed: of the run.
        token_budget: most token positions in one pass.
    """

    local: LocalSettings
    steps: int
    seed: int
    token_budget: int

    @property
    def cohort(self) -> LocalSettings:
        """The same for one round of all steps."""
        changes = {"steps": self.steps, "epochs": 0, "steps_per_row": 0.0}
        return self.local.model_copy(update={**changes, "optimizer_state": "fresh"})


@dataclass(frozen=True)
class Trained:
    """What local training made of some starts.

    Attributes:
        adapters: by the names of the starts.
        losses: of each, the mean loss of the first local step and of the last.
        failed: why others have no adapter.
    """

    adapters: dict[str, Adapter]
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """What one way to start led to on rows that neither chose nor trained.

    Attributes:
        rule: one of `RULES`.
        start: nats per response token of the start itself.
        trained: the same behind the local steps.
        start_losses, losses: the summed loss of each group of rows before and behind them.
    """

    rule: str
    start: float
    trained: float
    start_losses: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Joined:
    """A newcomer's adapter and how it came to it.

    Attributes:
        adapter: trained.
        rule: how it started, one of `RULES`.
        steps: that were taken; 0 where the rows show that training harms.
        weights: of what its start was made, by client and `SHARED`; empty for a fresh start.
        scores: of all adapters on the rows, the best first.
        fresh_loss: nats per response token of the base on the same rows.
        trials: of all ways that were tried; empty where the start was given.
        judgement: how sure it is that another start than a fresh one is better; None where nothing
            was tried.
        held_out: "base", "start" and "trained" on rows that were set aside; empty without such.
        training: the mean loss of the first local step and of the last, where there were any.
    """

    adapter: Adapter
    rule: str
    steps: int
    weights: Mapping[str, float]
    scores: Sequence[Score]
    fresh_loss: float
    trials: Sequence[Trial]
    judgement: Judgement | None
    held_out: Mapping[str, TokenLoss]
    training: tuple[float, float] | None


@dataclass(frozen=True)
class Joining:
    """One newcomer and the adapters of a run.

    Attributes:
        newcomer: its rows.
        pool: the adapters.
        kind: LoRA on the run's base.
        settings: how it trains.

    Raises:
        DataError: there are too few rows to choose by.
    """

    newcomer: Newcomer
    pool: Pool
    kind: AdapterKind
    settings: JoinSettings

    def __post_init__(self) -> None:
        """Counts the rows.

        Raises:
            DataError: there are too few.
        """
        check_enough(self.newcomer)

    @cached_property
    def groups(self) -> list[list[int]]:
        """Places of the training rows that choose, those of a group together, in a drawn order."""
        found: dict[int, list[int]] = {}
        for place, group in enumerate(self.newcomer.groups):
            found.setdefault(group, []).append(place)
        ordered = list(found.values())
        name = self.newcomer.data.client_id
        random.Random(seed_for(self.settings.seed, "join", "folds", name)).shuffle(ordered)
        return ordered[:MOST_SCORED]

    @cached_property
    def tokens(self) -> list[int]:
        """Response tokens of each group."""
        train = self.newcomer.data.train
        return [sum(len(train[place].response) for place in group) for group in self.groups]

    @cached_property
    def losses(self) -> dict[str, list[float]]:
        """The summed loss of each group under each adapter of the run, `SHARED` and the base."""
        pool, train = self.pool, self.newcomer.data.train
        own = {SHARED: pool.generalist, _BARE: pool.fresh}
        names = [*pool.adapters, *own]
        adapters = LazyAdapters(
            names, lambda name: own[name] if name in own else pool.adapters[name]
        )
        data = {name: self._client(name, (), train) for name in names}
        found = self._clients(data, pool.scales).row_losses(adapters)
        return {name: self._by_group(found[name]) for name in names}

    def scores(self, groups: Sequence[int] | None = None) -> list[Score]:
        """The run's adapters and `SHARED`, the best first.

        Args:
            groups: which count; None for all.
        """
        losses = {name: of for name, of in self.losses.items() if name != _BARE}
        return scored(losses, self.tokens, range(len(self.tokens)) if groups is None else groups)

    def trials(self, rules: Sequence[str] = tuple(RULES)) -> list[Trial]:
        """What each way leads to on rows that neither choose nor train.

        Args:
            rules: which ways.
        """
        folds, everything = min(FOLDS, len(self.groups)), range(len(self.groups))
        train = self.newcomer.data.train
        starts: dict[str, Adapter] = {}
        data: dict[str, ClientData] = {}
        for fold in range(folds):
            held = {place for g in everything if g % folds == fold for place in self.groups[g]}
            scores = self.scores([group for group in everything if group % folds != fold])
            rest = tuple(row for place, row in enumerate(train) if place not in held)
            own = tuple(train[place] for place in sorted(held))
            for rule in rules:
                key = f"{rule} {fold}"
                starts[key] = self.pool.start(self.pool.weights(rule, scores))
                data[key] = self._client(key, rest, own)
        clients = self._clients(data)
        before = clients.row_losses(starts)
        after = clients.row_losses(self._trained(clients, starts).adapters)
        return [self._trial(rule, folds, before, after) for rule in rules]

    def trained(self, starts: Mapping[str, Adapter]) -> Trained:
        """What local training on all rows makes of some starts.

        Args:
            starts: by any name.

        Raises:
            RunError: one diverges.
        """
        train = self.newcomer.data.train
        clients = self._clients({name: self._client(name, train, ()) for name in starts})
        found = self._trained(clients, starts)
        if found.failed:
            raise RunError(
                f"{self.newcomer.data.client_id}: training failed ({'; '.join(found.failed)}); "
                "lower local.learning_rate, or take fewer steps"
            )
        return found

    def tested(self, adapters: Mapping[str, Adapter]) -> dict[str, TokenLoss]:
        """The loss of adapters on the rows that were set aside; empty without such.

        Args:
            adapters: in the newcomer's form, by any name.
        """
        test = self.newcomer.data.test
        data = {name: self._client(name, (), test) for name in adapters}
        return self._clients(data).losses(adapters, "validation")

    def join(self, start: str | None = None) -> Joined:
        """Choose a start, and train from it.

        Args:
            start: one of `RULES`; None lets the rows choose.

        Raises:
            RunError: training from the chosen start diverges.
        """
        trials = self.trials() if start is None else []
        rule, train = (start, True) if start else best_way(trials, self.tokens)
        scores = self.scores()
        weights = self.pool.weights(rule, scores)
        began = self.pool.start(weights)
        found = self.trained({rule: began}) if train else Trained({rule: began})
        adapters = {"base": self.pool.fresh, "start": began, "trained": found.adapters[rule]}
        losses = {trial.rule: trial.losses for trial in trials}
        return Joined(
            adapter=found.adapters[rule],
            rule=rule,
            steps=self.settings.steps if train else 0,
            weights=weights,
            scores=scores,
            fresh_loss=math.fsum(self.losses[_BARE]) / sum(self.tokens),
            trials=trials,
            judgement=judge(losses, self.tokens, FRESH) if trials else None,
            held_out=self.tested(adapters),
            training=found.losses.get(rule),
        )

    def _trial(
        self,
        rule: str,
        folds: int,
        before: Mapping[str, Sequence[float]],
        after: Mapping[str, Sequence[float]],
    ) -> Trial:
        """One way, with the rows of all folds in the order of the groups."""
        rows: dict[str, dict[int, float]] = {"before": {}, "after": {}}
        for fold in range(folds):
            places = sorted(place for group in self.groups[fold::folds] for place in group)
            for when, found in (("before", before), ("after", after)):
                lost = [math.inf] * len(places)  # where training failed
                rows[when] |= zip(places, found.get(f"{rule} {fold}", lost), strict=True)
        begun, ended = (self._by_group(rows[when]) for when in ("before", "after"))
        total = sum(self.tokens)
        return Trial(
            rule, math.fsum(begun) / total, math.fsum(ended) / total, tuple(begun), tuple(ended)
        )

    def _by_group(self, losses: Mapping[int, float] | Sequence[float]) -> list[float]:
        """Sums over the rows of each group; inf where one is not finite."""
        sums = [math.fsum(losses[place] for place in group) for group in self.groups]
        return [value if math.isfinite(value) else math.inf for value in sums]

    def _client(
        self, name: str, train: Sequence[EncodedExample], measured: Sequence[EncodedExample]
    ) -> ClientData:
        """The newcomer under another name, to be trained and measured on some of its rows."""
        return replace(
            self.newcomer.data,
            client_id=name,
            train=tuple(train),
            validation=tuple(measured),
            test=(),
            references=(),
        )

    def _clients(
        self, data: Mapping[str, ClientData], scales: Mapping[str, float] | None = None
    ) -> LocalClients:
        """These, side by side; without a scale of their own they have the newcomer's."""
        own = {name: (scales or {}).get(name, self.pool.scale) for name in data}
        settings = CohortSettings(self.settings.cohort, own, self.settings.token_budget)
        size = sum(tensor.numel() for tensor in self.pool.fresh.values())
        at_once = most_side_by_side(size, self.kind.base.device)
        return LocalClients(Local(), self.kind, data, settings, at_once)

    def _trained(self, clients: LocalClients, starts: Mapping[str, Adapter]) -> Trained:
        """All by the same draws of batches, so that starts differ in nothing else."""
        if not self.settings.steps:
            return Trained(dict(starts))
        seed = seed_for(self.settings.seed, "join", "train", self.newcomer.data.client_id)
        requests = [
            Request(name, 1, seed, Payload({"adapter": start})) for name, start in starts.items()
        ]
        found = Trained({})
        for answer in clients.train(requests):
            if not isinstance(answer, Reply):
                found.failed.append(answer.reason)
                continue
            found.adapters[answer.client_id] = answer.payload.tensors["adapter"]
            figures = answer.metrics
            found.losses[answer.client_id] = (figures["first_loss"], figures["last_loss"])
        return found


def check_enough(newcomer: Newcomer) -> None:
    """Refuses a newcomer with too few rows to choose by.

    Args:
        newcomer: its rows.

    Raises:
        DataError: there are fewer than `FEWEST_ROWS` that ask different things.
    """
    count = len(set(newcomer.groups))
    if count < FEWEST_ROWS:
        name, rows = newcomer.data.client_id, len(newcomer.groups)
        told = f", of which {count} ask different things" if count < rows else ""
        raise DataError(
            f"{name}: {rows} rows to train on{told}; a start is chosen by at least {FEWEST_ROWS}: "
            "add rows"
        )


def best_way(trials: Sequence[Trial], tokens: Sequence[int]) -> tuple[str, bool]:
    """The way with the lowest loss behind training, and that it trains; of equals the first.

    The best start as it is, and that it does not train, where it is better by more than a standard
    error, or where training diverges from every start.

    Args:
        trials: of all ways.
        tokens: response tokens of each group of rows.

    Raises:
        RunError: no loss is finite.
    """
    ended = min(trials, key=lambda trial: trial.trained)
    begun = min(trials, key=lambda trial: trial.start)
    if not math.isfinite(min(ended.trained, begun.start)):
        raise RunError("no start has a finite loss on the newcomer's rows, nor has what is trained")
    if not math.isfinite(ended.trained):
        return begun.rule, False
    gained = [one - other for one, other in zip(begun.start_losses, ended.losses, strict=True)]
    mean, error = mean_and_error(gained, tokens)
    return (begun.rule, False) if mean + error < 0 else (ended.rule, True)
