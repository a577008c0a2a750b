"""Makes a workload folder, which holds what every tool trains on.

A frozen base, a start adapter, tokenised rows of 8 clients, and their batches.

    python benchmarks/workload.py FOLDER --workload shared --model 3m --rounds 6

| file | what |
|---|---|
| base/ | a random Llama in Hugging Face format with the tokenizer of the bundled base |
| start.safetensors | the adapter of round 1, under PEFT's names |
| workload.json | settings, rows as token ids, and row numbers of each batch by round, client and
step |
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from fedmira.config import DataSettings, LocalSettings, ModelSettings
from fedmira.data import ClientData, EncodedExample, Tokenizer, load_clients
from fedmira.model import find_targets, load_tokenizer, start_adapter
from fedmira.model.training.batches import batch_indices

__all__ = ["MODELS", "WORKLOADS", "make_workload"]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SEED = 11
TARGETS = ("q_proj", "v_proj")
LOCAL = LocalSettings(steps=5, batch_size=8, learning_rate=1e-3)

MODELS: dict[str, dict[str, object]] = {
    # name: hidden size, intermediate size, layers, heads, key-value heads, one matrix for
    # embeddings and head
    "0.3m": {
        "hidden_size": 48,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "1m": {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "3m": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "10m": {
        "hidden_size": 320,
        "intermediate_size": 1024,
        "num_hidden_layers": 7,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
    },
    "25m": {
        "hidden_size": 384,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "100m": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 11,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
}


def shared_instructions(tokenizer: Tokenizer, clients: int) -> list[ClientData]:
    """Natural Instructions, one task a client.

    The rows of a client begin with the same instruction.
    """
    found = _load(
        "natural-instructions",
        tokenizer,
        partition="task",
        prompt="alpaca",
        max_rows=128,
        min_rows=64,
    )
    again = [
        replace(client, client_id=f"{client.client_id}-again")
        for client in found[: max(0, clients - len(found))]
    ]
    return [*found[:: max(1, len(found) // clients)], *again][:clients]


def dolly(tokenizer: Tokenizer, clients: int) -> list[ClientData]:
    """Dolly, one category a client (more clients divide the categories).

    Rows share little but the template's preamble.
    """
    per_category = -(-clients // 8)
    return _load(
        "dolly",
        tokenizer,
        partition="category",
        prompt="alpaca",
        max_rows=128,
        clients_per_category=per_category,
    )[:clients]


def ragged(tokenizer: Tokenizer, clients: int) -> list[ClientData]:
    """Rows of both, tasks mixed in every client, lengths spread evenly over 20 to 512 tokens."""
    everything = [
        *_load("natural-instructions", tokenizer, prompt="plain"),
        *_load("dolly", tokenizer, prompt="plain", partition="category"),
    ]
    pool = sorted(
        (row for client in everything for row in client.train),
        key=lambda row: (len(row.prompt) + len(row.response), row.prompt),
    )
    lengths = [len(row.prompt) + len(row.response) for row in pool]
    draw = random.Random(SEED)
    chosen: list[ClientData] = []
    for number in range(clients):
        rows = []
        for _ in range(144):
            wanted = draw.randint(20, 512)
            near = [i for i, length in enumerate(lengths) if abs(length - wanted) <= 4]
            rows.append(pool[draw.choice(near)])
        chosen.append(
            ClientData(
                f"mixed-{number}",
                "mixed",
                "mixed",
                tuple(rows[:128]),
                (),
                tuple(rows[128:]),
                ("",) * 16,
            )
        )
    return chosen


def equal_lengths(tokenizer: Tokenizer, clients: int, length: int) -> list[ClientData]:
    """Rows of exactly `length` tokens cut from running text, 16 of them response.

    For the curve against length.
    """
    source = [
        row
        for client in _load("dolly", tokenizer, prompt="plain", partition="category")
        for row in client.train
    ]
    text = [token for row in source for token in (*row.prompt, *row.response)]
    chosen = []
    for number in range(clients):
        starts = range(number * 7919, number * 7919 + 64 * 997, 997)
        rows = [[text[(start + i) % len(text)] for i in range(length)] for start in starts]
        examples = tuple(EncodedExample(tuple(row[:-16]), tuple(row[-16:])) for row in rows)
        chosen.append(ClientData(f"text-{number}", "text", "text", examples, (), (), ()))
    return chosen


WORKLOADS = {"shared": shared_instructions, "dolly": dolly, "ragged": ragged}


def make_workload(
    folder: Path,
    workload: str,
    model: str,
    rounds: int,
    clients: int = 8,
    rank: int = 16,
    steps: int = 5,
) -> None:
    """Write the folder; equal arguments give equal files.

    Args:
        workload: a key of `WORKLOADS`, or "length-N" for rows of N tokens.
    """
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(ModelSettings(base="bundled"))
    kind, _, length = workload.partition("-")
    data = (
        equal_lengths(tokenizer, clients, int(length))
        if kind == "length"
        else WORKLOADS[workload](tokenizer, clients)
    )
    if len(data) < clients:
        raise SystemExit(
            f"workload {workload!r} has only {len(data)} clients; {clients} were asked for"
        )
    local = LOCAL.model_copy(update={"steps": steps})
    _write(
        folder,
        random_base(model),
        tokenizer,
        data,
        rounds,
        rank,
        local,
        {"workload": workload, "model": model},
    )


def random_base(model: str) -> LlamaForCausalLM:
    """A random float32 Llama of the size table."""
    torch.manual_seed(SEED)
    shape = {
        "tie_word_embeddings": True,
        "vocab_size": 4096,
        "max_position_embeddings": 2048,
        **MODELS[model],
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, **special)).eval()


def _write(
    folder: Path,
    base: LlamaForCausalLM,
    tokenizer: Tokenizer,
    data: Sequence[ClientData],
    rounds: int,
    rank: int,
    local: LocalSettings,
    names: dict[str, str],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    save_file(
        start_adapter(find_targets(base, TARGETS), rank, SEED),
        folder / "start.safetensors",
        metadata={"format": "pt"},
    )
    settings = {
        **names,
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "rank": rank,
        "alpha": 16.0,
        "targets": list(TARGETS),
        **{
            key: getattr(local, key)
            for key in (
                "optimizer",
                "steps",
                "batch_size",
                "learning_rate",
                "weight_decay",
                "max_grad_norm",
            )
        },
    }
    content = {
        "settings": settings,
        "clients": [
            {
                "id": client.client_id,
                "train": [[row.prompt, row.response] for row in client.train],
                "prompts": [row.prompt for row in client.test[:16]],
            }
            for client in data
        ],
        "rounds": [
            [_client_round(data, number, client, local) for client in range(len(data))]
            for number in range(1, rounds + 1)
        ],
    }
    (folder / "workload.json").write_text(json.dumps(content), encoding="utf-8")


def _client_round(
    data: Sequence[ClientData], number: int, client: int, local: LocalSettings
) -> dict[str, object]:
    seed = SEED + 1000 * number + client
    return {
        "client": client,
        "seed": seed,
        "batches": list(batch_indices(len(data[client].train), local, seed)),
    }


def _load(source: str, tokenizer: Tokenizer, **settings: object) -> list[ClientData]:
    data = DataSettings.model_validate(
        {
            "source": source,
            "path": str(DATA / source),
            "max_length": 512,
            "test_rows": 16,
            **settings,
        }
    )
    return list(load_clients(data, SEED, tokenizer).clients)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workload", choices=WORKLOADS, default="shared")
    parser.add_argument("--model", choices=MODELS, default="3m")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    make_workload(
        arguments.folder,
        arguments.workload,
        arguments.model,
        arguments.rounds,
        arguments.clients,
        arguments.rank,
    )


if __name__ == "__main__":
    main()
