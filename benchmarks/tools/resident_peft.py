"""Tool (a): one resident PEFT model.

Adapters are copied in and out by hand, clients train one after another.
"""

from __future__ import annotations

import argparse

from peft_model import adapter_of, load_model, put_adapter, train_locally
from workbench import Adapter, ClientRound, TrainRound, Work, per_client, run


def load(work: Work, arguments: argparse.Namespace) -> TrainRound:
    model = load_model(work, arguments.dtype)

    def train_client(adapter: Adapter, part: ClientRound) -> tuple[Adapter, float]:
        put_adapter(model, adapter)
        loss = train_locally(work, model, part)
        return adapter_of(model), loss

    return per_client(work, train_client)


if __name__ == "__main__":
    run(("transformers.models.llama.modeling_llama", "peft"), load)
