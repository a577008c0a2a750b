"""A base with a thinned middle, on which adapters of its outer layers are trained.

Offsite-Tuning (Xiao, Lin and Han 2023, arXiv 2302.04870), as FederatedScope-LLM has it: of n layers
the first and the last few stay, and of the n_m between them m = round(n_m (1 - drop)) at the steps
(n_m - 1) / (m - 1). Its owner keeps the base; clients get the emulator, and their adapters are put
back on the base. The distillation of the middle is not here: layers are left out as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedmira.adapters import Adapter
from fedmira.errors import ModelError, RunError
from fedmira.model.base.layers import decoder_layers
from fedmira.model.base.loading import read_again, read_folder
from fedmira.model.base.targets import find_targets
from fedmira.model.base.types import BaseModel

__all__ = [
    "EMULATOR",
    "Emulator",
    "in_the_middle",
    "kept_layers",
    "outer_targets",
    "plugged",
    "read_emulator",
    "write_emulator",
]

EMULATOR = "emulator.json"
"""The file of an emulator's folder that says which layers it has."""

_PROBE_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Emulator:
    """Which layers of which base an emulator has.

    Attributes:
        base: what its owner called the base.
        base_sha256: of the base's weights.
        path: of the list of layers in the model, such as "model.layers".
        layers: for each layer of the emulator the number of that of the base, from 0.
        left, right: how many layers at either end stay as they are; adapters belong there.
        drop: share of the middle that was to be left out.
        count: layers of the base.
    """

    base: str
    base_sha256: str
    path: str
    layers: tuple[int, ...]
    left: int
    right: int
    drop: float
    count: int

    @property
    def outer(self) -> tuple[int, ...]:
        """The emulator's own numbers of the layers at both ends."""
        last = len(self.layers)
        return (*range(self.left), *range(last - self.right, last))


