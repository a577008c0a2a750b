"""A whole run: its sections, and the rules between keys of several; the defaults make the demo."""

from __future__ import annotations

import re

from pydantic import Field, model_validator

from fedmira.config.methods import (
    METHODS,
    AbsentMethod,
    ChosenMethod,
    Need,
    default_method,
    method_class,
)
from fedmira.config.section import Count, Section, setting
from fedmira.config.sections.adapter import AdapterSettings, RankDistribution, ResourceType
from fedmira.config.sections.data import DataSettings
from fedmira.config.sections.graph import GraphSettings
from fedmira.config.sections.local import LocalSettings
from fedmira.config.sections.model import ModelSettings
from fedmira.config.sections.privacy import PrivacySettings
from fedmira.config.sections.run import (
    EngineSettings,
    EvaluationSettings,
    FederationSettings,
    RoundsSettings,
)
from fedmira.config.sections.server import ServerSettings

__all__ = [
    "AdapterSettings",
    "Config",
    "DataSettings",
    "EngineSettings",
    "EvaluationSettings",
    "FederationSettings",
    "GraphSettings",
    "LocalSettings",
    "ModelSettings",
    "PrivacySettings",
    "RankDistribution",
    "ResourceType",
    "RoundsSettings",
    "ServerSettings",
]

_DEVICE = re.compile(r"auto|(?:cpu|cuda|mps|xpu|hpu|xla|mtia|meta|privateuseone)(?::\d+)?")
"""Torch's names, told without importing it.

Whether the device is there shows when the base is loaded.
"""


