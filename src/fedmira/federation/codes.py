"""What a node tells the server of an error: a code and a count, and never its text.

The text may hold words of rows, of files and of folders. It stands in the node's own log.
"""

from __future__ import annotations

import re

from fedmira.errors import (
    ConfigError,
    DataError,
    FedmiraError,
    InputError,
    ModelError,
    RunError,
    RunFolderError,
    WireError,
)

__all__ = ["INTERNAL", "NodeError", "Refused", "code_text", "told_failure", "told_of"]

_CODES: tuple[tuple[type[FedmiraError], str], ...] = (
    (ConfigError, "config"),
    (DataError, "data"),
    (ModelError, "model"),
    (RunFolderError, "memory"),
    (WireError, "wire"),
)
_STAGES = frozenset({"request", "memory", "wire", "train", "reply"})
_SAFE_FAILURE = re.compile(
    r"(non-finite (gradient|loss) at|the adapter is not finite after) local step \d{1,9} "
    r"\(learning_rate [0-9.e+-]{1,20}\)"
    r"(; lower local\.learning_rate or set local\.max_grad_norm)?"
)
"""Failures of training that say which step it was, and nothing else that the server has not."""


class NodeError(RunError):
    """A node cannot answer.

    Args:
        text: what went wrong, for the node's own log.
        told: what the server may be told of it.
    """

    def __init__(self, text: str, told: str) -> None:
        self.told = told
        super().__init__(text)


class Refused(RunError):
    """The node's policy does not allow what the server asks for.

    Args:
        told: names keys of the run's settings and limits of the policy, and nothing of the node's
            own; the server is told.
    """

    def __init__(self, told: str) -> None:
        self.told = told
        super().__init__(told)


def code_text(code: str, problems: int = 1) -> str:
    """What travels in place of an error's text.

    Args:
        code: a word for the kind of the error.
        problems: how many there are.
    """
    count = "1 problem" if problems == 1 else f"{problems} problems"
    return f"code {code} ({count}); what it is stands in the node's own log"


INTERNAL = code_text("internal")
"""What is told of an error that nobody foresaw."""


def told_of(error: FedmiraError) -> str:
    """What the server may be told of an error.

    Args:
        error: of the node.
    """
    if isinstance(error, Refused | NodeError):
        return error.told
    code = next((code for kind, code in _CODES if isinstance(error, kind)), "run")
    return code_text(code, len(error.problems) if isinstance(error, InputError) else 1)


def told_failure(stage: str, reason: str) -> tuple[str, str]:
    """Stage and reason of a failed training as the server may be told them.

    Args:
        stage: where it went wrong.
        reason: what went wrong, in words.
    """
    known = stage if stage in _STAGES else "train"
    return known, reason if _SAFE_FAILURE.fullmatch(reason) else code_text(known)
