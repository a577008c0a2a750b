"""A global adapter that all clients average beside a personal one that stays with its client.

Yang et al. 2024, "Dual-Personalizing Adapter for Federated Foundation Models" (FedDPA), NeurIPS
2024, arXiv 2403.19211, in the variant FedDPA-T, which trains both adapters during federation. With
G the global product, O_k the personal one, and a the share of the personal one,

    turn of G:     h = W0 x + G x                       G    <-  sum_k n_k / n  G_k, by factors
    turn of O_k:   h = W0 x + (1 - a) G x + a O_k x     O_k  <-  O_k as trained, G frozen

and the second line is what a client has. a O_k is trained as one product: a constant in front of
what is trained folds into B. Until its O_k has been trained, a client has G alone. Both are one
adapter: the first directions are G, the others O_k, so any reader of LoRA adapters reads it.

The paper's clients take both turns in each round. Here, as for Ditto, a client's rounds take turns,
the first for G, so that it takes as many local steps a round as under any other method; for the
paper's work, double the rounds. Its variant FedDPA-F (O_k after the last round of G) is not built:
`fedit-finetune` is its neighbour. Left out, too, is the paper's mix at inference, which looks at
each input: that is no LoRA adapter any more, and a is one number instead. With `halves =
"together"`, ours, every step trains both halves, and only the average tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import model_validator

from fedmira.adapters import Adapter, replaced, weighted_sum
from fedmira.adapters.low_rank import UP
from fedmira.config.methods import Need
from fedmira.config.section import Count, setting
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Combined, Method, ServerState, Start, Trained
from fedmira.methods.parts.averaging import COMMON, by_rows
from fedmira.methods.parts.partly_sent import PartlySent
from fedmira.methods.parts.rank_split import RankSplit, check_split

__all__ = ["FedDpa"]

TURNS, PERSONAL = "turns", "personal"


class FedDpa(Method):
    """The state holds the global half and every client's personal one.

    The number "turns", int64 [K], counts the rounds of each client.

    The personal halves stay with their clients: they are no part of the bytes that are counted.
    """

    name: ClassVar[str] = "feddpa"
    title: ClassVar[str] = "FedDPA"
    takes_newcomers: ClassVar[bool] = True
    uses_graph: ClassVar[bool] = False
    partly_sent: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {Need.ONE_RANK: "", Need.FACTORS: ""}
    global_rank: Count = setting(
        0,
        help=(
            "directions of the global half of an adapter; the remaining ones of `adapter.rank` "
            "are personal. 0 takes half"
        ),
    )
    own_share: float = setting(
        0.5,
        gt=0,
        le=1,
        help=(
            "a, the share of the personal half; the global one has 1 - a beside it. Read where "
            "halves = 'turns'"
        ),
    )
    halves: Literal["turns", "together"] = setting(
        "turns",
        help=(
            "whether a client's rounds train the global and the personal half in turns, or each "
            "local step trains both"
        ),
    )

    @model_validator(mode="after")
    def _shares_are_read(self) -> FedDpa:
        if self.halves == "together" and self.own_share != FedDpa.model_fields["own_share"].default:
            raise ValueError(
                f"own_share = {self.own_share:g} is not read where halves = 'together', since a "
                "constant in front of what is trained folds into B; leave it out, or set halves = "
                "'turns'"
            )
        return self

    @property
    def needs(self) -> Mapping[Need, str]:
        """One rank and two factors, and fresh moments where halves take turns."""
        turns = {
            Need.FRESH_MOMENTS: (
                "algorithm.name = 'feddpa': the rounds of a client take turns between two halves "
                "of its adapter, and kept moments would move the one that is frozen; set "
                "local.optimizer_state = 'fresh' or algorithm.halves = 'together'"
            )
        }
        return {**self.always_needs, **(turns if self.halves == "turns" else {})}

    @property
    def split(self) -> RankSplit:
        """Where adapters are divided: the global half is the first."""
        return RankSplit(self.global_rank)

    def check(self) -> None:
        """Both halves of the adapter need room.

        Raises:
            ConfigError: a half would be empty.
        """
        check_split(self.name, self.global_rank, self.context, "global_rank", "global")

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The common start, divided."""
        shared = self.split.trained(next(iter(starts.values())))
        personal = {client: self.split.frozen(start) for client, start in starts.items()}
        turns = torch.zeros(len(self.context.clients), dtype=torch.int64)
        return ServerState({COMMON: shared, **personal}, {TURNS: turns})

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """Both halves as they are trained; only the global one travels."""
        shared, personal = state.adapters[COMMON], state.adapters[client]
        sent = {"global": shared}
        if self.halves == "together":
            return PartlySent({"adapter": self.split.joined(shared, personal)}, sent=sent)
        turn = self._turns(state, client) % 2
        both = (self._beside(shared), personal) if turn else (shared, _without(personal))
        return PartlySent({"adapter": self.split.joined(*both)}, {PERSONAL: float(turn)}, sent=sent)

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average the global halves that came back by training rows; keep the personal ones."""
        both = self.halves == "together"
        own = {reply.client_id: self._turns(state, reply.client_id) % 2 == 1 for reply in replies}
        personal = [reply for reply in replies if both or own[reply.client_id]]
        shared = [reply for reply in replies if both or not own[reply.client_id]]
        changes = {
            reply.client_id: self.split.frozen(reply.payload.tensors["adapter"])
            for reply in personal
        }
        if shared:
            ordered, weights = by_rows(shared)
            parts = [self.split.trained(reply.payload.tensors["adapter"]) for reply in ordered]
            changes[COMMON] = weighted_sum(parts, weights)
        turns = state.numbers[TURNS].clone()
        turns[[self.context.clients.index(reply.client_id) for reply in replies]] += 1
        numbers = {**state.numbers, TURNS: turns}
        return Combined(ServerState(replaced(state.adapters, changes), numbers))

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """Both halves, each with its share once the personal one has been trained."""
        shared, personal = state.adapters[COMMON], state.adapters[client]
        if self.halves == "turns" and self._turns(state, client) >= 2:
            shared = self._beside(shared)
        return self.split.joined(shared, personal)

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from both halves; the one whose turn it is not gets no gradient."""
        adapter = payload.tensors["adapter"]
        if PERSONAL not in payload.scalars:
            return Start(adapter)
        return Start(adapter, self._still if payload.scalars[PERSONAL] else self.split.still)

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the global half; of a personal one nothing travels.

        A half that was frozen is what it was, whatever weight decay did to it meanwhile.
        """
        shared, personal = (
            part(trained.adapter) for part in (self.split.trained, self.split.frozen)
        )
        before = payload.tensors["adapter"]
        if PERSONAL not in payload.scalars:
            return PartlySent({"adapter": trained.adapter}, sent={"global": shared}), None
        if payload.scalars[PERSONAL]:
            adapter = self.split.joined(self.split.trained(before), personal)
            return PartlySent({"adapter": adapter}, sent={}), None
        adapter = self.split.joined(shared, self.split.frozen(before))
        return PartlySent({"adapter": adapter}, sent={"global": shared}), None

    def _turns(self, state: ServerState, client: ClientId) -> int:
        """Rounds that a client has trained; its next one is for its own half where it is odd."""
        return int(state.numbers[TURNS][self.context.clients.index(client)])

    def _beside(self, shared: Adapter) -> Adapter:
        """(1 - a) G, as it stands beside a personal half."""
        rest = 1 - self.own_share
        return {
            name: rest * tensor if name.endswith(UP) else tensor for name, tensor in shared.items()
        }

    def _still(self, gradient: Adapter, parameters: Adapter) -> Adapter:
        """A gradient hook: zeros for the global half."""
        shared = {
            name: torch.zeros_like(part) for name, part in self.split.trained(gradient).items()
        }
        return self.split.joined(shared, self.split.frozen(gradient))


def _without(personal: Adapter) -> Adapter:
    """The same half with B = 0, which adds nothing."""
    return {
        name: torch.zeros_like(part) if name.endswith(UP) else part
        for name, part in personal.items()
    }
