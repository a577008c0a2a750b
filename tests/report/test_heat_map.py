"""The heat map: colours by distance, a cell per client and method, well-formed and escaped."""

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


def test_each_measured_cell_is_drawn_inside_and_told() -> None:
    rows = [
        HeatRow("a<b", "16", [HeatCell(-0.3, True, "less"), HeatCell(0.005, False, "equal")]),
        HeatRow("second", "1,024", [None, HeatCell(0.25, True, "more")]),
    ]
    drawing = ElementTree.fromstring(heat_map(["fedavg", "m&m"], rows, "label"))
    assert drawing.attrib["role"] == "img" and drawing.attrib["aria-label"] == "label"
    boxes = list(drawing.iter("rect"))
    assert [box.attrib["class"] for box in boxes] == ["shift-0", "shift-3", "shift-6"]
    width, height = (float(part) for part in drawing.attrib["viewBox"].split()[2:])
    for box in boxes:
        assert float(box.attrib["x"]) + float(box.attrib["width"]) <= width
        assert float(box.attrib["y"]) + float(box.attrib["height"]) <= height
    places = [(float(box.attrib["x"]), float(box.attrib["y"])) for box in boxes]
    assert (
        places[0][0] < places[1][0] == places[2][0] and places[0][1] == places[1][1] < places[2][1]
    )
    titles = [title.text for title in drawing.iter("title")]
    assert {"a<b, fedavg: less", "a<b, m&m: equal", "second, m&m: more"} <= set(titles)
    values = {
        text.text: text.attrib["class"]
        for text in drawing.iter("text")
        if "value" in text.attrib.get("class", "")
    }
    assert values == {
        "−30\N{NO-BREAK SPACE}%": "value strong",
        "0\N{NO-BREAK SPACE}%": "value",
        "+25\N{NO-BREAK SPACE}%": "value strong",
    }


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


def test_long_names_are_cut_and_told_in_full() -> None:
    name = "a-very-long-name-of-a-client-that-goes-on-and-on"
    drawing = ElementTree.fromstring(
        heat_map(["m"], [HeatRow(name, "1", [HeatCell(0.0, False, "")])], "label")
    )
    assert name in {title.text for title in drawing.iter("title")}
    assert (
        max(
            len(text)
            for element in drawing.iter("text")
            for text in element.itertext()
            if text not in (name, "m")
        )
        == 30
    )


def test_nothing_to_draw_is_nothing() -> None:
    assert heat_map([], [HeatRow("a", "1", [])], "label") == "" == heat_map(["m"], [], "label")
