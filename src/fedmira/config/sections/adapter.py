"""[adapter]: what is trained and travels."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from fedmira.config.section import Positive, Section, setting

__all__ = ["AdapterSettings", "RankDistribution", "ResourceType"]

RankDistribution = Literal["one", "uniform", "heavy-tail-light", "heavy-tail-strong", "normal"]
"""How ranks spread over clients."""

ResourceType = Literal["light", "mid", "mixed", "heavy"]
"""What a client can afford: FlexLoRA's four types of clients."""


class AdapterSettings(Section):
    """[adapter]: what is trained and travels."""

    kind: Literal["lora", "p-tuning", "prompt", "prefix"] = setting(
        "lora",
        help=(
            "What a client trains: LoRA factors, or what the frozen base reads in front of "
            'every row ([methods.md](methods.md), "Other adapters"). The other kinds go with '
            "methods that work entry by entry: `local`, `fedavg`, `fedit-finetune`, `fedprox`, "
            "`fedopt`, `scaffold`, `fola`, `ditto`, `fedkseed`, and `mira` with `space = "
            '"factor"`; and without `engine.recompute` and `engine.compile`.'
        ),
    )
    rank: Positive = setting(
        16,
        help=(
            'LoRA\'s r. This, alpha, dropout, targets and the ranks below are of kind `"lora"`; '
            "the other kinds have no rank (0 in tables) and drop nothing."
        ),
    )
    alpha: float = setting(
        16.0,
        gt=0,
        help="LoRA's alpha; a client's update is alpha / r · B A.",
    )
    rslora: bool = setting(
        False,
        help=(
            "rsLoRA: a client's update is alpha / √r · B A, so that ranks far apart learn alike. "
            "PEFT calls it `use_rslora`."
        ),
        read_by={"kind": ("lora",)},
    )
    dropout: float = setting(
        0.0,
        ge=0,
        lt=1,
        help=(
            "Share of the LoRA branch's inputs dropped in local training. The frozen base never "
            "drops anything; evaluation drops nothing. With dropout the rows of a batch share "
            "no prefix, which costs time."
        ),
        read_by={"kind": ("lora",)},
    )
    targets: tuple[str, ...] = setting(
        (),
        help=(
            'The linear layers that carry a branch, by the end of their path (`"q_proj"`, '
            '`"self_attn.q_proj"`). Empty takes the usual ones: `q_proj` and `v_proj`; else '
            "`c_attn`, `query_key_value`, `qkv_proj`, `Wqkv`, or `query` and `value`. The "
            'output head is never one. `["all-linear"]` takes all others of the language model. '
            "A name that matches nothing is an error that lists what exists."
        ),
        read_by={"kind": ("lora",)},
    )
    rank_distribution: RankDistribution = setting(
        "one",
        help=(
            '`"one"`: all clients have `adapter.rank`. The others draw each client\'s resource '
            'type in the proportions of FlexLoRA\'s code ([methods.md](methods.md), "Ranks"), '
            "from `seed` and the client's id alone, and take its rank from "
            "`adapter.type_ranks`; `adapter.rank` is then not set."
        ),
    )
    type_ranks: tuple[Positive, Positive, Positive] = setting(
        (8, 30, 200),
        help=(
            "Ranks of the types light, mid and heavy, FlexLoRA's. Type mixed has the second in "
            "attention and the third in feed-forward layers there; here one rank for all layers "
            "with as many parameters, rounded."
        ),
    )
    rank_types: dict[str, ResourceType] = setting(
        {},
        help=("Resource types of single clients, in place of `adapter.rank` or of what is drawn."),
    )
    ranks: dict[str, Positive] = setting(
        {},
        help=(
            "Ranks of single clients, in place of `adapter.rank` or of what is drawn. All start "
            "from one common adapter, drawn at the largest rank and cut. Needs an algorithm "
            "that can hold them: `local`, `flexlora`, `hetlora`, `fedalt`, or `mira` with "
            '`space = "product"`.'
        ),
    )
    virtual_tokens: Positive = setting(
        20,
        help=(
            "Of the other kinds: positions in front of every row. They and `data.max_length` "
            "together must fit what the base reads."
        ),
        read_by={"kind": ("p-tuning", "prompt", "prefix")},
    )
    encoder: Literal["mlp", "lstm"] = setting(
        "mlp",
        help=(
            'Of `"p-tuning"`: what makes the virtual tokens, three linear layers with ReLU '
            "between them, or a two-layer bidirectional LSTM and two linear layers."
        ),
        read_by={"kind": ("p-tuning",)},
    )
    encoder_hidden: Positive = setting(
        128,
        help="Its width, and that of a prefix's projection.",
        read_by={"kind": ("p-tuning", "prefix")},
    )
    prefix_projection: bool = setting(
        False,
        help=(
            'Of `"prefix"`: whether a small network makes the keys and values, in place of '
            "training them directly."
        ),
        read_by={"kind": ("prefix",)},
    )

    @property
    def low_rank(self) -> bool:
        """Whether adapters are pairs of factors with a rank."""
        return self.kind == "lora"

    @property
    def positions(self) -> int:
        """Positions of the context that an adapter takes."""
        return 0 if self.low_rank else self.virtual_tokens

    @model_validator(mode="after")
    def _only_factors_have_ranks(self) -> AdapterSettings:
        named = [key for key in ("ranks", "rank_types") if getattr(self, key)] + [
            "rank_distribution"
        ] * (self.rank_distribution != "one")
        if named and not self.low_rank:
            raise ValueError(
                f"{named[0]} is set, but adapters of kind {self.kind!r} have no rank; take "
                "it out, or set kind to 'lora'"
            )
        return self

    @model_validator(mode="after")
    def _ranks_agree(self) -> AdapterSettings:
        if self.rank_distribution != "one" and "rank" in self.model_fields_set:
            raise ValueError(
                f"rank is {self.rank}, but rank_distribution = {self.rank_distribution!r} "
                "draws the ranks from type_ranks; set one of them"
            )
        if list(self.type_ranks) != sorted(set(self.type_ranks)):
            raise ValueError(
                f"type_ranks is {list(self.type_ranks)}; must rise from light over mid to "
                "heavy, such as [8, 30, 200]"
            )
        twice = sorted(set(self.ranks) & set(self.rank_types))
        if twice:
            raise ValueError(
                f"client {twice[0]!r} has a rank in ranks and a type in rank_types; keep "
                "one of them"
            )
        return self
