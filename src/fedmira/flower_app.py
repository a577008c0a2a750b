"""The two halves of a Flower app.

`server_app` runs a federation, `client_app` answers for one node.

`fedmira flower init` writes the app folder that names them. A node starts a process for each
message, which imports this module, so everything that takes long is imported where it is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedmira.errors import ConfigError, FedmiraError
from fedmira.federation.codes import INTERNAL, Refused, told_of
from fedmira.federation.resident import answer_here, ask_resident
from fedmira.shown import cut, plain

if TYPE_CHECKING:
    from fedmira.observers import Observer

try:
    from flwr.app import Context, Error, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

    from fedmira.federation.flower.records import bytes_of, record_of
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"a federation needs Flower ({missing}); in a checkout of fedmira, install it "
        "with: pip install '.[flower]'"
    ) from missing

__all__ = ["OF_THE_APP", "client_app", "server_app"]

OF_THE_APP = ("output", "resume", "simulation")
"""Keys of the app's config that are no settings of the run."""

_ERROR_CODE = 1000  # Flower's own codes are small
_LONGEST_REASON = 2000
_SERVER_ONLY = "server-only."  # that of federation.policy, which takes long to import
_log = logging.getLogger("fedmira")

client_app = ClientApp()
server_app = ServerApp()


@server_app.main()
def _run(grid: Grid, context: Context) -> None:
    """Build the run that the app's config describes, and run it with the nodes of the grid."""
    _show_log()
    from fedmira.config import unflattened
    from fedmira.federation.server import run_federation

    output, resume, simulated = (
        _output(context),
        bool(context.run_config["resume"]),
        _is_simulated(context),
    )
    try:
        result = run_federation(
            unflattened(_settings(context)),
            grid,
            output,
            resume=resume,
            simulated=simulated,
            observers=[_logged()],
        )
    except FedmiraError as error:
        _log.error("error: %s", error)  # before Flower's own lines, which are long
        raise
    _log.info("report: %s", result.report)


@client_app.train()
@client_app.query("identity")
@client_app.evaluate("losses")
@client_app.evaluate("choice")
@client_app.evaluate("scores")
def _answer(message: Message, context: Context) -> Message:
    """Answer a message of the server.

    Of what goes wrong a code goes back, and the words stand in the node's log. A simulation has one
    party only, and is told all.
    """
    try:
        return Message(record_of(_content(message, context)), reply_to=message)
    except FedmiraError as error:
        _log.error("%s: %s", message.metadata.message_type, plain(str(error), lines=True))
        alone = _is_simulated(context) and "name" not in context.node_config
        told = str(error) if alone else told_of(error)
    except Exception:  # noqa: BLE001 - Flower would send the text of an unforeseen error
        _log.exception("%s: unforeseen", message.metadata.message_type)
        told = INTERNAL
    return Message(Error(_ERROR_CODE, told), reply_to=message)


def _content(message: Message, context: Context) -> bytes:
    """The answer of whoever has the base.

    This process in a simulation, else the node's resident process.
    """
    node, kind, content = (
        dict(context.node_config),
        message.metadata.message_type,
        bytes_of(message.content),
    )
    if _is_simulated(context):
        if "name" in node:  # an operator's node does not read the rows that a server names
            raise Refused(
                "the run is a Flower simulation, but this node is not simulated: its config lacks "
                "partition-id; start the run with --run-config 'simulation=false'"
            )
        _show_log()
        from fedmira.federation.simulation import answer_simulated

        return answer_simulated(node, _settings(context), _output(context), kind, content)
    answer = ask_resident if node.get("resident", True) else answer_here
    return answer(node, _shared_settings(context), kind, content)


@client_app.query("refusal")
def _refused(message: Message, context: Context) -> Message:
    """The server says why this node may not take part."""
    from fedmira.errors import WireError
    from fedmira.wire import unpack

    try:
        reason = unpack(bytes_of(message.content)).header.get("reason")
    except (KeyError, WireError) as error:
        reason = f"without a reason that can be read ({error})"
    _log.error("the server refused this node: %s", plain(cut(str(reason), _LONGEST_REASON)))
    return Message(message.content, reply_to=message)


def _settings(context: Context) -> dict[str, object]:
    """The run's settings in the app's config, those that its server alone reads among them."""
    own = {
        key.removeprefix(_SERVER_ONLY): value
        for key, value in context.run_config.items()
        if key.startswith(_SERVER_ONLY)
    }
    return {**_shared_settings(context), **own}


def _shared_settings(context: Context) -> dict[str, object]:
    """The settings that a server sends to its nodes: all but those that it alone reads."""
    return {
        key: value
        for key, value in context.run_config.items()
        if key not in OF_THE_APP and not key.startswith(_SERVER_ONLY)
    }


def _output(context: Context) -> Path:
    """The run folder, which the app's settings name."""
    return Path(str(context.run_config["output"]))


def _is_simulated(context: Context) -> bool:
    """Whether Flower simulates the nodes; the app says so."""
    return bool(context.run_config.get("simulation", False))


def _show_log() -> None:
    """Have what fedmira logs written, as lines without more."""
    logging.basicConfig(format="%(message)s")
    _log.setLevel(logging.INFO)


def _logged() -> Observer:
    """Writes a line for each round and evaluation into the server's log."""
    from fedmira.observers import EvaluationEvent, Observer, RoundEvent

    class Logged(Observer):
        def on_evaluation(self, event: EvaluationEvent) -> None:
            _tell("evaluation after round", event.round, {"test_loss": event.test_loss})

        def on_round(self, event: RoundEvent) -> None:
            _tell("round", event.round, event.figures)

    return Logged()


def _tell(what: str, number: int, figures: Mapping[str, float | None]) -> None:
    names = {
        "clients": "clients",
        "train_loss": "train loss",
        "test_loss": "test loss",
        "pull": "pull",
    }
    shown = [
        f"{label} {value:.4g}"
        for name, label in names.items()
        if (value := figures.get(name)) is not None
    ]
    _log.info("%s %s: %s", what, number, ", ".join(shown))
