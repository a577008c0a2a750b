"""Tool (b): one resident PEFT model, and a new `transformers.Trainer` for each client and round."""

from __future__ import annotations

import argparse
import tempfile

from peft_model import adapter_of, load_model, put_adapter
from workbench import Adapter, ClientRound, TrainRound, Work, padded_batch, per_client, run


def load(work: Work, arguments: argparse.Namespace) -> TrainRound:
    from transformers import Trainer, TrainingArguments

    model = load_model(work, arguments.dtype)
    folder = tempfile.mkdtemp(prefix="trainer-")
    settings = work.settings

    def train_client(adapter: Adapter, part: ClientRound) -> tuple[Adapter, float]:
        put_adapter(model, adapter)
        training = TrainingArguments(
            output_dir=folder,
            max_steps=len(part.batches),
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
            weight_decay=settings["weight_decay"],
            max_grad_norm=settings["max_grad_norm"],
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        rows = [row for batch in work.batches(part) for row in batch]
        outcome = Trainer(
            model=model, args=training, train_dataset=rows, data_collator=padded_batch
        ).train()
        return adapter_of(model), outcome.training_loss

    return per_client(work, train_client)


if __name__ == "__main__":
    run(("transformers.models.llama.modeling_llama", "transformers.trainer", "peft"), load)
