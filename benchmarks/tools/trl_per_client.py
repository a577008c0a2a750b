"""Tool (b2): one resident PEFT model, and a new TRL `SFTTrainer` for every client and round."""

from __future__ import annotations

import argparse

from peft_model import adapter_of, load_model, put_adapter
from workbench import Adapter, ClientRound, TrainRound, Work, per_client, run


def load(work: Work, arguments: argparse.Namespace) -> TrainRound:
    from trl_training import train_with_trl

    model = load_model(work, arguments.dtype)

    def train_client(adapter: Adapter, part: ClientRound) -> tuple[Adapter, float]:
        put_adapter(model, adapter)
        loss = train_with_trl(work, model, part)
        return adapter_of(model), loss

    return per_client(work, train_client)


if __name__ == "__main__":
    run(("transformers.models.llama.modeling_llama", "trl_training", "peft"), load)
