"""fedmira: federated multi-task fine-tuning of language models, one LoRA adapter per client.

    import fedmira
    result = fedmira.run({"data.source": "demo"}, output="runs/first")
    result.adapters["clinic-north"], result.clients, result.graph, result.summary

The names below are imported when they are first used, so that `import fedmira` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmira.api import run
    from fedmira.config import Config, load_config
    from fedmira.experiment import Experiment, build_experiment, resume_experiment, run_experiment
    from fedmira.runs import Result

__all__ = [
    "Config",
    "Experiment",
    "Result",
    "build_experiment",
    "load_config",
    "resume_experiment",
    "run",
    "run_experiment",
]

__version__ = "0.1.0"

_HOMES = {
    "Config": "fedmira.config",
    "load_config": "fedmira.config",
    "Experiment": "fedmira.experiment",
    "build_experiment": "fedmira.experiment",
    "resume_experiment": "fedmira.experiment",
    "run_experiment": "fedmira.experiment",
    "Result": "fedmira.runs",
    "run": "fedmira.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(
            f"module 'fedmira' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(import_module(_HOMES[name]), name)
