"""The gradient of a quadratic pull towards a fixed point, as a hook of local training."""

from __future__ import annotations

from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.methods.base import GradientHook

__all__ = ["toward"]


def toward(centre: Adapter, strength: float) -> GradientHook | None:
    """A hook that adds the gradient of strength / 2 |w - centre|^2.

    None at strength 0, so that nothing at all changes.

    The sum is what is clipped and what the optimizer sees; an optimizer with moments scales it like
    any gradient.

    Args:
        centre: the point w is pulled to.
        strength: 0 or more.
    """
    if strength == 0:
        return None

    there: dict[
        str, Tensor
    ] = {}  # the centre where the gradient is; each copy to a device is waited for

    def pull(gradient: Adapter, parameters: Adapter) -> Adapter:
        for name in gradient.keys() - there.keys():
            there[name] = centre[name].to(gradient[name].device)
        return {
            name: part + strength * (parameters[name] - there[name])
            for name, part in gradient.items()
        }

    return pull
