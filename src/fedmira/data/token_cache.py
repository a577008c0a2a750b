"""Tokens of texts that were tokenised before, found by the content of tokenizer and texts."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedmira.config import cache_folder, distrusted
from fedmira.data.tokenizer import Tokenizer
from fedmira.records import SealedFiles

__all__ = ["TokenCache"]

_MOST_BYTES = 2**29
_LEAST_CHARACTERS = 2**14
"""Fewer are tokenised as fast as a file is found.

Thousands of small clients would leave thousands of files.
"""
_FORM = 2
_SUFFIX = ".tokens"
_LOST = "its rows are tokenised again"
_log = logging.getLogger("fedmira")


class TokenCache:
    """Keeps token ids of lists of texts in files.

    Each begins with the SHA-256 of its name and content: what does not fit is said, and made anew.
    The least recently written go when there are more than 512 MiB.

    Args:
        tokenizer: only tokenizers that can be written down as text are cached, since that text is
            part of the key.
        folder: by default `tokens` in the cache folder, or nowhere where there is none.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path | None = None) -> None:
        parent = cache_folder() if folder is None else folder.parent
        place = folder or (parent and parent / "tokens")
        if place is not None and place.is_dir() and (reason := distrusted(place)):
            _log.warning("%s: the token cache is not used: %s", place, reason)
            place = None
        self._files = None if place is None else SealedFiles(place, _SUFFIX, _MOST_BYTES, _LOST)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._fingerprint: str | None = None
        if backend is not None:
            outside = (
                _FORM,
                tokenizers.__version__,
                getattr(tokenizer, "split_special_tokens", False),
            )  # what to_str() leaves out
            self._fingerprint = hashlib.sha256(f"{outside} {backend.to_str()}".encode()).hexdigest()

    def ids(
        self, texts: Sequence[str], tokenise: Callable[[Sequence[str]], list[list[int]]]
    ) -> list[list[int]]:
        """The token ids of each text: from the cache, or from `tokenise` and into the cache.

        Args:
            texts: what to tokenise.
            tokenise: text to ids, called for texts that are not kept yet.
        """
        if (
            self._files is None
            or self._fingerprint is None
            or sum(map(len, texts)) < _LEAST_CHARACTERS
        ):
            return tokenise(texts)
        files, key = self._files, self._key(texts)
        if (content := files.read(key)) is not None:
            found = load(content)
            ends = np.cumsum(found["lengths"])[:-1]
            return [part.tolist() for part in np.split(found["ids"], ends)]
        rows = tokenise(texts)
        self._write(files, key, rows)
        return rows

    def _key(self, texts: Sequence[str]) -> str:
        hasher = hashlib.sha256(str(self._fingerprint).encode())
        for text in texts:
            encoded = text.encode("utf-8", "surrogatepass")
            hasher.update(len(encoded).to_bytes(8, "little"))
            hasher.update(encoded)
        return hasher.hexdigest()

    def _write(self, files: SealedFiles, key: str, rows: list[list[int]]) -> None:
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        ids = np.array([token for row in rows for token in row], dtype=np.int32)
        try:
            if not (files.folder.is_dir() and distrusted(files.folder)):
                files.write(key, save({"ids": ids, "lengths": lengths}))
        except (OSError, SafetensorError):
            pass  # a full or read-only disk: the run goes on without
