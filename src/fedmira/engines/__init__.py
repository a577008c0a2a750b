"""Who carries requests to clients and replies back."""

from fedmira.engines.base import Engine
from fedmira.engines.in_process import InProcessEngine

__all__ = ["Engine", "InProcessEngine"]
