"""What `gpu_check.py` measures with: bases of random numbers, rows, a clock, a plain PEFT loop."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedmira.model import BaseModel
from launches import LLAMA_1_3B, ShapeRow, shape_of

__all__ = ["WORK", "Place", "peft_round", "rows_of"]

WORK = {
    "shared": "an instruction of 100 to 300 tokens a client, inputs of 20 to 150, answers to 40",
    "long": "600 shared tokens a client, inputs of 50 to 350, answers of 10 to 74",
    "ragged": "nothing shared, 64 to 1,024 tokens, an eighth of them answers",
    "full": "nothing shared, 1,024 tokens, 128 of them answers",
}
"""Rows by name: 8 clients with 8 rows each."""
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}


class Place:
    """Where is measured: the GPU at full size, or a CPU with tiny shapes that show the way through.

    Attributes:
        dry: whether it is the CPU.
        device, dtype: of the bases.
    """

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.bfloat16

    def rows(self, kind: str, clients: int = 8, batch: int = 8) -> list[list[ShapeRow]]:
        """Rows of a kind of `WORK`; few and short ones on a CPU."""
        return rows_of(kind, 2, 3, 16) if self.dry else rows_of(kind, clients, batch)

    @property
    def llama(self) -> LlamaConfig:
        """The shape of 1.3 billion parameters."""
        return LlamaConfig(**_TINY) if self.dry else LLAMA_1_3B

    def base(self, kind: str) -> BaseModel:
        """A base of random numbers: "llama", "grouped" (shared key heads) or "gpt2" (large)."""
        torch.manual_seed(0)
        with torch.device(self.device):
            if kind == "gpt2":
                small = GPT2Config(
                    n_embd=64,
                    n_layer=2,
                    n_head=4,
                    vocab_size=1024,
                    n_positions=512,
                    bos_token_id=1,
                    eos_token_id=2,
                )
                large = GPT2Config(n_embd=1280, n_layer=36, n_head=20)
                model: Any = GPT2LMHeadModel(small if self.dry else large)
            else:
                config = self.llama
                if kind == "grouped":
                    heads = config.num_attention_heads // 4
                    config = LlamaConfig(**{**config.to_dict(), "num_key_value_heads": heads})
                model = LlamaForCausalLM(config)
        return shape_of(model, self.dtype, str(self.device))

    def wait(self) -> None:
        """Until the device has done its work."""
        if not self.dry:
            torch.cuda.synchronize()

    def timed(
        self, work: Callable[[], object], warm: int = 2, times: int = 3
    ) -> tuple[float, float]:
        """Median milliseconds until the device is done, and until all was handed to it."""
        warm, times = (0, 1) if self.dry else (warm, times)
        for _ in range(warm):
            work()
        self.wait()
        done, handed = [], []
        for _ in range(times):
            begun = time.perf_counter()
            work()
            handed.append(time.perf_counter() - begun)
            self.wait()
            done.append(time.perf_counter() - begun)
        middle = times // 2
        return sorted(done)[middle] * 1e3, sorted(handed)[middle] * 1e3

    def forget_peak(self) -> None:
        if not self.dry:
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        """Most memory that tensors held since then; None on a CPU."""
        return None if self.dry else round(torch.cuda.max_memory_allocated() / 1e9, 2)


def rows_of(
    kind: str, clients: int = 8, batch: int = 8, shrink: int = 1, vocabulary: int = 1000
) -> list[list[ShapeRow]]:
    """Rows of each client, of a kind of `WORK`; the same on every machine."""
    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(max(1, count // shrink)))

    def between(least: int, most: int) -> tuple[int, ...]:
        return tokens(draw.randint(least, most))

    found = []
    for _ in range(clients):
        head = {"shared": between(100, 300), "long": tokens(600)}.get(kind, ())
        own = []
        for _ in range(batch):
            if kind == "shared":
                own.append(ShapeRow(head + between(20, 150), between(1, 40)))
            elif kind == "long":
                own.append(ShapeRow(head + between(50, 350), between(10, 74)))
            else:
                length = 1024 if kind == "full" else draw.randint(64, 1024)
                own.append(ShapeRow(tokens(length - length // 8), tokens(length // 8)))
        found.append(own)
    return found


def peft_round(
    base: BaseModel, rows: Sequence[Sequence[ShapeRow]], device: torch.device
) -> tuple[Callable[[], None], Callable[[], None]]:
    """One step of each client in turn, padded, as a loop over a resident PEFT model takes it.

    The second function takes the adapter off the base again.
    """
    transposed = hasattr(base.model, "transformer")  # GPT-2
    settings = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=["c_attn"] if transposed else ["q_proj", "v_proj"],
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    wrapped: Any = get_peft_model(base.model, settings)
    own = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-3, fused=device.type == "cuda")
    batches = [_padded(batch, device) for batch in rows]

    def work() -> None:
        for batch in batches:
            wrapped(**batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def restore() -> None:
        wrapped.unload()
        base.model.requires_grad_(False)

    return work, restore


def _padded(rows: Sequence[ShapeRow], device: torch.device) -> dict[str, torch.Tensor]:
    size = max(len(row.prompt) + len(row.response) for row in rows)
    ids, seen, labels = [], [], []
    for row in rows:
        rest = size - len(row.prompt) - len(row.response)
        ids.append([*row.prompt, *row.response, *[0] * rest])
        seen.append([1] * (size - rest) + [0] * rest)
        labels.append([-100] * len(row.prompt) + [*row.response] + [-100] * rest)
    parts = {"input_ids": ids, "attention_mask": seen, "labels": labels}
    return {name: torch.tensor(part, device=device) for name, part in parts.items()}
