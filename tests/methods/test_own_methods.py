"""A method that is not in the package: as an object, or by the entry point of another package."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from fedmira.adapters import Adapter, replaced, weighted_sum
from fedmira.config import (
    Config,
    MethodSection,
    dump_config,
    load_config,
    method_class,
    with_method,
)
from fedmira.config import methods as table
from fedmira.errors import ConfigError
from fedmira.experiment import build_experiment, run_experiment
from fedmira.messages import Payload, Reply
from fedmira.methods import Combined, FedAvg, Local, Method, ServerState, Start, setting
from fedmira.methods.parts.proximal import toward
from fedmira.model import BaseModel
from small import adapter_bytes, local_of, make_config


class HalfWay(Local):
    """Own adapters that go part of the way to the mean of the round."""

    pull: float = setting(0.5, ge=0, le=1, help="share of the way to the mean")

    def combine(self, state: ServerState, replies: Sequence[Reply]) -> Combined:
        own = {reply.client_id: reply.payload.tensors["adapter"] for reply in replies}
        mean = weighted_sum(list(own.values()), [1 / len(own)] * len(own))
        moved = {
            client: weighted_sum([adapter, mean], [1 - self.pull, self.pull])
            for client, adapter in own.items()
        }
        return Combined(ServerState(replaced(state.adapters, moved), state.numbers))


class HalfWayHeld(HalfWay):
    """The same, whose clients are held near the adapter that they were sent."""

    strength: float = setting(0.5, ge=0, help="of the pull back to the start")

    def gradient(self, gradient: Adapter, adapter: Adapter, start: Adapter) -> Adapter:
        return {
            name: part + self.strength * (adapter[name] - start[name])
            for name, part in gradient.items()
        }


class OwnProx(FedAvg):
    """FedProx again, in one file."""

    name: ClassVar[str] = "own-prox"
    proximal: float = setting(0.01, ge=0, help="mu")

    def begin(self, payload: Payload, memory: Payload | None) -> Start:
        shared = payload.tensors["adapter"]
        return Start(shared, toward(shared, self.proximal))


def run_of(config: Config, method: Method, base: BaseModel, folder: Path) -> dict[str, bytes]:
    """The adapters of a run with a method object."""
    run_experiment(build_experiment(with_method(config, method), base), folder)
    return adapter_bytes(folder, cards=False)


@pytest.fixture
def config(base_folder: Path, clients_folder: Path) -> Config:
    return make_config(base_folder, clients_folder, {"algorithm.name": "local"})


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path in which a package with an entry point may lie."""
    monkeypatch.syspath_prepend(tmp_path)
    table._offered.cache_clear()
    yield tmp_path
    table._offered.cache_clear()
    sys.modules.pop("their_methods", None)


def install(folder: Path, line: str, code: str = "") -> None:
    """A distribution as pip leaves it: a module, and metadata that name an entry point."""
    (folder / "their_methods.py").write_text(code, encoding="utf-8")
    about = folder / "their_methods-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: their-methods\nVersion: 1.0\n", encoding="utf-8"
    )
    (about / "entry_points.txt").write_text(f"[fedmira.methods]\n{line}\n", encoding="utf-8")


def test_an_object_runs_with_both_halves(config: Config, base: BaseModel, tmp_path: Path) -> None:
    plain = run_of(config, HalfWay(), base, tmp_path / "plain")
    held = run_of(config, HalfWayHeld(), base, tmp_path / "held")
    loose = run_of(config, HalfWayHeld(strength=0.0), base, tmp_path / "loose")
    alone = run_of(config, Local(), base, tmp_path / "alone")
    assert held != plain, "the client half changes the gradient"
    assert loose == plain, "with strength 0 it changes nothing"
    assert plain != alone, "the server half pulls"


