"""What a run leaves behind: adapters, tables, provenance, and the same at hand in Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fedmira.adapters import Adapter, LazyAdapters, content_hash
from fedmira.atomic import replace_file, sync_below
from fedmira.graphs import Graph
from fedmira.messages import ClientId
from fedmira.methods import ServerState, Start
from fedmira.metrics import TokenLoss
from fedmira.runs.cards import AdapterCards
from fedmira.runs.measured import rows_here
from fedmira.runs.provenance import Ground
from fedmira.runs.recorder import Recorder
from fedmira.runs.rows import ClientRow, client_rows, finite_figures, summary_of

__all__ = ["Result", "trained_parameters", "write_results"]


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: the run folder.
        report: its page.
        adapters: each client's adapter as saved, read from its folder when it is asked for.
        clients: the rows of metrics/clients.csv; None where nothing was measured.
        graph: the graph of the last round, or None where the algorithm has none.
        summary: figure -> mean, weighted_mean, worst_tenth, spread.
        diverged: clients whose adapter gives no finite test loss.
        status: "finished", or "stopped" where an observer ended the run before its last round.
    """

    folder: Path
    report: Path
    adapters: Mapping[ClientId, Adapter]
    clients: list[ClientRow]
    graph: Graph | None
    summary: Mapping[str, Mapping[str, float]]
    diverged: tuple[ClientId, ...] = ()
    status: str = "finished"


def write_results(
    recorder: Recorder,
    ground: Ground,
    ranks: Mapping[ClientId, int],
    state: ServerState,
    *,
    generate: bool,
    measure: bool = True,
) -> Result:
    """Evaluate each client's own adapter, save it as a PEFT folder, and write the tables.

    Adapters are read one after another.

    Args:
        recorder: what is known of the run.
        ground: the base and the kind of adapter.
        ranks: of each client's adapter.
        state: whose adapters are saved.
        generate: whether clients' answers are scored.
        measure: False takes no pass over any row: losses that are not known stay empty, and where
            clients may decline the server's pull, what is saved is the aligned adapter.
    """
    config, folder, clients = recorder.config, recorder.folder, recorder.clients
    last = recorder.given(state)[0] if measure else recorder.aligned(state)
    best = config.evaluation.select == "best"
    kept = recorder.best_adapters
    chosen = LazyAdapters(
        ranks,
        lambda client: kept[client] if best and client in kept else last[client],
        lambda client: str((kept if best and client in kept else last).hash_of(client)),
    )
    after = _after(recorder, chosen, measure=measure)
    # The best round's upload is not kept, so with "best" there is no "before" that would compare.
    before = _before(recorder, last, after) if measure and not best else {}
    losses = {
        "base_loss": recorder.base_losses,
        "before_align_loss": before,
        "after_align_loss": after,
    }
    texts = clients.score(chosen, config.evaluation.max_new_tokens) if generate else {}
    rows = client_rows(recorder, ranks, losses, texts)
    summary = summary_of(rows)
    trained = _trained_by_rank(recorder, ranks, state)
    cards = AdapterCards(config, ground.base)
    promised = ground.promised(recorder.rounds_asked)
    index: dict[str, object] = {}
    for client, row in zip(ranks, rows, strict=True):
        rank, adapter = ranks[client], chosen[client]
        ground.kind.write(folder.adapters / client, adapter, lasting=False)
        entry: dict[str, object] = {
            "task": row["task"],
            "category": row["category"],
            "rank": rank,
            "rounds_trained": row["rounds_trained"],
            "parameters": sum(tensor.numel() for tensor in adapter.values()),
            "trained_parameters": trained[rank],
            "sha256": content_hash(adapter),
            "base_sha256": ground.base.sha256,
            **({"privacy": promised[client]} if client in promised else {}),
            **({"prompt": ground.prompts[client]} if client in ground.prompts else {}),
            "metrics": finite_figures(row),
        }
        replace_file(
            folder.adapters / client / "README.md", cards.text(client, entry, row), lasting=False
        )
        index[client] = entry
    sync_below(folder.adapters)  # before index.json names them
    folder.write_json("adapters/index.json", index)
    folder.append_events(recorder.unmeasured(config.rounds.count))
    folder.write_table("clients.csv", rows)
    if measure and (judged := _validation_rows(recorder, chosen)):
        folder.write_table("validation.csv", judged)
    diverged = tuple(client for client, loss in after.items() if not math.isfinite(loss.total))
    saved = LazyAdapters(ranks, lambda client: ground.kind.read(folder.adapters / client))
    return Result(
        folder.path, folder.path / "report.html", saved, rows, recorder.graph, summary, diverged
    )


def trained_parameters(start: Start) -> int:
    """Entries of the adapter that local training moves.

    Those whose gradient the method lets through.
    """
    if start.hook is None:
        return sum(tensor.numel() for tensor in start.adapter.values())
    ones, zeros = (
        {name: torch.full_like(tensor, value) for name, tensor in start.adapter.items()}
        for value in (1.0, 0.0)
    )
    passed, kept = start.hook(ones, start.adapter), start.hook(zeros, start.adapter)
    return sum(int((passed[name] != kept[name]).sum()) for name in passed)


def _trained_by_rank(
    recorder: Recorder, ranks: Mapping[ClientId, int], state: ServerState
) -> dict[int, int]:
    """Rank -> trained parameters of an adapter of this rank.

    What a method freezes depends on the adapter's form only.
    """
    algorithm, one_of = recorder.algorithm, {rank: client for client, rank in ranks.items()}
    return {
        rank: trained_parameters(algorithm.started(algorithm.instruct(state, client), None))
        for rank, client in one_of.items()
    }


def _validation_rows(recorder: Recorder, chosen: LazyAdapters) -> list[dict[str, object]]:
    """The rows of metrics/validation.csv; none where the rows are on other machines."""
    here = rows_here(recorder.clients)
    if here is None:
        return []
    return [
        {
            "client": client,
            "row": number,
            "tokens": len(row.response),
            "loss": loss if math.isfinite(loss) else None,
        }
        for client, losses in recorder.measured.validation_rows(chosen).items()
        for number, (row, loss) in enumerate(zip(here.data[client].validation, losses, strict=True))
    ]


def _after(
    recorder: Recorder, chosen: LazyAdapters, *, measure: bool
) -> Mapping[ClientId, TokenLoss]:
    """Losses of the adapters that are saved, of all test rows; those that are known already."""
    settings, last = recorder.config.evaluation, recorder.config.rounds.count
    shown = settings.select != "best" and not recorder.shows_few
    if not measure:
        known = shown and recorder.latest_round == recorder.round_done
        return recorder.latest if known and not recorder.algorithm.may_decline else {}
    if shown and recorder.latest_round == last:
        return recorder.latest
    return recorder.measured.losses(chosen, "test")


def _before(
    recorder: Recorder, last: LazyAdapters, after: Mapping[ClientId, TokenLoss]
) -> dict[ClientId, TokenLoss]:
    """Losses of each client's last upload.

    A client that alignment did not move since then has the loss it ended with.
    """
    uploaded = recorder.uploaded
    moved = [client for client in uploaded if uploaded.hash_of(client) != last.hash_of(client)]
    theirs = LazyAdapters(moved, uploaded.__getitem__, uploaded.hash_of)
    own = recorder.clients.losses(theirs) if moved else {}
    measured = {**after, **own}
    return {client: measured[client] for client in uploaded if client in measured}
