"""Text metrics against oracles written here, and the algebra of metrics that carry their weight."""

from __future__ import annotations

import math
import statistics
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmira.metrics import (
    TokenLoss,
    exact_match,
    rouge_l,
    rouge_l_package,
    summarise,
    text_scores,
)

words = st.lists(st.sampled_from(["red", "green", "blue", "7", "sky"]), min_size=1, max_size=8)
finite = st.floats(-1e6, 1e6)
losses = st.builds(TokenLoss, st.floats(0, 1e6), st.integers(0, 10_000))


def longest_common_subsequence(left: list[str], right: list[str]) -> int:
    """By the recurrence over prefixes, row by row."""
    row = [0] * (len(right) + 1)
    for word in left:
        above = row
        row = [0]
        for column, other in enumerate(right):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
    return row[-1]


def f1(overlap: float, predicted: float, expected: float) -> float:
    precision, recall = overlap / predicted, overlap / expected
    return 0.0 if overlap == 0 else 2 * precision * recall / (precision + recall)


@given(words, words)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(
    prediction: list[str], reference: list[str]
) -> None:
    expected = f1(
        longest_common_subsequence(prediction, reference), len(prediction), len(reference)
    )
    assert rouge_l(" ".join(prediction), " ".join(reference)) == pytest.approx(expected)


def test_rouge_l_reads_lower_case_without_punctuation() -> None:
    assert rouge_l("Red, GREEN!", "red green") == 1.0


def test_rouge_l_of_an_empty_prediction_is_zero() -> None:
    assert rouge_l("", "red") == 0.0


def test_stemming_is_off_unless_asked_for() -> None:
    assert rouge_l("running", "runs") == 0.0
    assert rouge_l("running", "runs", use_stemmer=True) == 1.0


def test_the_two_dialects_differ_on_a_repeated_word() -> None:
    # The package counts unique words: one of one is found. Over tokens: precision 1/4, recall 1, F1
    # = 2/5.
    assert rouge_l_package("a a a a", "a") == pytest.approx(1.0)
    assert rouge_l("a a a a", "a") == pytest.approx(2 / 5)


def test_the_two_dialects_differ_on_the_order_of_sentences() -> None:
    # The package joins the matches of all sentences. Over tokens only "a b" or "c d" is in order: 2
    # of 4 both ways.
    assert rouge_l_package("a b. c d", "c d. a b") == pytest.approx(1.0)
    assert rouge_l("a b. c d", "c d. a b") == pytest.approx(1 / 2)


def test_package_rouge_l_splits_numbers_at_the_point() -> None:
    # "3.14" is the sentences "3" and "14"; "3.15" shares "3" of 2 words each.
    assert rouge_l_package("3.14", "3.15") == pytest.approx(1 / 2)


@given(
    st.permutations(["red", "green", "blue", "sky"]), st.permutations(["red", "green", "blue", "7"])
)
def test_package_rouge_l_of_single_sentences_without_repetition_is_the_plain_one(
    prediction: list[str], reference: list[str]
) -> None:
    overlap = longest_common_subsequence(prediction, reference)
    assert rouge_l_package(" ".join(prediction), " ".join(reference)) == pytest.approx(
        f1(overlap, 4, 4), abs=1e-7
    )


@pytest.mark.parametrize("nothing", ["", " ", ".", "...", " . ", ". .\n"])
def test_package_rouge_l_of_a_text_without_words_is_zero(nothing: str) -> None:
    assert rouge_l_package(nothing, "red") == 0.0
    assert rouge_l_package("red", nothing) == 0.0


def test_package_rouge_l_ignores_case_and_outer_blanks() -> None:
    assert rouge_l_package("  Red Green\n", "red green") == pytest.approx(1.0)


def test_package_rouge_l_takes_long_texts_and_leaves_the_interpreter_as_it_was() -> None:
    before = sys.getrecursionlimit()
    text = " ".join(f"word{number}" for number in range(before))
    assert rouge_l_package(text, text) == pytest.approx(1.0)
    assert sys.getrecursionlimit() == before


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [("Yes.", "yes", 1), ("a  b", " A b", 1), ("the cat", "cat", 0), ("", "!", 1)],
)
def test_exact_match_ignores_case_punctuation_and_blanks(
    prediction: str, reference: str, expected: float
) -> None:
    assert exact_match(prediction, reference) == expected


def test_text_scores_are_means_over_rows() -> None:
    # Rows score (1, 1, 1), (0, 0, 0), (2/5, 1, 0).
    scores = text_scores(["yes", "no", "a a a a"], ["yes", "maybe", "a"])
    assert scores == pytest.approx(
        {"rouge_l": 1.4 / 3, "rouge_l_package": 2 / 3, "exact_match": 1 / 3}
    )


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], ["a", "b"])])
def test_text_scores_need_a_reference_for_each_prediction(
    predictions: list[str], references: list[str]
) -> None:
    with pytest.raises(
        ValueError, match=f"{len(predictions)} predictions for {len(references)} references"
    ):
        text_scores(predictions, references)


@given(losses, losses, losses)
def test_token_losses_add_up_in_any_order(
    first: TokenLoss, second: TokenLoss, third: TokenLoss
) -> None:
    assert first + second == second + first
    left, right = (first + second) + third, first + (second + third)
    assert left.tokens == right.tokens
    assert left.total == pytest.approx(right.total)
    assert first + TokenLoss() == first


