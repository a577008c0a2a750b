"""The page of a run: complete, self-contained, escaped.

Parts that were not measured are left out.
"""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedmira.report.page import FEW_TEST_ROWS
from fedmira.runs import write_page

Folders = Callable[..., Any]
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}",
    "</title></svg><b>",
    "line\nbreak",
    "'; drop",
    "ñ & 漢字",
]
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A parsed page: its elements, its text, and whether every element is closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for tag, attributes in self.elements if tag == "h2"]


def page_of(folder: Path) -> Page:
    return Page(write_page(folder))


def test_a_finished_run_has_every_section(run_folder: Folders) -> None:
    made = run_folder(clients=21)
    folder = made.write()
    assert write_page(folder) == folder / "report.html"
    page = page_of(folder)
    assert page.sections == [
        "headline",
        "gains",
        "rounds",
        "curves",
        "clients",
        "graph",
        "traffic",
        "settings",
        "provenance",
    ]
    assert "MIRA, 20 November 2026" in page.text
    assert "Rouge-L (rouge_score)" in page.text and "Rouge-L (rouge package)" in page.text
    after, base = made.statistics("after_align_loss"), made.statistics("base_loss")
    for value in (
        after["mean"],
        after["weighted_mean"],
        after["worst_tenth"],
        after["spread"],
        base["mean"],
    ):
        assert f"{value:.3f}" in page.text
    changes = [row["after_align_loss"] / row["before_align_loss"] - 1 for row in made.client_rows]
    gained, harmed = (
        sum(change < -0.02 for change in changes),
        sum(change > 0.02 for change in changes),
    )
    assert (
        f"{gained} gained , {21 - gained - harmed} unchanged (within 2 %), {harmed} harmed"
        in page.text
    )
    assert "float32" in page.text
    assert "base model parameters 3,145,728" in page.text
    assert "fedmira 0.1.0" in page.text


def test_the_page_needs_nothing_from_outside(run_folder: Folders) -> None:
    page = page_of(run_folder(clients=5).write())
    assert {tag for tag, _ in page.elements} & {
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    } == set()
    assert not any(
        name in attributes
        for _, attributes in page.elements
        for name in ("src", "href", "xlink:href", "style")
    )
    assert (
        "url(" not in page.source
        and "@import" not in page.source
        and "http" not in page.source.replace("http-equiv", "")
    )


def test_its_policy_allows_the_one_script_by_hash(run_folder: Folders) -> None:
    page = page_of(run_folder(clients=2).write())
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [
        attributes["content"]
        for _, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}';" in policy


