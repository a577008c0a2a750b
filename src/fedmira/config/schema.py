"""The settings of a run, one class per section; the defaults make the demo."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from fedmira.config.methods import ChosenMethod, Need, default_method
from fedmira.config.section import Count, Positive, Section

__all__ = [
    "AdapterSettings",
    "Config",
    "DataSettings",
    "EngineSettings",
    "EvaluationSettings",
    "FederationSettings",
    "GraphSettings",
    "LocalSettings",
    "ModelSettings",
    "RankDistribution",
    "ResourceType",
    "RoundsSettings",
]

RankDistribution = Literal["one", "uniform", "heavy-tail-light", "heavy-tail-strong", "normal"]
"""How ranks spread over clients."""

ResourceType = Literal["light", "mid", "mixed", "heavy"]
"""What a client can afford: FlexLoRA's four types of clients."""


class ModelSettings(Section):
    """[model]: the frozen base model.

    Attributes:
        base: "bundled", a local Hugging Face folder, or a hub id.
        dtype: of the frozen base; adapters are float32 always. "auto" is float32 on a CPU and
            bfloat16 on a GPU that has it.
        device: "auto", or torch's name of a device: "cpu", "cuda", "cuda:1", "mps".
        quantization: "8bit" or "4bit" (NF4) stores the frozen base's linear layers in fewer bits
            (bitsandbytes, on a CUDA device; the extra fedmira[quantized]).
    """

    base: str = Field("bundled", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field("auto", min_length=1)
    quantization: Literal["none", "8bit", "4bit"] = "none"


class AdapterSettings(Section):
    """[adapter]: what is trained and travels.

    Attributes:
        rank, alpha: LoRA's r and alpha; a client's update is alpha / r * B A.
        targets: names of the adapted linear modules; empty takes the usual ones of the architecture
            (Llama: q_proj, v_proj).
        rank_distribution: "one" gives every client `rank`; the others draw each client's resource
            type in FlexLoRA's proportions.
        type_ranks: ranks of the types: "light" has the first, "mid" the second, "heavy" the third,
            and "mixed" the second in attention and the third in feed-forward layers.
        rank_types: resource type of single clients, by client id.
        ranks: rank of single clients, by client id.
        virtual_tokens: of the other kinds, how many positions an adapter puts in front of every
            row.
        encoder, encoder_hidden: of "p-tuning", what makes the virtual tokens, and its width.
        prefix_projection: of "prefix", whether an MLP of width `encoder_hidden` makes the keys and
            values.
    """

    kind: Literal["lora", "p-tuning", "prompt", "prefix"] = "lora"
    rank: Positive = 16
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ()
    rank_distribution: RankDistribution = "one"
    type_ranks: tuple[Positive, Positive, Positive] = (8, 30, 200)
    rank_types: dict[str, ResourceType] = {}
    ranks: dict[str, Positive] = {}
    virtual_tokens: Positive = 20
    encoder: Literal["mlp", "lstm"] = "mlp"
    encoder_hidden: Positive = 128
    prefix_projection: bool = False

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


class DataSettings(Section):
    """[data]: where rows come from, how they become clients, and how each client's rows are split.

    Attributes:
        source: the reader; `path` is its file, folder or (hub) dataset id.
        clients: keep the first so many clients; 0 keeps all.
        partition: "task" gives each task to one client; "category" gives each category to
            `clients_per_category` clients; "dirichlet" draws each client's mix of categories from
            Dirichlet(`dirichlet_alpha`) over `dirichlet_clients` clients, each with at least
            `min_rows`; "column" makes a client per value of `column`.
        min_rows: a client with fewer rows is skipped (task, category) or redrawn (dirichlet).
        sample_fraction: share of a task's rows that is used at all (FedKSeed: 0.2, and 0.02 of its
            unseen tasks).
        sample_least: that share is at least so many rows, or all there are (FedKSeed: 20 of its
            unseen tasks).
        train_fraction, validation_fraction: shares of a client's rows; the rest is its test set,
            cut to `test_rows` (0 = no cut).
        max_rows: most training rows of a client (0 = all); a list is given to the clients in turn.
            Validation is cut in proportion.
        max_length: most tokens of a row, prompt and response together; longer prompts lose tokens,
            never the whole response.
        input_limit: rows whose input has this many characters or more are left out
            (natural-instructions; FedKSeed: 1024).
        split_list: a file that lists task names, one a line, to take (natural-instructions'
            official splits).
        column, split, text columns: for jsonl and hub.
    """

    source: Literal["demo", "natural-instructions", "dolly", "jsonl", "hub"] = "demo"
    path: str = ""
    clients: Count = 0
    partition: Literal["task", "category", "dirichlet", "column"] = "task"
    clients_per_category: Positive = 1
    dirichlet_clients: Positive = 10
    dirichlet_alpha: float = Field(0.5, gt=0)
    column: str = "client"
    split: str = "train"
    split_list: str = ""
    min_rows: Positive = 4
    input_limit: Positive = 1024
    sample_fraction: float = Field(1.0, gt=0, le=1)
    sample_least: Positive | None = None
    train_fraction: float = Field(0.8, gt=0, lt=1)
    validation_fraction: float = Field(0.0, ge=0, lt=1)
    test_rows: Count = 0
    max_rows: Count | tuple[Count, ...] = 0
    max_length: int = Field(512, ge=8)
    prompt: Literal["alpaca", "chat", "plain"] = "alpaca"

    @model_validator(mode="after")
    def _path_has_a_reader(self) -> DataSettings:
        if self.source == "demo" and self.path:
            raise ValueError(
                f"path is {self.path!r}, but source 'demo' reads no files; set source to "
                "'jsonl', 'natural-instructions', 'dolly' or 'hub'"
            )
        return self

    @model_validator(mode="after")
    def _leaves_test_rows(self) -> DataSettings:
        if self.train_fraction + self.validation_fraction >= 1:
            total = self.train_fraction + self.validation_fraction
            raise ValueError(
                f"train_fraction + validation_fraction is {total:g}; must be below 1 so "
                "that test rows remain"
            )
        return self


class GraphSettings(Section):
    """[graph]: who is related.

    Attributes:
        kind: "random" (the authors' recipe), "uniform" (all), "category" (of one category), "file"
            (graph.json), "similarity" (learned), "pfedgraph" (learned: similarity balanced against
            data shares).
        path: the file of kind "file".
        measure: learned graphs compare updates by their "cosine", or only where they point to, by
            "principal-angles".
        nearest: of kind "similarity"; memory, warmup_rounds: of the learned graphs; a fixed graph
            acts from round 1.
        alpha: of kind "pfedgraph".
        shuffled: a control: the same graph with its clients exchanged at random.
        sketch: how inner products between the clients' updates are kept: 0 keeps all of them,
            exactly; m estimates them from m numbers a client; "auto" does the first up to 512
            clients and the second, with m = 1024, above.
    """

    kind: Literal["random", "uniform", "category", "similarity", "pfedgraph", "file"] = "similarity"
    path: str = ""
    measure: Literal["cosine", "principal-angles"] = "cosine"
    nearest: Positive = 3
    memory: float = Field(0.5, ge=0, lt=1)
    warmup_rounds: Count = 1
    alpha: float = Field(0.8, gt=0)
    shuffled: bool = False
    sketch: Count | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _file_has_path(self) -> GraphSettings:
        if (self.kind == "file") != bool(self.path):
            raise ValueError("kind = 'file' and path belong together; set both or neither")
        return self

    @model_validator(mode="after")
    def _fixed_graphs_compare_nothing(self) -> GraphSettings:
        if self.measure != "cosine" and self.kind not in ("similarity", "pfedgraph"):
            raise ValueError(
                f"measure = {self.measure!r} is for learned graphs, but kind is "
                f"{self.kind!r}; set kind = 'similarity' or leave it out"
            )
        return self


_DEVICE = re.compile(r"auto|(?:cpu|cuda|mps|xpu|hpu|xla|mtia|meta|privateuseone)(?::\d+)?")
"""Torch's names, told without importing it.

Whether the device is there shows when the base is loaded.
"""

GRADIENT_LIMIT = 1.0
"""Default of `local.max_grad_norm` for optimizers that step along gradients."""


def _gradient_limit(local: dict[str, Any]) -> float:
    """The default of `max_grad_norm`, from the keys of the section that stand before it."""
    return 0.0 if local.get("optimizer") == "zeroth-order" else GRADIENT_LIMIT


class LocalSettings(Section):
    """[local]: a client's training within a round.

    Attributes:
        steps: optimizer steps a round; ignored when `epochs` is above 0, which counts passes over
            the client's rows.
        max_grad_norm: each client's gradient is clipped to this norm; 0 switches clipping off. Of
            optimizer "zeroth-order" the default is 0: its slope g times a random direction has a
            norm of about |g| sqrt(P) with P parameters, of which clipping to 1 would leave little
            but the sign of g.
        optimizer_state: "fresh" starts each round with empty moments, "kept" keeps them in the
            client's private memory.
        sophia_refresh: optimizer "sophia" estimates the curvature h anew every so many local steps
            of a client.
        sophia_gamma, sophia_rho: its step is learning_rate * clip(m / (gamma * h), -rho, rho).
        zeroth_seeds: optimizer "zeroth-order" steps along directions made from so many candidate
            seeds.
        zeroth_width: how far it moves the adapter to either side to measure a slope.
    """

    optimizer: Literal["adamw", "adam", "sgd", "sophia", "zeroth-order"] = "adamw"
    steps: Positive = 5
    epochs: Count = 0
    batch_size: Positive = 8
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(
        default_factory=_gradient_limit, ge=0, json_schema_extra={"default": GRADIENT_LIMIT}
    )
    optimizer_state: Literal["fresh", "kept"] = "fresh"
    sophia_refresh: Positive = 10
    sophia_gamma: float = Field(0.05, gt=0)
    sophia_rho: float = Field(1.0, gt=0)
    zeroth_seeds: int = Field(4096, ge=1, le=65536)
    zeroth_width: float = Field(5e-4, gt=0)


class RoundsSettings(Section):
    """[rounds].

    Attributes:
        participation: share of the clients sampled each round, at least one client.
        sampling: "keyed" draws from (run seed, round); "shepherd" seeds numpy with the round index,
            as FedIT's code does.
        min_replies: a round with fewer usable replies does not count and ends the run, which can be
            resumed.
    """

    count: Positive = 20
    participation: float = Field(1.0, gt=0, le=1)
    sampling: Literal["keyed", "shepherd"] = "keyed"
    min_replies: Positive = 1


class EvaluationSettings(Section):
    """[evaluation].

    Attributes:
        every: evaluate all clients after every so many rounds (0 = at the end only), and always at
            the end.
        rouge: generate on test rows at the end, for Rouge-L and exact match.
        select: which adapter a client is given: its "last", or its "best" by its own validation
            rows.
    """

    every: Count = 5
    rouge: bool = True
    max_new_tokens: Positive = 64
    select: Literal["last", "best"] = "last"


class EngineSettings(Section):
    """[engine].

    Attributes:
        token_budget: most tokens in one forward pass; "auto" finds out by a short trial what this
            machine is fastest with, bounded by its free memory, and is lowered when memory runs out
            all the same.
        recompute: compute each layer again in the backward pass instead of remembering it: less
            memory, about a third more time.
        compile: let torch.compile fuse the layers that carry no adapter; the first steps take
            longer.
        wire: how adapters travel between server and clients: whole, or from the second message on
            as changes in 2 or 1 bytes a parameter, with error feedback. In one process, "float32"
            hands them over and the others show what they cost.
    """

    kind: Literal["in-process"] = "in-process"
    token_budget: Positive | Literal["auto"] = "auto"
    recompute: bool = False
    compile: bool = False
    wire: Literal["float32", "float16", "int8"] = "float32"


class FederationSettings(Section):
    """[federation]: a run whose clients are on machines of their own (Flower).

    Attributes:
        clients: names that may take part; the run begins when all are there. Empty: any names, and
            it begins with `nodes` of them.
        nodes: how many nodes to wait for where `clients` is empty.
        wait_s: how long to wait for nodes, before the run begins and before a round that would have
            too few of them.
        reply_s: how long to wait for the replies of a round, and of an evaluation.
    """

    clients: tuple[str, ...] = ()
    nodes: Positive = 2
    wait_s: float = Field(120.0, ge=0)
    reply_s: float = Field(3600.0, gt=0)


class Config(Section):
    """A whole run."""

    seed: Count = 0
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    data: DataSettings = DataSettings()
    algorithm: ChosenMethod = Field(default_factory=default_method)
    graph: GraphSettings = GraphSettings()
    local: LocalSettings = LocalSettings()
    rounds: RoundsSettings = RoundsSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    engine: EngineSettings = EngineSettings()
    federation: FederationSettings = FederationSettings()

    @model_validator(mode="after")
    def _device_has_a_name(self) -> Config:
        if not _DEVICE.fullmatch(self.model.device):
            hint = (
                "; did you mean 'cuda'?" if self.model.device.lower() in ("gpu", "nvidia") else ""
            )
            raise ValueError(
                f"model.device = {self.model.device!r}: must be 'auto' or a torch device, "
                f"such as 'cpu', 'cuda', 'cuda:1' or 'mps'{hint}"
            )
        return self

    @model_validator(mode="after")
    def _shuffling_changes_the_graph(self) -> Config:
        if self.graph.shuffled and self.graph.kind == "uniform":
            raise ValueError(
                "graph.shuffled = true changes nothing with graph.kind = 'uniform', in "
                "which all clients are related alike; "
                "set graph.shuffled = false, or another kind"
            )
        return self

    @model_validator(mode="after")
    def _best_needs_validation(self) -> Config:
        if self.evaluation.select == "best" and self.data.validation_fraction == 0:
            raise ValueError(
                "evaluation.select = 'best' needs validation rows; set "
                "data.validation_fraction above 0"
            )
        return self

    @model_validator(mode="after")
    def _choices_need_validation(self) -> Config:
        setting = self.algorithm.reason(Need.VALIDATION)
        if setting and self.data.validation_fraction == 0:
            raise ValueError(
                f"{setting} needs validation rows; set data.validation_fraction above 0"
            )
        return self

    @model_validator(mode="after")
    def _method_and_kind_go_together(self) -> Config:
        problem = self.algorithm.reason(Need.FACTORS)
        if problem and not self.adapter.low_rank:
            raise ValueError(f"adapter.kind = {self.adapter.kind!r} does not go with {problem}")
        wanted = [f"engine.{key}" for key in ("recompute", "compile") if getattr(self.engine, key)]
        if wanted and not self.adapter.low_rank:
            raise ValueError(
                f"{wanted[0]} goes with adapter.kind = 'lora' only, and kind is "
                f"{self.adapter.kind!r}; set {wanted[0]} to false"
            )
        return self

    @model_validator(mode="after")
    def _angles_are_between_updates(self) -> Config:
        if self.graph.measure == "principal-angles" and not self.adapter.low_rank:
            raise ValueError(
                "graph.measure = 'principal-angles' compares column spaces of B A, which "
                f"adapter.kind = {self.adapter.kind!r} has not; "
                "set graph.measure = 'cosine' or adapter.kind = 'lora'"
            )
        return self

    @model_validator(mode="after")
    def _changes_are_those_of_whole_adapters(self) -> Config:
        if self.engine.wire != "float32" and self.algorithm.partly_sent:
            raise ValueError(
                f"engine.wire = {self.engine.wire!r} compresses changes of whole adapters, "
                f"but algorithm.name = {self.algorithm.name!r} "
                "sends a part of them; set engine.wire = 'float32'"
            )
        if self.engine.wire != "float32" and self.algorithm.reason(Need.VALIDATION):
            raise ValueError(
                f"engine.wire = {self.engine.wire!r} rounds what travels, but with "
                f"{self.algorithm.reason(Need.VALIDATION)} a client holds what "
                "it sent against what comes back; set engine.wire = 'float32'"
            )
        return self

    @model_validator(mode="after")
    def _kept_moments_fit_their_entries(self) -> Config:
        problem = self.algorithm.reason(Need.FRESH_MOMENTS)
        if problem and self.local.optimizer_state == "kept":
            raise ValueError(f"local.optimizer_state = 'kept' does not go with {problem}")
        return self

    @model_validator(mode="after")
    def _movements_are_sums_of_steps(self) -> Config:
        local = self.local
        if Need.MOVEMENTS in self.algorithm.needs and (
            local.optimizer != "zeroth-order" or local.weight_decay
        ):
            raise ValueError(
                f"algorithm.name = {self.algorithm.name!r} sends steps along random "
                f"directions, but local.optimizer = {local.optimizer!r} "
                f"and local.weight_decay = {local.weight_decay:g}; set local.optimizer = "
                "'zeroth-order' and local.weight_decay = 0"
            )
        return self
