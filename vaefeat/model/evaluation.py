"""Held-out figures of a model, the same whenever they are asked for.

B batch, F width of the hidden layer, L latents, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaefeat.data import batches
from vaefeat.errors import ConfigError
from vaefeat.model.networks import parameters_device
from vaefeat.model.objectives import Objective
from vaefeat.model.vae import VAE

__all__ = ["Evaluation", "active_units", "evaluate", "evaluating", "fixed_noise", "importance_weighted_bound"]

_ACTIVE_VARIANCE = 0.01


@dataclass(frozen=True)
class Evaluation:
    """Means over rows, in nats per row.

    Attributes
    ----------
    objective : float
        What training maximises.
    elbo, log_likelihood, kl : float
        elbo = log_likelihood - kl.
    active : tuple of int
        Latents whose mean varies over the rows.
    """

    objective: float
    elbo: float
    log_likelihood: float
    kl: float
    active: tuple[int, ...]


@torch.no_grad()
def evaluate(
    vae: VAE, objective: Objective, rows: NDArray[Any], *, kl_weight: float, batch_size: int, seed: int
) -> Evaluation:
    """Measure the objective's terms over rows (n, ...), with noise that depends on `seed` alone."""
    device = parameters_device(vae)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    means = []
    with fixed_noise(seed, device), evaluating(vae):
        for chunk in batches(rows, batch_size):
            batch = torch.from_numpy(np.array(chunk)).to(device)
            terms = objective(vae, batch, kl_weight=kl_weight)
            sums += torch.stack([term.sum(dtype=torch.float64) for term in terms])
            means.append(vae.features(batch)[0])
    total, log_likelihood, kl = (sums / len(rows)).tolist()
    active = active_units(torch.cat(means).cpu().numpy())
    return Evaluation(total, log_likelihood - kl, log_likelihood, kl, active)


@torch.no_grad()
def importance_weighted_bound(
    vae: VAE, rows: NDArray[Any], *, n_samples: int = 64, batch_size: int = 32, seed: int = 0
) -> NDArray[np.float64]:
    """Bound log p(x) of each row from below with `n_samples` draws from the posterior.

    log 1/S sum_s p(x|z_s) p(z_s) / q(z_s|x) (Burda et al. 2015, arXiv:1509.00519, equation 8). All rows share the
    noise, and batches are padded to one size, so that a row's value depends on the row alone: not on its neighbours,
    order or number.

    Parameters
    ----------
    vae : VAE
    rows : ndarray of shape (n, ...)
    n_samples : int
        S; the bound grows with it.
    batch_size : int
        Rows encoded at a time; S times as many are decoded.
    seed : int
        Of the noise.

    Returns
    -------
    ndarray of shape (n,), float64
        Nats, of scaled rows.

    Raises
    ------
    ConfigError
        The posterior is deterministic: there is no density.
    """
    if not vae.posterior.has_density:
        raise ConfigError(
            "got a model with posterior='deterministic', an auto-encoder, which gives rows no density; take "
            "posterior='diagonal' and objective='elbo', or measure the error of its reconstructions"
        )
    device = parameters_device(vae)
    generator = torch.Generator().manual_seed(seed)
    noise_SL = torch.randn((n_samples, vae.config.latent_dim), generator=generator).to(device)
    bounds = np.empty(len(rows), dtype=np.float64)
    start = 0
    with evaluating(vae):
        for chunk in batches(rows, batch_size):
            padded = np.zeros((batch_size, *chunk.shape[1:]), dtype=chunk.dtype)
            padded[: len(chunk)] = chunk
            bound_B = _bound(vae, torch.from_numpy(padded).to(device), noise_SL)
            bounds[start : start + len(chunk)] = bound_B[: len(chunk)].cpu().numpy()
            start += len(chunk)
    return bounds


def active_units(means: NDArray[np.floating[Any]]) -> tuple[int, ...]:
    """Name the latents that carry something: those whose mean (n, L) has a variance over 0.01 over the rows.

    References
    ----------
    Burda et al. 2015, Importance Weighted Autoencoders, arXiv:1509.00519, section 5.
    """
    variances = np.var(means.astype(np.float64), axis=0)
    return tuple(int(unit) for unit in np.flatnonzero(variances > _ACTIVE_VARIANCE))


@contextmanager
def fixed_noise(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for a while, and leave them as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(vae: VAE) -> Iterator[None]:
    """Put a model into evaluation mode for a while, and back into what it was."""
    was_training = vae.training
    vae.eval()
    try:
        yield
    finally:
        vae.train(was_training)


def _bound(vae: VAE, rows: Tensor, noise_SL: Tensor) -> Tensor:
    x = vae.preprocessing(rows)
    z_SBL, log_posterior_SB = vae.posterior.draw(vae.hidden(x), noise_SL.unsqueeze(1))
    log_prior_SB = vae.prior_distribution().log_prob(z_SBL)
    weights_SB = (vae.log_likelihood(x, z_SBL) + log_prior_SB - log_posterior_SB).double()
    return torch.logsumexp(weights_SB, dim=0) - math.log(len(noise_SL))