def test_hostile_names_and_messages_stay_text(run_folder: Folders) -> None:
    made = run_folder(clients=len(HOSTILE), names=HOSTILE)
    for row, name in zip(made.client_rows, HOSTILE, strict=True):
        row["category"], row["task"] = name, name + "!"
    made.events += [
        {"event": "failure", "round": 3, "client": name, "stage": name, "reason": name}
        for name in HOSTILE
    ]
    made.events.append({"event": "warning", "round": 3, "message": HOSTILE[1]})
    made.status, made.error = "failed", HOSTILE[0]
    folder = made.write()
    (folder / "config.toml").write_text(
        "[data]\npath = '</pre><script>x</script>'\n", encoding="utf-8"
    )
    page = page_of(folder)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert {tag for tag, _ in page.elements} & {"img", "b"} <= {"b"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for name in HOSTILE:
        assert " ".join(name.split()) in page.text


def test_a_failed_run_says_why_at_the_top(run_folder: Folders) -> None:
    made = run_folder()
    made.fail_early("AlignmentError: mira: alignment is on but moved no adapter")
    made.events.append(
        {
            "event": "failure",
            "round": 2,
            "client": made.names[0],
            "stage": "train",
            "reason": "loss is not finite",
        }
    )
    page = page_of(made.write())
    assert (
        "This run failed. AlignmentError: mira: alignment is on but moved no adapter" in page.text
    )
    assert page.text.index("This run failed.") < page.text.index("Settings")
    assert f"failure round 2, {made.names[0]} train: loss is not finite" in page.text
    assert page.sections == ["messages", "settings", "provenance"]


def test_what_was_not_measured_is_left_out(run_folder: Folders) -> None:
    made = run_folder(clients=4, algorithm="local")
    unmeasured = (
        "rouge_l",
        "rouge_l_package",
        "exact_match",
        "best_round",
        "best_validation_loss",
        "best_test_loss",
    )
    measured = made.provenance()
    for name in unmeasured:
        measured["summary"].pop(name, None)
    made.provenance = lambda: measured
    for row in made.client_rows:
        row |= dict.fromkeys(unmeasured, "")
    page = page_of(made.write())
    assert page.sections == ["headline", "rounds", "curves", "clients", "settings", "provenance"]
    assert not any(word in page.text for word in ("Rouge", "match", "Pull", "best", "harmed"))
    assert re.search(r"\b(nan|None|undefined|inf)\b", page.text, flags=re.IGNORECASE) is None


def test_a_run_without_summary_and_metrics_shows_what_its_events_hold(run_folder: Folders) -> None:
    made = run_folder(clients=3)
    made.status, made.client_rows, made.round_rows = "running", [], []
    page = page_of(made.write())
    assert "This run has not finished." in page.text
    assert page.sections == ["rounds", "curves", "settings", "provenance"]


def test_numbers_that_are_not_finite_never_reach_the_page_as_values(run_folder: Folders) -> None:
    made = run_folder(clients=3)
    made.client_rows[0]["before_align_loss"] = float("nan")
    made.round_rows[3]["train_loss"] = float("inf")
    page = page_of(made.write())
    assert "before_align_loss is nan; left out" in page.text
    for tag, attributes in page.elements:
        if tag in ("path", "circle", "rect", "text", "td"):
            assert not any(re.search(r"\b(nan|inf)\b", value) for value in attributes.values())


def test_the_table_of_clients_can_be_sorted_by_keyboard_and_tells_its_order(
    run_folder: Folders,
) -> None:
    page = page_of(run_folder(clients=6).write())
    headings = [
        attributes for tag, attributes in page.elements if tag == "th" and "aria-sort" in attributes
    ]
    buttons = [attributes for tag, attributes in page.elements if tag == "button"]
    assert len(headings) == len(buttons) > 8
    assert all(attributes["type"] == "button" for attributes in buttons)
    keys = [
        attributes["data-key"]
        for tag, attributes in page.elements
        if tag == "td" and "data-key" in attributes
    ]
    assert len(keys) >= 6 * (len(headings) - 1)


def test_columns_alike_for_all_clients_become_a_sentence(run_folder: Folders) -> None:
    page = page_of(run_folder(clients=6).write())
    assert "Alike for all: rank 16, test rows 32, rounds 20, best round 15." in page.text


def test_validation_losses_are_drawn_where_there_are_any(run_folder: Folders) -> None:
    made = run_folder("without", clients=2)
    assert "validation, round" not in page_of(made.write()).source
    made = run_folder("with", clients=2)
    for event in made.events:
        if event["event"] == "evaluate":
            event["validation_loss"] = 1.625
    assert page_of(made.write()).source.count("validation, round 20: 1.625") == 2


def test_of_very_many_clients_the_worst_are_shown_and_the_page_says_so(run_folder: Folders) -> None:
    made = run_folder(clients=12)
    made.client_rows = [
        made.client_rows[index % 12]
        | {"client": f"client-{index:04d}", "after_align_loss": 1 + (index * 7 % 1200) / 1000}
        for index in range(1200)
    ]
    made.names = [row["client"] for row in made.client_rows]
    made.graph = lambda: {
        "kind": "similarity",
        "clients": made.names,
        "edges": [{"source": "client-0000", "target": "client-0700", "weight": 1}],
    }
    page = page_of(made.write())
    assert page.sections == [
        "headline",
        "gains",
        "rounds",
        "clients",
        "graph",
        "traffic",
        "settings",
        "provenance",
    ]
    assert (
        "These are the 500 of 1,200 clients with the highest loss at the end; "
        "metrics/clients.csv holds all." in page.text
    )
    assert "Too many clients to draw; graph.json holds the graph." in page.text
    assert "one bar for every 3 clients" in page.text
    assert "The first 500 of 1,200; adapters/index.json holds all." in page.text
    table = page.source[page.source.index('id="clients"') : page.source.index('id="graph"')]
    shown = {name for name in made.names if f">{name}<" in table}
    assert shown == {
        row["client"] for row in made.client_rows if row["after_align_loss"] >= 1 + 700 / 1000
    }
    assert (
        sum(
            tag == "rect" and attributes.get("class", "").startswith("bar ")
            for tag, attributes in page.elements
        )
        == 1200 // 3
    )
    assert len(page.source) < 1_000_000


def test_a_chart_of_its_own_is_drawn_for_the_worst_of_many(run_folder: Folders) -> None:
    made = run_folder(clients=130)
    made.events = [event for event in made.events if event["round"] < 4]
    page = page_of(made.write())
    worst = sorted(made.client_rows, key=lambda row: -row["after_align_loss"])[:100]
    charts = [
        attributes["aria-label"]
        for tag, attributes in page.elements
        if tag == "svg" and attributes.get("aria-label", "").startswith("Loss of ")
    ]
    assert sorted(charts) == sorted(f"Loss of {row['client']}" for row in worst)
    assert (
        "Of 130 clients, the 100 with the highest loss at the end are drawn; events.jsonl "
        "holds all." in page.text
    )


def test_a_report_can_be_written_again(run_folder: Folders) -> None:
    folder = run_folder(clients=3).write()
    first = write_page(folder).read_text(encoding="utf-8")
    assert write_page(folder).read_text(encoding="utf-8") == first


@pytest.mark.parametrize("module", ["torch", "transformers", "peft", "matplotlib"])
def test_the_report_does_not_import(module: str) -> None:
    source = Path(__file__).parents[2] / "src"
    code = f"import sys; sys.path.insert(0, {str(source)!r}); import fedmira.report"
    code += f"; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_few_test_rows_are_said_to_tell_little_of_a_client(run_folder: Folders) -> None:
    for rows, few in ((FEW_TEST_ROWS - 1, True), (FEW_TEST_ROWS, False)):
        made = run_folder(f"with-{rows}", clients=3)
        for row in made.client_rows:
            row["test_rows"] = rows
        text = page_of(made.write()).text
        assert f"Test rows of a client: {rows}." in text and ("means little" in text) == few


def test_the_page_says_which_adapter_is_saved_and_what_limits_harm(run_folder: Folders) -> None:
    made = run_folder(clients=4)
    for row in made.client_rows:
        row["after_align_loss"] = 1.5 * row["before_align_loss"]
    text = page_of(made.write()).text
    assert (
        "The adapter in adapters/ is that after the step" in text
        and "fedmira compare --algorithms local,mira" in text
    )
    assert 'evaluation.select = "best"' in text and "algorithm.safeguard" in text


def test_the_page_says_when_the_best_rounds_adapter_is_saved(run_folder: Folders) -> None:
    made = run_folder(clients=4)
    made.more_settings = '\n[evaluation]\nselect = "best"\n'
    text = page_of(made.write()).text
    assert (
        "The adapter in adapters/ is that of the client\N{RIGHT SINGLE QUOTATION MARK}s "
        "own best round" in text
    )
