"""Adapters that were trained apart, each moved towards those that learned something like it.

One server step of MIRA on whole updates: with the graph that is learned from their cosines,

    tau_k  <-  tau_k + sum_l P_kl (tau_l - tau_k),        P_kl = coupling * a_kl

module by module among those that have the module, cut to the adapter's own ranks, and factored in
its own gauge. An adapter that is pulled by nobody keeps its files byte for byte.

Nothing is known here of anybody's rows, so the step is bounded: degrees of the learned graph are 1
or less, hence an adapter keeps at least 1 - coupling of itself.

Two levels would give all adapters the same common part besides. Without rounds in between, P of
the own parts plus the common part is P of the whole, as rows of P sum to 1, so only its graph is
another one; and a step to the mean of all had no gain beyond that of shrinking alone
(experiments/fleets).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

from fedmira.adapters import Adapter, folded, modules, nearest, update_gram
from fedmira.errors import ConfigError
from fedmira.fleet.folders import Fleet
from fedmira.fleet.output import check_names
from fedmira.graphs import Graph, likeness
from fedmira.methods.parts.mixing import Mixing, mixing_matrix
from fedmira.model import LoraFolder

__all__ = ["AlignSettings", "Aligned", "Moved", "align_fleet"]

_FILES = ("align.json", "graph.json", "report.html", "report.md")
"""What stands beside the adapters in the folder of an alignment."""


@dataclass(frozen=True)
class AlignSettings:
    """How far adapters are moved, and by whom.

    Attributes:
        coupling: most of the way to its neighbours' mean that an adapter goes, 0..1.
        nearest: neighbours that each adapter chooses.
        size_scale: as MIRA's, where rows are known; 0 switches it off.
        server_step: None: the strength is the coupling.
        neighbours: everybody, as all are here.

    Raises:
        ConfigError: a value is out of its range.
    """

    coupling: float = 0.5
    nearest: int = 3
    size_scale: float = 0.0
    server_step: float | None = None
    neighbours: Literal["fresh", "rescaled", "stale"] = "stale"

    def __post_init__(self) -> None:
        problems = []
        if not (isinstance(self.coupling, Real) and 0 <= self.coupling <= 1):
            told = f"{self.coupling:g}" if isinstance(self.coupling, Real) else repr(self.coupling)
            problems.append(f"align: coupling is {told}; must be within 0..1")
        if not (isinstance(self.nearest, Integral) and self.nearest >= 1):
            problems.append(f"align: nearest is {self.nearest!r}; must be a whole number from 1 on")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Moved:
    """What the step makes of one adapter.

    Attributes:
        pull: share of the way to its neighbours' mean.
        by: neighbour -> its share in the adapter.
        adapter: its new factors, None where nothing moves it.
        distance: of the new update from the old one, in norms of the old one.
        tail: norm that the cut to its own ranks left out, in norms of the old update.
        dropped: norm of what neighbours would add in modules that the adapter does not have, in
            norms of the old update.
    """

    pull: float = 0.0
    by: Mapping[str, float] = field(default_factory=dict)
    adapter: Adapter | None = None
    distance: float = 0.0
    tail: float = 0.0
    dropped: float = 0.0


@dataclass(frozen=True)
class Aligned:
    """A fleet after one step.

    Attributes:
        fleet: as it was read.
        graph: who is related.
        cosines: between all pairs of updates, float64 [K, K].
        noise: of a cosine between unrelated updates, as it was estimated.
        settings: of the step.
        moved: what becomes of each, by name.
    """

    fleet: Fleet
    graph: Graph
    cosines: Tensor
    noise: float
    settings: AlignSettings
    moved: Mapping[str, Moved]

    def updates(self) -> dict[str, Adapter]:
        """What became of those that were moved, by name, with the scales in B."""
        return {
            member.name: folded(adapter, member.scales)
            for member in self.fleet.members
            if (adapter := self.moved[member.name].adapter) is not None
        }


def align_fleet(fleet: Fleet, settings: AlignSettings | None = None) -> Aligned:
    """Move each adapter towards its relatives.

    Args:
        fleet: two or more adapters.
        settings: of the step.

    Raises:
        ConfigError: there are fewer.
    """
    settings = settings or AlignSettings()
    count = len(fleet.members)
    if count < 2:
        raise ConfigError(f"align: {count} adapter; give at least 2, or a run with as many")
    check_names(fleet.names, _FILES)
    updates = [member.update for member in fleet.members]
    gram = update_gram(updates)
    everybody = torch.ones(count, dtype=torch.bool)
    found = likeness(gram, everybody, settings.nearest)
    graph = Graph("similarity", fleet.names, found.edges)
    rows = torch.tensor([float(fleet.rows.get(name, 0)) for name in fleet.names])
    mixing = mixing_matrix(
        settings, graph, everybody, everybody, rows.to(torch.float64), absolute=True
    )
    moved = {
        member.name: _moved(fleet, updates, mixing, k, float(gram[k, k].clamp_min(0).sqrt()))
        for k, member in enumerate(fleet.members)
    }
    norms = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    cosines = gram / norms[:, None] / norms[None, :]
    return Aligned(fleet, graph, cosines, found.noise, settings, moved)


def _moved(fleet: Fleet, updates: list[Adapter], mixing: Mixing, k: int, norm: float) -> Moved:
    pull = float(mixing.pulls[k])
    if pull == 0:
        return Moved()
    positions, weights = mixing.row(k)
    by = {p: w for p, w in zip(positions, weights, strict=True) if p != k}
    member = fleet.members[k]
    adapter, squared_tail = _mixed(member, updates, k, by)
    after = folded(adapter, member.scales)
    return Moved(
        pull=pull,
        by={fleet.names[place]: weight for place, weight in by.items()},
        adapter=adapter,
        distance=_norm_of([after, updates[k]], [1.0, -1.0]) / norm,
        tail=squared_tail**0.5 / norm,
        dropped=_dropped(member, updates, by) / norm,
    )


def _mixed(
    member: LoraFolder, updates: list[Adapter], k: int, by: Mapping[int, float]
) -> tuple[dict[str, Tensor], float]:
    """The new factors, and the square of what the cut left out."""
    adapter: dict[str, Tensor] = {}
    squared_tail = 0.0
    others = {place: modules(updates[place]) for place in by}
    for module, (down, _) in modules(member.tensors).items():
        having = [place for place in by if module in others[place]]
        # A neighbour without this layer says nothing about it, so its share stays the owner's.
        own = 1 - sum(by[place] for place in having)
        places, shares = [k, *having], [own, *(by[place] for place in having)]
        one = {
            name: part.to(torch.float32)
            for name, part in member.tensors.items()
            if name.startswith(module + ".lora_")
        }
        mixed = nearest(
            [_of_module(updates[place], module) for place in places],
            shares,
            {module: len(down)},
            member.scales,
            one,
            "turned",
        )
        adapter |= mixed.adapter
        squared_tail += mixed.tail**2
    return adapter, squared_tail


def _of_module(update: Adapter, module: str) -> dict[str, Tensor]:
    return {name: part for name, part in update.items() if name.startswith(module + ".lora_")}


def _dropped(member: LoraFolder, updates: list[Adapter], by: Mapping[int, float]) -> float:
    """Norm of what neighbours have in layers that the member does not."""
    parts = [
        {
            name: part
            for name, part in updates[place].items()
            if name.partition(".lora_")[0] not in member.ranks
        }
        for place in by
    ]
    return _norm_of(parts, list(by.values())) if any(parts) else 0.0


def _norm_of(updates: list[Adapter] | list[dict[str, Tensor]], weights: list[float]) -> float:
    """Frobenius norm of a weighted sum of updates."""
    factors = torch.tensor(weights, dtype=torch.float64)
    squared = float(factors @ update_gram(updates) @ factors)
    size = squared**0.5 if squared > 0 else 0.0
    return size
