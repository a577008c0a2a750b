"""Seeds keyed by what they are for, so that no draw depends on the history of another.

Three schemes stand side by side, and each keeps its values: a run of the same seed must give the
same bytes, and folders of earlier runs are resumed. New draws use `seed_for`.
"""

from __future__ import annotations

import hashlib
import json

__all__ = ["row_seed", "seed_for", "text_seed"]


def seed_for(seed: int, *purpose: str | int) -> int:
    """48 bits from the run's seed and a purpose such as ("train", round, client).

    Args:
        seed: of the whole run.
        purpose: words and numbers that name the draw.
    """
    key = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.blake2s(key, digest_size=6).digest(), "big")


def row_seed(seed: int, purpose: str, *parts: str | int) -> int:
    """128 bits for the draws of rows: partition, splits and samples.

    Args:
        seed: of the whole run.
        purpose: a word that names the kind of draw.
        parts: what else tells this draw from others.
    """
    key = json.dumps([seed, purpose, *parts]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big")


def text_seed(seed: int, purpose: str) -> int:
    """56 bits for fixed graphs and for the maps of sketches.

    Args:
        seed: of the whole run.
        purpose: a text that names the draw.
    """
    key = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return int.from_bytes(key[:7], "big")
