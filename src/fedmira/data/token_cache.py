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

from fedmira.atomic import replace_file
from fedmira.config import cache_folder, distrusted
from fedmira.data.tokenizer import Tokenizer

__all__ = ["TokenCache"]

_MOST_BYTES = 2**29
_LEAST_CHARACTERS = 2**14
"""Fewer are tokenised as fast as a file is found.

Thousands of small clients would leave thousands of files.
"""
_FORM = 2
_SUFFIX = ".tokens"
_SEAL_BYTES = hashlib.sha256().digest_size
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
        self._folder = folder or (parent and parent / "tokens")
        if (
            self._folder is not None
            and self._folder.is_dir()
            and (reason := distrusted(self._folder))
        ):
            _log.warning("%s: the token cache is not used: %s", self._folder, reason)
            self._folder = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._fingerprint: str | None = None
        if backend is not None:
            outside = (
                _FORM,
                tokenizers.__version__,
                getattr(tokenizer, "split_special_tokens", False),
            )  # what to_str() leaves out
            self._fingerprint = hashlib.sha256(f"{outside} {backend.to_str()}".encode()).hexdigest()
        self._has_room = False

    def ids(
        self, texts: Sequence[str], tokenise: Callable[[Sequence[str]], list[list[int]]]
    ) -> list[list[int]]:
        """The token ids of each text: from the cache, or from `tokenise` and into the cache.

        Args:
            texts: what to tokenise.
            tokenise: text to ids, called for texts that are not kept yet.
        """
        if (
            self._folder is None
            or self._fingerprint is None
            or sum(map(len, texts)) < _LEAST_CHARACTERS
        ):
            return tokenise(texts)
        path = self._folder / f"{self._key(texts)}{_SUFFIX}"
        found = self._kept(path)
        if found is not None:
            return found
        rows = tokenise(texts)
        self._write(path, rows)
        return rows

    def _kept(self, path: Path) -> list[list[int]] | None:
        """What a file holds; None where it is not there, or holds something else than it did."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if content[:_SEAL_BYTES] != _seal(path, content[_SEAL_BYTES:]):
            _log.warning(
                "%s: the file of the token cache is damaged, or an older version wrote it; its "
                "rows are tokenised again",
                path,
            )
            return None
        found = load(content[_SEAL_BYTES:])
        return [part.tolist() for part in np.split(found["ids"], np.cumsum(found["lengths"])[:-1])]

    def _key(self, texts: Sequence[str]) -> str:
        hasher = hashlib.sha256(str(self._fingerprint).encode())
        for text in texts:
            encoded = text.encode("utf-8", "surrogatepass")
            hasher.update(len(encoded).to_bytes(8, "little"))
            hasher.update(encoded)
        return hasher.hexdigest()

    def _write(self, path: Path, rows: list[list[int]]) -> None:
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        ids = np.array([token for row in rows for token in row], dtype=np.int32)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            if distrusted(path.parent):
                return
            content = save({"ids": ids, "lengths": lengths})
            replace_file(
                path, _seal(path, content) + content, lasting=False, shared=True, mode=0o600
            )
            if (
                not self._has_room
            ):  # once in a run: listing the folder takes long when it holds much
                self._has_room = True
                self._make_room(path.parent)
        except (OSError, SafetensorError):
            pass  # a full or read-only disk: the run goes on without

    def _make_room(self, folder: Path) -> None:
        files = sorted(
            (file.stat().st_mtime, file.stat().st_size, file)
            for file in folder.iterdir()  # those of older versions, too
        )
        total = sum(size for _, size, _ in files)
        for _, size, file in files:
            if total <= _MOST_BYTES:
                return
            file.unlink(missing_ok=True)
            total -= size


def _seal(path: Path, content: bytes) -> bytes:
    """SHA-256 over what a file is called and what it holds: another file's content does not pass.

    Args:
        path: of the file.
        content: what stands behind the seal.
    """
    return hashlib.sha256(path.name.encode() + content).digest()
