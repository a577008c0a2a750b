"""Prompt encoders: they make what the frozen base reads in front of every row.

That is virtual tokens, or keys and values.

    prompt     P [N, e] itself                                  Lester et al. 2021, arXiv 2104.08691
    p-tuning   P = MLP(E), or MLP(LSTM(E)), E [N, e]            Liu et al. 2021, arXiv 2103.10385
    prefix     keys and values of every layer, [N, 2 layers e]  Li & Liang 2021, arXiv 2101.00190

PEFT makes them and runs the base with them, one client after another on one resident model. What is
trained, averaged and sent is what `named_parameters` of the encoder names. PEFT's own state dict
holds P alone, the encoder's output: loading that puts P where E was.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import peft
import torch
from peft.tuners import PrefixEncoder, PromptEmbedding, PromptEncoder
from torch import Tensor, nn

from fedmira.adapters import Adapter
from fedmira.config import AdapterSettings
from fedmira.errors import ModelError
from fedmira.model.base.rows import Row
from fedmira.model.base.types import BaseModel
from fedmira.model.lora.branches import Draws, TokenLosses
from fedmira.model.packed.passes import padded_losses

__all__ = ["EncoderBranch", "PromptModel", "StackedEncoders"]

_PREFIX, _SLOT = "prompt_encoder.", "default"


def _prompt_config(settings: AdapterSettings) -> Any:
    return peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=settings.virtual_tokens,
        prompt_tuning_init="RANDOM",
    )


def _p_tuning_config(settings: AdapterSettings) -> Any:
    return peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=settings.virtual_tokens,
        encoder_reparameterization_type=settings.encoder.upper(),
        encoder_hidden_size=settings.encoder_hidden,
        encoder_dropout=0.0,
    )


def _prefix_config(settings: AdapterSettings) -> Any:
    return peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=settings.virtual_tokens,
        prefix_projection=settings.prefix_projection,
        encoder_hidden_size=settings.encoder_hidden,
    )


@dataclass(frozen=True, slots=True)
class _Maker:
    """How PEFT makes an encoder: its config from ours, and the encoder from that."""

    config: Callable[[AdapterSettings], Any]
    encoder: Callable[[Any], nn.Module]


_MAKERS: Mapping[str, _Maker] = {
    "prompt": _Maker(_prompt_config, lambda config: PromptEmbedding(config, None)),  # type: ignore[no-untyped-call]
    "p-tuning": _Maker(_p_tuning_config, PromptEncoder),
    "prefix": _Maker(_prefix_config, PrefixEncoder),
}


class PromptModel:
    """The resident PEFT model around a base, with one slot for an encoder.

    Args:
        base: the frozen base; it is not changed.
        settings: [adapter], of a kind that has virtual tokens.
    """

    def __init__(self, base: BaseModel, settings: AdapterSettings) -> None:
        self.base, self.num_tokens = base, settings.virtual_tokens
        self._make = _MAKERS[settings.kind].encoder
        with _own_randomness(0), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning
            )  # peft's own business
            self.peft_model: Any = peft.PeftModelForCausalLM(
                base.model, _MAKERS[settings.kind].config(settings)
            ).eval()
        # PEFT takes the first parameter with as many rows as the vocabulary for the embeddings; a
        # base says which they are.
        self.peft_model.word_embeddings = base.model.get_input_embeddings()
        self.encoder: nn.Module = self.peft_model.prompt_encoder[_SLOT]
        # It drops nothing; recurrent layers on CUDA have no backward pass otherwise
        self.encoder.train()
        self.parameters: Mapping[str, nn.Parameter] = {
            f"{_PREFIX}{name}": part for name, part in self.encoder.named_parameters()
        }
        self.extra = 0 if self.config.peft_type == peft.PeftType.PREFIX_TUNING else self.num_tokens

    @property
    def config(self) -> Any:
        """PEFT's settings, with the sizes that it read from the base."""
        return self.peft_model.peft_config[_SLOT]

    def start(self, seed: int) -> Adapter:
        """A new encoder as PEFT draws it, from a stream of its own."""
        with _own_randomness(seed), torch.device("cpu"):
            encoder = self._make(self.config)
        return {
            f"{_PREFIX}{name}": parameter.detach().clone()
            for name, parameter in encoder.named_parameters()
        }

    def load(self, adapter: Adapter) -> None:
        """Put an encoder into the slot."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.grad = None
                parameter.copy_(adapter[name])

    def logits(self, ids: Tensor, seen: Tensor) -> Tensor:
        """Logits [n, L, vocabulary] of token ids [n, L] behind the virtual tokens of the slot.

        `seen` is their attention mask.

        Args:
            ids: token ids [n, L].
            seen: 1 for tokens that are seen, 0 for padding, [n, L].
        """
        found: Tensor = self.peft_model(input_ids=ids, attention_mask=seen, use_cache=False).logits
        return found[:, self.extra :]

    def greedy(self, ids: Tensor, limit: int, ends: Tensor) -> Tensor:
        """Continue prompts [n, L] of one length with the slot's encoder, [n, at most `limit`].

        What follows an end means nothing.

        No row is padded: behind virtual tokens a gap would move the prompt away from them.

        Args:
            ids: token ids [n, L].
            limit: most new tokens.
            ends: token ids that end an answer.
        """
        output = self.peft_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        tokens, cache = output.logits[:, -1].argmax(dim=-1), output.past_key_values
        answer, done = [tokens], torch.isin(tokens, ends)
        while len(answer) < limit and not bool(done.all()):
            logits = self.base.model(
                input_ids=tokens[:, None], past_key_values=cache, use_cache=True
            ).logits
            tokens = logits[:, -1].argmax(dim=-1)
            answer.append(tokens)
            done |= torch.isin(tokens, ends)
        return torch.stack(answer, dim=1)

    def exported(self, adapter: Adapter) -> tuple[Any, Tensor]:
        """What PEFT loads for inference.

        Its settings, and the encoder's output [N, ...] on the CPU.
        """
        self.load(adapter)
        config = copy.deepcopy(self.config)
        config.inference_mode, config.base_model_name_or_path = True, self.base.known_as
        embeddings: Tensor = self.peft_model.get_prompt_embedding_to_save(_SLOT)
        return config, embeddings.contiguous()


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """PEFT draws from the process's stream.

    Within the block that is one of our own, and nobody else's draws move.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class StackedEncoders:
    """The encoders of a cohort of K clients as one float32 matrix [K, P].

    Gradients have the same shape.

    Args:
        like: an encoder of the right shape.
        adapters: one a client.
        device: where the matrix lives.
        trainable: whether there are gradients.

    Raises:
        ModelError: an adapter is of another kind or size.
    """

    def __init__(
        self,
        like: Adapter,
        adapters: Sequence[Adapter],
        device: torch.device,
        trainable: bool = True,
    ) -> None:
        self._shapes = {name: tensor.shape for name, tensor in like.items()}
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        self._offsets = dict(zip(self._shapes, accumulate(sizes, initial=0), strict=False))
        self.values = torch.zeros(len(adapters), sum(sizes), device=device)
        self.gradients = torch.zeros_like(self.values) if trainable else self.values.new_empty(0)
        for client, adapter in enumerate(adapters):
            self._fill(client, adapter)

    def __len__(self) -> int:
        return len(self.values)

    def adapter(self, client: int) -> Adapter:
        """A copy of a client's encoder, on the CPU."""
        return self.copied(self.values, client)

    def copied(self, matrix: Tensor, client: int) -> Adapter:
        """A copy of a client's row of a [K, P] matrix, on the CPU."""
        row = matrix[client : client + 1].detach().cpu()
        return {name: view.clone() for name, view in self.views(row, 0).items()}

    def views(self, matrix: Tensor, client: int) -> Adapter:
        """A client's row of a [K, P] matrix (values, gradients, moments) as named views."""
        row = matrix[client]
        return {
            name: row[self._offsets[name] : self._offsets[name] + math.prod(shape)].view(shape)
            for name, shape in self._shapes.items()
        }

    def _fill(self, client: int, adapter: Adapter) -> None:
        found = {name: tuple(tensor.shape) for name, tensor in adapter.items()}
        wanted = {name: tuple(shape) for name, shape in self._shapes.items()}
        if found != wanted:
            raise ModelError(
                f"adapter of client number {client}: its parameters are {found}; must be "
                f"{wanted}. It was made for another "
                "adapter.kind, other sizes or another base"
            )
        for name, view in self.views(self.values, client).items():
            view.copy_(adapter[name])


