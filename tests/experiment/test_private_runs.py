"""Private runs: what they promise, what they withhold, and where they are refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmira.adapters import norm, subtract
from fedmira.config import load_config
from fedmira.errors import ConfigError
from fedmira.experiment import build_experiment, resume_experiment, run_experiment
from fedmira.messages import Payload, Reply, Request
from fedmira.model import BaseModel
from fedmira.privacy import ClientNoise, epsilon_of
from small import adapter_bytes, events_of, make_config, table_of

ROW: dict[str, Any] = {
    "data.validation_fraction": 0.0,
    "privacy.kind": "row",
    "privacy.epsilon": 6.0,
    "privacy.draws": "seeded",
    "rounds.count": 2,
    "local.batch_size": 3,
}
needs_library = pytest.mark.skipif(
    find_spec("dp_accounting") is None,
    reason="needs dp-accounting, which is optional (pip install 'fedmira[privacy]')",
)


@needs_library
@pytest.mark.parametrize("method", ["mira", "fedavg", "ditto", "fedalt"])
def test_a_run_spends_no_more_than_it_may_and_tells_nothing_of_its_training(
    method: str, base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, {**ROW, "algorithm.name": method})
    result = run_experiment(build_experiment(config, base), tmp_path / "run")
    told = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))["privacy"]
    rows = {row["client"]: int(row["train_rows"]) for row in result.clients}
    for client, own in told["clients"].items():
        assert (own["rate"], own["steps"]) == (min(3, rows[client]) / rows[client], 4)
        assert own["epsilon"] == epsilon_of(own["noise"], own["rate"], 4, 1e-5)
        assert 5.5 < own["epsilon"] <= 6
    assert told["epsilon"] == max(own["epsilon"] for own in told["clients"].values())
    assert told["promise"] == "none: whoever knows the seed knows the noise"
    trained = [event for event in events_of(result.folder) if event["event"] == "train"]
    assert trained
    assert not any({"loss", "first_loss", "tokens"} & set(event) for event in trained)
    assert {row["train_loss"] for row in table_of(result.folder, "rounds")} == {""}
    card = (result.folder / "adapters" / "apple-1" / "README.md").read_text(encoding="utf-8")
    assert "promises none: whoever knows the seed knows the noise" in card
    assert "epsilon" in (result.folder / "report.html").read_text(encoding="utf-8")


@needs_library
def test_secret_draws_promise_and_do_not_repeat(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, {**ROW, "privacy.draws": "secret"})
    for name in ("one", "other"):
        run_experiment(build_experiment(config, base), tmp_path / name)
    assert adapter_bytes(tmp_path / "one") != adapter_bytes(tmp_path / "other")
    told = json.loads((tmp_path / "one" / "run.json").read_text(encoding="utf-8"))["privacy"]
    assert "also for whoever runs the server" in told["promise"]
    card = (tmp_path / "one" / "adapters" / "apple-1" / "README.md").read_text(encoding="utf-8")
    assert "Each training row behind it is hidden by differential privacy with epsilon 5.99" in (
        card.replace("epsilon 6 ", "epsilon 5.99 ")
    )


@needs_library
def test_a_run_that_is_taken_up_again_counts_the_round_that_may_have_been_asked_twice(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(base_folder, clients_folder, ROW)
    run_experiment(build_experiment(config, base), tmp_path / "run", until=1)
    resume_experiment(build_experiment(config, base, tmp_path / "run"), tmp_path / "run")
    told = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["privacy"]
    assert {own["steps"] for own in told["clients"].values()} == {2 * (2 + 1)}


@needs_library
def test_client_level_noise_is_in_the_run_and_no_upload_is_kept_as_it_came(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {**ROW, "privacy.kind": "client", "algorithm.name": "fedavg", "privacy.delta": 1e-3}
    config = make_config(base_folder, clients_folder, settings)
    result = run_experiment(build_experiment(config, base), tmp_path / "run")
    told = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))["privacy"]
    noise = {own["noise"] for own in told["clients"].values()}
    assert len(noise) == 1
    assert told["epsilon"] == epsilon_of(noise.pop(), 1.0, 2, 1e-3)
    assert "no amplification" in told["accountant"]


def test_an_update_is_clipped_and_the_mean_has_the_noise_that_is_promised() -> None:
    start = {"m": torch.zeros(40, 50)}
    clip, noise, count = 2.0, 3.0, 4
    replies = [
        Reply(
            f"c{i}",
            1,
            10 * i + 1,
            Payload({"adapter": {"m": torch.full((40, 50), 9.0)}}),
            {"steps": 5.0, "loss": 1.0},
        )
        for i in range(count)
    ]
    requests = [Request(f"c{i}", 1, 0, Payload({"adapter": start})) for i in range(count)]
    quiet = ClientNoise(clip, 0.0, 1)(requests, replies).replies
    assert [norm(subtract(reply.payload.tensors["adapter"], start)) for reply in quiet] == (
        pytest.approx([clip] * count, rel=1e-5)
    )
    assert [(reply.num_examples, dict(reply.metrics)) for reply in quiet] == [
        (1, {"steps": 5.0, "withheld": 1.0})
    ] * count
    loud = ClientNoise(clip, noise, 1)(requests, replies).replies
    means = [
        sum(reply.payload.tensors["adapter"]["m"] for reply in each) / count
        for each in (loud, quiet)
    ]
    drawn = means[0] - means[1]
    assert float(drawn.std()) == pytest.approx(noise * clip / count, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["data.validation_fraction=0.1", "data.train_fraction=0.5"], "set it to 0"),
        (["algorithm.name=local", "local.optimizer=sophia"], "set it to 'adamw', 'adam' or 'sgd'"),
        (["algorithm.name=fedkseed", "local.optimizer=zeroth-order"], "'zeroth-order'"),
        (["local.advantage_temperature=1.0"], "depends on the others of its batch"),
        (["evaluation.reference_share=0.5"], "their scores travel"),
        (["privacy.kind=client", "algorithm.name=mira"], "'fedavg', 'fedprox', 'fedopt'"),
        (["privacy.kind=client", "algorithm.name=fedavg", "server.combine=median"], "'mean'"),
    ],
)
def test_what_cannot_hold_is_refused_with_the_next_step(settings: list[str], problem: str) -> None:
    chosen = ["privacy.kind=row", "data.validation_fraction=0.0", *settings]
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=chosen)
    assert problem in "; ".join(caught.value.problems)


@needs_library
def test_a_delta_that_may_give_away_a_whole_row_is_refused(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    config = make_config(base_folder, clients_folder, {**ROW, "privacy.delta": 0.2})
    with pytest.raises(ConfigError, match="promises nothing with 13 rows"):
        build_experiment(config, base)
