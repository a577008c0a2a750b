"""The verbs from Python, and what they take."""

from fedmira.api.verbs import check, compare, decide, join, load, run, tune

__all__ = ["check", "compare", "decide", "join", "load", "run", "tune"]
