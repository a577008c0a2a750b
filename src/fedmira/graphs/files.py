"""graph.json: the graph that acted, as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii as quoted

from fedmira.graphs.graph import Graph

__all__ = ["graph_of", "graph_text"]


def graph_text(graph: Graph, number: int, figures: Mapping[str, float]) -> str:
    """The content of graph.json, an edge a line.

    Args:
        number: the round it acted in.
        figures: of that round, all finite.
    """
    head = json.dumps(
        {"kind": graph.kind, "round": number, **figures}, indent=1, allow_nan=False
    ).removesuffix("\n}")
    clients = json.dumps(list(graph.clients))
    # Written out by hand: the encoder takes several times as long, every round, where thousands of
    # clients have tens of thousands of edges.
    lines = [
        f'\n  {{"source": {quoted(source)}, "target": {quoted(target)}, "weight": {weight!r}}}'
        for source, target, weight in graph.edges()
    ]
    return f'{head},\n "clients": {clients},\n "edges": [{",".join(lines)}]\n}}\n'


def graph_of(text: str) -> Graph:
    """The graph in the content of a graph.json."""
    document = json.loads(text)
    edges = [(edge["source"], edge["target"], edge["weight"]) for edge in document["edges"]]
    return Graph.from_edges(document["kind"], document["clients"], edges)
