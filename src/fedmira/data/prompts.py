"""Prompt templates: how an example becomes the text before the response."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from fedmira.data.examples import Example
from fedmira.data.rendering import ChatTemplate
from fedmira.data.tokenizer import Tokenizer

__all__ = ["PROMPTS", "PromptTemplate", "alpaca_prompt", "chat_prompt", "plain_prompt"]

PromptTemplate = Callable[[Example, Tokenizer], str]

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def alpaca_prompt(example: Example) -> str:
    """The Alpaca form as FedKSeed and MIRA use it.

    The prompt ends at the response header, without a newline.

    Of a conversation, the last user message is the instruction and all other messages are the
    input.
    """
    instruction, material = (
        _instruction_and_rest(example.messages)
        if example.messages
        else (example.instruction, example.input)
    )
    template = _WITH_INPUT if material else _WITHOUT_INPUT
    return template.format(instruction=instruction, input=material)


def plain_prompt(example: Example) -> str:
    """Instruction and input separated by blank lines, nothing else.

    A conversation as "User: ..." and "Assistant: ..." blocks.
    """
    if example.messages:
        return f"{_transcript(example.messages)}\n\nAssistant:"
    parts = [example.instruction, example.input] if example.input else [example.instruction]
    return "\n\n".join(parts) + "\n\n"


def chat_prompt(example: Example, tokenizer: Tokenizer) -> str:
    """The tokenizer's own chat template, up to where the answer begins.

    An instruction row is one user message.

    Args:
        example: the row, in the one shape that prompts are made of.
        tokenizer: that of the base.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the messages (roles
            that do not alternate, say).
    """
    return ChatTemplate(tokenizer).prompt(example)


PROMPTS: Mapping[str, PromptTemplate] = MappingProxyType(
    {
        "alpaca": lambda example, _: alpaca_prompt(example),
        "chat": chat_prompt,
        "plain": lambda example, _: plain_prompt(example),
    }
)


def _instruction_and_rest(messages: Sequence[tuple[str, str]]) -> tuple[str, str]:
    users = [i for i, (role, _) in enumerate(messages) if role == "user"]
    chosen = users[-1] if users else len(messages) - 1
    return messages[chosen][1], _transcript(
        [message for i, message in enumerate(messages) if i != chosen]
    )


def _transcript(messages: Sequence[tuple[str, str]]) -> str:
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in messages)
