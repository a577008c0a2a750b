"""PyTorch's variable-length flash attention in plain words, for machines without CUDA.

What the kernel promises: attention of sequences that lie one behind the other, causal masks that
are aligned on the last key, and a backward that takes result and log-sum-exps as they are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["flash_backward", "varlen_2_11", "varlen_2_12"]


def varlen_2_11(  # noqa: PLR0913 - those of the kernel
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    """As torch 2.11 has it: key heads are shared without a word."""
    assert (max_q, max_k) == tuple(int(ends.diff().max()) for ends in (cu_seq_q, cu_seq_k))
    out, sums = torch.empty_like(query), torch.empty(query.shape[1], len(query), dtype=query.dtype)
    for queries, keys in _sequences(cu_seq_q, cu_seq_k):
        scores = _scores(query[queries], key[keys], scale, window_size)
        sums[:, queries] = scores.logsumexp(dim=-1)
        out[queries] = (scores.softmax(dim=-1) @ _heads(value[keys], query)).transpose(0, 1)
    return (out, sums) if return_aux is not None and return_aux.lse else out


def varlen_2_12(
    query: Tensor,
    key: Tensor,
    *rest: Any,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Any:
    """As torch 2.12 and later have it: key heads are shared where that is said."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return varlen_2_11(
        query, key, *rest, return_aux=return_aux, scale=scale, window_size=window_size
    )


def flash_backward(  # noqa: PLR0913 - those of aten._flash_attention_backward
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of Dao et al. (2022), algorithm 4, from `out` and `sums` as they are given."""
    assert dropout == 0 and causal == ((window_size_left, window_size_right) == (-1, 0))
    totals = tuple(torch.zeros_like(tensor) for tensor in (query, key, value))
    share = query.shape[1] // key.shape[1]
    for queries, keys in _sequences(cu_seq_q, cu_seq_k):
        scores = _scores(query[queries], key[keys], scale, (window_size_left, window_size_right))
        weights = (scores - sums[:, queries, None]).exp()
        of_out, result = grad[queries].transpose(0, 1), out[queries].transpose(0, 1)
        of_weights = of_out @ _heads(value[keys], query).transpose(-1, -2)
        of_scores = weights * (of_weights - (of_out * result).sum(dim=-1, keepdim=True)) * scale
        totals[0][queries] += (of_scores @ _heads(key[keys], query)).transpose(0, 1)
        asked = query[queries].transpose(0, 1)
        for total, part in (
            (totals[1], of_scores.transpose(-1, -2) @ asked),
            (totals[2], weights.transpose(-1, -2) @ of_out),
        ):
            total[keys] += part.unflatten(0, (-1, share)).sum(dim=1).transpose(0, 1)
    return totals[0], totals[1], totals[2]


def _sequences(query_ends: Tensor, key_ends: Tensor) -> Iterator[tuple[slice, slice]]:
    for queries, keys in zip(
        query_ends.unfold(0, 2, 1).tolist(), key_ends.unfold(0, 2, 1).tolist(), strict=True
    ):
        yield slice(*queries), slice(*keys)


def _heads(keys: Tensor, query: Tensor) -> Tensor:
    """[T, key heads, size] as [heads, T, size]."""
    return keys.transpose(0, 1).repeat_interleave(query.shape[1] // keys.shape[1], dim=0)


def _scores(query: Tensor, key: Tensor, scale: float | None, window: tuple[int, int]) -> Tensor:
    """[heads, Q, T], minus infinity where a query sees no key."""
    assert scale is not None
    scores = query.transpose(0, 1) @ _heads(key, query).transpose(-1, -2) * scale
    asks, keys = (torch.arange(count) for count in (len(query), len(key)))
    before = (asks + len(key) - len(query))[:, None] - keys[None, :]
    hidden = torch.zeros_like(before, dtype=torch.bool)
    if window[0] >= 0:
        hidden |= before > window[0]
    if window[1] >= 0:
        hidden |= -before > window[1]
    return scores.masked_fill(hidden, float("-inf"))
