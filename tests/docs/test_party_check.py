"""What docs/federation.md has a party do before it connects.

The check reads what the party's node will read.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path

from fedmira.config import dump_config, load_config
from fedmira.data import load_own, summary_of
from small import call_main, make_config, write_clients
from tiny import tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "federation.md"
OF_MANY = {
    "data.clients": 12,
    "rounds.min_replies": 3,
    "algorithm.name": "mira",
    "algorithm.coupling": 0.5,
}
"""Settings of a federation that one party alone cannot fulfil."""


def test_a_party_can_check_its_own_folder_before_it_connects(
    base_folder: Path, tmp_path: Path
) -> None:
    (line,) = [
        line.strip()
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if "fedmira check run.toml" in line
    ]
    data, settings = (
        write_clients(tmp_path / "clinic-north", {"apple-2": 22}),
        tmp_path / "run.toml",
    )
    config = make_config("somewhere-else", "nowhere", OF_MANY)
    settings.write_text(dump_config(config), encoding="utf-8")
    places = {
        "run.toml": str(settings),
        "/data/clinic-north": str(data),
        "/models/base": str(base_folder),
    }
    for place, here in places.items():
        assert place in line
        line = line.replace(place, here)
    ended = call_main(*shlex.split(line)[1:], "--format", "json")
    assert ended.code == 0, ended.err

    own = load_config(settings).data.model_copy(update={"path": str(data)})
    assert json.loads(ended.out)["clients"] == [
        asdict(summary_of(load_own(own, config.seed, tiny_tokenizer(), "apple-2")))
    ]


def test_rows_without_a_folder_of_their_own_are_refused_with_the_layouts(
    base_folder: Path, tmp_path: Path
) -> None:
    data = write_clients(tmp_path, {"apple-2": 22}) / "apple-2"
    settings = (
        "data.source=jsonl",
        f"data.path={data}",
        f"model.base={base_folder}",
        "data.max_length=64",
    )
    ended = call_main("check", *(part for setting in settings for part in ("--set", setting)))
    assert (
        ended.code == 2
        and "missing key 'client'" in ended.err
        and "where these rows are those of one client, data.path is the folder above it: "
        "PATH/<client>/train.jsonl"
        in " ".join(ended.err.split())
    )
