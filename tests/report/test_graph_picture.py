"""The picture of the task graph: all clients in the frame, apart, the same for the same seed."""

from __future__ import annotations

import math
import random
from itertools import combinations
from xml.etree import ElementTree

import pytest

from fedmira.report import TaskGraph
from fedmira.report.graph_picture import (
    MOST_DRAWN_CLIENTS,
    MOST_DRAWN_EDGES,
    Node,
    category_styles,
    graph_picture,
)


def families(groups: int, members: int) -> tuple[TaskGraph, dict[str, Node]]:
    """Members of a family are joined with weight 1, and families with 0.05.

    One member of each family is joined with one of the next.
    """
    names = [[f"family-{group}-{member}" for member in range(members)] for group in range(groups)]
    edges = [(one, other, 1.0) for family in names for one, other in combinations(family, 2)]
    edges += [
        (family[0], following[0], 0.05) for family, following in zip(names, names[1:], strict=False)
    ]
    clients = tuple(name for family in names for name in family)
    nodes = {
        name: Node(number, name.rsplit("-", 1)[0], 16.0 * (1 + number % 8))
        for number, name in enumerate(clients, start=1)
    }
    return TaskGraph("similarity", clients, tuple(edges)), nodes


def circles(picture: str) -> dict[str, tuple[float, float, float]]:
    """Number of a client -> (x, y, radius)."""
    groups = [
        group
        for group in ElementTree.fromstring(picture).iter("g")
        if group.find("circle") is not None
    ]
    found = {}
    for group in groups:
        circle, number = group.find("circle"), group.find("text")
        assert circle is not None and number is not None
        found[number.text or ""] = (
            float(circle.attrib["cx"]),
            float(circle.attrib["cy"]),
            float(circle.attrib["r"]),
        )
    return found


@pytest.mark.parametrize(("groups", "members"), [(1, 1), (1, 2), (5, 4), (6, 7)])
def test_all_clients_are_in_the_frame_and_do_not_overlap(groups: int, members: int) -> None:
    graph, nodes = families(groups, members)
    drawn = circles(graph_picture(graph, nodes))
    assert len(drawn) == groups * members
    for x, y, radius in drawn.values():
        assert radius <= x <= 760 - radius
        assert radius <= y <= 560 - radius
    for (x1, y1, r1), (x2, y2, r2) in combinations(drawn.values(), 2):
        assert math.hypot(x1 - x2, y1 - y2) >= r1 + r2


def test_a_crowd_of_relatives_is_spread_until_no_circles_overlap() -> None:
    clients = tuple(f"c{number}" for number in range(55))
    clique = tuple(
        (one, other, 1.0) for one, other in combinations(clients[:45], 2)
    )  # the other ten are related to nobody
    nodes = {client: Node(number, "", 128) for number, client in enumerate(clients, start=1)}
    drawn = circles(graph_picture(TaskGraph("file", clients, clique), nodes))
    for (x1, y1, r1), (x2, y2, r2) in combinations(drawn.values(), 2):
        assert math.hypot(x1 - x2, y1 - y2) >= r1 + r2


def test_a_family_lies_closer_together_than_strangers() -> None:
    graph, nodes = families(4, 5)
    drawn = circles(graph_picture(graph, nodes))
    distances: dict[bool, list[float]] = {True: [], False: []}
    for one, other in combinations(graph.clients, 2):
        (x1, y1, _), (x2, y2, _) = drawn[str(nodes[one].number)], drawn[str(nodes[other].number)]
        distances[nodes[one].category == nodes[other].category].append(math.hypot(x1 - x2, y1 - y2))
    related, strangers = (sum(distances[same]) / len(distances[same]) for same in (True, False))
    assert related < strangers / 2


def test_more_training_rows_make_a_larger_circle() -> None:
    graph = TaskGraph("uniform", ("small", "large"), (("small", "large", 1.0),))
    drawn = circles(graph_picture(graph, {"small": Node(1, "", 16), "large": Node(2, "", 128)}))
    assert drawn["2"][2] > drawn["1"][2]


def test_a_heavier_edge_is_wider() -> None:
    graph = TaskGraph("file", ("a", "b", "c"), (("a", "b", 0.1), ("b", "c", 0.9)))
    picture = ElementTree.fromstring(graph_picture(graph, {}))
    widths = {
        path.find("title").text: float(path.attrib["stroke-width"])
        for path in picture.findall("path")
    }  # type: ignore[union-attr]
    assert widths["b – c: weight 0.9"] > widths["a – b: weight 0.1"]


def test_the_same_seed_gives_the_same_picture() -> None:
    graph, nodes = families(3, 4)
    assert graph_picture(graph, nodes, seed=3) == graph_picture(graph, nodes, seed=3)
    assert graph_picture(graph, nodes, seed=3) != graph_picture(graph, nodes, seed=4)


def test_names_do_not_cover_each_other_or_leave_the_frame() -> None:
    graph, nodes = families(6, 7)
    labels = [
        text
        for text in ElementTree.fromstring(graph_picture(graph, nodes)).findall("text")
        if text.attrib["class"] == "name"
    ]
    assert len(labels) >= 30  # of 42; where there is no room the number and the list have to do
    boxes = []
    for label in labels:
        width = 12 * 0.58 * len(label.text or "")
        shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[label.attrib["text-anchor"]]
        left, baseline = float(label.attrib["x"]) - shift * width, float(label.attrib["y"])
        assert left >= 0 and left + width <= 760
        boxes.append((left, baseline, left + width))
    for (left, baseline, right), (other_left, other_baseline, other_right) in combinations(
        boxes, 2
    ):
        assert (
            right <= other_left + 0.2
            or other_right <= left + 0.2
            or abs(baseline - other_baseline) >= 12
        )


def test_a_dense_graph_keeps_its_strongest_edges() -> None:
    draw = random.Random(0)
    clients = tuple(f"c{number}" for number in range(60))
    edges = tuple((one, other, draw.random()) for one, other in combinations(clients, 2))
    picture = ElementTree.fromstring(graph_picture(TaskGraph("random", clients, edges), {}))
    assert len(picture.findall("path")) == MOST_DRAWN_EDGES < len(edges)


def test_an_empty_graph_and_one_with_too_many_clients_are_not_drawn() -> None:
    assert graph_picture(TaskGraph("file", (), ()), {}) == ""
    many = tuple(f"c{number}" for number in range(MOST_DRAWN_CLIENTS + 1))
    assert graph_picture(TaskGraph("uniform", many, ()), {}) == ""


def test_categories_beyond_the_palette_get_another_shape() -> None:
    styles = category_styles(f"category {number:02}" for number in range(21))
    assert len(set(styles.values())) == 21
    assert styles["category 00"] == (1, "circle")
    assert styles["category 07"] == (1, "square")
