"""Bits per byte of a causal language model on the text of Natural Instructions task files.

    python experiments/bundled_base/measure_bits_per_byte.py --tasks TASKS [--base bundled] [--rows
    100]

A row's text is instruction, input and first output, joined by blank lines, each row read on its own
after the start token in windows of the model's context. Bits of all its tokens and of the end token
are divided by its UTF-8 bytes. Rows are the first --rows of each task (0 = all). Two figures: over
whole rows, and over the output alone after the Alpaca prompt.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as functional

from fedmira.config import ModelSettings
from fedmira.data import Example
from fedmira.data.prompts import alpaca_prompt
from fedmira.model import BaseModel, load_base


def nats(base: BaseModel, head: list[int], scored: list[int]) -> float:
    """Minus log probability of `scored` after `head`, in windows that overlap by half."""
    context = base.max_positions or 512
    ids = [*head, *scored]
    total, place = 0.0, len(head)
    while place < len(ids):
        start = 0 if place == len(head) and len(ids) <= context else max(0, place - context // 2)
        window = ids[start : start + context]
        logits = base.model(input_ids=torch.tensor([window], device=base.device)).logits[0].float()
        targets = torch.tensor(ids[place : start + len(window)], device=base.device)
        total += float(
            functional.cross_entropy(
                logits[place - start - 1 : place - start - 1 + len(targets)],
                targets,
                reduction="sum",
            )
        )
        place = start + len(window)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--base", default="bundled")
    parser.add_argument("--rows", type=int, default=100)
    arguments = parser.parse_args()
    base = load_base(ModelSettings(base=arguments.base))
    tokenizer = base.tokenizer
    figures = {"text": [0.0, 0], "output": [0.0, 0]}
    rows = 0

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    with torch.no_grad():
        for path in sorted(arguments.tasks.glob("*.json")):
            task = json.loads(path.read_text(encoding="utf-8"))
            for instance in task["Instances"][: arguments.rows or None]:
                example = Example(task["Definition"][0], instance["input"], instance["output"][0])
                text = "\n\n".join(
                    part for part in (example.instruction, example.input, example.output) if part
                )
                end, start = (
                    [tokenizer.eos_token_id],
                    [tokenizer.bos_token_id or tokenizer.eos_token_id],
                )
                figures["text"][0] += nats(base, start, encode(text) + end)
                figures["text"][1] += len(text.encode())
                prompt = (start + encode(alpaca_prompt(example)))[
                    -(base.max_positions or 512) // 2 :
                ]
                figures["output"][0] += nats(base, prompt, encode(example.output) + end)
                figures["output"][1] += len(example.output.encode())
                rows += 1
    result = {name: round(total / math.log(2) / size, 4) for name, (total, size) in figures.items()}
    print(
        json.dumps(
            {
                "base": arguments.base,
                "rows": rows,
                "bits_per_byte_text": result["text"],
                "bits_per_byte_output_after_prompt": result["output"],
            }
        )
    )


if __name__ == "__main__":
    main()
