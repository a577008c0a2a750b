"""What a run leaves behind: adapters, tables, provenance, and the same at hand in Python."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedmira.adapters import Adapter, LazyAdapters, content_hash
from fedmira.algorithms import ServerState, Start
from fedmira.cards import AdapterCards
from fedmira.data import ClientData
from fedmira.errors import RunFolderError
from fedmira.evaluation import TokenLoss, summarise
from fedmira.graphs import Graph
from fedmira.messages import ClientId
from fedmira.model import AdapterKind, BaseModel
from fedmira.report import write_report
from fedmira.rounds import Recorder

__all__ = ["Ground", "Provenance", "Result", "hash_of_rows", "trained_parameters", "write_results"]

_LOSSES = ("base_loss", "before_align_loss", "after_align_loss")
_TEXTS = ("rouge_l", "rouge_l_package", "exact_match")


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: the run folder; `report` is its page.
        adapters: each client's adapter as saved, read from its folder when it is asked for.
        clients: the rows of metrics/clients.csv.
        graph: the graph of the last round, or None where the algorithm has none.
        summary: figure -> mean, weighted_mean, worst_tenth, spread.
        diverged: clients whose adapter gives no finite test loss.
    """

    folder: Path
    report: Path
    adapters: Mapping[ClientId, Adapter]
    clients: list[dict[str, Any]]
    graph: Graph | None
    summary: Mapping[str, Mapping[str, float]]
    diverged: tuple[ClientId, ...] = ()


@dataclass(frozen=True, slots=True)
class Ground:
    """What a run stands on.

    Attributes:
        kind: the adapters, on their base.
        data_sha256: tells whether the clients' rows are those that the run began with.
        token_budget: most tokens in one forward pass, or None where each client's machine has its own.
        federation: of clients on machines of their own, what a resume must know.
    """

    kind: AdapterKind
    data_sha256: str
    token_budget: int | None
    federation: Mapping[str, object] = field(default_factory=dict)

    @property
    def base(self) -> BaseModel:
        """The frozen base model."""
        return self.kind.base


def write_results(recorder: Recorder, ground: Ground, ranks: Mapping[ClientId, int], state: ServerState, *, generate: bool) -> Result:
    """Evaluate each client's own adapter, save it as a PEFT folder, and write the tables; adapters are read one after another."""
    config, folder, evaluator = recorder.config, recorder.folder, recorder.evaluator
    last, _ = recorder.given(state)
    best = config.evaluation.select == "best"
    kept = recorder.best_adapters
    chosen = LazyAdapters(ranks, lambda client: kept[client] if best and client in kept else last[client])
    measured = not best and recorder.latest_round == config.rounds.count
    after = recorder.latest if measured else evaluator.losses(chosen)
    # The best round's upload is not kept, so with "best" there is no "before" that would compare.
    before = {} if best else _before(recorder, last, after)
    losses = {"base_loss": recorder.base_losses, "before_align_loss": before, "after_align_loss": after}
    texts = evaluator.text_scores(chosen, config.evaluation.max_new_tokens) if generate else {}
    rows = [_client_row(recorder, client, ranks[client], losses, texts.get(client, {})) for client in ranks]
    summary = _summary(rows)
    trained = _trained_by_rank(recorder, ranks, state)
    cards = AdapterCards(config, ground.base)
    index: dict[str, object] = {}
    for client, row in zip(ranks, rows, strict=True):
        rank, adapter = ranks[client], chosen[client]
        ground.kind.write(folder.adapters / client, adapter)
        figures = {name: row[name] for name in (*_LOSSES, *_TEXTS) if row[name] != "" and math.isfinite(row[name])}
        entry = {"task": row["task"], "category": row["category"], "rank": rank, "rounds_trained": row["rounds_trained"]}
        entry |= {"parameters": sum(tensor.numel() for tensor in adapter.values()), "trained_parameters": trained[rank]}
        entry |= {"sha256": content_hash(adapter), "base_sha256": ground.base.sha256, "metrics": figures}
        (folder.adapters / client / "README.md").write_text(cards.text(client, entry, row), encoding="utf-8")
        index[client] = entry
    folder.write_json("adapters/index.json", index)
    folder.append_events(recorder.unmeasured(config.rounds.count))
    folder.write_table("clients.csv", rows)
    diverged = tuple(client for client, loss in after.items() if not math.isfinite(loss.total))
    saved = LazyAdapters(ranks, lambda client: ground.kind.read(folder.adapters / client))
    return Result(folder.path, folder.path / "report.html", saved, rows, recorder.graph, summary, diverged)


def trained_parameters(start: Start) -> int:
    """Entries of the adapter that local training moves: those whose gradient the method lets through."""
    if start.hook is None:
        return sum(tensor.numel() for tensor in start.adapter.values())
    ones, zeros = ({name: torch.full_like(tensor, value) for name, tensor in start.adapter.items()} for value in (1.0, 0.0))
    passed, kept = start.hook(ones, start.adapter), start.hook(zeros, start.adapter)
    return sum(int((passed[name] != kept[name]).sum()) for name in passed)


