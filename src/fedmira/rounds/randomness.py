"""Every random stream of a run is keyed by what it is for, so no draw depends on the history of another."""

from __future__ import annotations

import hashlib

__all__ = ["seed_for"]


def seed_for(run_seed: int, *purpose: str | int) -> int:
    """A seed of 48 bits from the run's seed and a purpose such as ("train", round, client)."""
    key = repr((run_seed, *purpose)).encode()
    return int.from_bytes(hashlib.blake2s(key, digest_size=6).digest(), "big")