def test_the_papers_of_a_run_name_the_object(
    config: Config, base: BaseModel, tmp_path: Path
) -> None:
    run_of(config, HalfWay(pull=0.25), base, tmp_path / "run")
    written = (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")
    section = written.partition("[algorithm]")[2].partition("[")[0]
    assert 'method = "object"' in section and 'name = "half-way"' in section
    assert f'class = "{HalfWay.__module__}.HalfWay"' in section and "pull = 0.25" in section
    card = next((tmp_path / "run" / "adapters").glob("*/README.md")).read_text(encoding="utf-8")
    assert "half-way" in card and "local" not in card.partition("Made by")[2].partition("\n")[0]
    assert "half-way" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8").lower()


def test_a_written_config_asks_for_the_object_and_knows_it_again(config: Config) -> None:
    ours = with_method(config, HalfWay(pull=0.25))
    text = dump_config(ours)
    place = Path("config.toml")

    def read(folder: Path) -> Config:
        path = folder / place
        path.write_text(text, encoding="utf-8")
        return load_config(path)

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = read(Path(folder))
    assert dump_config(found) == text
    with pytest.raises(ConfigError, match=r"object 'half-way'.*give the object"):
        build_experiment(found)
    assert dump_config(with_method(found, HalfWay(pull=0.25))) == text
    with pytest.raises(ConfigError, match=r"pull was 0\.25 and is 0\.5"):
        with_method(found, HalfWay())
    with pytest.raises(ConfigError, match="name was 'half-way' and is 'half-way-held'"):
        with_method(found, HalfWayHeld(pull=0.25))


def test_what_extends_a_method_never_goes_by_its_name() -> None:
    class Mine(Local):
        """Nothing new."""

    class HTTPLike(Local):
        """Nothing new."""

    assert (Mine.name, HalfWayHeld.name, HTTPLike.name) == ("mine", "half-way-held", "http-like")
    assert Local.name == "local"


def test_an_experiment_cannot_be_given_another_method_behind_its_clients_back(
    config: Config, base: BaseModel
) -> None:
    experiment = build_experiment(config, base)
    with pytest.raises(ValueError, match="these clients run the client half of another method"):
        replace(experiment, algorithm=HalfWay())
    both = {"algorithm": HalfWay(), "clients": local_of(experiment, method=None)}
    with pytest.raises(ValueError, match="the config names 'local'"):
        replace(experiment, **both)


def test_a_setting_outside_its_limits_is_named(config: Config) -> None:
    with pytest.raises(ConfigError, match="pull = 2: .* less than or equal to 1"):
        HalfWay(pull=2)


def test_a_method_of_another_package_is_known_by_its_name(
    config: Config, base: BaseModel, offered: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    code = """
from typing import ClassVar
from fedmira.methods import FedAvg, Start, setting
from fedmira.methods.parts.proximal import toward

class TheirProx(FedAvg):
    name: ClassVar[str] = "their-prox"
    proximal: float = setting(0.01, ge=0, help="mu")

    def begin(self, payload, memory):
        return Start(payload.tensors["adapter"], toward(payload.tensors["adapter"], self.proximal))
"""
    install(offered, "their-prox = their_methods:TheirProx", code)
    folder = tmp_path_factory.mktemp("runs")
    settings: Mapping[str, object] = {"algorithm.proximal": 0.3}

    def trained(name: str) -> dict[str, bytes]:
        chosen = make_config(
            config.model.base, config.data.path, {"algorithm.name": name, **settings}
        )
        run_experiment(build_experiment(chosen, base), folder / name)
        return adapter_bytes(folder / name, cards=False)

    theirs, ours = trained("their-prox"), trained("fedprox")
    tensors = [name for name in ours if name.endswith(".safetensors")]
    assert [theirs[name] for name in tensors] == [ours[name] for name in tensors]
    assert 'name = "their-prox"' in (folder / "their-prox" / "config.toml").read_text("utf-8")
    with pytest.raises(ConfigError, match=r"algorithm\.proximal = -1: must be 0 or more"):
        load_config(overrides=["algorithm.name=their-prox", "algorithm.proximal=-1"])


def test_a_package_that_takes_a_name_of_ours_is_named(offered: Path) -> None:
    install(offered, "fedavg = their_methods:Anything")
    with pytest.raises(ConfigError, match=r"'fedavg' of their-methods .* the name is taken"):
        table.method_names()


def test_what_is_no_method_is_refused(offered: Path) -> None:
    install(offered, "thing = their_methods:Thing", "class Thing:\n    pass\n")
    with pytest.raises(ConfigError, match="is no class of fedmira.methods.Method"):
        method_class("thing")


def test_our_own_prox_is_fed_prox_to_the_bit(
    config: Config, base: BaseModel, tmp_path: Path
) -> None:
    given = make_config(
        config.model.base,
        config.data.path,
        {"algorithm.name": "fedprox", "algorithm.proximal": 0.3},
    )
    run_experiment(build_experiment(given, base), tmp_path / "ours")
    ours = adapter_bytes(tmp_path / "ours", cards=False)
    again = run_of(config, OwnProx(proximal=0.3), base, tmp_path / "again")
    tensors = [name for name in ours if name.endswith(".safetensors")]
    assert [again[name] for name in tensors] == [ours[name] for name in tensors]


def test_every_setting_says_what_it_means() -> None:
    for name in table.method_names():
        of: type[MethodSection] = method_class(name)
        assert [key for key, field in of.model_fields.items() if not field.description] == []
