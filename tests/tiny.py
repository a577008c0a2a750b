"""Tiny random models of several architectures, and rows for them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fedmira.model import BaseModel, from_model

__all__ = [
    "ARCHITECTURES",
    "VOCABULARY",
    "TinyRow",
    "draw_rows",
    "tiny_base",
    "tiny_model",
    "tiny_tokenizer",
]

VOCABULARY = 97
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}

ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED, head_dim=8)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=16)
    ),
}


@dataclass(frozen=True)
class TinyRow:
    """Token ids of a prompt and a response."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


def tiny_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model with two layers, large enough weights to tell tokens apart."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    return model.float().eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ... with pad, bos and eos."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def tiny_base(architecture: str = "llama", seed: int = 0) -> BaseModel:
    """The tiny model, frozen and probed."""
    return from_model(tiny_model(architecture, seed), tiny_tokenizer(), f"tiny {architecture}")


def draw_rows(count: int, shared: int, seed: int, longest: int = 12) -> list[TinyRow]:
    """Rows whose prompts begin with `shared` equal tokens, of ragged length."""
    draw = random.Random(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(length))

    head = tokens(shared)
    return [
        TinyRow(head + tokens(draw.randint(1, longest)), tokens(draw.randint(1, 6)))
        for _ in range(count)
    ]
