"""Offsite tuning: an emulator for clients, and their adapters put back on the base."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedmira.adapters import Adapter
from fedmira.atomic import replace_file
from fedmira.clients import CohortSettings, LocalClients
from fedmira.config import ModelSettings
from fedmira.errors import ConfigError, DataError, RunFolderError
from fedmira.experiment import prepare_kind
from fedmira.messages import ClientId
from fedmira.model import (
    AdapterKind,
    Emulator,
    LoraKind,
    in_the_middle,
    load_base,
    outer_targets,
    plugged,
    read_emulator,
    write_emulator,
)
from fedmira.records import new_folder
from fedmira.studies.saved import SavedAdapters, clients_of

__all__ = ["COLUMNS", "Emulated", "Plugged", "emulate", "plug_run"]

COLUMNS = ("base", "emulator", "emulator_tuned", "plugged")
"""What each client's test rows are asked: two models, without and with its adapter."""

_log = logging.getLogger("fedmira")


@dataclass(frozen=True, slots=True)
class Emulated:
    """An emulator that was written.

    Attributes:
        folder: where it lies.
        emulator: which layers it has.
        targets: full paths at both ends, as `adapter.targets` takes them.
        parameters, of: weights of the emulator, and of its base.
    """

    folder: Path
    emulator: Emulator
    targets: tuple[str, ...]
    parameters: int
    of: int

    @property
    def setting(self) -> str:
        """How a run is told to train both ends alone."""
        return f"adapter.targets={json.dumps(list(self.targets))}"

    @property
    def figures(self) -> dict[str, Any]:
        """The same as JSON."""
        return {
            "output": str(self.folder),
            "base": self.emulator.base,
            "base_sha256": self.emulator.base_sha256,
            "layers": list(self.emulator.layers),
            "layers_of_base": self.emulator.count,
            "parameters": self.parameters,
            "parameters_of_base": self.of,
            "targets": list(self.targets),
        }


@dataclass(frozen=True, slots=True)
class Plugged:
    """Adapters of an emulator on its base.

    Attributes:
        adapters: client id -> its adapter by the base's names.
        kind: the adapters on the base.
        losses: client id -> nats per test token for each of `COLUMNS`; empty where rows are absent.
        notes: what is to be said, a sentence each.
        run: whose adapters they are.
        emulator: which layers it had.
    """

    adapters: Mapping[ClientId, Adapter]
    kind: AdapterKind
    losses: Mapping[ClientId, Mapping[str, float]]
    notes: tuple[str, ...]
    run: Path
    emulator: Emulator

    @property
    def means(self) -> dict[str, float]:
        """Mean over clients of each of `COLUMNS`; empty where no rows were here."""
        lines = list(self.losses.values())
        return {
            column: math.fsum(line[column] for line in lines) / len(lines)
            for column in COLUMNS
            if lines
        }

    @property
    def figures(self) -> dict[str, Any]:
        """All figures as JSON."""
        return {
            "run": self.run.resolve().name,
            "base": self.emulator.base,
            "base_sha256": self.emulator.base_sha256,
            "clients": {client: dict(line) for client, line in self.losses.items()},
            "mean": self.means,
            "notes": list(self.notes),
        }

    def save(self, output: Path) -> None:
        """Write a folder that plain PEFT loads for each client, and plug.json.

        Args:
            output: new or empty.

        Raises:
            RunFolderError: something is there already.
        """
        with new_folder(output) as aside:
            for client, adapter in self.adapters.items():
                self.kind.write(aside / client, adapter)
            text = json.dumps(self.figures, indent=1, allow_nan=False)
            replace_file(aside / "plug.json", text + "\n", lasting=False)


