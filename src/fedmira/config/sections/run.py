"""[rounds], [evaluation], [engine] and [federation]: how a run goes on."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedmira.config.section import Count, Positive, Section, setting

__all__ = ["EngineSettings", "EvaluationSettings", "FederationSettings", "RoundsSettings"]

Temperature = Annotated[float, Field(gt=0)] | Literal["auto"]


class RoundsSettings(Section):
    """[rounds]: how many there are, and who takes part in them."""

    count: Positive = setting(
        20,
        help="Rounds of the run.",
    )
    participation: float = setting(
        1.0,
        gt=0,
        le=1,
        help="Share of the clients drawn each round, at least one client.",
    )
    sampling: Literal["keyed", "shepherd"] = setting(
        "keyed",
        help=(
            "Draw from (seed, round), the number rounded half up; or as FedIT's code does: "
            "numpy seeded with the round's index, the number rounded down, so that every run "
            "draws the same clients."
        ),
    )
    min_replies: Positive = setting(
        1,
        help=(
            "A round with fewer usable replies does not count: the run ends, keeps the adapters "
            "of the round before, and can be resumed. At most the clients of a round."
        ),
    )


class EvaluationSettings(Section):
    """[evaluation]: when and on what clients' adapters are measured."""

    every: Count = setting(
        5,
        help=(
            "Evaluate all clients after every so many rounds; 0 only at the end. The base "
            "(round 0) and the last round are always evaluated."
        ),
    )
    rows: Count = setting(
        0,
        help=(
            "Most test rows and most validation rows of each client that evaluations during the "
            "run measure, drawn once from (seed, client); 0 for all. events.jsonl, rounds.csv, a "
            "client's best round and what observers are told are of these rows in every evaluated "
            "round, the base and the last one too. The losses of the tables at the end, the base's "
            "among them, are of all rows. Of runs whose rows are here."
        ),
    )
    rouge: bool = setting(
        True,
        help=("Generate on the test rows at the end, for Rouge-L and exact match."),
    )
    max_new_tokens: Positive = setting(
        64,
        help="Most tokens of a generated answer.",
    )
    select: Literal["last", "best"] = setting(
        "last",
        help=(
            "Which adapter a client ends with: that of the last round, or that of the evaluated "
            'round with the lowest loss on its own validation rows. `"best"` needs '
            "`data.validation_fraction` above 0."
        ),
    )
    reference_share: float = setting(
        0.0,
        ge=0,
        lt=1,
        help=(
            "Reference Trustable Decoding: this share of each token's probability comes from the "
            "states behind the client's own training rows, in losses and in generated answers "
            "([methods.md](methods.md)). 0: the adapter alone. Of `adapter.kind` lora."
        ),
    )
    reference_neighbours: Positive = setting(
        32,
        help="How many of the nearest stored states count.",
    )
    reference_heads: Positive = setting(
        1,
        help="Parts into which a state is cut, each with neighbours of its own.",
    )
    reference_temperature: Temperature = setting(
        "auto",
        help=(
            'How fast a neighbour\'s weight falls with its squared distance. `"auto"`: the median '
            "squared distance of a stored state to its farthest neighbour that counts."
        ),
    )


class EngineSettings(Section):
    """[engine]: where clients do their work, and with which means."""

    kind: Literal["in-process"] = setting(
        "in-process",
        help=(
            "Where `fedmira run` trains: all clients of a round in one process, on one resident "
            "base. The same config runs on machines of their own with `flwr run` "
            "([federation.md](federation.md))."
        ),
    )
    token_budget: Positive | Literal["auto"] = setting(
        "auto",
        help=(
            "Most token positions in one forward pass; it bounds memory and does not change "
            'results beyond rounding (with dropout, it changes the draws). `"auto"` tries 512 '
            "to 4096 on a CPU (4096 to 65536 elsewhere) for a few seconds of its own clock the "
            "first time a base is used on a machine with about so many clients in a pass, takes "
            "the smallest within 5 % of the fastest, and keeps that in the cache folder unless "
            "memory ended the trial before the third of them; where nothing can be kept there, "
            "and for adapters of other kinds than LoRA, it is 2048 (16384 elsewhere) without a "
            "trial. Free memory bounds it. When memory runs out all the same, it is halved and the "
            "step is made again. A single longer row is computed on its own."
        ),
    )
    workers: Positive | Literal["auto"] = setting(
        "auto",
        help=(
            "Processes that train and measure a run's clients at the same time, each with the base "
            "in shared memory. Clients are dealt out in shares that depend on the run alone, so "
            "that results are the same bits with any number of workers whose `engine.threads` are "
            'the same. `"auto"`: as many as there are free cores, as memory holds and as there are '
            "shares in a round; 1 for runs "
            "of less than about a minute, on a GPU, and in a Python program whose main file would "
            "start the run again. run.json says how many there were."
        ),
    )
    threads: Positive | Literal["auto"] = setting(
        "auto",
        help=(
            'Threads of PyTorch in each process. `"auto"`: 1 for each of several workers; in '
            "one process as many as there are free cores, as threads that wait for a core that "
            "another program keeps busy cost several times what they gain. What "
            "`OMP_NUM_THREADS` says is never exceeded."
        ),
    )
    recompute: bool = setting(
        False,
        help=(
            "Each layer keeps only its input and is computed again in the backward pass "
            "(activation checkpointing): less memory, about a third more time, the same bits."
        ),
    )
    compile: bool = setting(
        False,
        help=(
            "torch.compile fuses the norms and feed-forward blocks that carry no adapter. The "
            "first steps compile (a minute on a CPU, which needs a C++ compiler); results "
            "differ by rounding."
        ),
    )
    apart: bool = setting(
        False,
        help=(
            "Clients take turns, in passes of their own, so that no bit of what one learns depends "
            "on who else trains: `fedmira forget` then trains only those again whom a leaver "
            "reached. Slower where passes hold several clients."
        ),
    )
    wire: Literal["float32", "float16", "int8"] = setting(
        "float32",
        help=(
            'How adapters travel between server and clients. `"float32"`: whole, 4 bytes a '
            "parameter. The others: the first message whole, later ones as changes of what both "
            "ends hold, in 2 bytes a parameter, or 1 byte and a 4-byte scale for each row of A "
            "and column of B; what rounding keeps back is added to the next change "
            '([methods.md](methods.md#messages-in-fewer-bits)). In one process `"float32"` '
            "hands payloads over as they are, and the others write and read every message, so "
            "that losses and bytes are those of machines apart. Not for methods that send a "
            "part of their adapters (`fedit-finetune`, `ditto`, `share-factor`, `fedkseed`, "
            "`fedex`, `flora`, `fedalt`, `feddpa`, `mtlora`, `cgc-lora`, `gossip`, `rolora`, "
            "`fedfomo`), nor for mira's safeguard."
        ),
    )


class FederationSettings(Section):
    """[federation]: a run whose clients are on machines of their own (Flower)."""

    only_where_set: ClassVar[tuple[str, ...]] = ("open", "most_clients")
    """Keys that a written config leaves out while they have their defaults."""

    clients: tuple[str, ...] = setting(
        (),
        help=(
            "Names that may take part; the run begins when all are there. Empty: any names, and "
            "it begins with `federation.nodes` of them."
        ),
    )
    nodes: Positive = setting(
        2,
        help=("How many nodes to wait for where `federation.clients` is empty."),
    )
    wait_s: float = setting(
        120.0,
        ge=0,
        help=(
            "Seconds to wait for nodes before the run begins, and before a round for which "
            "fewer than `rounds.min_replies` of the drawn clients' nodes are connected."
        ),
    )
    reply_s: float = setting(
        3600.0,
        gt=0,
        help=(
            "Seconds to wait for the replies of a round, and of an evaluation; a later reply is "
            "a failure."
        ),
    )
    open: bool | tuple[str, ...] = setting(
        False,
        help=(
            "Who may join between rounds once the run has begun: nobody, anybody with a name that "
            "the run does not know (`true`), or those of a list of names "
            "([federation.md](federation.md#newcomers))."
        ),
    )
    most_clients: Positive = setting(
        100,
        help="With `federation.open`: how many clients the run may have, newcomers among them.",
    )

    @property
    def expected(self) -> tuple[str, ...]:
        """Names of those who are expected to join; none where anybody may, or nobody."""
        return self.open if isinstance(self.open, tuple) else ()

    def may_join(self, name: str) -> bool:
        """Whether a client of this name may come once the run has begun.

        Args:
            name: of the client.
        """
        return self.open if isinstance(self.open, bool) else name in self.open
