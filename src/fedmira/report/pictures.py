"""Charts of a run that stand alone, for notebooks and for files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from markupsafe import Markup

from fedmira.errors import InputError
from fedmira.report.charts import Series, line_chart
from fedmira.report.findings import curve_of_test_loss
from fedmira.report.graph_picture import MOST_DRAWN_CLIENTS, Node, graph_picture
from fedmira.report.read import read_run
from fedmira.report.records import Client, Run

__all__ = ["Picture", "picture_of_graph", "picture_of_rounds"]

_SCOPE = "fedmira-picture"
_TITLES = {
    "train_loss": "training loss per response token, mean over clients",
    "test_loss": "test loss per response token, mean over clients",
    "pull": "pull: share of the way to the neighbours, mean over clients",
    "disagreement_before": "disagreement of neighbours before alignment",
    "disagreement_after": "disagreement of neighbours after alignment",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing as SVG; a notebook shows it in place.

    Attributes:
        svg: the whole document, with its colours.
        title: what it shows.
    """

    svg: str
    title: str

    def _repr_svg_(self) -> str:
        """The drawing that a notebook shows for this object."""
        return self.svg

    def __repr__(self) -> str:
        """One short line where no picture can be shown."""
        return f"<Picture: {self.title}; save it with .save('picture.svg')>"

    def save(self, path: str | Path) -> Path:
        """Writes the drawing into a file.

        Args:
            path: of the file, which is replaced.
        """
        Path(path).write_text(self.svg, encoding="utf-8")
        return Path(path)


def picture_of_rounds(run_folder: Path, name: str) -> Picture:
    """A figure of a run over its rounds.

    Args:
        run_folder: the folder.
        name: a column of metrics/rounds.csv, such as "test_loss".

    Raises:
        InputError: there is no such figure, or it was measured nowhere.
        RunFolderError: the folder cannot be read.
    """
    run = read_run(run_folder)
    known = ", ".join(_TITLES)
    if name not in _TITLES:
        raise InputError(f"plot({name!r}): no figure of a round is called so; there are {known}")
    points = _points(run, name)
    if not points:
        raise InputError(
            f"plot({name!r}): this run has not measured it in any round; there are {known}"
        )
    title = _TITLES[name]
    return _standing_alone(line_chart([Series(name, points, 1)], title), title)


def picture_of_graph(run_folder: Path) -> Picture:
    """The task graph of a run.

    Args:
        run_folder: the folder.

    Raises:
        InputError: the run has no graph, or one of too many clients to be drawn.
        RunFolderError: the folder cannot be read.
    """
    run = read_run(run_folder)
    if run.graph is None or not run.graph.clients:
        raise InputError("graph.plot(): no graph has acted in this run")
    if len(run.graph.clients) > MOST_DRAWN_CLIENTS:
        raise InputError(
            f"graph.plot(): {len(run.graph.clients)} clients; at most {MOST_DRAWN_CLIENTS} "
            "can be drawn, and "
            "graph.json holds all edges"
        )
    rows = {row.client: row for row in run.clients}
    nodes = {
        client: Node(number, row.category or "", row.train_rows or 0.0)
        for number, client in enumerate(run.graph.clients, start=1)
        for row in (rows.get(client, Client(client)),)
    }
    title = f"task graph ({run.graph.kind}) of {len(nodes)} clients"
    return _standing_alone(graph_picture(run.graph, nodes), title)


def _points(run: Run, name: str) -> list[tuple[float, float]]:
    if name == "test_loss":
        return curve_of_test_loss(run)
    found = ((row.round, getattr(row, name)) for row in run.rounds)
    return [(number, value) for number, value in found if value is not None]


def _standing_alone(drawing: Markup, title: str) -> Picture:
    """An <svg> with those rules of the page's style that concern it and touch nothing else."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" style="max-width: 760px" '
    body = str(drawing).removeprefix("<svg ")
    opening, closing, rest = body.partition(">")
    opening = re.sub(r'class="', f'class="{_SCOPE} ', opening)
    style = f"<style>{_style()}</style><title>{Markup.escape(title)}</title>"
    return Picture(f"{head}{opening}{closing}{style}{rest}", title)


def _style() -> str:
    sheet = (resources.files("fedmira.report") / "templates" / "style.css").read_text("utf-8")
    colours = re.search(r":root \{(.*?)\n\}", sheet, re.DOTALL)
    assert colours is not None, "the style begins with its colours"
    plain = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", sheet)
    rules = [
        f"{_scoped(selector)} {{{rule}}}"
        for selector, rule in re.findall(r"([^{}]+)\{([^{}]*)\}", plain)
        if re.search(r"svg\s|\.series-|\.group-", selector) and "legend" not in selector
    ]
    variables = colours[1].replace("color-scheme: light dark;", "")
    base = f".{_SCOPE} {{{variables} background: #ffffff; font-family: sans-serif}}"
    return "\n".join([base, *rules])


def _scoped(selector: str) -> str:
    """Selectors that reach only into our own drawing."""
    inner = [part.strip().removeprefix("svg").strip() for part in selector.split(",")]
    return ", ".join(
        f".{_SCOPE} {part}" for part in inner if part and not part.startswith(".chart")
    )