def emulate(
    base: str,
    output: Path,
    *,
    left: int = 2,
    right: int = 2,
    drop: float = 0.5,
    targets: tuple[str, ...] = (),
) -> Emulated:
    """Write an emulator of a base, for clients who are not to have the base.

    Args:
        base: as `model.base` takes it.
        output: a new folder.
        left, right: how many layers at either end stay as they are.
        drop: share of the layers between them that is left out.
        targets: names of layers that carry adapters, as in `adapter.targets`; the usual ones where
            there are none.

    Raises:
        ModelError: the base cannot be loaded or thinned.
        RunFolderError: something is at `output` already.
    """
    whole = load_base(ModelSettings(base=base, device="cpu"))
    with new_folder(output) as aside:
        emulator = write_emulator(whole, left, right, drop, aside)
    thinned = load_base(ModelSettings(base=str(output), device="cpu"))
    return Emulated(
        folder=output,
        emulator=emulator,
        targets=tuple(outer_targets(thinned.model, emulator, targets)),
        parameters=thinned.num_parameters,
        of=whole.num_parameters,
    )


def plug_run(saved: SavedAdapters, base: str) -> Plugged:
    """Put the adapters of a run on an emulator back on its base, and measure what they are worth.

    Args:
        saved: what the run has saved.
        base: the base that the emulator was made of, as `model.base` takes it.

    Raises:
        ConfigError: adapters of this kind have no layers, or it is another base.
        ModelError: the run's base is no emulator, or the base cannot be loaded.
    """
    if not isinstance(saved.kind, LoraKind):
        raise ConfigError(
            f"plug: adapters of kind {saved.config.adapter.kind!r} belong to no layer; "
            "an emulator's adapters are LoRA in its outer layers"
        )
    emulator = read_emulator(Path(saved.kind.base.location))
    whole = load_base(saved.config.model.model_copy(update={"base": base, "sha256": None}))
    if whole.sha256 != emulator.base_sha256:
        raise ConfigError(
            f"--base {base!r}: the emulator was made of another base (sha256 "
            f"{emulator.base_sha256[:12]}, this one has {whole.sha256[:12]}): give "
            f"{emulator.base!r} as it was then"
        )
    adapters = {client: plugged(saved.adapters[client], emulator) for client in saved.adapters}
    first = next(iter(adapters.values()))
    paths = dict.fromkeys(
        name.split("base_model.model.", 1)[1].rsplit(".lora_", 1)[0] for name in first
    )
    config = saved.config.model_copy(
        update={
            "model": saved.config.model.model_copy(update={"base": base, "sha256": None}),
            "adapter": saved.config.adapter.model_copy(update={"targets": tuple(paths)}),
        }
    )
    kind = prepare_kind(config, whole)
    losses, notes = _measured(saved, adapters, kind)
    inside = in_the_middle(next(iter(saved.adapters.values())), emulator)
    if inside:
        notes.append(
            f"{len(inside)} of {len(first)} tensors of each adapter belong to the thinned middle, "
            "where the base's layers have other neighbours than the emulator's; train both ends "
            "alone, as `fedmira emulate` says"
        )
    return Plugged(adapters, kind, losses, tuple(notes), saved.path, emulator)


def _measured(
    saved: SavedAdapters, adapters: Mapping[ClientId, Adapter], kind: AdapterKind
) -> tuple[dict[ClientId, dict[str, float]], list[str]]:
    """The losses of each client, or why there are none."""
    try:
        on_emulator = clients_of(saved)
    except (DataError, RunFolderError) as error:
        return {}, [f"nothing was measured, as the rows are not here: {error}"]
    on_emulator.references = None  # what is compared are adapters alone
    settings = on_emulator.settings
    on_base = LocalClients(
        None,
        kind,
        on_emulator.data,
        CohortSettings(settings.local, settings.scales, settings.token_budget),
        on_emulator.at_once,
    )
    found = {
        "base": on_base.losses(_without(adapters)),
        "emulator": on_emulator.losses(_without(saved.adapters)),
        "emulator_tuned": on_emulator.losses(saved.adapters),
        "plugged": on_base.losses(adapters),
    }
    return {
        client: {column: found[column][client].per_token for column in COLUMNS}
        for client in found["base"]
    }, []


def _without(adapters: Mapping[ClientId, Adapter]) -> dict[ClientId, Adapter]:
    """Adapters that add nothing."""
    return {
        client: {name: torch.zeros_like(tensor) for name, tensor in adapters[client].items()}
        for client in adapters
    }
