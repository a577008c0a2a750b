"""[server]: what the server believes of replies, and how it averages them."""

from __future__ import annotations

from typing import Literal

from fedmira.config.section import Positive, Section, setting

__all__ = ["ServerSettings"]


class ServerSettings(Section):
    """[server]: what the server believes of replies, and how it averages them."""

    screen: bool = setting(
        True,
        help=(
            "Leave replies that no honest client sends out of their round, and believe no number "
            "of rows that is out of all proportion ([privacy.md](privacy.md#attackers)). What was "
            "left out is a failure of its client, and the round goes on. `false` where all "
            "parties trust each other."
        ),
    )
    norm_bound: float = setting(
        5.0,
        gt=1,
        help=(
            "A reply is left out whose update is longer than so many times the median of the "
            "round's, each divided by the steps that its client takes; from 3 replies on."
        ),
    )
    least_cosine: float = setting(
        -1.0,
        ge=-1,
        lt=1,
        help=(
            "A reply is left out whose update has a smaller cosine with the sum of the others' "
            "unit updates; from 3 replies on. `-1.0` leaves nobody out: tasks that are unlike "
            "each other have small cosines too."
        ),
    )
    heaviest: float = setting(
        1000.0,
        ge=1,
        help=(
            "A client that claims more than so many times the median of all clients' training "
            "rows weighs as the median; from 3 clients on. No server can count rows elsewhere: "
            "lower it to what is known of the parties."
        ),
    )
    combine: Literal["mean", "median", "trimmed"] = setting(
        "mean",
        help=(
            "How adapters are averaged entry by entry: by rows, or by the median or a trimmed "
            "mean, in which all clients weigh alike. Of `fedavg`, `fedprox`, `fedopt`, `ditto`, "
            "`fedit-finetune` and `fedlease`."
        ),
    )
    trim: float = setting(
        0.2,
        gt=0,
        lt=0.5,
        help=(
            "The share of values, rounded up, that a trimmed mean leaves out at either end of "
            "each entry."
        ),
        read_by={"combine": ("trimmed",)},
    )
    least_mixed: Positive = setting(
        1,
        help=(
            "Of `mira` and `two-level`: an adapter is moved only towards so many others together, "
            "none of which weighs more than 1 / `least_mixed` of them; `two-level` makes a common "
            "step with so many others only. With 1 a client may be handed what is nearly a "
            "neighbour's adapter."
        ),
    )
