"""`fedmira chat --page`: the page is asked as a browser asks it, over its own server.

gradio leaves sockets and event loops open behind it, so it runs in processes of its own.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

import fedmira
from small import PROGRAM, call_main, environment

with_gradio = pytest.mark.skipif(
    find_spec("gradio") is None, reason="needs gradio, which is optional and not installed"
)

BROWSER = """
import json, sys
from gradio_client import Client
first, second = Client(sys.argv[1], verbose=False), Client(sys.argv[1], verbose=False)
found = {"asked": first.predict("w4 w8", api_name="/ask")}
found["switched"] = second.predict("birch-2", api_name="/client")
found["other"] = second.predict("w70", api_name="/ask")
found["again"] = first.predict("w4 w8", api_name="/ask")
try:
    first.predict("  ", api_name="/ask")
except Exception as error:
    found["empty"] = str(error)
found["forgotten"] = first.predict(api_name="/forget")
print(json.dumps(found))
"""
"""Two tabs that talk to different clients."""


def free_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def served(*arguments: object) -> Iterator[str]:
    """The address of a page that is served meanwhile; it ends as by Ctrl-C, without a traceback."""
    port = free_port()
    command = [PROGRAM, "chat", *map(str, arguments), "--page", "--port", str(port)]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while f"http://127.0.0.1:{port}" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in said + process.stderr.read()


@with_gradio
def test_a_browser_gets_the_answers_of_generate_and_each_tab_its_own_talk(
    shared_run: Path, lone_run: Path
) -> None:
    shared, alone = fedmira.load(shared_run), fedmira.load(lone_run)
    with served(shared_run, "--client", "apple-1", "--beside", lone_run) as address:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", BROWSER, address],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["asked"][1:] == [
        f"> w4 w8\n{alone.generate('apple-1', 'w4 w8')}",
        f"> w4 w8\n{shared.generate('apple-1', 'w4 w8')}",
    ]
    assert found["switched"] == ["", "", ""]
    assert found["other"][2] == f"> w70\n{shared.generate('birch-2', 'w70')}"
    assert found["again"] == found["asked"], "the other tab changed nothing"
    assert "there is no question" in found["empty"]
    assert found["forgotten"] == ["", "", ""]


@with_gradio
def test_a_port_that_is_taken_is_named(shared_run: Path) -> None:
    command = [PROGRAM, "chat", str(shared_run), "--client", "apple-1", "--page"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*command, "--port", str(port)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 2 and f"--port {port}: nothing can listen" in done.stderr


@pytest.mark.skipif(find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio_the_way_to_it_is_named(shared_run: Path) -> None:
    ended = call_main("chat", str(shared_run), "--client", "apple-1", "--page")
    assert ended.code == 2 and "pip install 'fedmira[page]'" in ended.err


def test_a_port_without_a_page_is_refused(shared_run: Path) -> None:
    ended = call_main("chat", str(shared_run), "--client", "apple-1", "--port", "7000")
    assert ended.code == 2 and "--port belongs to --page" in ended.err


def test_a_page_prints_no_json(shared_run: Path) -> None:
    given = ("--client", "apple-1", "--page", "--format", "json")
    ended = call_main("chat", str(shared_run), *given)
    assert ended.code == 2 and "leave it or --page away" in ended.err
