"""What a run stands on, and run.json, which says so."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import sys
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedmira.clients import Crew
from fedmira.data import ClientData
from fedmira.errors import RunFolderError
from fedmira.messages import ClientId
from fedmira.model import AdapterKind, BaseModel
from fedmira.privacy import PrivacyPlan
from fedmira.rounds import SCREENED
from fedmira.runs.folder import RunFolder
from fedmira.runs.measured import rows_here
from fedmira.runs.pages import write_page
from fedmira.runs.recorder import Recorder

_log = logging.getLogger("fedmira")

__all__ = ["Ground", "Provenance", "hash_of_rows"]


@dataclass(frozen=True, slots=True)
class Ground:
    """What a run stands on.

    Attributes:
        kind: the adapters, on their base.
        data_sha256: tells whether the clients' rows are those that the run began with.
        token_budget: most tokens in one forward pass, or None where each client's machine has its
            own.
        federation: of clients on machines of their own, what a resume must know.
        prompts: what the prompts of a client's training rows share, where its rows are here.
        notes: what the user should know of rows and answers, a sentence each.
        crew: the processes and threads that train and measure; None where other machines do.
        privacy: what is promised of single rows or clients; None where nothing is.
    """

    kind: AdapterKind
    data_sha256: str
    token_budget: int | None
    federation: Mapping[str, object] = field(default_factory=dict)
    prompts: Mapping[ClientId, Mapping[str, object]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    crew: Crew | None = None
    privacy: PrivacyPlan | None = None

    def promised(self, asked: Mapping[ClientId, int]) -> dict[ClientId, dict[str, object]]:
        """What each client's adapter promises, as index.json says it; empty without privacy.

        Args:
            asked: rounds in which each client was asked to train.
        """
        plan = self.privacy
        if plan is None:
            return {}
        return {
            client: {
                "kind": plan.kind,
                "epsilon": spent if math.isfinite(spent) else None,
                "delta": plan.delta,
                "secret": plan.secret,
            }
            for client, spent in plan.spent(asked).items()
        }

    @property
    def base(self) -> BaseModel:
        """The frozen base model."""
        return self.kind.base


class Provenance:
    """run.json of one part of a run: a run that was resumed has several.

    Args:
        recorder: of the run.
        ground: what it stands on.
        before: what run.json said when this part began.
    """

    def __init__(self, recorder: Recorder, ground: Ground, before: Mapping[str, Any]) -> None:
        self._recorder = recorder
        self._ground = ground
        self._before = before
        self._started = datetime.now(UTC).isoformat(timespec="seconds")

    def stand_on(self, ground: Ground) -> None:
        """From now on run.json tells of this ground, on which the run has more clients.

        Args:
            ground: on the same base.
        """
        self._ground = ground

    def _processors(self) -> dict[str, object]:
        """How many processes and threads compute, where that is known here."""
        crew = self._ground.crew
        if crew is None:
            return {}
        return {"workers": crew.count, "threads": crew.threads or torch.get_num_threads()}

    def _kept_losses(self) -> dict[str, object]:
        """Of which rows the base's losses were read from the cache, and not measured."""
        here = rows_here(self._recorder.clients)
        read = here.base_losses.read if here is not None and here.base_losses is not None else []
        splits = dict.fromkeys([*self._before.get("base_losses_from_cache", []), *read])
        return {"base_losses_from_cache": list(splits)} if splits else {}

    def check_same_ground(self) -> None:
        """Refuse to continue on another base or on other rows than the run began with.

        Where versions or the machine differ, a warning says so: bits may differ, too.

        Raises:
            RunFolderError: a hash differs.
        """
        present = self._standing()
        for what, names in (("base model", "base"), ("data", "data")):
            if names in self._before and "sha256" not in self._before[names]:
                raise RunFolderError(
                    f"{self._recorder.folder.path}: run.json does not say which {what} the run "
                    "began with; put it back from a copy, or start a new run"
                )
        changed = [
            what
            for what, key in (("base model", "base"), ("data", "data"))
            if self._before.get(key, present[key])["sha256"] != present[key]["sha256"]
        ]
        if changed:
            raise RunFolderError(
                f"{self._recorder.folder.path}: the {' and the '.join(changed)} changed "
                "since this run began; put back what it began "
                "with, or start a new run"
            )
        differing = [
            f"{name} was {then!r} and is {now[name]!r}"
            for block, now in present.items()
            for name, then in self._before.get(block, {}).items()
            if name in now and then != now[name]
        ]
        if differing:
            _log.warning(
                "%s: what follows may differ in its last bits from an uninterrupted run, since "
                "not all is as it was when the run began: %s",
                self._recorder.folder.path,
                ", ".join(differing),
            )

    def write(self, status: str, **more: object) -> None:
        """Write run.json, and the report once the run has ended.

        Args:
            status: "running", "finished", "stopped", "interrupted" or "failed".
            more: further keys of run.json, which win over the others.
        """
        folder, base = self._recorder.folder, self._ground.base
        standing = self._standing()
        document = {
            "status": status,
            "id": self._recorder.facts.id,
            "error": None,
            "versions": standing["versions"],
            "seed": self._recorder.config.seed,
            "base": {
                "name": base.name,
                **(
                    {"location": base.location}
                    if base.name not in (base.location, "bundled")
                    else {}
                ),
                **standing["base"],
            },
            "data": {
                **standing["data"],
                **self._place_of_rows(),
                "clients": list(self._recorder.clients.parties),
            },
            **({"notes": list(self._ground.notes)} if self._ground.notes else {}),
            **({"clock": clock} if (clock := self._recorder.config.data.clock) else {}),
            **self._promised(),
            "token_budget": self._ground.token_budget,
            **self._processors(),
            **self._kept_losses(),
            **({"federation": dict(self._ground.federation)} if self._ground.federation else {}),
            "machine": standing["machine"],
            "started": self._before.get("started", self._started),
            "resumed": [*self._before.get("resumed", []), self._started] if self._before else [],
            "wall_seconds": round(self._recorder.wall_seconds, 2),
            "command": " ".join(
                Path(part).name if i == 0 else part for i, part in enumerate(sys.argv)
            ),
            **more,
        }
        if status != "running" and (screened := _left_out(folder)):
            document["screened"] = screened
        folder.write_json("run.json", document)
        if status == "running":
            folder.write_json("checkpoint/run.json", document)
        else:
            write_page(folder.path)
            folder.seal()

    def _standing(self) -> dict[str, dict[str, Any]]:
        """What the bits of a run depend on beside its settings, as run.json has it."""
        base, packed = self._ground.base, self._ground.kind.packed
        return {
            "versions": {
                "python": platform.python_version(),
                **{
                    name: metadata.version(name)
                    for name in ("fedmira", "torch", "transformers", "peft")
                },
            },
            "base": {
                "sha256": base.sha256,
                "parameters": base.num_parameters,
                "dtype": str(base.dtype).removeprefix("torch."),
                "packed": packed,
                "kernels": packed and base.attention != "rows",
                "attention": base.attention if packed else "own",
                **(
                    {"attention_in_windows": base.attention_in_windows}
                    if packed and base.attention_in_windows
                    else {}
                ),
                "shortened_last_layer": packed and base.last_layer is not None,
            },
            "data": {"sha256": self._ground.data_sha256},
            "machine": {
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "platform": f"{platform.system()} {platform.machine()}",
                "device": str(base.device),
            },
        }

    def _promised(self) -> dict[str, object]:
        """What is promised of rows or clients, and what of it is spent; empty without privacy."""
        plan = self._ground.privacy
        if plan is None:
            return {}
        # A round that was cut short may have been asked for twice, and then was answered twice.
        again = len(self._before.get("resumed", [])) + bool(self._before)
        asked = {name: count + again for name, count in self._recorder.rounds_asked.items()}
        return {"privacy": plan.as_json(asked)}

    def _place_of_rows(self) -> dict[str, str]:
        """The absolute path of the rows, empty where they are no file or folder here."""
        written = self._recorder.config.data.path
        there = self._before.get("data", {}).get("location")
        path = Path(there or written).expanduser()
        return {"location": str(path.resolve())} if written and path.exists() else {}


def _left_out(folder: RunFolder) -> dict[ClientId, int]:
    """Client id -> rounds in which the server's screen left its reply out; few have any."""
    if not folder.events.exists():
        return {}
    with folder.events.open(encoding="utf-8") as lines:
        # A line is read as JSON only where it can be one of those: there are many others.
        found = [json.loads(line) for line in lines if f'"{SCREENED}"' in line]
    names = [event["client"] for event in found if event.get("stage") == SCREENED]
    return dict(sorted(Counter(names).items()))


def hash_of_rows(clients: Mapping[ClientId, ClientData]) -> str:
    """SHA-256 over ids, tokens and, where there are any, advantages of all clients' rows."""
    hasher = hashlib.sha256()
    for name, client in clients.items():
        for part, rows in (
            ("train", client.train),
            ("validation", client.validation),
            ("test", client.test),
        ):
            hasher.update(
                repr((name, part, [(len(row.prompt), len(row.response)) for row in rows])).encode()
            )
            for row in rows:
                hasher.update(array("q", (*row.prompt, *row.response)).tobytes())
            if any(row.advantage is not None for row in rows):
                hasher.update(repr([row.advantage for row in rows]).encode())
    return hasher.hexdigest()
