"""Settings drawn client by client within one run, and weights that learn which ones help.

FedEx of Khodak et al. 2021, "Federated Hyperparameter Tuning: Challenges, Baselines, and
Connections to Weight-Sharing", arXiv 2106.04502, as FederatedScope has it (here `exponentiated`:
FedEx-LoRA is another thing). There are m settings, the arms. In each round every client draws one
from theta = softmax(z) and trains with it; s_k is by how much its validation loss changes, w_k its
share of the round's validation rows, and b the discounted mean of the changes of earlier rounds:

    g_i = sum of w_k (s_k - b) / theta_i over the clients that drew arm i
    z  <-  z - sqrt(2 ln m) g / d

with d as in `Divisor`. Once theta's entropy is below `SETTLED`, all draw its likeliest arm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedmira.clients import LocalClients
from fedmira.config import Config, LocalSettings
from fedmira.errors import ConfigError, RunFolderError
from fedmira.messages import ClientId, Failure, Reply, Request
from fedmira.metrics import TokenLoss
from fedmira.records import RecordedFolder
from fedmira.seeds import seed_for
from fedmira.studies.tuning.space import Space

__all__ = [
    "DISCOUNT",
    "NOTE",
    "SETTLED",
    "Armed",
    "Divisor",
    "Feedback",
    "Weights",
    "about_drawing",
    "check_drawn",
    "drawable",
]

Divisor = Literal["aggressive", "adaptive", "auto", "constant"]
"""d of a round t: max |g|; the root of the sum of max |g|^2 so far; the root of t; 1."""

DISCOUNT = 0.9
"""What a round's mean change weighs in b, in terms of that of the round after it."""
SETTLED = 0.1
"""Nats of entropy below which nobody explores any more."""

