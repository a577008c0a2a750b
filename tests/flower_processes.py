"""Flower's own programs as processes on this machine: one SuperLink, SuperNodes, and runs.

With TLS and authenticated nodes on request.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = ["Federation", "free_port", "wait_until"]

_PROGRAMS = Path(sys.executable).parent


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(done: Callable[[], bool], what: str, timeout_s: float = 240.0) -> None:
    """Look again and again until it is done."""
    end = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < end, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.2)


class Federation:
    """Processes of one SuperLink and its nodes.

    Each is the leader of a process group, which is ended by its id.

    Args:
        folder: for logs, keys and Flower's own files.
        secure: TLS and authenticated nodes.
        address: of this machine, at which the SuperLink listens and which its certificate names.
        variables: added to the processes' environment.
    """

    def __init__(
        self,
        folder: Path,
        *,
        secure: bool,
        address: str = "127.0.0.1",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.secure = secure
        self.address = address
        self.port = free_port()
        self._variables = dict(variables or {})
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "home").mkdir(parents=True)
        trust = f'root-certificates = "{folder / "ca.pem"}"' if secure else "insecure = true"
        text = '[superlink]\ndefault = "trial"\n\n[superlink.trial]\n'
        text += f'address = "{address}:{self.port}"\n{trust}\n'
        (folder / "home" / "config.toml").write_text(text, encoding="utf-8")
        if secure:
            _write_certificates(folder, address)

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            # Flower's programs start each other by name
            "PATH": f"{_PROGRAMS}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
            **self._variables,
        }

    def log(self, name: str) -> str:
        """What a process has written."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def start(self, name: str, *command: str | Path) -> subprocess.Popen[bytes]:
        """A process of this name, whose output is added to its log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [_PROGRAMS / str(command[0]), *map(str, command[1:])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
                cwd=self.folder,
                start_new_session=True,
            )
        self._processes[name] = process
        return process

    def call(self, *command: str | Path) -> str:
        """A command that ends by itself; its output."""
        ended = subprocess.run(
            [_PROGRAMS / str(command[0]), *map(str, command[1:])],
            capture_output=True,
            text=True,
            env=self.environment(),
            cwd=self.folder,
            timeout=300,
            check=False,
        )
        assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def start_superlink(self, *more: str) -> None:
        """The SuperLink, with its memory in a file.

        So it knows its nodes again after it was killed.
        """
        keys = [
            "--ssl-ca-certfile",
            "ca.pem",
            "--ssl-certfile",
            "server.pem",
            "--ssl-keyfile",
            "server.key",
            "--enable-supernode-auth",
        ]
        self.start(
            "superlink",
            "flower-superlink",
            *(keys if self.secure else ["--insecure"]),
            *("--host", self.address, "--port", str(self.port)),
            *("--database", "superlink.db", "--disable-runtime-dependency-installation"),
            *more,
        )
        wait_until(self._listens, "the SuperLink's port")

    def register(self, name: str) -> None:
        """Make a key for a node and register it under its name."""
        key = ec.generate_private_key(ec.SECP384R1())
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        (self.folder / f"{name}.key").write_bytes(private)
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        (self.folder / f"{name}.pub").write_bytes(public)
        self.call("flwr", "supernode", "register", f"{name}.pub", "--name", name)

    def start_node(
        self, name: str, config: Mapping[str, str], *more: str, namespace: str = ""
    ) -> None:
        """A SuperNode with this node config, in a network namespace where one is named."""
        inside = [shutil.which("ip") or "ip", "netns", "exec", namespace] if namespace else []
        pairs = " ".join(f'{key}="{value}"' for key, value in config.items())
        keys = ["--root-certificates", "ca.pem", "--auth-supernode-private-key", f"{name}.key"]
        self.start(
            name,
            *inside,
            "flower-supernode",
            *(more or (keys if self.secure else ["--insecure"])),
            *(
                "--superlink",
                f"{self.address}:{self.port}",
                "--port",
                str(free_port()),
                "--node-config",
                pairs,
            ),
        )

    def start_run(self, app: Path, name: str = "run", *more: str) -> subprocess.Popen[bytes]:
        """`flwr run`, which shows what the server writes until the run has ended."""
        return self.start(name, "flwr", "run", app, "--stream", *more)

    def kill(self, name: str) -> None:
        """End a process, and those that it started, at once."""
        process = self._processes.pop(name)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(30)

    @contextmanager
    def paused(self, *words: str) -> Iterator[None]:
        """Processes of this federation do nothing for a while.

        Those whose command has all these words, one at least.
        """
        numbers = [
            number for number in self.running() if all(word in _command(number) for word in words)
        ]
        assert numbers, f"no process of {words}"
        for number in numbers:
            os.kill(number, signal.SIGSTOP)
        try:
            yield
        finally:
            for number in numbers:
                os.kill(number, signal.SIGCONT)

    def close(self) -> None:
        """End whatever still runs, with those that were started in groups of their own."""
        for name in list(self._processes):
            self.kill(name)
        for number in self.running():
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def running(self) -> list[int]:
        """Ids of all processes that came from this federation, whoever started them.

        Those in whose environment is its folder.
        """
        mark, found = f"FLWR_HOME={self.folder / 'home'}".encode(), []
        for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
            if entry.name.isdigit():
                try:
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
                except OSError:
                    continue  # it has ended, or is another user's
        return found

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.address, self.port)) == 0


def _command(number: int) -> str:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""  # it has ended


def _write_certificates(folder: Path, address: str) -> None:
    """ca.pem, server.pem and server.key for this address of this machine, valid for a day."""
    authority_key, server_key = (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP256R1()),
    )
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "trial authority")])
    server = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    addresses = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(address))]
    )
    root = _certificate(
        authority,
        authority,
        authority_key.public_key(),
        authority_key,
        x509.BasicConstraints(True, None),
    )
    leaf = _certificate(server, authority, server_key.public_key(), authority_key, addresses)
    (folder / "ca.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    private = server_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "server.key").write_bytes(private)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    more: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
    )
    builder = builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(
        now + datetime.timedelta(days=1)
    )
    return builder.add_extension(more, critical=isinstance(more, x509.BasicConstraints)).sign(
        signer, hashes.SHA256()
    )
