"""A base whose layers are recomputed or compiled, as [engine] asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedmira.config import EngineSettings
from fedmira.errors import ModelError
from fedmira.model.base.layers import compile_free_parts, decoder_layers, uncompile
from fedmira.model.base.types import BaseModel, TargetModule

__all__ = ["with_engine_options"]


def with_engine_options(
    base: BaseModel, settings: EngineSettings, targets: Sequence[TargetModule]
) -> BaseModel:
    """The base with its layers recomputed or compiled, as [engine] asks for.

    What an earlier run on it had asked for is undone.

    Args:
        base: the frozen base.
        settings: the [engine] section.
        targets: the linear layers that carry adapters, in the model's order.

    Raises:
        ModelError: the architecture's layers cannot be told apart, or none of their parts is free
            of adapters.
    """
    layers = decoder_layers(base.model)
    uncompile(layers)
    wanted = [f"engine.{name}" for name in ("recompute", "compile") if getattr(settings, name)]
    if wanted and not layers:
        raise ModelError(
            [
                f"{name}: the layers of {type(base.model).__name__} cannot be found; set "
                "it to false"
                for name in wanted
            ]
        )
    if settings.compile and not compile_free_parts(
        layers, [base.model.get_submodule(target.name) for target in targets]
    ):
        raise ModelError(
            "engine.compile: every part of every layer carries an adapter; set it to false "
            "or choose fewer adapter.targets"
        )
    return replace(base, recomputed_layers=tuple(layers) if settings.recompute else ())
