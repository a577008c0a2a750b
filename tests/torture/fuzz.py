"""Input of every kind, changed at random: settings, rows, base folders, messages."""

from __future__ import annotations

import io
import json
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fedmira.config import Config, ModelSettings, dump_config, load_config
from fedmira.data.problems import Problems
from fedmira.data.tables import ENDINGS, read_table
from fedmira.errors import DataError, FedmiraError, WireError
from fedmira.messages import Failure
from fedmira.model import load_base
from fedmira.wire import decode_answer, decode_request, encode_answer, encode_request, pack, unpack
from torture.faults import apart
from torture.trials import Tally, damaged
from wire.test_fuzzed import LINE, REPLY, REQUEST

__all__ = ["base_case", "config_case", "rows_case", "wire_case"]

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3.5, 1e308, 10**18, 10**30, 2**31, 65536, "", "x", "\x00", "auto"),
    *([], {}, [[]], [1, 2], {"a": 1}, "../../etc", "null", "nan", "-inf", "\ud800"),
)


def config_case(place: Path, draw: random.Random, tally: Tally) -> None:
    """A config file that was changed, or an override with an odd value."""
    document: dict[str, Any] = Config().model_dump(mode="json")
    text = dump_config(Config()).encode()
    path = place / "config.toml"
    path.write_bytes(damaged(text, draw) if draw.random() < 0.5 else text)
    section = draw.choice([each for each in document if isinstance(document[each], dict)])
    key = draw.choice(sorted(document[section]) or ["x"])
    override = f"{section}.{key}={draw.choice(ODD)!r}"
    _guarded(tally, lambda: load_config(path, overrides=[override]), override)


def rows_case(place: Path, draw: random.Random, tally: Tally) -> None:
    """A table of any ending whose content was changed."""
    content = damaged(draw.choice(_tables()), draw)
    path = place / f"rows{draw.choice(ENDINGS)}{draw.choice(('', '', '.gz'))}"
    path.write_bytes(content)

    def read() -> None:
        problems = Problems()
        list(read_table(path, problems, []))
        problems.raise_if_any()

    _guarded(tally, read, path.name, DataError)
    path.unlink()


def wire_case(place: Path, draw: random.Random, tally: Tally) -> None:
    """A request or a reply whose bytes or header were changed."""
    wire, of_request = draw.choice(("float32", "float16", "int8")), draw.random() < 0.5
    sent, after = encode_request(REQUEST, wire, LINE, "run")
    message = sent if of_request else encode_answer(REPLY, wire, after)[0]
    content = pack(message)
    if draw.random() < 0.5:
        content = damaged(content, draw)
    else:
        header: dict[str, Any] = dict(message.header)
        header[draw.choice([*header, "new", "metric:new", "scalar:new"])] = draw.choice(ODD)
        length = int.from_bytes(content[:8], "little")
        about = json.loads(content[8 : 8 + length])
        about["__metadata__"]["message"] = json.dumps(header)
        written = json.dumps(about).encode()
        content = len(written).to_bytes(8, "little") + written + content[8 + length :]

    def read() -> None:
        found = unpack(content)
        if of_request:
            decode_request(found, LINE)
        else:
            answer, _ = decode_answer(REQUEST, found, after)
            if isinstance(answer, Failure):
                answer.reason.encode()

    _guarded(tally, read, wire, WireError)


def base_case(base: Path, place: Path, draw: random.Random, tally: Tally) -> None:
    """A base folder in which one file was changed, loaded in a process of its own."""
    folder = place / "base"
    shutil.copytree(base, folder)
    path = draw.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.6:
        content = _odd_json(content, draw)
    else:
        content = damaged(content, draw)
    path.write_bytes(content)

    def work() -> tuple[int, str, int]:
        try:
            load_base(ModelSettings(base=str(folder), device="cpu")).tokenizer("w1 w2")
        except FedmiraError as error:
            return 2, str(error), 0
        return 0, "", 0

    ended = apart(work, seconds=120)
    if ended.signal or ended.code not in (0, 2):
        tally.note("crash, hang or traceback", f"{path.name}: {ended}")
    elif ended.code and str(folder) not in ended.err:
        tally.note("not named", f"{path.name}: {ended.err}")
    else:
        tally.note("named" if ended.code else "loads")
    shutil.rmtree(folder)


def _guarded(
    tally: Tally,
    work: Callable[[], object],
    about: str = "",
    kind: type[FedmiraError] = FedmiraError,
) -> None:
    try:
        work()
    except kind as error:
        str(error).encode()
        tally.note("refused in words")
    except Exception:  # noqa: BLE001 - these are what is looked for
        tally.note("traceback", f"{about}: {traceback.format_exc()}")
    else:
        tally.note("taken")


def _odd_json(content: bytes, draw: random.Random) -> bytes:
    document = json.loads(content)
    places = list(_places(document))
    if not places:
        return b"null"
    holder, key = draw.choice(places)
    if draw.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = draw.choice(ODD)
    return json.dumps(document).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(min(5, len(value)))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _tables() -> list[bytes]:
    line = b'{"instruction": "a", "output": "b"}\n'
    columns = {"instruction": ["do it"] * 9, "output": [f"w{each}" for each in range(9)]}
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return [
        out.getvalue(),
        line * 5,
        b"[" + line + b"]",
        b"instruction,output\na,b\n",
        b"instruction\toutput\n\xe4\tb\n",
        b"null",
        b"[" * 5000,
        b'{"a": ' * 3000,
        b"1" * 5000,
        b"\x1f\x8b\x08",
        b"\xff\xfei\x00",
    ]
