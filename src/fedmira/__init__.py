"""fedmira: federated multi-task fine-tuning of language models, one LoRA adapter per client.

    import fedmira
    result = fedmira.run(settings={"data.source": "demo"}, output="runs/first")
    result.clients, result.rounds, result.generate("clinic-north", "...")

The names below are imported when they are first used, so that `import fedmira` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmira import errors, methods, observers
    from fedmira.api import check, compare, decide, join, load, run, tune
    from fedmira.api.fleets import align, compress, merge
    from fedmira.config import Config, load_config, setting
    from fedmira.experiment import Experiment, build_experiment, resume_experiment, run_experiment
    from fedmira.methods import Method
    from fedmira.observers import Observer
    from fedmira.studies.refining import refine
    from fedmira.studies.result import Result

__all__ = [
    "Config",
    "Experiment",
    "Method",
    "Observer",
    "Result",
    "align",
    "build_experiment",
    "check",
    "compare",
    "compress",
    "decide",
    "errors",
    "join",
    "load",
    "load_config",
    "merge",
    "methods",
    "observers",
    "refine",
    "resume_experiment",
    "run",
    "run_experiment",
    "setting",
    "tune",
]

__version__ = "0.1.0"

_HOMES = {
    "Config": "fedmira.config",
    "Experiment": "fedmira.experiment",
    "Method": "fedmira.methods",
    "Observer": "fedmira.observers",
    "Result": "fedmira.studies.result",
    "align": "fedmira.api.fleets",
    "build_experiment": "fedmira.experiment",
    "check": "fedmira.api",
    "compare": "fedmira.api",
    "compress": "fedmira.api.fleets",
    "decide": "fedmira.api",
    "join": "fedmira.api",
    "load": "fedmira.api",
    "load_config": "fedmira.config",
    "merge": "fedmira.api.fleets",
    "refine": "fedmira.studies.refining",
    "resume_experiment": "fedmira.experiment",
    "run": "fedmira.api",
    "run_experiment": "fedmira.experiment",
    "setting": "fedmira.config",
    "tune": "fedmira.api",
}

_ROOMS = ("errors", "methods", "observers")


def __getattr__(name: str) -> Any:
    """Imports a public name from its home."""
    if name in _ROOMS:
        return import_module(f"fedmira.{name}")
    if name not in _HOMES:
        raise AttributeError(
            f"module 'fedmira' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(import_module(_HOMES[name]), name)
