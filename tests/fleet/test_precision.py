"""Merging by precisions, which are known from the rows that adapters were trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedmira
from fedmira.adapters import common_directions, in_directions, modules, nearest, spare_directions
from fedmira.errors import ConfigError
from fedmira.fleet import merge_fleet, read_fleet
from fedmira.model import read_lora_folder, write_lora_folder
from fedmira.studies.saved import reload_adapters, trained_rows
from small import CLIENTS, make_run

NAMES = sorted(CLIENTS)


@pytest.fixture(scope="module")
def run(base_folder: Path, clients_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clients alone, of two ranks, with dropout, which precisions must not have."""
    settings = {
        "algorithm.name": "local",
        "adapter.ranks": {"apple-1": 2},
        "adapter.dropout": 0.3,
        "local.steps": 6,
    }
    output = tmp_path_factory.mktemp("precise") / "run"
    return make_run(base_folder, clients_folder, output, settings)


def test_a_clients_precisions_are_the_squares_of_plain_pefts_gradients_row_by_row(
    run: Path, base_folder: Path, tmp_path: Path
) -> None:
    fleet, rows = read_fleet([run]), trained_rows(reload_adapters(run))
    member = next(each for each in fleet.members if each.name == "apple-1")
    (found,) = rows.squares({"apple-1": member.update}).values()
    # Plain PEFT has the scale beside B; with a scale of 1 it is within.
    ones = dict.fromkeys(member.scales, 1.0)
    write_lora_folder(tmp_path / "one", member, member.update, member.ranks, ones)
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    model = PeftModel.from_pretrained(plain, str(tmp_path / "one"), is_trainable=True).eval()
    expected = {name: torch.zeros_like(part) for name, part in member.update.items()}
    own = rows.rows["apple-1"]
    assert len(own) > 3
    for row in own:
        ids = torch.tensor([[*row.prompt, *row.response]])
        labels = ids.clone()
        labels[:, : len(row.prompt)] = -100
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                expected[name.replace(".default", "")] += parameter.grad.square()
    for name, part in expected.items():
        assert bool(part.any())
        scale = float(part.abs().max())
        torch.testing.assert_close(found[name], part, rtol=2e-3, atol=1e-4 * scale)


def test_the_merge_is_the_mean_by_precisions_in_common_directions_cut_to_the_rank(
    run: Path,
) -> None:
    made = merge_fleet(
        read_fleet([run]), "precision", trained=lambda: trained_rows(reload_adapters(run))
    )
    assert made.by == "precision" and made.weights is None and made.rank == 4
    fleet, rows = read_fleet([run]), trained_rows(reload_adapters(run))
    updates = [member.update for member in fleet.members]
    directions = common_directions(updates)
    common = {member.name: in_directions(member.update, directions) for member in fleet.members}
    sure = rows.squares(common)
    whole = {}
    for name, part in common[NAMES[0]].items():
        if ".lora_B." in name:
            above = sum(sure[client][name].double() * common[client][name] for client in NAMES)
            below = sum(sure[client][name].double() for client in NAMES)
            plain = sum(common[client][name].double() for client in NAMES) / len(NAMES)
            part = torch.where(below > 0, above / below, plain).float()
        whole[name] = part
    wanted = nearest([whole], [1.0], made.ranks, made.scales, spare_directions(updates, made.ranks))
    assert made.tail == pytest.approx(wanted.tail, rel=1e-4)
    for module, (down, up) in modules(made.adapter).items():
        other_down, other_up = modules(wanted.adapter)[module]
        torch.testing.assert_close(up @ down, other_up @ other_down, rtol=1e-3, atol=1e-5)
    # It is another adapter than the mean.
    mean = merge_fleet(fleet, "uniform").update
    assert any(
        not torch.allclose(up @ down, modules(mean)[name][1] @ modules(mean)[name][0], atol=1e-5)
        for name, (down, up) in modules(made.update).items()
    )


def test_the_verb_and_a_run_at_hand_merge_alike_and_plain_peft_loads_it(
    run: Path, base_folder: Path, tmp_path: Path
) -> None:
    verb = fedmira.merge(run, by="precision", output=tmp_path / "verb")
    at_hand = fedmira.load(run).merge(by="precision")
    assert all(torch.equal(verb.adapter[name], of) for name, of in at_hand.adapter.items())
    back = read_lora_folder(tmp_path / "verb").update
    assert all(torch.equal(back[name], of) for name, of in verb.update.items())
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    PeftModel.from_pretrained(plain, str(tmp_path / "verb"))
    some = fedmira.load(run).merge(NAMES[:2], by="precision")
    assert some.clients == tuple(NAMES[:2])


def test_adapters_without_their_rows_have_no_precisions(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="plain folders have none"):
        fedmira.merge([make("one"), make("two", 1)], by="precision", output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_rows_that_a_run_hides_are_not_asked(
    base_folder: Path, clients_folder: Path, tmp_path: Path
) -> None:
    settings = {
        "algorithm.name": "local",
        "privacy": {"kind": "row", "noise": 2.0, "delta": 1e-4},
        "data.validation_fraction": 0.0,
        "rounds.count": 1,
    }
    run = make_run(base_folder, clients_folder, tmp_path / "run", settings)
    with pytest.raises(ConfigError, match="hides what adapters were trained on"):
        fedmira.merge(run, by="precision", output=tmp_path / "merged")
