"""What a method is: settings, and pure functions over values in a server half and a client half."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from pydantic import PrivateAttr
from torch import Tensor

from fedmira.adapters import Adapter, replaced
from fedmira.config.methods import MethodSection, Need
from fedmira.errors import RunError
from fedmira.graphs import Graph
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.context import MethodContext, require_one_rank

__all__ = [
    "Blend",
    "Combined",
    "Diagnostics",
    "GradientHook",
    "Method",
    "ServerState",
    "Settle",
    "Start",
    "Trained",
]

GradientHook = Callable[[Adapter, Adapter], Adapter]
"""(gradient, parameters) -> the gradient to step with, at every local step."""

Settle = Callable[[Adapter], Adapter]
"""Parameters as a local step left them -> those that are to be others, by name."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """All that the server remembers between rounds; the checkpoint is this value.

    >>> from fedmira.methods import ServerState
    >>> state = ServerState({"shared": {}})
    >>> list(state.adapters), dict(state.numbers)
    (['shared'], {})

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
    """The new state and what was done to get there.

    >>> from fedmira.methods import Combined, ServerState
    >>> Combined(ServerState({})).diagnostics.expects_motion
    frozenset()

    Attributes:
        state: what the server remembers from now on.
        diagnostics: for the log and for the loop's check.
    """

    state: ServerState
    diagnostics: Diagnostics = Diagnostics()


@dataclass(frozen=True, slots=True)
class Blend:
    """A start that is made of several adapters once they have been measured.

    The client measures them on its own validation rows.

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
        adapter: what is trained.
        hook: changes each step's gradient; None leaves it as it is.
        alternatives: what it may begin with in place of `adapter`, as `Method.alternatives`
            names them. Its own validation rows choose.
        blend: what `adapter` is blended with before training, where the client has validation rows;
            not beside alternatives.
        settle: puts parameters in their places after each step, for a part that follows from
            others; None leaves all as the step left them.
        squares: whether training adds up the squares of its gradients, for `Trained.squares`.
        learned: asked behind the last step, what the hooks have learned beside the adapter, for
            `Trained.learned`; None where they learn nothing.
    """

    adapter: Adapter
    hook: GradientHook | None = None
    alternatives: Mapping[float, Adapter] = field(default_factory=dict)
    blend: Blend | None = None
    settle: Settle | None = None
    squares: bool = False
    learned: Callable[[], Mapping[str, float]] | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """What local training hands to `finish`.

    Attributes:
        adapter: after the last local step.
        num_examples: training rows of the client.
        num_steps: local steps that were made.
        learning_rate: of local training.
        movement: of zeroth-order training, the whole way from the start as seeds and coefficients
            (`fedmira.adapters.directions`).
        losses: what was measured for `Start.blend`; empty where nothing was.
        squares: where `Start.squares` asks for it, the sum over all batches of |b| / n times the
            squared gradient of a batch's mean loss, n the client's rows; before hooks and clipping.
        learned: what `Start.learned` told; empty where there is none.
    """

    adapter: Adapter
    num_examples: int
    num_steps: int
    learning_rate: float
    movement: Adapter | None = None
    losses: tuple[float, ...] = ()
    squares: Adapter | None = None
    learned: Mapping[str, float] = field(default_factory=dict)


