"""[algorithm]: the table of methods, and what a method must tell the rest of the config.

A method is a class in a file of its own (`fedmira.methods`), whose fields are its settings. Its
module is imported when the method is named, so that reading names and defaults costs nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from enum import Enum
from functools import cache
from importlib.metadata import EntryPoint
from types import CodeType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    PlainSerializer,
    SerializationInfo,
    ValidationError,
    WithJsonSchema,
)

from fedmira.config.offered import loaded, offered
from fedmira.config.section import Section
from fedmira.errors import ConfigError

__all__ = [
    "DEFAULT",
    "METHODS",
    "OBJECT",
    "AbsentMethod",
    "ChosenMethod",
    "MethodSection",
    "Need",
    "default_method",
    "is_object",
    "method_class",
    "method_names",
    "source_hash",
    "written_form",
]

METHODS: Mapping[str, str] = {
    "local": "fedmira.methods.local:Local",
    "fedavg": "fedmira.methods.fedavg:FedAvg",
    "fedit-finetune": "fedmira.methods.fedit_finetune:FedItFinetune",
    "fedprox": "fedmira.methods.fedprox:FedProx",
    "ditto": "fedmira.methods.ditto:Ditto",
    "share-factor": "fedmira.methods.share_factor:ShareFactor",
    "flexlora": "fedmira.methods.flexlora:FlexLora",
    "hetlora": "fedmira.methods.hetlora:HetLora",
    "fedex": "fedmira.methods.fedex:FedEx",
    "flora": "fedmira.methods.flora:Flora",
    "fedrot": "fedmira.methods.fedrot:FedRot",
    "fedopt": "fedmira.methods.server_optimizer:FedOpt",
    "scaffold": "fedmira.methods.scaffold:Scaffold",
    "fedlease": "fedmira.methods.fedlease:FedLease",
    "fedalt": "fedmira.methods.fedalt:FedAlt",
    "feddpa": "fedmira.methods.feddpa:FedDpa",
    "cgc-lora": "fedmira.methods.cgc_lora:CgcLora",
    "fola": "fedmira.methods.fola:Fola",
    "mtlora": "fedmira.methods.mtlora:MtLora",
    "lora-fair": "fedmira.methods.lora_fair:LoraFair",
    "rolora": "fedmira.methods.rolora:RoLora",
    "fedfomo": "fedmira.methods.fedfomo:FedFomo",
    "fedkseed": "fedmira.methods.fedkseed:FedKSeed",
    "gossip": "fedmira.methods.gossip:Gossip",
    "mira": "fedmira.methods.mira:Mira",
    "two-level": "fedmira.methods.two_level:TwoLevel",
}
"""algorithm.name -> where the class is. A new method is a file and a line here."""

DEFAULT = "two-level"
"""The method of a run that names none."""

ENTRY_POINTS = "fedmira.methods"
"""The group of entry points by which other packages bring methods of their own."""

OBJECT = "object"
"""The value of `method` in the config of a run whose method was given as an object."""


class Need(Enum):
    """What a method needs of the rest of a run."""

    ONE_RANK = "all clients have adapters of one rank"
    FACTORS = "adapters are LoRA's factors A and B"
    FRESH_MOMENTS = "moments of the optimizer are not kept from one round to the next"
    VALIDATION = "clients have validation rows"
    MOVEMENTS = "clients train along random directions"
    PLAIN_STEPS = "a local step is one rate times the gradient"
    GRADIENTS = "local steps follow the gradients of batches"


class MethodSection(Section):
    """The settings of a method, and what it needs.

    Attributes:
        name: what [algorithm] calls it. A class that sets none is called after itself, never after
            the class that it extends.
        title: its name in tables and on pages.
        always_needs: what it needs whatever its settings are -> the reason, as an error gives it;
            "" takes the usual reason.
        partly_sent: whether the receiver has a part of what it is handed, or may not see it, so
            that less travels than is handed over.
        uses_graph: whether its server half looks at the graph of clients; where it does not, a key
            of [graph] is an error.
        traffic_differs: by what the messages of clients of one rank differ in size; "" where they
            do not.
        begins_elsewhere: whether clients begin to train from what they make of the adapter that
            they are sent and of others, so that a reply is not one local training away from it.
        squared_parts: parts of a reply that are sums of squares, whose lengths differ as squares.
        averages: whether `combine` averages whole adapters by `mean_of`, so that [server] may put
            another average in its place. It holds for the class that says so and for those that
            take its `combine` over.
        sends_mean_alone: whether all that clients get of each other is the mean of whole adapters,
            so that noise on that mean hides each client. It holds as `averages` does.
        takes_newcomers: whether its state can take clients that come once a run has begun, as
            `joined` does it. It holds for the class that says so and for those that take its
            `initial_state` over.
        moves_towards: whether it moves clients' adapters towards those of others, by
            `mixing_matrix`.
        searched: its main settings, which `fedmira tune` searches beside the learning rate where
            no space is given -> the values that are tried with the one it has.
        controls: what could explain its gain away, for `fedmira compare --controls`: a name -> the
            settings (dotted keys) that make it. "alone" shares nothing and does all else.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    always_needs: ClassVar[Mapping[Need, str]] = {}
    partly_sent: ClassVar[bool] = False
    uses_graph: ClassVar[bool] = True
    traffic_differs: ClassVar[str] = ""
    begins_elsewhere: ClassVar[bool] = False
    squared_parts: ClassVar[tuple[str, ...]] = ()
    averages: ClassVar[bool] = False
    sends_mean_alone: ClassVar[bool] = False
    takes_newcomers: ClassVar[bool] = False
    moves_towards: ClassVar[bool] = False
    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    controls: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    if not TYPE_CHECKING:  # type checkers know the settings as pydantic's arguments

        def __init__(self, /, **settings: Any) -> None:
            """Make a method of its settings.

            Raises:
                ConfigError: a setting is wrong or unknown.
            """
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise ConfigError(_problems_of(type(self), error)) from error

        # So that a config is validated without this method: its errors name the place in it.
        __init__.__pydantic_base_init__ = True

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Names a class that does not name itself."""
        super().__pydantic_init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = re.sub(
                r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__
            ).lower()
        if "title" not in vars(cls):
            cls.title = cls.__name__
        if "combine" in vars(cls):
            cls.averages = bool(vars(cls).get("averages", False))
            cls.sends_mean_alone = bool(vars(cls).get("sends_mean_alone", False))
        if "initial_state" in vars(cls):
            cls.takes_newcomers = bool(vars(cls).get("takes_newcomers", False))

    @property
    def needs(self) -> Mapping[Need, str]:
        """What it needs with these settings -> the reason."""
        return self.always_needs

    def reason(self, need: Need) -> str:
        """Why it needs that, in words that can follow "does not go with"; "" where it does not."""
        if need not in self.needs:
            return ""
        return self.needs[need] or _USUAL_REASONS[need].format(name=self.name)


def _problems_of(kind: type[MethodSection], error: ValidationError) -> list[str]:
    """What is wrong with the settings of an object, one sentence each."""
    known = ", ".join(kind.model_fields) or "none"
    problems = []
    for found in error.errors():
        key, value = ".".join(map(str, found["loc"])), found["input"]
        said = found["msg"].removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            problems.append(f"{kind.name}: {key} is no setting of it; its settings are {known}")
        elif key:
            problems.append(f"{kind.name}: {key} = {value!r}: {said[:1].lower()}{said[1:]}")
        else:
            problems.append(f"{kind.name}: {said}")
    return problems


_USUAL_REASONS = {
    Need.ONE_RANK: "algorithm.name = {name!r}, which averages factor by factor",
    Need.FACTORS: (
        "algorithm.name = {name!r}, which works on LoRA's factors A and B; set adapter.kind = "
        "'lora', or algorithm.name to 'fedavg', 'fedprox', 'ditto', 'fedit-finetune' or 'local'"
    ),
    Need.FRESH_MOMENTS: (
        "algorithm.name = {name!r}, whose adapters are not the ones that the kept moments belong "
        "to; set local.optimizer_state = 'fresh'"
    ),
    Need.VALIDATION: "algorithm.name = {name!r}",
    Need.MOVEMENTS: "algorithm.name = {name!r}",
    Need.GRADIENTS: "algorithm.name = {name!r}, which adds up squared gradients",
    Need.PLAIN_STEPS: "algorithm.name = {name!r}, which reads the mean gradient off the way it led",
}


class AbsentMethod(MethodSection):
    """What a run folder says of a method that was given as an object, which a file cannot hold.

    Attributes:
        written: the section as it was read.
    """

    written: dict[str, Any]

    @property
    def called(self) -> str:
        """The name of the method, "" where the section gives none."""
        return str(self.written.get("name", ""))

    def differs(self, method: MethodSection) -> str:
        """How a method is another one than this; "" where it is the same.

        Args:
            method: an object.
        """
        present = written_form(method)
        keys = [
            key for key in {**self.written, **present} if self.written.get(key) != present.get(key)
        ]
        if not keys:
            return ""
        told = "; ".join(
            f"{key} was {self.written.get(key)!r} and is {present.get(key)!r}" for key in keys
        )
        return (
            f"algorithm: this run was made with the object {self.called!r}, and the one that is "
            f"given is another: {told}; give the object that it was made with, or begin a new run"
        )

    def problem(self) -> str:
        """What to do about it."""
        return (
            f"algorithm: this run was made with the object {self.called!r} "
            f"({self.written.get('class')}) as its method, which no file holds; give the object: "
            "fedmira.run(method=..., resume=True)"
        )


@cache
def _offered() -> dict[str, EntryPoint]:
    """Name -> the method that another package offers."""
    return offered(ENTRY_POINTS, "method", METHODS)


def method_names() -> tuple[str, ...]:
    """All names that [algorithm] knows: ours in the table's order, then other packages'."""
    return (*METHODS, *_offered())


def method_class(name: str) -> type[MethodSection]:
    """The class of a method.

    Args:
        name: one of `method_names`.

    Raises:
        ConfigError: another package offers something that is no method, or goes by another name.
    """
    found: Any = loaded(name, METHODS, {} if name in METHODS else _offered())
    if not (isinstance(found, type) and issubclass(found, MethodSection) and found.name == name):
        raise ConfigError(
            f"method {name!r}: {found!r} is no class of fedmira.methods.Method with name = {name!r}"
        )
    return found


def default_method() -> MethodSection:
    """The method of a run that names none."""
    return method_class(DEFAULT)()


def is_object(method: MethodSection) -> bool:
    """Whether a method is known by itself alone, and not by its name."""
    return method.name not in method_names() or method_class(method.name) is not type(method)


def source_hash(of: type) -> str:
    """SHA-256 of a class's source text, or of its functions' code where the text is not at hand."""
    try:
        text = inspect.getsource(of)
    except (OSError, TypeError):
        functions = sorted(
            (name, _code_of(value.__code__))
            for name, value in vars(of).items()
            if inspect.isfunction(value)
        )
        text = repr(functions)
    return hashlib.sha256(text.encode()).hexdigest()


def _code_of(code: CodeType) -> str:
    constants = [
        _code_of(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts
    ]
    return repr((code.co_code.hex(), constants, code.co_names, code.co_varnames))


def _read(value: Any) -> Any:
    """A method, from an object or from a section that names one.

    Raises:
        ValueError: the section names none, or an unknown one.
    """
    if isinstance(value, MethodSection) or not isinstance(value, Mapping):
        return value
    if value.get("method") == OBJECT:
        return AbsentMethod(written=dict(value))
    name = value.get("name", DEFAULT)
    if name not in method_names():
        raise ValueError(f"unknown algorithm {name!r}")
    return method_class(name).model_validate(
        {key: inner for key, inner in value.items() if key != "name"}
    )


def _write(method: MethodSection, info: SerializationInfo) -> dict[str, Any]:
    """The section as config.toml has it."""
    return written_form(
        method,
        mode="json" if info.mode == "json" else "python",
        exclude_unset=info.exclude_unset,
        exclude_none=info.exclude_none,
    )


def written_form(
    method: MethodSection,
    *,
    mode: Literal["json", "python"] = "json",
    exclude_unset: bool = False,
    exclude_none: bool = True,
) -> dict[str, Any]:
    """The section of a method as config.toml has it.

    Args:
        method: of an object the class and a hash of its source stand beside the settings.
        mode: pydantic's.
        exclude_unset: leaves out settings that nobody set.
        exclude_none: leaves out settings that are None.
    """
    if isinstance(method, AbsentMethod):
        return dict(method.written)
    settings = method.model_dump(mode=mode, exclude_unset=exclude_unset, exclude_none=exclude_none)
    if not is_object(method):
        return {"name": method.name, **settings}
    of = type(method)
    about = {"class": f"{of.__module__}.{of.__qualname__}", "source_sha256": source_hash(of)}
    return {"method": OBJECT, "name": method.name, **about, **settings}


ChosenMethod = Annotated[
    MethodSection,
    BeforeValidator(_read),
    PlainSerializer(_write, return_type=dict),
    WithJsonSchema({"type": "object"}),
]
"""The type of `Config.algorithm`."""