@dataclass(eq=False)
class EncoderBranch:
    """Runs the base with the encoders of a cohort, one client after another.

    Within the block backward passes fill its gradients.

    Attributes:
        model: whose slot is used.
        adapters: the encoders.
        dropout, generators: nothing is dropped.
    """

    model: PromptModel
    adapters: StackedEncoders
    dropout: float = 0.0
    generators: Sequence[torch.Generator] = ()
    _owner: int = 0
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> EncoderBranch:
        if len(self.adapters.gradients):
            for name, parameter in self.model.parameters.items():
                collect = partial(self._collect, name)
                self._handles.append(parameter.register_post_accumulate_grad_hook(collect))  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def losses(
        self, batches: Sequence[tuple[int, Sequence[Row]]], budget: int, draws: Draws | None = None
    ) -> Iterator[TokenLosses]:
        """Response losses of (client, rows) batches; see `fedmira.model.lora.branches.Passes`.

        Args:
            batches: (client index, rows) pairs.
            budget: most tokens in a forward pass.
            draws: see `Draws`; None measures the responses of the rows.
        """
        yield from padded_losses(
            self.model.base, self._logits, batches, budget, draws, self.model.num_tokens
        )

    def _logits(self, client: int, ids: Tensor, seen: Tensor) -> Tensor:
        self._owner = client
        self.model.load(self.adapters.views(self.adapters.values, client))
        return self.model.logits(ids, seen)

    def _collect(self, name: str, parameter: Tensor) -> None:
        """Move a gradient from the slot to its client's row."""
        assert parameter.grad is not None
        self.adapters.views(self.adapters.gradients, self._owner)[name].add_(parameter.grad)
        parameter.grad = None
