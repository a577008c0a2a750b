"""Texts of others in every form of output: nothing that is hidden, and nothing that acts."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import Markup

from fedmira.cli.screen import print_table, say, tell
from fedmira.report.charts import element
from fedmira.report.page import environment
from fedmira.shown import csv_text, csv_value, cut, html_text, json_text, markdown_text, plain
from fedmira.studies.notebook import html_table
from small import make_run, table_of

HOSTILE = (
    "\x1b[31mred\x1b]0;title\x07",
    "\u202egnp.exe",
    "\u2066isolated\u2069",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a|b",
    "a\nb\r\nc",
    "[link](javascript:alert(1))",
    "![i](http://x/)",
    "`code`",
    "[bold]x[/]",
    ":smile:",
    "nul\0",
    "\ud800",
    "tag\U000e0041",
    "x" * 10_000,
)
TEXTS = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(max_size=30),
    st.text(alphabet="\x1b\x07\r\n\t|=+-@<>&'\"`[]()\\!\u202e\u2066\u2028a0", max_size=20),
)
TURNING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def seen(text: str, kept: str = "") -> bool:
    """Whether a terminal or a page shows all of a text, and in its order."""
    return not any(
        (unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in TURNING)
        and character not in kept
        for character in text
    )


@given(TEXTS)
@example("Müller-Lüdenscheidt")
def test_plain_texts_have_nothing_hidden_and_say_where_it_was(text: str) -> None:
    assert seen(plain(text)) and seen(plain(text, lines=True), "\n\t")
    assert plain(plain(text)) == plain(text)
    if seen(text) and not re.search("[\u200b\u2060-\u2064\ufeff\U000e0000-\U000e007f]", text):
        assert plain(text) == text


@pytest.mark.parametrize("text", ["ضمّة‌ها", "👩‍🔬", "שלום\u200f", "日本語", "é", "naïve – ±"])
def test_words_of_all_scripts_are_as_they_were(text: str) -> None:
    assert plain(text) == text and csv_value(text) == text and json_text(text) == f'"{text}"'


@given(st.lists(TEXTS, min_size=2, max_size=2))
def test_a_cell_of_csv_is_one_cell_and_no_formula(cells: list[str]) -> None:
    text = csv_text(["a", "b"], [dict(zip("ab", cells, strict=True))])
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    assert head == ["a", "b"] and len(rows) == 1 and len(rows[0]) == 2
    for before, after in zip(cells, rows[0], strict=True):
        assert seen(after)
        number = after if after[:1] in ("+", "-") else None
        assert after[:1] not in ("=", "@") and (number is None or float(number) is not None)
        assert after in (plain(before), "'" + plain(before))


def test_numbers_stay_numbers_in_csv() -> None:
    row = {"a": -1.5, "b": "-1.5", "c": None, "d": "-1e-05", "e": 3, "f": "+inf"}
    assert csv_text(list(row), [row], head=False) == "-1.5,-1.5,,-1e-05,3,+inf\n"


@given(TEXTS)
def test_a_cell_of_markdown_stays_one_cell_and_is_neither_link_nor_element(text: str) -> None:
    shown = markdown_text(text)
    assert seen(shown) and "\n" not in shown
    bare = re.sub(r"\\[\\`|\[\]<]", ".", shown)
    assert not set(bare) & set("`|[]") and not re.search(r"<[A-Za-z/!?]", bare)


@given(TEXTS)
def test_json_in_cards_is_the_same_value_with_nothing_hidden(text: str) -> None:
    assert json.loads(json_text({"a": [text]})) == {"a": [text]} and seen(json_text(text))


@given(TEXTS)
def test_pages_pictures_and_notebooks_escape_and_show(text: str) -> None:
    page = environment().from_string('<p title="{{ x }}">{{ x }}</p>').render(x=text)
    picture = str(element("text", text, title=text))
    table = html_table([text], [[text]])
    for made in (page, picture, table):
        inside = re.sub(r"</?(p|text|table|thead|tbody|tr|th|td)\b( title=\"[^\"]*\")?>", "", made)
        assert "<" not in inside and seen(inside, "\n\t")
    assert html.unescape(page).count(html_text(text)) >= 2 or "&" in text or not text.strip()
    assert environment().from_string("{{ x }}").render(x=Markup("<b>")) == "<b>"


@pytest.mark.parametrize("text", HOSTILE)
def test_terminals_get_a_text_as_it_is_written_and_no_style(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(text[:50], ["client", text[:50]], [["apple", text[:50]]])
    tell(text)
    tell(f"error: {text}", error=True)
    shown = capsys.readouterr()
    say(text)
    for stream in (shown.out, shown.err):
        assert seen(stream, "\n\t")
    if text in ("[bold]x[/]", ":smile:"):
        assert shown.out.count(text) >= 3, "rich would take it for a style or a picture"


@given(TEXTS)
def test_what_is_cut_says_so(text: str) -> None:
    assert len(cut(text, 50)) <= 50 and (cut(text, 50) == text) == (len(text) <= 50)


def test_hostile_categories_of_rows_do_no_harm_in_a_run_folder(
    base_folder: Path, tmp_path: Path
) -> None:
    hostile = {"apple-1": HOSTILE[3], "apple-2": HOSTILE[0], "birch-1": HOSTILE[9]}
    for name, category in hostile.items():
        lines = [
            {"instruction": "w1 w2", "input": f"w{i} w3", "output": f"w{i + 1}"} for i in range(12)
        ]
        (tmp_path / "rows" / name).mkdir(parents=True)
        (tmp_path / "rows" / name / "train.jsonl").write_text(
            "".join(json.dumps({**line, "category": category}) + "\n" for line in lines),
            encoding="utf-8",
        )
    run = make_run(base_folder, tmp_path / "rows", tmp_path / "run", {"local.steps": 1})
    found = {row["client"]: row["category"] for row in table_of(run, "clients")}
    assert found == {
        "apple-1": "'" + HOSTILE[3],
        "apple-2": "\\x1b[31mred\\x1b]0;title\\x07",
        "birch-1": HOSTILE[9],
    }
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and seen(page, "\n\t")
