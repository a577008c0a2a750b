"""[graph]: who is related."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from fedmira.config.section import Count, Positive, Section, setting

__all__ = ["GraphSettings"]


class GraphSettings(Section):
    """[graph]: who is related."""

    kind: Literal["random", "uniform", "category", "similarity", "blocks", "pfedgraph", "file"] = (
        setting(
            "similarity",
            help=(
                "The authors' random recipe; weight 1 between all; weight 1 within a category; "
                "learned from the updates; learned, and led to fall apart into blocks as in TFCL; "
                "learned, with likeness balanced against data shares as in pFedGraph; a "
                "`graph.json`."
            ),
        )
    )
    path: str = setting(
        "",
        help='The file of kind `"file"`. Set exactly then.',
    )
    measure: Literal["cosine", "principal-angles"] = setting(
        "cosine",
        help=(
            "Learned graphs only: compare updates by the cosine of their products, or only the "
            'column spaces of their modules ([methods.md](methods.md), "Graphs").'
        ),
        read_by={"kind": ("similarity", "blocks", "pfedgraph")},
    )
    nearest: Positive = setting(
        3,
        help='Kinds `"similarity"` and `"blocks"`: neighbours that each client chooses.',
        read_by={"kind": ("similarity", "blocks")},
    )
    blocks: Count = setting(
        0,
        help=(
            'Kind `"blocks"`: how many blocks are aimed at, at most half as many as clients. 0 '
            "takes the largest gap between the eigenvalues, up to the root of the clients' number."
        ),
        read_by={"kind": ("blocks",)},
    )
    strength: float = setting(
        1.0,
        ge=0,
        help=('Kind `"blocks"`: the price on weights between blocks. 0 is kind `"similarity"`.'),
        read_by={"kind": ("blocks",)},
    )
    memory: float = setting(
        0.5,
        ge=0,
        lt=1,
        help="Learned graphs: share of the old graph in the new one.",
        read_by={"kind": ("similarity", "blocks", "pfedgraph")},
    )
    warmup_rounds: Count = setting(
        1,
        help=(
            "Learned graphs: rounds in which it is learned and does not act; fewer than "
            "`rounds.count`. A fixed graph acts from round 1."
        ),
        read_by={"kind": ("similarity", "blocks", "pfedgraph")},
    )
    alpha: float = setting(
        0.8,
        gt=0,
        help=(
            'Kind `"pfedgraph"`: weight of the data shares against likeness. Small values leave '
            "each client to itself and its likes."
        ),
        read_by={"kind": ("pfedgraph",)},
    )
    shuffled: bool = setting(
        False,
        help=(
            "A control: the same graph with every client in another one's place. Not with kind "
            '`"uniform"`, which it would not change.'
        ),
    )
    sketch: Count | Literal["auto"] = setting(
        "auto",
        help=(
            "How inner products between the clients' updates are kept, for the learned graph "
            "and the logged disagreement. 0: exactly, in 8 · K² bytes for K clients, and each "
            "round reads all adapters that have trained. m: as estimates from a random "
            "projection of each update to m numbers (4 · m bytes a client), for which a round "
            "reads the adapters of its own clients and their neighbours only; a cosine is then "
            'off by about 1/√m. `"auto"`: 0 up to 512 clients, 1024 above.'
        ),
    )

    @model_validator(mode="after")
    def _file_has_path(self) -> GraphSettings:
        if (self.kind == "file") != bool(self.path):
            raise ValueError("kind = 'file' and path belong together; set both or neither")
        return self

    @model_validator(mode="after")
    def _fixed_graphs_compare_nothing(self) -> GraphSettings:
        if self.measure != "cosine" and self.kind not in (
            "similarity",
            "blocks",
            "pfedgraph",
        ):
            raise ValueError(
                f"measure = {self.measure!r} is for learned graphs, but kind is "
                f"{self.kind!r}; set kind = 'similarity' or leave it out"
            )
        return self
