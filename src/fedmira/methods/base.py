"""What an algorithm is: pure functions over values, a server half and a client half."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.graphs import Graph
from fedmira.messages import ClientId, Payload, Reply

__all__ = [
    "Algorithm",
    "Blend",
    "Combined",
    "Diagnostics",
    "GradientHook",
    "PlainClient",
    "ServerState",
    "Start",
    "Trained",
]

GradientHook = Callable[[Adapter, Adapter], Adapter]
"""(gradient, parameters) -> the gradient to step with, at every local step."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """All that the server remembers between rounds; the checkpoint is this value.

    Attributes:
        adapters: by client id, or by a name of the algorithm's own such as "shared". In a run they
            lie on disk: change them with `fedmira.adapters.replaced`, and read one at a time.
        numbers: small tensors such as the learned graph or the round each client last trained in.
    """

    adapters: Mapping[str, Adapter]
    numbers: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """What a combine step did, for the log.

    Attributes:
        round: numbers of the whole round: server_step (gamma), max_degree, disagreement_before and
            _after, guarded (1 if gamma was cut).
        clients: per client of the round: pull (share of the way to the neighbours' mean),
            relative_pull (|moved| / |update|), degree.
        graph: the graph that acted, or None.
        expects_motion: clients that must have moved because a neighbour that differs pulls on them;
            the loop checks it.
    """

    round: Mapping[str, float] = field(default_factory=dict)
    clients: Mapping[ClientId, Mapping[str, float]] = field(default_factory=dict)
    graph: Graph | None = None
    expects_motion: frozenset[ClientId] = frozenset()


@dataclass(frozen=True, slots=True)
class Combined:
    """The new state and what was done to get there."""

    state: ServerState
    diagnostics: Diagnostics = Diagnostics()


@dataclass(frozen=True, slots=True)
class Blend:
    """A start that is made of several adapters once they have been measured on the client's own validation rows.

    Attributes:
        candidates: adapters of others, of the client's rank.
        into: (loss per response token of the start's own adapter and of each candidate) -> the
            adapter to begin with.
    """

    candidates: Sequence[Adapter]
    into: Callable[[Sequence[float]], Adapter]


@dataclass(frozen=True, slots=True)
class Start:
    """What a client begins local training with.

    Attributes:
        alternatives: what it may begin with in place of `adapter`, as `Algorithm.alternatives`
            names them. Its own validation rows choose.
        blend: what `adapter` is blended with before training, where the client has validation rows;
            not beside alternatives.
    """

    adapter: Adapter
    hook: GradientHook | None = None
    alternatives: Mapping[float, Adapter] = field(default_factory=dict)
    blend: Blend | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """What local training hands to `finish`.

    Attributes:
        movement: of zeroth-order training, the whole way from the start as seeds and coefficients
            (`fedmira.adapters.directions`).
        losses: what was measured for `Start.blend`; empty where nothing was.
    """

    adapter: Adapter
    num_examples: int
    num_steps: int
    learning_rate: float
    movement: Adapter | None = None
    losses: tuple[float, ...] = ()


class Algorithm(Protocol):
    """Both halves of a federated algorithm; every method is a pure function."""

    @property
    def aligns(self) -> bool:
        """Whether alignment is switched on, so that a run in which no client is ever pulled is an error."""
        ...

    @property
    def may_decline(self) -> bool:
        """Whether clients choose by their own validation rows between what the server made of their adapter and `alternatives`."""
        ...

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The state before round 1, from each client's start adapter (the common one, cut to the client's rank)."""
        ...

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """What the server sends this client."""
        ...

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """The next state; `replies` are sorted by client id and not empty."""
        ...

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The adapter that is evaluated and saved for this client, unless it declines it for one of `alternatives`."""
        ...

    def alternatives(self, own: Adapter, aligned: Adapter) -> Mapping[float, Adapter]:
        """What a client may have in place of `aligned`, which the server made of `own`, the adapter that the client last sent.

        Returns:
            Share of the server's change that is left, 0 or more and below 1 -> adapter, by falling
            share; the last one is what a
            client without validation rows takes. Empty where the server changed nothing, or clients
            may not decline.
        """
        ...

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """On the client: where local training starts."""
        ...

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """On the client: what goes back to the server, and what the client keeps for itself."""
        ...


class PlainClient:
    """The client half of algorithms whose clients train from the adapter they are sent and send it back; no alignment, no choice."""

    @property
    def aligns(self) -> bool:
        """No."""
        return False

    @property
    def may_decline(self) -> bool:
        """No."""
        return False

    def alternatives(self, own: Adapter, aligned: Adapter) -> Mapping[float, Adapter]:
        """None."""
        return {}

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from the adapter in the payload."""
        return Start(payload.tensors["adapter"])

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the trained adapter; keep nothing."""
        return Payload({"adapter": trained.adapter}), None