NOTE = (
    "a search: each client drew the settings that it trained with anew in each round, in place of "
    "those of [local]; see drawn-seed<seed>.json of the search"
)
_SURE = 0.5
_OF_LOCAL = "local."
_NOT_DRAWN = {
    "optimizer": "a client keeps one optimizer",
    "optimizer_state": "a client keeps one optimizer",
    "steps": "more steps change a round's loss more, whatever they lead to",
    "epochs": "more steps change a round's loss more, whatever they lead to",
    "steps_per_row": "more steps change a round's loss more, whatever they lead to",
}


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a client's round says of an arm.

    Attributes:
        arm: its place, from 0.
        weight: w_k, the client's share of the round.
        change: s_k in nats per response token; below 0 is better.
    """

    arm: int
    weight: float
    change: float


@dataclass(frozen=True, slots=True)
class Weights:
    """How likely each arm is, and what that came of.

    Attributes:
        logits: z, one an arm.
        changes: the mean change of each round so far.
        sizes: max |g| of each round so far.
    """

    logits: tuple[float, ...]
    changes: tuple[float, ...] = ()
    sizes: tuple[float, ...] = ()

    @classmethod
    def of(cls, arms: int) -> Weights:
        """All arms equally likely.

        Args:
            arms: how many, m.
        """
        return cls((0.0,) * arms)

    @property
    def probabilities(self) -> tuple[float, ...]:
        """theta; the likeliest arm alone, once it has settled."""
        largest = max(self.logits)
        raised = [math.exp(logit - largest) for logit in self.logits]
        theta = tuple(each / math.fsum(raised) for each in raised)
        entropy = -math.fsum(share * math.log(share) for share in theta if share > 0)
        if len(theta) == 1 or entropy >= SETTLED:
            return theta
        best = theta.index(max(theta))
        return tuple(float(place == best) for place in range(len(theta)))

    @property
    def baseline(self) -> float:
        """b; 0 before the first round."""
        if not self.changes:
            return 0.0
        old = [DISCOUNT**age for age in range(len(self.changes))]
        found = zip(reversed(self.changes), old, strict=True)
        return math.fsum(change * share for change, share in found) / math.fsum(old)

    def after(self, feedback: Sequence[Feedback], divisor: Divisor) -> Weights:
        """The weights behind a round.

        >>> from fedmira.studies.tuning.exponentiated import Feedback, Weights
        >>> found = [Feedback(0, 0.5, -0.4), Feedback(1, 0.5, -0.1)]
        >>> [round(p, 5) for p in Weights.of(2).after(found, "aggressive").probabilities]
        [0.70746, 0.29254]

        Args:
            feedback: of the clients of the round.
            divisor: d.
        """
        theta, baseline = self.probabilities, self.baseline
        slope = [0.0] * len(theta)
        for each in feedback:
            slope[each.arm] += each.weight * (each.change - baseline) / theta[each.arm]
        sizes = (*self.sizes, max(map(abs, slope)))
        divided = {
            "aggressive": sizes[-1],
            "adaptive": math.sqrt(math.fsum(size * size for size in sizes)),
            "auto": math.sqrt(len(sizes)),
            "constant": 1.0,
        }[divisor]
        rate = math.sqrt(2 * math.log(len(theta))) / divided if divided else 0.0
        mean = math.fsum(each.weight * each.change for each in feedback)
        return Weights(
            tuple(logit - rate * each for logit, each in zip(self.logits, slope, strict=True)),
            (*self.changes, mean),
            sizes,
        )


def check_drawn(space: Space, config: Config) -> None:
    """Refuses what cannot be drawn client by client.

    Args:
        space: what is searched.
        config: of the search.

    Raises:
        ConfigError: all problems together.
    """
    problems = []
    for each in space.settings:
        reason = _NOT_DRAWN.get(each.key.removeprefix(_OF_LOCAL))
        if not each.key.startswith(_OF_LOCAL):
            reason = "clients of one round, with one adapter shape and one server, have it alike"
        if reason:
            problems.append(
                f"tune: {each.key} cannot be searched by method 'exponentiated', which draws "
                f"settings client by client: {reason}; leave it out, or search by halving, random "
                "or tpe"
            )
    if space.points == 1:
        problems.append("tune: the space holds one setting, and nothing to draw from; add values")
    if config.engine.wire != "float32":
        problems.append(
            f"engine.wire is {config.engine.wire!r}, and a search by 'exponentiated' measures what "
            'clients trained before it is sent; set engine.wire = "float32", or search by halving'
        )
    if problems:
        raise ConfigError(problems)


def drawable(space: Space) -> Space:
    """The part of a space that clients of one round can draw from.

    Args:
        space: of any settings.
    """
    found = tuple(
        each
        for each in space.settings
        if each.key.startswith(_OF_LOCAL) and each.key.removeprefix(_OF_LOCAL) not in _NOT_DRAWN
    )
    told = "; ".join(f"{each.key} = {list(each.values)}" for each in found)
    return Space(found, (f"no space was given, so what clients can draw was searched: {told}",))


def about_drawing(probability: float, drawn: int, arms: int) -> list[str]:
    """What is to be said of the settings that were chosen, a sentence each.

    Args:
        probability: theirs in the end.
        drawn: how often they were drawn.
        arms: how many there were.
    """
    told = f"of {arms} settings the chosen ones have probability {probability:.2f} in the end"
    notes = [f"{told}, and were drawn {drawn} times; the others were not run by themselves"]
    if probability < _SURE:
        notes.append(
            f"no setting has a probability of {_SURE} or more: the search has not decided, and the "
            "likeliest was taken; give it more rounds, more clients, or fewer settings"
        )
    return notes


@dataclass(eq=False, kw_only=True)
class Armed(LocalClients):
    """Clients of a run of which each trains with an arm that it draws anew in each round.

    What was drawn and what it led to is written after each round, and read again where the run goes
    on from a checkpoint.

    Attributes:
        arms: [local] of each arm.
        seed: of the run.
        divisor: d.
        folder: of the search.
        name: of the file in it.
    """

    arms: Sequence[LocalSettings]
    seed: int
    divisor: Divisor
    folder: RecordedFolder
    name: str
    _rounds: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Reads the rounds that are there.

        Raises:
            RunFolderError: the file is damaged.
        """
        path = Path(self.folder.path) / self.name
        if path.is_file():
            try:
                self._rounds = json.loads(self.folder.read(self.name).decode())["rounds"]
            except (ValueError, KeyError, TypeError) as error:
                raise RunFolderError(
                    f"{path}: is no record of a search ({error}); choose another --output"
                ) from error

    @classmethod
    def of(cls, clients: LocalClients, **more: Any) -> Armed:
        """The same clients, which now draw.

        Args:
            clients: who train and measure; all have validation rows.
            more: the attributes that they do not have.
        """
        return cls(**{each.name: getattr(clients, each.name) for each in fields(clients)}, **more)

    def weights_before(self, number: int) -> Weights:
        """The weights that clients of a round draw from.

        Args:
            number: of the round, from 1.
        """
        weights = Weights.of(len(self.arms))
        for round_ in self._rounds:
            if round_["round"] < number:
                weights = weights.after([Feedback(**each) for each in round_["told"]], self.divisor)
        return weights

    def drawn(self, client: ClientId, number: int, weights: Weights) -> int:
        """The arm of a client in a round.

        Args:
            client: who draws.
            number: of the round.
            weights: it is drawn from.
        """
        generator = np.random.default_rng(seed_for(self.seed, "arm", number, client))
        edges = np.cumsum(weights.probabilities)
        place = np.searchsorted(edges, generator.random() * edges[-1], side="right")
        return min(int(place), len(self.arms) - 1)

    def train(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """Trains each client with the arm that it draws, and learns from what comes of it."""
        number = requests[0].round
        weights = self.weights_before(number)
        arms = {each.client_id: self.drawn(each.client_id, number, weights) for each in requests}
        sent = {each.client_id: each.payload.tensors["adapter"] for each in requests}
        before = self.losses(sent, "validation")
        answers: list[Reply | Failure] = []
        own = self.settings
        try:
            for arm in sorted(set(arms.values())):
                self.settings = replace(own, local=self.arms[arm])
                asked = [each for each in requests if arms[each.client_id] == arm]
                answers += super().train(asked)
        finally:
            self.settings = own
        trained = {
            answer.client_id: answer.payload.tensors["adapter"]
            for answer in answers
            if isinstance(answer, Reply)
        }
        after = self.losses(trained, "validation")
        self._learn(number, arms, before, after)
        return answers

    def _learn(
        self,
        number: int,
        arms: Mapping[ClientId, int],
        before: Mapping[ClientId, TokenLoss],
        after: Mapping[ClientId, TokenLoss],
    ) -> None:
        """Note what a round said of its arms.

        A client that failed, or diverged, counts as the worst of its round and no better than one
        that changed nothing.
        """
        changes = {name: after[name].per_token - before[name].per_token for name in after}
        finite = [change for change in changes.values() if math.isfinite(change)]
        worst = max([0.0, *finite])
        rows = {name: len(self.data[name].validation) for name in arms}
        told = [
            {
                "arm": arm,
                "weight": rows[name] / sum(rows.values()),
                "change": changes[name] if math.isfinite(changes.get(name, math.nan)) else worst,
            }
            for name, arm in sorted(arms.items())
        ]
        self._rounds = [each for each in self._rounds if each["round"] < number]
        self._rounds.append({"round": number, "drawn": dict(sorted(arms.items())), "told": told})
        self.folder.write(self.name, json.dumps({"rounds": self._rounds}, indent=1) + "\n")

    def counts(self) -> list[int]:
        """How often each arm was drawn so far."""
        found = [0] * len(self.arms)
        for round_ in self._rounds:
            for arm in round_["drawn"].values():
                found[arm] += 1
        return found
