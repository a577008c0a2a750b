"""Every error that fedmira raises on purpose.

    FedmiraError                 exit code 3
    ├── InputError               exit code 2: what the user gave us is wrong; nothing was trained
    │   ├── ConfigError          a setting, an override or a preset
    │   ├── DataError            rows, files, splits
    │   ├── ModelError           the base model, its tokenizer, adapter targets
    │   └── RunFolderError       an existing run folder: in the way, missing, or damaged
    └── RunError                 exit code 3: the run itself failed; what was computed is on disk
        ├── RoundError           a round in which no client sent a usable reply
        ├── AlignmentError       alignment is on but moves nothing
        ├── MachineError         the system refused to read or write: a full disk, no permission
        └── WireError            a message between server and client that cannot be read

Messages name the thing, the value, the limit and the next step. `InputError.problems` holds all
problems that were found together, one string each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "AlignmentError",
    "ConfigError",
    "DataError",
    "FedmiraError",
    "InputError",
    "MachineError",
    "ModelError",
    "RoundError",
    "RunError",
    "RunFolderError",
    "WireError",
]


class FedmiraError(Exception):
    """The root: catch this to catch everything fedmira raises on purpose."""

    exit_code: ClassVar[int] = 3


class InputError(FedmiraError):
    """Something the user gave is wrong.

    Args:
        problems: one message, or all messages of one source together.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__("\n".join(self.problems))


class ConfigError(InputError):
    """A setting, an override or a preset is wrong."""


class DataError(InputError):
    """Rows, files or splits are wrong."""


class ModelError(InputError):
    """The base model, its tokenizer or an adapter target is wrong."""


class RunFolderError(InputError):
    """A run folder is in the way, missing, or damaged."""


class RunError(FedmiraError):
    """The run failed after it began; what was computed is in the run folder."""


class RoundError(RunError):
    """No client sent a usable reply in a round."""


class AlignmentError(RunError):
    """Alignment is switched on but moves no adapter."""


class MachineError(RunError):
    """The system refused an operation on a file: a full disk, no permission, a lost folder."""


class WireError(RunError):
    """A message between server and client cannot be read.

    Engines turn it into a `Failure` of that client.
    """
