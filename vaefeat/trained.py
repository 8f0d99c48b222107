"""A trained model, opened for use: rows in and rows out as NumPy arrays, in the units of the training rows.

What :mod:`vaefeat.generation` and :mod:`vaefeat.inference` both stand on.

B rows, L latents, S samples.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vaefeat.bundle import Bundle, load_bundle
from vaefeat.errors import InputError
from vaefeat.input_spec import InputSpec
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.networks import parameters_device
from vaefeat.model.vae import VAE
from vaefeat.weights import restore_vae

__all__ = ["Model", "Trained", "opened", "whole"]

#: A bundle, in memory or in a folder, or the torch model itself.
Model = VAE | Bundle | str | PathLike[str]

_ROWS_AT_A_TIME = 256
_MOMENT_SAMPLES = 10_000


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, and the rows it takes; made by :func:`opened`.

    Attributes
    ----------
    vae : VAE
    input : InputSpec
        Of a bare VAE, which does not know what it was trained on: float32 rows of any range.
    device : torch.device
    """

    vae: VAE
    input: InputSpec
    device: torch.device

    def scaled(self, rows: ArrayLike, *, noisy: bool = False) -> Tensor:
        """Check rows (n, ...) and scale them to the network's input.

        Parameters
        ----------
        rows : array-like
            As :meth:`vaefeat.input_spec.InputSpec.prepare` takes them.
        noisy : bool
            Take floats for a model of uint8 rows even where noise made them fractions or led them out of 0 to 255.

        Raises
        ------
        InputError
        """
        spec = self.input
        floats = np.asanyarray(rows)
        if noisy and spec.dtype == "uint8" and floats.dtype.kind == "f":
            # Noise around 0 to 1 stays near it; noise around 0 to 255 does not.
            if floats.size and 0 < floats.max() <= 2 < spec.high / 2:
                raise InputError(
                    f"got {floats.dtype} rows with values up to {floats.max():.3g}, wanted values as in training, "
                    f"up to {spec.high:g}; leave out the division by 255"
                )
            spec = replace(spec, dtype="float32")
        return self._to_input(spec.prepare(rows))

    def scaled_row(self, row: ArrayLike, *, name: str = "row") -> Tensor:
        """Check one row, of shape (...) or (1, ...), and scale it to (1, ...)."""
        array = np.asanyarray(row)
        if array.shape in {self.input.shape, (self.input.n_features,)}:
            array = array[None]
        if array.shape not in {(1, *self.input.shape), (1, self.input.n_features)}:
            raise InputError(f"got {name} of shape {array.shape}, wanted one row of shape {self.input.shape}")
        return self.scaled(array)

    def middles(self, x: Tensor) -> Tensor:
        """Give the latents (B, L) in the middle of each posterior, which is where its noise is zero.

        The mean of a Gaussian; the image of the base Gaussian's mean under a flow; the likeliest category of each
        categorical variable; an auto-encoder's point.
        """
        return self.draws(x, torch.zeros(1, len(x), self.vae.config.latent_dim, device=self.device))[0]

    def draws(self, x: Tensor, noise: Tensor) -> Tensor:
        """Draw latents (S, B, L) from each posterior with standard normal noise (S, B, L)."""
        if not self.vae.posterior.has_density:
            return self.vae.encode(x).rsample(noise.shape[:1])
        z_SBL: Tensor = self.vae.posterior.draw(self.vae.encoder(x), noise)[0]
        return z_SBL

    def decoded(self, z_BL: Tensor, *, kind: str = "mean") -> NDArray[np.float32]:
        """Give the mean of p(x|z), or a draw of it, for each z: (B, ...) in the units of the rows."""
        rows = np.empty((len(z_BL), *self.vae.row_shape), dtype=np.float32)
        for start in range(0, len(z_BL), _ROWS_AT_A_TIME):
            z = z_BL[start : start + _ROWS_AT_A_TIME]
            made = self.vae.reconstruct(z) if kind == "mean" else self.in_units(self.vae.decode(z).sample())
            rows[start : start + len(z)] = made.cpu().numpy()
        return rows

    def in_units(self, x: Tensor) -> Tensor:
        """Undo the scaling of x (B, ...)."""
        return self.vae.preprocessing.inverse(x)

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        """Give mean and standard deviation of each latent under p(z), (L,) each.

        Exact where the prior knows them; else from 10,000 draws.
        """
        prior = self.vae.prior_distribution()
        try:
            return prior.mean, prior.variance.sqrt()
        except NotImplementedError:
            z_SL = prior.sample(torch.Size([_MOMENT_SAMPLES]))
            return z_SL.mean(dim=0), z_SL.std(dim=0)

    def _to_input(self, rows: NDArray[Any]) -> Tensor:
        # Copied: torch does not take read-only arrays, such as memory maps.
        x: Tensor = self.vae.preprocessing(torch.from_numpy(np.array(rows)).to(self.device))
        return x


@contextmanager
def opened(model: Model, *, seed: int = 0) -> Iterator[Trained]:
    """Open a model for use: in evaluation mode, without gradients, with noise that depends on `seed` alone.

    Parameters
    ----------
    model : VAE, Bundle or path-like
        A bundle is opened on the CPU; a VAE stays where it is, and gets its mode back afterwards.
    seed : int
        Of torch's generators inside the block; outside, they go on as if nothing had happened.

    Raises
    ------
    InputError
        Something else, a classifier whose decoder was left behind, or a seed that is no whole number of at least 0.
    BundleError
        The bundle is missing, corrupt or edited.
    """
    vae, spec = _resolved(model)
    device = parameters_device(vae)
    was_training = vae.training
    with fixed_noise(whole("seed", seed, at_least=0), device), torch.no_grad():
        vae.eval()
        try:
            yield Trained(vae, spec, device)
        finally:
            vae.train(was_training)


def whole(name: str, value: object, *, at_least: int = 1) -> int:
    """Check a whole number.

    Raises
    ------
    InputError
        Something else, or less than `at_least`.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # whatever it is, index decides
    except TypeError:
        number = at_least - 1
    if number < at_least:
        raise InputError(f"got {name}={value!r}, wanted a whole number of at least {at_least}")
    return number


def _resolved(model: Model) -> tuple[VAE, InputSpec]:
    if isinstance(model, VAE):
        kind: Literal["image", "vector"] = "image" if len(model.row_shape) == 3 else "vector"
        spec = InputSpec(kind=kind, shape=model.row_shape, dtype="float32", low=-math.inf, high=math.inf)
        return model, spec
    if isinstance(model, str | PathLike):
        model = load_bundle(model)
    if not isinstance(model, Bundle):
        raise InputError(f"got a model of type {type(model).__name__}, wanted a Bundle, the folder of one, or a VAE")
    model.refuse_decoding()
    return restore_vae(model), model.manifest.input
