"""[local]: a client's training within a round."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fedmira.config.section import Count, Positive, Section, setting

__all__ = ["GRADIENT_LIMIT", "LocalSettings"]

GRADIENT_LIMIT = 1.0
"""Default of `local.max_grad_norm` for optimizers that step along gradients."""


def _gradient_limit(local: dict[str, Any]) -> float:
    """The default of `max_grad_norm`, from the keys of the section that stand before it."""
    return 0.0 if local.get("optimizer") == "zeroth-order" else GRADIENT_LIMIT


class LocalSettings(Section):
    """[local]: a client's training within a round."""

    optimizer: Literal["adamw", "adam", "sgd", "sophia", "zeroth-order"] = setting(
        "adamw",
        help=(
            "Adam with betas 0.9 and 0.999; `adamw` decouples weight decay, `adam` and `sgd` "
            "add it to the gradient; `sgd` has no momentum. `sophia` divides the momentum by an "
            "estimate of the curvature, entry by entry; with `fedavg` it is Fed-Sophia. "
            "`zeroth-order` makes no backward pass: it measures the slope along a random "
            "direction by two forward passes and steps along it, as `fedkseed` needs "
            "([methods.md](methods.md))."
        ),
    )
    steps: Positive = setting(
        5,
        help="Optimizer steps a round. Ignored where `epochs` or `steps_per_row` is above 0.",
    )
    epochs: Count = setting(
        0,
        help=("Passes over the client's training rows a round, in place of `steps`."),
    )
    steps_per_row: float = setting(
        0.0,
        ge=0,
        help=(
            "Optimizer steps a round for each training row of the client, rounded and at least "
            "one, in place of `steps`: clients with many rows then take more steps."
        ),
    )
    batch_size: Positive = setting(
        8,
        help="Rows a step; never more than the client has.",
    )
    advantage_temperature: float = setting(
        0.0,
        ge=0,
        help=(
            "Beta of advantage-weighted training: in each batch a row weighs "
            "min(exp(advantage / beta), 20), by its key `advantage`. Rows without one have "
            "advantage 0; 0 weighs all rows alike. Evaluation is never weighted "
            "([methods.md](methods.md))."
        ),
    )
    learning_rate: float = setting(
        3e-3,
        gt=0,
        help=(
            "Of the first step, and of all under the schedule `constant`. The default suits the "
            "bundled base; larger bases usually want about 3e-4, and `zeroth-order` on the "
            "bundled base too."
        ),
    )
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant",
        help=(
            "How the learning rate falls over the rounds of the run, towards 0 behind the last "
            "step. All clients of a round have equal rates, whoever trained before."
        ),
    )
    warmup_steps: Count = setting(
        0,
        help=(
            "The learning rate rises over so many local steps, counted as if the client trained "
            "in every round."
        ),
    )
    lora_plus_ratio: float = setting(
        1.0,
        gt=0,
        help=(
            'LoRA+: the learning rate of B in times that of A. Of `adapter.kind = "lora"`, and '
            "not with `zeroth-order`, which steps along one direction."
        ),
    )
    weight_decay: float = setting(
        0.0,
        ge=0,
        help="Strength of weight decay.",
    )
    max_grad_norm: float = Field(
        default_factory=_gradient_limit,
        ge=0,
        json_schema_extra={"default": GRADIENT_LIMIT},
        description=(
            "Each client's gradient is clipped to this norm on its own; 0 does not clip. With "
            "`zeroth-order` the default is `0.0`: its estimates of the gradient are longer by "
            'orders of magnitude ([methods.md](methods.md), "fedkseed").'
        ),
    )
    optimizer_state: Literal["fresh", "kept"] = setting(
        "fresh",
        help=(
            "Start each round with empty moments, or keep them in the client's private memory. "
            '`"kept"` does not go with `two-level`, `flexlora`, `flora`, `ditto`, `feddpa` in '
            'turns, `rolora`, `fedfomo`, and mira\'s `space = "product"`.'
        ),
    )
    sophia_refresh: Positive = setting(
        10,
        help=(
            "`sophia` estimates the curvature anew every so many local steps of a client, at "
            "the first of them to begin with. With kept state the count goes on from round to "
            "round. An estimate costs one more pass forward and back."
        ),
        read_by={"optimizer": ("sophia",)},
    )
    sophia_gamma: float = setting(
        0.05,
        gt=0,
        help=(
            "`sophia` steps by learning_rate · clip(m / (gamma h), -rho, rho). A larger gamma "
            "clips fewer entries; 1 is Fed-Sophia's way of writing it."
        ),
        read_by={"optimizer": ("sophia",)},
    )
    sophia_rho: float = setting(
        1.0,
        gt=0,
        help=(
            "The clip of `sophia`: no entry moves further than learning_rate · rho in a step. 1 "
            "is Sophia's way of writing it."
        ),
        read_by={"optimizer": ("sophia",)},
    )
    zeroth_seeds: int = setting(
        4096,
        ge=1,
        le=65536,
        help=(
            "`zeroth-order` draws each direction from so many candidates; with `fedkseed`, the "
            "most numbers that travel."
        ),
        read_by={"optimizer": ("zeroth-order",)},
    )
    zeroth_width: float = setting(
        5e-4,
        gt=0,
        help=(
            "`zeroth-order` moves the adapter by so many times the direction, to either side, "
            "to measure a slope."
        ),
        read_by={"optimizer": ("zeroth-order",)},
    )

    @model_validator(mode="after")
    def _one_count_of_steps(self) -> LocalSettings:
        if self.epochs and self.steps_per_row:
            raise ValueError(
                f"epochs = {self.epochs} and steps_per_row = {self.steps_per_row:g} both say how "
                "many steps a round has; set one of them to 0"
            )
        return self

    @model_validator(mode="after")
    def _weights_need_rows_to_weigh(self) -> LocalSettings:
        if self.advantage_temperature and self.batch_size == 1:
            raise ValueError(
                f"advantage_temperature = {self.advantage_temperature:g} weighs the rows of a "
                "batch against each other, and batch_size = 1 leaves nothing to weigh; raise "
                "batch_size, or set advantage_temperature to 0"
            )
        return self

    @model_validator(mode="after")
    def _one_direction_has_one_rate(self) -> LocalSettings:
        if self.lora_plus_ratio != 1 and self.optimizer == "zeroth-order":
            raise ValueError(
                f"lora_plus_ratio = {self.lora_plus_ratio:g} gives A and B rates of their own, but "
                "optimizer = 'zeroth-order' steps along one direction; set it to 1"
            )
        return self
