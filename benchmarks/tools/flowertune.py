"""Tool (d2): Flower simulation as FlowerTune does it.

Each client loads the model in its own call and trains it with TRL's SFTTrainer.
"""

from __future__ import annotations

from flower_server import simulate

if __name__ == "__main__":
    simulate(cached=False, trainer="trl")
