"""Without Flower the app says what to install; with it, it has both halves."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import pytest

from fedmira.errors import ConfigError


@pytest.mark.skipif(find_spec("flwr") is not None, reason="Flower is installed")
def test_without_flower_it_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"a federation needs Flower.*pip install '\.\[flower\]'"):
        importlib.import_module("fedmira.flower_app")


@pytest.mark.skipif(
    find_spec("flwr") is None, reason="Flower is not installed; pip install 'fedmira[flower]'"
)
def test_with_flower_it_has_both_halves() -> None:
    module = importlib.import_module("fedmira.flower_app")
    assert (
        type(module.server_app).__name__ == "ServerApp"
        and type(module.client_app).__name__ == "ClientApp"
    )
