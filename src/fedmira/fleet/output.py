"""What all results of a fleet have in common when they are written: names, copies and cards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedmira.errors import RunFolderError
from fedmira.model import LoraFolder

__all__ = ["card", "check_names", "copy_folder"]

_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


def check_names(names: Sequence[str], own: Sequence[str]) -> None:
    """No adapter may be called as something that the result has beside it.

    Args:
        names: of the adapters, which name folders.
        own: names of the result's own files and folders.

    Raises:
        RunFolderError: one is.
    """
    taken = [name for name in names if name.casefold() in own]
    if taken:
        raise RunFolderError(
            f"an adapter is called {', '.join(map(repr, taken))}, as is something of the result "
            f"({', '.join(own)}); give it another name: NAME=FOLDER"
        )


def copy_folder(member: LoraFolder, folder: Path) -> None:
    """An adapter as it is, byte for byte, with its card where it has one.

    Args:
        member: what is copied.
        folder: made anew.
    """
    folder.mkdir()
    for name in _FILES:
        if (member.path / name).is_file():
            shutil.copyfile(member.path / name, folder / name)


def card(member: LoraFolder, title: str, parts: Sequence[str], code: str = "") -> str:
    """The card of an adapter, as Markdown.

    Args:
        member: an adapter of the same base.
        title: the heading.
        parts: paragraphs.
        code: how it is loaded; plain PEFT's way by default.
    """
    hub = member.base.count("/") == 1 and not Path(member.base).exists()
    named = member.base if hub else Path(member.base).name  # a path tells of the machine
    usual = (
        'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), '
        '"THIS FOLDER")'
    )
    told = f" ({named})" if named else ""
    head = [f"base_model: {json.dumps(named)}"] if hub else []
    blocks = [
        "\n".join(["---", *head, "library_name: peft", "---"]),
        f"# {title}",
        *parts,
        f"It belongs to the base of the adapters that it was made of{told}"
        " and is worthless on another one. An adapter can give away some of the rows that it "
        "learned from, and so can one that is made of it.",
        "```python\nfrom peft import PeftModel\n"
        f"from transformers import AutoModelForCausalLM\n\n{code or usual}\n```",
    ]
    return "\n\n".join(blocks) + "\n"
