"""`fedmira chat --page`: the page is asked as a browser asks it, over its own server."""

from __future__ import annotations

import signal
import socket
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

import fedmira
from fedmira.errors import ConfigError
from fedmira.studies.serving.talking_page import serve_page, talking_page
from small import PROGRAM, call_main, environment

with_gradio = pytest.mark.skipif(
    find_spec("gradio") is None, reason="needs gradio, which is optional and not installed"
)


@with_gradio
@pytest.mark.filterwarnings("ignore")  # gradio's own, of the libraries it stands on
def test_a_browser_gets_the_answers_of_generate_and_each_tab_its_own_talk(
    shared_run: Path, lone_run: Path
) -> None:
    from gradio_client import Client

    shared, alone = fedmira.load(shared_run), fedmira.load(lone_run)
    page = talking_page(shared.chat("apple-1", beside=[lone_run]))
    _, address, public = page.launch(
        server_name="127.0.0.1", share=False, quiet=True, prevent_thread_lock=True
    )
    try:
        assert not public and address.startswith("http://127.0.0.1:")
        first, second = Client(address, verbose=False), Client(address, verbose=False)
        answers = first.predict("w4 w8", api_name="/ask")
        assert answers[1:] == (
            f"> w4 w8\n{alone.generate('apple-1', 'w4 w8')}",
            f"> w4 w8\n{shared.generate('apple-1', 'w4 w8')}",
        )
        assert second.predict("birch-2", api_name="/client") == ("", "", "")
        assert second.predict("w70", api_name="/ask")[2] == (
            f"> w70\n{shared.generate('birch-2', 'w70')}"
        )
        assert first.predict("w4 w8", api_name="/ask") == answers, "the other tab changed nothing"
        with pytest.raises(Exception, match="there is no question"):
            first.predict("  ", api_name="/ask")
        assert first.predict(api_name="/forget") == ("", "", "")
    finally:
        page.close(verbose=False)


@with_gradio
def test_a_port_that_is_taken_is_named(shared_run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: nothing can listen"):
            serve_page(fedmira.load(shared_run).chat("apple-1"), port, print)


@with_gradio
def test_the_command_tells_its_address_and_ends_with_ctrl_c(shared_run: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PROGRAM, "chat", str(shared_run), "--client", "apple-1", "--page"]
    with subprocess.Popen(
        [*command, "--port", str(port)], env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = ""
        while f"127.0.0.1:{port}" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert "Traceback" not in said + rest


@pytest.mark.skipif(find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio_the_way_to_it_is_named(shared_run: Path) -> None:
    ended = call_main("chat", str(shared_run), "--client", "apple-1", "--page")
    assert ended.code == 2 and "pip install 'fedmira[page]'" in ended.err


def test_a_port_without_a_page_is_refused(shared_run: Path) -> None:
    ended = call_main("chat", str(shared_run), "--client", "apple-1", "--port", "7000")
    assert ended.code == 2 and "--port belongs to --page" in ended.err
