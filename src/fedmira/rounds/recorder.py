"""What is written down after each round: events, a line of rounds.csv, evaluations and the checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedmira.adapters import Adapter, digest
from fedmira.algorithms import Algorithm, ServerState
from fedmira.config import Config
from fedmira.evaluation import Evaluator, TokenLoss
from fedmira.graphs import Graph
from fedmira.messages import ClientId, Payload
from fedmira.rounds.checkpoint import Checkpoint, save_checkpoint
from fedmira.rounds.loop import RoundOutcome
from fedmira.rounds.run_folder import RunFolder

__all__ = ["Best", "Progress", "Recorder"]

Progress = Callable[[str, Mapping[str, Any]], None]
"""(what happened, figures): "evaluate" or "round"."""

_SMALL_PULL = 1e-3


@dataclass(frozen=True, slots=True)
class Best:
    """A client's best round by its own validation rows, with its test loss in that round."""

    round: int
    validation_loss: float
    test_loss: float


@dataclass
class Recorder:
    """Observes the round loop and writes the run folder; everything it must remember is in the checkpoint.

    Attributes:
        uploaded: each client's last adapter before alignment.
        best_adapters, best: each client's adapter at its lowest validation loss, and the figures of that round.
        rounds_trained: rounds in which each client's reply was used.
        ever_moved: whether alignment has moved any adapter so far.
        base_losses: test losses before round 1; `latest`: those of round `latest_round`.
    """

    config: Config
    folder: RunFolder
    algorithm: Algorithm
    evaluator: Evaluator
    memories: Callable[[], Mapping[ClientId, Payload]]
    progress: Progress
    uploaded: dict[ClientId, Adapter] = field(default_factory=dict)
    best_adapters: dict[ClientId, Adapter] = field(default_factory=dict)
    best: dict[ClientId, Best] = field(default_factory=dict)
    rounds_trained: dict[ClientId, int] = field(default_factory=dict)
    ever_moved: bool = False
    warned: bool = False
    graph: Graph | None = None
    figures: dict[str, float] = field(default_factory=dict)
    base_losses: dict[ClientId, TokenLoss] = field(default_factory=dict)
    latest: dict[ClientId, TokenLoss] = field(default_factory=dict)
    latest_round: int = -1

    def begin(self, state: ServerState) -> None:
        """Evaluate the start adapters (the base model) and write the checkpoint of round 0."""
        self.folder.append_events(self._evaluate(0, state))
        self.base_losses = dict(self.latest)
        self._checkpoint(0, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up where a checkpoint stopped."""
        values: Any = checkpoint.values
        self.uploaded, self.best_adapters = dict(checkpoint.uploaded), dict(checkpoint.best)
        self.best = {client: Best(**entry) for client, entry in values["best"].items()}
        self.rounds_trained = dict(values["rounds_trained"])
        self.ever_moved, self.warned, self.figures = values["ever_moved"], values["warned"], dict(values["figures"])
        self.latest = {client: TokenLoss(*loss) for client, loss in values["latest"].items()}
        self.base_losses = {client: TokenLoss(*loss) for client, loss in values["base_losses"].items()}
        self.latest_round = values["latest_round"]
        if values["graph"]:
            self.folder.write_json("graph.json", values["graph"])
            self.graph = _graph_of(values["graph"])
        self.folder.cut_back(values["sizes"])

    def on_round(self, outcome: RoundOutcome) -> None:
        """Write down a round; called by the loop."""
        number, state = outcome.round, outcome.combined.state
        for reply in outcome.replies:
            self.uploaded[reply.client_id] = reply.payload.tensors["adapter"]
            self.rounds_trained[reply.client_id] = self.rounds_trained.get(reply.client_id, 0) + 1
        events = [*self._train_events(outcome), *self._align_events(outcome), *_failure_events(outcome)]
        begun = time.perf_counter()
        every = self.config.evaluation.every
        if outcome.replies and (number == self.config.rounds.count or (every and number % every == 0)):
            events += self._evaluate(number, state)
            evaluated = time.perf_counter() - begun
        else:
            evaluated = 0.0
        events.append(self._round_event(outcome))
        self.folder.append_events(events)
        if not outcome.replies:
            return
        row = self._row(outcome, evaluated)
        self.folder.append_round(row)
        self._note_graph(outcome)
        self._checkpoint(number, state)
        self.progress("round", row)

    def _train_events(self, outcome: RoundOutcome) -> list[dict[str, object]]:
        sent = {request.client_id: request.payload for request in outcome.requests}
        return [
            {
                "event": "train",
                "round": outcome.round,
                "client": reply.client_id,
                "loss": reply.metrics["loss"],
                "first_loss": reply.metrics["first_loss"],
                "last_loss": reply.metrics["last_loss"],
                "steps": int(reply.metrics["steps"]),
                "response_tokens": int(reply.metrics["response_tokens"]),
                "tokens": int(reply.metrics["tokens"]),
                "rows": reply.num_examples,
                "bytes_down": sent[reply.client_id].num_bytes,
                "bytes_up": reply.payload.num_bytes,
                "loaded_hash": digest(sent[reply.client_id].tensors["adapter"]),
                "sent_hash": digest(reply.payload.tensors["adapter"]),
            }
            for reply in outcome.replies
        ]

    def _align_events(self, outcome: RoundOutcome) -> list[dict[str, object]]:
        diagnostics = outcome.combined.diagnostics
        events: list[dict[str, object]] = []
        for reply in outcome.replies:
            figures = diagnostics.clients.get(reply.client_id, {})
            self.ever_moved = self.ever_moved or figures.get("relative_pull", 0.0) > 0
            saved = digest(self.algorithm.adapter_for(outcome.combined.state, reply.client_id))
            events.append({"event": "align", "round": outcome.round, "client": reply.client_id, **figures, "saved_hash": saved})
        pulls = [figures["relative_pull"] for figures in diagnostics.clients.values() if figures.get("relative_pull", 0.0) > 0]
        if pulls and max(pulls) < _SMALL_PULL and not self.warned:
            self.warned = True
            message = f"alignment moves adapters by at most {max(pulls):.2%} of their update a round: this is close to local training"
            events.append({"event": "warning", "round": outcome.round, "message": message})
        return events

    def _round_event(self, outcome: RoundOutcome) -> dict[str, object]:
        figures = {name: value for name, value in outcome.combined.diagnostics.round.items() if math.isfinite(value)}
        timing = {"train_seconds": outcome.train_seconds, "combine_seconds": outcome.combine_seconds}
        counts = {"replies": len(outcome.replies), "failures": len(outcome.failures)}
        return {"event": "round", "round": outcome.round, **figures, **timing, **counts}

    def _evaluate(self, number: int, state: ServerState) -> list[dict[str, object]]:
        """Test and validation loss of every client with the adapter it would be given now."""
        adapters = {client: self.algorithm.adapter_for(state, client) for client in self.evaluator.clients}
        test = self.evaluator.losses(adapters, "test")
        validation = self.evaluator.losses(adapters, "validation")
        self.latest, self.latest_round = test, number
        events: list[dict[str, object]] = []
        for client, loss in test.items():
            own = validation[client].per_token if client in validation else None
            if own is not None and math.isfinite(own) and (client not in self.best or own < self.best[client].validation_loss):
                self.best[client] = Best(number, own, loss.per_token)
                self.best_adapters[client] = adapters[client]
            events.append(
                {
                    "event": "evaluate",
                    "round": number,
                    "client": client,
                    "test_loss": _finite(loss.per_token),
                    "validation_loss": _finite(own),
                    "test_tokens": loss.tokens,
                }
            )
        self.progress("evaluate", {"round": number, "test_loss": sum(loss.per_token for loss in test.values()) / len(test)})
        return events

    def _row(self, outcome: RoundOutcome, evaluated: float) -> dict[str, object]:
        replies, diagnostics = outcome.replies, outcome.combined.diagnostics
        losses = [reply.metrics["loss"] for reply in replies]
        counts = [reply.metrics["response_tokens"] for reply in replies]
        test = list(self.latest.values()) if evaluated else []
        total = sum(test, TokenLoss())
        pulls = [figures["pull"] for figures in diagnostics.clients.values() if "pull" in figures]
        return {
            "round": outcome.round,
            "clients": len(replies),
            "train_loss": sum(losses) / len(losses),
            "train_loss_weighted": sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts),
            "test_loss": sum(loss.per_token for loss in test) / len(test) if test else "",
            "test_loss_weighted": total.per_token if test else "",
            "disagreement_before": diagnostics.round.get("disagreement_before", ""),
            "disagreement_after": diagnostics.round.get("disagreement_after", ""),
            "pull": sum(pulls) / len(pulls) if pulls else "",
            "train_seconds": round(outcome.train_seconds, 4),
            "evaluate_seconds": round(evaluated, 4),
            "tokens_per_second": round(sum(counts) / outcome.train_seconds, 1),
            "bytes_up": sum(reply.payload.num_bytes for reply in replies),
            "bytes_down": sum(request.payload.num_bytes for request in outcome.requests),
        }

    def _note_graph(self, outcome: RoundOutcome) -> None:
        diagnostics = outcome.combined.diagnostics
        if diagnostics.graph is None:
            return
        self.graph = diagnostics.graph
        self.figures = {name: value for name, value in diagnostics.round.items() if math.isfinite(value)}
        self.folder.write_json("graph.json", self._graph_document(outcome.round))

    def _graph_document(self, number: int) -> dict[str, object] | None:
        if self.graph is None:
            return None
        edges = [{"source": source, "target": target, "weight": weight} for source, target, weight in self.graph.edges()]
        return {"kind": self.graph.kind, "round": number, **self.figures, "clients": list(self.graph.clients), "edges": edges}

    def _checkpoint(self, number: int, state: ServerState) -> None:
        values = {
            "best": {
                client: {"round": best.round, "validation_loss": best.validation_loss, "test_loss": best.test_loss}
                for client, best in self.best.items()
            },
            "rounds_trained": self.rounds_trained,
            "ever_moved": self.ever_moved,
            "warned": self.warned,
            "figures": self.figures,
            "latest": {client: [loss.total, loss.tokens] for client, loss in self.latest.items()},
            "latest_round": self.latest_round,
            "base_losses": {client: [loss.total, loss.tokens] for client, loss in self.base_losses.items()},
            "graph": self._graph_document(number),
            "sizes": self.folder.sizes(),
        }
        save_checkpoint(self.folder.checkpoint, Checkpoint(number, state, self.memories(), self.uploaded, self.best_adapters, values))


def _graph_of(document: Mapping[str, Any]) -> Graph:
    """The graph that `Recorder._graph_document` wrote."""
    clients = tuple(document["clients"])
    row = {client: k for k, client in enumerate(clients)}
    weights = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    for edge in document["edges"]:
        k, other = row[edge["source"]], row[edge["target"]]
        weights[k, other] = weights[other, k] = edge["weight"]
    return Graph(document["kind"], clients, weights)


def _failure_events(outcome: RoundOutcome) -> list[dict[str, object]]:
    return [
        {"event": "failure", "round": outcome.round, "client": failure.client_id, "stage": failure.stage, "reason": failure.reason}
        for failure in outcome.failures
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
