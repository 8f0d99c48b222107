"""log p(x) of held-out rows, three ways, each with its Monte Carlo error.

====================================  =======================================  =========================
estimator                             good for                                 in expectation
====================================  =======================================  =========================
:func:`importance_sampling`           every posterior with a density           a lower bound
:func:`annealed_importance_sampling`  few continuous latents; can do without   a lower bound
                                      q(z|x), and so check the first
:func:`hamiltonian_estimator`         few continuous latents                   an upper bound
====================================  =======================================  =========================

Each averages weights whose expectation is p(x), or 1/p(x) for the last, and takes the logarithm; Jensen's inequality
makes the bound. It is off by about half the squared standard error, so that a small error also means a small bias. An
error is estimated from the weights that were seen, and misses what no sample came near: a mode that was not found, or
the tails of a true posterior that is wider than q(z|x). Annealing from the prior is the check on that.

All are in nats per row, of rows as the likelihood sees them: scaled, and where the model binarizes, drawn once for each
row. What a row gets depends on the seed and the row's number alone (:mod:`vaefeat.model.observation`), and but for
rounding not on the sizes of batches and chunks.

B batch, C chains of each row, F width of the hidden layer, K centres, L latents, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaefeat.errors import ConfigError, InputError
from vaefeat.model.evaluation import evaluating
from vaefeat.model.hamiltonian import Origin, State, Transition, adapted
from vaefeat.model.observation import Progress, observed
from vaefeat.model.vae import VAE
from vaefeat.settings import check_choice, check_int, check_number

__all__ = ["Estimate", "annealed_importance_sampling", "hamiltonian_estimator", "importance_sampling"]

_LATENTS_AT_A_TIME = 10_000
_PARAMETERS_AT_A_TIME = 8_000_000
_PILOT_CHAINS = 4
#: Change of a step's logarithm for each unit of acceptance that is too much.
_PILOT_RATE = 0.2
#: Steepness of the schedule of temperatures (Wu et al. 2017, arXiv:1611.04273, section 4.1).
_SCHEDULE_WIDTH = 4.0


@dataclass(frozen=True)
class Estimate:
    """log p(x) of n rows, in nats.

    Attributes
    ----------
    values : ndarray of shape (n,), float64
    standard_errors : ndarray of shape (n,), float64
        Of the Monte Carlo estimate of each value, by the delta method: std(w) / (sqrt(S) mean(w)) for S independent
        weights w. NaN where there is but one.
    effective_samples : ndarray of shape (n,), float64
        (sum w)^2 / sum w^2, from 1 to S. Where it is a handful, the standard error says too little.
    elbo : ndarray of shape (n,), float64, optional
        The mean of log w, which is the evidence lower bound; of importance sampling alone.
    """

    values: NDArray[np.float64]
    standard_errors: NDArray[np.float64]
    effective_samples: NDArray[np.float64]
    elbo: NDArray[np.float64] | None = None

    @property
    def mean(self) -> float:
        """Of log p(x) over the rows."""
        return float(self.values.mean())

    @property
    def standard_error(self) -> float:
        """Of :attr:`mean` for exactly these rows: the Monte Carlo error, which is independent between rows."""
        return float(np.sqrt(np.square(self.standard_errors).sum()) / len(self.values))

    @property
    def sampling_error(self) -> float:
        """Of :attr:`mean` for all rows that might have been held out: std over rows / sqrt(n); NaN for one row."""
        return float(self.values.std(ddof=1) / math.sqrt(len(self.values))) if len(self.values) > 1 else math.nan

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Put estimates of parts of the rows together, in order."""
        elbos = [part.elbo for part in parts if part.elbo is not None]
        return cls(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.standard_errors for part in parts]),
            np.concatenate([part.effective_samples for part in parts]),
            np.concatenate(elbos) if elbos else None,
        )


