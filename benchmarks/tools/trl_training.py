"""A client's local training by TRL's SFTTrainer, fed with token ids.

A new trainer for every client and round.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import datasets
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from workbench import ClientRound, Work

__all__ = ["train_with_trl"]

datasets.disable_progress_bars()
tokenizer_in = functools.cache(AutoTokenizer.from_pretrained)
scratch = functools.cache(functools.partial(tempfile.mkdtemp, prefix="trl-"))


def train_with_trl(work: Work, model: Any, part: ClientRound) -> float:
    """Train the model's adapter in place; returns the mean loss of the steps."""
    settings = work.settings
    training = SFTConfig(
        output_dir=scratch(),
        max_steps=len(part.batches),
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_length=None,
        completion_only_loss=True,
        # TRL's own default is True, which computes the forward pass twice
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [
        {
            "input_ids": [*prompt, *response],
            "completion_mask": [0] * len(prompt) + [1] * len(response),
        }
        for batch in work.batches(part)
        for prompt, response in batch
    ]
    dataset = datasets.Dataset.from_list(rows)
    trainer = SFTTrainer(
        model=model, args=training, train_dataset=dataset, processing_class=tokenizer_in(work.base)
    )
    return float(trainer.train().training_loss)
