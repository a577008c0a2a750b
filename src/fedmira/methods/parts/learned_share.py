"""A share that is learned in local training: g in front of a trained part, 1 - g of a frozen one.

A constant in front of a LoRA product folds into its B, so both parts stay one plain adapter with
the factors B = g B_own and C = (1 - g) B_rest. Of the gradient in these factors follows that of g,

    d/dg   =  sum over modules of  <dB, B> / g  -  <dC, C> / (1 - g)
    z      <-  an Adam step along  g (1 - g) d/dg,         g = 1 / (1 + exp(-z))

after which B is multiplied by g_new / g and C by (1 - g_new) / (1 - g).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmira.adapters import Adapter
from fedmira.adapters.low_rank import UP
from fedmira.methods.base import Start
from fedmira.methods.parts.adam_step import AdamStep
from fedmira.methods.parts.rank_split import RankSplit

__all__ = ["LearnedShare", "MOST", "after_training"]

MOST = 0.999
"""The largest share of either part, so that none is lost for good."""


class LearnedShare:
    """The share of one client in one round of local training.

    It belongs to the start of that round and to nothing else; methods stay pure. Its numbers are
    tensors where the gradient is, so that no step waits for the device.

    Args:
        split: where the trained part ends.
        adapter: both parts with their shares in them, as training begins.
        share: g, that of the trained part.
        rate: the length of a step of z.
    """

    def __init__(self, split: RankSplit, adapter: Adapter, share: float, rate: float) -> None:
        self._split, self._adapter = split, adapter
        self._first_share = share
        self._share = self._held = torch.tensor(share)
        self._place = torch.logit(self._share)
        self._adam = AdamStep(torch.zeros(()), rate)
        self._rest: Adapter | None = None

    def start(self) -> Start:
        """Local training with this share; without a frozen part that says anything, one as it is.

        A share beside nothing would only scale what is trained anyway.
        """
        if not any(map(torch.any, _ups(self._split.frozen(self._adapter)).values())):
            return Start(self._adapter, self._split.still)
        return Start(self._adapter, self._hook, settle=self._settle)

    def _hook(self, gradient: Adapter, parameters: Adapter) -> Adapter:
        """Steps the share; the frozen part itself gets zeros."""
        self._step(self._slope(gradient, parameters))
        return self._split.still(gradient, parameters)

    def _settle(self, parameters: Adapter) -> Adapter:
        """Both parts with the share that the hook has left."""
        assert self._rest is not None, "an optimizer step came before its gradient"
        own = _ups(self._split.trained(parameters))
        scaled = {name: part * (self._share / self._held) for name, part in own.items()}
        rest = (1 - self._share) / (1 - self._first_share)
        frozen = {
            name: part * rest if name.endswith(UP) else part for name, part in self._rest.items()
        }
        self._held = self._share
        return self._split.joined({**self._split.trained(parameters), **scaled}, frozen)

    def _slope(self, gradient: Adapter, parameters: Adapter) -> Tensor:
        """g (1 - g) times the derivative of the loss by g."""
        device = next(iter(gradient.values())).device
        if self._rest is None:
            self._begin(device)
        share = self._held
        own, rest = torch.zeros_like(share), torch.zeros_like(share)
        for part, total in ((self._split.trained, own), (self._split.frozen, rest)):
            present = _ups(part(parameters))
            for name, slope in _ups(part(gradient)).items():
                total += (slope * present[name]).sum()
        return (1 - share) * own - share * rest

    def _begin(self, device: torch.device) -> None:
        """What follows the share from here on, where the gradient is."""
        self._share = self._held = self._share.to(device)
        self._place = self._place.to(device)
        self._adam.to(device)
        frozen = self._split.frozen(self._adapter)
        self._rest = {name: part.to(device) for name, part in frozen.items()}

    def _step(self, slope: Tensor) -> None:
        """An Adam step of z."""
        limit = math.log(MOST / (1 - MOST))
        self._place = (self._place - self._adam.along(slope)).clamp(-limit, limit)
        self._share = torch.sigmoid(self._place)


def after_training(split: RankSplit, before: Adapter, after: Adapter, share: float) -> float:
    """The share that local training ended with, read off the frozen part.

    Args:
        split: where the trained part ends.
        before: both parts with their shares in them, as training began.
        after: the same as it ended.
        share: of the trained part as training began.
    """
    begun, ended = (_ups(split.frozen(adapter)) for adapter in (before, after))
    square = sum(float(part.double().square().sum()) for part in begun.values())
    if square == 0:
        return share
    across = sum(
        float((part.double() * ended[name].double()).sum()) for name, part in begun.items()
    )
    return min(max(1 - (1 - share) * across / square, 1 - MOST), MOST)


def _ups(adapter: Adapter) -> Adapter:
    """The factors B."""
    return {name: tensor for name, tensor in adapter.items() if name.endswith(UP)}
