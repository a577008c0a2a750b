"""The settings of a run, one class per section; the defaults make the demo."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedmira.config.methods import AlgorithmSettings, MiraSettings
from fedmira.config.section import Count, Positive, Section

__all__ = [
    "AdapterSettings",
    "Config",
    "DataSettings",
    "EngineSettings",
    "EvaluationSettings",
    "GraphSettings",
    "LocalSettings",
    "ModelSettings",
    "RoundsSettings",
]


class ModelSettings(Section):
    """[model]: the frozen base model.

    Attributes:
        base: "bundled", a local Hugging Face folder, or a hub id.
        dtype: of the frozen base; adapters are float32 always. "auto" is float32 on a CPU and bfloat16 on a GPU that has it.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        quantization: "8bit" or "4bit" (NF4) stores the frozen base's linear layers in fewer bits (bitsandbytes, on a CUDA device; the
            extra fedmira[quantized]).
    """

    base: str = Field("bundled", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field("auto", min_length=1)
    quantization: Literal["none", "8bit", "4bit"] = "none"


class AdapterSettings(Section):
    """[adapter]: what is trained and travels.

    Attributes:
        rank, alpha: LoRA's r and alpha; a client's update is alpha / r * B A.
        targets: names of the adapted linear modules; empty takes the usual ones of the architecture (Llama: q_proj, v_proj).
        ranks: rank of single clients, by client id, where it differs from `rank`.
    """

    kind: Literal["lora"] = "lora"
    rank: Positive = 16
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ()
    ranks: dict[str, Positive] = {}


class DataSettings(Section):
    """[data]: where rows come from, how they become clients, and how each client's rows are split.

    Attributes:
        source: the reader; `path` is its file, folder or (hub) dataset id.
        clients: keep the first so many clients; 0 keeps all.
        partition: "task" gives each task to one client; "category" gives each category to `clients_per_category` clients; "dirichlet"
            draws each client's mix of categories from Dirichlet(`dirichlet_alpha`) over `dirichlet_clients` clients, each with at
            least `min_rows`; "column" makes a client per value of `column`.
        min_rows: a client with fewer rows is skipped (task, category) or redrawn (dirichlet).
        sample_fraction: share of a task's rows that is used at all (FedKSeed: 0.2).
        train_fraction, validation_fraction: shares of a client's rows; the rest is its test set, cut to `test_rows` (0 = no cut).
        max_rows: most training rows of a client (0 = all); a list is given to the clients in turn. Validation is cut in proportion.
        max_length: most tokens of a row, prompt and response together; longer prompts lose tokens, never the whole response.
        input_limit: rows whose input has this many characters or more are left out (natural-instructions; FedKSeed: 1024).
        split_list: a file that lists task names, one a line, to take (natural-instructions' official splits).
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
                f"path is {self.path!r}, but source 'demo' reads no files; set source to 'jsonl', 'natural-instructions', 'dolly' or 'hub'"
            )
        return self

    @model_validator(mode="after")
    def _leaves_test_rows(self) -> DataSettings:
        if self.train_fraction + self.validation_fraction >= 1:
            total = self.train_fraction + self.validation_fraction
            raise ValueError(f"train_fraction + validation_fraction is {total:g}; must be below 1 so that test rows remain")
        return self


class GraphSettings(Section):
    """[graph]: who is related.

    Attributes:
        kind: "random" (the authors' recipe), "uniform" (all), "category" (of one category), "file" (graph.json), "similarity" (learned).
        path: the file of kind "file".
        nearest, memory, warmup_rounds: of the learned graph; a fixed graph acts from round 1.
        shuffled: a control: the same graph with its clients exchanged at random.
        sketch: how inner products between the clients' updates are kept: 0 keeps all of them, exactly; m estimates them from m numbers
            a client; "auto" does the first up to 512 clients and the second, with m = 1024, above.
    """

    kind: Literal["random", "uniform", "category", "similarity", "file"] = "similarity"
    path: str = ""
    nearest: Positive = 3
    memory: float = Field(0.5, ge=0, lt=1)
    warmup_rounds: Count = 1
    shuffled: bool = False
    sketch: Count | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _file_has_path(self) -> GraphSettings:
        if (self.kind == "file") != bool(self.path):
            raise ValueError("kind = 'file' and path belong together; set both or neither")
        return self


