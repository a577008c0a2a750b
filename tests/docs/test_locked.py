"""The locked releases: all that pyproject.toml asks for, within its bounds, each with hashes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LOCKS = {"fedmira.txt": ["privacy"], "flower.txt": ["flower", "privacy"]}


def releases(name: str) -> dict[str, tuple[str, int]]:
    """Package -> its release, and how many hashes stand below it."""
    found: dict[str, tuple[str, int]] = {}
    for entry in (ROOT / "locked" / name).read_text(encoding="utf-8").split("\n"):
        pinned = re.match(r"([a-z0-9._-]+)==([^ ;]+)", entry)
        if pinned:
            last = pinned[1]
            found[last] = (pinned[2], 0)
        elif re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", entry):
            found[last] = (found[last][0], found[last][1] + 1)
        else:
            assert entry == "", f"{name}: a line that is no release and no hash: {entry!r}"
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_release_has_hashes_and_no_place_of_its_own(name: str) -> None:
    found = releases(name)
    assert found and min(hashes for _, hashes in found.values()) > 0


@pytest.mark.parametrize("name", LOCKS)
def test_all_that_is_asked_for_is_locked_within_its_bounds(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"]]
    for extra in LOCKS[name]:
        asked += project["optional-dependencies"][extra]
    found = releases(name)
    for each in map(Requirement, asked):
        release, _ = found[each.name.lower()]
        assert each.specifier.contains(release), f"{name}: {each.name} {release}; run make lock"
