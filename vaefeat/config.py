"""What is built and how it is trained: two frozen groups of settings that JSON and TOML can hold.

Names of posteriors, priors, likelihoods and objectives are checked where their classes are registered, when the model
is built; everything that can be judged by itself is checked here, at construction.
"""

from __future__ import annotations

import copy
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from vaefeat.errors import ConfigError

__all__ = ["ModelConfig", "Settings", "TrainConfig", "unknown_name", "with_overrides"]


def unknown_name(what: str, got: object, known: Iterable[str]) -> ConfigError:
    """Make the error for a name that is not known: it lists what is, and the nearest first."""
    names = sorted(known)
    near = difflib.get_close_matches(str(got), names, n=1)
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


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """Architecture and distributions of a variational auto-encoder.

    Parameters
    ----------
    latent_dim : int
        Number of latent variables; the width of the exported mean.
    network : {"auto", "mlp", "conv"}
        ``auto`` takes ``conv`` for images of at least 8 by 8 pixels, else ``mlp``.
    hidden_dims : tuple of int
        Widths of the hidden layers: all of an MLP, or those after the convolutions.
    channels : tuple of int
        Channels of the convolutions; each halves height and width.
    posterior : str
        q(z|x), a name in :data:`vaefeat.model.posteriors.POSTERIORS`.
    prior : str
        p(z), a name in :data:`vaefeat.model.priors.PRIORS`.
    likelihood : str
        p(x|z), a name in :data:`vaefeat.model.likelihoods.LIKELIHOODS`, or ``auto``: Bernoulli for images, Gaussian for
        tables.
    gaussian_std : float or None
        Standard deviation of a Gaussian likelihood, in the scale of the network's input; None learns one for all
        features. 1 makes the log-likelihood half the squared error, up to a constant.
    """

    latent_dim: int = 32
    network: str = "auto"
    hidden_dims: tuple[int, ...] = (256,)
    channels: tuple[int, ...] = (32, 64)
    posterior: str = "diagonal"
    prior: str = "standard"
    likelihood: str = "auto"
    gaussian_std: float | None = None

    def __post_init__(self) -> None:
        _check_int("latent_dim", self.latent_dim, at_least=1)
        for name in ("network", "posterior", "prior", "likelihood"):
            _check_text(name, getattr(self, name))
        if self.network not in {"auto", "mlp", "conv"}:
            raise unknown_name("network", self.network, ("auto", "mlp", "conv"))
        # Normalising a layer of one unit would leave a constant.
        for name, narrowest in (("hidden_dims", 2), ("channels", 1)):
            for width in _check_tuple(name, getattr(self, name)):
                _check_int(f"every width in {name}", width, at_least=narrowest)
        if self.gaussian_std is not None:
            _check_number("gaussian_std", self.gaussian_std, above=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """How the evidence lower bound is maximised.

    Parameters
    ----------
    objective : str
        A name in :data:`vaefeat.model.objectives.OBJECTIVES`.
    kl_weight : float
        Weight of the KL term once warm-up is over; 1 is the evidence lower bound.
    kl_warmup : float
        Share of all steps in which that weight rises linearly from 0; it is reached in runs of any length.
    max_epochs : int
        Passes over the training rows.
    batch_size : int
        Rows in a minibatch; at most as many as there are.
    learning_rate, weight_decay : float
        Of AdamW. The rate rises over `lr_warmup` and falls along a cosine to a hundredth.
    lr_warmup : float
        Share of all steps in which the learning rate rises.
    gradient_clip : float
        Largest norm of the gradient.
    heldout : float
        Share of the rows that are never trained on and measure the bound.
    patience : int or None
        Epochs without a better held-out bound after which training stops, counted from the end of the warm-up; None
        trains to the end. The best weights are kept in both cases.
    checkpoint_every : int
        Epochs between two checkpoints.
    device : {"auto", "cpu", "cuda"}
        ``auto`` takes CUDA where there is a device.
    threads : int or None
        Processor threads within an operation. None takes one where a step is so small that threads would wait for each
        other longer than they work (which on a busy machine costs far more than they bring), else all processors.
    seed : int
        Of weights, order, and noise. The same seed, rows, threads, machine and versions give the same weights.
    """

    objective: str = "elbo"
    kl_weight: float = 1.0
    kl_warmup: float = 0.2
    max_epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    lr_warmup: float = 0.05
    gradient_clip: float = 100.0
    heldout: float = 0.1
    patience: int | None = None
    checkpoint_every: int = 1
    device: str = "auto"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("objective", "device"):
            _check_text(name, getattr(self, name))
        for name in ("max_epochs", "batch_size", "checkpoint_every"):
            _check_int(name, getattr(self, name), at_least=1)
        for name in ("patience", "threads"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), at_least=1)
        _check_int("seed", self.seed, at_least=0)
        for name in ("kl_weight", "weight_decay"):
            _check_number(name, getattr(self, name), at_least=0)
        for name in ("learning_rate", "gradient_clip"):
            _check_number(name, getattr(self, name), above=0)
        for name in ("kl_warmup", "lr_warmup"):
            _check_number(name, getattr(self, name), at_least=0, at_most=1)
        _check_number("heldout", self.heldout, above=0, at_most=0.9)
        if self.device not in {"auto", "cpu", "cuda"}:
            raise unknown_name("device", str(self.device), ("auto", "cpu", "cuda"))


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


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"got {name}={value!r}, wanted a name in quotes")


def _check_tuple(name: str, value: object) -> tuple[object, ...]:
    if not isinstance(value, tuple) or not value:
        raise ConfigError(f"got {name}={value!r}, wanted a tuple of at least one width, such as (256,)")
    return value


def _check_int(name: str, value: object, *, at_least: int) -> None:
    # bool is an int for Python, but nobody means latent_dim=True.
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(f"got {name}={value!r}, wanted a whole number of at least {at_least}")


def _check_number(
    name: str, value: object, *, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf
) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (at_least <= value <= at_most and value > above):  # type: ignore[operator]
        bounds = [f"{at_least:g} <= " * (at_least > -math.inf), f"{above:g} < " * (above > -math.inf)]
        raise ConfigError(
            f"got {name}={value!r}, wanted a number with {''.join(bounds)}{name}"
            + f" <= {at_most:g}" * (at_most < math.inf)
        )
