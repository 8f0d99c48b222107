"""The settings that a sweep tries, from ``--over table.key=value,value``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vaefeat.config import ModelConfig, TrainConfig
from vaefeat.errors import ConfigError
from vaefeat.settings import unknown_name, with_overrides

__all__ = ["TRIALS_FOLDER", "choose_settings", "read_space", "with_settings"]

#: Inside the sweep's folder, a folder for each trial.
TRIALS_FOLDER = "trials"


def read_space(over: Sequence[str]) -> dict[str, list[Any]]:
    """Read what to try.

    Parameters
    ----------
    over : sequence of str
        Each a key of a run's configuration and its values: ``model.latent_dim=8,16``, ``train.objective=elbo,iwae``,
        ``model.hidden_dims=[64],[256,256]``, ``effort=fast,best``.

    Returns
    -------
    dict of str to list
        Values by key, such as ``model.latent_dim``.

    Raises
    ------
    ConfigError
        An unknown key (the nearest is named), one that comes twice, one without values or with the same value twice.
    """
    known = [
        "preset",
        "effort",
        *(f"model.{key}" for key in ModelConfig().to_dict()),
        *(f"train.{key}" for key in TrainConfig().to_dict()),
    ]
    if not over:
        raise ConfigError(
            "got nothing to sweep over, wanted --over key=value,value, such as --over model.latent_dim=8,16"
        )
    space: dict[str, list[Any]] = {}
    for text in over:
        key, equals, listed = text.partition("=")
        if not equals or not listed:
            raise ConfigError(f"got --over {text!r}, wanted key=value,value, such as --over model.latent_dim=8,16")
        if key not in known:
            raise unknown_name("--over key", key, known)
        if key in space:
            raise ConfigError(f"got --over {key} twice, wanted all its values in one: --over {key}=1,2,3")
        values = _values(listed)
        if repeated := [value for place, value in enumerate(values) if value in values[:place]]:
            raise ConfigError(f"got --over {text!r} with the value {repeated[0]!r} twice, wanted each once")
        space[key] = values
    return space


def choose_settings(space: Mapping[str, Sequence[Any]], *, trials: int | None, seed: int) -> list[dict[str, Any]]:
    """Give all combinations, or so many of them at random.

    Parameters
    ----------
    space : mapping of str to sequence
    trials : int, optional
        All when None.
    seed : int

    Returns
    -------
    list of dict
        Values by key, in the order of the combinations.

    Raises
    ------
    ConfigError
        More trials than combinations.
    """
    every = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    if trials is None:
        return every
    if not 1 <= trials <= len(every):
        raise ConfigError(f"got --trials {trials}, wanted 1 to {len(every)}, of which there are combinations")
    chosen = np.random.default_rng(seed).choice(len(every), trials, replace=False)
    return [every[place] for place in sorted(chosen)]


def with_settings(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings by key, such as ``model.latent_dim``, over a configuration's tables."""
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for path, value in settings.items():
        *table, key = path.split(".")
        (merged[table[0]] if table else merged)[key] = value
    return merged


def _values(listed: str) -> list[Any]:
    read = with_overrides({}, [f"values=[{listed}]"])["values"]
    # Names without quotes are no TOML.
    return (
        read
        if isinstance(read, list)
        else [with_overrides({}, [f"value={text}"])["value"] for text in listed.split(",")]
    )
