"""The base of every part of a configuration: immutable, and all its problems told at once."""

from __future__ import annotations

import difflib
import functools
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Self, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from fsm_replication.errors import ConfigError, redact

__all__ = ("Location", "Model", "key_text", "over")

_T = TypeVar("_T")
Location = tuple[int | str, ...]
_MESSAGES: Final = {
    "missing": "this key is required",
    "model_type": "a mapping of keys to values is expected",
    "model_attributes_type": "a mapping of keys to values is expected",
    "dict_type": "a mapping of keys to values is expected",
    "invalid_key": "a key is text",
    "bool_type": "true or false is expected",
    "int_type": "a whole number is expected",
    "sequence_type": "a list is expected",
    "sequence_str": "a list is expected",
    "tuple_type": "a list is expected",
}


def _problem(type_: str, location: Location, message: str) -> InitErrorDetails:
    """Return a problem in pydantic's form, without the input that caused it."""
    custom = PydanticCustomError(cast("Any", type_), "{message}", {"message": message})
    return InitErrorDetails(type=custom, loc=location, input=None)


def _told(model: type[BaseModel], error: ValidationError) -> Iterator[str]:
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        path, message = _path(detail["loc"]), detail["msg"]
        if detail["type"] == "extra_forbidden":
            message = f"unknown key{_did_you_mean(model, detail['loc'])}"
        yield f"{path}: {_MESSAGES.get(detail['type'], message)}"


def _path(location: Location) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{key_text(part)}"
    return text.lstrip(".") or "configuration"


def key_text(key: str) -> str:
    """Return a key as it may stand in a message: short, and without credentials."""
    if re.fullmatch(r"[\w-]{1,80}", key):
        return key
    # Credentials are masked before the text is cut, or half of a URL would pass for no URL.
    masked = repr(redact(key))
    return masked if len(masked) <= 80 else f"{masked[:76]}...'"


def _did_you_mean(model: type[BaseModel], location: Location) -> str:
    """Return a guess what a key was meant to be: a name alike, or the place where it belongs."""
    for part in location[:-1]:
        if isinstance(part, str):
            model = _submodel(model, part) or model
    key = str(location[-1]).lower().replace("-", "_")
    near = difflib.get_close_matches(key, list(model.model_fields), 1)
    for name in model.model_fields:
        inner = _submodel(model, name)
        if inner is not None and key in inner.model_fields:
            near.append(f"{name}.{key}")
    return f"; did you mean {near[0]!r}?" if near else ""


def _submodel(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    here = model.model_fields[name].annotation if name in model.model_fields else None
    for candidate in (here, *typing.get_args(here)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _reporting(model: type[BaseModel], make: Callable[[], _T]) -> _T:
    """Return what ``make`` builds.

    :raises ConfigError: instead of pydantic's error.
    """
    try:
        return make()
    except ValidationError as error:
        problems = tuple(_told(model, error))
    # Raised out here, so that no pydantic error hangs on to ours as its context.
    raise ConfigError(problems)


if TYPE_CHECKING:
    _Base = BaseModel
else:

    class _Reporting(type(BaseModel)):
        """Turns pydantic's error into ours, where a model is built and not where one is nested."""

        def __call__(cls, /, **data: Any) -> Any:
            make = super().__call__
            return _reporting(cls, lambda: make(**data))

    class _Base(BaseModel, metaclass=_Reporting):
        """What type checkers need not see: to them a model is built like any other."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name in type(self).model_fields:
                raise ConfigError([f"{name}: cannot be set; use model_copy(update=...)"])
            super().__setattr__(name, value)

        def __delattr__(self, name: str) -> None:
            if name in type(self).model_fields:
                raise ConfigError([f"{name}: cannot be deleted"])
            super().__delattr__(name)

        @classmethod
        def model_validate(cls, obj: Any, **options: Any) -> Self:
            make = super().model_validate
            return _reporting(cls, lambda: make(obj, **options))

        @classmethod
        def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
            make = super().model_validate_json
            return _reporting(cls, lambda: make(json_data, **options))

        @classmethod
        def model_validate_strings(cls, obj: Any, **options: Any) -> Self:
            make = super().model_validate_strings
            return _reporting(cls, lambda: make(obj, **options))


class Model(_Base):
    """Immutable, strict about keys; any way to build a wrong one raises ConfigError."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="wrap")
    @classmethod
    def _judge(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Look at each field, and then at what can be judged together, even if a field is wrong.

        pydantic's own model validators do not run where a field failed.
        """
        if isinstance(data, cls):
            return data
        problems: list[InitErrorDetails] = []
        built: Self | None = None
        try:
            built = handler(data)
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_input=False):
                message = detail["msg"].removeprefix("Value error, ")
                problems.append(_problem(detail["type"], detail["loc"], message))
        if isinstance(data, Mapping):
            problems += [_problem("together", where, why) for where, why in cls._together(data)]
        if built is None or problems:
            raise ValidationError.from_exception_data(cls.__name__, problems, hide_input=True)
        built._notice(data)
        return built

    @classmethod
    def _together(cls, _data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
        """Yield where and why fields do not fit each other."""
        yield from ()

    def _notice(self, data: Any) -> None:
        """Note what is odd about the data, though no problem."""

    @classmethod
    def _known(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the fields that are right in themselves."""
        known = {name: field.default for name, field in cls.model_fields.items()}
        for name in known.keys() & data.keys():
            try:
                known[name] = _adapter(cls, name).validate_python(data[name])
            except ValidationError:
                del known[name]
        return known

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields changed, checked like a new one.

        ``deep`` changes nothing, since all of it is immutable.

        :raises ConfigError: if a change is wrong.
        """
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**kept, **(update or {})})


@functools.cache
def _adapter(model: type[BaseModel], name: str) -> TypeAdapter[Any]:
    """Return what checks one field by itself."""
    form: Any = model.model_fields[name].annotation
    for mark in model.model_fields[name].metadata:
        form = Annotated[form, mark]
    return TypeAdapter(form)


def over(known: Mapping[str, Any], low: str, high: str) -> Iterator[tuple[Location, str]]:
    """Yield a problem where the field ``low`` is over the field ``high``."""
    if low in known and high in known and known[low] > known[high]:
        yield (high,), f"it is {known[high]}, below {low}, which is {known[low]}"
