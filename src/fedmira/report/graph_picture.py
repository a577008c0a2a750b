"""The task graph as a picture: related clients lie together.

Colour is category, size is training rows, width is weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx
from markupsafe import Markup

from fedmira.report.charts import CHARACTER_WIDTH, element, nice_number
from fedmira.report.records import TaskGraph

__all__ = ["MOST_DRAWN_CLIENTS", "MOST_DRAWN_EDGES", "Node", "category_styles", "graph_picture"]

MOST_DRAWN_CLIENTS = 300  # beyond, circles cover the area
MOST_DRAWN_EDGES = 1200  # the strongest; more would be one grey patch and a heavy page
WIDTH, HEIGHT, MARGIN = 760, 560, 34
SMALLEST, LARGEST = 9.0, 18.0  # radii
FONT = 12
COLOURS = 7
SHAPES = ("circle", "square", "diamond")  # another shape for every further seven categories

Position = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Node:
    """What is known of a client: its number on the page, its category and its training rows.

    Attributes:
        number: on the page.
        category: "" where there is none.
        train_rows: its training rows, which set its size.
    """

    number: int
    category: str = ""
    train_rows: float = 0.0


def category_styles(categories: Iterable[str]) -> dict[str, tuple[int, str]]:
    """A colour (1..7) and a shape for each category, in alphabetical order.

    From the 22nd category on they repeat.
    """
    ordered = sorted(set(categories))
    return {
        name: (index % COLOURS + 1, SHAPES[index // COLOURS % len(SHAPES)])
        for index, name in enumerate(ordered)
    }


def graph_picture(graph: TaskGraph, nodes: Mapping[str, Node], *, seed: int = 0) -> Markup:
    """Draws the graph.

    Args:
        graph: at most MOST_DRAWN_CLIENTS clients; of more than MOST_DRAWN_EDGES edges the strongest
            are drawn.
        nodes: by client; a client that is not in it gets no number.
        seed: of the layout; the same graph and seed give the same picture.

    Returns:
        An <svg>; nothing for a graph without clients or with too many.
    """
    if not graph.clients or len(graph.clients) > MOST_DRAWN_CLIENTS:
        return Markup("")
    known = {client: nodes.get(client, Node(0)) for client in graph.clients}
    radii = _radii(known)
    positions = _spread_apart(_layout(graph, seed), radii)
    styles = category_styles(node.category for node in nodes.values())
    edges = _edges(graph, positions)
    shapes = [
        _node(
            client, node, positions[client], radii[client], styles.get(node.category, (1, "circle"))
        )
        for client, node in known.items()
    ]
    names = _names(positions, radii)
    label = f"Task graph of {len(graph.clients)} clients and {len(graph.edges)} edges"
    return element(
        "svg",
        *edges,
        *shapes,
        *names,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=label,
        class_="graph",
    )


def _radii(nodes: Mapping[str, Node]) -> dict[str, float]:
    """Areas grow with the training rows, from SMALLEST to LARGEST.

    In crowded pictures all are smaller.
    """
    most = max((node.train_rows for node in nodes.values()), default=0) or 1
    crowd = min(1.0, math.sqrt(60 / len(nodes)))
    return {
        client: crowd * math.sqrt(SMALLEST**2 + (LARGEST**2 - SMALLEST**2) * node.train_rows / most)
        for client, node in nodes.items()
    }


def _layout(graph: TaskGraph, seed: int) -> dict[str, Position]:
    """Springs along the edges, and a weak one between all pairs.

    The weak ones keep separate parts in the picture.
    """
    strongest = max((weight for _, _, weight in graph.edges), default=1.0)
    springs = networkx.complete_graph(graph.clients)
    networkx.set_edge_attributes(springs, 0.06, "weight")
    for source, target, weight in graph.edges:
        springs[source][target]["weight"] = 0.06 + weight / strongest
    places = networkx.spring_layout(
        springs, k=1.6 / math.sqrt(len(graph.clients)), iterations=300, seed=seed, method="force"
    )
    return _fitted({client: (float(x), float(y)) for client, (x, y) in places.items()})


def _fitted(places: Mapping[str, Position]) -> dict[str, Position]:
    """Stretches positions over the drawing area inside its margins."""
    axes = []
    for axis, room in ((0, WIDTH), (1, HEIGHT)):
        values = [place[axis] for place in places.values()]
        low, extent = min(values), max(values) - min(values)
        axes.append(
            {
                client: MARGIN
                + (room - 2 * MARGIN) * ((place[axis] - low) / extent if extent else 0.5)
                for client, place in places.items()
            }
        )
    return {client: (axes[0][client], axes[1][client]) for client in places}


def _spread_apart(
    positions: Mapping[str, Position], radii: Mapping[str, float]
) -> dict[str, Position]:
    """Push apart circles that touch, and keep all inside the margins.

    There is room for a label between circles.
    """
    clients = list(positions)
    moved = {client: list(place) for client, place in positions.items()}
    room = FONT + 8 if len(clients) <= 60 else 3
    for _ in range(80):
        still = True
        for index, first in enumerate(clients):
            for second in clients[index + 1 :]:
                across, down = (
                    moved[second][0] - moved[first][0],
                    moved[second][1] - moved[first][1],
                )
                distance = math.hypot(across, down) or 1e-6
                missing = radii[first] + radii[second] + room - distance
                if missing > 0.1:
                    still = False
                    for place, direction in ((moved[first], -0.5), (moved[second], 0.5)):
                        place[0] += direction * missing * across / distance
                        place[1] += direction * missing * down / distance
        for place in moved.values():
            place[0] = min(max(place[0], MARGIN), WIDTH - MARGIN)
            place[1] = min(max(place[1], MARGIN), HEIGHT - MARGIN)
        if still:
            break
    return {client: (place[0], place[1]) for client, place in moved.items()}


def _edges(graph: TaskGraph, positions: Mapping[str, Position]) -> list[Markup]:
    drawn = sorted(graph.edges, key=lambda edge: edge[2])[-MOST_DRAWN_EDGES:]
    strongest = max((weight for _, _, weight in drawn), default=1.0)
    crowd = min(
        1.0, math.sqrt(150 / max(1, len(drawn)))
    )  # many lines are drawn thinner and fainter
    lines = []
    for source, target, weight in drawn:
        (x1, y1), (x2, y2) = positions[source], positions[target]
        share = weight / strongest
        title = element("title", f"{source} – {target}: weight {nice_number(weight)}")
        path = f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"
        lines.append(
            element(
                "path",
                title,
                d=path,
                class_="edge",
                stroke_width=crowd * (0.6 + 4.4 * share),
                opacity=f"{crowd * (0.2 + 0.6 * share):.2f}",
            )
        )
    return lines


def _node(
    client: str, node: Node, place: Position, radius: float, style: tuple[int, str]
) -> Markup:
    (x, y), (colour, shape) = place, style
    rows = f", {node.train_rows:g} training rows" if node.train_rows else ""
    title = element(
        "title", f"{client} ({node.category})" + rows if node.category else client + rows
    )
    if shape == "circle":
        figure = element("circle", cx=x, cy=y, r=radius)
    elif shape == "square":
        figure = element(
            "rect",
            x=x - 0.89 * radius,
            y=y - 0.89 * radius,
            width=1.78 * radius,
            height=1.78 * radius,
        )
    else:
        reach = 1.25 * radius
        figure = element(
            "path",
            d=f"M{x:.1f} {y - reach:.1f}l{reach:.1f} {reach:.1f}l{-reach:.1f} "
            f"{reach:.1f}l{-reach:.1f} {-reach:.1f}z",
        )
    number = element(
        "text", str(node.number or ""), x=x, y=y, dy="0.35em", text_anchor="middle", class_="number"
    )
    return element("g", title, figure, number, class_=f"node group-{colour}")


def _names(positions: Mapping[str, Position], radii: Mapping[str, float]) -> list[Markup]:
    """Names where they cover no circle and no other name.

    A name without a free place is left to the list below the picture.
    """
    taken: list[Box] = [
        (x - radii[c], y - radii[c], x + radii[c], y + radii[c]) for c, (x, y) in positions.items()
    ]
    names = []
    for client, (x, y) in sorted(positions.items(), key=lambda item: item[1][1]):
        shown = client if len(client) <= 24 else client[:23] + "…"
        width, gap = FONT * CHARACTER_WIDTH * len(shown), radii[client] + 3
        places = [
            (x + gap, y + 0.35 * FONT, "start", x + gap),
            (x - gap, y + 0.35 * FONT, "end", x - gap - width),
            (x, y + gap + 0.8 * FONT, "middle", x - width / 2),
            (x, y - gap - 0.2 * FONT, "middle", x - width / 2),
            (x + 0.7 * gap, y + gap + 0.4 * FONT, "start", x + 0.7 * gap),
            (x - 0.7 * gap, y - gap + 0.2 * FONT, "end", x - 0.7 * gap - width),
            (x + 0.7 * gap, y - gap + 0.2 * FONT, "start", x + 0.7 * gap),
            (x - 0.7 * gap, y + gap + 0.4 * FONT, "end", x - 0.7 * gap - width),
        ]
        for text_x, baseline, anchor, left in places:
            box = (left, baseline - 0.85 * FONT, left + width, baseline + 0.25 * FONT)
            inside = box[0] >= 2 and box[2] <= WIDTH - 2 and box[1] >= 0 and box[3] <= HEIGHT
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                names.append(
                    element(
                        "text",
                        shown,
                        x=text_x,
                        y=baseline,
                        text_anchor=anchor,
                        class_="name",
                        font_size=FONT,
                    )
                )
                break
    return names


def _overlap(first: Box, second: Box) -> bool:
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )
