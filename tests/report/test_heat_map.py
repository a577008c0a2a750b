"""The heat map: colours by distance, a cell per client and method, escaped."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from fedmira.report.heat_map import (
    SHIFT_BOUNDS,
    HeatCell,
    HeatRow,
    heat_map,
    shift,
    shift_keys,
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (-0.5, 0),
        (-0.2, 0),
        (-0.15, 1),
        (-0.05, 2),
        (-0.02, 2),
        (-0.01, 3),
        (0.0, 3),
        (0.019, 3),
        (0.02, 4),
        (0.1, 5),
        (0.2, 6),
        (3.0, 6),
    ],
)
def test_colours_follow_the_difference(change: float, expected: int) -> None:
    assert shift(change) == expected


def test_gains_and_losses_have_as_many_colours_each_with_a_key() -> None:
    assert [-bound for bound in reversed(SHIFT_BOUNDS)] == list(SHIFT_BOUNDS)
    assert len(shift_keys()) == len(SHIFT_BOUNDS) + 1


def test_each_measured_cell_is_coloured_and_told() -> None:
    rows = [
        HeatRow("a<b", "16", [HeatCell(-0.3, True, "less"), HeatCell(0.005, False, "equal")]),
        HeatRow("second", "1,024", [None, HeatCell(0.25, True, "more")]),
    ]
    table = ElementTree.fromstring(heat_map(["fedavg", "m&m"], rows, "label"))
    assert table.tag == "table" and table.attrib["aria-label"] == "label"
    heads = ["".join(head.itertext()) for head in table.iterfind("thead/tr/th")]
    assert heads == ["client", "train rows", "fedavg", "m&m"]
    space = "\N{NO-BREAK SPACE}"
    assert [
        [("".join(cell.itertext()), cell.get("class"), cell.get("title")) for cell in line]
        for line in table.iterfind("tbody/tr")
    ] == [
        [
            ("a<b", None, None),
            ("16", "number", None),
            (f"−30{space}%", "shift-0 beyond", "a<b, fedavg: less"),
            (f"0{space}%", "shift-3", "a<b, m&m: equal"),
        ],
        [
            ("second", None, None),
            ("1,024", "number", None),
            ("", None, None),
            (f"+25{space}%", "shift-6 beyond", "second, m&m: more"),
        ],
    ]


def test_a_loss_that_is_many_times_the_baselines_is_told_as_a_multiple() -> None:
    drawing = heat_map(
        ["fedavg"],
        [
            HeatRow("a", "16", [HeatCell(9.99, True, "more")]),
            HeatRow("b", "16", [HeatCell(71.65, True, "more")]),
        ],
        "",
    )
    assert "+999\N{NO-BREAK SPACE}%" in drawing and "\N{MULTIPLICATION SIGN}73" in drawing


def test_names_that_the_style_may_cut_are_told_in_full() -> None:
    name = "a-very-long-name-of-a-client-that-goes-on-and-on"
    table = ElementTree.fromstring(
        heat_map([name], [HeatRow(name, "1", [HeatCell(0.0, False, "")])], "label")
    )
    spans = list(table.iter("span"))
    assert [(span.text, span.get("title")) for span in spans] == [(name, name)] * 2


def test_nothing_to_draw_is_nothing() -> None:
    assert heat_map([], [HeatRow("a", "1", [])], "label") == "" == heat_map(["m"], [], "label")
