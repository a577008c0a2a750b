"""Gates that are learned in local training: numbers of sum 1 in front of groups of directions.

A constant in front of a LoRA product folds into its B, so experts e with gates are one plain
adapter with the factors A_e and B'_e = g_e B_e. Of the gradient in these factors follow those of
the experts' own and of the gates, g = softmax(z):

    dB_e   =  g_e dB'_e
    dg_e   =  sum over modules of  <dB'_e, B_e>
    dz_e   =  g_e (dg_e - sum_i g_i dg_i)

Local training steps A_e, B_e and, by Adam with a rate of its own, z; the adapter is folded again
after each step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.adapters.low_rank import UP
from fedmira.methods.base import Start
from fedmira.methods.parts.adam_step import AdamStep

__all__ = ["LEAST", "LearnedGates", "fold", "gate_name", "gate_slopes", "proper", "unfold"]

LEAST = 1e-3
"""The smallest gate, so that no expert is lost for good."""


def gate_name(expert: int) -> str:
    """What the gate of an expert is called among numbers.

    Args:
        expert: its place, from 0.
    """
    return f"gate {expert}"


def proper(gates: Tensor) -> Tensor:
    """The same gates with none below `LEAST`, and of sum 1, as near as they can be.

    Args:
        gates: float64 [E].
    """
    share = (gates - LEAST).clamp_min(0)
    total = float(share.sum())
    spread = share / total if total > 0 else torch.full_like(gates, 1 / len(gates))
    return LEAST + (1 - LEAST * len(gates)) * spread


def fold(adapter: Adapter, ranks: Sequence[int], gates: Tensor) -> Adapter:
    """The plain adapter of experts behind gates: B'_e = g_e B_e.

    Args:
        adapter: the experts' factors, one expert's directions behind the other's.
        ranks: directions of each expert.
        gates: g, float [E].
    """
    return _scaled(adapter, _of_directions(gates, ranks))


def unfold(adapter: Adapter, ranks: Sequence[int], gates: Tensor) -> Adapter:
    """The experts' own factors: B_e = B'_e / g_e.

    Args:
        adapter: as `fold` made it.
        ranks: directions of each expert.
        gates: g, float [E], none of them 0.
    """
    return _scaled(adapter, 1 / _of_directions(gates, ranks))


def _of_directions(gates: Tensor, ranks: Sequence[int]) -> Tensor:
    """The gate of each direction, float32 [r]."""
    return torch.repeat_interleave(gates, torch.tensor(ranks, device=gates.device)).float()


def _scaled(adapter: Adapter, scales: Tensor) -> Adapter:
    return {
        name: part * scales[None, :] if name.endswith(UP) else part
        for name, part in adapter.items()
    }


def gate_slopes(along: Tensor, owner: Tensor, gates: Tensor) -> Tensor:
    """The derivative of the loss by z, [E].

    Args:
        along: <dB', B> of each direction, over all modules, [r].
        owner: the expert of each direction, int64 [r].
        gates: g, [E].
    """
    by_gate = torch.zeros_like(gates).index_add_(0, owner, along)
    return gates * (by_gate - gates @ by_gate)


class LearnedGates:
    """The gates of one client in one round of local training.

    It belongs to the start of that round and to nothing else; methods stay pure. Its numbers are
    tensors where the gradient is, so that no step waits for the device.

    Args:
        adapter: folded, as training begins.
        ranks: directions of each expert.
        gates: g, float64 [E].
        rate: the length of a step of z.
    """

    def __init__(self, adapter: Adapter, ranks: Sequence[int], gates: Tensor, rate: float) -> None:
        self._adapter, self._ranks = adapter, tuple(ranks)
        self._gates = gates.float()
        self._logits = gates.log().float()
        self._adam = AdamStep(self._logits, rate)
        self._owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
        self._ups: dict[str, Tensor] | None = None
        self._before: dict[str, Tensor] = {}

    def start(self) -> Start:
        """Local training with these gates."""
        return Start(self._adapter, self._hook, settle=self._settle, learned=self._learned)

    def _learned(self) -> Mapping[str, float]:
        """The gates as they are."""
        return {gate_name(e): gate for e, gate in enumerate(self._gates.double().tolist())}

    def _hook(self, gradient: Adapter, parameters: Adapter) -> Adapter:
        """The gradient in the experts' own factors; steps z beside them."""
        ups = self._unfolded(next(iter(gradient.values())).device)
        # In the order of the gradient, which no message changes, so that sums have equal bits.
        slopes = {name: slope for name, slope in gradient.items() if name in ups}
        along = torch.stack([(slope * ups[name]).sum(dim=0) for name, slope in slopes.items()]).sum(
            dim=0
        )
        self._before = {name: parameters[name].clone() for name in ups}
        scales = self._gates[self._owner]
        own = {name: slope * scales[None, :] for name, slope in slopes.items()}
        self._step(gate_slopes(along, self._owner, self._gates))
        return {**gradient, **own}

    def _settle(self, parameters: Adapter) -> Adapter:
        """B folded with the gates that the hook has left.

        The optimizer stepped B' by what it is to step B by.
        """
        assert self._ups is not None, "an optimizer step came before its gradient"
        scales = self._gates[self._owner]
        for name, before in self._before.items():
            self._ups[name] += parameters[name] - before
        return {name: up * scales[None, :] for name, up in self._ups.items()}

    def _unfolded(self, device: torch.device) -> dict[str, Tensor]:
        """B of all experts, where the gradient is."""
        if self._ups is None:
            for name in ("_gates", "_logits", "_owner"):
                setattr(self, name, getattr(self, name).to(device))
            self._adam.to(device)
            scales = self._gates[self._owner]
            self._ups = {
                name: part.to(device) / scales[None, :]
                for name, part in self._adapter.items()
                if name.endswith(UP)
            }
        return self._ups

    def _step(self, slope: Tensor) -> None:
        """An Adam step of z, after which no gate is below `LEAST`."""
        moved = self._logits - self._adam.along(slope)
        self._logits = torch.log_softmax(moved, dim=0).clamp_min(math.log(LEAST))
        self._gates = torch.softmax(self._logits, dim=0)
