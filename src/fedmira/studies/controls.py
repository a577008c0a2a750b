"""Controls of methods: variants that could explain a gain away; one of them shares nothing."""

from __future__ import annotations

from collections.abc import Mapping

from fedmira.config import Config, dump_config, with_settings
from fedmira.errors import ConfigError

__all__ = ["ALONE", "controls_of", "with_controls"]

ALONE = "alone"
"""The control that shares nothing; what a method is below it is gained by sharing."""


def with_controls(plans: Mapping[str, Config]) -> dict[str, Config]:
    """The plans, each followed by the controls of its method as <name>-<control>.

    Args:
        plans: name of a method in the comparison -> its settings.

    Raises:
        ConfigError: no method among them has a control, a name is taken, or a control does not go
            with its method's other settings.
    """
    found: dict[str, Config] = {}
    for name, plan in plans.items():
        found[name] = plan
        for control, settings in plan.algorithm.controls.items():
            own = f"{name}-{control}"
            if own in plans:
                raise ConfigError(f"{own!r} is the name of a control; call the variant otherwise")
            try:
                found[own] = with_settings(plan, settings)
            except ConfigError as error:
                raise ConfigError([f"{own}: {problem}" for problem in error.problems]) from error
    if len(found) == len(plans):
        raise ConfigError(
            f"none of {', '.join(plans)} has a control; leave --controls away, or add a method "
            "that shares along a graph"
        )
    return found


def controls_of(plans: Mapping[str, Config]) -> dict[str, str]:
    """Method -> the method of the comparison that is its control and shares nothing.

    It is known by its settings, whatever it is called. A method with whose other settings its
    control does not go has none.

    Args:
        plans: name of a method in the comparison -> its settings.
    """
    written = {dump_config(plan): name for name, plan in plans.items()}
    found = {}
    for name, plan in plans.items():
        if ALONE not in plan.algorithm.controls:
            continue
        try:
            alone = with_settings(plan, plan.algorithm.controls[ALONE])
        except ConfigError:
            continue
        control = written.get(dump_config(alone), name)
        if control != name:
            found[name] = control
    return found
