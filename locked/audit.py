"""Ask the package index whether a locked release has a known vulnerability.

    python locked/audit.py locked/fedmira.txt locked/flower.txt

Exit code 1 where one has. An index that keeps no advisories, or does not answer, is said and is no
failure: it tells nothing about the releases.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SECONDS = 120
COMMAND = (
    "pip_audit",
    "--disable-pip",
    "--no-deps",
    "--progress-spinner=off",
    "--timeout=10",
    "--format=json",
)


def audited(lock: Path) -> tuple[str, list[str]]:
    """A sentence on one lock, and what was found, a line each.

    Args:
        lock: releases with hashes.
    """
    command = [sys.executable, "-m", *COMMAND, "--requirement", str(lock)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        releases = json.loads(ended.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return f"{lock}: not audited, the index did not answer in {SECONDS} seconds", []
    except (ValueError, KeyError):
        reason = ended.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        return f"{lock}: not audited, pip-audit failed: {reason[0]}", []
    asked = [release for release in releases if "skip_reason" not in release]
    found = [
        f"{release['name']} {release['version']}: {each['id']}"
        + (f", mended in {', '.join(each['fix_versions'])}" if each["fix_versions"] else "")
        for release in asked
        for each in release["vulns"]
    ]
    if not asked:
        return (
            f"{lock}: not audited, the index has no advisories of its {len(releases)} releases",
            [],
        )
    return f"{lock}: {len(asked)} of {len(releases)} releases audited, {len(found)} findings", found


def main() -> int:
    """0, or 1 where a release has a known vulnerability."""
    code = 0
    for name in sys.argv[1:]:
        sentence, found = audited(Path(name))
        sys.stdout.write("\n".join([sentence, *(f"  {each}" for each in found)]) + "\n")
        code = 1 if found else code
    return code


if __name__ == "__main__":
    sys.exit(main())
