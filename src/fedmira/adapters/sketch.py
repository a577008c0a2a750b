"""Sketches: a few numbers an adapter that tell its inner products with any other adapter.

A sketch is a random linear map of what is compared, the update s B A (TensorSketch: Pagh 2013; Pham
and Pagh 2013) or the factors themselves (CountSketch: Charikar, Chen and Farach-Colton 2002). The
map is fixed by the names and shapes of the adapter, the number of entries and the seed, so the
sketch of one client never needs the adapter of another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmira.adapters.arithmetic import Adapter
from fedmira.adapters.low_rank import modules
from fedmira.seeds import text_seed

__all__ = ["factor_sketches", "product_sketches"]


def _buckets(purpose: str, length: int, entries: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random place and a random sign for every coordinate.

    Places are int64 [length] in 0..entries-1, signs float32 [length].
    """
    generator = torch.Generator().manual_seed(text_seed(seed, purpose))
    places = torch.randint(entries, (length,), generator=generator)
    return places, torch.randint(2, (length,), generator=generator).to(torch.float32) * 2 - 1


def _count_sketch(columns: Tensor, purpose: str, entries: int, seed: int) -> Tensor:
    """Each coordinate, with its sign, added into its place: float32 [length, n] -> [entries, n]."""
    places, signs = _buckets(purpose, len(columns), entries, seed)
    return torch.zeros(entries, columns.shape[1], dtype=torch.float32).index_add_(
        0, places, columns * signs[:, None]
    )


def product_sketches(
    adapters: Sequence[Adapter], scales: Sequence[float], entries: int, seed: int = 0
) -> Tensor:
    """TensorSketch of the updates s B A, computed from the factors; modules are summed.

    Entry (i, j) of a module's update goes, with the sign sigma_i tau_j, to place (h_i + g_j) mod m,
    where h, g, sigma, tau are drawn uniformly for each row i of B and column j of A. For one column
    of B and its row of A that is the circular convolution of their two count sketches, hence a
    product of Fourier transforms; ranks may differ.

    The inner product of two sketches is an unbiased estimate of <x, y>, x and y the updates over
    all modules. Its standard error is at most sqrt(8 / m) |x| |y| whatever the updates (reached by
    one module of rank one), and near sqrt((1 + c^2) / m) |x| |y|, c their cosine, where they spread
    over many modules and directions. A cosine between sketches is then off, to first order, by at
    most 1.14 sqrt(8 / m) and typically (1 - c^2) / sqrt(m) root mean square. The map is linear, so
    the same holds for differences and for updates from which a mean has been subtracted.

    Args:
        adapters: LoRA adapters with the same modules.
        scales: alpha / rank of each.
        entries: m.
        seed: of the map; only sketches of one seed and m can be compared.

    Returns:
        float32 [adapters, m].
    """
    if not adapters:
        return torch.zeros(0, entries, dtype=torch.float32)
    split = [modules(adapter) for adapter in adapters]
    spectrum = torch.zeros(entries // 2 + 1, len(adapters), dtype=torch.complex64)
    for name in sorted(split[0]):
        down = torch.cat([parts[name][0] for parts in split]).T
        up = torch.cat(
            [parts[name][1] * scale for parts, scale in zip(split, scales, strict=True)], dim=1
        )
        owners = torch.repeat_interleave(
            torch.arange(len(split)), torch.tensor([parts[name][0].shape[0] for parts in split])
        )
        left, right = (
            torch.fft.rfft(
                _count_sketch(part.to(torch.float32), f"{side} of {name}", entries, seed), dim=0
            )
            for side, part in (("columns", down), ("rows", up))
        )
        spectrum.index_add_(1, owners, left * right)
    sketches: Tensor = torch.fft.irfft(spectrum, n=entries, dim=0)
    return sketches.T.contiguous()


def factor_sketches(adapters: Sequence[Adapter], entries: int, seed: int = 0) -> Tensor:
    """CountSketch of all factor entries: every entry goes, with a random sign, to one random place.

    The inner product of two sketches is an unbiased estimate of that of the factors, with a
    standard error of at most sqrt((|x|^2 |y|^2 + <x, y>^2) / m), which is at most sqrt(2 / m) |x|
    |y|.

    Args:
        adapters: of the same names and shapes.
        entries: m.
        seed: of the map.

    Returns:
        float32 [adapters, m].
    """
    total = torch.zeros(entries, len(adapters), dtype=torch.float32)
    for name in sorted(adapters[0]) if adapters else ():
        columns = torch.stack([adapter[name].flatten() for adapter in adapters], dim=1)
        total += _count_sketch(columns.to(torch.float32), f"factor {name}", entries, seed)
    return total.T.contiguous()
