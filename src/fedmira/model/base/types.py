"""The frozen base model as a value: its weights, its tokenizer, and how its passes are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmira.model.base.layers import LastLayer

__all__ = ["BaseModel", "TargetModule", "num_embeddings"]


@dataclass(frozen=True, slots=True)
class TargetModule:
    """A linear layer that carries a LoRA branch.

    Attributes:
        name: its path in the model, such as "model.layers.0.self_attn.q_proj".
        inputs, outputs: sizes of its input and output, whatever way its weight is stored.
        stored_transposed: True for GPT-2's Conv1D, whose weight is inputs x outputs (PEFT's
            fan_in_fan_out).
    """

    name: str
    inputs: int
    outputs: int
    stored_transposed: bool


@dataclass(frozen=True)
class BaseModel:
    """A loaded, frozen base model with its tokenizer.

    Attributes:
        model: the transformers model, in eval mode, no parameter requires a gradient.
        tokenizer: its tokenizer, with a padding token.
        name: what the user called it; `location` is the folder or hub id it was loaded from.
        sha256: hash of names, shapes and bytes of all its parameters.
        packed: whether packed steps give this architecture's own result (probed); if not, the
            padded path is used.
        last_layer: where packed steps leave work out whose result nobody reads, or None where the
            probe found a difference.
        attention: how packed attention runs (probed too), a name of `ATTENTION` in
            `model/packed/attention.py`; "" is the fastest way of the device.
        attention_in_windows: how it runs in layers with a window where rows are longer than that;
            "" where no layer has one.
        recomputed_layers: layers that training computes a second time in the backward pass, to save
            memory.
        published: the name under which others can have the base, "" where there is none.
        location: its folder; empty for a model in memory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    location: str
    sha256: str
    packed: bool = False
    last_layer: LastLayer | None = None
    attention: str = ""
    attention_in_windows: str = ""
    recomputed_layers: Sequence[nn.Module] = ()
    published: str = ""

    @property
    def known_as(self) -> str:
        """What saved adapters call their base.

        Its published name, else where it was loaded from.
        """
        return self.published or self.location

    @property
    def reloadable(self) -> bool:
        """Whether it can be loaded again: from a folder or by a hub id, and not quantised."""
        config = self.model.config
        from_files = self.location == self.published or Path(self.location).is_dir()
        return from_files and not getattr(config, "quantization_config", None)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The number type of its weights."""
        return next(self.model.parameters()).dtype

    @property
    def num_parameters(self) -> int:
        """Number of its weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_embeddings(self) -> int:
        """Number of tokens it has embeddings for."""
        return num_embeddings(self.model)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence it can read, or None where its config does not say."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        # Some tables of positions begin behind the row of the padding token.
        taken = next(
            (
                module.padding_idx + 1
                for name, module in self.model.named_modules()
                if name.endswith("position_embeddings")
                and isinstance(module, nn.Embedding)
                and module.padding_idx is not None
            ),
            0,
        )
        return int(limit) - taken if limit and limit > 0 else None

    @property
    def mixing_positions(self) -> int | None:
        """Rows longer than this change the rotary frequencies of all rows of a pass ("longrope").

        None where no length does.
        """
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") != "longrope":
            return None
        limit = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        return int(limit) if limit else None


def num_embeddings(model: PreTrainedModel) -> int:
    """Number of tokens that a model has embeddings for."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]
