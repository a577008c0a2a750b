"""What a round's outcome says, as lines of events.jsonl and a row of rounds.csv."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from fedmira.adapters import digest
from fedmira.data import ClientSummary
from fedmira.messages import (
    ClientId,
    Failure,
    Payload,
    Reply,
    Volume,
)
from fedmira.metrics import TokenLoss
from fedmira.rounds import RoundOutcome

__all__ = [
    "EventLine",
    "align_events",
    "evaluate_event",
    "failure_event",
    "join_event",
    "round_event",
    "round_row",
    "train_events",
]

EventLine = dict[str, object]
"""One JSON object of events.jsonl."""

_OF_SOME_METHODS = ("clip_share", "pull_kept", "memory_lost")


def train_events(outcome: RoundOutcome, sent_hashes: Mapping[ClientId, str]) -> list[EventLine]:
    """A line per reply.

    Args:
        outcome: of the round.
        sent_hashes: digest of the adapter that each client sent.
    """
    received = {request.client_id: request.payload for request in outcome.requests}
    return [
        {
            "event": "train",
            "round": outcome.round,
            "client": reply.client_id,
            **_figures(reply),
            **{name: reply.metrics[name] for name in _OF_SOME_METHODS if name in reply.metrics},
            "rows": reply.num_examples,
            "bytes_down": _down(received[reply.client_id], reply).num_bytes,
            "bytes_up": _up(reply).num_bytes,
            "dtype_down": _down(received[reply.client_id], reply).dtype,
            "dtype_up": _up(reply).dtype,
            "loaded_hash": digest(received[reply.client_id].tensors["adapter"]),
            "sent_hash": sent_hashes[reply.client_id],
        }
        for reply in outcome.replies
    ]


def _figures(reply: Reply) -> EventLine:
    """What a client tells of its training; of a private one its steps."""
    losses: EventLine = {
        name: reply.metrics[name]
        for name in ("loss", "first_loss", "last_loss")
        if name in reply.metrics
    }
    counts = {
        name: int(reply.metrics[name])
        for name in ("steps", "response_tokens", "tokens")
        if name in reply.metrics
    }
    return {**losses, **counts}


def align_events(outcome: RoundOutcome, saved_hash: Callable[[ClientId], str]) -> list[EventLine]:
    """A line per reply: what the server's step did to the client.

    Args:
        outcome: of the round.
        saved_hash: digest of the adapter that a client has after the step.
    """
    figures = outcome.combined.diagnostics.clients
    return [
        {
            "event": "align",
            "round": outcome.round,
            "client": reply.client_id,
            **figures.get(reply.client_id, {}),
            "saved_hash": saved_hash(reply.client_id),
        }
        for reply in outcome.replies
    ]


def failure_event(failure: Failure) -> EventLine:
    """What went wrong with one client."""
    return {
        "event": "failure",
        "round": failure.round,
        "client": failure.client_id,
        "stage": failure.stage,
        "reason": failure.reason,
    }


def join_event(
    number: int,
    party: ClientSummary,
    base: TokenLoss | None,
    test: TokenLoss | None,
    validation: TokenLoss | None,
) -> EventLine:
    """A client that came once the run had begun.

    Args:
        number: of the first round that it can train in.
        party: what it says of itself.
        base: the base's loss on its test rows; None where it has none, or did not answer.
        test, validation: of the adapter that it begins from.
    """
    losses = {"base_loss": base, "test_loss": test, "validation_loss": validation}
    return {
        "event": "join",
        "round": number,
        "client": party.client_id,
        "rows": party.train_rows,
        **{name: _finite(loss.per_token) for name, loss in losses.items() if loss is not None},
    }


def evaluate_event(
    number: int,
    client: ClientId,
    test: TokenLoss | None,
    validation: float | None,
    kept: float | None,
) -> EventLine:
    """A client's losses in an evaluated round; numbers that are not finite become null.

    Args:
        number: of the round, 0 for the base.
        client: its id.
        test: loss on the client's test rows; None where these are not looked at.
        validation: nats per response token of its validation rows, None where it has none.
        kept: the share of the server's pull in the adapter that was evaluated, where clients choose
            it.
    """
    return {
        "event": "evaluate",
        "round": number,
        "client": client,
        **({} if test is None else {"test_loss": _finite(test.per_token)}),
        "validation_loss": _finite(validation),
        **({} if test is None else {"test_tokens": test.tokens}),
        **({} if kept is None else {"pull_kept": kept}),
    }


def round_event(outcome: RoundOutcome) -> EventLine:
    """The line that closes a round."""
    figures = {
        name: value
        for name, value in outcome.combined.diagnostics.round.items()
        if math.isfinite(value)
    }
    timing = {"train_seconds": outcome.train_seconds, "combine_seconds": outcome.combine_seconds}
    counts = {"replies": len(outcome.replies), "failures": len(outcome.failures)}
    return {"event": "round", "round": outcome.round, **figures, **timing, **counts}


def round_row(
    outcome: RoundOutcome, test: Sequence[TokenLoss], evaluate_seconds: float
) -> EventLine:
    """The row of rounds.csv.

    Args:
        outcome: of the round.
        test: of all clients, or nothing in a round without evaluation.
        evaluate_seconds: what the evaluation took.
    """
    replies, diagnostics = outcome.replies, outcome.combined.diagnostics
    told = [reply.metrics for reply in replies if "loss" in reply.metrics]
    losses = [metrics["loss"] for metrics in told]
    counts = [metrics["response_tokens"] for metrics in told]
    total = sum(test, TokenLoss())
    pulls = [figures["pull"] for figures in diagnostics.clients.values() if "pull" in figures]
    kept = [reply.metrics["pull_kept"] for reply in replies if "pull_kept" in reply.metrics]
    return {
        "round": outcome.round,
        "clients": len(replies),
        "train_loss": sum(losses) / len(losses) if told else "",
        "train_loss_weighted": sum(loss * count for loss, count in zip(losses, counts, strict=True))
        / sum(counts)
        if told
        else "",
        "test_loss": sum(loss.per_token for loss in test) / len(test) if test else "",
        "test_loss_weighted": total.per_token if test else "",
        "disagreement_before": diagnostics.round.get("disagreement_before", ""),
        "disagreement_after": diagnostics.round.get("disagreement_after", ""),
        "pull": sum(pulls) / len(pulls) if pulls else "",
        "pull_kept": sum(kept) / len(kept) if kept else "",
        "train_seconds": round(outcome.train_seconds, 4),
        "evaluate_seconds": round(evaluate_seconds, 4),
        "tokens_per_second": round(sum(counts) / outcome.train_seconds, 1) if told else "",
        **_bytes_of(outcome),
    }


def _down(payload: Payload, answer: Reply | Failure) -> Payload | Volume:
    """What was sent to a client: as its engine counted it, else the payload handed over."""
    return answer.traffic.down if answer.traffic else payload


def _up(answer: Reply | Failure) -> Payload | Volume:
    """What a client sent back: as its engine counted it, else the payload that was handed over."""
    if answer.traffic:
        return answer.traffic.up
    return answer.payload if isinstance(answer, Reply) else Volume()


def _bytes_of(outcome: RoundOutcome) -> EventLine:
    """bytes_up and bytes_down of a round, those of clients that failed included."""
    answers: list[Reply | Failure] = [*outcome.replies, *outcome.failures]
    sent = {request.client_id: request.payload for request in outcome.requests}
    return {
        "bytes_up": sum(_up(answer).num_bytes for answer in answers),
        "bytes_down": sum(_down(sent[answer.client_id], answer).num_bytes for answer in answers),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
