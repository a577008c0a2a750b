"""Updates in directions that they have in common, and their mean by precisions there."""

from __future__ import annotations

import pytest
import torch

from fedmira.adapters import (
    Adapter,
    common_directions,
    in_directions,
    mean_by_precision,
    modules,
    padded,
)
from fedmira.errors import RunError
from lora_federation import dense, lora


def test_values_one_and_three_with_precisions_one_and_three_give_two_and_a_half() -> None:
    """(1 * 1 + 3 * 3) / (1 + 3)."""
    values = [torch.tensor([1.0]), torch.tensor([3.0])]
    assert mean_by_precision(values, [torch.tensor([1.0]), torch.tensor([3.0])]).tolist() == [2.5]


def test_equal_precisions_are_the_mean_and_so_is_what_nobody_observed() -> None:
    values = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, -1.0]), torch.tensor([8.0, 2.0])]
    same = [torch.full((2,), 0.3)] * 3
    none = [torch.zeros(2)] * 3
    for precisions in (same, none):
        assert mean_by_precision(values, precisions).tolist() == pytest.approx([4.0, 2.0])


def test_who_alone_observed_an_entry_has_it_whatever_the_size_of_what_it_saw() -> None:
    values = [torch.tensor([1.0]), torch.tensor([3.0])]
    found = mean_by_precision(values, [torch.tensor([1e-30]), torch.tensor([0.0])])
    assert found.tolist() == [1.0]


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_what_is_no_sum_of_squares_is_refused(wrong: float) -> None:
    with pytest.raises(RunError, match="negative or not finite"):
        mean_by_precision([torch.ones(1)], [torch.tensor([wrong])])


def test_an_update_in_common_directions_has_the_same_product_and_all_have_the_same_a() -> None:
    updates: list[Adapter] = [lora(2, 1), lora(3, 2), lora(1, 3)]
    directions = common_directions(updates)
    for module, rows in directions.items():
        assert rows.shape[0] == 6, "two, three and one directions, drawn apart"
        torch.testing.assert_close(rows @ rows.T, torch.eye(6, dtype=torch.float64))
        assert bool((rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()), module
    for update in updates:
        moved = in_directions(update, directions)
        for module, product in dense(update).items():
            torch.testing.assert_close(dense(moved)[module], product, rtol=1e-4, atol=1e-4)
            assert torch.equal(modules(moved)[module][0], directions[module].float())


def test_coordinates_do_not_depend_on_the_factors_in_which_an_update_came() -> None:
    """(B G)(G^-1 A) = B A: the entries of factors are others, those of coordinates are not."""
    update, other = lora(3, 1), lora(2, 2)
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(5)) + 3 * torch.eye(3)
    turned = {
        name: part @ turn if ".lora_B." in name else torch.linalg.solve(turn, part)
        for name, part in update.items()
    }
    first, second = (common_directions([each, other]) for each in (update, turned))
    before, after = in_directions(update, first), in_directions(turned, second)
    for name, part in before.items():
        assert not torch.allclose(turned[name], update[name])
        torch.testing.assert_close(after[name], part, rtol=1e-3, atol=1e-3)


def test_directions_that_nobody_has_are_left_out_and_absent_modules_are_zero() -> None:
    update, other = lora(2, 1), lora(2, 2)
    del other["m.v_proj.lora_A.weight"], other["m.v_proj.lora_B.weight"]
    twice = {
        name: torch.cat([part, part], 0 if ".lora_A." in name else 1)
        for name, part in update.items()
    }
    assert len(common_directions([twice])["m.q_proj"]) == 2
    both = padded([update, other])
    directions = common_directions(both)
    assert len(directions["m.q_proj"]) == 4 and len(directions["m.v_proj"]) == 2
    absent = in_directions(both[1], directions)["m.v_proj.lora_B.weight"]
    assert absent.shape == (10, 2) and not bool(absent.any())
    nothing = {name: torch.zeros_like(part) for name, part in update.items()}
    assert all(len(rows) == 0 for rows in common_directions([nothing]).values())
