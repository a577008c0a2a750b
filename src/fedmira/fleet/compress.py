"""Adapters of fewer directions: the singular vectors of their own updates that weigh most.

BYOM (Jiang et al. 2023, arXiv 2310.01886) keeps U_q S_q V_q^T of each task's own s B A. With
`around`, one merged adapter is kept for all, and the same cut of what each differs from it by:
ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor

from fedmira.adapters import (
    Adapter,
    folded,
    modules,
    nearest,
    rank_by_energy,
    singular_values,
    spare_directions,
    update_gram,
)
from fedmira.adapters.low_rank import DOWN, UP
from fedmira.atomic import replace_file
from fedmira.errors import ConfigError
from fedmira.fleet.folders import Fleet
from fedmira.fleet.merge import Merged, merge_fleet
from fedmira.fleet.output import card, check_names
from fedmira.model import LoraFolder, write_lora_folder
from fedmira.records import new_folder

__all__ = ["AROUND", "Compressed", "CompressedFleet", "compress_fleet"]

AROUND = ("uniform", "metagpt")
MERGED, RESIDUALS, FIGURES = "merged", "residuals", "compress.json"
_ROUNDING = 1e-6
"""A residual below this share of its adapter is the rounding of float32 factors, and none."""


@dataclass(frozen=True)
class Compressed:
    """One adapter, or its residual, of fewer directions.

    Attributes:
        member: what it was made of.
        adapter: its factors, float32; empty where nothing is left.
        ranks, scales: of each module.
        error: norm of what was left out, in norms of the whole update.
        kept: share of the squared norm that is kept, of the update or of the residual.
    """

    member: LoraFolder
    adapter: Adapter
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    error: float
    kept: float

    @property
    def rank(self) -> int:
        """Its largest rank, 0 where nothing is left."""
        return max(self.ranks.values(), default=0)

    @property
    def size(self) -> int:
        """Bytes of its tensors: the sum of 4 q (in + out)."""
        return sum(part.numel() * part.element_size() for part in self.adapter.values())

    @property
    def update(self) -> Adapter:
        """s B A, with the scale in B."""
        return folded(self.adapter, self.scales)


@dataclass(frozen=True)
class CompressedFleet:
    """All of a fleet, compressed.

    Attributes:
        members: in the order of the fleet.
        around: what all have in common, None where each stands for itself.
        assumed: why the base is taken to be one and the same.
    """

    members: tuple[Compressed, ...]
    around: Merged | None
    assumed: str = ""

    @property
    def figures(self) -> dict[str, object]:
        """What is told of it, for JSON."""
        common = (
            0
            if self.around is None
            else sum(part.numel() * part.element_size() for part in self.around.adapter.values())
        )
        stored = common + sum(each.size for each in self.members)
        return {
            "around": None if self.around is None else self.around.by,
            "bytes_before": sum(each.member.size for each in self.members),
            "bytes_after": stored,
            "bytes_common": common,
            "base_assumed": self.assumed,
            "adapters": [
                {
                    "name": each.member.name,
                    "rank_before": max(each.member.ranks.values()),
                    "rank": each.rank,
                    "bytes_before": each.member.size,
                    "bytes": each.size,
                    "error": each.error,
                    "energy_kept": each.kept,
                }
                for each in self.members
            ],
        }

    def joined(self, name: str) -> tuple[Adapter, Mapping[str, int], Mapping[str, float]]:
        """One client's adapter as plain PEFT needs it: the merged one and its residual in one.

        Args:
            name: of the adapter.

        Returns:
            Its factors, of rank R + q, with their ranks and scales.

        Raises:
            ConfigError: there is none of this name.
        """
        found = next((each for each in self.members if each.member.name == name), None)
        if found is None:
            names = ", ".join(each.member.name for each in self.members[:12])
            raise ConfigError(f"compress: there is no adapter {name!r}; there are {names}")
        if self.around is None:
            return found.adapter, found.ranks, found.scales
        common, own = modules(self.around.adapter), modules(found.adapter)
        adapter: dict[str, Tensor] = {}
        for module, (down, up) in common.items():
            downs, ups = [down], [up]
            if module in own:
                # The residual has the merged adapter's scale, so that both stand side by side.
                ratio = found.scales[module] / self.around.scales[module]
                downs.append(own[module][0])
                ups.append(own[module][1] * ratio)
            adapter[module + DOWN], adapter[module + UP] = torch.cat(downs), torch.cat(ups, dim=1)
        ranks = {module: len(adapter[module + DOWN]) for module in common}
        return adapter, ranks, self.around.scales

    def save(self, folder: str | Path, joined: bool = False) -> Path:
        """Write FOLDER/<name>/, or FOLDER/merged/ and FOLDER/residuals/<name>/, with compress.json.

        Args:
            folder: new or empty.
            joined: around a merged adapter, write FOLDER/<name>/ too, each of rank R + q, which
                plain PEFT loads by itself.

        Raises:
            RunFolderError: something is there already.
        """
        place = Path(folder)
        with new_folder(place) as aside:
            parts = aside if self.around is None else aside / RESIDUALS
            for each in self.members:
                if each.adapter:
                    _write(parts / each.member.name, each, self.around)
            if self.around is not None:
                (aside / MERGED).mkdir()
                self.around.write(aside / MERGED)
            for each in self.members if joined and self.around is not None else ():
                own = aside / each.member.name
                write_lora_folder(own, each.member, *self.joined(each.member.name))
                replace_file(own / "README.md", _card(each, None), lasting=False)
            text = json.dumps(self.figures, indent=1, allow_nan=False)
            replace_file(aside / FIGURES, text + "\n", lasting=False)
        return place


def compress_fleet(
    fleet: Fleet, rank: int | None = None, energy: float | None = None, around: str | None = None
) -> CompressedFleet:
    """Cut every adapter to fewer directions.

    Args:
        fleet: one or more adapters.
        rank: q, the most directions a module keeps. With `around` it may be 0.
        energy: keep, of each adapter, as few directions as hold this share of its squared norm, of
            its residual's with `around`.
        around: "uniform" or "metagpt": keep one merged adapter for all, and of each what it differs
            from it by.

    Raises:
        ConfigError: an argument cannot be used.
    """
    _check(fleet, rank, energy, around)
    check_names(fleet.names, (FIGURES,) if around is None else (FIGURES, MERGED, RESIDUALS))
    common = None if around is None else merge_fleet(fleet, around)
    shared = None if common is None else common.update
    members = tuple(_compressed(member, rank, energy, shared) for member in fleet.members)
    return CompressedFleet(members, common, fleet.assumed)


def _check(fleet: Fleet, rank: int | None, energy: float | None, around: str | None) -> None:
    """Refuses arguments that cannot be used.

    Raises:
        ConfigError: with all of them.
    """
    problems = []
    if rank is None and energy is None:
        problems.append("compress: give --rank, --energy or both")
    least = 1 if around is None else 0
    if rank is not None and not (isinstance(rank, Integral) and rank >= least):
        more = "" if around else "; 0 needs --around, whose merged adapter is then all there is"
        problems.append(
            f"compress: rank is {rank!r}; must be a whole number, {least} or more{more}"
        )
    if energy is not None and not (isinstance(energy, Real) and 0 < energy <= 1):
        problems.append(f"compress: energy is {energy!r}; must be a number above 0 and at most 1")
    if around is not None and around not in AROUND:
        problems.append(
            f"compress: around {around!r} is not known; choose from {', '.join(AROUND)}"
        )
    if around is not None and len(fleet.members) < 2:
        problems.append("compress: around needs at least 2 adapters; leave it away for one")
    if problems:
        raise ConfigError(problems)


def _compressed(
    member: LoraFolder, rank: int | None, energy: float | None, shared: Adapter | None
) -> Compressed:
    """One adapter, or what it differs from the shared one by, cut."""
    own = member.update
    parts, weights = ([own], [1.0]) if shared is None else ([own, shared], [1.0, -1.0])
    values = _values(parts, weights)
    squared = math.fsum(float(of.square().sum()) for of in values.values())
    whole = _norm(own)
    if shared is not None and squared <= (_ROUNDING * whole) ** 2:
        return Compressed(member, {}, {}, {}, 0.0, 1.0)
    longest = max(len(of) for of in values.values())
    wanted = longest if energy is None else max(1, rank_by_energy(values, energy))
    if rank is not None:
        wanted = min(wanted, rank)
    if wanted == 0:
        return Compressed(member, {}, {}, {}, math.sqrt(squared) / (whole or 1.0), 0.0)
    ranks = {module: min(wanted, len(of)) for module, of in values.items()}
    usual = next(iter(member.scales.values()))
    scales = {module: member.scales.get(module, usual) for module in ranks}
    cut = nearest(parts, weights, ranks, scales, spare_directions(parts, ranks))
    kept = 1 - cut.tail**2 / squared if squared else 1.0
    return Compressed(member, cut.adapter, ranks, scales, cut.tail / (whole or 1.0), kept)


def _values(parts: list[Adapter], weights: list[float]) -> dict[str, Tensor]:
    """Singular values of a weighted sum of updates, by module."""
    joined: dict[str, Tensor] = {}
    for part, weight in zip(parts, weights, strict=True):
        for module, (down, up) in modules(part).items():
            scaled = up.to(torch.float64) * weight
            if module + DOWN in joined:
                down = torch.cat([joined[module + DOWN], down.to(torch.float64)])
                scaled = torch.cat([joined[module + UP], scaled], dim=1)
            joined[module + DOWN], joined[module + UP] = down.to(torch.float64), scaled
    return singular_values(joined)


def _norm(update: Adapter) -> float:
    return math.sqrt(max(0.0, float(update_gram([update]))))


def _write(folder: Path, each: Compressed, around: Merged | None) -> None:
    folder.parent.mkdir(exist_ok=True)
    write_lora_folder(folder, each.member, each.adapter, each.ranks, each.scales)
    replace_file(folder / "README.md", _card(each, around), lasting=False)


def _card(each: Compressed, around: Merged | None) -> str:
    told = [
        f"Made by fedmira of the adapter {each.member.name}, of rank "
        f"{max(each.member.ranks.values())}: the nearest of rank {each.rank}"
        + ("" if around is None else " to what it differs from the merged adapter by")
        + f". What was left out is {100 * each.error:.2g} % of the norm of the whole. No loss was "
        "measured."
    ]
    code = ""
    if around is not None:
        told.append(
            "**By itself it is not the client's adapter**: both, the one in `../../merged` and "
            "this one, must be active."
        )
        code = (
            'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), '
            '"merged", adapter_name="merged")\n'
            f'model.load_adapter("residuals/{each.member.name}", adapter_name="own")\n'
            'model.base_model.set_adapter(["merged", "own"])'
        )
    return card(each.member, f"{each.member.name}, compressed to rank {each.rank}", told, code)
