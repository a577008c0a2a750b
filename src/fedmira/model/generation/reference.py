"""Reference Trustable Decoding: answers that lean on the states behind a client's own rows.

    p = (1 - share) p_model + share p_ref
    p_ref(y) = sum of w_i over neighbours i of target y        w_i ~ exp(-d_i / T)

Luohe et al. 2024, arXiv 2409.20181. The neighbours are the K stored states nearest to the state
that the head reads, d_i squared distances. With H heads a state is cut into H parts, each with a
store of its own and weights ~ exp(-H d / T); p_ref is the mean over the heads. Neighbours are
exact: stores of a client's rows are small, and a product finds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedmira.adapters import Adapter, content_hash
from fedmira.errors import ModelError, RunError
from fedmira.model.base.rows import Row
from fedmira.model.base.types import BaseModel
from fedmira.model.lora.branch import LoraBranch
from fedmira.model.packed.probe import losses_agree

__all__ = [
    "ReferenceStore",
    "auto_temperature",
    "build_store",
    "reference_losses",
    "referred",
]

_BLOCK = 2**14
"""Most stored states that are looked at in one product."""

_ASKED = 2**10
"""Most stored states, spread evenly, that the temperature is the median of."""


@dataclass(frozen=True)
class ReferenceStore:
    """The states behind the response tokens of a client's training rows, and these tokens.

    It holds what the client was trained on, so it never leaves the client, nor the process.

    Attributes:
        keys: [H, n, width / H], float16, or float32 where a number is too large for it.
        targets: int64 [n], the token that followed each state.
        temperature: T.
        neighbours: K, the most that count.
        adapter_sha256: of the adapter that the states were made with.
    """

    keys: Tensor
    targets: Tensor
    temperature: float
    neighbours: int
    adapter_sha256: str

    def __len__(self) -> int:
        """The number n of stored states."""
        return len(self.targets)

    def check(self, adapter: Adapter) -> None:
        """Refuse an adapter whose states these are not.

        Args:
            adapter: that is about to be used.

        Raises:
            RunError: the store was made with another one.
        """
        found = content_hash(adapter)
        if found != self.adapter_sha256:
            raise RunError(
                f"the reference store was made with another adapter (sha256 "
                f"{self.adapter_sha256[:12]}, this one has {found[:12]}): its states are not "
                "those of this adapter; build it again from the client's training rows"
            )

    def weights(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The neighbours of states: their weights, which sum to 1, and the tokens that followed.

        Args:
            hidden: [M, width].

        Returns:
            Weights float32 [M, H K] and targets int64 [M, H K].
        """
        heads, count = self.keys.shape[0], min(self.neighbours, len(self))
        parts = _in_parts(hidden.float(), heads)
        distances, places = _nearest(parts, self.keys, count)
        weights = (-heads * distances / self.temperature).softmax(dim=-1) / heads
        followed = self.targets[places]
        return weights.transpose(0, 1).flatten(1), followed.transpose(0, 1).flatten(1)

    def of_targets(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """p_ref of one token for each state, float32 [M].

        Args:
            hidden: [M, width].
            targets: int64 [M].
        """
        weights, followed = self.weights(hidden)
        return (weights * (followed == targets[:, None])).sum(dim=1)

    def mixed(self, log_probabilities: Tensor, hidden: Tensor, share: float) -> Tensor:
        """log p of all tokens, float32 [M, vocabulary].

        Args:
            log_probabilities: of the model, float32 [M, vocabulary].
            hidden: the states that its head read, [M, width].
            share: of the reference, 0 to 1.
        """
        weights, followed = self.weights(hidden)
        mixed = (1 - share) * log_probabilities.exp()
        return mixed.scatter_add_(1, followed, share * weights).log()


def auto_temperature(keys: Tensor, neighbours: int) -> float:
    """The median of H times the squared distance of each stored state to its K-th neighbour.

    The state itself is left out. It is the size of distances among the client's own states.

    Args:
        keys: [H, n, width / H].
        neighbours: K; where fewer others are stored, the farthest counts.
    """
    heads, stored, _ = keys.shape
    if stored < 2:
        return 1.0  # one state has all the weight, whatever the temperature
    # Of K + 1 nearest the first is the state itself, or one that equals it.
    count = min(neighbours, stored - 1) + 1
    asked = keys[:, :: -(-stored // _ASKED)].float()
    distances, _ = _nearest(asked, keys, count)
    farthest = heads * distances[:, :, -1]
    return max(float(farthest.median()), torch.finfo(torch.float32).tiny)


def build_store(
    base: BaseModel,
    branch: LoraBranch,
    adapter: Adapter,
    rows: Sequence[Row],
    *,
    neighbours: int,
    heads: int,
    temperature: float | Literal["auto"],
) -> ReferenceStore:
    """Read a client's training rows once and keep the states behind their responses.

    Args:
        base: the frozen base.
        branch: of the adapter alone, entered by the caller.
        adapter: the client's, for its hash.
        rows: training rows of the client, and none else.
        neighbours: K.
        heads: H; must divide the width of the base.
        temperature: T, or "auto" for `auto_temperature`.

    Raises:
        ModelError: there is no row, the heads do not divide the width, or the base changes scores
            behind its head.
    """
    width = base.model.config.get_text_config().hidden_size
    if width % heads:
        raise ModelError(
            f"evaluation.reference_heads = {heads} does not divide the width of {base.name!r}, "
            f"which is {width}; choose a divisor"
        )
    if not rows:
        raise ModelError("reference decoding needs training rows of the client; there are none")
    _check_head(base, branch, rows[0])
    states = torch.cat([hidden for _, hidden in _states(base, branch, rows)])
    targets = torch.tensor([token for row in rows for token in row.response], device=base.device)
    small = states.to(torch.float16)
    kept = small if bool(small.isfinite().all()) else states.float()
    keys = _in_parts(kept, heads).contiguous()
    return ReferenceStore(
        keys=keys,
        targets=targets,
        temperature=auto_temperature(keys, neighbours) if temperature == "auto" else temperature,
        neighbours=neighbours,
        adapter_sha256=content_hash(adapter),
    )


def reference_losses(
    base: BaseModel, branch: LoraBranch, rows: Sequence[Row], store: ReferenceStore, share: float
) -> list[float]:
    """The summed response loss of each row under the mixture, in nats.

    Args:
        base: the frozen base.
        branch: of the adapter of the store, entered by the caller.
        rows: to measure on.
        store: of the client.
        share: of the reference, 0 up to 1.
    """
    head = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = []
    for row, hidden in _states(base, branch, rows):
        targets = torch.tensor(list(row.response), device=base.device)
        with torch.no_grad():
            logs = head(hidden).float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
        mixed = (1 - share) * logs.double().exp() + share * store.of_targets(hidden, targets)
        found.append(-float(mixed.log().sum()))
    return found


@contextmanager
def referred(base: BaseModel, store: ReferenceStore, share: float) -> Iterator[None]:
    """Within the block the scores of the base's head are log p of the mixture.

    Args:
        base: the frozen base, all of whose passes are the client's.
        store: of the client.
        share: of the reference, 0 up to 1.
    """

    def mix(_: nn.Module, inputs: tuple[Tensor, ...], scores: Tensor) -> Tensor:
        hidden = inputs[0]
        logs = scores.float().log_softmax(dim=-1).flatten(0, -2)
        return store.mixed(logs, hidden.flatten(0, -2), share).view(scores.shape)

    head = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    handle = head.register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()


def _states(
    base: BaseModel, branch: LoraBranch, rows: Sequence[Row]
) -> Iterator[tuple[Row, Tensor]]:
    """Of each row the states [N, width] from which its N response tokens are predicted."""
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.response[:-1]]], device=base.device)
        with torch.no_grad(), branch.tokens([(0, slice(None))]):
            hidden = base.model.base_model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).last_hidden_state
        yield row, hidden[0, len(row.prompt) - 1 :]


def _check_head(base: BaseModel, branch: LoraBranch, row: Row) -> None:
    """Refuse a model whose scores are not what its head gives, such as scaled or capped ones.

    Raises:
        ModelError: they are not.
    """
    ids = torch.tensor([list(row.prompt)], device=base.device)
    read: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "use_cache": False,
    }
    head = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    with torch.no_grad(), branch.tokens([(0, slice(None))]):
        wanted = base.model(**read).logits[:, -1]
        found = head(base.model.base_model(**read).last_hidden_state[:, -1])
    one, other = (scores.float().log_softmax(dim=-1) for scores in (found, wanted))
    if not losses_agree(one, other, base.dtype):
        raise ModelError(
            f"{base.name!r}: {type(base.model).__name__} changes its scores behind the head, where "
            "reference decoding mixes probabilities; set evaluation.reference_share to 0"
        )


def _in_parts(states: Tensor, heads: int) -> Tensor:
    """States [M, width] as [H, M, width / H]."""
    return states.view(len(states), heads, -1).transpose(0, 1)


def _nearest(queries: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Squared distances and places of the nearest keys, [H, M, count], the nearest first.

    Args:
        queries: float32 [H, M, size].
        keys: [H, n, size], of any number type.
        count: at most n.
    """
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, keys.shape[1], _BLOCK):
        block = keys[:, start : start + _BLOCK].float()
        # From differences where they are few: the product loses small distances to rounding.
        squares = (
            torch.cdist(queries, block, compute_mode="donot_use_mm_for_euclid_dist").square_()
            if queries.shape[1] * block.shape[1] <= _BLOCK
            else torch.baddbmm(
                queries.square().sum(-1, keepdim=True) + block.square().sum(-1)[:, None],
                queries,
                block.transpose(1, 2),
                alpha=-2,
            ).clamp_(min=0)
        )
        places = torch.arange(start, start + block.shape[1], device=keys.device)
        places = places.expand_as(squares)
        if best is not None:
            squares, places = (
                torch.cat(pair, dim=-1) for pair in zip(best, (squares, places), strict=True)
            )
        squares, chosen = squares.topk(min(count, squares.shape[-1]), dim=-1, largest=False)
        best = squares, places.gather(-1, chosen)
    assert best is not None, "a store has at least one state"
    return best