class Method(MethodSection, ABC):
    """A federated method: its fields are its settings, and it has both halves.

    Every half is a pure function: it trains, sends and draws nothing, and changes none of its
    arguments. The server half may read `context`, the client half may not, since a client on a
    machine of its own knows no others.

    `combine` is the server's step, and `gradient` changes a client's local steps:

    >>> import fedmira
    >>> class Half(fedmira.methods.Local):
    ...     pull: float = fedmira.setting(0.5, ge=0, le=1, help="share of the way to the mean")
    ...
    ...     def combine(self, state, replies):
    ...         return fedmira.methods.Combined(state)
    ...
    ...     def gradient(self, gradient, adapter, start):
    ...         return gradient
    >>> Half(pull=0.25).name, Half().pull
    ('half', 0.5)
    """

    _context: MethodContext | None = PrivateAttr(default=None)

    @property
    def context(self) -> MethodContext:
        """The federation that the method was built for.

        Raises:
            RuntimeError: it was built for none, or this is the client half on a client's machine.
        """
        if self._context is None:
            raise RuntimeError(
                f"{self.name}: no federation is known here; the server half runs on what "
                "for_federation returns, and the client half must not ask for the federation"
            )
        return self._context

    def for_federation(self, context: MethodContext) -> Self:
        """The same method, built for these clients.

        Args:
            context: the clients, their rows and ranks, and the graph.

        Raises:
            ConfigError: the settings cannot work on this federation.
        """
        bound = self.model_copy()
        bound._context = context
        if Need.ONE_RANK in self.needs:
            require_one_rank(self.name, context)
        bound.check()
        return bound

    @property
    def returned(self) -> tuple[str, ...]:
        """Parts and numbers that every reply must have beside its adapter; by default none.

        A reply without one, or with one in another form than that of the request, is a failure.
        """
        return ()

    def check(self) -> None:
        """Refuses a federation that the settings cannot work on; by default it refuses none.

        Raises:
            ConfigError: what is wrong, with the next step.
        """

    @property
    def aligns(self) -> bool:
        """Whether alignment is switched on; then a run that never pulls a client is an error."""
        return False

    @property
    def may_decline(self) -> bool:
        """Whether clients choose by validation rows among the adapter and `alternatives`."""
        return False

    @abstractmethod
    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The state before round 1.

        Args:
            starts: each client's start adapter: the common one, cut to the client's rank.
        """

    @abstractmethod
    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """What the server sends this client; its "adapter" is where local training starts.

        Args:
            state: of the server; it is not changed.
            client: its id.
        """

    @abstractmethod
    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """The next state.

        Args:
            state: the one before; it is not changed.
            replies: of the round's clients, sorted by client id and not empty.
        """

    @abstractmethod
    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """The adapter that is evaluated and saved for this client unless it takes another.

        Args:
            state: of the server; it is not changed.
            client: its id.
        """

    def totals(self, state: ServerState) -> Mapping[str, float]:
        """Figures of a whole run, for `method` of run.json; by default there are none.

        Args:
            state: of the server at the end; it is not changed.
        """
        return {}

    def joined(
        self,
        state: ServerState,
        starts: Mapping[ClientId, Adapter],
        newcomers: Sequence[ClientId],
    ) -> ServerState:
        """The state once newcomers have come; asked of the method that was built with them.

        By default a newcomer has what it would have had in `initial_state`, and all else stays: an
        own adapter begins from the common start, and what is common is as it was learned. Tensors
        with an entry or a row for each client grow at their end. It is asked where
        `takes_newcomers` says so.

        Args:
            state: before they came; it is not changed.
            starts: each client's start adapter, newcomers among them.
            newcomers: who has come, the last ones of the context's clients.
        """
        fresh = self.initial_state(starts)
        new = {name: each for name, each in fresh.adapters.items() if name not in state.adapters}
        numbers = {
            name: _grown(tensor, fresh.numbers[name]) if name in fresh.numbers else tensor
            for name, tensor in state.numbers.items()
        }
        return ServerState(replaced(state.adapters, new), numbers)

    def alternatives(self, own: Adapter, aligned: Adapter) -> Mapping[float, Adapter]:
        """What a client may have in place of what the server made of its adapter.

        Args:
            own: the adapter that the client last sent.
            aligned: what the server made of it.

        Returns:
            Share of the server's change that is left, 0 or more and below 1 -> adapter, by falling
            share; the last one is what a client without validation rows takes. Empty where the
            server changed nothing, or clients may not decline.
        """
        return {}

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """On the client: where local training starts; by default from the adapter in the payload.

        Args:
            payload: what the server sent.
            memory: what the client kept for itself after its last round, None where there is
                nothing.
        """
        return Start(payload.tensors["adapter"])

    def gradient(self, gradient: Adapter, adapter: Adapter, start: Adapter) -> Adapter:
        """On the client, at every local step: the gradient to step with.

        It is called only where a method overrides it.

        Args:
            gradient: of the loss of the batch, by parameter name.
            adapter: the parameters as they are at this step.
            start: the parameters that local training began with.
        """
        return gradient

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """On the client: what goes back to the server, and what the client keeps for itself.

        By default the trained adapter goes back and nothing is kept.

        Args:
            payload: what the server sent.
            memory: what the client kept after its last round.
            trained: what local training made of the start.
        """
        return Payload({"adapter": trained.adapter}), None

    def started(self, payload: Payload, memory: Payload | None) -> Start:
        """`begin`, with `gradient` in its hook where the method overrides it; what clients call.

        Args:
            payload: what the server sent.
            memory: the client's private one, None in its first round.

        Raises:
            RunError: one of the two returned something else than it must.
        """
        start = self.begin(payload, memory)
        if not isinstance(start, Start):
            raise self._wrong("begin", start, "a fedmira.methods.Start")
        if type(self).gradient is Method.gradient:
            return start
        inner, own = start.hook, self.gradient
        where: dict[str, Tensor] = {}  # the start on the device of the gradient

        def hook(gradient: Adapter, adapter: Adapter) -> Adapter:
            for name in gradient.keys() - where.keys():
                where[name] = start.adapter[name].to(gradient[name].device)
            made = own(inner(gradient, adapter) if inner else gradient, adapter, where)
            if not isinstance(made, Mapping) or made.keys() != gradient.keys():
                raise self._wrong(
                    "gradient", made, "a dict with the parameter names of the gradient, all of them"
                )
            return made

        return replace(start, hook=hook)

    def finished(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """`finish`, with what it returned looked at; what clients call.

        Args:
            payload: what the server sent.
            memory: what the client kept of its last round, or None.
            trained: what local training made.

        Raises:
            RunError: it returned something else than it must.
        """
        made = self.finish(payload, memory, trained)
        if (
            not isinstance(made, tuple)
            or len(made) != 2
            or not isinstance(made[0], Payload)
            or not isinstance(made[1], Payload | None)
        ):
            raise self._wrong("finish", made, "(Payload, Payload or None)")
        return made

    def combined(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """`combine`, with what it returned looked at; what the loop calls.

        Args:
            state: that of the server before the round.
            replies: those of the clients that took part.

        Raises:
            RunError: it returned something else than it must.
        """
        made = self.combine(state, replies)
        if not isinstance(made, Combined):
            raise self._wrong("combine", made, "a fedmira.methods.Combined")
        return made

    def _wrong(self, half: str, made: object, wanted: str) -> RunError:
        told = type(made).__name__
        if isinstance(made, Mapping | tuple):
            inner = [each if isinstance(each, str) else type(each).__name__ for each in made]
            told += f" of {', '.join(inner[:4])}{' ...' if len(inner) > 4 else ''}"
        return RunError(f"{self.name}: {half} returned {told}; must return {wanted}")


def _grown(tensor: Tensor, fresh: Tensor) -> Tensor:
    """A tensor with the further rows and columns of a fresh one; as it is where it has all."""
    if tensor.ndim == 0 or not any(map(int.__lt__, tensor.shape, fresh.shape)):
        return tensor
    grown = fresh.clone()
    grown[tuple(map(slice, tensor.shape))] = tensor
    return grown
