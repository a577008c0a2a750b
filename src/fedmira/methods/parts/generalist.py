"""What a newcomer begins from where a method keeps nothing in common: the mean of the others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from fedmira.adapters import Adapter, mix, weighted_sum
from fedmira.messages import ClientId
from fedmira.methods.context import MethodContext

__all__ = ["generalist"]


def generalist(  # noqa: PLR0913 - a sum, and the place that it is for
    context: MethodContext,
    adapters: Mapping[ClientId, Adapter],
    trained: Sequence[ClientId],
    client: ClientId,
    start: Adapter,
    *,
    products: bool,
) -> Adapter:
    """The mean of clients' adapters by training rows, in the form of one client.

    Rows weigh as the server believes them: with `server.screen`, who claims more than
    `server.heaviest` times the median weighs as the median. With `server.least_mixed` above 1 all
    weigh alike, so that none is more than its share.

    Args:
        context: the federation.
        adapters: of the clients that have trained.
        trained: these clients. Where there are none, or fewer than `server.least_mixed`, of whom
            nobody may be handed a mean, the start stays.
        client: the newcomer.
        start: the common start in its rank.
        products: whether the mean is of the updates s B A, cut to the newcomer's rank in the
            factors of the start; else of all entries, one by one.
    """
    server = context.server
    if len(trained) < max(1, server.least_mixed):
        return start
    rows = {each: float(context.rows[each]) for each in trained}
    if server.screen:
        middle = statistics.median(context.rows.values())
        rows = {
            each: middle if count > server.heaviest * middle else count
            for each, count in rows.items()
        }
    if server.least_mixed > 1:
        rows = dict.fromkeys(rows, 1.0)
    total = sum(rows.values())
    parts, weights = [adapters[each] for each in rows], [count / total for count in rows.values()]
    if not products:
        return weighted_sum(parts, weights)
    scales = [context.scale(each) for each in rows]
    own = context.ranks[client], context.scale(client)
    return mix(parts, weights, scales, *own, start, split="turned").adapter
