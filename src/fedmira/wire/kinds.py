"""Kinds of messages: what the server asks of a node.

The part before the dot is one of Flower's message types.
"""

from __future__ import annotations

__all__ = ["CHOICE", "IDENTITY", "LOSSES", "REFUSAL", "SCORES", "TRAIN"]

IDENTITY = "query.identity"
"""Who are you, and what do you have?"""
REFUSAL = "query.refusal"
"""You may not take part, for this reason."""
TRAIN = "train"
"""Train from this payload."""
LOSSES = "evaluate.losses"
"""The loss of this adapter on your rows."""
CHOICE = "evaluate.choice"
"""Which of these adapters is the best on your validation rows?"""
SCORES = "evaluate.scores"
"""Generate on your test rows with this adapter, and score it."""
