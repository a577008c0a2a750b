"""Worker processes that do shares of clients' work, each with the base in shared memory.

Workers keep nothing between shares: adapters, rows, requests and private memories go out with a
share, replies and memories come back. So a share can be sent again to another worker after one
died, with the same bits.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import pickle  # noqa: TID251 - between this process and those that it started; nothing is stored
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedmira.clients.crews import Done, InTurn, Share
from fedmira.errors import FedmiraError, RunError
from fedmira.methods import Method
from fedmira.model import AdapterKind

__all__ = ["Workers", "unsafe_main"]

Result = TypeVar("Result")

_log = logging.getLogger("fedmira")
_KIND = "kind"
_AHEAD = 2
"""Shares that wait at each worker, so that none is idle while the next one is made."""

_SAFE_MAINS = ("fedmira", "pytest", "ipykernel_launcher")
"""Main files that may be read again: they start nothing while they are read."""

_kind: AdapterKind | None = None
"""In a worker: the adapters on their base, as they were given to it when it began."""


class Workers:
    """Does shares in processes of their own, the longest first.

    The processes begin with the first call that has more than one share, and end with `release`,
    with this object, or with the process that started them.

    Args:
        count: of processes, at least 2.
        threads: of each.
    """

    def __init__(self, count: int, threads: int = 1) -> None:
        self.count, self.threads = count, threads
        self._pool: ProcessPoolExecutor | None = None
        self._of: AdapterKind | None = None
        self._end: weakref.finalize[Any, Any] | None = None

    def do(
        self, kind: AdapterKind, shares: Sequence[Share[Result]], done: Done = lambda place: None
    ) -> Iterator[Result]:
        """The result of each share, in their order; a single one is done here.

        Raises:
            RunError: workers died twice over the same shares.
        """
        if len(shares) < 2:  # noqa: PLR2004 - nobody could work beside it
            yield from InTurn(self.threads).do(kind, shares, done)
            return
        results: dict[int, Result] = {}
        for attempt in (1, 2):
            missing = [place for place in range(len(shares)) if place not in results]
            try:
                self._do(kind, shares, missing, results, done)
                break
            except BrokenProcessPool as error:
                self.release()
                left = [place for place in missing if place not in results]
                names = ", ".join(name for place in left[:2] for name in shares[place].clients)
                if attempt == 2:  # noqa: PLR2004
                    raise RunError(
                        f"worker processes died twice over the clients {names}: perhaps memory ran "
                        "out (the system's log says so); lower engine.workers, or set it to 1"
                    ) from error
                _log.warning(
                    "a worker process died; %d shares are sent again, those of %s first",
                    len(left),
                    names,
                )
        yield from (results[place] for place in range(len(shares)))

    @staticmethod
    def problem(kind: AdapterKind, method: Method) -> str | None:
        """Why a base or a method cannot be sent to workers, or None.

        Args:
            kind: the adapters, on their base, whose weights go into shared memory here.
            method: whose client half they would run.
        """
        if (too_large := _shared_memory_problem(kind)) is not None:
            return too_large
        for what, value in (("the base", kind), (f"the method {method.name!r}", method)):
            try:
                ForkingPickler.dumps(value)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                return f"{what} cannot be sent to another process ({error}); set it to 1"
        return None

    def release(self) -> None:
        """Ends the processes once they have done what they are at."""
        if self._end is not None:
            self._end()
        self._pool = self._of = self._end = None

    def _do(
        self,
        kind: AdapterKind,
        shares: Sequence[Share[Result]],
        places: Sequence[int],
        results: dict[int, Result],
        told: Done,
    ) -> None:
        """Does the shares at these places; what is done is in `results` whatever happens."""
        pool = self._pool_for(kind)
        waiting = sorted(places, key=lambda place: (-shares[place].cost, place))[::-1]
        running: dict[Future[bytes], int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.count * _AHEAD:
                    place = waiting.pop()
                    job = _packed(shares[place].work(), kind)
                    running[pool.submit(_work, job)] = place
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    place = running.pop(future)
                    results[place] = _received(future.result())
                    told(place)
        except BaseException:
            for future in running:
                future.cancel()
            raise

    def _pool_for(self, kind: AdapterKind) -> ProcessPoolExecutor:
        if self._pool is not None and self._of is not kind:
            self.release()
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.count,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(kind, self.threads, logging.getLogger("fedmira").getEffectiveLevel()),
            )
            self._of = kind
            self._end = weakref.finalize(
                self, partial(self._pool.shutdown, wait=False, cancel_futures=True)
            )
        return self._pool


def unsafe_main(*, unasked: bool = False) -> str | None:
    """Why no process can be started from the program at hand, or None.

    A new process reads the program's main file again. One that starts a run on its first level
    would start it again there.

    Args:
        unasked: whether nobody asked for processes: then the main file must be fedmira's own, or
            there must be none, as in a notebook.
    """
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        return (
            "worker processes read the program's main file, and this one starts a run while it is "
            'read; put what it does under `if __name__ == "__main__":`, or set engine.workers to 1'
        )
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    if path is not None and not Path(path).exists():
        return f"the program's main file {path!r} cannot be read again; set engine.workers to 1"
    if unasked and path is not None and Path(path).stem not in _SAFE_MAINS:
        return "a Python program must ask for worker processes: set engine.workers"
    return None


def _shared_memory_problem(kind: AdapterKind) -> str | None:
    """Why the base does not fit the system's shared memory, or None."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return None
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*kind.base.model.parameters(), *kind.base.model.buffers())
        if not tensor.is_shared()  # type: ignore[no-untyped-call]
    }
    found = os.statvfs(place)
    needed, free = sum(sizes.values()), found.f_bavail * found.f_frsize
    if needed <= free:
        return None
    return (
        f"the base takes {needed / 2**20:.0f} MiB of shared memory, and {place} has "
        f"{free / 2**20:.0f} MiB free; make it larger (a container's --shm-size), or set it to 1"
    )


