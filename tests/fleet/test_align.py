"""Alignment moves relatives towards each other within its bound, and leaves all others alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from fedmira.adapters import folded, modules
from fedmira.errors import ConfigError, DataError
from fedmira.fleet import AlignSettings, OwnRows, align_fleet, decide, read_fleet
from fedmira.metrics import judge
from fedmira.model import read_lora_folder
from fleet_folders import write_drawn

FAMILIES = {"a-1": 1, "a-2": 1, "a-3": 1, "b-1": 2, "b-2": 2, "c-1": 3}


@pytest.fixture(scope="module")
def fleet(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two families and a stranger; ranks, scales and layers differ within a family."""
    settings: dict[str, dict[str, Any]] = {
        "a-1": {},
        "a-2": {"r": 4, "lora_alpha": 16, "use_rslora": True},
        "b-2": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    }
    place = tmp_path_factory.mktemp("families")
    for seed, (name, family) in enumerate(FAMILIES.items()):
        write_drawn(base, place / name, seed, family, own=0.3, **settings.get(name, {}))
    return read_fleet([place])


def products(update: Any) -> dict[str, torch.Tensor]:
    return {name: up.double() @ down.double() for name, (down, up) in modules(update).items()}


def test_relatives_are_found_and_strangers_left_alone(fleet: Any) -> None:
    aligned = align_fleet(fleet)
    assert {frozenset((a[0], b[0])) for a, b, _ in aligned.graph.edges()} == {
        frozenset("a"),
        frozenset("b"),
    }
    stranger = aligned.moved["c-1"]
    assert stranger.pull == 0 and stranger.adapter is None
    assert all(moved.pull > 0 for name, moved in aligned.moved.items() if name != "c-1")


@pytest.mark.parametrize("coupling", [0.1, 0.5, 1.0])
def test_the_step_is_that_of_mira_in_product_space_and_within_its_bound(
    fleet: Any, coupling: float
) -> None:
    aligned = align_fleet(fleet, AlignSettings(coupling))
    before = {member.name: products(member.update) for member in fleet.members}
    for member in fleet.members:
        moved = aligned.moved[member.name]
        assert moved.pull <= coupling + 1e-9
        assert math.isclose(sum(moved.by.values()), moved.pull, abs_tol=1e-9)
        if moved.adapter is None:
            continue
        after = products(folded(moved.adapter, member.scales))
        squared, norm, length = 0.0, 0.0, 0.0
        for name, own in before[member.name].items():
            having = {other: w for other, w in moved.by.items() if name in before[other]}
            wanted = own + sum(w * (before[other][name] - own) for other, w in having.items())
            values = torch.linalg.svdvals(wanted)[member.ranks[name] :]
            error = float((after[name] - wanted).square().sum())
            assert math.isclose(error, float(values.square().sum()), rel_tol=1e-3, abs_tol=1e-7)
            squared, norm = squared + error, norm + float(own.square().sum())
            length += float((after[name] - own).square().sum())
        assert moved.tail == pytest.approx(math.sqrt(squared / norm), abs=1e-4)
        assert moved.distance == pytest.approx(math.sqrt(length / norm), rel=1e-3)
    own = aligned.graph.degrees
    for name, degree in zip(fleet.names, own.tolist(), strict=True):
        assert aligned.moved[name].pull == pytest.approx(coupling * degree)


def test_the_order_of_folders_does_not_matter(fleet: Any) -> None:
    one, two = align_fleet(fleet), align_fleet(fleet.only(fleet.names[::-1]))
    for name in fleet.names:
        assert one.moved[name].pull == pytest.approx(two.moved[name].pull)
        first, second = one.updates().get(name), two.updates().get(name)
        for layer, product in products(first).items() if first else ():
            assert torch.allclose(product, products(second)[layer], atol=1e-5)


def test_what_has_no_room_in_an_adapter_is_said(fleet: Any) -> None:
    """b-2 has a layer that b-1 lacks: b-1 cannot take it, and b-2 keeps all of it."""
    aligned = align_fleet(fleet)
    assert aligned.moved["b-1"].dropped > 0 and aligned.moved["b-2"].dropped == 0
    member = next(each for each in fleet.members if each.name == "b-2")
    after = products(aligned.updates()["b-2"])
    for name, own in products(member.update).items():
        if "down_proj" in name:
            assert torch.allclose(after[name], own, atol=1e-5)


def test_every_folder_keeps_its_own_form_and_loads_with_plain_peft(
    fleet: Any, logits: Any, tmp_path: Path
) -> None:
    aligned = align_fleet(fleet)
    place = decide(aligned).save(tmp_path / "out")
    for member in fleet.members:
        written = place / member.name
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            same = (written / file).read_bytes() == (member.path / file).read_bytes()
            assert same is (file.endswith("json") or member.name == "c-1")
        changed = not torch.allclose(logits(written), logits(member.path), atol=1e-5)
        assert changed is (member.name != "c-1")
        back = products(read_lora_folder(written).update)
        for name, product in products(aligned.updates().get(member.name, member.update)).items():
            assert torch.allclose(back[name], product, atol=1e-5)


