"""Groups of settings from and to plain values, and the checks that their fields go through."""

from __future__ import annotations

import copy
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, Self

import numpy as np

from vaefeat.errors import ConfigError

__all__ = [
    "Settings",
    "check_bool",
    "check_choice",
    "check_columns",
    "check_int",
    "check_number",
    "check_text",
    "check_tuple",
    "plain_value",
    "refuse_other_model",
    "unknown_name",
    "with_overrides",
]

#: Known names beside one that was probably meant.
_MOST_LISTED = 15


def unknown_name(what: str, got: object, known: Iterable[str]) -> ConfigError:
    """Make the error for a name that is not known: it names the nearest, and lists what is known, if that is short."""
    names = sorted(known)
    near = difflib.get_close_matches(str(got), names, n=1)
    if near and len(names) > _MOST_LISTED:
        return ConfigError(f"got {what} {got!r}; did you mean {near[0]!r}?")
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"got {what} {got!r}; {hint}known: {', '.join(names)}")


class Settings:
    """From and to plain dictionaries, refusing what is not known."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values, as JSON and TOML give them.

        Raises
        ------
        ConfigError
            An unknown key (the nearest is named) or a value that is out of range.
        """
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # every subclass is a dataclass
        for key in values:
            if key not in known:
                raise unknown_name(f"{cls.__name__} key", key, known)
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; :meth:`from_dict` gives the same settings back."""
        plain = asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def plain_value(value: Any) -> Any:
    """Turn NumPy's numbers and arrays, as grids have, into Python's numbers and tuples; leave the rest."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(plain_value, value)) if isinstance(value, tuple | list) else value


def with_overrides(values: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Lay ``table.key=value`` texts over nested plain values, as ``--set`` on a command line gives them.

    Parameters
    ----------
    values : mapping
        Nested tables, as TOML gives them; not changed.
    assignments : iterable of str
        The value is read as TOML writes it; what is not TOML is a text.

    Raises
    ------
    ConfigError
        An assignment without a key or an equals sign, or into something that is not a table.
    """
    merged = copy.deepcopy(dict(values))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"got --set {assignment!r}, wanted key=value, for instance --set train.max_epochs=5")
        *tables, key = path.split(".")
        inner = merged
        for table in tables:
            inner = inner.setdefault(table, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"got --set {assignment!r}, but {table!r} is a value, not a table")
        inner[key] = _toml_value(text)
    return merged


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def refuse_other_model(has: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to go on training with settings that weights depend on and that are not theirs.

    Raises
    ------
    ConfigError
        Names the first setting that differs.
    """
    for name in asked:
        if has.get(name) != asked[name]:
            raise ConfigError(
                f"got {name}={asked[name]!r}, but the weights to go on from have {name}={has.get(name)!r}; set it "
                "back, or begin anew (warm_start=False)"
            )


def check_text(name: str, value: object) -> None:
    """Refuse what is no text."""
    if not isinstance(value, str):
        raise ConfigError(f"got {name}={value!r}, wanted a name in quotes")


def check_tuple(name: str, value: object) -> tuple[object, ...]:
    """Refuse what is no tuple, or an empty one."""
    if not isinstance(value, tuple) or not value:
        raise ConfigError(f"got {name}={value!r}, wanted a tuple of at least one width, such as (256,)")
    return value


def check_columns(columns: object, optional: object) -> None:
    """Refuse what is no description of a table's columns."""
    for name, value in (("columns", columns), ("optional_columns", optional)):
        if not isinstance(value, tuple):
            raise ConfigError(f"got {name}={value!r}, wanted a tuple of whole numbers, () for none")
        for number in value:
            check_int(f"every number in {name}", number, at_least=0)
    if not set(optional) <= set(range(len(columns))):  # type: ignore[arg-type, call-overload]  # both are tuples now
        raise ConfigError(f"got optional_columns={optional!r} of {len(columns)} columns")  # type: ignore[arg-type]


def check_int(name: str, value: object, *, at_least: int) -> None:
    """Refuse what is no whole number, or too small a one."""
    # bool is an int for Python, but nobody means latent_dim=True.
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(f"got {name}={value!r}, wanted a whole number of at least {at_least}")


def check_number(
    name: str,
    value: object,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Refuse what is no finite number within the bounds."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (at_least <= value <= at_most and above < value < below):  # type: ignore[operator]
        lower = [f"{at_least:g} <= " * (at_least > -math.inf), f"{above:g} < " * (above > -math.inf)]
        upper = [f" <= {at_most:g}" * (at_most < math.inf), f" < {below:g}" * (below < math.inf)]
        raise ConfigError(f"got {name}={value!r}, wanted a number with {''.join(lower)}{name}{''.join(upper)}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a name that is none of `choices`."""
    check_text(name, value)
    if value not in (known := tuple(choices)):
        raise unknown_name(name, value, known)


def check_bool(name: str, value: object) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise ConfigError(f"got {name}={value!r}, wanted true or false")
