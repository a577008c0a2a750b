"""graph.json: the one form in which a graph is written and read.

The report reads it with a reader of its own, since it must work without torch, which a graph is
made of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import Any

from fedmira.atomic import replace_file
from fedmira.errors import ConfigError, RunError
from fedmira.graphs.graph import Graph

__all__ = ["file_graph", "graph_of", "graph_text", "write_graph"]


def graph_text(graph: Graph, about: Mapping[str, float] | None = None) -> str:
    """The content of graph.json, an edge a line and each pair once.

    Args:
        graph: whose edges are written.
        about: what stands beside the graph, such as the round it acted in; all finite.
    """
    head = json.dumps({"kind": graph.kind, **(about or {})}, indent=1, allow_nan=False)
    head = head.removesuffix("\n}")
    clients = json.dumps(list(graph.clients))
    # Written out by hand: the encoder takes several times as long, every round, where thousands of
    # clients have tens of thousands of edges.
    lines = [
        f'\n  {{"source": {quoted(source)}, "target": {quoted(target)}, "weight": {weight!r}}}'
        for source, target, weight in graph.edges()
    ]
    return f'{head},\n "clients": {clients},\n "edges": [{",".join(lines)}]\n}}\n'


def write_graph(path: Path, graph: Graph, **about: float) -> None:
    """Write graph.json; `about` as in `graph_text`.

    Args:
        path: of the file.
        graph: whose edges are written.
        about: what stands beside the graph, as in `graph_text`.
    """
    replace_file(path, graph_text(graph, about))


def graph_of(text: str, place: str) -> Graph:
    """The graph in the content of a graph.json, with its own kind and clients.

    Args:
        text: the whole content of the file.
        place: what an error calls it.

    Raises:
        ConfigError: it is no such document.
    """
    document = _document(text, place)
    clients = document["clients"]
    kind = str(document.get("kind", "file"))
    return _built(kind, clients, _edges(document, clients, place), place)


def file_graph(
    path: Path | str, clients: Sequence[str], optional: Collection[str] = frozenset()
) -> Graph:
    """Read a graph.json for these clients, whatever their order in the file.

    Args:
        path: of the file.
        clients: ids of the run, in the order of the rows.
        optional: names that may be in the file or not, such as those of newcomers. Edges to those
            that are no clients of the run are left out.

    Raises:
        ConfigError: the file cannot be read or is not such a document; or its clients are not those
            of the run, or edges are wrong: all problems together.
    """
    place = f"graph file {str(path)!r}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{place}: cannot be read: {error.strerror}; set graph.path to a graph.json"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{place}: is not text in UTF-8: {error}; write it as graph.json of a run folder"
        ) from error
    edges = _edges(_document(text, place), clients, place, optional)
    return _built("file", clients, edges, place)


def _built(
    kind: str, clients: Sequence[str], edges: Sequence[tuple[str, str, float]], place: str
) -> Graph:
    """The graph of a file's edges.

    Raises:
        ConfigError: they are none; in a file that is an input's fault, and not a run's.
    """
    try:
        return Graph.from_edges(kind, clients, edges)
    except RunError as error:
        raise ConfigError(f"{place}: {error}") from error


def _document(text: str, place: str) -> dict[str, Any]:
    """The JSON object, with its two lists.

    Raises:
        ConfigError: it is not JSON, or lacks them.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{place}: is not JSON: {error}; write it as graph.json of a run folder"
        ) from error
    lists = ("clients", "edges")
    if not isinstance(document, dict) or any(
        not isinstance(document.get(key), list) for key in lists
    ):
        raise ConfigError(
            f"{place}: must be an object with the lists 'clients' and 'edges'; see graph.json "
            "of a run folder"
        )
    return document


def _edges(
    document: dict[str, Any],
    clients: Sequence[str],
    place: str,
    optional: Collection[str] = frozenset(),
) -> list[tuple[str, str, float]]:
    """The edges between clients of the run, checked against them.

    Raises:
        ConfigError: the document's clients are others, or edges are wrong: all problems together.
    """
    row = {client: number for number, client in enumerate([*clients, *optional])}
    listed: list[Any] = document["clients"]
    named = {client for client in listed if isinstance(client, str)}
    strangers = [client for client in listed if not isinstance(client, str) or client not in row]
    problems = [
        f"unknown client {client!r}; the run has no such client, take it out of the list"
        for client in strangers
    ]
    problems += [
        f"missing client {client!r}; the run has it, add it to the list"
        for client in clients
        if client not in named and client not in optional
    ]
    edges: list[tuple[str, str, float]] = []
    seen: dict[frozenset[str], int] = {}
    for number, edge in enumerate(document["edges"], start=1):
        problem = _edge_problem(edge, row)
        if problem is None:
            first = seen.setdefault(frozenset((edge["source"], edge["target"])), number)
            if first != number:
                pair = f"{edge['source']!r} and {edge['target']!r}"
                problem = f"joins {pair} again after edge {first}; list a pair once"
        if problem is not None:
            problems.append(f"edge {number}: {problem}")
            continue
        edges.append((edge["source"], edge["target"], edge["weight"]))
    if problems:
        raise ConfigError([f"{place}: {problem}" for problem in problems])
    here = set(clients)
    return [edge for edge in edges if edge[0] in here and edge[1] in here]


def _edge_problem(edge: Any, known: Mapping[str, int]) -> str | None:
    """What is wrong with one edge on its own, or None."""
    if not isinstance(edge, dict) or not {"source", "target", "weight"} <= edge.keys():
        return "must be an object with source, target and weight"
    strangers = [
        end
        for end in (edge["source"], edge["target"])
        if not isinstance(end, str) or end not in known
    ]
    if strangers:
        return (
            f"unknown client {strangers[0]!r}; must be one of the {len(known)} clients of the run"
        )
    weight = edge["weight"]
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not math.isfinite(weight)
        or weight < 0
    ):
        return f"weight is {weight!r}; must be a finite number of 0 or more"
    if edge["source"] == edge["target"]:
        return f"client {edge['source']!r} is joined to itself; leave the edge out"
    return None
