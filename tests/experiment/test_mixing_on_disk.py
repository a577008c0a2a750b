"""The proof that alignment acts.

What two runs saved on disk differ by exactly the published step, recomputed here in float64 numpy.

    W  <-  (I - gamma L) W        gamma = coupling / largest degree     (paper eq. 8)

Both runs start from one seed and have one round in which everybody trains, so the run with coupling
0 saves W as it was trained, and the run with coupling kappa saves what the server made of the same
W.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmira.experiment import build_experiment, run_experiment
from fedmira.model import BaseModel
from small import CLIENTS, adapters_of, events_of, laplacian_of, make_config, table_of

NAMES = sorted(CLIENTS)
Matrix = np.ndarray[Any, Any]
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(
    base: BaseModel,
    base_folder: Path,
    clients_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """Runs one round in a new folder; the same settings are run once."""
    done: dict[str, Path] = {}

    def once(**settings: Any) -> Path:
        keys = {
            "rounds.count": 1,
            **{name.replace("__", "."): value for name, value in settings.items()},
        }
        if repr(keys) not in done:
            folder = tmp_path_factory.mktemp("mixing") / "run"
            run_experiment(
                build_experiment(make_config(base_folder, clients_folder, keys), base), folder
            )
            done[repr(keys)] = folder
        return done[repr(keys)]

    return once


def mixing_of(folder: Path, coupling: float, size_scale: float) -> Matrix:
    """I - gamma L of a run folder.

    Row k is scaled by size_scale / (size_scale + rows_k) where that is on.
    """
    laplacian, max_degree = laplacian_of(folder, NAMES)
    rows = {row["client"]: int(row["train_rows"]) for row in table_of(folder, "clients")}
    share = np.array(
        [size_scale / (size_scale + rows[name]) if size_scale else 1.0 for name in NAMES]
    )
    return np.eye(len(NAMES)) - share[:, None] * (coupling / max_degree) * laplacian


def products_of(adapter: dict[str, Matrix], scale: float) -> dict[str, Matrix]:
    """s B A of every module."""
    return {
        name: scale * adapter[name.replace("lora_A", "lora_B")] @ down
        for name, down in adapter.items()
        if "lora_A" in name
    }


@pytest.mark.parametrize("graph", ["category", "random"])
@pytest.mark.parametrize("coupling", [0.3, 1.0])
@pytest.mark.parametrize("size_scale", [0.0, 64.0])
def test_factors_on_disk_are_those_of_local_training_times_i_minus_gamma_l(
    run: Run, graph: str, coupling: float, size_scale: float
) -> None:
    shared = {
        "algorithm__space": "factor",
        "algorithm__size_scale": size_scale,
        "graph__kind": graph,
    }
    trained, aligned = (
        adapters_of(run(**shared, algorithm__coupling=0.0)),
        adapters_of(run(**shared, algorithm__coupling=coupling)),
    )
    mixing = mixing_of(run(**shared, algorithm__coupling=coupling), coupling, size_scale)
    assert list(trained) == list(aligned) == NAMES and np.allclose(mixing.sum(axis=1), 1)
    moved = 0.0
    for parameter in trained[NAMES[0]]:
        stacked = np.stack([trained[name][parameter] for name in NAMES])
        expected = np.tensordot(mixing, stacked, axes=1)
        found = np.stack([aligned[name][parameter] for name in NAMES])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7 * np.abs(stacked).max())
        moved = max(moved, float(np.abs(found - stacked).max()))
    assert moved > 1e-3, "the step must be seen to act"


def test_the_graph_on_disk_is_the_one_that_the_settings_ask_for(run: Run) -> None:
    laplacian, max_degree = laplacian_of(
        run(
            algorithm__space="factor",
            algorithm__size_scale=0.0,
            algorithm__coupling=1.0,
            graph__kind="category",
        ),
        NAMES,
    )
    # Three apples joined to each other, two birches joined to each other.
    assert max_degree == 2 and laplacian.diagonal().tolist() == [2, 2, 2, 1, 1]
    assert laplacian[0].tolist() == [2, -1, -1, 0, 0]
    laplacian, max_degree = laplacian_of(
        run(
            algorithm__space="factor",
            algorithm__size_scale=0.0,
            algorithm__coupling=1.0,
            graph__kind="random",
        ),
        NAMES,
    )
    assert (
        len({round(degree, 6) for degree in laplacian.diagonal()}) == 5
        and max_degree == laplacian.diagonal().max()
    )


@pytest.mark.parametrize("size_scale", [0.0, 64.0])
def test_products_on_disk_are_the_mixture_where_the_rank_can_hold_it(
    run: Run, size_scale: float
) -> None:
    rank, scale = 32, 8.0 / 32  # as many as the layers have inputs
    shared = {"adapter__rank": rank, "algorithm__size_scale": size_scale, "graph__kind": "category"}
    trained, aligned = (
        adapters_of(run(**shared, algorithm__coupling=0.0)),
        adapters_of(run(**shared, algorithm__coupling=0.8)),
    )
    mixing = mixing_of(run(**shared, algorithm__coupling=0.8), 0.8, size_scale)
    before, after = (
        [products_of(trained[name], scale) for name in NAMES],
        [products_of(aligned[name], scale) for name in NAMES],
    )
    for module in before[0]:
        expected = np.tensordot(mixing, np.stack([products[module] for products in before]), axes=1)
        found = np.stack([products[module] for products in after])
        size = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * size)
        assert (
            np.abs(found - np.stack([products[module] for products in before])).max() > 0.05 * size
        )


@pytest.mark.parametrize("size_scale", [0.0, 64.0])
def test_products_on_disk_are_the_nearest_of_their_rank_where_it_cannot(
    run: Run, size_scale: float
) -> None:
    rank, scale = 2, 8.0 / 2  # three apples of rank 2 mix to rank 6
    shared = {"adapter__rank": rank, "algorithm__size_scale": size_scale, "graph__kind": "category"}
    trained, aligned = (
        adapters_of(run(**shared, algorithm__coupling=0.0)),
        adapters_of(run(**shared, algorithm__coupling=0.8)),
    )
    mixing = mixing_of(run(**shared, algorithm__coupling=0.8), 0.8, size_scale)
    before, after = (
        [products_of(trained[name], scale) for name in NAMES],
        [products_of(aligned[name], scale) for name in NAMES],
    )
    cut = 0.0
    for module in before[0]:
        wanted = np.tensordot(mixing, np.stack([products[module] for products in before]), axes=1)
        for target, products in zip(wanted, after, strict=True):
            left, values, right = np.linalg.svd(target)
            best = left[:, :rank] * values[:rank] @ right[:rank]
            size = np.linalg.norm(target)
            assert (
                np.linalg.norm(target - products[module])
                <= np.linalg.norm(values[rank:]) + 1e-6 * size
            )  # Eckart-Young
            if (
                values[rank] < 0.9 * values[rank - 1]
            ):  # else the nearest matrix is not well determined
                assert np.linalg.norm(products[module] - best) < 1e-4 * size
            cut = max(cut, float(np.linalg.norm(values[rank:])) / float(size))
    assert cut > 1e-3, "the mixture must not have fitted into the rank by chance"


@pytest.mark.parametrize("space", ["factor", "product"])
def test_the_log_says_how_far_each_client_was_pulled(run: Run, space: str) -> None:
    folder = run(
        algorithm__space=space,
        algorithm__size_scale=64.0,
        graph__kind="category",
        algorithm__coupling=1.0,
    )
    diagonal = mixing_of(folder, 1.0, 64.0).diagonal()
    logged = {event["client"]: event for event in events_of(folder, "align")}
    for name, own in zip(NAMES, diagonal, strict=True):
        assert logged[name]["pull"] == pytest.approx(1 - own, rel=1e-9)
        assert logged[name]["relative_pull"] > 0.01
    pulls = [float(row["pull"]) for row in table_of(folder, "rounds")]
    assert pulls == [pytest.approx(float(np.mean(1 - diagonal)), rel=1e-9)]
