"""What identifies a base and its tokenizer.

Machines whose bases differ, or that cut the same text into other tokens, must not train together.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmira.adapters import content_hash
from fedmira.config import cache_folder
from fedmira.model.base.known import keep_known, read_known

__all__ = ["base_hash", "files_of", "tokenizer_hash"]

_LEAST_BYTES = 2**28
"""Smaller bases are hashed in less than a second, and then bytes are better than times."""
_AGAIN = "bases are hashed again"


def files_of(location: str, how: str) -> str:
    """What tells whether the files of a base are those that were hashed before; "" for no files.

    That is the names, sizes, places and times of its weights and settings: whoever writes a file
    changes the time at which it last changed, which nobody can set.

    Args:
        location: a folder, or a hub id, whose files are those in the hub's cache.
        how: what else the numbers in memory depend on.
    """
    config = Path(location, "config.json")
    if not config.is_file():
        found = try_to_load_from_cache(location, "config.json") if "/" in location else None
        if not isinstance(found, str):
            return ""
        config = Path(found)
    about = [str(config.parent.resolve()), how, torch.__version__, transformers.__version__]
    for file in sorted(config.parent.iterdir()):
        if file.suffix in (".safetensors", ".bin", ".json"):
            facts = file.stat()
            about.append(
                f"{file.name} {facts.st_size} {facts.st_ino} {facts.st_mtime_ns} "
                f"{facts.st_ctime_ns}"
            )
    return hashlib.sha256("\n".join(about).encode()).hexdigest()


def base_hash(model: PreTrainedModel, files: str, files_now: str) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and buffers, as they are in memory.

    Of large bases it is kept in the cache folder, by the files that the base was loaded from, and
    not made again while these are the same.

    Args:
        model: as it was loaded.
        files: what `files_of` said before it was loaded; "" hashes whatever is known.
        files_now: what it says now.
    """
    state = model.state_dict()
    folder = cache_folder()
    size = sum(tensor.nbytes for tensor in state.values())
    if folder is None or not files or files != files_now or size < _LEAST_BYTES:
        return content_hash(state)
    path = folder / "base_hash.json"
    known = read_known(path, str, _AGAIN)
    if files not in known:
        known = {**read_known(path, str, _AGAIN), files: content_hash(state)}
        keep_known(path, known, _AGAIN)
    return known[files]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over its vocabulary, rules, special tokens and chat template.

    Settings of single calls play no part.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    rules = {part: value for part, value in rules.items() if part not in ("truncation", "padding")}
    about = [
        rules,
        sorted(tokenizer.get_vocab().items()),
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.chat_template,
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
