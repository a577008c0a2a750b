"""The one round loop: sample, instruct, exchange, combine; it knows no model and no transport."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from fedmira.clients import Clients
from fedmira.config import RoundsSettings
from fedmira.errors import AlignmentError, RoundError
from fedmira.messages import (
    ClientId,
    Failure,
    Reply,
    Request,
)
from fedmira.methods import Combined, Method, ServerState
from fedmira.rounds.complete import complete
from fedmira.rounds.sampling import sample_clients
from fedmira.rounds.screening import Screened
from fedmira.seeds import seed_for

__all__ = ["Grown", "RoundOutcome", "run_rounds"]

Sifter = Callable[[Sequence[Request], Sequence[Reply]], Screened]
"""(requests of a round, its replies) -> the replies that may be used."""


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """All that a round produced.

    Attributes:
        round: its number, from 1.
        requests: what the round's clients were asked, in the order of their ids.
        replies: the usable ones, in the order of client ids; empty where too few came.
        failures: of the other clients, in the order of their ids.
        notes: what the server did not believe of a reply that it used, a sentence each.
        combined: the new state of the server, and what was done.
        train_seconds: of the exchange.
        combine_seconds: of the server's step.
    """

    round: int
    requests: Sequence[Request]
    replies: Sequence[Reply]
    failures: Sequence[Failure]
    combined: Combined
    train_seconds: float
    combine_seconds: float
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Grown:
    """A run with newcomers in it: what takes the place of what the loop was given.

    Attributes:
        algorithm: the method, built for all clients.
        clients: ids of all clients.
        state: of the server, with the newcomers.
        screen: as the loop was given it, for all clients.
    """

    algorithm: Method
    clients: Sequence[ClientId]
    state: ServerState
    screen: Sifter | None


def run_rounds(  # noqa: PLR0913 - the loop meets all parts of a run here
    algorithm: Method,
    workers: Clients,
    state: ServerState,
    clients: Sequence[ClientId],
    settings: RoundsSettings,
    run_seed: int,
    on_round: Callable[[RoundOutcome], bool | None],
    first_round: int = 1,
    resting: Callable[[], Collection[ClientId]] = frozenset,
    screen: Sifter | None = None,
    admit: Callable[[int, ServerState], Grown | None] | None = None,
) -> ServerState:
    """Run the rounds `first_round` to `settings.count` and return the last state.

    Replies are sorted by client id before they are combined, so arrival order does not matter.

    Args:
        algorithm: the method, whose server half is called.
        workers: who trains.
        state: of the server before `first_round`.
        clients: ids of all clients.
        settings: of [rounds].
        run_seed: of the whole run.
        on_round: is called after every round, before the next begins; no further round begins once
            it returns True.
        first_round: counts from 1.
        resting: is asked before each round which clients are not to take part; a round is drawn
            from the others. The loop ends where there are none.
        screen: sorts out replies that are not to be used; None uses all.
        admit: is asked before each round, by its number and the state, whether clients have come;
            None where nobody can.

    Raises:
        RoundError: fewer clients of a round than `min_replies` sent a usable reply; failures of
            that round are passed to `on_round` first.
        AlignmentError: a client that must have moved did not.
    """
    for number in range(first_round, settings.count + 1):
        if admit is not None and (grown := admit(number, state)) is not None:
            algorithm, clients = grown.algorithm, grown.clients
            state, screen = grown.state, grown.screen
        away = frozenset(resting())
        present = [client for client in clients if client not in away] if away else clients
        if not present:
            return state
        chosen = sample_clients(present, settings, run_seed, number)
        requests = _requests(algorithm, state, chosen, run_seed, number)
        begun = time.perf_counter()
        answers = complete(requests, workers.train(requests), algorithm.returned)
        trained = time.perf_counter()
        replies, failures = _told_apart(answers)
        screened = screen(requests, replies) if screen else Screened(replies)
        replies, failures = _told_apart([*screened.replies, *failures, *screened.failures])
        if len(replies) < min(settings.min_replies, len(chosen)):
            on_round(
                RoundOutcome(
                    round=number,
                    requests=requests,
                    replies=(),
                    failures=failures,
                    combined=Combined(state),
                    train_seconds=trained - begun,
                    combine_seconds=0.0,
                )
            )
            reasons = "; ".join(
                f"{failure.client_id}: {failure.reason}" for failure in failures[:3]
            )
            needed = f"; rounds.min_replies is {settings.min_replies}" if replies else ""
            raise RoundError(
                f"round {number}: {len(replies) or 'none'} of {len(chosen)} clients sent a "
                f"usable reply ({reasons}){needed}; the adapters "
                f"of round {number - 1} are kept"
            )
        combined = algorithm.combined(state, replies)
        _check_motion(number, combined)
        state = combined.state
        outcome = RoundOutcome(
            round=number,
            requests=requests,
            replies=replies,
            failures=failures,
            combined=combined,
            train_seconds=trained - begun,
            combine_seconds=time.perf_counter() - trained,
            notes=screened.notes,
        )
        if on_round(outcome):
            break
    return state


def _requests(
    algorithm: Method,
    state: ServerState,
    chosen: Sequence[ClientId],
    run_seed: int,
    number: int,
) -> list[Request]:
    """What the round's clients are asked, in the order of their ids."""
    return [
        Request(
            client,
            number,
            seed_for(run_seed, "train", number, client),
            algorithm.instruct(state, client),
        )
        for client in chosen
    ]


def _told_apart(answers: Sequence[Reply | Failure]) -> tuple[list[Reply], list[Failure]]:
    """Replies and failures, each sorted by client id."""
    replies = [answer for answer in answers if isinstance(answer, Reply)]
    failures = [answer for answer in answers if isinstance(answer, Failure)]
    return (
        sorted(replies, key=lambda reply: reply.client_id),
        sorted(failures, key=lambda failure: failure.client_id),
    )


def _check_motion(number: int, combined: Combined) -> None:
    """Every client that a differing neighbour pulls on must have moved."""
    diagnostics = combined.diagnostics
    stuck = [
        client
        for client in sorted(diagnostics.expects_motion)
        if diagnostics.clients[client].get("relative_pull", 0.0) == 0.0
    ]
    if stuck:
        raise AlignmentError(
            f"round {number}: alignment is on but did not move {', '.join(stuck[:5])}; the "
            "pull is below float32's resolution: "
            "raise algorithm.coupling or algorithm.server_step"
        )
