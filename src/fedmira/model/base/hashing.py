"""What identifies a tokenizer.

Machines that cut the same text into other tokens must not train together.
"""

from __future__ import annotations

import hashlib
import json

from transformers import PreTrainedTokenizerBase

__all__ = ["tokenizer_hash"]


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
