"""A run that is over, or was, from its folder alone: tables, graph, plots, answers."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedmira.adapters import Adapter
from fedmira.data import ObjectRows, rows_from_objects, rows_of_objects
from fedmira.errors import ConfigError, RunFolderError
from fedmira.fleet import Merged, OwnRows, merge_fleet, read_fleet
from fedmira.graphs import Graph, graph_of
from fedmira.messages import ClientId
from fedmira.metrics import metrics
from fedmira.model import BaseModel
from fedmira.records import RecordedFolder, lost_lines
from fedmira.report import Picture, picture_of_graph, picture_of_rounds
from fedmira.runs import RunFolder
from fedmira.studies.joining import JoinedClient, join_run
from fedmira.studies.notebook import html_table
from fedmira.studies.referring import answer
from fedmira.studies.saved import SavedAdapters, clients_of, reload_adapters, trained_rows
from fedmira.studies.serving.exported import Exported, export_adapter
from fedmira.studies.serving.routing import Router
from fedmira.studies.serving.served import Served, write_served
from fedmira.studies.serving.talking import Conversation

if TYPE_CHECKING:
    import pandas

__all__ = ["Result", "RunGraph"]

_TEXT_COLUMNS = ("client", "task", "category")
_SHOWN_CLIENTS = 12


@dataclass(frozen=True)
class RunGraph:
    """The task graph that acted last in a run.

    Attributes:
        graph: the weights.
        folder: the run folder.
    """

    graph: Graph
    folder: Path

    @property
    def kind(self) -> str:
        """How it was made."""
        return self.graph.kind

    @property
    def clients(self) -> tuple[ClientId, ...]:
        """The ids of all clients, in the order of the rows."""
        return self.graph.clients

    def edges(self) -> list[tuple[ClientId, ClientId, float]]:
        """Every pair that is related, once: (client, client, weight above 0)."""
        return list(self.graph.edges())

    def plot(self) -> Picture:
        """The graph as a picture: related clients lie together, size is training rows."""
        return picture_of_graph(self.folder)

    def _repr_svg_(self) -> str:
        """The drawing that a notebook shows for this object."""
        return self.plot().svg


class Result:
    """A run, read from its folder when it is asked for.

    Tables are `clients`, `rounds` and `events`; `plot`, `generate`, `evaluate` and `merge` use what
    the run has saved.

    Args:
        folder: the run folder.
        base: of a run whose base was an object: a base that `fedmira.load` was given.
        rows: of a run whose rows were objects.

    Raises:
        RunFolderError: the folder is no run folder.
    """

    def __init__(
        self, folder: str | Path, base: BaseModel | None = None, rows: ObjectRows | None = None
    ) -> None:
        self.folder = RunFolder.reopen(Path(folder)).path
        self._base = base
        self._rows = rows

    @property
    def report(self) -> Path:
        """Where the page about the run lies; a run writes it at its end."""
        return self.folder / "report.html"

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """run.json: versions, base, data, machine, how it ended."""
        return RunFolder(self.folder).read_json("run.json")

    @property
    def status(self) -> str:
        """How it ended: finished, stopped, interrupted or failed; or running."""
        return str(self.about.get("status", "not begun"))

    @property
    def summary(self) -> Mapping[str, Mapping[str, float]]:
        """Figure -> mean, weighted_mean, worst_tenth and spread over clients."""
        return self.about.get("summary") or {}

    @cached_property
    def clients(self) -> pandas.DataFrame:
        """metrics/clients.csv, a row a client; what was not measured is NaN."""
        return self._table("clients")

    @cached_property
    def rounds(self) -> pandas.DataFrame:
        """metrics/rounds.csv, a row a round; what was not measured is NaN."""
        return self._table("rounds")

    @cached_property
    def events(self) -> pandas.DataFrame:
        """events.jsonl, a row a line; keys that a line does not have are NaN."""
        import pandas

        lines = self._content("events.jsonl").decode().splitlines()
        return pandas.DataFrame([json.loads(line) for line in lines])

    @cached_property
    def graph(self) -> RunGraph | None:
        """The graph that acted last; None where none has."""
        path = self.folder / "graph.json"
        if not path.exists():
            return None
        text = self._content("graph.json").decode()
        return RunGraph(graph_of(text, str(path)), self.folder)

    @property
    def adapters(self) -> Mapping[ClientId, Adapter]:
        """Each client's adapter as saved, read when it is asked for; the base is loaded first."""
        return self._saved.adapters

    def plot(self, figure: str = "test_loss") -> Picture:
        """A figure over the rounds.

        >>> import fedmira
        >>> fedmira.load("runs/first").plot("train_loss").svg.startswith("<svg")
        True

        Args:
            figure: a column of `rounds`, such as "test_loss", "train_loss" or "pull".
        """
        return picture_of_rounds(self.folder, figure)

    def generate(
        self,
        client: ClientId,
        text: str,
        *,
        instruction: str | None = None,
        max_new_tokens: int | None = None,
        reference_share: float | None = None,
    ) -> str:
        """What a client's adapter answers.

        >>> import fedmira
        >>> result = fedmira.load("runs/first")
        >>> answer = result.generate("north", "3+1", instruction="Add.", max_new_tokens=4)
        >>> isinstance(answer, str)
        True

        Args:
            client: its id.
            text: the input.
            instruction: in place of the one that all rows of the client share.
            max_new_tokens: longest answer in tokens; by default evaluation.max_new_tokens.
            reference_share: of each token's probability that comes from the client's training
                rows; by default evaluation.reference_share.

        Raises:
            ConfigError: there is no such client, its instruction is not known here, or the share
                cannot be used.
        """
        return answer(
            self._saved,
            client,
            text,
            instruction,
            max_new_tokens,
            self._rows,
            reference_share,
        )

    def export(
        self,
        client: ClientId,
        output: str | Path,
        *,
        merged: bool = False,
        dtype: str | None = None,
    ) -> Exported:
        """Writes a client's adapter, or base and adapter as one model, and proves it: `Exported`.

        Args:
            client: its id.
            output: a new folder.
            merged: write a whole Hugging Face model.
            dtype: "float32", "bfloat16" or "float16"; by default that of the base for a model, and
                float32 for an adapter.

        Raises:
            InputError: there is no such client, or something is at `output` already.
            RunError: what was written says something else than base and adapter.
        """
        place = Path(output)
        return export_adapter(
            self._saved, client, place, merged=merged, dtype=dtype, rows=self._rows
        )

    def serve_config(
        self, output: str | Path, *, clients: Sequence[ClientId] = (), base: str = ""
    ) -> Served:
        """Writes what vLLM, llama.cpp, Ollama and PEFT need to offer the adapters: `Served`.

        Args:
            output: a new folder.
            clients: whose adapters; none for all.
            base: the folder or hub id under which the servers find the base; "" for where it lies.

        Raises:
            InputError: there is no such client, or something is at `output` already.
            RunError: a file is not what its reader takes.
        """
        return write_served(self._saved, Path(output), clients=clients, base=base, rows=self._rows)

    def chat(
        self,
        client: ClientId,
        *,
        beside: Sequence[Result] = (),
        instruction: str | None = None,
        max_new_tokens: int | None = None,
        reference_share: float | None = None,
    ) -> Conversation:
        """A conversation with base and adapter: `.ask(text)` has the answer of each by its name.

        >>> import fedmira
        >>> talk = fedmira.load("runs/first").chat("north", max_new_tokens=4)
        >>> list(talk.ask("3+1"))
        ['base', 'fedavg']

        Args:
            client: its id.
            beside: other runs on the same base, whose adapters for the client answer too.
            instruction: in place of the one that all rows of the client share.
            max_new_tokens: longest answer in tokens; by default evaluation.max_new_tokens.
            reference_share: as for `generate`; the base has none.

        Raises:
            InputError: a run has no such client, stands on another base, or the share cannot be
                used.
        """
        base = self._saved.kind.base
        return Conversation(
            self._saved,
            client,
            beside=[reload_adapters(other.folder, base) for other in beside],
            instruction=instruction,
            max_new_tokens=max_new_tokens,
            rows=self._rows,
            reference_share=reference_share,
        )

    def route(
        self, text: str | None = None, *, rows: Sequence[Mapping[str, Any]] = ()
    ) -> pandas.DataFrame:
        """Clients by the loss of a text, or of few rows' answers, under their adapters.

        A row a client with `client`, `loss` and `tokens`; the lowest loss first.

        Args:
            text: a request; docs/serving.md says how little it tells.
            rows: in place of a text: dicts with answers, as runs are given.

        Raises:
            InputError: neither or both are given, or a row cannot be read.
        """
        import pandas

        if (text is None) == (not rows):
            raise ConfigError("route: give a text or rows, and not both")
        router = Router(self._saved)
        read = rows_of_objects(rows, self._saved.config.data)
        scores = router.by_text(text) if text is not None else router.by_rows(read)
        columns = ["client", "loss", "tokens"]
        return pandas.DataFrame(
            [(score.client, score.loss, score.tokens) for score in scores], columns=columns
        )

    def evaluate(self) -> pandas.DataFrame:
        """Test losses and text scores of the saved adapters, measured anew: a row a client.

        Raises:
            RunFolderError: the rows of the clients are not on this machine.
        """
        import pandas

        saved = self._saved
        clients = clients_of(saved, self._rows)
        losses = clients.losses(saved.adapters)
        limit = saved.config.evaluation.max_new_tokens
        texts = clients.score(saved.adapters, limit) if saved.config.evaluation.rouge else {}
        return pandas.DataFrame(
            [
                {"client": client, "test_loss": loss.per_token, **texts.get(client, {})}
                for client, loss in losses.items()
            ]
        )

    def merge(
        self,
        clients: Sequence[ClientId] | None = None,
        weights: Sequence[float] | None = None,
        *,
        by: str = "uniform",
        strength: float | Literal["auto"] = 1.0,
        rank: int | None = None,
    ) -> Merged:
        """One adapter made of several: a weighted sum of their updates, cut to a rank.

        >>> import fedmira
        >>> merged = fedmira.load("runs/first").merge(["north", "south"], weights=[3, 1])
        >>> merged.clients
        ('north', 'south')

        Args:
            clients: whose adapters; by default all.
            weights: of each, 0 or more. They are divided by their sum, and stand in place of `by`.
            by: "uniform", "rows", "metagpt", "ties" or "precision"; see `fedmira.merge`.
            strength: what the sum is multiplied by; "auto" chooses 1, 2, 4 or 8 by the mean loss
                on the clients' validation rows.
            rank: of the result; the largest rank of the clients by default.

        Raises:
            ConfigError: there is no such client, or an argument cannot be used.
            RunFolderError: an adapter is not plain LoRA.
        """
        fleet = read_fleet([self.folder])
        chosen = fleet if clients is None else fleet.only(clients)
        return merge_fleet(
            chosen,
            by,
            strength=strength,
            rank=rank,
            weights=weights,
            rows=self._own_rows,
            trained=lambda: trained_rows(self._saved, self._rows),
        )

    def join(
        self,
        client: ClientId,
        data: str | Path | Sequence[Mapping[str, Any]] | Any,
        *,
        steps: int | None = None,
        start: str | None = None,
        settings: Mapping[str, Any] | Sequence[str] = (),
        output: str | Path | None = None,
    ) -> JoinedClient:
        """An adapter for a newcomer with a few rows, begun from those of the run, which stays.

        >>> import fedmira
        >>> rows = [{"instruction": "Add.", "input": f"3+{n}", "output": str(n)} for n in range(9)]
        >>> made = fedmira.load("runs/first").join("far", rows, steps=2, output="far")
        >>> made.figures["rows"]["train"]
        9

        Args:
            client: what the newcomer is called.
            data: its rows: a file or a folder, or what `fedmira.run` takes as a client's rows.
            steps: local steps, 10 by default; 0 keeps the start as it is.
            start: "generalist", "nearest", "mix" or "fresh"; None lets the rows choose.
            settings: dotted key -> value, or KEY=VALUE texts: how rows are read, and [local].
            output: a new folder; by default beside the run, with the client's name behind its own.

        Raises:
            InputError: something cannot be used; nothing was trained or written.
            RunError: training diverges.
        """
        given = Path(data) if isinstance(data, str | Path) else rows_from_objects({client: data})
        return join_run(
            self.folder,
            client,
            given,
            None if output is None else Path(output),
            steps=steps,
            start=start,
            settings=settings,
            base=self._base,
        )

    def _own_rows(self) -> OwnRows:
        """The validation rows of all clients."""
        return OwnRows.of_clients(clients_of(self._saved, self._rows, choosing=True))

    def __repr__(self) -> str:
        """One line: where it is, how it ended, and the headline figure."""
        mean = self.summary.get("after_align_loss", {}).get("mean")
        told = "" if mean is None else f", mean test loss {mean:.3f}"
        return f"<fedmira run {str(self.folder)!r}: {self.status}{told}>"

    def _repr_html_(self) -> str:
        """For notebooks: one small table of the clients and the path of the report."""
        measured = [metric.name for metric in metrics() if self._is_measured(metric.name)]
        columns = ["client", "train_rows", *measured]
        shown = self.clients.head(_SHOWN_CLIENTS)
        rows = ([row[column] for column in columns] for _, row in shown.iterrows())
        more = len(self.clients) - _SHOWN_CLIENTS
        rest = f"<p>and {more} more clients</p>" if more > 0 else ""
        return (
            f"<p><b>{html.escape(self.folder.name)}</b>: {html.escape(self.status)}</p>"
            f"{html_table(columns, rows)}{rest}"
            f"<p>report: <code>{html.escape(str(self.report))}</code></p>"
        )

    @cached_property
    def _saved(self) -> SavedAdapters:
        return reload_adapters(self.folder, self._base)

    def _table(self, name: str) -> pandas.DataFrame:
        import pandas

        path = self.folder / "metrics" / f"{name}.csv"
        if not path.exists():
            raise RunFolderError(
                f"{path}: the run has written no such table yet (status: {self.status}); "
                "finish it with "
                "fedmira.run(output=..., resume=True)"
            )
        # Names are text even where they look like numbers, or like missing cells.
        texts, content = dict.fromkeys(_TEXT_COLUMNS, str), self._content(f"metrics/{name}.csv")
        table = pandas.read_csv(
            io.BytesIO(content),
            dtype=texts,
            keep_default_na=False,
            na_values={column: [""] for column in _columns(content) if column != "client"},
        )
        for column in table.columns:
            if column not in _TEXT_COLUMNS and table[column].isna().all():
                table[column] = table[column].astype(float)
        return table

    def _content(self, name: str) -> bytes:
        """A file's bytes, compared with its hash; none where it is not there."""
        recorded = RecordedFolder(self.folder)
        if name == "events.jsonl" and (lost := lost_lines(self.folder)):
            raise RunFolderError(lost)
        return recorded.read(name) if recorded.exists(name) else b""

    def _is_measured(self, name: str) -> bool:
        return name in self.clients and bool(self.clients[name].notna().any())


def _columns(content: bytes) -> list[str]:
    """The columns of a table."""
    return content.decode().partition("\n")[0].split(",")
