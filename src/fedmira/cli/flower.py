"""fedmira flower: a run on machines of their own, over Flower."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import tomli_w
import typer

from fedmira.cli.options import Overrides, PresetName, settings
from fedmira.cli.screen import say
from fedmira.config import Config, flattened
from fedmira.errors import ConfigError

__all__ = ["app", "app_text", "init"]

app = typer.Typer(
    name="flower",
    help="A run whose clients are on machines of their own, over Flower.",
    no_args_is_help=True,
)

_ABOUT = """\
# A fedmira run as a Flower app: the settings of the run, and where Flower finds its two halves.
# Nothing else belongs to it.
# Start it with: flwr run . --stream
# Change a setting for one run with: --run-config "rounds.count=8"
# A list or a table is written as TOML within a text. Paths are those of the server; a node has its
# own in its node config.

"""


@app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The app folder, which must not exist yet.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="CONFIG.toml",
            help="Settings in TOML. Default: the demo.",
            show_default=False,
        ),
    ] = None,
    preset: PresetName = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The run folder, on the server. Default: run, beside the app.",
            show_default=False,
        ),
    ] = None,
    simulation: Annotated[
        bool,
        typer.Option(
            "--simulation",
            help="Flower simulates the clients, on the run's own data; it takes "
            "fedmira[flower-simulation].",
        ),
    ] = False,
) -> None:
    """Write a Flower app that makes this run.

    Then flower-superlink, flower-supernode and flwr run do the rest (docs/federation.md).

    Example: fedmira flower init federation --config run.toml
    """
    chosen = settings(config, preset, overrides)
    from fedmira.data import check_apart

    if not simulation:
        check_apart(chosen.data)
    if folder.exists():
        raise ConfigError(
            f"{folder}: exists already and is never overwritten; choose another folder"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", folder.resolve().name):
        raise ConfigError(
            f"{folder}: Flower wants an app folder's name in small letters, digits and "
            "'-', such as 'federation'"
        )
    run_folder = (output or folder.resolve().with_name(f"{folder.resolve().name}-run")).resolve()
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        app_text(folder.resolve().name, chosen, run_folder, simulation), encoding="utf-8"
    )
    typer.echo(folder / "pyproject.toml")
    programs, more = (
        ("a SuperLink for simulation", " --federation-config 'num-supernodes=CLIENTS'")
        if simulation
        else ("a SuperLink and the nodes", "")
    )
    say(f"start {programs} (docs/federation.md), then: flwr run {folder}{more} --stream")


def app_text(name: str, config: Config, output: Path, simulation: bool = False) -> str:
    """The pyproject.toml of a Flower app.

    Args:
        name: of the app.
        output: the run folder on the server.
        simulation: Flower simulates the nodes.
    """
    extra = "flower-simulation" if simulation else "flower"
    document = {
        "project": {
            "name": name,
            "version": "1.0.0",
            "description": "A run of fedmira over Flower",
            "license": "Apache-2.0",
            "dependencies": [f"fedmira[{extra}]"],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "local",
                    "components": {
                        "serverapp": "fedmira.flower_app:server_app",
                        "clientapp": "fedmira.flower_app:client_app",
                    },
                    "config": {
                        "output": str(output),
                        "resume": False,
                        "simulation": simulation,
                        **_nested(flattened(_absolute(config))),
                    },
                }
            }
        },
    }
    return _ABOUT + tomli_w.dumps(document)


def _absolute(config: Config) -> Config:
    """The config with paths that do not depend on where a process was started."""
    data = {
        name: str(Path(value).resolve())
        for name in ("path", "split_list")
        if (value := getattr(config.data, name)) and Path(value).exists()
    }
    base = (
        {"base": str(Path(config.model.base).resolve())} if Path(config.model.base).exists() else {}
    )
    graph = {"path": str(Path(config.graph.path).resolve())} if config.graph.path else {}
    changes = {
        "data": config.data.model_copy(update=data),
        "model": config.model.model_copy(update=base),
        "graph": config.graph.model_copy(update=graph),
    }
    return config.model_copy(update=changes)


def _nested(flat: Mapping[str, object]) -> dict[str, object]:
    """Dotted keys as tables, which read better."""
    nested: dict[str, object] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        table = nested.setdefault(section, {}) if section else nested
        assert isinstance(table, dict)
        table[name] = value
    return nested
