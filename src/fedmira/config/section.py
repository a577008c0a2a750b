"""What all sections of a config have in common, and how a setting is declared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

__all__ = ["Count", "Fraction", "Positive", "Section", "readers_of", "setting"]

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section of the config: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def setting(
    default: Any,
    *,
    help: str,  # noqa: A002 (what users of argparse and typer call it)
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    min_length: int | None = None,
    read_by: Mapping[str, tuple[str, ...]] | None = None,
) -> Any:
    """Declares a setting of a section or a method.

    >>> import fedmira
    >>> class Half(fedmira.methods.Local):
    ...     pull: float = fedmira.setting(0.5, ge=0, le=1, help="share of the way to the mean")
    >>> Half(pull=0.25).pull
    0.25

    Args:
        default: the value where nobody sets one.
        help: what it means, in a few words, with its unit; the documentation is made of it.
        ge: the smallest value that is allowed.
        gt: a value that must be exceeded.
        le: the largest value that is allowed.
        lt: a value that must not be reached.
        min_length: of a text.
        read_by: key of the same section -> its values under which this setting is read; all of them
            must hold. None is read always. Elsewhere the setting is an error (`choices`).
    """
    extra: Any = (
        {"read_by": {key: list(values) for key, values in read_by.items()}} if read_by else None
    )
    return Field(
        default,
        ge=ge,
        gt=gt,
        le=le,
        lt=lt,
        min_length=min_length,
        description=help,
        json_schema_extra=extra,
    )


def readers_of(field: FieldInfo) -> Mapping[str, tuple[str, ...]]:
    """What `setting` was told by `read_by`; empty where the setting is read always."""
    extra = field.json_schema_extra
    declared: Any = extra.get("read_by", {}) if isinstance(extra, dict) else {}
    return {key: tuple(values) for key, values in declared.items()}
