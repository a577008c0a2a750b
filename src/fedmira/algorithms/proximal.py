"""The gradient of a quadratic pull towards a fixed point, as a hook of local training."""

from __future__ import annotations

from fedmira.adapters import Adapter
from fedmira.algorithms.base import GradientHook

__all__ = ["toward"]


def toward(centre: Adapter, strength: float) -> GradientHook | None:
    """A hook that adds the gradient of strength / 2 |w - centre|^2; None at strength 0, so that nothing at all changes.

    The sum is what is clipped and what the optimizer sees; an optimizer with moments scales it like any gradient.
    """
    if strength == 0:
        return None

    def pull(gradient: Adapter, parameters: Adapter) -> Adapter:
        return {name: part + strength * (parameters[name] - centre[name].to(part.device)) for name, part in gradient.items()}

    return pull
