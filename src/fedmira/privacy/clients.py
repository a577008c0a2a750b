"""Client-level noise on the server: updates are clipped, weigh alike, and their sum gets noise."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedmira.adapters import Adapter, norm, subtract
from fedmira.messages import Payload, Reply, Request
from fedmira.rounds import Screened
from fedmira.seeds import seed_for
from fedmira.wire import WITHHELD

__all__ = ["ClientNoise"]


@dataclass(frozen=True, slots=True)
class ClientNoise:
    """Stands in the place of the server's screen, whose choices would depend on what is hidden.

    The noise of standard deviation noise * clip on the sum of m updates is shared out among them,
    so that the mean by equal weights has noise * clip / m. What a client tells of its training is
    taken away, so that run folders do not hold it.

    Attributes:
        clip: the longest that an update may be, over all entries.
        noise: standard deviation in clips.
        seed: of the run, where draws may be known; None draws from the operating system.
    """

    clip: float
    noise: float
    seed: int | None = None

    def __call__(self, requests: Sequence[Request], replies: Sequence[Reply]) -> Screened:
        """The replies as the method may see them.

        Args:
            requests: what the round's clients were asked.
            replies: what came of it.
        """
        sent = {request.client_id: request.payload.tensors["adapter"] for request in requests}
        private = []
        for reply in replies:
            seed = (
                secrets.randbits(63)
                if self.seed is None
                else seed_for(self.seed, "privacy", reply.round, reply.client_id)
            )
            adapter = self._noisy(
                sent[reply.client_id], reply.payload.tensors["adapter"], seed, len(replies)
            )
            metrics = {"steps": reply.metrics["steps"], WITHHELD: 1.0}
            private.append(
                replace(
                    reply, num_examples=1, payload=Payload({"adapter": adapter}), metrics=metrics
                )
            )
        return Screened(private)

    def _noisy(self, before: Adapter, after: Adapter, seed: int, count: int) -> Adapter:
        way = subtract(after, before)
        length = norm(way)
        # Where the length is not finite there is no direction either, and nothing is added.
        share = min(1.0, self.clip / length) if 0 < length < math.inf else 0.0
        draw = torch.Generator().manual_seed(seed)
        deviation = self.noise * self.clip / math.sqrt(count)
        return {
            name: before[name]
            + (share * tensor if share else torch.zeros_like(tensor))
            + deviation * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
            for name, tensor in way.items()
        }
