"""What becomes of an aligned fleet: who takes what, and the folders and pages that tell it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedmira.adapters import modules
from fedmira.atomic import replace_file
from fedmira.fleet.align import Aligned
from fedmira.fleet.output import card, copy_folder
from fedmira.fleet.rows import OwnRows
from fedmira.graphs import write_graph
from fedmira.metrics import RULE, Judgement, Standing, judge
from fedmira.model import LoraFolder, write_alike
from fedmira.records import new_folder
from fedmira.report import write_alignment

__all__ = ["DecidedFleet", "decide"]

_OWN, _ALIGNED = "own", "aligned"


@dataclass(frozen=True)
class DecidedFleet:
    """An aligned fleet, and what each adapter's owner takes.

    Attributes:
        aligned: what the step made.
        judgements: of the owners whose rows judged, by name; None where no rows were given.
        notes: what was done to the rows, a sentence each.
    """

    aligned: Aligned
    judgements: Mapping[str, Judgement] | None = None
    notes: tuple[str, ...] = field(default=())

    def takes(self, name: str) -> str:
        """The adapter that its owner takes: aligned or own, or not moved where both are the same.

        Args:
            name: of the adapter.
        """
        if self.aligned.moved[name].adapter is None:
            return "not moved"
        if self.judgements is None:
            return _ALIGNED
        return self.judgements[name].choice if name in self.judgements else _OWN

    @property
    def figures(self) -> dict[str, Any]:
        """Everything that the pages tell, for JSON."""
        aligned = self.aligned
        edges = aligned.graph.edges()
        return {
            "base": aligned.fleet.members[0].base,
            "base_assumed": aligned.fleet.assumed,
            "coupling": aligned.settings.coupling,
            "nearest": aligned.settings.nearest,
            "judged": self.judgements is not None,
            "rule": "" if self.judgements is None else RULE,
            "bound": self._bound(),
            "unknown": self._unknown(),
            "notes": list(self.notes),
            "graph": {
                "noise": aligned.noise,
                "mean_cosine": _mean_of_pairs(aligned),
                "pairs": [
                    {"source": a, "target": b, "weight": w, "cosine": self._cosine(a, b)}
                    for a, b, w in edges
                ],
            },
            "start_overlap": _start_overlap(aligned.fleet.members),
            "adapters": [self._row(member) for member in aligned.fleet.members],
        }

    def save(self, folder: str | Path) -> Path:
        """Write FOLDER/<name>/, graph.json, align.json, report.md and report.html.

        An adapter that stays as it is is copied byte for byte.

        Args:
            folder: new or empty.

        Raises:
            RunFolderError: something is there already.
        """
        place = Path(folder)
        with new_folder(place) as aside:
            for member in self.aligned.fleet.members:
                own = aside / member.name
                adapter = self.aligned.moved[member.name].adapter
                if adapter is None or self.takes(member.name) != _ALIGNED:
                    copy_folder(member, own)
                    continue
                write_alike(own, member, adapter)
                replace_file(own / "README.md", self._card(member), lasting=False)
            write_graph(aside / "graph.json", self.aligned.graph)
            write_alignment(aside, self.figures)
        return place

    def _row(self, member: LoraFolder) -> dict[str, Any]:
        moved, judged = self.aligned.moved[member.name], (self.judgements or {}).get(member.name)
        ranks = sorted(set(member.ranks.values()))
        return {
            "name": member.name,
            "ranks": ranks,
            "layers": len(member.ranks),
            "takes": self.takes(member.name),
            "pull": moved.pull,
            "by": dict(moved.by),
            "distance": moved.distance,
            "tail": moved.tail,
            "dropped": moved.dropped,
            "rows": None if judged is None else judged.rows,
            "own_loss": None if judged is None else _finite(judged.own_loss),
            "difference": None if judged is None else _finite(judged.difference),
            "margin": None if judged is None else _finite(judged.margin),
            "standing": None if judged is None else str(judged.standing),
            "reason": "" if judged is None else judged.reason,
        }

    def _cosine(self, first: str, second: str) -> float:
        names = self.aligned.fleet.names
        return float(self.aligned.cosines[names.index(first), names.index(second)])

    def _bound(self) -> str:
        coupling = self.aligned.settings.coupling
        kept = f"at least {1 - coupling:g} of it is its own, and " if coupling < 1 else ""
        return (
            f"No adapter goes more than {coupling:g} of the way to the mean of its neighbours "
            f"(coupling; degrees of the graph are 1 or less), so {kept}before the cut to its rank "
            f"it is no further from what it was than {coupling:g} of its distance to its farthest "
            "neighbour."
        )

    def _unknown(self) -> list[str]:
        """What cannot be known of this alignment, a sentence each."""
        members = self.aligned.fleet.members
        told = []
        if self.judgements is None:
            told.append(
                "Whether anybody is better off: no row was read and no loss was measured. That two "
                "updates point the same way does not say that one helps the other's task. Give "
                "--rows with a few validation rows of each owner, and each keeps its own adapter "
                "unless they show that the aligned one is better."
            )
        else:
            moved = [n for n in self.aligned.fleet.names if self.takes(n) != "not moved"]
            bare = [name for name in moved if name not in self.judgements]
            if bare:
                told.append(
                    f"Whether {', '.join(bare[:6])} would gain: no rows of theirs were given, so "
                    "they keep their own."
                )
            unclear = sum(j.standing is Standing.unclear for j in self.judgements.values())
            if unclear:
                told.append(
                    f"For {unclear} of {len(self.judgements)} the rows cannot tell; they keep "
                    "their own."
                )
        if overlap := _start_overlap(members):
            if overlap["measured"] < 2 * overlap["by_chance"]:
                told.append(
                    "How related the tasks are: the adapters' A span other directions "
                    f"(overlap {overlap['measured']:.3f}, by chance {overlap['by_chance']:.3f}), "
                    "as where each was begun from a start of its own. Their cosines are then "
                    "smaller than those of the tasks, and relatives are missed."
                )
        if self.aligned.fleet.assumed:
            told.append(f"Whether all are of one base: {self.aligned.fleet.assumed}.")
        return told

    def _card(self, member: LoraFolder) -> str:
        moved = self.aligned.moved[member.name]
        judged = (self.judgements or {}).get(member.name)
        by = ", ".join(f"{name} ({100 * share:.2g} %)" for name, share in moved.by.items())
        return card(
            member,
            f"{member.name}, aligned",
            [
                f"Made by fedmira of the adapter {member.name}, moved {100 * moved.pull:.2g} % of "
                f"the way towards {by}. It has the ranks, layers and scales of the original.",
                f"By the owner's rows, {judged.reason}."
                if judged is not None
                else "No loss was measured: whether it is better on the owner's rows than the "
                "original is not known.",
            ],
        )


def decide(aligned: Aligned, rows: OwnRows | None = None) -> DecidedFleet:
    """Let the owners' rows judge, where there are any.

    Args:
        aligned: what the step made.
        rows: of the owners, as far as they have some; without them every move stands.
    """
    if rows is None:
        return DecidedFleet(aligned)
    after = {name: new for name, new in aligned.updates().items() if name in rows.rows}
    before = {m.name: m.update for m in aligned.fleet.members if m.name in after}
    own, new = rows.row_losses(before), rows.row_losses(after)
    judgements = {
        name: judge(
            {
                _OWN: [loss.total for loss in own[name]],
                _ALIGNED: [loss.total for loss in new[name]],
            },
            [loss.tokens for loss in own[name]],
            _OWN,
        )
        for name in after
    }
    return DecidedFleet(aligned, judgements, rows.notes)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _mean_of_pairs(aligned: Aligned) -> float:
    count = len(aligned.cosines)
    pairs = aligned.cosines[tuple(torch.triu_indices(count, count, offset=1))]
    return float(pairs.mean())


def _start_overlap(members: tuple[LoraFolder, ...]) -> dict[str, float] | None:
    """How much of each adapter's row space lies in the next one's, in layers that both have.

    With what two random ones would share; None where no two that follow each other share a layer.
    """
    found, chance = [], []
    for first, second in zip(members, members[1:], strict=False):
        own, other = modules(first.tensors), modules(second.tensors)
        for module in [name for name in own if name in other][:4]:
            bases = [
                torch.linalg.qr(parts[module][0].to(torch.float64).T)[0] for parts in (own, other)
            ]
            rank = min(basis.shape[1] for basis in bases)
            found.append(float((bases[0].T @ bases[1]).square().sum()) / rank)
            chance.append(max(basis.shape[1] for basis in bases) / bases[0].shape[0])
    if not found:
        return None
    count = len(found)
    return {"measured": math.fsum(found) / count, "by_chance": math.fsum(chance) / count}