def _trained_by_rank(recorder: Recorder, ranks: Mapping[ClientId, int], state: ServerState) -> dict[int, int]:
    """Rank -> trained parameters of an adapter of this rank; what a method freezes depends on the adapter's form only."""
    algorithm, one_of = recorder.algorithm, {rank: client for client, rank in ranks.items()}
    return {rank: trained_parameters(algorithm.begin(algorithm.instruct(state, client), None)) for rank, client in one_of.items()}


def _before(recorder: Recorder, last: Mapping[ClientId, Adapter], after: Mapping[ClientId, TokenLoss]) -> dict[ClientId, TokenLoss]:
    """Losses of each client's last upload; a client that alignment did not move since then has the loss it ended with."""
    uploaded = recorder.uploaded
    moved = [client for client in uploaded if uploaded.hashes[client] != content_hash(last[client])]
    own = recorder.evaluator.losses(LazyAdapters(moved, uploaded.__getitem__))
    measured = {**after, **own}
    return {client: measured[client] for client in uploaded if client in measured}


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

    def check_same_ground(self) -> None:
        """Refuse to continue on another base or on other rows than the run began with.

        Raises:
            RunFolderError: a hash differs.
        """
        hashes = {"base model": ("base", self._ground.base.sha256), "data": ("data", self._ground.data_sha256)}
        changed = [what for what, (key, present) in hashes.items() if self._before.get(key, {}).get("sha256", present) != present]
        if changed:
            raise RunFolderError(
                f"{self._recorder.folder.path}: the {' and the '.join(changed)} changed since this run began; put back what it began "
                "with, or start a new run"
            )

    def write(self, status: str, **more: object) -> None:
        """Write run.json, and the report once the run has ended.

        Args:
            status: "running", "finished" or "failed".
        """
        folder, base, packed = self._recorder.folder, self._ground.base, self._ground.kind.packed
        document = {
            "status": status,
            "error": None,
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("fedmira", "torch", "transformers", "peft")},
            },
            "seed": self._recorder.config.seed,
            "base": {
                "name": base.name,
                "sha256": base.sha256,
                "parameters": base.num_parameters,
                "dtype": str(base.dtype).removeprefix("torch."),
                "packed": packed,
                "kernels": packed and base.kernels,
                "shortened_last_layer": packed and base.last_layer is not None,
            },
            "data": {"sha256": self._ground.data_sha256, "clients": list(self._recorder.evaluator.parties)},
            "token_budget": self._ground.token_budget,
            **({"federation": dict(self._ground.federation)} if self._ground.federation else {}),
            "machine": {
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "platform": f"{platform.system()} {platform.machine()}",
                "device": str(base.device),
            },
            "started": self._before.get("started", self._started),
            "resumed": [*self._before.get("resumed", []), self._started] if self._before else [],
            "wall_seconds": round(self._recorder.wall_seconds, 2),
            "command": " ".join(Path(part).name if i == 0 else part for i, part in enumerate(sys.argv)),
            **more,
        }
        folder.write_json("run.json", document)
        if status != "running":
            write_report(folder.path)


def hash_of_rows(clients: Mapping[ClientId, ClientData]) -> str:
    """SHA-256 over ids and tokens of all clients' rows."""
    hasher = hashlib.sha256()
    for name, client in clients.items():
        for part, rows in (("train", client.train), ("validation", client.validation), ("test", client.test)):
            hasher.update(repr((name, part, [(len(row.prompt), len(row.response)) for row in rows])).encode())
            for row in rows:
                hasher.update(array("q", (*row.prompt, *row.response)).tobytes())
    return hasher.hexdigest()


def _client_row(
    recorder: Recorder, client: ClientId, rank: int, losses: Mapping[str, Mapping[ClientId, TokenLoss]], texts: Mapping[str, float]
) -> dict[str, Any]:
    party = recorder.evaluator.parties[client]
    best = recorder.best.get(client)
    return {
        "client": client,
        "task": party.task,
        "category": party.category,
        "rank": rank,
        "train_rows": party.train_rows,
        "test_rows": party.test_rows,
        "test_tokens": party.test_response_tokens,
        "rounds_trained": recorder.rounds_trained.get(client, 0),
        **{name: losses[name][client].per_token if client in losses[name] else "" for name in _LOSSES},
        "best_round": best.round if best else "",
        "best_validation_loss": best.validation_loss if best else "",
        "best_test_loss": best.test_loss if best else "",
        **{name: texts.get(name, "") for name in _TEXTS},
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    summary = {}
    for name in (*_LOSSES, *_TEXTS):
        measured = [row for row in rows if row[name] != "" and math.isfinite(row[name])]
        if measured:
            weights = [row["test_tokens"] if name in _LOSSES else row["test_rows"] for row in measured]
            summary[name] = summarise([row[name] for row in measured], weights, higher_is_worse=name in _LOSSES)
    return summary
