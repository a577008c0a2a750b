"""The Flower ClientApp of the Flower tools.

A module of its own, so that what it caches stays in the actor between messages.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft_model import adapter_of, load_model, put_adapter, train_locally
from workbench import Work, read_work

__all__ = ["app"]

app = ClientApp()

work_in = functools.cache(read_work)


@functools.cache
def cached_model(work_folder: Path, dtype: str) -> Any:
    return load_model(work_in(work_folder), dtype)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Local training of the client whose number is the partition id."""
    config = message.content["config"]
    torch.set_num_threads(1)
    folder = Path(config["workload"])
    work: Work = work_in(folder)
    client = int(context.node_config["partition-id"])
    part = next(part for part in work.rounds[config["server-round"] - 1] if part.client == client)
    model = (
        cached_model(folder, config["dtype"])
        if config["cached"]
        else load_model(work, config["dtype"])
    )
    put_adapter(model, message.content["arrays"].to_torch_state_dict())
    if config["trainer"] == "trl":
        from trl_training import train_with_trl

        loss = train_with_trl(work, model, part)
    else:
        loss = train_locally(work, model, part)
    metrics = MetricRecord({"loss": loss, "num-examples": len(work.rows[client])})
    return Message(
        content=RecordDict({"arrays": ArrayRecord(adapter_of(model)), "metrics": metrics}),
        reply_to=message,
    )
