"""What a run will cost and whether its alignment can act, computed before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedmira.adapters.directions import movement
from fedmira.algorithms import Start, Trained
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
        adapter, targets: what an adapter is in a few words, and the layers that carry a LoRA branch.
        adapter_parameters, adapter_parameters_least: of a client's adapter, at the largest and the smallest rank.
        trained_parameters: of the largest adapter, those that local training moves; some methods freeze a part.
        download_mib, upload_mib: what travels to and from one client in round 1, measured on real payloads; of the client with the most.
        run_download_mib, run_upload_mib: the same over all clients and rounds, if every round is as the first; on average over draws.
        dtype: number types of what travels.
        local_steps: optimizer steps of a client with the most rows in one round.
        max_degree, largest_step: of a fixed graph: its largest degree and the largest server step that never overshoots (None without an
            edge); both None for a learned graph.
    """

    base: str
    parameters: int
    packed: bool
    adapter: str
    targets: int
    adapter_parameters: int
    adapter_parameters_least: int
    trained_parameters: int
    clients: int
    clients_per_round: int
    rounds: int
    local_steps: int
    base_mib: float
    cohort_mib: float
    server_mib: float
    download_mib: float
    upload_mib: float
    run_download_mib: float
    run_upload_mib: float
    dtype: str
    token_budget: int | None
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
            f"adapter: {self.adapter}, {self._parameters()} parameters a client{self._trained()}",
            f"travels in round 1: {self._most()}{self.download_mib:.4g} MiB down and {self.upload_mib:.4g} MiB up per client, "
            f"{self.dtype}; in all rounds, if they are like it: {self.run_download_mib:,.4g} MiB down, {self.run_upload_mib:,.4g} MiB up",
            f"rounds: {self.rounds} with {self.clients_per_round} of {self.clients} clients, at most {self.local_steps} local steps each",
            f"memory beside activations of {self.token_budget} tokens: cohort {self.cohort_mib:.1f} MiB; "
            f"disk for all adapters: {self.server_mib:.1f} MiB",
            graph,
        ]

    def _parameters(self) -> str:
        least, most = self.adapter_parameters_least, self.adapter_parameters
        return f"{most:,}" if least == most else f"{least:,} to {most:,}"

    def _trained(self) -> str:
        return "" if self.trained_parameters == self.adapter_parameters else f", of which {self.trained_parameters:,} are trained"

    def _most(self) -> str:
        return "" if self.adapter_parameters_least == self.adapter_parameters else "at most "


@dataclass(frozen=True, slots=True)
class _Traffic:
    """Bytes to and from one client in round 1, their number types, and how many parameters it trains."""

    down: int
    up: int
    trained: int
    dtypes: frozenset[str]


def make_plan(experiment: Experiment) -> Plan:
    """The plan of a built experiment."""
    config, base, ranks = experiment.config, experiment.base, experiment.ranks
    sizes = {client: sum(tensor.numel() for tensor in adapter.values()) for client, adapter in experiment.starts.items()}
    largest, per_round = max(sizes.values()), cohort_size(len(ranks), config.rounds)
    mib = 4 / 2**20
    graph = experiment.graph
    traffic = _traffic(experiment)
    most_down, most_up = (max(getattr(each, way) for each in traffic.values()) for way in ("down", "up"))
    mean_down, mean_up = (sum(getattr(traffic[rank], way) for rank in ranks.values()) / len(ranks) for way in ("down", "up"))
    exchanges = per_round * config.rounds.count
    bounds = None if graph.learned else graph_bounds(graph.graph(graph.initial(tuple(ranks)), tuple(ranks)))
    return Plan(
        base=base.name,
        parameters=base.num_parameters,
        packed=experiment.kind.packed,
        adapter=experiment.kind.summary,
        targets=len(experiment.targets),
        adapter_parameters=largest,
        adapter_parameters_least=min(sizes.values()),
        trained_parameters=max(each.trained for each in traffic.values()),
        clients=len(ranks),
        clients_per_round=per_round,
        rounds=config.rounds.count,
        local_steps=max(count_steps(party.train_rows, config.local) for party in experiment.parties.values()),
        base_mib=sum(p.numel() * p.element_size() for p in base.model.parameters()) / 2**20,
        cohort_mib=min(per_round, 64) * largest * 4 * mib,
        server_mib=sum(sizes.values()) * mib,
        download_mib=most_down / 2**20,
        upload_mib=most_up / 2**20,
        run_download_mib=mean_down * exchanges / 2**20,
        run_upload_mib=mean_up * exchanges / 2**20,
        dtype="+".join(sorted({kind for each in traffic.values() for kind in each.dtypes})) or "nothing",
        token_budget=experiment.token_budget,
        max_degree=bounds.max_degree if bounds else None,
        largest_step=bounds.largest_convex_step if bounds else None,
    )


def _traffic(experiment: Experiment) -> dict[int, _Traffic]:
    """Rank -> what travels and trains in round 1, from the payloads that the algorithm itself makes for an adapter that did not move.

    Training along random directions sends a number for each direction that was drawn: here as many as there are steps, the most that there
    can be.
    """
    algorithm, local = experiment.algorithm, experiment.config.local
    state = algorithm.initial_state(experiment.starts)
    rows = {client: party.train_rows for client, party in experiment.parties.items()}
    found = {}
    for rank in sorted(set(experiment.ranks.values())):
        client = max((name for name in experiment.ranks if experiment.ranks[name] == rank), key=lambda name: (rows[name], name))
        request = algorithm.instruct(state, client)
        steps = count_steps(rows[client], local)
        moved = movement({seed: 1.0 for seed in range(min(steps, local.zeroth_seeds))}) if local.optimizer == "zeroth-order" else None
        start = algorithm.begin(request, None)
        reply, _ = algorithm.finish(request, None, Trained(start.adapter, rows[client], steps, local.learning_rate, moved))
        kinds = frozenset(kind for payload in (request, reply) for kind in payload.dtype.split("+") if kind)
        found[rank] = _Traffic(request.num_bytes, reply.num_bytes, _trained_parameters(start), kinds)
    return found


def _trained_parameters(start: Start) -> int:
    """Entries of the adapter whose gradient the method lets through."""
    ones = {name: torch.ones_like(tensor) for name, tensor in start.adapter.items()}
    let_through = start.hook(ones, start.adapter) if start.hook else ones
    return sum(int(tensor.count_nonzero()) for tensor in let_through.values())
