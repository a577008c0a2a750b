"""The text before the response, byte by byte."""

from __future__ import annotations

from typing import Any

import pytest

from fedmira.data import PROMPTS, Example
from fedmira.data.prompts import alpaca_prompt, chat_prompt, plain_prompt
from fedmira.errors import DataError

CONVERSATION = Example(
    "",
    "",
    "4",
    messages=(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "2+2?")),
)


def test_alpaca_with_input_is_the_published_template_and_ends_at_the_header() -> None:
    assert alpaca_prompt(Example("Name the colour.", "sky {x}", "blue")).encode() == (
        b"Below is an instruction that describes a task, paired with an input that "
        b"provides further context. "
        b"Write a response that appropriately completes the request.\n\n"
        b"### Instruction:\nName the colour.\n\n### Input:\nsky {x}\n\n### Response:"
    )


def test_alpaca_without_input_leaves_the_input_block_out() -> None:
    assert alpaca_prompt(Example("Name a colour.", "", "blue")).encode() == (
        b"Below is an instruction that describes a task. "
        b"Write a response that appropriately completes the request.\n\n"
        b"### Instruction:\nName a colour.\n\n### Response:"
    )


def test_alpaca_of_a_conversation_takes_the_last_user_message_as_instruction() -> None:
    prompt = alpaca_prompt(CONVERSATION)
    assert (
        "### Instruction:\n2+2?\n\n### Input:\nSystem: Be brief.\n\nUser: Hi\n\nAssistant: "
        "Hello.\n\n### Response:" in prompt
    )


def test_alpaca_of_one_message_has_no_input_block() -> None:
    assert "### Input" not in alpaca_prompt(Example("", "", "x", messages=(("user", "Hi"),)))


def test_plain_is_the_instruction_and_the_input_and_nothing_else() -> None:
    assert plain_prompt(Example("Do.", "this", "x")) == "Do.\n\nthis\n\n"
    assert plain_prompt(Example("Do.", "", "x")) == "Do.\n\n"


def test_plain_of_a_conversation_ends_where_the_assistant_speaks() -> None:
    assert (
        plain_prompt(CONVERSATION)
        == "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello.\n\nUser: 2+2?\n\nAssistant:"
    )


def test_the_table_renders_as_the_functions_do(words: Any) -> None:
    example = Example("Do.", "this", "x")
    assert PROMPTS["alpaca"](example, words) == alpaca_prompt(example)
    assert PROMPTS["plain"](example, words) == plain_prompt(example)


def test_chat_uses_the_tokenizers_template_up_to_the_answer(words: Any) -> None:
    words.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert chat_prompt(Example("Do.", "this", "x"), words) == "<s>[user]Do.\n\nthis[assistant]"
    assert (
        chat_prompt(CONVERSATION, words)
        == "<s>[system]Be brief.[user]Hi[assistant]Hello.[user]2+2?[assistant]"
    )


def test_chat_without_a_template_names_the_tokenizer_and_the_way_out(gpt2: Any) -> None:
    with pytest.raises(
        DataError, match=r"gpt2-tokenizer' has no chat template; set data.prompt = \"alpaca\""
    ):
        chat_prompt(Example("Do.", "", "x"), gpt2)


def test_a_row_that_the_template_refuses_is_named(words: Any) -> None:
    words.chat_template = (
        "{% for m in messages %}{% if m.content == 'Do.' %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}{% endfor %}"
    )
    with pytest.raises(
        DataError,
        match=r"mine.jsonl:3: the chat template of 'words' refuses this row \(roles must "
        r"alternate\)",
    ):
        chat_prompt(Example("Do.", "", "x", where="mine.jsonl:3"), words)