class Config(Section):
    """All settings of a run, a section for each of its parts."""

    seed: Count = setting(
        0,
        help=(
            "Of the whole run: data draws and splits, start adapters, graph, sampling of "
            "clients, batches, dropout. Each stream is keyed by what it is for, so one draw "
            "never depends on another."
        ),
    )
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    data: DataSettings = DataSettings()
    algorithm: ChosenMethod = Field(default_factory=default_method)
    graph: GraphSettings = GraphSettings()
    local: LocalSettings = LocalSettings()
    rounds: RoundsSettings = RoundsSettings()
    server: ServerSettings = ServerSettings()
    privacy: PrivacySettings = PrivacySettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    engine: EngineSettings = EngineSettings()
    federation: FederationSettings = FederationSettings()

    @model_validator(mode="after")
    def _device_has_a_name(self) -> Config:
        if not _DEVICE.fullmatch(self.model.device):
            hint = (
                "; did you mean 'cuda'?" if self.model.device.lower() in ("gpu", "nvidia") else ""
            )
            raise ValueError(
                f"model.device = {self.model.device!r}: must be 'auto' or a torch device, "
                f"such as 'cpu', 'cuda', 'cuda:1' or 'mps'{hint}"
            )
        return self

    @model_validator(mode="after")
    def _shuffling_changes_the_graph(self) -> Config:
        if self.graph.shuffled and self.graph.kind == "uniform":
            raise ValueError(
                "graph.shuffled = true changes nothing with graph.kind = 'uniform', in "
                "which all clients are related alike; "
                "set graph.shuffled = false, or another kind"
            )
        return self

    @model_validator(mode="after")
    def _best_needs_validation(self) -> Config:
        if self.evaluation.select == "best" and self.data.validation_fraction == 0:
            raise ValueError(
                "evaluation.select = 'best' needs validation rows; set "
                "data.validation_fraction above 0"
            )
        return self

    @model_validator(mode="after")
    def _references_are_of_layers(self) -> Config:
        if self.evaluation.reference_share and not self.adapter.low_rank:
            raise ValueError(
                f"evaluation.reference_share = {self.evaluation.reference_share:g} goes with "
                f"adapter.kind = 'lora' only, and kind is {self.adapter.kind!r}; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _choices_need_validation(self) -> Config:
        setting = self.algorithm.reason(Need.VALIDATION)
        if setting and self.data.validation_fraction == 0:
            raise ValueError(
                f"{setting} needs validation rows; set data.validation_fraction above 0"
            )
        return self

    @model_validator(mode="after")
    def _the_server_does_what_the_method_does(self) -> Config:
        name, server = self.algorithm.name, self.server
        if isinstance(self.algorithm, AbsentMethod):
            return self
        if server.combine != "mean" and not self.algorithm.averages:
            raise ValueError(
                f"server.combine = {server.combine!r} takes the place of a mean of whole adapters, "
                f"which algorithm.name = {name!r} does not make; set server.combine = 'mean', or "
                f"algorithm.name to one of {_those_with('averages')}"
            )
        if server.least_mixed > 1 and not self.algorithm.moves_towards:
            raise ValueError(
                f"server.least_mixed = {server.least_mixed} is about adapters that are moved "
                f"towards others, which algorithm.name = {name!r} does not do; set it to 1, or "
                f"algorithm.name to one of {_those_with('moves_towards')}"
            )
        return self

    @model_validator(mode="after")
    def _privacy_can_hold(self) -> Config:
        problem = _privacy_problem(self)
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _newcomers_can_be_taken(self) -> Config:
        problem = _newcomers_problem(self)
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _method_and_kind_go_together(self) -> Config:
        problem = self.algorithm.reason(Need.FACTORS)
        if problem and not self.adapter.low_rank:
            raise ValueError(f"adapter.kind = {self.adapter.kind!r} does not go with {problem}")
        wanted = [f"engine.{key}" for key in ("recompute", "compile") if getattr(self.engine, key)]
        if wanted and not self.adapter.low_rank:
            raise ValueError(
                f"{wanted[0]} goes with adapter.kind = 'lora' only, and kind is "
                f"{self.adapter.kind!r}; set {wanted[0]} to false"
            )
        return self

    @model_validator(mode="after")
    def _angles_are_between_updates(self) -> Config:
        if self.graph.measure == "principal-angles" and not self.adapter.low_rank:
            raise ValueError(
                "graph.measure = 'principal-angles' compares column spaces of B A, which "
                f"adapter.kind = {self.adapter.kind!r} has not; "
                "set graph.measure = 'cosine' or adapter.kind = 'lora'"
            )
        return self

    @model_validator(mode="after")
    def _changes_are_those_of_whole_adapters(self) -> Config:
        if self.engine.wire != "float32" and self.algorithm.partly_sent:
            raise ValueError(
                f"engine.wire = {self.engine.wire!r} compresses changes of whole adapters, "
                f"but algorithm.name = {self.algorithm.name!r} "
                "sends a part of them; set engine.wire = 'float32'"
            )
        if self.engine.wire != "float32" and self.algorithm.reason(Need.VALIDATION):
            raise ValueError(
                f"engine.wire = {self.engine.wire!r} rounds what travels, but with "
                f"{self.algorithm.reason(Need.VALIDATION)} a client holds what "
                "it sent against what comes back; set engine.wire = 'float32'"
            )
        return self

    @model_validator(mode="after")
    def _kept_moments_fit_their_entries(self) -> Config:
        problem = self.algorithm.reason(Need.FRESH_MOMENTS)
        if problem and self.local.optimizer_state == "kept":
            raise ValueError(f"local.optimizer_state = 'kept' does not go with {problem}")
        return self

    @model_validator(mode="after")
    def _rates_of_two_factors(self) -> Config:
        if self.local.lora_plus_ratio != 1 and not self.adapter.low_rank:
            raise ValueError(
                f"local.lora_plus_ratio = {self.local.lora_plus_ratio:g} is of LoRA's two factors, "
                f"which adapter.kind = {self.adapter.kind!r} has not; set it to 1"
            )
        return self

    @model_validator(mode="after")
    def _movements_are_sums_of_steps(self) -> Config:
        local = self.local
        if Need.MOVEMENTS in self.algorithm.needs and (
            local.optimizer != "zeroth-order" or local.weight_decay
        ):
            raise ValueError(
                f"algorithm.name = {self.algorithm.name!r} sends steps along random "
                f"directions, but local.optimizer = {local.optimizer!r} "
                f"and local.weight_decay = {local.weight_decay:g}; set local.optimizer = "
                "'zeroth-order' and local.weight_decay = 0"
            )
        return self

    @model_validator(mode="after")
    def _gradients_are_there_to_be_squared(self) -> Config:
        problem = self.algorithm.reason(Need.GRADIENTS)
        if problem and self.local.optimizer == "zeroth-order":
            raise ValueError(
                f"local.optimizer = 'zeroth-order' does not go with {problem}: it has slopes along "
                "random directions in their place; set another local.optimizer"
            )
        return self

    @model_validator(mode="after")
    def _plain_steps_show_their_gradients(self) -> Config:
        problem, local = self.algorithm.reason(Need.PLAIN_STEPS), self.local
        wanted = {
            "optimizer": "sgd",
            "schedule": "constant",
            "warmup_steps": 0,
            "lora_plus_ratio": 1.0,
        }
        wrong = [key for key, value in wanted.items() if getattr(local, key) != value]
        if problem and wrong:
            told = ", ".join(f"local.{key} = {getattr(local, key)!r}" for key in wrong)
            ways = ", ".join(f"local.{key} = {wanted[key]!r}" for key in wrong)
            raise ValueError(
                f"{told} does not go with {problem}: every local step must be one rate times the "
                f"gradient; set {ways} (with sgd another local.learning_rate is right)"
            )
        return self


def _those_with(trait: str) -> str:
    """The names of our methods that have a trait."""
    return ", ".join(repr(name) for name in METHODS if getattr(method_class(name), trait))


def _newcomers_problem(config: Config) -> str:
    """Why nobody could join the run once it has begun; "" where somebody can, or may not."""
    opened, name = config.federation.open, config.algorithm.name
    if opened is False:
        return ""
    told = f"federation.open = {'true' if opened is True else list(opened)}"
    if opened == ():
        return f"{told} lists nobody; leave it out, or list the names that may join"
    if isinstance(config.algorithm, AbsentMethod):
        return ""
    if not config.algorithm.takes_newcomers:
        return (
            f"{told} does not go with algorithm.name = {name!r}, which does not say that its state "
            "can take clients that come later (takes_newcomers); leave federation.open out, or set "
            f"algorithm.name to one of {_those_with('takes_newcomers')}"
        )
    if config.privacy.kind == "client":
        return (
            f"{told} does not go with privacy.kind = 'client', whose promise is about the clients "
            "that a run begins with: who joins when would be seen and is not accounted for; leave "
            "federation.open out, or set privacy.kind = 'row'"
        )
    if config.graph.shuffled and config.algorithm.uses_graph:
        return (
            f"{told} does not go with graph.shuffled = true: with one client more every client "
            "would be put into another's place; leave one of them out"
        )
    return ""


def _privacy_problem(config: Config) -> str:
    """Why the promise of [privacy] could not be kept; "" where it can."""
    kind, name = config.privacy.kind, config.algorithm.name
    if kind == "none":
        return ""
    told = f"privacy.kind = {kind!r}"
    if config.data.validation_fraction > 0:
        return (
            f"{told} does not go with data.validation_fraction = "
            f"{config.data.validation_fraction:g}: losses of validation rows travel and choose, "
            "and no part of epsilon is set aside for them; set it to 0"
        )
    if config.evaluation.reference_share > 0:
        return (
            f"{told} does not go with evaluation.reference_share = "
            f"{config.evaluation.reference_share:g}: answers would lean on training rows, and "
            "their scores travel; set it to 0"
        )
    if kind == "row" and config.local.advantage_temperature > 0:
        return (
            f"{told} does not go with local.advantage_temperature = "
            f"{config.local.advantage_temperature:g}: a row's weight depends on the others of its "
            "batch; set it to 0"
        )
    if kind == "row" and config.local.optimizer in ("sophia", "zeroth-order"):
        return (
            f"{told} does not go with local.optimizer = {config.local.optimizer!r}, which asks the "
            "rows for more than the gradients that are clipped; set it to 'adamw', 'adam' or 'sgd'"
        )
    if kind == "client" and not config.algorithm.sends_mean_alone:
        return (
            f"{told} does not go with algorithm.name = {name!r}: noise hides a client in a mean "
            "of all, and is too much for its update alone; set privacy.kind = 'row', or "
            f"algorithm.name to one of {_those_with('sends_mean_alone')}"
        )
    if kind == "client" and config.server.combine != "mean":
        return (
            f"{told} does not go with server.combine = {config.server.combine!r}: what one client "
            "changes is bounded of a mean; set server.combine = 'mean'"
        )
    return ""
