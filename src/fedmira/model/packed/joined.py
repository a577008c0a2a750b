"""Packed attention on CUDA without copied keys: every token among its own, remainders to prefixes.

One variable-length call lets prefixes and remainders see themselves, a second one lets all
remainders of a segment see its prefix, whose keys stand there once. The two parts of a remainder
are joined by their log-sum-exps (Dao et al. 2022, section 3.1): of parts with results o1, o2 and
sums l1, l2,

    o = o1 + sigmoid(l2 - l1) (o2 - o1)        l = log(exp l1 + exp l2)

Given o and l, the kernel's backward is exact for each part on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmira.model.base.transfer import on_device
from fedmira.model.packed.packing import PackedBatch
from fedmira.model.packed.varlen import Stretches, flat_heads, varlen

__all__ = ["JoinedPlan", "attend_joined", "joined_plan"]

_CAUSAL, _ALL = (-1, 0), (-1, -1)
_flash_backward: Any = torch.ops.aten._flash_attention_backward


@dataclass(frozen=True, slots=True)
class _ToPrefixes:
    """What remainders read of their prefixes.

    Attributes:
        asking: int64 [R], places of the remainders that have a prefix.
        asked: int64 [P], places of those prefixes.
        stretches: the remainders of a segment are one sequence, its prefix the keys.
    """

    asking: Tensor
    asked: Tensor
    stretches: Stretches


@dataclass(frozen=True, slots=True)
class JoinedPlan:
    """The two calls of one packed batch, the same in every layer.

    Attributes:
        own: prefixes and remainders, in the order of the tokens, each seeing itself.
        to_prefixes: None where no rows share a prefix.
        state: zeros, uint64 [2], which the kernel's backward reads where there is dropout.
    """

    own: Stretches
    to_prefixes: _ToPrefixes | None
    state: Tensor


def joined_plan(batch: PackedBatch) -> JoinedPlan:
    """Where the sequences of both calls lie.

    Args:
        batch: the packed rows.
    """
    own: list[int] = []
    asking: list[int] = []
    asked: list[int] = []
    remainders: list[int] = []
    prefixes: list[int] = []
    for segment, start in zip(batch.segments, batch.starts, strict=True):
        own += [segment.prefix] * bool(segment.prefix)
        own += segment.lengths
        if segment.prefix:
            first = start + segment.prefix
            asked += range(start, first)
            asking += range(first, start + segment.num_tokens)
            prefixes.append(segment.prefix)
            remainders.append(segment.num_tokens - segment.prefix)
    device = batch.ids.device
    return JoinedPlan(
        Stretches.of(own, own, device),
        _ToPrefixes(
            on_device(asking, device),
            on_device(asked, device),
            Stretches.of(remainders, prefixes, device),
        )
        if asked
        else None,
        on_device([0, 0], device, torch.uint64),
    )


def attend_joined(
    query: Tensor, key: Tensor, value: Tensor, plan: JoinedPlan, scale: float
) -> Tensor:
    """Attention of N tokens as `pack` lays them out.

    Args:
        query: [1, heads, N, size].
        key, value: [1, key heads, N, size].
        plan: the calls of `joined_plan`.
        scale: factor of the scores before softmax.

    Raises:
        NotImplementedError: this torch gives log-sum-exps of another shape.

    Returns:
        [1, N, heads, size].
    """
    flat = (flat_heads(tensor).contiguous() for tensor in (query, key, value))
    result: Tensor = _Joined.apply(*flat, plan, scale)  # type: ignore[no-untyped-call]
    return result[None]


class _Joined(torch.autograd.Function):
    """Queries [N, heads, size], keys and values [N, key heads, size]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: JoinedPlan, scale: float
    ) -> Tensor:
        out, sums = _forward(query, key, value, plan.own, scale, _CAUSAL)
        joined = None
        if (part := plan.to_prefixes) is not None:
            others, of_others = _forward(
                query[part.asking],
                key[part.asked],
                value[part.asked],
                part.stretches,
                scale,
                _ALL,
            )
            own = sums[:, part.asking]
            share = torch.sigmoid(of_others - own).T[..., None]
            out.index_add_(0, part.asking, others.sub_(out[part.asking]).mul_(share))
            joined = torch.logaddexp(own, of_others)
            sums.index_copy_(1, part.asking, joined)
        ctx.save_for_backward(query, key, value, out, sums, joined)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums, joined = ctx.saved_tensors
        plan: JoinedPlan = ctx.plan
        grad = grad.contiguous()
        scale, state = ctx.scale, plan.state
        found = _backward(grad, query, key, value, out, sums, plan.own, scale, _CAUSAL, state)
        if (part := plan.to_prefixes) is not None:
            # Gathered again and not kept: of long remainders that is most of a layer's queries.
            more = _backward(
                grad[part.asking],
                query[part.asking],
                key[part.asked],
                value[part.asked],
                out[part.asking],
                joined,
                part.stretches,
                scale,
                _ALL,
                state,
            )
            places = (part.asking, part.asked, part.asked)
            for total, place, added in zip(found, places, more, strict=True):
                total.index_add_(0, place, added)
        return (*found, None, None)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stretches: Stretches,
    scale: float,
    window: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    out, sums = varlen(query, key, value, stretches, scale, window, with_sums=True)
    if sums.shape != (query.shape[1], len(query)):
        raise NotImplementedError(
            f"log-sum-exps of shape {tuple(sums.shape)}, for {query.shape[1]} heads and "
            f"{len(query)} queries"
        )
    return out, sums


def _backward(  # noqa: PLR0913 - those of the kernel
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    stretches: Stretches,
    scale: float,
    window: tuple[int, int],
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's backward for given results and log-sum-exps, without dropout."""
    found: tuple[Tensor, Tensor, Tensor] = _flash_backward(
        grad,
        query,
        key,
        value,
        out,
        sums,
        stretches.query_ends,
        stretches.key_ends,
        stretches.longest_query,
        stretches.longest_key,
        0.0,
        window == _CAUSAL,
        state,
        torch.empty(0, device=query.device),
        scale=scale,
        window_size_left=window[0],
        window_size_right=window[1],
    )
    return found
