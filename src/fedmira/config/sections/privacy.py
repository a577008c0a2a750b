"""[privacy]: differential privacy, of each row or of each client."""

from __future__ import annotations

from typing import Literal

from fedmira.config.section import Section, setting

__all__ = ["PrivacySettings"]

_ON = {"kind": ("row", "client")}


class PrivacySettings(Section):
    """[privacy]: differential privacy, of each row or of each client."""

    kind: Literal["none", "row", "client"] = setting(
        "none",
        help=(
            "`row`: each client clips the gradient of every row and adds noise to their sum "
            "(DP-SGD), so that what it sends is private already and the server need not be "
            "trusted. `client`: the server clips each client's update and adds noise to the mean, "
            "with `fedavg`, `fedprox` and `fedopt`. Needs `pip install '.[privacy]'` "
            "([privacy.md](privacy.md#differential-privacy))."
        ),
    )
    clip: float = setting(
        1.0,
        gt=0,
        help="The longest that a row's gradient, or a client's update, may be.",
        read_by=_ON,
    )
    epsilon: float = setting(
        8.0,
        gt=0,
        help=(
            "What the whole run may spend: each client gets the least noise with which all rounds "
            "stay below it."
        ),
        read_by=_ON,
    )
    noise: float | None = setting(
        None,
        ge=0,
        help=(
            "The noise itself, as a standard deviation in `clip`s, in place of `epsilon`: the run "
            "then spends what it spends. 0 clips and promises nothing."
        ),
        read_by=_ON,
    )
    delta: float = setting(
        1e-5,
        gt=0,
        lt=1,
        help="The promise may fail with this probability; below 1 / rows, or 1 / clients.",
        read_by=_ON,
    )
    draws: Literal["secret", "seeded"] = setting(
        "secret",
        help=(
            "Where batches and noise come from: the operating system's entropy, or the run's "
            "seed. With `seeded` a run can be repeated, and whoever knows the seed can take the "
            "noise away: for measuring on rows that are public."
        ),
        read_by=_ON,
    )
