"""FLoRA: the frozen part is the sum of what all rounds trained, exactly while it has room."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedmira.adapters import digest, scale
from fedmira.config import load_config
from fedmira.errors import ConfigError
from fedmira.methods import Flora, MethodContext
from fedmira.methods.parts.rank_split import RankSplit
from lora_federation import ALPHA, SMALL, context, dense, lora, names, play, started

ROWS = [10, 30, 20]


def products_of(federation: MethodContext, client: str, adapter: object) -> dict[str, Tensor]:
    """s B A of an adapter at its client's own scale."""
    return dense(adapter, scale(ALPHA, federation.ranks[client]))  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [[13, 13, 13], [13, 14, 16]], ids=["equal", "unequal"])
def test_the_frozen_part_is_the_exact_sum_of_all_trained_products(ranks: list[int]) -> None:
    """Two rounds add at most 2 (1 + 2 + 4) = 14 directions, and modules have 10 and 12.

    With 12 frozen directions nothing is ever cut.
    """
    federation = context(ranks, ROWS)
    algorithm = Flora(frozen_rank=12).for_federation(federation)
    state = started(algorithm, federation)
    total: dict[str, Tensor] = {}
    for number in (1, 2):
        before = state
        centres = {c: lora(ranks[k], 50 * number + k) for k, c in enumerate(names(3))}
        state, sent = play(algorithm, federation, state, centres, number)
        for reply in sent:
            client, adapter = reply.client_id, reply.payload.tensors["adapter"]
            split = RankSplit(federation.ranks[client] - 12)
            for module, product in products_of(federation, client, split.trained(adapter)).items():
                share = federation.rows[client] / 60 * product
                total[module] = total[module] + share if module in total else share
            given = algorithm.adapter_for(before, client)
            assert digest(split.frozen(adapter)) == digest(split.frozen(given))
        assert algorithm.combine(before, sent).diagnostics.round["truncation"] < 1e-4
        for client in names(3):
            given = products_of(federation, client, algorithm.adapter_for(state, client))
            for module, found in given.items():
                exact = total[module]
                torch.testing.assert_close(
                    found, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max())
                )


def test_truncation_is_the_norm_of_what_the_frozen_part_cannot_hold() -> None:
    federation = context([4, 6, 8], ROWS)
    algorithm = Flora(frozen_rank=2).for_federation(federation)
    state = started(algorithm, federation)
    centres = {c: lora(federation.ranks[c], 50 + k) for k, c in enumerate(names(3))}
    after, sent = play(algorithm, federation, state, centres, 1)
    combined = algorithm.combine(state, sent)
    squares = 0.0
    for module in dense(lora(2, 0)):
        exact: Tensor | float = 0.0
        for reply in sent:
            client, split = reply.client_id, RankSplit(federation.ranks[reply.client_id] - 2)
            part = split.trained(reply.payload.tensors["adapter"])
            exact = (
                exact + federation.rows[client] / 60 * products_of(federation, client, part)[module]
            )
        assert isinstance(exact, Tensor)
        left = torch.linalg.svdvals(exact)[2:].square().sum()
        squares += float(left)
        for client in names(3):
            found = products_of(federation, client, algorithm.adapter_for(after, client))[module]
            assert float((exact - found).square().sum()) == pytest.approx(float(left), rel=1e-3)
    assert squares > 0.01
    assert combined.diagnostics.round["truncation"] == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_every_round_begins_with_new_rows_of_a_that_all_clients_have_in_common() -> None:
    federation = context([4, 6, 6])
    algorithm = Flora().for_federation(federation)  # half of the smallest rank: 2 are frozen
    states = [started(algorithm, federation)]
    for number in (1, 2):
        centres = {c: lora(federation.ranks[c], 9 * number) for c in names(3)}
        states.append(play(algorithm, federation, states[-1], centres, number)[0])
    rows = []
    for state in states:
        small, large = (algorithm.adapter_for(state, c) for c in ("client-0", "client-1"))
        name = "m.q_proj.lora_A.weight"
        assert torch.equal(small[name][:2], large[name][:2])
        trained = RankSplit(4).trained(large)
        assert not any(bool(part.any()) for key, part in trained.items() if ".lora_B." in key)
        rows.append(trained[name])
    assert not any(torch.equal(rows[i], rows[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    spread = torch.cat([row * math.sqrt(3 * row.shape[1]) for row in rows[1:]]).std()
    assert float(spread) == pytest.approx(1.0, abs=0.2), "the spread of PEFT's start"


def test_the_trained_part_goes_up_and_new_rows_and_the_frozen_part_down() -> None:
    federation = context([4, 6])
    algorithm = Flora(frozen_rank=3).for_federation(federation)
    state = started(algorithm, federation)
    centres = {c: lora(federation.ranks[c], 5) for c in names(2)}
    _, sent = play(algorithm, federation, state, centres, 1)
    into = sum(side for _, side in SMALL.values())
    both = sum(sum(sides) for sides in SMALL.values())
    for reply, trained in zip(sent, (1, 3), strict=True):
        down = algorithm.instruct(state, reply.client_id)
        assert reply.payload.num_bytes == 4 * trained * both
        assert down.num_bytes == 4 * (trained * into + 3 * both) + 8


@pytest.mark.parametrize(("ranks", "frozen"), [([1, 4], 0), ([4, 8], 4), ([4, 8], 9)])
def test_a_rank_without_room_for_both_parts_is_refused(ranks: list[int], frozen: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"flora: client 'client-0' has rank {ranks[0]}.*both parts need"
    ):
        Flora(frozen_rank=frozen).for_federation(context(ranks))


def test_kept_moments_are_refused() -> None:
    with pytest.raises(ConfigError, match="every round trains new factors"):
        load_config(overrides=["algorithm.name=flora", "local.optimizer_state=kept"])