@torch.inference_mode()
def importance_sampling(
    vae: VAE,
    rows: NDArray[Any],
    *,
    n_samples: int = 5000,
    samples_per_chunk: int | None = None,
    batch_size: int = 100,
    seed: int = 0,
    first_row: int = 0,
    on_rows: Progress | None = None,
) -> Estimate:
    """Estimate log p(x) from below with draws from the posterior: log 1/S sum_s p(x|z_s) p(z_s) / q(z_s|x).

    In expectation the bound rises to log p(x) with S. Each row is encoded once; its samples are decoded chunk by chunk,
    and their sums are kept in float64, relative to the largest weight so far.

    Parameters
    ----------
    vae : VAE
    rows : ndarray of shape (n, ...)
        As they come.
    n_samples : int
        S; exactly as many are drawn.
    samples_per_chunk : int, optional
        Samples of each row that are decoded together. None takes as many as make 10,000 latents, or 8 million
        parameters of the likelihood. Convolutions and mixture priors, which need more memory for each, like fewer.
    batch_size : int
        Rows that are encoded and decoded together.
    seed : int
    first_row : int
        The number of ``rows[0]`` among all rows, for a caller who goes through them part by part and joins the
        estimates: the parts' sizes do not change them.
    on_rows : callable, optional
        Called after each batch with the rows done and the rows in all.

    Raises
    ------
    ConfigError
        A size that is no positive integer, or a deterministic posterior, which gives nothing to weigh by.
    InputError
        A log-likelihood that is not finite.

    References
    ----------
    Rezende et al. 2014, arXiv:1401.4082, appendix E; Burda et al. 2015, arXiv:1509.00519, equation 8 and section 5.
    """
    if not vae.posterior.has_density:
        raise ConfigError(
            "got posterior='deterministic', an auto-encoder, with importance sampling, which weighs by the posterior's "
            "density; take annealed_importance_sampling, which starts from the prior, or posterior='diagonal'"
        )
    if samples_per_chunk is None:
        n_parameters = vae.likelihood.n_parameters * math.prod(vae.row_shape)
        n_latents = min(_LATENTS_AT_A_TIME, _PARAMETERS_AT_A_TIME // n_parameters)
        samples_per_chunk = max(1, n_latents // max(1, batch_size))
    _check_sizes(n_samples=n_samples, samples_per_chunk=samples_per_chunk)
    parts = []
    with evaluating(vae):
        prior = vae.prior_distribution()
        for batch in observed(vae, rows, batch_size=batch_size, seed=seed, first_row=first_row, on_rows=on_rows):
            h_BF, noise, weights = vae.hidden(batch.x), batch.noise(vae.config.latent_dim), _Weights()
            for done in range(0, n_samples, samples_per_chunk):
                z_SBL, log_posterior_SB = vae.posterior.draw(h_BF, noise(min(samples_per_chunk, n_samples - done)))
                log_ratio_SB = prior.log_prob(z_SBL).double() - log_posterior_SB
                weights.add(vae.log_likelihood(batch.x, z_SBL) + log_ratio_SB)
            parts.append(weights.estimate(with_elbo=True))
            _refuse_non_finite(parts[-1], batch.first)
    return Estimate.joined(parts)


@torch.no_grad()
def annealed_importance_sampling(
    vae: VAE,
    rows: NDArray[Any],
    *,
    n_temperatures: int = 500,
    n_chains: int = 16,
    n_leapfrog: int = 5,
    step_size: float = 0.5,
    start: Literal["prior", "posterior"] = "prior",
    batch_size: int = 100,
    seed: int = 0,
    first_row: int = 0,
    on_rows: Progress | None = None,
) -> Estimate:
    """Estimate log p(x) from below, with chains that are annealed from the prior, or q(z|x), to the true posterior.

    Chains start in p_0(z) and follow f_t(z) = p_0(z)^(1-t) p(x, z)^t from t = 0 to 1 by Hamiltonian transitions. A
    chain's weight is the product of f_t(z) / f_t'(z) over the rises of the temperature from t' to t; its expectation is
    p(x) for any transitions that are fixed beforehand. Steps are therefore adapted for each row and temperature on a
    few pilot chains, which are then thrown away: adaptation does not bias the estimate.

    Parameters
    ----------
    vae : VAE
    rows : ndarray of shape (n, ...)
        As they come.
    n_temperatures : int
        Rises of the temperature, along a sigmoid; more of them lower the error.
    n_chains : int
        C, the independent weights of each row's estimate.
    n_leapfrog : int
        Gradients of each transition.
    step_size : float
        Where the adaptation starts, in rough standard deviations of a latent.
    start : {"prior", "posterior"}
        p_0. The prior asks nothing of the encoder, which then may be anything, also deterministic; a Gaussian q(z|x)
        has less far to go.
    batch_size, seed, first_row, on_rows
        See :func:`importance_sampling`.

    Raises
    ------
    ConfigError
        A size that is out of range, categorical latents, or ``start="posterior"`` where q(z|x) has no density that can
        be evaluated anywhere.
    InputError
        A log-likelihood that is not finite.

    References
    ----------
    Neal 2001, Annealed importance sampling, Statistics and Computing 11; Wu et al. 2017, arXiv:1611.04273, section 4.1.
    """
    _check_sizes(n_temperatures=n_temperatures, n_chains=n_chains, n_leapfrog=n_leapfrog)
    check_number("step_size", step_size, above=0)
    check_choice("start", start, ("prior", "posterior"))
    temperatures = _temperatures(n_temperatures)
    parts = []
    with evaluating(vae):
        origin = Origin(vae)
        for batch in observed(vae, rows, batch_size=batch_size, seed=seed, first_row=first_row, on_rows=on_rows):
            noise = batch.noise(vae.config.latent_dim + 1)
            path, both = origin.begin(batch, noise, n_chains=_PILOT_CHAINS + n_chains, start=start, annealed=True)
            pilots = State(*(part[:_PILOT_CHAINS] for part in both))
            chains = State(*(part[_PILOT_CHAINS:] for part in both))
            first_B = batch.x.new_full((len(batch.x),), step_size)
            steps = _piloted_steps(Transition(path, n_leapfrog, noise), pilots, temperatures, first_B)
            weights = _Weights()
            weights.add(_annealed(Transition(path, n_leapfrog, noise), chains, temperatures, steps))
            parts.append(weights.estimate())
            _refuse_non_finite(parts[-1], batch.first)
    return Estimate.joined(parts)


@torch.no_grad()
def hamiltonian_estimator(
    vae: VAE,
    rows: NDArray[Any],
    *,
    n_draws: int = 100,
    n_chains: int = 16,
    n_warmup: int = 100,
    n_leapfrog: int = 5,
    step_size: float = 0.5,
    density: Literal["gaussian", "kernels"] = "gaussian",
    batch_size: int = 100,
    seed: int = 0,
    first_row: int = 0,
    on_rows: Progress | None = None,
) -> Estimate:
    """Estimate log p(x) from above, with draws from the true posterior: the estimator of the 2013 paper.

    Two sets of Hamiltonian chains draw from p(z|x). To the draws of the one a density g(z) is fitted; over those of the
    other, 1/p(x) is the mean of g(z) / p(x, z). This holds for every g, but the error is small only where g falls off
    no slower than the posterior: a Gaussian for a posterior of one hill, kernels for one of several hills in three or
    four latents.

    Parameters
    ----------
    vae : VAE
    rows : ndarray of shape (n, ...)
        As they come.
    n_draws : int
        Draws of each chain.
    n_chains : int
        C, chains to fit the density to, and again as many to evaluate it at. The means over the latter's draws are the
        independent weights of each row's estimate; the draws of a chain are not independent.
    n_warmup : int
        Transitions before the first draw. Chains start in q(z|x) where it has a density, else in the prior; steps are
        adapted until the end of the warm-up and fixed thereafter.
    n_leapfrog, step_size
        See :func:`annealed_importance_sampling`.
    density : {"gaussian", "kernels"}
        A Gaussian with full covariance; or one of its shape, but smaller, around each draw, with Scott's bandwidth.
    batch_size, seed, first_row, on_rows
        See :func:`importance_sampling`.

    Raises
    ------
    ConfigError
        A size that is out of range, or categorical latents.
    InputError
        A log-likelihood that is not finite.

    References
    ----------
    Kingma and Welling 2013, arXiv:1312.6114, appendix D; Gelfand and Dey 1994.
    """
    _check_sizes(n_draws=n_draws, n_chains=n_chains, n_warmup=n_warmup, n_leapfrog=n_leapfrog)
    check_number("step_size", step_size, above=0)
    check_choice("density", density, ("gaussian", "kernels"))
    start: Literal["prior", "posterior"] = "posterior" if vae.posterior.has_density else "prior"
    parts = []
    with evaluating(vae):
        origin = Origin(vae)
        for batch in observed(vae, rows, batch_size=batch_size, seed=seed, first_row=first_row, on_rows=on_rows):
            noise = batch.noise(vae.config.latent_dim + 1)
            path, state = origin.begin(batch, noise, n_chains=2 * n_chains, start=start, annealed=False)
            transition, step_B = Transition(path, n_leapfrog, noise), batch.x.new_full((len(batch.x),), step_size)
            for count in range(1, n_warmup + 1):
                state, acceptance_B = transition(state, 1.0, step_B)
                step_B = adapted(step_B, acceptance_B, rate=count**-0.6)
            draws = []
            for _ in range(n_draws):
                state, _ = transition(state, 1.0, step_B)
                draws.append(state)
            fitted = _Fitted(torch.cat([draw.z_CBL[:n_chains] for draw in draws]), kernels=density == "kernels")
            log_ratio_SCB = torch.stack([fitted.log_ratio(State(*(part[n_chains:] for part in d))) for d in draws])
            weights = _Weights()
            weights.add(torch.logsumexp(log_ratio_SCB, dim=0) - math.log(n_draws))
            parts.append(weights.estimate(reciprocal=True))
            _refuse_non_finite(parts[-1], batch.first)
    return Estimate.joined(parts)


class _Weights:
    """Sums over weights whose logarithms come chunk by chunk, relative to the largest so far."""

    def __init__(self) -> None:
        self._n = 0
        self._largest_B: Tensor | float = -math.inf
        self._first_B: Tensor | float = 0.0
        self._second_B: Tensor | float = 0.0
        self._logs_B: Tensor | float = 0.0

    def add(self, log_weight_SB: Tensor) -> None:
        """Take in log-weights (S, B), float64."""
        largest_B = log_weight_SB.amax(dim=0).clamp_min(self._largest_B)
        # While all weights are zero there is nothing to be relative to.
        reference_B = torch.where(largest_B > -math.inf, largest_B, 0)
        shrink_B = (self._largest_B - reference_B).exp()
        weight_SB = (log_weight_SB - reference_B).exp()
        self._first_B = self._first_B * shrink_B + weight_SB.sum(dim=0)
        self._second_B = self._second_B * shrink_B**2 + weight_SB.square().sum(dim=0)
        self._logs_B = self._logs_B + log_weight_SB.sum(dim=0)
        self._largest_B = largest_B
        self._n += len(log_weight_SB)

    def estimate(self, *, with_elbo: bool = False, reciprocal: bool = False) -> Estimate:
        """Give the logarithm of the mean weight, or of its reciprocal, with its error."""
        sums = (self._largest_B, self._first_B, self._second_B, self._logs_B)
        largest, first, second, logs = (torch.as_tensor(total).cpu().numpy() for total in sums)
        # Weights that are all zero have no logarithm; the caller refuses what comes of it.
        with np.errstate(divide="ignore", invalid="ignore"):
            values = largest + np.log(first / self._n)
            effective = first**2 / second
            # The relative variance of the mean weight; equal weights may round it to below zero.
            variance = np.maximum(self._n / effective - 1, 0) / (self._n - 1)
        return Estimate(
            -values if reciprocal else values, np.sqrt(variance), effective, logs / self._n if with_elbo else None
        )


class _Fitted:
    """A density fitted to draws (N, B, L): one Gaussian a row, or one around each draw.

    Latents are moved to where the draws have mean 0 and covariance I.
    """

    def __init__(self, draws_NBL: Tensor, *, kernels: bool) -> None:
        draws_BNL = draws_NBL.transpose(0, 1).double()
        n_draws, n_latents = draws_BNL.shape[1:]
        self._mean_B1L = draws_BNL.mean(dim=1, keepdim=True)
        centred_BNL = draws_BNL - self._mean_B1L
        covariance_BLL = centred_BNL.mT @ centred_BNL / max(1, n_draws - 1)
        # Chains that never moved leave nothing to fit; a small ridge keeps the factor, and the error shows it.
        ridge_B = 1e-9 * covariance_BLL.diagonal(dim1=-2, dim2=-1).mean(dim=-1) + 1e-30
        identity_LL = torch.eye(n_latents, dtype=torch.float64, device=draws_NBL.device)
        self._factor_BLL = torch.linalg.cholesky(covariance_BLL + ridge_B[:, None, None] * identity_LL)
        self._width = n_draws ** (-1 / (n_latents + 4)) if kernels else 1.0
        self._centres_BKL = self._white(draws_BNL) if kernels else torch.zeros_like(self._mean_B1L)
        log_determinant_B = self._factor_BLL.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        self._constant_B = log_determinant_B + n_latents * (math.log(self._width) + 0.5 * math.log(2 * math.pi))

    def log_ratio(self, state: State) -> Tensor:
        """Give log g(z) - log p(x, z), (C, B)."""
        white_BCL = self._white(state.z_CBL.transpose(0, 1).double())
        distance_BCK = torch.cdist(white_BCL, self._centres_BKL) / self._width
        n_centres = distance_BCK.shape[-1]
        mixture_BC = torch.logsumexp(-0.5 * distance_BCK.square(), dim=-1) - math.log(n_centres)
        log_density_BC: Tensor = mixture_BC - self._constant_B.unsqueeze(-1)
        return log_density_BC.T - state.start_CB - state.gain_CB

    def _white(self, z_BNL: Tensor) -> Tensor:
        white_BLN: Tensor = torch.linalg.solve_triangular(self._factor_BLL, (z_BNL - self._mean_B1L).mT, upper=False)
        return white_BLN.mT


def _piloted_steps(transition: Transition, state: State, temperatures: Sequence[float], step_B: Tensor) -> list[Tensor]:
    """Give the steps (B,) for every temperature between the first and the last, on the way of a few chains."""
    steps = []
    for temperature in temperatures[1:-1]:
        steps.append(step_B)
        state, acceptance_B = transition(state, temperature, step_B)
        step_B = adapted(step_B, acceptance_B, rate=_PILOT_RATE)
    return steps


def _annealed(transition: Transition, state: State, temperatures: Sequence[float], steps: Sequence[Tensor]) -> Tensor:
    """Follow the path, and give the chains' log-weights (C, B), float64."""
    log_weight_CB = temperatures[1] * state.gain_CB.double()
    for (temperature, following), step_B in zip(pairwise(temperatures[1:]), steps, strict=True):
        state, _ = transition(state, temperature, step_B)
        log_weight_CB += (following - temperature) * state.gain_CB
    return log_weight_CB


def _temperatures(n: int) -> list[float]:
    """Give 0, n - 1 temperatures that are dense at both ends, and 1."""
    rise = 1 / (1 + np.exp(-_SCHEDULE_WIDTH * np.linspace(-1, 1, n + 1)))
    scaled: list[float] = ((rise - rise[0]) / (rise[-1] - rise[0])).tolist()
    return scaled


def _check_sizes(**sizes: object) -> None:
    for name, size in sizes.items():
        check_int(name, size, at_least=1)


def _refuse_non_finite(estimate: Estimate, first: int) -> None:
    """Refuse NaN and infinity: averages would hide which row they came from."""
    bad = np.flatnonzero(~np.isfinite(estimate.values))
    if bad.size:
        raise InputError(
            f"got log p(x) = {estimate.values[bad[0]]} for row {first + bad[0]}, wanted a number; look for values that "
            "are missing or far from the training rows, or for weights of the model that are not finite"
        )
