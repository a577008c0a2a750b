"""Prompt forms as Jinja: what transformers renders is, token by token, the prompt of training."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from fedmira.data import Encoder, Example, asked, chat_template_of, messages_to_send, wrong_prompt
from fedmira.errors import DataError
from tiny import tiny_tokenizer

TEXT = st.text(max_size=30)
ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
TOKENIZER = tiny_tokenizer()
FORMS = ("alpaca", "plain")


def encoder_of(form: str, tokenizer: Any = TOKENIZER) -> Encoder:
    return Encoder(tokenizer, form, 64)


def rendered(form: str, messages: list[dict[str, str]], **options: Any) -> str:
    template = chat_template_of(form, TOKENIZER, encoder_of(form), **options)
    return str(
        TOKENIZER.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    )


def trained(form: str, example: Example) -> str:
    from fedmira.data import PROMPTS

    return PROMPTS[form](example, TOKENIZER)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(instruction=TEXT, text=TEXT.filter(bool))
def test_a_request_reads_as_in_training(form: str, instruction: str, text: str) -> None:
    example = asked({"instruction": instruction}, text)
    messages = messages_to_send(form, encoder_of(form), example)
    assert rendered(form, messages, conversation=False) == trained(form, example)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(instruction=TEXT.filter(bool), text=TEXT.filter(bool))
def test_a_template_may_hold_the_instruction(form: str, instruction: str, text: str) -> None:
    example = asked({"instruction": instruction}, text)
    found = rendered(
        form, [{"role": "user", "content": text}], conversation=False, instruction=instruction
    )
    assert found == trained(form, example)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(turns=st.lists(st.tuples(ROLES, TEXT), min_size=1, max_size=5))
def test_a_conversation_reads_as_in_training(form: str, turns: list[tuple[str, str]]) -> None:
    example = Example("", "", "", messages=tuple(turns))
    messages = messages_to_send(form, encoder_of(form), example)
    assert rendered(form, messages, conversation=True) == trained(form, example)


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_and_its_end_follow_the_prompt(form: str) -> None:
    template = chat_template_of(form, TOKENIZER, encoder_of(form), conversation=False)
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    found = TOKENIZER.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert found == trained(form, Example("w1", "", "")) + "w2 w3<eos>"


def test_a_history_that_was_not_trained_is_refused_in_words() -> None:
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    with pytest.raises(TemplateError, match="trained on single requests"):
        rendered("alpaca", [*turns, {"role": "user", "content": "w3"}], conversation=False)


def test_the_start_of_sequence_is_written_where_training_had_it() -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    encoder = encoder_of("plain", tokenizer)
    example = asked({"instruction": "w1"}, "w2")
    template = chat_template_of("plain", tokenizer, encoder, conversation=False)
    messages = messages_to_send("plain", encoder, example)
    assert encoder.prompt(example)[0] == 1
    assert wrong_prompt(tokenizer, encoder, template, example, messages) == ""
    bare = chat_template_of("plain", tokenizer, encoder_of("plain"), conversation=False)
    assert "differ from token 1 on" in wrong_prompt(tokenizer, encoder, bare, example, messages)


def test_the_form_chat_is_the_tokenizers_own_template_or_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}w1 {{ message['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}w1 {% endif %}"
    )
    encoder = encoder_of("chat", tokenizer)
    assert (
        chat_template_of("chat", tokenizer, encoder, conversation=True) == tokenizer.chat_template
    )
    tokenizer.chat_template = "{{ strftime_now('%Y') }} " + tokenizer.chat_template
    with pytest.raises(DataError, match="asks for the time"):
        chat_template_of("chat", tokenizer, encoder_of("chat", tokenizer), conversation=True)


def test_earlier_turns_stand_between_the_system_message_and_the_question() -> None:
    shared = {"conversation": True, "system": "w9"}
    before = (("user", "w1"), ("assistant", "w2"))
    assert asked(shared, "w3", before).messages == (("system", "w9"), *before, ("user", "w3"))
