"""What a run will cost and whether its alignment can act, computed before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedmira.adapters.directions import movement
from fedmira.experiment import Experiment
from fedmira.graphs import graph_bounds
from fedmira.messages import (
    ClientId,
    Payload,
    Reply,
    Volume,
)
from fedmira.methods import ServerState, Start, Trained
from fedmira.model import ATTENTION, count_steps, most_side_by_side
from fedmira.rounds import cohort_size, sample_clients
from fedmira.runs import trained_parameters
from fedmira.studies.notebook import html_table
from fedmira.wire import Line, encode

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Figures of a run that has not begun.

    Attributes:
        base: its name.
        parameters: of the base.
        packed: whether steps are packed.
        attention: how their attention runs, a name of `ATTENTION` as run.json has it.
        attention_in_windows: how it runs in layers with a window where rows are longer than that;
            "" where no layer has one.
        adapter, targets: what an adapter is in a few words, and the layers that carry a LoRA
            branch.
        adapter_parameters, adapter_parameters_least: of a client's adapter, at the largest and the
            smallest rank.
        trained_parameters: of the largest adapter, those that local training moves; some methods
            freeze a part.
        clients: how many there are.
        clients_per_round: how many are drawn for each round.
        rounds: how many the run has.
        local_steps: optimizer steps of a client with the most rows in one round.
        base_mib, cohort_mib: memory of the frozen base, and of the stacked adapters, gradients and
            moments of clients side by side.
        server_mib: disk that all clients' adapters take on the server; in memory there are a
            round's and a bounded cache.
        download_mib, upload_mib: what travels to and from one client in its first round, measured
            on real messages; of the client with the most.
        later_download_mib, later_upload_mib: the same in its next round; None where there is none,
            or it is not known.
        run_download_mib, run_upload_mib: over the clients of all rounds, as they will be drawn, if
            all answer; None where it is not known.
        run_unknown: why not; "" where it is known.
        dtype, later_dtype: number types of what travels in a client's first and next round.
        token_budget: most token positions in one forward pass, None where it is not known here.
        max_degree, largest_step: of a fixed graph: its largest degree and the largest server step
            that never overshoots (None without an edge); both None for a learned graph.
    """

    base: str
    parameters: int
    packed: bool
    attention: str
    attention_in_windows: str
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
    later_download_mib: float | None
    later_upload_mib: float | None
    run_download_mib: float | None
    run_upload_mib: float | None
    run_unknown: str
    dtype: str
    later_dtype: str | None
    token_budget: int | None
    max_degree: float | None
    largest_step: float | None

    def lines(self) -> list[str]:
        """The same for people."""
        graph = (
            "graph: learned in the run; rows of its mixing matrix are convex, so every coupling "
            "within 0..1 is stable"
        )
        if self.max_degree is not None and self.largest_step is None:
            graph = "graph: no edge between any two clients"
        elif self.max_degree is not None:
            graph = (
                f"graph: largest degree {self.max_degree:.3g}; server steps up to "
                f"{self.largest_step:.3g} never overshoot (coupling 1)"
            )
        return [
            f"base: {self.base}, {self.parameters:,} parameters, {self.base_mib:.1f} MiB, "
            f"{'packed' if self.packed else 'padded'} steps",
            f"attention: {ATTENTION[self.attention]}{self._in_windows()}",
            f"adapter: {self.adapter}, {self._parameters()} parameters a client{self._trained()}",
            "travels in a client's first round: "
            f"{self._volume(self.download_mib, self.upload_mib, self.dtype)}{self._later()}",
            f"travels in all rounds: {self._in_all()}",
            f"rounds: {self.rounds} with {self.clients_per_round} of {self.clients} "
            f"clients, at most {self.local_steps} local steps each",
            f"memory beside activations of {self.token_budget} tokens: cohort "
            f"{self.cohort_mib:.1f} MiB; "
            f"disk for all adapters: {self.server_mib:.1f} MiB",
            graph,
        ]

    def _repr_html_(self) -> str:
        """For notebooks: what `lines` tells, as a table."""
        parted = (line.partition(": ") for line in self.lines())
        return html_table(["", ""], ([name, told] for name, _, told in parted))

    def _in_windows(self) -> str:
        way = self.attention_in_windows
        return f"; in layers with a window {ATTENTION[way]}" if way else ""

    def _parameters(self) -> str:
        least, most = self.adapter_parameters_least, self.adapter_parameters
        return f"{most:,}" if least == most else f"{least:,} to {most:,}"

    def _trained(self) -> str:
        return (
            ""
            if self.trained_parameters == self.adapter_parameters
            else f", of which {self.trained_parameters:,} are trained"
        )

    def _volume(self, down: float, up: float, dtype: str) -> str:
        most = "" if self.adapter_parameters_least == self.adapter_parameters else "at most "
        return f"{most}{down:.4g} MiB down and {up:.4g} MiB up, {dtype}"

    def _later(self) -> str:
        if (
            self.later_download_mib is None
            or self.later_upload_mib is None
            or self.later_dtype is None
        ):
            return ""
        when = "in the next one" if self.run_unknown else "in each later one"
        volume = self._volume(self.later_download_mib, self.later_upload_mib, self.later_dtype)
        return f"; {when}: {volume}"

    def _in_all(self) -> str:
        if self.run_download_mib is None or self.run_upload_mib is None:
            return f"not known before training: {self.run_unknown}"
        return f"{self.run_download_mib:,.4g} MiB down, {self.run_upload_mib:,.4g} MiB up"