@given(st.lists(st.floats(0, 20), min_size=1, max_size=16), st.integers(1, 8))
def test_the_loss_of_a_client_does_not_depend_on_the_batch_size(
    per_token: list[float], batch_size: int
) -> None:
    # A mean of batch means would: its last batch is smaller.
    batches = [
        per_token[start : start + batch_size] for start in range(0, len(per_token), batch_size)
    ]
    total = sum((TokenLoss(math.fsum(batch), len(batch)) for batch in batches), TokenLoss())
    assert total.per_token == pytest.approx(statistics.fmean(per_token))


def test_a_long_row_weighs_more_than_a_short_one() -> None:
    assert (TokenLoss(2.0, 1) + TokenLoss(3.0, 9)).per_token == pytest.approx(0.5)


def test_the_loss_of_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 response tokens"):
        _ = TokenLoss().per_token


def test_summary_of_four_clients() -> None:
    # mean 3; weighted (1 + 2 + 3 + 5 * 6) / 8; worst 1 of 4 is 6; deviations -2, -1, 0, 3: sqrt(14
    # / 4).
    summary = summarise([1, 2, 3, 6], [1, 1, 1, 5])
    assert summary == pytest.approx(
        {"mean": 3, "weighted_mean": 36 / 8, "worst_tenth": 6, "spread": math.sqrt(3.5)}
    )


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_the_worst_tenth_is_rounded_up_to_whole_clients(clients: int, worst: int) -> None:
    values = [float(number) for number in range(clients)]
    highest, lowest = statistics.fmean(values[-worst:]), statistics.fmean(values[:worst])
    assert summarise(values, [1] * clients)["worst_tenth"] == pytest.approx(highest)
    assert summarise(values, [1] * clients, higher_is_better=True)["worst_tenth"] == pytest.approx(
        lowest
    )


@given(st.lists(finite, min_size=1, max_size=30), st.floats(0.01, 100))
def test_equal_weights_of_any_size_give_the_plain_mean(values: list[float], weight: float) -> None:
    summary = summarise(values, [weight] * len(values))
    assert summary["weighted_mean"] == pytest.approx(summary["mean"], rel=1e-9, abs=1e-6)
    assert summary["spread"] == pytest.approx(statistics.pstdev(values), rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(finite, st.floats(0.01, 100)), min_size=1, max_size=30))
def test_the_worst_tenth_is_worse_than_the_mean_in_either_direction(
    clients: list[tuple[float, float]],
) -> None:
    values, weights = zip(*clients, strict=True)
    assert summarise(values, weights)["worst_tenth"] >= summarise(values, weights)["mean"] - 1e-6
    assert (
        summarise(values, weights, higher_is_better=True)["worst_tenth"]
        <= summarise(values, weights)["mean"] + 1e-6
    )


@given(
    st.lists(st.builds(TokenLoss, st.floats(0, 1e3), st.integers(1, 1000)), min_size=1, max_size=10)
)
def test_the_mean_weighted_by_tokens_is_the_loss_of_all_tokens_together(
    clients: list[TokenLoss],
) -> None:
    summary = summarise(
        [client.per_token for client in clients], [client.tokens for client in clients]
    )
    assert summary["weighted_mean"] == pytest.approx(sum(clients, TokenLoss()).per_token)


@pytest.mark.parametrize(
    ("values", "weights"), [([], []), ([1.0], [1, 1]), ([1.0, 2.0], [0, 0]), ([1.0, 2.0], [2, -1])]
)
def test_a_summary_needs_clients_and_proper_weights(
    values: list[float], weights: list[float]
) -> None:
    with pytest.raises(ValueError, match="weights"):
        summarise(values, weights)


@pytest.mark.parametrize(
    "text",
    [
        "北京",
        "Москва зимой",
        "مرحبا بالعالم",
        "Αθήνα",
        "สวัสดีครับ",
        "नमस्ते दुनिया",
        "한국어 문장",
        "東京タワー",
    ],
)
def test_a_right_answer_in_any_script_scores_one_and_a_wrong_one_zero(text: str) -> None:
    assert rouge_l(text, text) == 1.0
    assert rouge_l("yes", text) == 0.0


def test_characters_are_the_words_of_scripts_without_blanks() -> None:
    # Two of three characters in order: precision and recall are 2/3.
    assert rouge_l("北京市", "北京人") == pytest.approx(2 / 3)
    assert rouge_l("Москва зимой", "Москва летом") == pytest.approx(1 / 2)


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_texts_of_ascii_score_as_the_published_package_has_it(
    prediction: str, reference: str
) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    published = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    words = any(letter.isalnum() for letter in prediction + reference)
    assert rouge_l(prediction, reference) == published or not words


def test_texts_without_a_word_are_equal_or_not() -> None:
    """Where the package has 0 for every answer, the right one too."""
    assert [rouge_l("+-", text) for text in ("+-", "-+", "", "plus")] == [1, 0, 0, 0]
    assert rouge_l("", "") == 0


def test_punctuation_beyond_ascii_does_not_change_how_words_are_split() -> None:
    assert rouge_l("it\u2019s \u2014 fine", "it's fine") == 1.0
