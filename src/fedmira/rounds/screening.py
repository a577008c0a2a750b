"""What the server believes: replies that no honest client sends stay out of their round.

Nobody else sees a client's rows, but what it sends can be held against what the others of its round
send, and against what it said before.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmira.adapters import Adapter, dot_products, gram, norm, same_shapes, subtract
from fedmira.config import ServerSettings
from fedmira.messages import ClientId, Failure, Reply, Request

__all__ = ["SCREENED", "Screen", "Screened"]

SCREENED = "screen"
"""The stage of failures that are replies which were left out."""
FEWEST = 3
"""Of fewer replies nobody can say which one is unlike the others."""


@dataclass(frozen=True, slots=True)
class Screened:
    """The replies that count, and what became of the others.

    Attributes:
        replies: those that stay, in their order; one whose rows are not believed has others.
        failures: in place of those that were left out.
        notes: what was changed of replies that stay, a sentence each.
    """

    replies: Sequence[Reply]
    failures: Sequence[Failure] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Screen:
    """Holds the replies of a round against each other and against what clients said of themselves.

    Attributes:
        settings: of [server].
        rows: training rows that each client said to have before round 1.
        steps: local steps that each client takes in a round, by these rows: updates grow with them.
        scales: of clients with LoRA adapters, alpha / rank of each; empty for other kinds.
        begins_elsewhere: whether clients begin with another adapter than they are sent; what is
            held against each other is then what they send and not how far it is from that.
        squared_parts: parts that are sums of squares; the root of their length is taken.
    """

    settings: ServerSettings
    rows: Mapping[ClientId, int]
    steps: Mapping[ClientId, int]
    scales: Mapping[ClientId, float]
    begins_elsewhere: bool = False
    squared_parts: tuple[str, ...] = ()

    def __call__(self, requests: Sequence[Request], replies: Sequence[Reply]) -> Screened:
        """Sort out a round's replies.

        Args:
            requests: what its clients were asked.
            replies: what came of it, in any order; they keep it.
        """
        if not self.settings.screen:
            return Screened(replies)
        sent = {request.client_id: request for request in requests}
        reasons = self._claims(replies)
        rest = [reply for reply in replies if reply.client_id not in reasons]
        reasons |= self._too_long(sent, rest)
        rest = [reply for reply in rest if reply.client_id not in reasons]
        reasons |= self._opposed(sent, rest)
        rest = [reply for reply in rest if reply.client_id not in reasons]
        failures = [
            Failure(reply.client_id, reply.round, SCREENED, reasons[reply.client_id], reply.traffic)
            for reply in replies
            if reply.client_id in reasons
        ]
        believed, notes = self._weighed(rest)
        return Screened(believed, failures, notes)

    def _claims(self, replies: Sequence[Reply]) -> dict[ClientId, str]:
        """Clients that claim more rows than they said to have."""
        return {
            reply.client_id: (
                f"claims {reply.num_examples:.6g} training rows, and had {said} before round 1"
            )
            for reply in replies
            for said in [self.rows.get(reply.client_id, reply.num_examples)]
            if reply.num_examples > said
        }

    def _too_long(
        self, sent: Mapping[ClientId, Request], replies: Sequence[Reply]
    ) -> dict[ClientId, str]:
        """Clients one of whose parts is much longer than that of the others."""
        lengths: dict[str, dict[ClientId, float]] = {}
        for reply in replies:
            for what, length in self._lengths(sent[reply.client_id], reply).items():
                steps = 1 if self.begins_elsewhere else self.steps.get(reply.client_id, 1)
                lengths.setdefault(what, {})[reply.client_id] = length / steps
        found: dict[ClientId, str] = {}
        for what, of in lengths.items():
            middle = statistics.median(of.values())
            if len(of) < FEWEST or middle <= 0:
                continue
            for client, length in of.items():
                if not length <= self.settings.norm_bound * middle:
                    found.setdefault(
                        client,
                        f"{what} is {length / middle:.3g} times as long as the round's median; "
                        f"server.norm_bound is {self.settings.norm_bound:g}",
                    )
        return found

    def _lengths(self, request: Request, reply: Reply) -> dict[str, float]:
        """Norms of what the client changed: all entries of each part, and the update s B A."""
        found = {}
        for part, tensors in reply.payload.tensors.items():
            if not all(tensor.is_floating_point() for tensor in tensors.values()):
                continue
            before = {} if self.begins_elsewhere else request.payload.tensors.get(part, {})
            way = subtract(tensors, before) if same_shapes(tensors, before) else tensors
            length = norm(way)
            found[f"its {part!r}"] = math.sqrt(length) if part in self.squared_parts else length
        scale = self.scales.get(reply.client_id)
        pair = _before_and_after(request, reply)
        if scale is not None and pair is not None:
            products = gram(pair, [scale, scale])
            moved = products[0, 0] + products[1, 1] - 2 * products[0, 1]
            if self.begins_elsewhere:
                moved = products[1, 1]
            found["its update B A"] = math.sqrt(max(0.0, float(moved)))
        return found

    def _opposed(
        self, sent: Mapping[ClientId, Request], replies: Sequence[Reply]
    ) -> dict[ClientId, str]:
        """Clients whose update points away from what the others learn together."""
        least = self.settings.least_cosine
        pairs = {
            reply.client_id: pair
            for reply in replies
            for pair in [_before_and_after(sent[reply.client_id], reply)]
            if pair is not None
        }
        if least <= -1 or len(pairs) < FEWEST:
            return {}
        cosines = self._cosines(pairs)
        found = {}
        for place, client in enumerate(pairs):
            others = [other for other in range(len(pairs)) if other != place]
            along = float(cosines[place, others].sum())
            length = math.sqrt(max(0.0, float(cosines[others][:, others].sum())))
            cosine = along / length if length else 0.0
            if cosine < least:
                found[client] = (
                    f"its update has a cosine of {cosine:.3f} with the others'; "
                    f"server.least_cosine is {least:g}"
                )
        return found

    def _cosines(self, pairs: Mapping[ClientId, tuple[Adapter, Adapter]]) -> Tensor:
        """Cosines between the updates, float64 [n, n]; 0 with those that are zero."""
        before, after = (list(side) for side in zip(*pairs.values(), strict=True))
        if self.scales:
            scales = [self.scales[client] for client in pairs]
            products = gram([*before, *after], [*scales, *scales])
            count = len(pairs)
            inner = (
                products[:count, :count]
                + products[count:, count:]
                - products[:count, count:]
                - products[count:, :count]
            )
        else:
            ways = [subtract(new, old) for old, new in pairs.values()]
            inner = dot_products(ways, ways)
        squared = inner.diagonal().clamp_min(0)
        inverse = torch.where(squared > 0, squared.rsqrt(), 0.0)
        return inner * inverse[:, None] * inverse[None, :]

    def _weighed(self, replies: Sequence[Reply]) -> tuple[list[Reply], list[str]]:
        """The replies with rows that can be believed, and a sentence for each that was changed."""
        if len(self.rows) < FEWEST:
            return list(replies), []
        middle = statistics.median(self.rows.values())
        most = self.settings.heaviest * middle
        believed = [
            replace(reply, num_examples=max(1, round(middle)))
            if reply.num_examples > most
            else reply
            for reply in replies
        ]
        notes = [
            f"{reply.client_id} claims {reply.num_examples:.6g} training rows, more than "
            f"server.heaviest = {self.settings.heaviest:g} times the median of {middle:g}, and "
            "weighs as the median"
            for reply in replies
            if reply.num_examples > most
        ]
        return believed, notes


def _before_and_after(request: Request, reply: Reply) -> tuple[Adapter, Adapter] | None:
    """The adapter that was sent and what came back, where the two can be held together."""
    before = request.payload.tensors.get("adapter", {})
    after = reply.payload.tensors.get("adapter", {})
    return (before, after) if before and same_shapes(before, after) else None