def test_pages_say_what_is_bounded_and_what_is_not_known(fleet: Any, tmp_path: Path) -> None:
    place = decide(align_fleet(fleet)).save(tmp_path / "out")
    told = json.loads((place / "align.json").read_text())
    assert [each["name"] for each in told["adapters"]] == list(fleet.names)
    assert "no row was read" in told["unknown"][0] and "0.5 of the way" in told["bound"]
    assert {edge["source"][0] for edge in json.loads((place / "graph.json").read_text())["edges"]}
    page, text = (place / "report.html").read_text(), (place / "report.md").read_text()
    for part in (told["bound"], "What cannot be known", "a-1"):
        assert part in page and part in text
    body = page.partition("<body>")[2].partition("<script>")[0]
    ElementTree.fromstring(f"<body>{body}</body>")


def test_starts_of_ones_own_are_seen(make: Callable[..., Path]) -> None:
    folders = [make("one"), make("two", 1)]
    unknown = decide(align_fleet(read_fleet(folders))).figures["unknown"]
    assert not any("overlap" in text for text in unknown)
    path = folders[1] / "adapter_model.safetensors"
    torch.manual_seed(5)
    save_file(
        {n: torch.randn_like(p) if "lora_A" in n else p for n, p in load_file(path).items()}, path
    )
    unknown = decide(align_fleet(read_fleet(folders))).figures["unknown"]
    assert any("as where each was begun from a start of its own" in text for text in unknown)


def rows_for(folder: Path, names: list[str], count: int = 8) -> Path:
    folder.mkdir()
    for name in names:
        lines = [
            json.dumps({"instruction": f"w{n} w{n + 3}", "output": f"w{2 * n + 1} w{n + 4}"})
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def test_rows_judge_each_owner_by_the_gate(fleet: Any, tmp_path: Path) -> None:
    names = ["a-1", "a-2", "b-1"]
    rows = OwnRows.of_folder(
        fleet,
        rows_for(tmp_path / "rows", names),
        settings=["data.max_length=64", "engine.token_budget=400", "model.device=cpu"],
    )
    assert {name: len(own) for name, own in rows.rows.items()} == dict.fromkeys(names, 8)
    aligned = align_fleet(fleet, AlignSettings(1.0))
    made = decide(aligned, rows)
    before = rows.row_losses({m.name: m.update for m in fleet.members})
    after = rows.row_losses(aligned.updates())
    totals = rows.losses({m.name: m.update for m in fleet.members})
    for name in names:
        assert sum(each.total for each in before[name]) == pytest.approx(totals[name].total)
        losses = {
            "own": [each.total for each in before[name]],
            "aligned": [each.total for each in after[name]],
        }
        expected = judge(losses, [each.tokens for each in before[name]], "own")
        assert made.judgements is not None and made.judgements[name] == expected
        assert made.takes(name) == expected.choice
    assert made.takes("b-2") == "own", "whose rows were not given"
    assert any("b-2" in text for text in made.figures["unknown"])
    place = made.save(tmp_path / "out")
    for member in fleet.members:
        kept = (place / member.name / "adapter_model.safetensors").read_bytes() == (
            member.path / "adapter_model.safetensors"
        ).read_bytes()
        assert kept is (made.takes(member.name) != "aligned")


def test_losses_on_rows_are_those_of_plain_peft(fleet: Any, tmp_path: Path, logits: Any) -> None:
    """Ranks, scales, number of layers: all adapters are measured side by side."""
    settings = ["data.max_length=64", "engine.token_budget=400", "model.device=cpu"]
    places = rows_for(tmp_path / "rows", list(fleet.names), 4)
    rows = OwnRows.of_folder(fleet, places, settings=settings)
    losses = rows.losses({member.name: member.update for member in fleet.members})
    for member in fleet.members:
        total = 0.0
        for row in rows.rows[member.name]:
            ids = torch.tensor([[*row.prompt, *row.response]])
            size = len(row.response)
            found = logits(member.path, ids=ids)[0, -size - 1 : -1]
            total += float(cross_entropy(found, ids[0, -size:], reduction="sum"))
        assert losses[member.name].total == pytest.approx(total, rel=1e-4)


def test_rows_of_nobody_are_refused(fleet: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rows of x, and of none of the adapters"):
        OwnRows.of_folder(
            fleet, rows_for(tmp_path / "rows", ["x"]), settings=["data.max_length=64"]
        )


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"coupling": 1.5}, "coupling is 1.5"), ({"nearest": 0}, "nearest is 0")],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        AlignSettings(**settings)


def test_one_adapter_has_nobody_to_be_aligned_with(make: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="give at least 2"):
        align_fleet(read_fleet([make("one")]))
