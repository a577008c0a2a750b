"""What a private run promises before it begins, and what it has spent once it is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedmira.config import Config
from fedmira.errors import ConfigError
from fedmira.messages import ClientId
from fedmira.privacy.accountant import epsilon_of, least_noise, require_accountant

__all__ = ["PrivacyPlan", "Spending", "plan_of"]

_PROMISES = {
    "row": (
        "each client's adapters, and whatever is made of them (graph, mixes, other clients' "
        "adapters), differ by no more than epsilon and delta say between its training rows and "
        "these rows with one of them emptied, also for whoever runs the server"
    ),
    "client": (
        "the shared adapters of all rounds differ by no more than epsilon and delta say between "
        "all clients and these clients with one that adds nothing, for everybody but whoever runs "
        "the server"
    ),
}
_OPEN = {
    "row": "numbers of rows, names and categories of clients, test rows and their losses and texts",
    "client": (
        "numbers of rows, names and categories of clients, who took part when, test rows and their "
        "losses and texts, the run folder's checkpoint"
    ),
}


@dataclass(frozen=True, slots=True)
class Spending:
    """How one client's noise is drawn, and how often.

    Attributes:
        noise: standard deviation in clips.
        rate: probability with which a row takes part in a step; 1 for client-level noise.
        batch: rows of a step on average; 1 for client-level noise.
        steps: noisy steps in a round.
    """

    noise: float
    rate: float
    batch: int
    steps: int


@dataclass(frozen=True, slots=True)
class PrivacyPlan:
    """What a private run promises.

    Attributes:
        kind: "row" or "client".
        clip: the longest that a row's gradient or a client's update may be.
        delta: of the promise.
        secret: whether draws come from the operating system and not from the run's seed.
        clients: how each client spends.
    """

    kind: str
    clip: float
    delta: float
    secret: bool
    clients: Mapping[ClientId, Spending]

    def spent(self, rounds: Mapping[ClientId, int]) -> dict[ClientId, float]:
        """Epsilon of each client.

        Args:
            rounds: in how many each was asked to train; whether a reply was used does not matter,
                because the server saw it.
        """
        return {
            client: epsilon_of(own.noise, own.rate, own.steps * rounds.get(client, 0), self.delta)
            for client, own in self.clients.items()
        }

    def as_json(self, rounds: Mapping[ClientId, int]) -> dict[str, object]:
        """What run.json says.

        Args:
            rounds: as for `spent`.
        """
        spent = self.spent(rounds)
        largest = max(spent.values(), default=0.0)
        return {
            "kind": self.kind,
            "epsilon": _finite(largest),
            "delta": self.delta,
            "clip": self.clip,
            "draws": "secret" if self.secret else "seeded",
            "promise": _PROMISES[self.kind]
            if self.secret and largest != float("inf")
            else "none: "
            + ("there is no noise" if self.secret else "whoever knows the seed knows the noise"),
            "not_covered": _OPEN[self.kind],
            "accountant": "dp-accounting, privacy loss distributions, "
            + (
                "Poisson samples of rows"
                if self.kind == "row"
                else "no amplification: the seed and the events tell who took part"
            ),
            "clients": {
                client: {
                    "epsilon": _finite(spent[client]),
                    "noise": own.noise,
                    "rate": own.rate,
                    "steps": own.steps * rounds.get(client, 0),
                }
                for client, own in self.clients.items()
            },
        }


def plan_of(
    config: Config, rows: Mapping[ClientId, int], steps: Mapping[ClientId, int]
) -> PrivacyPlan | None:
    """What a config promises these clients; None without privacy.

    Noise is enough for taking part in all rounds, whoever is drawn.

    Args:
        config: of the run.
        rows: training rows by client.
        steps: local steps of each in a round.

    Raises:
        ConfigError: the extra is missing, delta promises nothing, or no noise is enough.
    """
    settings = config.privacy
    if settings.kind == "none":
        return None
    require_accountant()
    units = {"row": max(rows.values()), "client": len(rows)}[settings.kind]
    if settings.delta * units >= 1:
        raise ConfigError(
            f"privacy.delta = {settings.delta:g} promises nothing with {units} "
            f"{settings.kind}s: one of them may be given away whole; set it below "
            f"{1 / units:.1g}, and better far below"
        )
    clients = {}
    for client, count in rows.items():
        batch = min(config.local.batch_size, count) if settings.kind == "row" else 1
        rate = batch / count if settings.kind == "row" else 1.0
        own = steps[client] if settings.kind == "row" else 1
        noise = settings.noise
        if noise is None:
            noise = least_noise(settings.epsilon, rate, own * config.rounds.count, settings.delta)
        clients[client] = Spending(noise, rate, batch, own)
    return PrivacyPlan(
        settings.kind, settings.clip, settings.delta, settings.draws == "secret", clients
    )


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value
