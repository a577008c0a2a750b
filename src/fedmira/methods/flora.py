"""What clients learn is added up as products in a frozen part, and each round trains new factors.

Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024, arXiv 2409.05976. With p_k = n_k / n over the clients of the round and R
the frozen part, the same for all clients,

    R    <-  R + sum_k p_k s_k B_k A_k                 the stack of all factors, so exact
    A_k  <-  new random rows,   B_k  <-  0             as many as client k trains

Ranks may differ, for which the method was made: a client of rank r trains r - f directions, and f,
equal for all, hold R.

The paper adds each round's stack to the base, where it can grow without end. Here the base stays as
it is and R has f directions: a round adds up to the sum of its clients' trained directions, and
what R has beyond f is cut, the weakest first; the log's `truncation` is its norm. It is exact while
all rounds together stay below f. R travels down whole, as a client that missed a round needs what
it missed. What is saved for a client is one LoRA adapter of its rank, R beside B = 0, which plain
PEFT loads.

New rows of A are normal with the spread of PEFT's start, drawn from that start and the number of
the round, so that all clients begin from the same and a resumed run finds them again. In round 1
they are the start's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedmira.adapters import Adapter, content_hash, mix, replaced, truncate_rank
from fedmira.adapters.directions import direction
from fedmira.adapters.low_rank import DOWN, UP
from fedmira.config.methods import Need
from fedmira.config.section import Count, setting
from fedmira.errors import ConfigError
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Combined, Diagnostics, Method, ServerState, Start, Trained
from fedmira.methods.parts.averaging import COMMON, by_rows
from fedmira.methods.parts.partly_sent import PartlySent
from fedmira.methods.parts.rank_split import RankSplit

__all__ = ["Flora"]

SEED = "seed"
"""In the state's numbers: what the draws of new rows begin from."""
TRAINED_RANK = "trained_rank"
"""In payloads: how many of the adapter's directions the client trains."""


class Flora(Method):
    """The state holds one adapter: new factors for the largest trained rank, then R.

    R's factors are at the scale alpha / r of the largest rank.
    """

    name: ClassVar[str] = "flora"
    title: ClassVar[str] = "FLoRA"
    takes_newcomers: ClassVar[bool] = True
    uses_graph: ClassVar[bool] = False
    partly_sent: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {
        Need.FACTORS: "",
        Need.FRESH_MOMENTS: (
            "algorithm.name = 'flora': every round trains new factors, to whose entries the old "
            "moments do not belong; set local.optimizer_state = 'fresh'"
        ),
    }
    frozen_rank: Count = setting(
        0,
        help=(
            "f, the directions of every client's adapter that hold what all have learned so far; "
            "the remaining ones of its rank are trained. 0 takes half of the smallest rank"
        ),
    )

    @property
    def _frozen_rank(self) -> int:
        """f."""
        smallest = min(self.context.ranks[client] for client in self.context.clients)
        return self.frozen_rank or smallest // 2

    def check(self) -> None:
        """Both parts of every adapter need room.

        Raises:
            ConfigError: a part would be empty.
        """
        context, frozen = self.context, self._frozen_rank
        client = min(context.clients, key=lambda client: context.ranks[client])
        rank = context.ranks[client]
        if not 0 < frozen < rank:
            raise ConfigError(
                f"{self.name}: client {client!r} has rank {rank}, of which {frozen} would be "
                "frozen; both parts need at least 1 (raise its rank to "
                f"{max(2, self.frozen_rank + 1)} or more, or lower algorithm.frozen_rank)"
            )

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The common start at the largest rank; with B = 0, R is zero."""
        context = self.context
        start = next(
            start
            for client, start in starts.items()
            if context.ranks[client] == context.largest_rank
        )
        seed = int(content_hash(start)[:12], 16)
        return ServerState({COMMON: start}, {SEED: torch.tensor([seed])})

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """New rows of A for the client's rank, and R; that B is zero is known."""
        adapter, rank = self.adapter_for(state, client), self._trained_rank(client)
        split = RankSplit(rank)
        fresh = {
            name: tensor for name, tensor in split.trained(adapter).items() if name.endswith(DOWN)
        }
        return PartlySent(
            {"adapter": adapter},
            {TRAINED_RANK: float(rank)},
            sent={"fresh": fresh, "frozen": split.frozen(adapter)},
        )

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Add the trained products to R by training rows, and draw new factors."""
        context, common = self.context, state.adapters[COMMON]
        ordered, weights = by_rows(replies)
        parts = [
            RankSplit(self._trained_rank(reply.client_id)).trained(reply.payload.tensors["adapter"])
            for reply in ordered
        ]
        scale = context.scale_of(context.largest_rank)
        scales = [scale, *(context.scale(reply.client_id) for reply in ordered)]
        split = RankSplit(context.largest_rank - self._frozen_rank)
        held = split.frozen(common)
        mixed = mix([held, *parts], [1.0, *weights], scales, self._frozen_rank, scale, held)
        seed = int(state.numbers[SEED]) + replies[0].round
        after = split.joined(_fresh(split.trained(common), seed), mixed.adapter)
        return Combined(
            ServerState(replaced(state.adapters, {COMMON: after}), state.numbers),
            Diagnostics(round={"truncation": mixed.tail}),
        )

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """R at the client's scale, behind factors of its trained rank that change nothing yet."""
        context, common = self.context, state.adapters[COMMON]
        if context.ranks[client] == context.largest_rank:
            return common
        split = RankSplit(context.largest_rank - self._frozen_rank)
        share = context.scale_of(context.largest_rank) / context.scale(client)
        held = {
            name: tensor * share if name.endswith(UP) else tensor
            for name, tensor in split.frozen(common).items()
        }
        fresh = truncate_rank(split.trained(common), self._trained_rank(client))
        return split.joined(fresh, held)

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from both parts; R gets no gradient."""
        return Start(payload.tensors["adapter"], _split(payload).still)

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the trained part.

        R is what it was, whatever weight decay did to it meanwhile.
        """
        split = _split(payload)
        part = split.trained(trained.adapter)
        whole = split.joined(part, split.frozen(payload.tensors["adapter"]))
        return PartlySent({"adapter": whole}, sent={"trained": part}), None

    def _trained_rank(self, client: ClientId) -> int:
        """Directions that a client trains."""
        return self.context.ranks[client] - self._frozen_rank


def _split(payload: Payload) -> RankSplit:
    """Where the client's adapter is divided."""
    return RankSplit(int(payload.scalars[TRAINED_RANK]))


def _fresh(like: Adapter, seed: int) -> dict[str, Tensor]:
    """New factors: normal rows of A of length 1 / sqrt(3) on average, and B = 0."""
    downs = {name: tensor for name, tensor in like.items() if name.endswith(DOWN)}
    drawn = direction(seed, downs)
    return {
        name: drawn[name] / math.sqrt(3 * tensor.shape[1])
        if name in drawn
        else torch.zeros_like(tensor)
        for name, tensor in like.items()
    }
