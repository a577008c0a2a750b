"""More inputs of the kind that `test_scores.py` is about, which nobody reported.

The bases of these tests give the answers that their rows ask for, whatever little is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.templates import TEMPLATES
from field.inputs import (
    Asked,
    base_that_says,
    byte_tokenizer,
    check,
    noted,
    run,
    run_json,
    write_clients,
)
from small import table_of

ANSWERING = {
    "local__learning_rate": 1e-6,
    "evaluation__rouge": True,
    "evaluation__max_new_tokens": 24,
    "data__prompt": "chat",
}
"""Settings under which a base's own answers are measured."""

TERSE = (
    "{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
)
"""A template under which the last character of a question stands before its answer."""


def asking(answer: str, client: str = "fern", count: int = 8) -> list[dict[str, str]]:
    """Rows of a client whose answers are all the same."""
    return [{"instruction": f"{client} {place}?", "output": answer} for place in range(count)]


def right_base(folder: Path, tokenizer: Any, answer: str) -> Path:
    """A base that gives one answer behind a question mark, and ends."""
    ids = tokenizer(f"?{answer}</s>", add_special_tokens=False)["input_ids"]
    return base_that_says(folder, tokenizer, [ids])


def scores_of(folder: Path) -> list[dict[str, str]]:
    """Each client's row of clients.csv."""
    return table_of(folder, "clients")


@pytest.mark.parametrize("form", ["alpaca", "chat"])
def test_answers_of_special_tokens_are_given_in_the_usual_forms(
    tmp_path: Path, asked: Asked, form: str
) -> None:
    """Kind H."""
    tokenizer = byte_tokenizer(TEMPLATES["chatml"][0])
    behind = {"alpaca": ":<POS></s>", "chat": "\n<POS><|im_end|>\n"}[form]
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    base = base_that_says(tmp_path / "base", tokenizer, [ids])
    rows = write_clients(tmp_path / "rows", {"fern": asking("<POS>")})
    run(tmp_path / "out", base, rows, **{**ANSWERING, "data__prompt": form})
    (fern,) = scores_of(tmp_path / "out")
    assert float(fern["after_align_loss"]) < 0.2 and float(fern["exact_match"]) == 1
    assert asked.answers == ["<POS>"] * int(fern["test_rows"])


@pytest.mark.parametrize(
    "answer", ["one</s>two", "<s>one"], ids=["an end within", "a start of sequence"]
)
def test_answers_that_are_another_text_as_tokens_are_counted(tmp_path: Path, answer: str) -> None:
    """Kind H."""
    tokenizer = byte_tokenizer(TERSE)
    base = right_base(tmp_path / "base", tokenizer, "one")
    rows = {"fern": asking("one"), "moss": asking(answer, client="moss")}
    folder = write_clients(tmp_path / "rows", rows)
    said = noted(check(base, folder, **ANSWERING), "8 of 16", "another text")
    ended = run(tmp_path / "out", base, folder, **ANSWERING)
    assert said in ended.err and said in run_json(tmp_path / "out")["notes"]
    assert [float(row["exact_match"]) for row in scores_of(tmp_path / "out")] == [1, 1]


def test_answers_longer_than_what_is_generated_are_counted(tmp_path: Path) -> None:
    """Kind H."""
    tokenizer = byte_tokenizer(TERSE)
    size = len(tokenizer("dig now", add_special_tokens=False)["input_ids"])
    base = right_base(tmp_path / "base", tokenizer, "dig now")
    folder = write_clients(tmp_path / "rows", {"fern": asking("dig now")})
    enough = check(base, folder, **{**ANSWERING, "evaluation__max_new_tokens": size})
    assert enough["notes"] == []
    short = {**ANSWERING, "evaluation__max_new_tokens": size - 1}
    noted(check(base, folder, **short), "evaluation.max_new_tokens", f"{size} tokens")


def test_answers_in_chinese_of_single_bytes_are_right(tmp_path: Path, asked: Asked) -> None:
    """Kind H: a character is several tokens here."""
    tokenizer = byte_tokenizer(TERSE)
    base = right_base(tmp_path / "base", tokenizer, "北风")
    rows = write_clients(tmp_path / "rows", {"fern": asking("北风")})
    run(tmp_path / "out", base, rows, **ANSWERING)
    (fern,) = scores_of(tmp_path / "out")
    assert set(asked.answers) == {"北风"}
    assert [float(fern[name]) for name in ("rouge_l", "exact_match")] == [1, 1]


@pytest.mark.parametrize("answer", ["+-", "👍"])
def test_a_right_answer_without_a_word_has_no_wrong_overlap(
    tmp_path: Path, asked: Asked, answer: str
) -> None:
    """Kind H."""
    tokenizer = byte_tokenizer(TERSE)
    base = right_base(tmp_path / "base", tokenizer, answer)
    rows = write_clients(tmp_path / "rows", {"fern": asking(answer)})
    run(tmp_path / "out", base, rows, **ANSWERING)
    (fern,) = scores_of(tmp_path / "out")
    if set(asked.answers) != {answer}:
        pytest.fail("the base does not answer as it should")
    assert fern["rouge_l"] in ("", "1.0")
