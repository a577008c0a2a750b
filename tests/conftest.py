"""What all tests share.

A thread count, a reproducible hypothesis, and the folder of real data where there is one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from fedmira.model import BaseModel

# derandomize: the same examples in each run; deadline: the first call of a torch function is slow.
hypothesis.settings.register_profile("fedmira", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fedmira")

# No more threads than cores this process may use: they would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:  # beside other processes of tests
    os.environ["OMP_NUM_THREADS"] = "1"
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, cores))))


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder `shared` beside the repository: real data and models that are not part of it."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(
            f"no folder {folder.name!r} beside the repository; it holds real data that is "
            "not part of it"
        )
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama of `tiny.py` in Hugging Face format."""
    from small import write_base

    return write_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="session")
def base(base_folder: Path) -> BaseModel:
    """The same, loaded; shared by all tests, since a base is frozen."""
    from fedmira.config import ModelSettings
    from fedmira.model import load_base

    return load_base(ModelSettings(base=str(base_folder), device="cpu"))


@pytest.fixture(scope="session")
def clients_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small clients of two categories, as JSON Lines."""
    from small import write_clients

    return write_clients(tmp_path_factory.mktemp("data") / "clients")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests, and the processes that they start, neither read nor write the user's cache."""
    os.environ["FEDMIRA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