def _begin(kind: AdapterKind, threads: int, level: int) -> None:
    """A worker's first call."""
    global _kind  # noqa: PLW0603 - what a worker is given once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever is interrupted ends the workers
    torch.set_num_threads(threads)
    logging.getLogger("fedmira").setLevel(level)
    _kind = kind
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker where the process that started it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: bytes) -> bytes:
    """One share in a worker: what came of it or its error, and the lines of its log."""
    assert _kind is not None, "a worker begins with its base"
    heard = _Heard()
    logger = logging.getLogger("fedmira")
    logger.addHandler(heard)
    logger.propagate = False
    try:
        done: Any = _Unpickler(io.BytesIO(job), _kind).load()(_kind)
    except FedmiraError as error:
        done = _Raised(error)
    finally:
        logger.removeHandler(heard)
    return _packed((done, heard.lines), _kind)


def _received(answer: bytes) -> Any:
    done, lines = pickle.loads(answer)
    for line in lines:
        logging.getLogger(line.name).handle(line)
    if isinstance(done, _Raised):
        raise done.error
    return done


class _Raised:
    """An error of fedmira's that a share ended with."""

    def __init__(self, error: FedmiraError) -> None:
        self.error = error


class _Heard(logging.Handler):
    """Keeps the lines of a log, so that they reach the log of whoever asked."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """With its text made, as arguments may not travel."""
        record.msg, record.args = record.getMessage(), None
        record.exc_info = None
        self.lines.append(record)


class _Pickler(pickle.Pickler):
    """Tensors by their bytes, and the kind by its name, as every worker has it."""

    def __init__(self, file: io.BytesIO, kind: AdapterKind) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._kind = kind

    def persistent_id(self, value: Any) -> str | None:
        """The name of what is not sent."""
        return _KIND if value is self._kind else None

    def reducer_override(self, value: Any) -> Any:
        """How a plain tensor is sent; all else as usual."""
        if type(value) is not Tensor:
            return NotImplemented
        plain = value.detach().cpu().contiguous()
        return _tensor, (bytes(plain.view(-1).view(torch.uint8).numpy()), plain.dtype, plain.shape)


class _Unpickler(pickle.Unpickler):
    """Reads what `_Pickler` wrote."""

    def __init__(self, file: io.BytesIO, kind: AdapterKind) -> None:
        super().__init__(file)
        self._kind = kind

    def persistent_load(self, name: str) -> AdapterKind:
        """The kind that this worker was given when it began, whatever it is called."""
        return self._kind


def _tensor(content: bytes, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)


def _packed(value: Any, kind: AdapterKind) -> bytes:
    file = io.BytesIO()
    _Pickler(file, kind).dump(value)
    return file.getvalue()
