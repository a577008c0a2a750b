"""Tool (d3): a Flower simulation in which each client loads the model in its own call.

It then trains with the plain loop of tool (a).
"""

from __future__ import annotations

from flower_server import simulate

if __name__ == "__main__":
    simulate(cached=False)
