"""How errors name the fields of a body: their paths, and what validators refuse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from reprlib import Repr
from typing import Any, get_args

from pydantic import BaseModel, Discriminator

_SHORT = Repr()  # writes only the beginning of a large value
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def short(value: Any) -> str:
    """The beginning of a value, for errors."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def path_of(steps: Iterable[str | int]) -> str:
    """Fields and positions as one name: messages[0].content[2].type."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return path.removeprefix(".")


def one_of(words: Iterable[str]) -> str:
    """The accepted words, for errors."""
    listed = [repr(word) for word in words]
    return f"one of {', '.join(listed)}" if len(listed) > 1 else "".join(listed)


def words(*lines: str) -> frozenset[str]:
    """The words of some lines."""
    return frozenset(word for line in lines for word in line.split())


class FieldError(ValueError):
    """A field that a validator refuses.

    path: from the object that is validated to the field. problem: continues the field's name in the message.
    """

    def __init__(self, *path: str | int, problem: str, code: str = "invalid_value") -> None:
        super().__init__(path_of(path) + problem)
        self.path, self.problem, self.code = path, problem, code


def wrong(*path: str | int, got: Any, expected: str) -> FieldError:
    """The error of a field with a value that is not accepted."""
    return FieldError(*path, problem=f": got {short(got)}; expected {expected}")


def missing(*path: str | int, why: str = "") -> FieldError:
    """The error of a field that is missing. why: what it depends on."""
    problem = f" is missing; {why}" if why else " is missing"
    return FieldError(*path, problem=problem, code="missing_required_parameter")


HINT = "hint:"
UNKNOWN_TYPE = "unknown_type"  # pydantic's type of the errors of `by_type`


class _ByType(Discriminator):
    """Hashable, as parts of a union must be, although its context is not."""

    __hash__ = object.__hash__


def by_type(*classes: type[BaseModel], hints: Mapping[str, str] | None = None) -> Discriminator:
    """Chooses the class of an object by its `type`. Each class is tagged with its own name.

    hints: reasons why types that clients use elsewhere are not accepted.
    """
    tags = {
        kind: each.__name__ for each in classes for kind in get_args(each.model_fields["type"].annotation)
    }

    def choose(value: Any) -> str | None:
        if isinstance(value, BaseModel):
            return type(value).__name__
        kind = value.get("type") if isinstance(value, dict) else None
        return tags.get(kind) if isinstance(kind, str) else None

    context = {f"{HINT}{kind}": why for kind, why in (hints or {}).items()}
    context["accepted"] = one_of(tags)
    return _ByType(choose, UNKNOWN_TYPE, "no known type", dict(context))


TEXT_ONLY = dict.fromkeys(
    ("image", "image_url", "input_image", "document", "file", "input_file", "input_audio", "video_url"),
    "the model reads text only; the vision part of multimodal models is not served",
)