class LocalSettings(Section):
    """[local]: a client's training within a round.

    Attributes:
        steps: optimizer steps a round; ignored when `epochs` is above 0, which counts passes over the client's rows.
        max_grad_norm: each client's gradient is clipped to this norm; 0 switches clipping off.
        optimizer_state: "fresh" starts each round with empty moments, "kept" keeps them in the client's private memory.
        sophia_refresh: optimizer "sophia" estimates the curvature h anew every so many local steps of a client.
        sophia_gamma, sophia_rho: its step is learning_rate * clip(m / (gamma * h), -rho, rho).
        zeroth_seeds: optimizer "zeroth-order" steps along directions made from so many candidate seeds.
        zeroth_width: how far it moves the adapter to either side to measure a slope.
    """

    optimizer: Literal["adamw", "adam", "sgd", "sophia", "zeroth-order"] = "adamw"
    steps: Positive = 5
    epochs: Count = 0
    batch_size: Positive = 8
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
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
        sampling: "keyed" draws from (run seed, round); "shepherd" seeds numpy with the round index, as FedIT's code does.
    """

    count: Positive = 20
    participation: float = Field(1.0, gt=0, le=1)
    sampling: Literal["keyed", "shepherd"] = "keyed"


class EvaluationSettings(Section):
    """[evaluation].

    Attributes:
        every: evaluate all clients after every so many rounds (0 = at the end only), and always at the end.
        rouge: generate on test rows at the end, for Rouge-L and exact match.
        select: which adapter a client is given: its "last", or its "best" by its own validation rows.
    """

    every: Count = 5
    rouge: bool = True
    max_new_tokens: Positive = 64
    select: Literal["last", "best"] = "last"


class EngineSettings(Section):
    """[engine].

    Attributes:
        token_budget: most tokens in one forward pass; "auto" finds out by a short trial what this machine is fastest with, bounded by
            its free memory, and is lowered when memory runs out all the same.
        recompute: compute each layer again in the backward pass instead of remembering it: less memory, about a third more time.
        compile: let torch.compile fuse the layers that carry no adapter; the first steps take longer.
    """

    kind: Literal["in-process"] = "in-process"
    token_budget: Positive | Literal["auto"] = "auto"
    recompute: bool = False
    compile: bool = False


class Config(Section):
    """A whole run."""

    seed: Count = 0
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    data: DataSettings = DataSettings()
    algorithm: AlgorithmSettings = MiraSettings()
    graph: GraphSettings = GraphSettings()
    local: LocalSettings = LocalSettings()
    rounds: RoundsSettings = RoundsSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="after")
    def _best_needs_validation(self) -> Config:
        if self.evaluation.select == "best" and self.data.validation_fraction == 0:
            raise ValueError("evaluation.select = 'best' needs validation rows; set data.validation_fraction above 0")
        return self

    @model_validator(mode="after")
    def _kept_moments_fit_their_entries(self) -> Config:
        problem = self.algorithm.kept_moments_problem
        if problem and self.local.optimizer_state == "kept":
            raise ValueError(f"local.optimizer_state = 'kept' does not go with {problem}")
        return self

    @model_validator(mode="after")
    def _movements_are_sums_of_steps(self) -> Config:
        local = self.local
        if self.algorithm.sends_movements and (local.optimizer != "zeroth-order" or local.weight_decay):
            raise ValueError(
                f"algorithm.name = {self.algorithm.name!r} sends steps along random directions, but local.optimizer = {local.optimizer!r} "
                f"and local.weight_decay = {local.weight_decay:g}; set local.optimizer = 'zeroth-order' and local.weight_decay = 0"
            )
        return self
