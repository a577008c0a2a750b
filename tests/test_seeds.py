"""Seeds: one stream per purpose, equal on every machine."""

from __future__ import annotations

import hashlib
import json

from fedmira.seeds import row_seed, seed_for, text_seed


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


def test_each_scheme_keeps_its_values() -> None:
    key = json.dumps([3, "split", "apple-1"]).encode()
    expected = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big")
    assert row_seed(3, "split", "apple-1") == expected
    expected = int.from_bytes(hashlib.sha256(b"random graph 3").digest()[:7], "big")
    assert text_seed(3, "random graph") == expected