def kept_layers(count: int, left: int, right: int, drop: float) -> list[int]:
    """The numbers of the layers that an emulator keeps, from 0, in order.

    Args:
        count: layers of the base.
        left, right: how many stay at either end, 1 or more.
        drop: share of those between them that is left out, from 0 up to 1.

    Raises:
        ModelError: fewer than two layers of the middle would stay, or a number cannot be used.
    """
    problems = [
        f"{name} is {value}; must be 1 or more: adapters are trained in these layers"
        for name, value in (("left", left), ("right", right))
        if value < 1
    ]
    if not 0 <= drop < 1:
        problems.append(f"drop is {drop:g}; must be a share of the middle, 0 or more and below 1")
    if problems:
        raise ModelError(problems)
    middle = count - left - right
    kept = round(middle * (1 - drop)) if middle > 0 else 0
    if kept < 2:
        raise ModelError(
            f"left = {left}, right = {right}, drop = {drop:g}: of the {max(middle, 0)} layers "
            f"between the ends of a base of {count}, {kept} would stay, and at least 2 must; lower "
            "left, right or drop"
        )
    # In whole numbers, so that the last of them is the middle's last layer whatever the stride.
    between = [left + place * (middle - 1) // (kept - 1) for place in range(kept)]
    return [*range(left), *between, *range(count - right, count)]


def write_emulator(base: BaseModel, left: int, right: int, drop: float, folder: Path) -> Emulator:
    """Write a Hugging Face folder with fewer layers, its tokenizer, and which layers they are.

    What was written is read back and held against the base with the other layers taken out.

    Args:
        base: a base from a folder or hub, not quantised; it stays as it is.
        left: how many of its first layers stay as they are.
        right: how many of its last layers do.
        drop: share of the layers between them that is left out.
        folder: there already, and empty.

    Raises:
        ModelError: the base has no list of layers that could be thinned, or too few.
        RunError: what was written says something else.
    """
    if not base.reloadable:
        raise ModelError(
            f"{base.name!r}: an emulator is made of a base from a folder or the hub, not quantised"
        )
    model = read_again(base, "auto")
    count = len(decoder_layers(model))
    if not count:
        raise ModelError(
            f"{base.name!r}: the layers of {type(model).__name__} cannot be told apart from other "
            "lists of modules, so that none can be left out"
        )
    kept = kept_layers(count, left, right, drop)
    path = _thinned(model, kept)
    wanted = _logits(model, base)
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    emulator = Emulator(
        base=base.published or base.name,
        base_sha256=base.sha256,
        path=path,
        layers=tuple(kept),
        left=left,
        right=right,
        drop=drop,
        count=count,
    )
    text = json.dumps(asdict(emulator), indent=1)
    (folder / EMULATOR).write_text(text + "\n", encoding="utf-8")
    found = _logits(read_folder(folder), base)
    if not torch.equal(found, wanted):
        raise RunError(
            f"{folder}: the emulator that was read back says something else than the base without "
            f"these layers (a logit differs by {float((found - wanted).abs().max()):.3g}): its "
            f"architecture ({type(model).__name__}) makes layers by their number, so that none can "
            "be left out"
        )
    return emulator


def read_emulator(folder: Path) -> Emulator:
    """What an emulator's folder says of it.

    Args:
        folder: of the base that adapters were trained on.

    Raises:
        ModelError: it is no emulator, or the file is damaged.
    """
    path = folder / EMULATOR
    if not path.is_file():
        raise ModelError(
            f"{folder}: holds no {EMULATOR}, so it is no emulator; adapters are plugged from a run "
            "on what `fedmira emulate` wrote"
        )
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        emulator = Emulator(**{**values, "layers": tuple(int(each) for each in values["layers"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{path}: not what `fedmira emulate` writes ({error}); take it from a copy"
        ) from error
    expected = kept_layers(emulator.count, emulator.left, emulator.right, emulator.drop)
    if list(emulator.layers) != expected:
        raise ModelError(
            f"{path}: its layers are not those that left, right and drop give; take it from a copy"
        )
    return emulator


def outer_targets(model: PreTrainedModel, emulator: Emulator, names: Sequence[str]) -> list[str]:
    """Full paths of the linear layers at both ends, as `adapter.targets` takes them.

    Args:
        model: the emulator.
        emulator: which layers it has.
        names: as in `adapter.targets`; empty for the usual ones.
    """
    found = [target.name for target in find_targets(model, names)]
    ends = tuple(f"{emulator.path}.{number}." for number in emulator.outer)
    return [name for name in found if name.startswith(ends)]


def plugged(adapter: Adapter, emulator: Emulator) -> Adapter:
    """An adapter of the emulator under the names that its layers have in the base.

    Args:
        adapter: by PEFT's names.
        emulator: whose layers they are.

    Raises:
        RunError: a tensor belongs to no layer of the emulator.
    """
    pattern = re.compile(rf"(?<=[.]){re.escape(emulator.path)}[.](\d+)[.]")
    renamed: dict[str, Tensor] = {}
    for name, tensor in adapter.items():
        found = pattern.search(name)
        if found is None or int(found[1]) >= len(emulator.layers):
            raise RunError(f"{name!r} belongs to none of the emulator's layers {emulator.path}")
        number = emulator.layers[int(found[1])]
        renamed[f"{name[: found.start(1)]}{number}{name[found.end(1) :]}"] = tensor
    return renamed


def in_the_middle(adapter: Mapping[str, Tensor], emulator: Emulator) -> list[str]:
    """The names of tensors that belong to layers of the thinned middle.

    Args:
        adapter: by PEFT's names.
        emulator: whose layers they are.
    """
    ends = tuple(f".{emulator.path}.{number}." for number in emulator.outer)
    return [name for name in adapter if not any(end in name for end in ends)]


def _thinned(model: PreTrainedModel, kept: Sequence[int]) -> str:
    """Leave all other layers out of a model, in place; the path of its list of layers."""
    config, layers = model.config.get_text_config(), decoder_layers(model)
    path: str = next(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and list(module) == layers
    )
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList([layers[place] for place in kept]))
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == len(
            layers
        ):  # of layers, such as types
            setattr(config, key, [value[place] for place in kept])
    config.num_hidden_layers = len(kept)
    return path


def _logits(model: PreTrainedModel, base: BaseModel) -> Tensor:
    """Of a few tokens that reach all parts of the vocabulary."""
    step = max(1, base.num_embeddings // _PROBE_TOKENS)
    ids = torch.arange(0, base.num_embeddings, step)[None, :_PROBE_TOKENS]
    with torch.no_grad():
        found: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return found.float().cpu()
