"""What other tools call our settings, for the hint of an unknown key and for nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

__all__ = ["OTHER_NAMES"]

_NAMES: Mapping[str, Iterable[str]] = {
    "seed": ("random_seed", "random_state"),
    "model": ("llm",),
    "model.base": (
        "model.path",
        "model.id",
        "model_name",
        "model_id",
        "model_path",
        "model_name_or_path",
        "base_model",
    ),
    "model.dtype": ("torch_dtype", "precision", "bf16", "fp16"),
    "model.quantization": ("load_in_4bit", "load_in_8bit", "quantize", "quantized"),
    "adapter": ("lora", "peft"),
    "adapter.rank": ("r", "lora_r", "lora_rank"),
    "adapter.alpha": ("lora_alpha",),
    "adapter.dropout": ("lora_dropout",),
    "adapter.targets": ("target_modules", "lora_target_modules", "target_layers"),
    "adapter.virtual_tokens": (
        "num_virtual_tokens",
        "n_virtual_tokens",
        "prompt_length",
        "prefix_length",
    ),
    "data": ("dataset", "datasets"),
    "data.path": ("data_path", "data_dir", "dataset_path", "dataset_name", "train_file"),
    "data.clients": ("num_clients", "n_clients", "client_count"),
    "data.column": ("client_column", "group_by"),
    "data.max_length": (
        "max_seq_length",
        "max_seq_len",
        "seq_length",
        "cutoff_len",
        "max_len",
        "context_length",
        "max_tokens",
    ),
    "data.prompt": ("template", "prompt_template", "chat_template"),
    "data.test_rows": ("max_test_rows", "test_size"),
    "algorithm": ("strategy", "method", "aggregator"),
    "algorithm.proximal": ("mu", "prox_mu", "proximal_mu"),
    "graph.nearest": ("k", "knn", "neighbors", "num_neighbors", "n_neighbors"),
    "local": ("training", "train", "trainer", "client", "training_arguments"),
    "local.learning_rate": ("lr", "learning_rate"),
    "local.batch_size": (
        "bs",
        "batch",
        "batchsize",
        "micro_batch_size",
        "per_device_train_batch_size",
        "local_batch_size",
    ),
    "local.epochs": ("num_epochs", "epoch", "num_train_epochs", "local_epochs", "num_local_epochs"),
    "local.steps": ("max_steps", "local_steps", "num_steps"),
    "local.weight_decay": ("wd", "decay"),
    "local.max_grad_norm": ("grad_clip", "clip", "gradient_clipping", "clip_norm", "max_norm"),
    "rounds": ("fl",),
    "rounds.count": (
        "num_rounds",
        "n_rounds",
        "global_rounds",
        "communication_rounds",
        "comm_rounds",
    ),
    "rounds.participation": (
        "fraction_fit",
        "client_fraction",
        "sample_rate",
        "participation_rate",
        "client_selection_frac",
    ),
    "rounds.min_replies": ("min_fit_clients", "min_clients", "min_available_clients"),
    "evaluation": ("eval",),
    "evaluation.every": ("eval_every", "eval_steps", "eval_interval"),
    "engine.token_budget": ("max_batch_tokens", "max_tokens_per_batch"),
    "engine.recompute": ("gradient_checkpointing", "activation_checkpointing"),
    "engine.compile": ("torch_compile",),
}

OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {other: ours for ours, others in _NAMES.items() for other in others}
)
"""A key's last name, or a dotted key, in small letters -> our dotted key."""
