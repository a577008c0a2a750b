"""Experts that all clients share and one that is a client's own, behind a gate that it learns.

Song et al. 2024, "CGC-LoRA" in "A Framework to Implement 1+N Multi-task Fine-tuning Pattern in LLMs
Using the CGC-LORA Algorithm", arXiv 2402.01684. There a layer has task-common and task-specific
experts, and a gate for each task weighs them. With a task for each client, C_e the common experts
and O_k the client's own,

    h    =  W0 x + s ( sum_e g_ke C_e x  +  g_ko O_k x ),       g_k = softmax(z_k)

With one task a client the gate is one vector of a few numbers, whatever the input is, so that it
folds into the factors (`parts/learned_gates.py`) and all experts are one plain LoRA adapter of the
rank that they have together. Each local step trains the factors of all experts and z_k, and then

    C_e  <-  sum_S n_k g_ke C_ke / sum_S n_k g_ke,   by factors       O_k, g_k  stay with client k

so a client has a say in an expert as far as it uses it. The gates of common experts travel, since
the average needs them; the own expert does not, and its gate is what the others leave of 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import model_validator
from torch import Tensor

from fedmira.adapters import Adapter, replaced
from fedmira.adapters.low_rank import DOWN, UP
from fedmira.config.methods import Need
from fedmira.config.section import Count, setting
from fedmira.errors import ConfigError
from fedmira.messages import ClientId, Payload, Reply
from fedmira.methods.base import Combined, Diagnostics, Method, ServerState, Start, Trained
from fedmira.methods.parts.averaging import COMMON, by_rows
from fedmira.methods.parts.learned_gates import LearnedGates, fold, gate_name, proper, unfold
from fedmira.methods.parts.partly_sent import PartlySent
from fedmira.methods.parts.rank_split import RankSplit

__all__ = ["CgcLora"]

GATES = "gates"


class CgcLora(Method):
    """The state holds the common experts and every client's own one, as they are before gates.

    The number "gates" (float64 [K, E]) has each client's; the last one is that of its own expert.
    """

    name: ClassVar[str] = "cgc-lora"
    title: ClassVar[str] = "CGC-LoRA"
    takes_newcomers: ClassVar[bool] = True
    uses_graph: ClassVar[bool] = False
    partly_sent: ClassVar[bool] = True
    always_needs: ClassVar[Mapping[Need, str]] = {Need.ONE_RANK: "", Need.FACTORS: ""}
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {"common_experts": (1, 3, 6)}
    controls: ClassVar[Mapping[str, Mapping[str, Any]]] = {"alone": {"algorithm.common_experts": 0}}
    common_experts: Count = setting(
        3, help="experts that all clients share, beside the one of each client. 0 is `local`"
    )
    experts_rank: Count = setting(
        0,
        help=(
            "directions that the common experts have together, of those of `adapter.rank`; the "
            "own expert has the others. 0 takes half. Read where common_experts is above 0"
        ),
    )
    gate_rate: float = setting(
        0.03,
        gt=0,
        help=(
            "how far the logarithm of a gate moves in a local step, ten times the default of "
            "local.learning_rate. Read where common_experts is above 0"
        ),
    )

    @model_validator(mode="after")
    def _settings_are_read(self) -> CgcLora:
        for key in () if self.common_experts else ("experts_rank", "gate_rate"):
            if getattr(self, key) != CgcLora.model_fields[key].default:
                raise ValueError(
                    f"{key} = {getattr(self, key):g} is not read where common_experts = 0; leave "
                    "it out, or raise common_experts"
                )
        return self

    @property
    def returned(self) -> tuple[str, ...]:
        """The gates of common experts."""
        return tuple(gate_name(e) for e in range(self.common_experts))

    @property
    def split(self) -> RankSplit:
        """Where adapters are divided: the common experts are first."""
        return RankSplit(self.experts_rank, zero_is_half=self.common_experts > 0)

    def check(self) -> None:
        """Every expert needs a direction.

        Raises:
            ConfigError: there are more experts than directions, or none is left for the own one.
        """
        rank = self.context.largest_rank
        common = self.split.of(rank)
        if not self.common_experts:
            return
        if not self.common_experts <= common < rank:
            raise ConfigError(
                f"{self.name}: of rank {rank}, {common} directions are for "
                f"{self.common_experts} common experts and {max(0, rank - common)} for the own "
                f"one; each needs at least 1 (set adapter.rank to {2 * self.common_experts} or "
                "more, or lower algorithm.common_experts or algorithm.experts_rank)"
            )

    def initial_state(self, starts: Mapping[ClientId, Adapter]) -> ServerState:
        """The common start, divided, behind equal gates."""
        clients, count = self.context.clients, self.common_experts + 1
        shared = self.split.trained(next(iter(starts.values())))
        own = {client: self.split.frozen(start) for client, start in starts.items()}
        gates = torch.full((len(clients), count), 1 / count, dtype=torch.float64)
        return ServerState({COMMON: shared, **own}, {GATES: gates})

    def instruct(self, state: ServerState, client: ClientId) -> Payload:
        """All experts folded, and the gates; only the common experts travel."""
        gates = state.numbers[GATES][self.context.clients.index(client)]
        return PartlySent(
            {"adapter": self.adapter_for(state, client)},
            {gate_name(e): float(gate) for e, gate in enumerate(gates[:-1])},
            sent={"common": state.adapters[COMMON]} if self.common_experts else {},
        )

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        """Average each common expert by rows and gates; keep own experts and gates."""
        ordered, shares = by_rows(replies)
        gates, changes, experts = state.numbers[GATES].clone(), {}, []
        told: dict[ClientId, dict[str, float]] = {}
        for reply in ordered:
            client, k = reply.client_id, self.context.clients.index(reply.client_id)
            gates[k] = self._gates(reply.payload.scalars)
            adapter = reply.payload.tensors["adapter"]
            whole = unfold(adapter, self._ranks(adapter), gates[k])
            changes[client] = self.split.frozen(whole)
            experts.append(self.split.trained(whole))
            told[client] = {"own_gate": float(gates[k, -1])} if self.common_experts else {}
            told[client] |= {f"gate_{e}": float(gate) for e, gate in enumerate(gates[k, :-1])}
        if self.common_experts:
            rows = [self.context.clients.index(reply.client_id) for reply in ordered]
            weights = torch.tensor(shares, dtype=torch.float64)[:, None] * gates[rows, :-1]
            changes[COMMON] = self._averaged(experts, weights / weights.sum(dim=0))
        after = ServerState(replaced(state.adapters, changes), {**state.numbers, GATES: gates})
        return Combined(after, Diagnostics(clients=told))

    def adapter_for(self, state: ServerState, client: ClientId) -> Adapter:
        """All experts behind the client's gates, as one adapter."""
        whole = self.split.joined(state.adapters[COMMON], state.adapters[client])
        gates = state.numbers[GATES][self.context.clients.index(client)]
        return fold(whole, self._ranks(whole), gates)

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        """Start from the folded experts, with gates that are learned beside them."""
        adapter = payload.tensors["adapter"]
        if not self.common_experts:
            return Start(adapter)
        gates = self._gates(payload.scalars)
        return LearnedGates(adapter, self._ranks(adapter), gates, self.gate_rate).start()

    def finish(
        self, payload: Payload, memory: Payload | None, trained: Trained
    ) -> tuple[Payload, Payload | None]:
        """Send the common experts, and their gates; the own expert stays."""
        gates = self._gates(trained.learned or payload.scalars)
        experts = unfold(trained.adapter, self._ranks(trained.adapter), gates)
        return PartlySent(
            {"adapter": trained.adapter},
            {gate_name(e): float(gate) for e, gate in enumerate(gates[:-1])},
            sent={"common": self.split.trained(experts)} if self.common_experts else {},
        ), None

    def _gates(self, numbers: Mapping[str, float]) -> Tensor:
        """All gates of a client from those of the common experts, float64 [E].

        They may come from elsewhere, and factors are divided by them.
        """
        if not self.common_experts:
            return torch.ones(1, dtype=torch.float64)
        common = [numbers[gate_name(e)] for e in range(self.common_experts)]
        return proper(torch.tensor([*common, 1 - sum(common)], dtype=torch.float64))

    def _ranks(self, adapter: Adapter) -> list[int]:
        """Directions of each expert; of the common ones the first have one more where need be."""
        rank = _rank(adapter)
        common = self.split.of(rank)
        return [*self._shares_of(common), rank - common]

    def _shares_of(self, directions: int) -> list[int]:
        """How the common experts divide their directions."""
        count = self.common_experts
        return [directions // count + (e < directions % count) for e in range(count)]

    def _averaged(self, experts: Sequence[Adapter], weights: Tensor) -> Adapter:
        """The clients' common experts, each with weights of its own, float64 [n, E - 1]."""
        ranks = torch.tensor(self._shares_of(_rank(experts[0])))
        by_direction = torch.repeat_interleave(weights, ranks, dim=1)
        averaged = {}
        for name in experts[0]:
            total = torch.zeros_like(experts[0][name], dtype=torch.float64)
            for adapter, own in zip(experts, by_direction, strict=True):
                total += adapter[name].double() * (own[:, None] if name.endswith(DOWN) else own)
            averaged[name] = total.float()
        return averaged


def _rank(adapter: Adapter) -> int:
    """Directions of an adapter, which all its modules have."""
    return next(part.shape[1] for name, part in adapter.items() if name.endswith(UP))
