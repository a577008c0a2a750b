"""What sharing gains: each method against its own control, which does all of it but share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmira.report.findings import CHANGE_LIMIT
from fedmira.report.paired import LEVEL, Losses, Pairing, pair

__all__ = ["SHARING_RULE", "SharingGain", "sharing_gains"]

SHARING_RULE = (
    "A method's control has its factors, its steps and its schedule and shares nothing, so what a "
    "method is below its control is gained by sharing; the rest of its distance to local training "
    f"is not. Differences are method minus control with their {100 * LEVEL:g} % interval; clients "
    f"are counted that end more than {100 * CHANGE_LIMIT:g} % below or above their loss under the "
    "control."
)


@dataclass(frozen=True, slots=True)
class SharingGain:
    """A method beside its control.

    Attributes:
        method, control: their names in the comparison.
        last: paired differences after the last round.
        best: the same with each client at its own best round; None where that is no read-out.
    """

    method: str
    control: str
    last: Pairing
    best: Pairing | None

    def row(self) -> dict[str, Any]:
        """Its figures under the keys of comparison.csv."""
        row: dict[str, Any] = {"control": self.control}
        for prefix, found in (("", self.last), ("best_", self.best)):
            row |= {
                f"{prefix}sharing_gain": found.difference if found else None,
                f"{prefix}sharing_gain_low": found.low if found else None,
                f"{prefix}sharing_gain_high": found.high if found else None,
                f"{prefix}below_control": found.below if found else None,
                f"{prefix}above_control": found.above if found else None,
            }
        return row

    def texts(self) -> list[tuple[str, str, str]]:
        """For each read-out its name, the difference with its interval, and the counts."""
        told = []
        for name, found in (("last round", self.last), ("own best round", self.best)):
            if found is not None:
                gain = f"{found.difference:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
                counts = f"{found.below} / {found.above} of {len(found.clients)}"
                told.append((name, gain.replace("-", "\N{MINUS SIGN}"), counts))
        return told


def sharing_gains(
    controls: Mapping[str, str],
    last: Mapping[str, Losses],
    best: Mapping[str, Losses] | None,
    pools: Mapping[str, str] | None,
) -> dict[str, SharingGain]:
    """Method -> what it gains over its control, of those that have clients in common.

    Args:
        controls: method -> its control; both names of the comparison.
        last: losses after the last round, by method.
        best: losses at the clients' own best rounds; None where that is no other read-out.
        pools: as in `pair`.
    """
    found = {}
    for method, control in controls.items():
        if method not in last or control not in last:
            continue
        pairing = pair(last[method], last[control], pools)
        if pairing is not None:
            at_best = None if best is None else pair(best[method], best[control], pools)
            found[method] = SharingGain(method, control, pairing, at_best)
    return found