@dataclass(frozen=True, slots=True)
class _Exchange:
    """A client's request and its answer, as if training had not moved the adapter.

    Attributes:
        memory, line: what the client keeps for itself, and what both ends of its line hold
            afterwards.
    """

    down: Volume
    up: Volume
    start: Start
    reply: Reply
    memory: Payload | None
    line: Line

    def weighs_like(self, other: _Exchange) -> bool:
        """Whether as much travels."""
        return (self.down, self.up) == (other.down, other.up)


@dataclass(frozen=True, slots=True)
class _Traffic:
    """What travels: of each rank, a client's first round and its next one.

    Empty where there is none or it is not known.
    """

    first: Mapping[int, _Exchange]
    later: Mapping[int, _Exchange]
    unknown: str

    def most(self, which: Mapping[int, _Exchange], way: Literal["down", "up"]) -> float | None:
        """MiB of the client with the most; None where nothing is known."""
        return (
            max(getattr(each, way).num_bytes for each in which.values()) / 2**20 if which else None
        )

    def total(self, experiment: Experiment, way: Literal["down", "up"]) -> float | None:
        """MiB of all clients in all rounds, as they will be drawn; None where it is not known."""
        if self.unknown:
            return None
        config, ranks = experiment.config, experiment.ranks
        times: Counter[ClientId] = Counter()
        for number in range(1, config.rounds.count + 1):
            times.update(sample_clients(list(ranks), config.rounds, config.seed, number))
        total = 0
        for client, rounds in times.items():
            total += getattr(self.first[ranks[client]], way).num_bytes
            total += (
                (rounds - 1) * getattr(self.later[ranks[client]], way).num_bytes
                if rounds > 1
                else 0
            )
        return total / 2**20


def make_plan(experiment: Experiment) -> Plan:
    """The plan of a built experiment."""
    config, base, ranks = experiment.config, experiment.base, experiment.ranks
    sizes = {
        client: sum(tensor.numel() for tensor in adapter.values())
        for client, adapter in experiment.starts.items()
    }
    largest, per_round = max(sizes.values()), cohort_size(len(ranks), config.rounds)
    mib = 4 / 2**20
    graph = experiment.graph
    traffic = _traffic(experiment)
    bounds = (
        None
        if graph.learned
        else graph_bounds(graph.graph(graph.initial(tuple(ranks)), tuple(ranks)))
    )
    return Plan(
        base=base.name,
        parameters=base.num_parameters,
        packed=experiment.kind.packed,
        attention=base.attention if experiment.kind.packed else "own",
        attention_in_windows=base.attention_in_windows if experiment.kind.packed else "",
        adapter=experiment.kind.summary,
        targets=len(experiment.targets),
        adapter_parameters=largest,
        adapter_parameters_least=min(sizes.values()),
        trained_parameters=max(trained_parameters(each.start) for each in traffic.first.values()),
        clients=len(ranks),
        clients_per_round=per_round,
        rounds=config.rounds.count,
        local_steps=max(
            count_steps(party.train_rows, config.local) for party in experiment.parties.values()
        ),
        base_mib=sum(p.numel() * p.element_size() for p in base.model.parameters()) / 2**20,
        cohort_mib=min(per_round, most_side_by_side(largest, base.device)) * largest * 4 * mib,
        server_mib=sum(sizes.values()) * mib,
        download_mib=traffic.most(traffic.first, "down") or 0.0,
        upload_mib=traffic.most(traffic.first, "up") or 0.0,
        later_download_mib=traffic.most(traffic.later, "down"),
        later_upload_mib=traffic.most(traffic.later, "up"),
        run_download_mib=traffic.total(experiment, "down"),
        run_upload_mib=traffic.total(experiment, "up"),
        run_unknown=traffic.unknown,
        dtype=_number_types(traffic.first),
        later_dtype=_number_types(traffic.later) if traffic.later else None,
        token_budget=experiment.token_budget,
        max_degree=bounds.max_degree if bounds else None,
        largest_step=bounds.largest_convex_step if bounds else None,
    )


