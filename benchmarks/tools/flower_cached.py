"""Tool (d1): Flower simulation with the model cached in the actor."""

from __future__ import annotations

from flower_server import simulate

if __name__ == "__main__":
    simulate(cached=True)
