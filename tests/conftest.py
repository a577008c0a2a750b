"""What all tests share: a thread count, a reproducible hypothesis, and the folder of real data where there is one."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import torch

# derandomize: the same examples in each run; deadline: the first call of a torch function is slow.
hypothesis.settings.register_profile("fedmira", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fedmira")

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder `shared` beside the repository: real data and models that are not part of it."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name!r} beside the repository; it holds real data that is not part of it")
    return folder
