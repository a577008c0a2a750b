"""A federation whose clients are on machines of their own, over Flower; the only folder that imports flwr."""

from __future__ import annotations

__all__: list[str] = []
