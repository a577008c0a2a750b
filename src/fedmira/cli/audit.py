"""fedmira audit: check a record of messages, and what left by it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmira.cli.screen import print_json, print_table, say

__all__ = ["audit"]


def audit(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="The record: NAME-audit.jsonl in a node's memory folder, or RUN-audit.jsonl "
            "beside a server's run folder.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check that no line of a record of messages was changed, and say what travelled.

    A broken line ends it with exit code 2; the message names the line.

    Example: fedmira audit /var/lib/fedmira/clinic-north-audit.jsonl
    """
    from fedmira.federation.audit import verify_audit

    found = verify_audit(path)
    rows = [
        [way, kind, count, found.size[way, kind]]
        for (way, kind), count in sorted(found.messages.items())
    ]
    if as_json:
        print_json(
            {
                "lines": found.lines,
                "messages": [
                    dict(zip(("way", "kind", "messages", "bytes"), row, strict=True))
                    for row in rows
                ],
                "left": dict(sorted(found.left.items())),
                "errors": found.errors,
                "peers": sorted(found.peers),
                "last_sha256": found.last,
            }
        )
        return
    print_table("Messages", ("way", "kind", "messages", "bytes"), rows)
    print_table(
        "What left, by name of field or part", ("name", "messages"), sorted(found.left.items())
    )
    say(f"{found.lines} lines, {found.errors} of them errors; the chain holds")
    say(f"SHA-256 of the last line: {found.last}; who keeps it elsewhere sees if lines are cut off")
