"""Prompt templates: how an example becomes the text before the response."""

from __future__ import annotations

from fedmira.data.examples import Example

__all__ = ["alpaca_prompt", "plain_prompt"]

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def alpaca_prompt(example: Example) -> str:
    """The Alpaca form as FedKSeed and MIRA use it: the prompt ends at the response header, without a newline."""
    template = _WITH_INPUT if example.input else _WITHOUT_INPUT
    return template.format(instruction=example.instruction, input=example.input)


def plain_prompt(example: Example) -> str:
    """Instruction and input separated by blank lines, nothing else."""
    parts = [example.instruction, example.input] if example.input else [example.instruction]
    return "\n\n".join(parts) + "\n\n"
