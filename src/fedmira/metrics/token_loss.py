"""A loss that carries its weight."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TokenLoss"]


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """A loss that adds up over rows, batches and clients without losing its weight.

    `TokenLoss()` is the zero of addition, so `sum(losses, TokenLoss())` works.

    >>> from fedmira.metrics import TokenLoss
    >>> (TokenLoss(6.0, tokens=2) + TokenLoss(3.0, tokens=1)).per_token
    3.0

    Attributes:
        total: cross-entropy in nats, summed over response tokens.
        tokens: how many response tokens that is.
    """

    total: float = 0.0
    tokens: int = 0

    def __add__(self, other: TokenLoss) -> TokenLoss:
        return TokenLoss(self.total + other.total, self.tokens + other.tokens)

    @property
    def per_token(self) -> float:
        """Nats per response token.

        Raises:
            ValueError: there are no tokens to divide by.
        """
        if self.tokens == 0:
            raise ValueError(
                "loss per token of 0 response tokens is undefined; evaluate at least one "
                "row with a response"
            )
        return self.total / self.tokens
