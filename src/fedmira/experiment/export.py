"""Saved adapters as plain PEFT loads them, held against what the run reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedmira.clients import LocalClients, OverWire
from fedmira.data import ClientData
from fedmira.errors import FedmiraError
from fedmira.experiment.build import Experiment
from fedmira.messages import ClientId
from fedmira.model import prove_export
from fedmira.runs import Result, RunFolder

__all__ = ["check_export"]


def check_export(
    experiment: Experiment, folder: RunFolder, result: Result
) -> tuple[dict[str, object], str | None]:
    """Loads saved adapters with plain PEFT and compares their losses with the reported ones.

    One is that of the client with the fewest test tokens.

    Args:
        experiment: the run that has ended.
        folder: of the run.
        result: its saved adapters and reported losses.

    Returns:
        What run.json says of it, and what is wrong, or None.
    """
    reported = {
        str(row["client"]): float(row["after_align_loss"])
        for row in result.clients
        if isinstance(row["after_align_loss"], float) and math.isfinite(row["after_align_loss"])
    }
    rows = _rows(experiment)
    able = sorted(
        (client for client in reported if client in rows and rows[client].test),
        key=lambda client: (sum(len(row.response) for row in rows[client].test), client),
    )
    if not able:
        return {"checked": [], "reason": "no client's test rows are on this machine"}, None
    if experiment.config.evaluation.reference_share:
        reported = _alone(experiment, result, able)
    losses: dict[str, float] = {}
    for client in able if experiment.verify_adapters else able[:1]:
        try:
            losses[client] = prove_export(
                experiment.base,
                experiment.targets,
                folder.adapters / client,
                result.adapters[client],
                rows[client].test,
                reported[client],
            )
        except FedmiraError as error:
            return {"checked": losses, "error": str(error)}, str(error)
    return {"checked": losses}, None


def _alone(
    experiment: Experiment, result: Result, able: Sequence[ClientId]
) -> dict[ClientId, float]:
    """Losses of the adapters alone, as plain PEFT has nothing to refer to."""
    data = _rows(experiment)
    kind = experiment.kind
    found = {}
    for client in able if experiment.verify_adapters else able[:1]:
        rows, scale = data[client].test, kind.scale(experiment.ranks[client])
        adapter = result.adapters[client]
        assert experiment.token_budget is not None, "rows that are here have a budget"
        (total,) = kind.losses([adapter], [scale], [rows], experiment.token_budget)
        found[client] = total / sum(len(row.response) for row in rows)
    return found


def _rows(experiment: Experiment) -> Mapping[ClientId, ClientData]:
    """The clients' rows where they are in this process, and none where not."""
    clients = experiment.clients
    inner = clients.inner if isinstance(clients, OverWire) else clients
    return inner.data if isinstance(inner, LocalClients) else {}
