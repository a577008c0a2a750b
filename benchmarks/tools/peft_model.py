"""A base with one PEFT adapter, and a client's plain local training on it.

Shared by the tools that are written by hand.
"""

from __future__ import annotations

from typing import Any

from workbench import Adapter, ClientRound, Work, padded_batch

__all__ = ["adapter_of", "load_base", "load_model", "put_adapter", "train_locally", "with_adapter"]


def load_base(work: Work, dtype: str) -> Any:
    """The frozen base, from its folder."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(work.base, dtype=getattr(torch, dtype))


def with_adapter(work: Work, base: Any) -> Any:
    """The base wrapped by PEFT; the adapter is float32 whatever the base is."""
    from peft import LoraConfig, get_peft_model

    settings = work.settings
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=0.0,
        target_modules=settings["targets"],
    )
    return get_peft_model(base, config)


def load_model(work: Work, dtype: str) -> Any:
    """Base and adapter, anew."""
    return with_adapter(work, load_base(work, dtype))


def put_adapter(model: Any, adapter: Adapter) -> None:
    """Copy an adapter into the model's own parameters."""
    import torch

    with torch.no_grad():
        for name, parameter in _parameters(model).items():
            parameter.copy_(adapter[name])


def adapter_of(model: Any) -> Adapter:
    """A copy of the model's adapter."""
    return {name: parameter.detach().clone() for name, parameter in _parameters(model).items()}


def train_locally(work: Work, model: Any, part: ClientRound) -> float:
    """AdamW over the client's batches, rows padded on the right.

    Returns nats per response token.
    """
    import torch

    settings = work.settings
    parameters = list(_parameters(model).values())
    optimizer = torch.optim.AdamW(
        parameters, lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
    )
    model.train()
    total, count = 0.0, 0
    for rows in work.batches(part):
        batch = padded_batch(rows)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(len(response) for _, response in rows)
        total, count = total + loss.item() * tokens, count + tokens
    return total / count


def _parameters(model: Any) -> dict[str, Any]:
    return {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
