"""fedmira flower: a run on machines of their own, over Flower."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import tomli_w
import typer

from fedmira.cli.options import Overrides, PresetName, settings
from fedmira.cli.screen import say, tell
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
# A list or a table is written as TOML within a text. What stands behind server-only is read by the
# server alone: paths, the base, and how rows are read. A node has its own in its node config and
# its policy, and refuses a server that sends it such keys.

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
    node: Annotated[
        bool,
        typer.Option(
            "--node",
            help="Write a node's policy.toml in place of an app: what a server may choose there. "
            "DIR is the folder that holds the node's rows, and may exist.",
        ),
    ] = False,
) -> None:
    """Write a Flower app that makes this run, or with --node the policy of a node.

    Then flower-superlink, flower-supernode and flwr run do the rest (docs/federation.md).

    Example: fedmira flower init federation --config run.toml
    """
    chosen = settings(config, preset, overrides)
    if node:
        _write_policy(folder, chosen, simulation or output is not None)
        return
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
    tell(folder / "pyproject.toml")
    programs, more = (
        ("a SuperLink for simulation", " --federation-config 'num-supernodes=CLIENTS'")
        if simulation
        else ("a SuperLink and the nodes", "")
    )
    say(f"start {programs} (docs/federation.md), then: flwr run {folder}{more} --stream")


def _write_policy(folder: Path, config: Config, more: bool) -> None:
    """Write policy.toml into a folder, for the node whose rows lie there.

    Raises:
        ConfigError: there is one already, or options are given that are an app's.
    """
    from fedmira.federation.policy_file import write_policy

    if more:
        raise ConfigError(
            "--node: a policy has no run folder and is no simulation; leave --output and "
            "--simulation away"
        )
    path, said = write_policy(folder, config)
    tell(path)
    for sentence in said:
        say(sentence)
    say(
        f"read it, then start the node with its rows in a folder in {folder}, or with "
        f'policy="{path}" in its --node-config (docs/security.md)'
    )


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
                        **_nested(_for_nodes(flattened(_absolute(config)), simulation)),
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


def _for_nodes(flat: Mapping[str, object], simulation: bool) -> dict[str, object]:
    """The settings with those that no node takes from a server under a name of their own.

    Args:
        flat: by dotted key.
        simulation: stays as it is, because all is one party's.
    """
    from fedmira.federation.policy import SERVER_ONLY, is_own

    return {
        f"{SERVER_ONLY}{key}" if is_own(key) and not simulation else key: value
        for key, value in flat.items()
    }


def _nested(flat: Mapping[str, object]) -> dict[str, object]:
    """Dotted keys as tables, which read better."""
    nested: dict[str, object] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            inner = table.setdefault(section, {})
            assert isinstance(inner, dict)
            table = inner
        table[name] = value
    return nested
