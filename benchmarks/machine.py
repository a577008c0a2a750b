"""What a result says about where it comes from: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

__all__ = ["provenance"]

PACKAGES = ("fedmira", "torch", "transformers", "peft", "accelerate", "trl", "flwr", "ray", "pfl")


def provenance() -> dict[str, object]:
    """Machine, versions of what is installed, commit of the working tree."""
    return {"machine": _machine(), "versions": _versions(), "commit": _commit()}


def _machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wide = [
        flag
        for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        if flag in facts.get("flags", "").split()
    ]
    return {
        "processor": facts.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "flags": wide,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit, with "+" behind it where the working tree holds changes to the package."""
    folder = Path(__file__).resolve().parent.parent
    ask = ["git", "-C", str(folder)]
    commit = subprocess.run(
        [*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        [*ask, "status", "--porcelain", "src"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return (commit or "unknown") + ("+" if changed else "")
