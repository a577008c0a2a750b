"""What adapters of any ranks and layers are worth on their owners' rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedmira.adapters import Adapter, map_tensors, modules
from fedmira.adapters.low_rank import DOWN, UP
from fedmira.clients import LocalClients
from fedmira.config import LocalSettings, load_config
from fedmira.data import load_clients
from fedmira.errors import DataError, RunError
from fedmira.experiment import prepare_kind, token_budget
from fedmira.fleet.folders import Fleet
from fedmira.metrics import TokenLoss
from fedmira.model import (
    BaseModel,
    LocalTask,
    LoraKind,
    Row,
    check_ids,
    find_targets,
    most_side_by_side,
)

__all__ = ["OwnRows"]

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class OwnRows:
    """Rows of the adapters' owners on a base that carries LoRA on all layers of the fleet.

    Attributes:
        kind: LoRA on those layers.
        rows: of each adapter's owner.
        budget: most token positions in one pass.
        notes: what was done to the rows, a sentence each.
    """

    kind: LoraKind
    rows: Mapping[str, Sequence[Row]]
    budget: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of_clients(cls, clients: LocalClients) -> OwnRows:
        """The validation rows of those of a run's clients that have some.

        Args:
            clients: of the run.

        Raises:
            DataError: nobody has.
        """
        rows = {
            name: client.validation for name, client in clients.data.items() if client.validation
        }
        if not rows:
            raise DataError(
                "no client of the run has validation rows, so nothing can be chosen; the run needs "
                "data.validation_fraction above 0"
            )
        assert isinstance(clients.kind, LoraKind)
        return cls(clients.kind, rows, clients.settings.token_budget)

    @classmethod
    def trained_by(cls, clients: LocalClients) -> OwnRows:
        """The training rows of a run's clients.

        Args:
            clients: of the run.
        """
        assert isinstance(clients.kind, LoraKind)
        rows = {name: client.train for name, client in clients.data.items()}
        return cls(clients.kind, rows, clients.settings.token_budget)

    @classmethod
    def of_folder(
        cls,
        fleet: Fleet,
        rows: Path | str,
        base: str = "",
        settings: Mapping[str, Any] | Sequence[str] = (),
        loaded: BaseModel | None = None,
    ) -> OwnRows:
        """All rows of a folder with a file or a folder for each adapter, by its name.

        Args:
            fleet: whose owners' rows they are.
            rows: where they are, as `data.path` takes it.
            base: in place of what the adapters call their base.
            settings: for keys of [data], [model] and [engine], as a mapping or KEY=VALUE each; how
                the prompts of a run's adapters are written stands below them.
            loaded: the base, where it is loaded already.

        Raises:
            InputError: the rows or the base cannot be read, or the base lacks layers.
        """
        if not Path(rows).exists():
            raise DataError(
                f"{rows}: there are no such rows; give a folder with NAME.jsonl or NAME/ for each "
                f"adapter, such as {fleet.names[0]}.jsonl"
            )
        mapped = settings if isinstance(settings, Mapping) else {}
        config = load_config(
            None,
            None,
            _overrides(fleet, () if mapped else list(settings)),
            {
                **mapped,
                "data.source": "jsonl",
                "data.path": str(rows),
                "data.min_rows": 2,
                "model.base": base or fleet.members[0].base,
                "algorithm.name": "local",
            },
        )
        base_model = prepare_kind(config, loaded).base
        layers = sorted({name for member in fleet.members for name in member.ranks})
        targets = find_targets(base_model.model, [name.removeprefix(_PREFIX) for name in layers])
        kind = LoraKind(base_model, targets, 1.0)
        dataset = load_clients(config.data, config.seed, base_model.tokenizer)
        # No part is trained on here, so every row measures.
        found = {
            client.client_id: (*client.train, *client.validation, *client.test)
            for client in dataset.clients
        }
        if not found.keys() & set(fleet.names):
            raise DataError(
                f"{rows}: holds rows of {', '.join(list(found)[:6])}, and of none of the adapters "
                f"{', '.join(fleet.names[:6])}; name each file or folder as its adapter"
            )
        kept = {name: found[name] for name in fleet.names if name in found}
        check_ids(base_model, kept)
        return cls(kind, kept, token_budget(config, kind), (*dataset.skipped, *dataset.notes))

    def losses(self, updates: Mapping[str, Adapter]) -> dict[str, TokenLoss]:
        """The response loss of each adapter on its owner's rows, where there are any.

        Args:
            updates: by name, with their scales in B.
        """
        found = {}
        for names in self._in_turns(updates):
            rows = [self.rows[name] for name in names]
            sums = self.kind.losses(*self._stacked(updates, names), rows, self.budget)
            for name, total, own in zip(names, sums, rows, strict=True):
                found[name] = TokenLoss(total, sum(len(row.response) for row in own))
        return found

    def row_losses(self, updates: Mapping[str, Adapter]) -> dict[str, list[TokenLoss]]:
        """The same for each row by itself, in the order of the rows.

        Args:
            updates: by name, with their scales in B.
        """
        found = {}
        for names in self._in_turns(updates):
            rows = [self.rows[name] for name in names]
            sums = self.kind.row_losses(*self._stacked(updates, names), rows, self.budget)
            for name, totals, own in zip(names, sums, rows, strict=True):
                found[name] = [
                    TokenLoss(total, len(row.response))
                    for total, row in zip(totals, own, strict=True)
                ]
        return found

    def squares(self, updates: Mapping[str, Adapter]) -> dict[str, Adapter]:
        """How surely each owner's rows know each entry: the sum of squared gradients of each row.

        The gradient is of the row's mean response loss, at the adapter as it is, without dropout.
        It is the empirical Fisher's diagonal times the number of rows.

        Args:
            updates: by name, with their scales in B.

        Raises:
            RunError: a gradient is not finite.
        """
        kind = replace(self.kind, dropout=0.0)
        found: dict[str, Adapter] = {}
        still = LocalSettings(optimizer="sgd", batch_size=1, epochs=1, max_grad_norm=0.0)
        for names in self._in_turns(updates):
            starts, scales = self._stacked(updates, names)
            tasks = [
                LocalTask(start, scale, self.rows[name], 0, hook=_stay, squares=True)
                for name, start, scale in zip(names, starts, scales, strict=True)
            ]
            outcomes = kind.train(tasks, still, self.budget)
            for name, outcome in zip(names, outcomes, strict=True):
                if outcome.squares is None:
                    raise RunError(f"{name}: its precisions are not known: {outcome.failure}")
                count = len(self.rows[name])
                whole = {key: count * part for key, part in outcome.squares.items()}
                found[name] = _cut_as(whole, updates[name])
        return found

    def _in_turns(self, updates: Mapping[str, Adapter]) -> list[list[str]]:
        """A few adapters at a time, so that the memory for them stays bounded."""
        asked = [name for name in updates if name in self.rows]
        largest = max(
            (sum(part.numel() for part in updates[name].values()) for name in asked), default=1
        )
        step = most_side_by_side(largest, self.kind.base.device)
        return [asked[start : start + step] for start in range(0, len(asked), step)]

    def _stacked(
        self, updates: Mapping[str, Adapter], names: Sequence[str]
    ) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
        """Adapters of one rank on all layers, filled up with zeros, and their scales of 1."""
        return [self._filled(updates[name]) for name in names], [1.0] * len(names)

    def _filled(self, update: Adapter) -> dict[str, torch.Tensor]:
        parts = modules(update)
        rank = max(len(down) for down, _ in parts.values())
        result = {}
        for target in self.kind.targets:
            name = _PREFIX + target.name
            down, up = torch.zeros(rank, target.inputs), torch.zeros(target.outputs, rank)
            if name in parts:
                own_down, own_up = parts[name]
                down[: len(own_down)], up[:, : len(own_down)] = own_down, own_up
            result[name + DOWN], result[name + UP] = down, up
        return result


def _stay(gradient: Adapter, adapter: Adapter) -> Adapter:
    """No step at all: what is wanted of training is the sum of squares."""
    return map_tensors(torch.zeros_like, gradient)


def _cut_as(filled: Adapter, update: Adapter) -> dict[str, torch.Tensor]:
    """The entries of an adapter that was filled up with zeros, as its update has them."""
    return {
        name: filled[name][tuple(map(slice, part.shape))].clone() for name, part in update.items()
    }


def _overrides(fleet: Fleet, settings: Sequence[str]) -> list[str]:
    """The settings, with how the prompts of a run's adapters are written where they do not say."""
    if fleet.run is None:
        return list(settings)
    data = load_config(fleet.run / "config.toml").data
    given = {each.partition("=")[0].strip() for each in settings}
    asked: dict[str, Any] = {
        "prompt": data.prompt,
        "max_length": data.max_length,
        "train_on": data.train_on,
    }
    if data.prompt == "chat":
        asked |= {"system": data.system, "clock": data.clock}
    own = {f"data.{key}": value for key, value in asked.items()}
    return [f"{k}={json.dumps(v)}" for k, v in own.items() if k not in given] + list(settings)
