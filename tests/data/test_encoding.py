"""Token ids: the boundary of prompt and response, special tokens, and what a limit cuts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.data import EncodedExample, Encoder, Example
from fedmira.data.encoded import HEADER_TOKENS
from fedmira.data.problems import Problems
from fedmira.data.prompts import alpaca_prompt
from fedmira.errors import DataError

ROW = Example("Name the country's calling code.", "Albania", "+355")


def encode_one(
    tokenizer: Any, row: Example, prompt: str = "alpaca", max_length: int = 512
) -> EncodedExample:
    problems = Problems()
    (example,), *_ = Encoder(tokenizer, prompt, max_length).encode([row], problems)
    problems.raise_if_any()
    return example


def test_gpt2_prompt_ends_at_the_header_and_the_response_with_the_end_token(gpt2: Any) -> None:
    example = encode_one(gpt2, ROW)
    assert gpt2.decode(list(example.prompt)) == alpaca_prompt(ROW)
    assert example.prompt[-3:] == (
        21017,
        18261,
        25,
    )  # "###", " Response", ":" in GPT-2's vocabulary
    assert example.response == (*gpt2("+355")["input_ids"], 50256)


def test_a_tokenizer_that_begins_texts_with_bos_gets_it_once_and_only_on_the_prompt(
    stories: Any,
) -> None:
    example = encode_one(stories, ROW)
    assert example.prompt == tuple(stories(alpaca_prompt(ROW))["input_ids"])
    assert (
        example.prompt[0] == stories.bos_token_id
        and example.prompt.count(stories.bos_token_id) == 1
    )
    assert example.response == (
        *stories("+355", add_special_tokens=False)["input_ids"],
        stories.eos_token_id,
    )


def test_a_tokenizer_that_ends_texts_with_eos_does_not_end_the_prompt(
    make_words: Callable[..., Any],
) -> None:
    example = encode_one(make_words("<s> $A </s>"), Example("w1", "", "w2"), "plain")
    assert example == EncodedExample((1, 6, 3, 3), (7, 2))  # <s> w1 \n \n | w2 </s>


def test_a_tokenizer_without_special_tokens_gets_none_before_the_prompt(
    make_words: Callable[..., Any],
) -> None:
    assert encode_one(make_words("$A"), Example("w1", "", "w2"), "plain").prompt == (6, 3, 3)


def test_chat_text_that_brings_its_own_bos_gets_no_second_one(words: Any) -> None:
    words.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}:{% endfor %}assistant:"
    )
    example = encode_one(words, Example("w1", "", "w2"), "chat")
    assert example.prompt == (1, 110, 109, 6, 109, 111, 109)  # <s> user : w1 : assistant :


def test_chat_text_is_encoded_as_the_tokenizer_itself_would(words: Any) -> None:
    words.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}:{% endfor %}assistant:"
    )
    own = words.apply_chat_template(
        [{"role": "user", "content": "w1"}], tokenize=True, return_dict=False
    )
    assert list(encode_one(words, Example("w1", "", "w2"), "chat").prompt) == own


def test_prompt_alone_equals_the_prompt_of_the_encoded_row(stories: Any) -> None:
    assert Encoder(stories, "alpaca", 8).prompt(ROW) == encode_one(stories, ROW).prompt


@pytest.fixture(scope="module")
def shared_words(make_words: Callable[..., Any]) -> Any:
    return make_words()


def plain_row(prompt_words: int, response_words: int) -> Example:
    """With the word tokenizer and the plain prompt.

    <s>, the words with a space between them, two line ends; a response in the same way.
    """
    return Example(
        " ".join(f"w{i % 100}" for i in range(prompt_words)), "", " ".join(["w0"] * response_words)
    )


@settings(deadline=None, max_examples=200)
@given(st.integers(8, 80), st.integers(1, 60), st.integers(1, 60))
def test_a_row_fits_keeps_some_response_and_the_prompts_head_and_header(
    shared_words: Any, max_length: int, prompt_words: int, response_words: int
) -> None:
    row = plain_row(prompt_words, response_words)
    whole = encode_one(shared_words, row, "plain", 10_000)
    example = encode_one(shared_words, row, "plain", max_length)
    lengths = len(example.prompt), len(example.response)
    assert sum(lengths) == min(max_length, len(whole.prompt) + len(whole.response))
    assert example.response == whole.response[: lengths[1]]
    assert lengths[1] >= min(len(whole.response), max_length // 2)
    if lengths[0] < len(whole.prompt):
        tail = min(HEADER_TOKENS, lengths[0] - 1)
        assert example.prompt[-tail:] == whole.prompt[-tail:]
        assert example.prompt[:-tail] == whole.prompt[: lengths[0] - tail]
        assert example.prompt[0] == shared_words.bos_token_id


def test_what_is_cut_is_counted_and_a_cut_response_has_no_end_token(words: Any) -> None:
    # Prompts: 2n - 1 words and spaces, <s>, two line ends; responses: 2n - 1 and </s>.
    rows = [
        plain_row(10, 5),
        plain_row(30, 2),
        plain_row(2, 30),
        plain_row(30, 30),
    ]  # 22+10, 62+4, 6+60, 62+60
    encoded, prompts_cut, responses_cut = Encoder(words, "plain", 40).encode(rows, Problems())
    assert [(len(row.prompt), len(row.response)) for row in encoded] == [
        (22, 10),
        (36, 4),
        (6, 34),
        (20, 20),
    ]
    assert (prompts_cut, responses_cut) == (2, 2)
    assert [row.response[-1] == words.eos_token_id for row in encoded] == [True, True, False, False]


def test_the_alpaca_header_survives_a_cut_with_both_real_tokenizers(
    gpt2: Any, stories: Any
) -> None:
    row = Example("Summarise.", "Once upon a time there was a long text. " * 40, "Short.")
    for tokenizer in (gpt2, stories):
        example = encode_one(tokenizer, row, max_length=128)
        assert len(example.prompt) + len(example.response) == 128
        assert tokenizer.decode(list(example.prompt)).endswith("### Response:")


def test_a_response_without_tokens_is_a_problem_with_its_place(words: Any) -> None:
    problems = Problems()
    rows = [Example("w1", "", "w2", where="a.jsonl:1"), Example("w1", "", "", where="a.jsonl:2")]
    encoded, *_ = Encoder(words, "plain", 40).encode(rows, problems)
    assert len(encoded) == 1
    with pytest.raises(DataError, match="^a.jsonl:2: response encodes to no token$"):
        problems.raise_if_any()


def test_a_tokenizer_without_end_token_is_refused(words: Any) -> None:
    words.eos_token = None
    with pytest.raises(DataError, match="tokenizer 'words' has no end-of-sequence token"):
        Encoder(words, "alpaca", 40)


def test_a_chat_prompt_without_template_is_refused_at_once(words: Any) -> None:
    with pytest.raises(DataError, match="tokenizer 'words' has no chat template"):
        Encoder(words, "chat", 40)


def test_rows_in_several_batches_keep_their_order(
    monkeypatch: pytest.MonkeyPatch, words: Any
) -> None:
    monkeypatch.setattr("fedmira.data.encoding.ROWS_AT_ONCE", 3)
    encoded, *_ = Encoder(words, "plain", 40).encode(
        [Example(f"w{i}", "", "w0") for i in range(8)], Problems()
    )
    assert [row.prompt[1] for row in encoded] == [5 + i for i in range(8)]
