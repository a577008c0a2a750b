"""Right answers are scored as right, and what cannot be right is said before training.

The bases of these tests answer by the last word of a prompt, and are hardly trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from field.inputs import (
    Reads,
    base_that_says,
    call,
    card_says,
    check,
    noted,
    run,
    run_json,
    write_clients,
    write_lines,
)
from small import table_of

SCORED: dict[str, Any] = {
    "data__prompt": "plain",
    "local__learning_rate": 1e-6,
    "evaluation__rouge": True,
    "evaluation__max_new_tokens": 8,
}
NUMBERS = [f"n{place}" for place in range(24)]


def words_of(*texts: str, special: Sequence[str] = (), lower: bool = False) -> Any:
    """A tokenizer with one token for each word of these texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *special, "ask", *NUMBERS]
    words += [word for text in texts for word in text.split()]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        backend.normalizer = normalizers.Lowercase()
    made: Any = PreTrainedTokenizerFast
    return made(
        tokenizer_object=backend,
        additional_special_tokens=list(special),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def answering(folder: Path, tokenizer: Any, answers: Mapping[str, str], *ends: str) -> Path:
    """A base that gives an answer by the last word of a question.

    Args:
        folder: where it is written.
        tokenizer: one of `words_of`.
        answers: last word -> answer.
        ends: words that end an answer by generation_config.json, besides the usual token.
    """
    sequences = [
        tokenizer.convert_tokens_to_ids([word, *answer.split(), "</s>"])
        for word, answer in answers.items()
    ]
    stops = tokenizer.convert_tokens_to_ids(["</s>", *ends])
    return base_that_says(folder, tokenizer, sequences, {"eos_token_id": stops})


def questions(word: str, answer: str, count: int = 12, first: int = 0) -> list[dict[str, str]]:
    """Rows that all end in a word and have one answer."""
    return [
        {"instruction": "ask", "input": f"{NUMBERS[first + place]} {word}", "output": answer}
        for place in range(count)
    ]


def scores(folder: Path) -> dict[str, dict[str, float]]:
    """Client -> its figures."""
    return {
        row["client"]: {
            name: float(row[name]) for name in ("rouge_l", "exact_match", "after_align_loss")
        }
        for row in table_of(folder, "clients")
    }


# Kind H: scores on text that cannot match.


@pytest.mark.parametrize(
    ("yes", "no"),
    [("<POS>", "<NEG>"), ("<POS> sure", "<NEG> sure"), ("so <POS>", "so <NEG>")],
    ids=["alone", "in front", "behind"],
)
def test_answers_of_special_tokens_are_printed_and_scored(
    yes: str, no: str, tmp_path: Path
) -> None:
    """Kind H."""
    tokenizer = words_of("wet dry so sure", special=("<POS>", "<NEG>"))
    base = answering(tmp_path / "base", tokenizer, {"wet": yes})
    rows = tmp_path / "rows"
    write_lines(rows / "fern" / "train.jsonl", questions("wet", yes))
    # The base says yes where it should say no in one of four test rows.
    tested = [*questions("wet", yes, 3, 12), *questions("wet", no, 1, 15)]
    write_lines(rows / "fern" / "test.jsonl", tested)
    output = tmp_path / "run"
    run(output, base, rows, **SCORED)
    assert scores(output)["fern"]["exact_match"] == 3 / 4
    assert "notes" not in run_json(output)
    ended = call("generate", output, "--client", "fern", "n20 wet")
    assert (ended.code, ended.out) == (0, f"{yes}\n")


def test_the_cards_code_prints_answers_of_special_tokens_as_generate_does(
    tmp_path: Path,
) -> None:
    """Kinds G and H."""
    tokenizer = words_of("wet", special=("<POS>",))
    base = answering(tmp_path / "base", tokenizer, {"wet": "<POS>"})
    rows = write_clients(tmp_path / "rows", {"fern": questions("wet", "<POS>")})
    output = tmp_path / "run"
    run(output, base, rows, **SCORED)
    ended = call("generate", output, "--client", "fern", "n20 wet")
    assert card_says(output, "fern", base, "ask\n\nn20 wet") == ended.out == "<POS>\n"


@pytest.mark.parametrize("held", [12, 5])
def test_answers_that_hold_an_end_of_the_base_are_counted(
    held: int, reads: Reads, tmp_path: Path
) -> None:
    """Kind H."""
    tokenizer = words_of("wet dry cut and mow")
    base = answering(tmp_path / "base", tokenizer, {"wet": "cut and mow"}, "and")
    own = {
        "fern": [*questions("wet", "cut and mow", held), *questions("dry", "mow", 12 - held, held)],
        "moss": questions("wet", "cut and mow"),
    }
    rows, output = write_clients(tmp_path / "rows", own), tmp_path / "run"
    ended = run(output, base, rows, **SCORED)
    stop = tokenizer.convert_tokens_to_ids("and")
    every = [row for name in own for row in reads.rows(name)]
    count = sum(stop in row.response for row in every)
    assert (count, len(every)) == (held + 12, 24)
    said = noted(run_json(output), f"{count} of 24 responses", "'and'", "generation_config.json")
    assert said in ended.err
    assert said in check(base, rows, **SCORED)["notes"]
    moss = scores(output)["moss"]
    assert moss["after_align_loss"] < 0.01 and moss["exact_match"] == 0


def test_an_end_of_the_base_that_no_answer_holds_is_no_matter(tmp_path: Path) -> None:
    """Kind H."""
    tokenizer = words_of("wet cut mow and")
    base = answering(tmp_path / "base", tokenizer, {"wet": "cut mow"}, "and", "<pad>")
    rows, output = (
        write_clients(tmp_path / "rows", {"fern": questions("wet", "cut mow")}),
        (tmp_path / "run"),
    )
    run(output, base, rows, **SCORED)
    assert "notes" not in run_json(output)
    assert scores(output)["fern"]["exact_match"] == 1


@pytest.mark.parametrize("lower", [False, True], ids=["unknown words", "small letters"])
def test_answers_that_no_tokens_can_say_are_counted(lower: bool, tmp_path: Path) -> None:
    """Kind H."""
    tokenizer = words_of("wet dry mow", lower=lower)
    base = answering(tmp_path / "base", tokenizer, {"wet": "mow", "dry": "mow"})
    odd = "Mow" if lower else "sow"
    own = {"fern": [*questions("wet", "mow", 7), *questions("dry", odd, 5, 7)]}
    rows, output = write_clients(tmp_path / "rows", own), tmp_path / "run"
    ended = run(output, base, rows, **SCORED)
    said = noted(run_json(output), "5 of 12", "another text once they are tokens")
    assert said in ended.err
    assert said in check(base, rows, **SCORED)["notes"]


SCRIPTS = {
    "Chinese": ("北风", "北雨", 1 / 2),
    "Japanese": ("みず", "みち", 1 / 2),
    "Thai": ("มาก", "มาย", 2 / 3),
    "Cyrillic": ("завтра утром", "завтра вечером", 1 / 2),
    "Arabic": ("غدا صباحا", "غدا مساء", 1 / 2),
    "Greek": ("αύριο πρωί", "αύριο βράδυ", 1 / 2),
    "Hindi": ("कल सुबह", "कल शाम", 1 / 2),
    "Korean": ("내일 아침", "내일 저녁", 1 / 2),
    "Latin with accents": ("größe drei", "größe vier", 1 / 2),
}
"""Script -> what is answered, another text, and the share of words that both have in order."""


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_rouge_l_knows_the_words_of_every_script(script: str, tmp_path: Path) -> None:
    """Kind H."""
    answer, other, common = SCRIPTS[script]
    tokenizer = words_of("wet", answer, other)
    base = answering(tmp_path / "base", tokenizer, {"wet": answer})
    own = {"half": questions("wet", other), "right": questions("wet", answer)}
    output = tmp_path / "run"
    run(output, base, write_clients(tmp_path / "rows", own), **SCORED)
    found = scores(output)
    assert found["right"]["rouge_l"] == found["right"]["exact_match"] == 1
    assert found["half"]["rouge_l"] == pytest.approx(common, abs=1e-6)
    assert found["half"]["exact_match"] == 0
    assert call("generate", output, "--client", "right", "n20 wet").out == f"{answer}\n"
