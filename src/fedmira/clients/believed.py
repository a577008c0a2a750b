"""What a client says of itself while it trains, held against what it said at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedmira.data import ClientSummary
from fedmira.messages import ClientId, Failure, Reply

__all__ = ["believed"]


def believed(
    answers: Sequence[Reply | Failure], parties: Mapping[ClientId, ClientSummary]
) -> list[Reply | Failure]:
    """The answers, with a failure of stage "reply" for who counts more rows than it declared.

    Rows weigh a client in averages, so a count that grows during a run would let one client take
    them over.

    Args:
        answers: of a round.
        parties: what each client said of itself when the run began; who is not among them is
            believed.
    """
    return [
        Failure(answer.client_id, answer.round, "reply", problem, answer.traffic)
        if isinstance(answer, Reply) and (problem := _rows_problem(answer, parties))
        else answer
        for answer in answers
    ]


def _rows_problem(reply: Reply, parties: Mapping[ClientId, ClientSummary]) -> str:
    party = parties.get(reply.client_id)
    if party is None or reply.num_examples <= party.train_rows:
        return ""
    return (
        f"the reply counts {str(reply.num_examples)[:40]} training rows; the client said at the "
        f"start that it has {party.train_rows}"
    )
