"""Charts: well-formed, inside their frame, escaped."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.report.charts import (
    Series,
    axis_ticks,
    change_bars,
    element,
    legend,
    line_chart,
    nice_number,
    percent_text,
)
from fedmira.shown import html_text

finite = st.floats(-1e9, 1e9).map(lambda value: round(value, 6))


@settings(deadline=None)
@given(finite, finite, st.integers(2, 8))
def test_ticks_enclose_the_values_and_are_evenly_spaced(
    one: float, other: float, most: int
) -> None:
    low, high = sorted((one, other))
    ticks = axis_ticks(low, high, most)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= most + 2
    steps = [after - before for before, after in zip(ticks, ticks[1:], strict=False)]
    assert max(steps) - min(steps) <= 1e-6 * max(1.0, *map(abs, ticks))


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 500), finite),
        min_size=1,
        max_size=30,
        unique_by=lambda point: point[0],
    )
)
def test_every_point_lies_inside_the_drawing(points: list[tuple[int, float]]) -> None:
    drawing = ElementTree.fromstring(line_chart([Series("loss", sorted(points))], "loss"))
    for circle in drawing.iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= 400
        assert 0 <= float(circle.attrib["cy"]) <= 240


def test_a_higher_value_is_drawn_higher_up_and_told_on_hover() -> None:
    drawing = ElementTree.fromstring(line_chart([Series("test", [(1, 3.0), (2, 1.5)])], "loss"))
    dots = [circle for circle in drawing.iter("circle") if circle.attrib["class"] == "dot"]
    assert float(dots[0].attrib["cy"]) < float(dots[1].attrib["cy"])
    assert [title.text for title in drawing.iter("title")] == [
        "test, round 1: 3",
        "test, round 2: 1.5",
    ]


def test_charts_that_share_bounds_share_their_scale() -> None:
    def height_of_two(values: list[tuple[float, float]]) -> str:
        drawing = ElementTree.fromstring(
            line_chart([Series("loss", values)], "loss", y_bounds=(0, 10), x_bounds=(0, 20))
        )
        return next(circle.attrib["cy"] for circle in drawing.iter("circle"))

    assert height_of_two([(1, 2.0), (2, 9.0)]) == height_of_two([(1, 2.0), (2, 2.1)])


def test_without_points_there_is_no_chart() -> None:
    assert line_chart([Series("loss", [])], "loss") == ""
    assert change_bars([], "change", limit=0.02) == ""


def test_rounds_have_whole_ticks() -> None:
    drawing = ElementTree.fromstring(line_chart([Series("loss", [(1, 1.0), (2, 2.0)])], "loss"))
    below = [text.text for text in drawing.iter("text") if text.attrib["text-anchor"] == "middle"]
    assert below == ["1", "2"]


def test_bars_point_up_for_harm_and_down_for_gain() -> None:
    drawing = ElementTree.fromstring(
        change_bars([("a", -0.4), ("b", 0.001), ("c", 0.2)], "change", limit=0.02)
    )
    gained, unchanged, harmed = drawing.iter("rect")
    assert [bar.attrib["class"] for bar in (gained, unchanged, harmed)] == [
        "bar gained",
        "bar unchanged",
        "bar harmed",
    ]
    zero = float(gained.attrib["y"])
    assert float(harmed.attrib["y"]) + float(harmed.attrib["height"]) == pytest.approx(
        zero, abs=0.11
    )
    assert float(gained.attrib["height"]) == pytest.approx(
        2 * float(harmed.attrib["height"]), abs=0.2
    )


@settings(deadline=None)
@given(
    st.text(
        st.characters(
            min_codepoint=32, exclude_categories=("Cs", "Cn"), exclude_characters="\x7f\ufffe\uffff"
        )
    )
)
def test_any_name_comes_back_as_it_can_be_seen_from_text_and_attribute(name: str) -> None:
    drawing = ElementTree.fromstring(element("text", name, aria_label=name))
    shown = html_text(name)
    assert (drawing.text or "", drawing.attrib["aria-label"], len(drawing)) == (shown, shown, 0)


def test_hostile_names_stay_text_in_charts() -> None:
    hostile = "\"'><script>alert(1)</script>"
    bars = ElementTree.fromstring(change_bars([(hostile, 0.5)], hostile, limit=0.02))
    lines = ElementTree.fromstring(line_chart([Series(hostile, [(1, 2.0)])], hostile))
    keys = ElementTree.fromstring(legend([Series(hostile, [])]))
    assert (bars.attrib["aria-label"], lines.attrib["aria-label"]) == (hostile, hostile)
    assert next(bars.iter("title")).text == f"{hostile}: +50.0\N{NO-BREAK SPACE}%"
    assert next(lines.iter("title")).text == f"{hostile}, round 1: 2"
    assert "".join(keys.itertext()) == hostile


@pytest.mark.parametrize(
    ("share", "decimals", "text"),
    [(0.123, 0, "+12"), (-0.5, 1, "\N{MINUS SIGN}50.0"), (0.0, 1, "0"), (-0.0001, 0, "0")],
)
def test_percentages_carry_their_sign(share: float, decimals: int, text: str) -> None:
    assert percent_text(share, decimals) == text + "\N{NO-BREAK SPACE}%"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2.0, "2"), (1.23456, "1.235"), (0.00001, "1.00e-05"), (123456.0, "1.23e+05")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert nice_number(value) == text
