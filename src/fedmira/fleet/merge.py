"""One adapter for everybody, made of those of a fleet."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Literal

from torch import Tensor

from fedmira.adapters import (
    Adapter,
    Mixed,
    common_directions,
    folded,
    in_directions,
    mean_by_precision,
    metagpt_weights,
    nearest,
    padded,
    spare_directions,
    ties,
    update_gram,
)
from fedmira.adapters.low_rank import UP
from fedmira.atomic import replace_file
from fedmira.errors import ConfigError, RunError
from fedmira.fleet.folders import Fleet
from fedmira.fleet.output import card
from fedmira.fleet.rows import OwnRows
from fedmira.model import write_lora_folder
from fedmira.records import new_folder

__all__ = ["STRENGTHS", "WAYS", "Merged", "merge_fleet"]

STRENGTHS = (1.0, 2.0, 4.0, 8.0)
"""What `auto` tries: the mean of many updates that have little in common is far too short."""
WAYS = ("metagpt", "rows", "uniform", "ties", "precision")


@dataclass(frozen=True)
class Merged:
    """One adapter made of several.

    Attributes:
        fleet: of which it is made.
        adapter: its factors, float32.
        ranks, scales: of each module.
        by: how: one of `WAYS`, or "weights" where they were given.
        weights: of each adapter, in their order; None where entries are weighed, by TIES or by
            precision.
        strength: c, by which the sum is multiplied.
        tail: norm that the cut to the rank left out.
        tried: strength -> mean validation loss, where it was chosen by it.
        asked: how many clients' validation rows chose.
    """

    fleet: Fleet
    adapter: Adapter
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    by: str
    weights: tuple[float, ...] | None
    strength: float
    tail: float
    tried: Mapping[float, float] = field(default_factory=dict)
    asked: int = 0

    @property
    def clients(self) -> tuple[str, ...]:
        """Of whose adapters it is made."""
        return self.fleet.names

    @property
    def rank(self) -> int:
        """Its rank, the same in all modules."""
        return max(self.ranks.values())

    @cached_property
    def norm(self) -> float:
        """Frobenius norm of its update over all modules."""
        return math.sqrt(max(0.0, float(update_gram([self.update]))))

    @property
    def update(self) -> Adapter:
        """s B A, with the scale in B."""
        return folded(self.adapter, self.scales)

    @property
    def figures(self) -> dict[str, object]:
        """What is told of it, for JSON."""
        return {
            "by": self.by,
            "strength": self.strength,
            "strengths_tried": {f"{c:g}": loss for c, loss in self.tried.items()},
            "clients_asked": self.asked,
            "rank": self.rank,
            "norm": self.norm,
            "tail": self.tail,
            "weights": None
            if self.weights is None
            else dict(zip(self.clients, self.weights, strict=True)),
            "base": self.fleet.members[0].base,
            "base_assumed": self.fleet.assumed,
        }

    def save(self, folder: str | Path) -> Path:
        """Write a folder that plain PEFT loads, with a card and merge.json.

        Args:
            folder: new or empty.

        Raises:
            RunFolderError: something is there already.
        """
        place = Path(folder)
        with new_folder(place) as aside:
            self.write(aside)
            text = json.dumps(self.figures, indent=1, allow_nan=False)
            replace_file(aside / "merge.json", text + "\n", lasting=False)
        return place

    def write(self, folder: Path) -> None:
        """Write the adapter and its card into a folder that is there."""
        first = self.fleet.members[0]
        write_lora_folder(folder, first, self.adapter, self.ranks, self.scales)
        replace_file(folder / "README.md", self._card(), lasting=False)

    def _card(self) -> str:
        chosen = (
            f"Strength chosen by the mean loss on the validation rows of {self.asked} of "
            f"{len(self.clients)} participants: "
            + ", ".join(f"{c:g}: {loss:.4f}" for c, loss in self.tried.items())
            + "."
            if self.tried
            else "No loss was measured: whether it is any good on somebody's rows is not known."
        )
        cut = self.tail / math.hypot(self.norm, self.tail) if self.tail else 0.0
        shares = [] if self.weights is None else list(self.weights)
        lines = [
            f"| {name} |{f' {share:.4f} |' if shares else ''}"
            for name, share in zip(self.clients, shares or self.clients, strict=True)
        ]
        head = ["| adapter | weight |", "|---|---|"] if shares else ["| adapter |", "|---|"]
        return card(
            self.fleet.members[0],
            f"{len(self.clients)} adapters merged by {self.by}",
            [
                f"Made by fedmira of {len(self.clients)} LoRA adapters, as a sum of their updates "
                f"times {self.strength:g}, cut to rank {self.rank}. The cut left out "
                f"{100 * cut:.2g} % of the norm. {chosen}",
                "\n".join([*head, *lines]),
                *([f"Of the base: {self.fleet.assumed}."] if self.fleet.assumed else []),
            ],
        )


def merge_fleet(
    fleet: Fleet,
    by: str = "metagpt",
    *,
    strength: float | Literal["auto"] = 1.0,
    rank: int | None = None,
    keep: float = 0.2,
    weights: Sequence[float] | None = None,
    rows: Callable[[], OwnRows] | None = None,
    trained: Callable[[], OwnRows] | None = None,
) -> Merged:
    """Make one adapter of all.

    Args:
        fleet: one or more adapters.
        by: metagpt weighs by squared norms, rows by training rows, uniform all alike; ties trims
            entries and takes the mean of those that agree in sign; precision weighs entries, in
            directions that all have in common, by how surely each adapter's training rows know
            them.
        strength: c, which multiplies the result, or "auto": that of 1, 2, 4 and 8 with the lowest
            mean loss on the participants' validation rows, of equals the least.
        rank: of the result; the largest rank of the fleet by default.
        keep: share of entries that TIES keeps.
        weights: in place of `by`: one each, 0 or more. They are divided by their sum.
        rows: gives the validation rows, which "auto" needs.
        trained: gives the training rows, which precisions need.

    Raises:
        ConfigError: an argument cannot be used.
    """
    _check(by, strength, rank, keep)
    if strength == "auto" and rows is None:
        raise ConfigError(
            "merge: strength 'auto' is chosen by validation rows, and plain folders have none; "
            "give a run with data.validation_fraction above 0, or a number"
        )
    updates = [member.update for member in fleet.members]
    widest = max(fleet.members, key=lambda member: max(member.ranks.values()))
    size = rank or max(widest.ranks.values())
    scale = next(iter(widest.scales.values()))
    layers = sorted({module for member in fleet.members for module in member.ranks})
    ranks, scales = dict.fromkeys(layers, size), dict.fromkeys(layers, scale)
    spare = spare_directions(updates, ranks)
    shares: tuple[float, ...] | None = None
    if by == "ties" and weights is None:
        mixed = ties(updates, keep, ranks, scales, spare)
    elif by == "precision" and weights is None:
        sure = _by_precision(fleet, updates, trained)
        mixed = nearest([sure], [1.0], ranks, scales, spare)
    else:
        shares = tuple(_given(fleet, weights) if weights is not None else _weights(fleet, by))
        mixed = nearest(updates, shares, ranks, scales, spare)
    named = by if weights is None else "weights"
    if strength != "auto":
        return _scaled(fleet, mixed, ranks, scales, named, shares, strength)
    assert rows is not None
    measured = rows()
    tried, asked = {}, 0
    for c in STRENGTHS:
        made = _scaled(fleet, mixed, ranks, scales, named, shares, c).update
        losses = measured.losses(dict.fromkeys(fleet.names, made)).values()
        if not losses:
            raise ConfigError(
                f"merge: none of {', '.join(fleet.names[:6])} has validation rows, by which "
                "strength 'auto' is chosen; give a number"
            )
        asked = len(losses)
        tried[c] = math.fsum(loss.per_token for loss in losses) / asked
    best = min(tried, key=lambda c: tried[c] if math.isfinite(tried[c]) else math.inf)
    chosen = _scaled(fleet, mixed, ranks, scales, named, shares, best)
    return replace(chosen, tried=tried, asked=asked)


def _by_precision(
    fleet: Fleet, updates: Sequence[Adapter], trained: Callable[[], OwnRows] | None
) -> Adapter:
    """The mean of the updates by precisions, in directions that all of them have in common.

    Raises:
        ConfigError: there are no training rows to know precisions from, or all updates are zero.
    """
    if trained is None:
        raise ConfigError(
            "merge: precisions are known from the rows that the adapters were trained on, and "
            "plain folders have none; give a run, or merge by metagpt, rows, uniform or ties"
        )
    directions = common_directions(updates)
    if not any(len(rows) for rows in directions.values()):
        raise ConfigError(
            f"merge: all {len(updates)} adapters are zero, so that there is nothing to weigh; "
            "train them, or merge by 'uniform'"
        )
    owners = trained()
    if absent := [name for name in fleet.names if not owners.rows.get(name)]:
        raise ConfigError(
            f"merge: {', '.join(absent[:6])} have no training rows here, from which precisions are "
            "known; merge by metagpt, rows, uniform or ties"
        )
    named = dict(zip(fleet.names, padded(updates), strict=True))
    common = {name: in_directions(update, directions) for name, update in named.items()}
    found = owners.squares(common)
    merged: dict[str, Tensor] = {}
    for key, part in next(iter(common.values())).items():
        merged[key] = part
        if key.endswith(UP):
            values = [common[name][key] for name in fleet.names]
            sure = [found[name][key] for name in fleet.names]
            merged[key] = mean_by_precision(values, sure).float()
    return merged


def _scaled(
    fleet: Fleet,
    mixed: Mixed,
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    by: str,
    shares: tuple[float, ...] | None,
    strength: float,
) -> Merged:
    """The merge times a strength, which stands in B: the cut of a multiple is that of the sum."""
    adapter = {
        name: part * strength if name.endswith("lora_B.weight") else part
        for name, part in mixed.adapter.items()
    }
    return Merged(fleet, adapter, ranks, scales, by, shares, strength, mixed.tail * strength)


def _check(by: str, strength: float | str, rank: int | None, keep: float) -> None:
    """Refuses arguments that cannot be used.

    Raises:
        ConfigError: with all of them.
    """
    problems = []
    if by not in WAYS:
        problems.append(f"merge: by {by!r} is not known; choose from {', '.join(WAYS)}")
    if strength != "auto" and not (isinstance(strength, Real) and 0 < strength < math.inf):
        problems.append(f"merge: strength is {strength!r}; give a number above 0, or 'auto'")
    if rank is not None and not (isinstance(rank, Integral) and rank >= 1):
        problems.append(f"merge: rank is {rank!r}; must be a whole number, 1 or more")
    if not (isinstance(keep, Real) and 0 < keep <= 1):
        problems.append(f"merge: keep is {keep!r}; must be a number above 0 and at most 1")
    if problems:
        raise ConfigError(problems)


def _weights(fleet: Fleet, by: str) -> list[float]:
    """The weight of each adapter, which sum to 1.

    Raises:
        ConfigError: they cannot be known.
    """
    count = len(fleet.members)
    if by == "uniform":
        return [1 / count] * count
    if by == "metagpt":
        try:
            return metagpt_weights([member.update for member in fleet.members])
        except RunError as error:
            raise ConfigError(str(error)) from error
    if unknown := [name for name in fleet.names if not fleet.rows.get(name)]:
        raise ConfigError(
            f"merge: the training rows of {', '.join(unknown[:6])} are not known; only a run tells "
            "them, in metrics/clients.csv. Merge by 'metagpt' or 'uniform'"
        )
    total = sum(fleet.rows[name] for name in fleet.names)
    return [fleet.rows[name] / total for name in fleet.names]


def _given(fleet: Fleet, weights: Sequence[float]) -> list[float]:
    """Weights of the user's, divided by their sum.

    Raises:
        ConfigError: they do not fit.
    """
    given, count = [float(weight) for weight in weights], len(fleet.members)
    if len(given) != count or min(given) < 0 or not 0 < sum(given) < math.inf:
        raise ConfigError(
            f"merge: {len(given)} weights for {count} clients, with the sum {sum(given):g}; give "
            "one a client, 0 or more and not all 0"
        )
    return [weight / sum(given) for weight in given]
