"""Shared and own directions of one adapter, which every local step trains together.

Agiza, Neseem and Reda 2024, "MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task
Learning", CVPR 2024, arXiv 2403.20320. There a layer has a task-agnostic product and one of each
task, and both are trained by the tasks' losses. With a task for each client, C of rank r_s and O_k
of rank r - r_s, one LoRA adapter holds both:

    h    =  W0 x + s (C x + O_k x)
    C    <-  sum_S n_k / n_S  C_k,   by factors          O_k  <-  O_k as trained by client k

Every step trains both, and only the average tells them apart. The authors' scales are plain
numbers, one of them learned; a scale in front of a product folds into its factors, so both have
s = alpha / r here. Their task-agnostic stream that runs beside those of the tasks (`matrix`) is
that of several tasks on one input; with one task a client it is the input itself (`matrixv2`).

Ours is `own_coupling`: with it above 0 own parts are aligned by MIRA's server step along [graph],

    O_k  <-  sum_l P_kl O_l

as products, cut to their rank (`mira`, with its defaults for all but the coupling). For that they
have to travel, which else they never do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fedmira.adapters import Adapter, replaced, weighted_sum
from fedmira.config.methods import Need
from fedmira.config.section import Fraction, setting
from fedmira.errors import ConfigError
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Combined, Method, ServerState, Trained
from fedmira.methods.mira import Mira
from fedmira.methods.parts.averaging import COMMON, by_rows
from fedmira.methods.parts.partly_sent import PartlySent
from fedmira.methods.parts.rank_split import RankSplit

__all__ = ["MtLora"]


class MtLora(Method):
    """The state holds the shared part and every client's own one.

    Its numbers are those of MIRA where own parts are aligned, else none.
    """

    name: ClassVar[str] = "mtlora"
    title: ClassVar[str] = "MTLoRA"
    takes_newcomers: ClassVar[bool] = True
    partly_sent: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {Need.ONE_RANK: "", Need.FACTORS: ""}
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {"own_coupling": (0.0, 0.5, 1.0)}
    controls: ClassVar[Mapping[str, Mapping[str, Any]]] = {"alone": {"algorithm.shared_rank": 0}}
    shared_rank: int | None = setting(
        None,
        ge=0,
        help=(
            "directions of an adapter that are shared; the others are each client's own. Half of "
            "`adapter.rank` if not set; all of them is `fedavg`, 0 is `local`"
        ),
    )
    own_coupling: Fraction = setting(
        0.0,
        help=(
            "how far own parts are pulled to those of related clients, as `coupling` of `mira`; "
            "above 0 own parts travel. 0 reads no graph"
        ),
    )

    @property
    def needs(self) -> Mapping[Need, str]:
        """One rank and two factors, and fresh moments where own parts are aligned."""
        aligned = {
            Need.FRESH_MOMENTS: (
                "algorithm.own_coupling above 0: aligned own parts get new factors, to whose "
                "entries the old moments do not belong; set local.optimizer_state = 'fresh' or "
                "algorithm.own_coupling = 0"
            )
        }
        return {**self.always_needs, **(aligned if self.aligns else {})}

    @property
    def aligns(self) -> bool:
        """Whether own parts are pulled to each other."""
        return self.own_coupling > 0

    @property
    def split(self) -> RankSplit:
        """Where adapters are divided: the shared part is the first."""
        return RankSplit(self.shared_rank or 0, zero_is_half=self.shared_rank is None)

    def check(self) -> None:
        """Parts must fit into the rank, and where own parts are aligned there must be some.

        Raises:
            ConfigError: more directions are shared than there are; or nobody's own part can be
                aligned, for what MIRA says or because there is none.
        """
        rank = self.context.largest_rank
        shared = self.split.of(rank)
        if shared > rank:
            raise ConfigError(
                f"{self.name}: algorithm.shared_rank = {self.shared_rank}, but adapters have rank "
                f"{rank}; must be {rank} or less (or raise adapter.rank)"
            )
        if self.aligns and shared == rank:
            raise ConfigError(
                f"{self.name}: all {rank} directions are shared, so there are no own parts to "
                "align; needs at least 1 (lower algorithm.shared_rank, or set "
                "algorithm.own_coupling to 0)"
            )
        self._alignment()  # its own check

    def _alignment(self) -> Mira | None:
        """MIRA on the own parts, None where they are left alone."""
        if not self.aligns:
            return None
        context, rank = self.context, self.context.largest_rank
        own = rank - self.split.of(rank)
        # s stays that of the whole adapter, while alpha is divided by the rank of the part.
        share = own / rank
        parts = replace(
            context,
            ranks=dict.fromkeys(context.clients, own),
            alpha=context.alpha * (math.sqrt(share) if context.rslora else share),
        )
        return Mira(coupling=self.own_coupling).for_federation(parts)

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The common start, divided."""
        shared, alignment = self.split.trained(next(iter(starts.values()))), self._alignment()
        own = {client: self.split.frozen(start) for client, start in starts.items()}
        numbers = alignment.initial_state(own).numbers if alignment else {}
        return ServerState({COMMON: shared, **own}, numbers)

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """Both parts; the own one travels only where the server has changed it."""
        tensors = {"adapter": self.adapter_for(state, client)}
        if self.aligns:
            return Payload(tensors)
        return PartlySent(tensors, sent={"shared": state.adapters[COMMON]})

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average the shared parts by training rows; keep the own ones, aligned where asked."""
        ordered, weights = by_rows(replies)
        adapters = [reply.payload.tensors["adapter"] for reply in ordered]
        shared = weighted_sum([self.split.trained(adapter) for adapter in adapters], weights)
        own = {
            reply.client_id: self.split.frozen(adapter)
            for reply, adapter in zip(ordered, adapters, strict=True)
        }
        alignment = self._alignment()
        if alignment is None:
            changed = replaced(state.adapters, {COMMON: shared, **own})
            return Combined(ServerState(changed, state.numbers))
        parts = [
            replace(reply, payload=Payload({"adapter": own[reply.client_id]})) for reply in ordered
        ]
        aligned = alignment.combine(state, parts)
        changed = replaced(aligned.state.adapters, {COMMON: shared})
        return Combined(ServerState(changed, aligned.state.numbers), aligned.diagnostics)

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """Both parts as one adapter."""
        return self.split.joined(state.adapters[COMMON], state.adapters[client])

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the shared part, and the own one only where it is to be aligned."""
        tensors = {"adapter": trained.adapter}
        if self.aligns:
            return Payload(tensors), None
        return PartlySent(tensors, sent={"shared": self.split.trained(trained.adapter)}), None
