"""The plan before a run, and the one call from Python."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import fedmira
from fedmira.errors import ConfigError
from fedmira.experiment import build_experiment, run_experiment
from fedmira.model import ATTENTION, BaseModel
from fedmira.rounds import sample_clients
from fedmira.studies import make_plan
from small import CLIENTS, SETTINGS, adapter_bytes, make_config

PER_RANK = 2 * ((32 + 32) + (32 + 16))  # q_proj 32 to 32 and v_proj 32 to 16 in two layers


def test_the_plan_follows_from_settings_and_shapes(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    settings = {
        "adapter.ranks": {"apple-1": 8},
        "rounds.participation": 0.5,
        "graph.kind": "category",
        "local.epochs": 2,
        "rounds.count": 7,
    }
    experiment = build_experiment(make_config(base_folder, clients_folder, settings), base)
    plan = make_plan(experiment)
    assert (plan.clients, plan.clients_per_round, plan.rounds, plan.targets) == (5, 3, 7, 4)
    assert plan.adapter_parameters == 8 * PER_RANK
    assert (plan.adapter_parameters_least, plan.dtype) == (4 * PER_RANK, "float32")
    assert plan.upload_mib == plan.download_mib == pytest.approx(4 * 8 * PER_RANK / 2**20)
    config = experiment.config
    drawn = Counter(
        client
        for number in range(1, 8)
        for client in sample_clients(CLIENTS, config.rounds, config.seed, number)
    )
    assert drawn.total() == 7 * 3
    expected = sum(
        times * 4 * (8 if client == "apple-1" else 4) * PER_RANK for client, times in drawn.items()
    )
    assert plan.run_upload_mib == plan.run_download_mib == pytest.approx(expected / 2**20)
    assert plan.server_mib == pytest.approx(4 * (8 + 4 * 4) * PER_RANK / 2**20)
    assert plan.cohort_mib == pytest.approx(
        4 * 4 * 3 * 8 * PER_RANK / 2**20
    )  # values, gradients, two moments
    most = max(party.train_rows for party in experiment.parties.values())
    assert plan.local_steps == 2 * -(-most // 4)
    assert plan.max_degree == 2 and plan.largest_step == pytest.approx(
        0.5
    )  # three joined to each other: gamma * 2 <= 1
    text = "\n".join(plan.lines())
    assert "7 with 3 of 5 clients" in text and "largest degree 2" in text
    assert (plan.attention, plan.attention_in_windows) == ("blocks", "")
    assert f"attention: {ATTENTION['blocks']}\n" in text


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"algorithm.name": "fedprox"}, 4 * PER_RANK),
        ({"algorithm.name": "fedex", "algorithm.trained_rank": 1}, PER_RANK),
        ({"algorithm.name": "flora", "algorithm.frozen_rank": 3}, PER_RANK),
        (
            {
                "algorithm.name": "share-factor",
                "algorithm.shared_factor": "B",
                "algorithm.private_factor": "frozen",
            },
            4 * 2 * (32 + 16),
        ),
        ({"algorithm.name": "share-factor"}, 4 * PER_RANK),
        ({"algorithm.name": "fedalt"}, 2 * PER_RANK),
        ({"algorithm.name": "ditto"}, 4 * PER_RANK),
    ],
)
def test_plan_and_run_folder_tell_trained_parameters_from_frozen_ones(
    settings: dict[str, object],
    trained: int,
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path: Path,
) -> None:
    experiment = build_experiment(
        make_config(base_folder, clients_folder, {"rounds.count": 1, **settings}), base
    )
    plan = make_plan(experiment)
    assert (plan.adapter_parameters, plan.trained_parameters) == (4 * PER_RANK, trained)
    assert ("are trained" in "\n".join(plan.lines())) == (trained < 4 * PER_RANK)
    run_experiment(experiment, tmp_path / "run")
    index = json.loads((tmp_path / "run" / "adapters" / "index.json").read_text(encoding="utf-8"))
    assert {(entry["parameters"], entry["trained_parameters"]) for entry in index.values()} == {
        (4 * PER_RANK, trained)
    }


def test_a_learned_graph_has_no_bound_to_tell_in_advance(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    plan = make_plan(build_experiment(make_config(base_folder, clients_folder), base))
    assert plan.max_degree is None and "learned in the run" in plan.lines()[-1]


def test_one_call_runs_a_mapping_of_dotted_keys(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {
        **SETTINGS,
        "model.base": str(base_folder),
        "data.path": str(clients_folder),
        "rounds.count": 1,
        "algorithm.name": "local",
    }
    result = fedmira.run(
        {**settings, "adapter.ranks": {"apple-1": 2}, "adapter.targets": ["q_proj"]},
        output=tmp_path / "run",
    )
    assert (
        sorted(result.adapters) == list(result.clients["client"]) == sorted(CLIENTS)
        and result.graph is None
    )
    assert {tuple(tensor.shape) for tensor in result.adapters["apple-1"].values()} == {
        (2, 32),
        (32, 2),
    }
    again = fedmira.run(output=tmp_path / "run", resume=True)
    assert adapter_bytes(again.folder) == adapter_bytes(result.folder)


def test_one_call_takes_a_config_or_its_file(
    base: BaseModel, base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    config = make_config(
        base_folder, clients_folder, {"rounds.count": 1, "algorithm.name": "local"}
    )
    expected = run_experiment(build_experiment(config, base), tmp_path / "first")
    for name, given in (
        ("config", config),
        ("path", tmp_path / "first" / "config.toml"),
        ("text", str(tmp_path / "first" / "config.toml")),
    ):
        assert adapter_bytes(fedmira.run(given, output=tmp_path / name).folder) == adapter_bytes(
            expected.folder
        )


def test_a_wrong_key_is_an_error_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lokal = .*: unknown key; did you mean local\?"):
        fedmira.run({"lokal.steps": 3}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strength", [{}, {"algorithm.server_step": 0.1}])
def test_kept_moments_and_mixed_products_exclude_each_other(
    strength: dict[str, float], tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"local\.optimizer_state = 'kept' does not go with algorithm\.space = 'product'",
    ):
        settings = {"algorithm.name": "mira", "local.optimizer_state": "kept", **strength}
        fedmira.run(settings, output=tmp_path / "run")
    for allowed in (
        {"algorithm.name": "mira", "algorithm.space": "factor"},
        {"algorithm.name": "fedavg"},
        {"algorithm.name": "local"},
    ):
        make_config(
            "bundled", "", {"local.optimizer_state": "kept", "data.source": "demo", **allowed}
        )


def test_a_plan_shows_its_lines_in_notebooks_with_all_text_escaped(
    base: BaseModel, base_folder: Path, clients_folder: Path
) -> None:
    config = make_config(base_folder, clients_folder, {"graph.kind": "category"})
    plan = make_plan(build_experiment(config, base))
    shown = replace(plan, base="<tiny & small>")._repr_html_()
    assert shown.count("<tr>") == 1 + len(plan.lines())
    assert "<td>rounds</td>" in shown and "&lt;tiny &amp; small&gt;" in shown
    assert "<tiny" not in shown
