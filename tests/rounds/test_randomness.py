"""Seeds: one stream per purpose, equal on every machine."""

from __future__ import annotations

import hashlib

from fedmira.rounds import seed_for


def test_a_seed_is_48_bits_of_blake2s_over_the_run_seed_and_the_purpose() -> None:
    digest = hashlib.blake2s(b"(3, 'train', 2, 'apple-1')", digest_size=6).digest()
    assert seed_for(3, "train", 2, "apple-1") == int.from_bytes(digest, "big") < 2**48


def test_run_purpose_round_and_client_each_give_another_stream() -> None:
    keys = [
        (0, "train", 1, "a"),
        (1, "train", 1, "a"),
        (0, "sample", 1, "a"),
        (0, "train", 2, "a"),
        (0, "train", 1, "b"),
        (0, "train", "1", "a"),
        (0, "train", 1),
    ]
    assert len({seed_for(*key) for key in keys}) == len(keys)
