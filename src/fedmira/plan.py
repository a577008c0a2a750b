"""What a run will cost and whether its alignment can act, computed before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

from fedmira.experiment import Experiment
from fedmira.graphs import graph_bounds
from fedmira.model import count_steps
from fedmira.rounds import cohort_size

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Figures of a run that has not begun.

    Attributes:
        base_mib, cohort_mib: memory of the frozen base, and of the stacked adapters, gradients and moments of a round's clients.
        server_mib: disk that all clients' adapters take on the server; in memory there are a round's and a bounded cache.
        upload_mib: float32 MiB of one client, one way, at the largest rank.
        local_steps: optimizer steps of a client with the most rows in one round.
        max_degree, largest_step: of a fixed graph: its largest degree and the largest server step that never overshoots (None without an
            edge); both None for a learned graph.
    """

    base: str
    parameters: int
    packed: bool
    targets: int
    adapter_parameters: int
    clients: int
    clients_per_round: int
    rounds: int
    local_steps: int
    base_mib: float
    cohort_mib: float
    server_mib: float
    upload_mib: float
    token_budget: int
    max_degree: float | None
    largest_step: float | None

    def lines(self) -> list[str]:
        """The same for people."""
        graph = "graph: learned in the run; rows of its mixing matrix are convex, so every coupling within 0..1 is stable"
        if self.max_degree is not None and self.largest_step is None:
            graph = "graph: no edge between any two clients"
        elif self.max_degree is not None:
            graph = f"graph: largest degree {self.max_degree:.3g}; server steps up to {self.largest_step:.3g} never overshoot (coupling 1)"
        return [
            f"base: {self.base}, {self.parameters:,} parameters, {self.base_mib:.1f} MiB, {'packed' if self.packed else 'padded'} steps",
            f"adapter: {self.targets} layers, {self.adapter_parameters:,} parameters, {self.upload_mib:.2f} MiB float32 each way "
            "per client and round",
            f"rounds: {self.rounds} with {self.clients_per_round} of {self.clients} clients, at most {self.local_steps} local steps each",
            f"memory beside activations of {self.token_budget} tokens: cohort {self.cohort_mib:.1f} MiB; "
            f"disk for all adapters: {self.server_mib:.1f} MiB",
            graph,
        ]


def make_plan(experiment: Experiment) -> Plan:
    """The plan of a built experiment."""
    config, base, ranks = experiment.config, experiment.base, experiment.ranks
    sizes = {client: sum(tensor.numel() for tensor in adapter.values()) for client, adapter in experiment.starts.items()}
    largest, per_round = max(sizes.values()), cohort_size(len(ranks), config.rounds)
    mib = 4 / 2**20
    graph = experiment.graph
    bounds = None if graph.learned else graph_bounds(graph.graph(graph.initial(tuple(ranks)), tuple(ranks)))
    return Plan(
        base=base.name,
        parameters=base.num_parameters,
        packed=base.packed,
        targets=len(experiment.targets),
        adapter_parameters=largest,
        clients=len(ranks),
        clients_per_round=per_round,
        rounds=config.rounds.count,
        local_steps=max(count_steps(len(client.train), config.local) for client in experiment.dataset.clients),
        base_mib=sum(p.numel() * p.element_size() for p in base.model.parameters()) / 2**20,
        cohort_mib=min(per_round, 64) * largest * 4 * mib,
        server_mib=sum(sizes.values()) * mib,
        upload_mib=largest * mib,
        token_budget=experiment.evaluator.token_budget,
        max_degree=bounds.max_degree if bounds else None,
        largest_step=bounds.largest_convex_step if bounds else None,
    )
