"""What [privacy] means for clients: how each hides its rows, or the server each client."""

from __future__ import annotations

from collections.abc import Mapping

from fedmira.config import Config
from fedmira.errors import ConfigError
from fedmira.messages import ClientId
from fedmira.model import BaseModel, RowPrivacy, count_steps
from fedmira.privacy import ClientNoise, PrivacyPlan, plan_of

__all__ = ["client_noise", "privacy_plan", "row_privacy"]


def privacy_plan(config: Config, rows: Mapping[ClientId, int]) -> PrivacyPlan | None:
    """What the run promises these clients; None without privacy.

    Args:
        config: the resolved settings.
        rows: training rows by client.

    Raises:
        ConfigError: it cannot be promised, or the extra `privacy` is missing.
    """
    steps = {client: count_steps(count, config.local) for client, count in rows.items()}
    return plan_of(config, rows, steps)


def row_privacy(
    config: Config, base: BaseModel, rows: Mapping[ClientId, int]
) -> dict[ClientId, RowPrivacy]:
    """How each client hides its rows; nothing where they are not hidden.

    It needs nothing that other clients know, so that a node works out its own.

    Args:
        config: the resolved settings.
        base: that trains.
        rows: training rows by client.

    Raises:
        ConfigError: as for `privacy_plan`, or the base lets rows of a pass change each other.
    """
    if config.privacy.kind != "row":
        return {}
    if base.mixing_positions is not None:
        raise ConfigError(
            "privacy.kind = 'row': in this base a long row changes the position frequencies of all "
            "rows in its pass, so that gradients of single rows cannot be told apart; choose "
            "another model.base"
        )
    plan = privacy_plan(config, rows)
    assert plan is not None, "rows are hidden by a plan"
    return {
        client: RowPrivacy(plan.clip, own.noise, own.rate, own.batch, plan.secret)
        for client, own in plan.clients.items()
    }


def client_noise(config: Config, plan: PrivacyPlan) -> ClientNoise:
    """The server's noise on updates.

    Args:
        config: the resolved settings.
        plan: of kind "client", in which all clients get the same noise.
    """
    noise = max(own.noise for own in plan.clients.values())
    return ClientNoise(plan.clip, noise, None if plan.secret else config.seed)