def _traffic(experiment: Experiment) -> _Traffic:
    """What travels, from the algorithm's own messages for adapters that do not move.

    Training along random directions may send a number for each direction that was drawn: here as
    many as there are steps, the most that there can be.
    """
    config, ranks, parties = experiment.config, experiment.ranks, experiment.parties
    state = experiment.algorithm.initial_state(experiment.starts)
    largest = {
        rank: max(
            (client for client in ranks if ranks[client] == rank),
            key=lambda client: (parties[client].train_rows, client),
        )
        for rank in sorted(set(ranks.values()))
    }
    first = {rank: _exchange(experiment, state, client) for rank, client in largest.items()}
    if not all(
        _exchange(experiment, state, client, steps=0).weighs_like(first[rank])
        for rank, client in largest.items()
    ):
        return _Traffic(first, {}, "it depends on the directions that training draws")
    if config.algorithm.traffic_differs:
        return _Traffic(first, {}, f"it depends on {config.algorithm.traffic_differs}")
    if config.rounds.count == 1:
        return _Traffic(first, {}, "")
    if not config.algorithm.partly_sent:
        return _Traffic(
            first,
            {
                rank: _exchange(experiment, state, client, first[rank])
                for rank, client in largest.items()
            },
            "",
        )
    return _partly_sent_traffic(experiment, state, largest, first)


def _partly_sent_traffic(
    experiment: Experiment,
    state: ServerState,
    largest: Mapping[int, ClientId],
    first: Mapping[int, _Exchange],
) -> _Traffic:
    """The same where what travels may depend on the round and on who has trained before.

    One cohort answers in round 1 and in the last but one, and in that one also clients that begin
    in it. Where the last round then is as the second one was, and for a client that begins late as
    round 1 was, all rounds are.
    """
    combine, rounds = experiment.algorithm.combine, experiment.config.rounds
    size = cohort_size(len(experiment.ranks), rounds)
    cohort = list(dict.fromkeys([*largest.values(), *experiment.ranks]))[: max(size, len(largest))]
    late = [client for client in experiment.ranks if client not in cohort][:size]
    begun = {client: _exchange(experiment, state, client) for client in [*cohort, *late]}

    def answers(clients: Sequence[ClientId], number: int) -> list[Reply]:
        return [replace(begun[client].reply, round=number) for client in sorted(clients)]

    after_first = last = combine(state, answers(cohort, 1)).state
    later = {
        rank: _exchange(experiment, after_first, client, first[rank])
        for rank, client in largest.items()
    }
    if rounds.count > 2:
        last = combine(last, answers(cohort, rounds.count - 1)).state
    alike = all(
        _exchange(experiment, last, client).weighs_like(begun[client]) for client in late[:1]
    )
    if rounds.count > 2:
        last = combine(last, answers(late, rounds.count - 1)).state if late else last
        alike &= all(
            _exchange(experiment, last, client, later[rank]).weighs_like(later[rank])
            for rank, client in largest.items()
        )
    return _Traffic(first, later, "" if alike else "what travels changes in the course of the run")


def _exchange(
    experiment: Experiment,
    state: ServerState,
    client: ClientId,
    before: _Exchange | None = None,
    steps: int | None = None,
) -> _Exchange:
    """One exchange with a client.

    Args:
        before: its last one, None in its first round.
        steps: that it takes; None for as many as it will.
    """
    algorithm, local, party = (
        experiment.algorithm,
        experiment.config.local,
        experiment.parties[client],
    )
    request, memory = algorithm.instruct(state, client), before.memory if before else None
    down, line = _written(request, experiment.config.engine.wire, before.line if before else Line())
    start = algorithm.started(request, memory)
    taken = count_steps(party.train_rows, local) if steps is None else steps
    moved = (
        movement({seed: 1.0 for seed in range(min(taken, local.zeroth_seeds))})
        if local.optimizer == "zeroth-order"
        else None
    )
    measured = (
        (1.0,) * (1 + len(start.blend.candidates)) if start.blend and party.validation_rows else ()
    )
    trained = Trained(
        adapter=start.adapter,
        num_examples=party.train_rows,
        num_steps=taken,
        learning_rate=local.learning_rate,
        movement=moved,
        losses=measured,
    )
    reply, kept = algorithm.finished(request, memory, trained)
    up, line = _written(reply, experiment.config.engine.wire, line)
    return _Exchange(
        down=down,
        up=up,
        start=start,
        reply=Reply(client, 1, party.train_rows, reply),
        memory=kept,
        line=line,
    )


def _written(payload: Payload, wire: str, line: Line) -> tuple[Volume, Line]:
    """What a message takes, and the line after it.

    Adapters do not move, so both ends leave equal zeros unsent and share one line.
    """
    if wire == "float32":
        return Volume(payload.num_bytes, payload.dtype), line
    encoded, after = encode(payload, wire, line)
    return encoded.volume, after


def _number_types(exchanges: Mapping[int, _Exchange]) -> str:
    """The number types of all messages, joined with "+"."""
    volumes = [volume for each in exchanges.values() for volume in (each.down, each.up)]
    return (
        "+".join(sorted({kind for volume in volumes for kind in volume.dtype.split("+") if kind}))
        or "nothing"
    )
