"""Counts what a step asks of a device, on PyTorch's meta device, where tensors have no numbers.

A count is one of aten operators that start a kernel, so it holds for eager PyTorch and says nothing
of time. What it is for: does the number grow with the clients of a cohort?
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedmira.config import LocalSettings
from fedmira.model import (
    BaseModel,
    LocalTask,
    LoraBranch,
    StackedAdapters,
    find_targets,
    response_losses,
    start_adapter,
)
from fedmira.model.base.layers import find_last_layer
from fedmira.model.base.memory import PassLimit
from fedmira.model.lora.stack import GROUP_MULTIPLE
from fedmira.model.training.steps import _Cohort

__all__ = [
    "LLAMA_1_3B",
    "CountLaunches",
    "ShapeRow",
    "cohort_on",
    "count_step",
    "llama",
    "shape_of",
    "shared_rows",
]

LLAMA_1_3B = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=32000,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
_NOTHING = {
    "_reshape_alias",
    "_unsafe_view",
    "detach",
    "detach_",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "set_",
}
"""Operators that only describe or reserve memory, beside those whose schema says "view"."""
_SEVERAL = {
    "_flash_attention_backward": 4,
    "_flash_attention_forward": 2,
    "_grouped_mm": 2,
    "_varlen_attn": 2,
    "_varlen_attn_backward": 4,
    "index_put_": 2,
}
"""Kernels of operators that start more than one, as their CUDA code reads; one unless named."""


class CountLaunches(TorchDispatchMode):
    """Within the block, the kernels that operators on `device` would start are counted.

    Attributes:
        operators: name of the operator -> kernels.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self._device = device

    @property
    def total(self) -> int:
        return self.operators.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        there = any(
            isinstance(leaf, torch.Tensor) and leaf.device.type == self._device
            for leaf in tree_leaves((args, kwargs, result))
        )
        if there and not func.is_view and name not in _NOTHING:
            self.operators[name] += _SEVERAL.get(name, 1)
        return result


@dataclass(frozen=True)
class ShapeRow:
    """Token ids of a prompt and a response."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


class _Tokens:
    """All that passes and answers in token ids ask of a tokenizer."""

    pad_token_id, eos_token_id, chat_template = 0, 2, None

    def __len__(self) -> int:
        return 1000


def shape_of(
    model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16, device: str = "meta"
) -> BaseModel:
    """A model made of its config as a packed base, without a trial, which needs numbers."""
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)  # type: ignore[no-untyped-call, call-arg]
    return BaseModel(
        model,
        _Tokens(),  # type: ignore[arg-type]
        type(model).__name__,
        "",
        "",
        packed=True,
        last_layer=find_last_layer(model),
    )


def llama(config: LlamaConfig = LLAMA_1_3B) -> BaseModel:
    """A Llama of that shape on the meta device: no weight exists."""
    with torch.device("meta"):
        return shape_of(LlamaForCausalLM(config))


def shared_rows(clients: int, batch: int = 8, seed: int = 0) -> list[list[ShapeRow]]:
    """Rows of clients whose prompts begin with an instruction of 100 to 300 tokens of their own.

    Behind it come 20 to 150 tokens of input; responses have 1 to 40 tokens.
    """
    draw = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 1000) for _ in range(count))

    found = []
    for _ in range(clients):
        head = tokens(draw.randint(100, 300))
        found.append(
            [
                ShapeRow(head + tokens(draw.randint(20, 150)), tokens(draw.randint(1, 40)))
                for _ in range(batch)
            ]
        )
    return found


def cohort_on(
    base: BaseModel,
    rows: Sequence[Sequence[ShapeRow]],
    budget: int,
    ranks: Sequence[int] = (16,),
    grouped: bool | None = None,
) -> _Cohort:
    """One client for each list of rows, trained by AdamW with all of them in every batch.

    Adapters begin with random B, so that every product has something to say.

    Args:
        ranks: of the clients in turn.
        grouped: whether their branches are one product; None leaves it to the device.
    """
    targets = find_targets(base.model, ())
    draw = torch.Generator().manual_seed(0)
    starts = {
        rank: {
            name: tensor + 0.01 * torch.randn(tensor.shape, generator=draw)
            for name, tensor in start_adapter(targets, rank, 0).items()
        }
        for rank in dict.fromkeys(ranks)
    }
    tasks = [
        LocalTask(starts[ranks[k % len(ranks)]], 1.0, own, k)  # type: ignore[arg-type]
        for k, own in enumerate(rows)
    ]
    stacked = StackedAdapters(
        targets,
        [task.start for task in tasks],
        [task.scale for task in tasks],
        base.device,
        multiple=GROUP_MULTIPLE,
    )
    branch = LoraBranch(base.model, stacked, grouped=grouped)
    settings = LocalSettings(
        optimizer="adamw", steps=64, batch_size=len(rows[0]), learning_rate=1e-3
    )
    return _Cohort(
        branch, partial(response_losses, base, branch), tasks, settings, budget, PassLimit()
    )


def count_step(
    base: BaseModel, rows: Sequence[Sequence[ShapeRow]], budget: int, ranks: Sequence[int] = (16,)
) -> CountLaunches:
    """The kernels of one local step of all clients, forward, backward and optimizer."""
    moving = cohort_on(base, rows, budget, ranks)
    with moving.branch, CountLaunches() as counted:
        assert moving.step()
    return counted
