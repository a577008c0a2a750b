"""Loss on response tokens, packed where the architecture allows it and padded where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor

from fedmira.model.base.rows import Row
from fedmira.model.base.transfer import on_device, sent
from fedmira.model.base.types import BaseModel
from fedmira.model.lora.branch import LoraBranch
from fedmira.model.lora.branches import Draws, TokenLosses
from fedmira.model.packed.attention import Layout, packed_layout
from fedmira.model.packed.layer_passes import read_only_at, recomputed
from fedmira.model.packed.packing import (
    PackedBatch,
    gather,
    pack,
    segment_rows,
)
from fedmira.model.packed.response_loss import draw_targets, response_loss, sampled_response_loss

__all__ = ["Draws", "TokenLosses", "padded_losses", "response_losses"]


def response_losses(
    base: BaseModel,
    branch: LoraBranch,
    batches: Sequence[tuple[int, Sequence[Row]]],
    budget: int,
    draws: Draws | None = None,
) -> Iterator[TokenLosses]:
    """Response losses of (client, rows) batches, at most `budget` tokens in a forward pass.

    A single row longer than the budget is computed on its own. The caller must use (backward) each
    result before the next.

    Args:
        draws: where given, the loss is that of targets drawn from the model by these numbers, in
            place of the rows' own response tokens; what the model reads stays the same.
        base: the frozen base.
        branch: the adapters of the clients, as they are hooked into the layers.
        batches: (client index, rows) pairs.
        budget: most tokens in a forward pass.
    """
    passes = _packed if base.packed else _padded
    yield from passes(base, branch, batches, budget, draws)


def _packed(
    base: BaseModel,
    branch: LoraBranch,
    batches: Sequence[tuple[int, Sequence[Row]]],
    budget: int,
    draws: Draws | None,
) -> Iterator[TokenLosses]:
    share_prefix = not (
        branch.dropout and torch.is_grad_enabled()
    )  # rows that drop inputs each draw their own
    segments = [
        segment
        for client, rows in batches
        for segment in segment_rows(client, rows, budget, share_prefix)
    ]
    for chosen in gather(segments, budget):
        numbers = (
            None
            if draws is None
            else torch.cat([draws[part.client][index] for part in chosen for index in part.indices])
        )
        yield _packed_pass(base, branch, pack(chosen).to(base.device), numbers)


def _packed_pass(
    base: BaseModel, branch: LoraBranch, batch: PackedBatch, draws: Tensor | None
) -> TokenLosses:
    """One forward pass.

    A function of its own, so that what it leaves behind is gone before the next pass begins.
    """
    layout = Layout(batch, base.last_layer.index if base.last_layer else None, base.attention)
    surroundings = partial(_packed_surroundings, base, branch, layout)
    with surroundings(), _recomputed(base, branch, surroundings):
        hidden = base.model.base_model(
            input_ids=batch.ids[None], position_ids=batch.positions[None], use_cache=False
        ).last_hidden_state
    head, read = base.model.get_output_embeddings(), hidden[0, batch.predict_at]  # type: ignore[no-untyped-call]
    values = (
        response_loss(head, read, batch.targets)
        if draws is None
        else sampled_response_loss(head, read, sent(draws, base.device))
    )
    tokens: dict[int, int] = {}
    for segment in batch.segments:
        tokens[segment.client] = tokens.get(segment.client, 0) + segment.num_tokens
    return TokenLosses(values, batch.clients, batch.rows, tokens)


@contextmanager
def _packed_surroundings(base: BaseModel, branch: LoraBranch, layout: Layout) -> Iterator[None]:
    """What the model's layers must know of a packed batch while they run."""
    last, batch = base.last_layer, layout.batch
    with packed_layout(base.model, layout), branch.tokens(batch.owners):
        with read_only_at(last, batch.predict_at, branch, batch.readers) if last else nullcontext():
            yield


def _recomputed(
    base: BaseModel, branch: LoraBranch, surroundings: Callable[[], AbstractContextManager[None]]
) -> AbstractContextManager[None]:
    return (
        recomputed(base.recomputed_layers, branch, surroundings)
        if torch.is_grad_enabled()
        else nullcontext()
    )


def _padded(
    base: BaseModel,
    branch: LoraBranch,
    batches: Sequence[tuple[int, Sequence[Row]]],
    budget: int,
    draws: Draws | None,
) -> Iterator[TokenLosses]:
    """The plain path: one client at a time, with the model's own attention and head.

    Rows are padded on the right.
    """

    def forward(client: int, ids: Tensor, seen: Tensor) -> Tensor:
        surroundings = partial(branch.tokens, [(client, slice(None))])
        with surroundings(), _recomputed(base, branch, surroundings):
            logits: Tensor = base.model(input_ids=ids, attention_mask=seen, use_cache=False).logits
        return logits

    yield from padded_losses(base, forward, batches, budget, draws)


def padded_losses(
    base: BaseModel,
    forward: Callable[[int, Tensor, Tensor], Tensor],
    batches: Sequence[tuple[int, Sequence[Row]]],
    budget: int,
    draws: Draws | None = None,
    extra: int = 0,
) -> Iterator[TokenLosses]:
    """Response losses of (client, rows) batches, one client at a time, rows padded on the right.

    Args:
        forward: (client, token ids [n, L], attention mask [n, L]) -> logits [n, L, vocabulary].
        budget: most token positions in one forward pass; a longer row is computed on its own.
        draws: as in `response_losses`.
        extra: positions that the forward pass puts in front of every row.
        base: the frozen base.
        batches: (client index, rows) pairs.
    """
    for client, rows in batches:
        for chosen in _padded_chunks(rows, budget, extra):
            numbers = (
                None if draws is None else torch.cat([draws[client][index] for index in chosen])
            )
            yield _padded_pass(base, partial(forward, client), client, rows, chosen, numbers, extra)


def _padded_pass(
    base: BaseModel,
    forward: Callable[[Tensor, Tensor], Tensor],
    client: int,
    rows: Sequence[Row],
    chosen: Sequence[int],
    draws: Tensor | None,
    extra: int,
) -> TokenLosses:
    padding = base.tokenizer.pad_token_id
    sequences = [[*rows[i].prompt, *rows[i].response] for i in chosen]
    size = max(map(len, sequences))
    ids = sent(
        torch.tensor([sequence + [padding] * (size - len(sequence)) for sequence in sequences]),
        base.device,
    )
    seen = sent(
        torch.tensor(
            [[1] * len(sequence) + [0] * (size - len(sequence)) for sequence in sequences]
        ),
        base.device,
    )
    logits = forward(ids, seen)
    owner = on_device([i for i in chosen for _ in rows[i].response], base.device)
    at_row = on_device([j for j, i in enumerate(chosen) for _ in rows[i].response], base.device)
    at = on_device(
        [len(rows[i].prompt) - 1 + j for i in chosen for j in range(len(rows[i].response))],
        base.device,
    )
    scores, targets = logits[at_row, at].float(), ids[at_row, at + 1]
    if draws is not None:
        targets = draw_targets(scores.detach().log_softmax(dim=-1), sent(draws, base.device))
    values = functional.cross_entropy(scores, targets, reduction="none")
    return TokenLosses(
        values, torch.full_like(owner, client), owner, {client: ids.numel() + extra * len(chosen)}
    )


def _padded_chunks(rows: Sequence[Row], budget: int, extra: int) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt) + len(rows[i].response), i))
    chunk: list[int] = []
    for index in order:
        size = extra + len(rows[index].prompt) + len(rows[index].response)
        if chunk and size * (len(chunk) + 1) > budget:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk
