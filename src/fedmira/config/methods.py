"""[algorithm]: one class of settings per method, told apart by its name."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from fedmira.config.section import (
    Count,
    Fraction,
    Positive,
    Section,
)

__all__ = [
    "AlgorithmSettings",
    "DittoSettings",
    "FactorMethodSettings",
    "FedAltSettings",
    "FedAvgSettings",
    "FedExSettings",
    "FedFomoSettings",
    "FedItFinetuneSettings",
    "FedKSeedSettings",
    "FedProxSettings",
    "FlexLoraSettings",
    "HetLoraSettings",
    "LocalOnlySettings",
    "MethodSettings",
    "MiraSettings",
    "ShareFactorSettings",
]


class MethodSettings(Section):
    """What the classes of [algorithm] have in common.

    Attributes:
        partly_sent: whether the receiver has a part of what it is handed, or may not see it, so
            that less travels than is handed over.
    """

    partly_sent: ClassVar[bool] = False

    @property
    def kept_moments_problem(self) -> str:
        """Why moments that a client kept from its last round would belong to something else in the next one; "" where they do not."""
        return ""

    @property
    def factors_problem(self) -> str:
        """What it does with LoRA's factors, so that no other kind of adapter will do.

        "" where any will.
        """
        return ""

    @property
    def sends_movements(self) -> bool:
        """Whether clients send their steps as seeds and coefficients, and so must step along random directions."""
        return False

    @property
    def needs_validation(self) -> str:
        """The setting by which clients choose by their validation rows; "" where they do not."""
        return ""


class FactorMethodSettings(MethodSettings):
    """Methods that work on the factors A and B of LoRA."""

    name: str

    @property
    def factors_problem(self) -> str:
        """They have nothing to work on otherwise."""
        return (
            f"algorithm.name = {self.name!r}, which works on LoRA's factors A and B; set "
            "adapter.kind = 'lora', or algorithm.name to "
            "'fedavg', 'fedprox', 'ditto', 'fedit-finetune' or 'local'"
        )


class LocalOnlySettings(MethodSettings):
    """[algorithm] name = "local": every client alone."""

    name: Literal["local"]


class FedAvgSettings(MethodSettings):
    """[algorithm] name = "fedavg": one shared adapter, averaged by training rows.

    FedIT when the adapter is LoRA.
    """

    name: Literal["fedavg"]


class MiraSettings(MethodSettings):
    """[algorithm] name = "mira".

    Attributes:
        coupling: kappa = gamma * max degree, 0..1; 0 is local training.
        server_step: gamma = eta * lambda itself (paper eq. 8) in place of `coupling`.
        size_scale: kappa_k = kappa * size_scale / (size_scale + rows_k); 0 switches it off.
        neighbours: who pulls: clients of this round ("fresh"), those with an unbiased factor
            ("rescaled"), all that ever trained ("stale").
        space: mix the products B A exactly ("product") or the factors A and B one by one as in the
            paper ("factor").
        safeguard: each client chooses by its own validation rows how much of the server's pull it
            keeps: all, half or nothing.
    """

    name: Literal["mira"] = "mira"
    coupling: Fraction = 1.0
    server_step: float | None = Field(None, ge=0)
    size_scale: float = Field(64.0, ge=0)
    neighbours: Literal["fresh", "rescaled", "stale"] = "stale"
    space: Literal["product", "factor"] = "product"
    safeguard: bool = False

    @model_validator(mode="after")
    def _one_strength(self) -> MiraSettings:
        if self.server_step is not None and "coupling" in self.model_fields_set:
            raise ValueError(
                "coupling and server_step say the same thing in two ways; set one of them"
            )
        return self

    @model_validator(mode="after")
    def _something_to_decline(self) -> MiraSettings:
        if (
            self.safeguard
            and (self.coupling if self.server_step is None else self.server_step) == 0
        ):
            raise ValueError(
                "safeguard = true, but with coupling or server_step 0 nobody is pulled; "
                "set safeguard = false, or a strength above 0"
            )
        return self

    @property
    def kept_moments_problem(self) -> str:
        """Products that are mixed are factored anew."""
        if self.space == "factor":
            return ""
        return (
            "algorithm.space = 'product': mixed products get new factors, to whose entries "
            "the old moments do not belong; set "
            "algorithm.space = 'factor' or local.optimizer_state = 'fresh'"
        )

    @property
    def factors_problem(self) -> str:
        """Products are of two factors."""
        if self.space == "factor":
            return ""
        return (
            "algorithm.space = 'product', which mixes products of LoRA's factors; set "
            "algorithm.space = 'factor', which mixes the adapters "
            "entry by entry, or adapter.kind = 'lora'"
        )

    @property
    def needs_validation(self) -> str:
        """The safeguard does."""
        return "algorithm.safeguard = true" if self.safeguard else ""


class FedProxSettings(MethodSettings):
    """[algorithm] name = "fedprox": FedAvg whose clients are held near the shared adapter.

    Attributes:
        proximal: mu; 0 is FedAvg.
    """

    name: Literal["fedprox"]
    proximal: float = Field(0.01, ge=0)


class FedItFinetuneSettings(MethodSettings):
    """[algorithm] name = "fedit-finetune".

    FedIT, then every client on its own from the shared adapter.

    Attributes:
        finetune_share: share of the rounds for fine-tuning, rounded down; each part has at least
            one round.
    """

    partly_sent: ClassVar[bool] = True
    name: Literal["fedit-finetune"]
    finetune_share: float = Field(0.5, gt=0, lt=1)


class DittoSettings(MethodSettings):
    """[algorithm] name = "ditto": a shared adapter and personal ones that are pulled towards it.

    A client's rounds take turns.

    Attributes:
        personal_pull: lambda; 0 trains the personal adapters alone.
    """

    partly_sent: ClassVar[bool] = True
    name: Literal["ditto"]
    personal_pull: float = Field(0.1, ge=0)

    @property
    def kept_moments_problem(self) -> str:
        """Two adapters take turns."""
        return (
            "algorithm.name = 'ditto': the rounds of a client take turns between two "
            "adapters, and the moments of one do not belong to "
            "the other; set local.optimizer_state = 'fresh'"
        )


class ShareFactorSettings(FactorMethodSettings):
    """[algorithm] name = "share-factor": one LoRA factor is common to all clients.

    Attributes:
        shared_factor: "A" is FedSA-LoRA.
        private_factor: the other one is trained by its client, or frozen at the common start ("B"
            shared and A frozen is FFA-LoRA).
    """

    partly_sent: ClassVar[bool] = True
    name: Literal["share-factor"]
    shared_factor: Literal["A", "B"] = "A"
    private_factor: Literal["trained", "frozen"] = "trained"

    @model_validator(mode="after")
    def _something_learns(self) -> ShareFactorSettings:
        if self.shared_factor == "A" and self.private_factor == "frozen":
            raise ValueError(
                "B is zero at the start, so a frozen B learns nothing; set shared_factor = "
                "'B' or private_factor = 'trained'"
            )
        return self


class FedKSeedSettings(MethodSettings):
    """[algorithm] name = "fedkseed": one shared adapter.

    Clients send seeds and a number for each.
    """

    partly_sent: ClassVar[bool] = True
    name: Literal["fedkseed"]

    @property
    def sends_movements(self) -> bool:
        """They do."""
        return True


class FlexLoraSettings(FactorMethodSettings):
    """[algorithm] name = "flexlora".

    One shared update, averaged as a product and cut to each client's rank.
    """

    name: Literal["flexlora"]

    @property
    def kept_moments_problem(self) -> str:
        """The averaged product is factored anew."""
        return (
            "algorithm.name = 'flexlora': the averaged product gets new factors, to whose "
            "entries the old moments do not belong; set "
            "local.optimizer_state = 'fresh'"
        )


class HetLoraSettings(FactorMethodSettings):
    """[algorithm] name = "hetlora".

    Shared factors, padded with zeros to the largest rank and cut to each client's.
    """

    name: Literal["hetlora"]


class FedExSettings(FactorMethodSettings):
    """[algorithm] name = "fedex": FedAvg over factors.

    What their mean misses is kept in a frozen part of the adapter.

    Attributes:
        trained_rank: directions of an adapter that are trained, the others are frozen; 0 takes
            half.
    """

    partly_sent: ClassVar[bool] = True
    name: Literal["fedex"]
    trained_rank: Count = 0


class FedAltSettings(FactorMethodSettings):
    """[algorithm] name = "fedalt".

    An own part that is trained beside a frozen one of the rest of the world.

    Attributes:
        trained_rank: directions of an adapter that are trained, the others are frozen; 0 takes
            half.
        rest_share: rho, the weight of the rest of the world.
    """

    partly_sent: ClassVar[bool] = True
    name: Literal["fedalt"]
    trained_rank: Count = 0
    rest_share: float = Field(0.5, ge=0)


class FedFomoSettings(FactorMethodSettings):
    """[algorithm] name = "fedfomo".

    Own adapters, blended with those of others that are better on the client's validation rows.

    Attributes:
        candidates: most adapters of others that a client is sent in a round.
    """

    partly_sent: ClassVar[bool] = True
    name: Literal["fedfomo"]
    candidates: Positive = 5

    @property
    def kept_moments_problem(self) -> str:
        """Blended updates are factored anew."""
        return (
            "algorithm.name = 'fedfomo': blended updates get new factors, to whose entries "
            "the old moments do not belong; set "
            "local.optimizer_state = 'fresh'"
        )

    @property
    def needs_validation(self) -> str:
        """Weights are measured on them."""
        return "algorithm.name = 'fedfomo'"


AlgorithmSettings = Annotated[
    LocalOnlySettings
    | FedAvgSettings
    | FedItFinetuneSettings
    | FedProxSettings
    | DittoSettings
    | ShareFactorSettings
    | FlexLoraSettings
    | HetLoraSettings
    | FedExSettings
    | FedAltSettings
    | FedFomoSettings
    | FedKSeedSettings
    | MiraSettings,
    Field(discriminator="name"),
]
