"""A client that joins a federation of real processes while it runs."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="Flower is not installed; pip install 'fedmira[flower]'")

import json
from collections.abc import Iterator
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedmira.config import dump_config
from flower_processes import Federation, wait_until
from small import events_of, lenient_node, make_config, table_of

FOUNDERS, NEWCOMER, STRANGER = ("apple-1", "birch-1"), "birch-2", "apple-3"


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    processes = Federation(tmp_path / "flower", secure=True)
    try:
        yield processes
    finally:
        processes.close()


@pytest.mark.slow
def test_a_node_that_is_started_later_joins_the_run_and_stays_in_it_when_the_server_is_killed(
    federation: Federation, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    """Beside it comes one that nobody has listed; it trains nothing and learns no names."""
    settings = {
        "rounds.count": 20,
        "federation.clients": FOUNDERS,
        "federation.open": [NEWCOMER],
        "federation.wait_s": 700,
        "federation.reply_s": 120,
        "algorithm.name": "two-level",
    }
    config = make_config(base_folder, clients_folder, settings)
    run, text = tmp_path / "run", tmp_path / "app.toml"
    text.write_text(dump_config(config), encoding="utf-8")
    federation.call(
        "fedmira", "flower", "init", tmp_path / "app", "--config", text, "--output", run
    )
    federation.start_superlink()

    def start(name: str) -> None:
        federation.register(name)
        about = {"name": name, "data-path": str(clients_folder), "memory": str(tmp_path / name)}
        federation.start_node(name, {**about, **lenient_node(config, tmp_path)})

    def trained(name: str) -> list[int]:
        there = (run / "events.jsonl").exists()
        found = events_of(run, "train") if there else []
        return [event["round"] for event in found if event["client"] == name]

    for name in FOUNDERS:
        start(name)
    federation.start_run(tmp_path / "app")
    wait_until(lambda: len(trained(FOUNDERS[0])) > 0, "round 1", 900)
    for name in (STRANGER, NEWCOMER):
        start(name)
    wait_until(lambda: len(trained(NEWCOMER)) > 1, "rounds of the newcomer", 600)
    federation.kill("superlink")
    federation.kill("run")
    federation.start_superlink()
    again = federation.start_run(tmp_path / "app", "resumed", "--run-config", "resume=true")
    wait_until(lambda: again.poll() is not None, "the resumed run", 900)

    assert (run / "report.html").is_file(), federation.log("resumed")
    (event,) = events_of(run, "join")
    first = event["round"]
    assert first > 1 and event["client"] == NEWCOMER
    rounds = {row["client"]: int(row["rounds_trained"]) for row in table_of(run, "clients")}
    assert set(rounds) == {*FOUNDERS, NEWCOMER}
    assert trained(NEWCOMER)[0] == first and trained(NEWCOMER)[-1] == 20
    assert rounds[NEWCOMER] == len(trained(NEWCOMER)) <= 21 - first
    told = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert [(p["client_id"], p["round"]) for p in told["federation"]["newcomers"]] == [
        (NEWCOMER, first)
    ]
    said = federation.log("run") + federation.log("resumed")
    assert f"client '{STRANGER}' may not join this run" in said
    own = federation.log(STRANGER)
    assert "code not-invited" in own and NEWCOMER not in own.partition("code not-invited")[2]
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder), run / "adapters" / NEWCOMER
    )
    assert any(bool(of.any()) for name, of in plain.state_dict().items() if ".lora_B." in name)
