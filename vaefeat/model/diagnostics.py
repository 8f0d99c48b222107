"""What a model's latents carry: rate and distortion, mutual information, and posterior collapse by its name.

All in nats per row. What is random depends on the seed and the rows alone (:mod:`vaefeat.model.observation`).

B batch, F width of the hidden layer, L latents, N rows, S samples, U units: latents, or categorical variables.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, kl_divergence

from vaefeat.errors import ConfigError, InputError
from vaefeat.model.distributions import Joint, OneHot, factors
from vaefeat.model.evaluation import active_units, evaluating
from vaefeat.model.likelihoods import GaussianLikelihood
from vaefeat.model.networks import parameters_device
from vaefeat.model.observation import Observed, observed
from vaefeat.model.posteriors import CategoricalPosterior, JointPosterior
from vaefeat.model.vae import VAE
from vaefeat.settings import check_int

__all__ = ["Bounds", "Diagnostics", "RateDistortion", "diagnose", "rate_distortion"]

#: A unit whose mean explains less of its variance than this carries nothing. Where q(z) has variance 1, as under a
#: prior N(0, I), this is the threshold of Burda et al. 2015 (arXiv:1509.00519, section 5).
_SMALLEST_SHARE = 0.01
#: Nats of KL divergence per row below which the latents tell next to nothing: of ten classes, not even the half.
_SMALLEST_RATE = 1.0
_VALUES_AT_A_TIME = 10_000_000
_SPECTRUM_ROWS = 1000


class Bounds(NamedTuple):
    """What a quantity lies between, in expectation."""

    lower: float
    upper: float


class RateDistortion(NamedTuple):
    """A point of the rate-distortion plane (Alemi et al. 2018, arXiv:1711.00464); -rate - distortion is the ELBO.

    Attributes
    ----------
    rate : float
        E[KL(q(z|x) || p(z))].
    distortion : float
        -E[log p(x|z)]. Of continuous rows it may be negative.
    """

    rate: float
    distortion: float


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """A model's latents on n rows, in nats per row.

    A deterministic posterior has no density: what needs one is None.

    Attributes
    ----------
    n_rows, latent_dim : int
    active : tuple of int
        Latents whose exported mean has a variance over 0.01 (Burda et al. 2015, arXiv:1509.00519, section 5).
    informative : tuple of int
        Units (latents; of categorical latents, whole variables) whose mean explains over a hundredth of their variance
        under q(z): like `active`, but whatever the scale.
    n_units : int
    collapse : {"none", "partial", "full"}
        No unit, some, or all are without information about x. Some always are where a model has latents to spare.
    advice : str
        What happened, and what to try.
    distortion : float
        -E[log p(x|z)].
    rate : float or None
        E[KL(q(z|x) || p(z))]: in closed form where there is one, else from the samples.
    elbo : float or None
        -rate - distortion.
    kl_per_unit : tuple of float or None
        The rate, unit by unit, where it is a sum over units. Of a full-covariance posterior the KL divergences of the
        marginals, whose sum leaves out what is due to correlation. None under flows and mixtures.
    mutual_information : Bounds or None
        I(x; z) under q. Below: of the `n_mixture` rows themselves, E[log q(z|x) - log q(z)] with their mixture as q(z)
        (Hoffman and Johnson 2016), which can never exceed log(n_mixture). Above: the same with each row's own
        posterior left out of the mixture (Poole et al. 2019, arXiv:1905.06922, section 2.2), or the rate, if that is
        less. Far apart, they say only that more rows are needed. None under flows, whose density is not known at
        every z.
    aggregate_kl : Bounds or None
        KL(q(z) || p(z)) by the same two mixtures: what of the rate is no information, but a q(z) that is not the prior
        (rate = I + KL).
    n_mixture : int
        Rows whose posteriors make up q(z).
    aggregate_mean, aggregate_variance : tuple of float
        Of each latent under q(z), to be held against those of the prior. Under flows from the samples.
    """

    n_rows: int
    latent_dim: int
    active: tuple[int, ...]
    informative: tuple[int, ...]
    n_units: int
    collapse: Literal["none", "partial", "full"]
    advice: str
    distortion: float
    rate: float | None
    elbo: float | None
    kl_per_unit: tuple[float, ...] | None
    mutual_information: Bounds | None
    aggregate_kl: Bounds | None
    n_mixture: int
    aggregate_mean: tuple[float, ...]
    aggregate_variance: tuple[float, ...]

    @property
    def severe(self) -> bool:
        """Whether the code says next to nothing about x: no unit does, or all of them less than a nat."""
        return _severe(len(self.informative), self.rate)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values that JSON can hold."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        for key in ("mutual_information", "aggregate_kl"):
            bounds = getattr(self, key)
            plain[key] = None if bounds is None else bounds._asdict()
        return plain


@torch.inference_mode()
def diagnose(
    vae: VAE, rows: NDArray[Any], *, n_samples: int = 16, n_mixture: int = 1000, batch_size: int = 100, seed: int = 0
) -> Diagnostics:
    """Look at what the latents of a model carry.

    Parameters
    ----------
    vae : VAE
    rows : ndarray of shape (n, ...)
        As they come; at least two.
    n_samples : int
        Draws of each row's posterior, at least two.
    n_mixture : int
        Rows, evenly spread over `rows`, whose posteriors make up q(z). The work grows with the square.
    batch_size : int
        Rows that are encoded together.
    seed : int

    Raises
    ------
    ConfigError
        A size that is no whole number, or too small.
    InputError
        Fewer than two rows.
    """
    check_int("n_samples", n_samples, at_least=2)
    check_int("n_mixture", n_mixture, at_least=2)
    if len(rows) < 2:
        raise InputError(f"got {len(rows)} rows, wanted at least two: one does not tell what varies")
    measured = _measure(vae, rows, n_samples=n_samples, batch_size=batch_size, seed=seed)
    rate = None if measured.rate_N is None else float(measured.rate_N.mean())
    distortion = float(measured.distortion_N.mean())
    chosen = np.linspace(0, len(rows) - 1, min(n_mixture, len(rows))).round().astype(int)
    aggregate = None
    if vae.posterior.has_density:
        assert rate is not None
        aggregate = _compare_aggregate(vae, rows[chosen], rate=rate, batch_size=batch_size, seed=seed)

    active = active_units(measured.exported_NL)
    units = _units(vae)
    within_L, between_L = measured.variances()
    if vae.posterior.has_density:
        informative_L = between_L > _SMALLEST_SHARE * (within_L + between_L)
        informative = tuple(unit for unit, latents in enumerate(units) if informative_L[latents].any())
    else:
        informative = active
    return Diagnostics(
        n_rows=len(rows),
        latent_dim=vae.config.latent_dim,
        active=active,
        informative=informative,
        n_units=len(units),
        collapse="full" if not informative else "partial" if len(informative) < len(units) else "none",
        advice=_advice(vae, rows, n_informative=len(informative), n_units=len(units), rate=rate),
        distortion=distortion,
        rate=rate,
        elbo=None if rate is None else -rate - distortion,
        kl_per_unit=None if measured.kl_NU is None else tuple(measured.kl_NU.mean(axis=0).tolist()),
        mutual_information=aggregate and aggregate[0],
        aggregate_kl=aggregate and aggregate[1],
        n_mixture=len(chosen),
        aggregate_mean=tuple(measured.mean_NL.mean(axis=0).tolist()),
        aggregate_variance=tuple((within_L + between_L).tolist()),
    )


@torch.inference_mode()
def rate_distortion(
    vae: VAE, rows: NDArray[Any], *, n_samples: int = 16, batch_size: int = 100, seed: int = 0
) -> RateDistortion:
    """Measure where a model lies between compression and reconstruction.

    Models trained with several ``kl_weight`` lie along a curve.

    Parameters
    ----------
    vae, rows, n_samples, batch_size, seed
        See :func:`diagnose`.

    Raises
    ------
    ConfigError
        A deterministic posterior, whose rate is infinite; or a size that is no whole number, or too small.
    """
    check_int("n_samples", n_samples, at_least=2)
    measured = _measure(vae, rows, n_samples=n_samples, batch_size=batch_size, seed=seed)
    if measured.rate_N is None:
        raise ConfigError(
            "got posterior='deterministic', an auto-encoder, whose rate is infinite; take diagnose(...).distortion "
            "alone, or posterior='diagonal'"
        )
    return RateDistortion(float(measured.rate_N.mean()), float(measured.distortion_N.mean()))


@dataclass(frozen=True)
class _Measured:
    """Figures of each row, float64.

    Mean and variance are those of the row's posterior, from `n_samples` draws of it, or exact where that is None.
    """

    exported_NL: NDArray[np.float64]
    mean_NL: NDArray[np.float64]
    variance_NL: NDArray[np.float64]
    distortion_N: NDArray[np.float64]
    rate_N: NDArray[np.float64] | None
    kl_NU: NDArray[np.float64] | None
    n_samples: int | None

    def variances(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Split each latent's variance under q(z) into that within rows, and that between their means."""
        within_L, between_L = self.variance_NL.mean(axis=0), self.mean_NL.var(axis=0)
        if self.n_samples is not None:
            # Means of a few draws vary even where all posteriors are alike.
            between_L = np.maximum(between_L - within_L / self.n_samples, 0)
        return within_L, between_L


def _measure(vae: VAE, rows: NDArray[Any], *, n_samples: int, batch_size: int, seed: int) -> _Measured:
    columns: dict[str, list[Tensor]] = {}
    with evaluating(vae):
        prior = vae.prior_distribution()
        for batch in observed(vae, rows, batch_size=batch_size, seed=seed):
            h_BF = vae.hidden(batch.x)
            q: Distribution = vae.posterior(h_BF)
            exact = _is_known_everywhere(q) or not vae.posterior.has_density
            figures = {"exported_NL": vae.features(batch.rows)[0]}
            if vae.posterior.has_density:
                figures |= _weigh(vae, batch, q, prior, h_BF, n_samples)
            else:
                figures["mean_NL"], figures["variance_NL"] = q.mean, torch.zeros_like(q.mean)
                figures["distortion_N"] = -vae.log_likelihood(batch.x, q.mean)
            for name, figure in figures.items():
                columns.setdefault(name, []).append(figure)
    arrays = {name: torch.cat(parts).double().cpu().numpy() for name, parts in columns.items()}
    return _Measured(
        exported_NL=arrays["exported_NL"],
        mean_NL=arrays["mean_NL"],
        variance_NL=arrays["variance_NL"],
        distortion_N=arrays["distortion_N"],
        rate_N=arrays.get("rate_N"),
        kl_NU=arrays.get("kl_NU"),
        n_samples=None if exact else n_samples,
    )


def _weigh(
    vae: VAE, batch: Observed, q: Distribution, prior: Distribution, h_BF: Tensor, n_samples: int
) -> dict[str, Tensor]:
    z_SBL, log_posterior_SB = vae.posterior.draw(h_BF, batch.noise(vae.config.latent_dim)(n_samples))
    figures = {"distortion_N": -vae.log_likelihood(batch.x, z_SBL).mean(dim=0)}
    try:
        figures["rate_N"] = kl_divergence(q, prior)
    except NotImplementedError:
        figures["rate_N"] = (log_posterior_SB - prior.log_prob(z_SBL)).mean(dim=0)
    # Under a full covariance, the marginals: a Gaussian's are known.
    marginals = Independent(Normal(q.loc, q.variance.sqrt()), 1) if isinstance(q, MultivariateNormal) else q
    with suppress(NotImplementedError):
        figures["kl_NU"] = factors(marginals, prior)
    if _is_known_everywhere(q):
        return figures | {"mean_NL": q.mean, "variance_NL": q.variance}
    return figures | {"mean_NL": z_SBL.mean(dim=0), "variance_NL": z_SBL.var(dim=0)}


def _is_known_everywhere(q: Distribution) -> bool:
    """Tell whether q(z|x) has a density that can be evaluated at latents that it has not drawn itself."""
    return isinstance(q, Independent | MultivariateNormal | OneHot | Joint)


def _compare_aggregate(
    vae: VAE, rows: NDArray[Any], *, rate: float, batch_size: int, seed: int
) -> tuple[Bounds, Bounds] | None:
    """Bound I(x; z) and KL(q(z) || p(z)), with one draw of each row's posterior and all rows' posteriors as q(z)."""
    with evaluating(vae):
        hidden, draws, own = [], [], []
        for batch in observed(vae, rows, batch_size=batch_size, seed=seed):
            hidden.append(vae.hidden(batch.x))
            z_SBL, log_posterior_SB = vae.posterior.draw(hidden[-1], batch.noise(vae.config.latent_dim)(1))
            draws.append(z_SBL[0])
            own.append(log_posterior_SB[0])
        q: Distribution = vae.posterior(torch.cat(hidden))
        if not _is_known_everywhere(q):
            return None
        z_NL, log_own_N = torch.cat(draws), torch.cat(own).double()
        log_all_N, log_others_N = _mixtures(q, z_NL)
        log_prior_N = vae.prior_distribution().log_prob(z_NL).double()

    def mean(difference_N: Tensor) -> float:
        return float(difference_N.mean())

    # Rounding and the noise of the draws aside, 0 <= lower <= upper.
    information = max(0.0, mean(log_own_N - log_all_N))
    divergence = max(0.0, mean(log_others_N - log_prior_N))
    return (
        Bounds(information, max(information, min(rate, mean(log_own_N - log_others_N)))),
        Bounds(divergence, max(divergence, mean(log_all_N - log_prior_N))),
    )


def _mixtures(q: Distribution, z_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Give the log-density of each z_n under the mixture of all N posteriors, and of all but its own; (N,) float64."""
    n = len(z_NL)
    log_all, log_others = [], []
    size = max(1, _VALUES_AT_A_TIME // z_NL.numel())
    for start in range(0, n, size):
        log_density_BN = q.log_prob(z_NL[start : start + size].unsqueeze(1)).double()
        log_all.append(torch.logsumexp(log_density_BN, dim=1) - math.log(n))
        places = torch.arange(len(log_density_BN), device=z_NL.device)
        log_density_BN[places, start + places] = -torch.inf
        log_others.append(torch.logsumexp(log_density_BN, dim=1) - math.log(n - 1))
    return torch.cat(log_all), torch.cat(log_others)


def _units(vae: VAE) -> list[list[int]]:
    """Give the latents of each unit: one, or the categories of one variable."""
    posterior, latents = vae.posterior, list(range(vae.config.latent_dim))
    categorical = posterior.categorical if isinstance(posterior, JointPosterior) else posterior
    if not isinstance(categorical, CategoricalPosterior):
        return [[latent] for latent in latents]
    width = categorical.n_categories
    first = len(latents) - categorical.n_variables * width
    variables = [latents[start : start + width] for start in range(first, len(latents), width)]
    return [[latent] for latent in latents[:first]] + variables


def _advice(vae: VAE, rows: NDArray[Any], *, n_informative: int, n_units: int, rate: float | None) -> str:
    """Say in a few sentences what the latents do, and what to try."""
    unit = {"categorical": "categorical variables", "joint": "latents and categorical variables"}.get(
        vae.config.posterior, "latents"
    )
    nats = "" if rate is None else f"; the KL divergence is {rate:.3g} nats"
    if n_informative == n_units:
        return f"No collapse: all {n_units} {unit} carry information about the row{nats}."
    happened = f"Partial collapse: {n_informative} of {n_units} {unit} carry information about the row{nats}."
    if n_informative:
        happened += " The others are the same for every row."
        if not _severe(n_informative, rate):
            return f"{happened} That is usual where a model has some to spare; they can be left out."
    else:
        happened = (
            f"Full collapse: none of {n_units} {unit} carries information about the row{nats}, and the decoder models "
            "all rows alike."
        )
    return " ".join([happened, *_too_wide(vae, rows), f"To try: {', '.join(_remedies(vae))}."])


def _severe(n_informative: int, rate: float | None) -> bool:
    return n_informative == 0 or (rate is not None and rate < _SMALLEST_RATE)


def _remedies(vae: VAE) -> list[str]:
    if not vae.posterior.has_density:
        return ["a lower learning_rate", "more epochs"]
    posterior, prior = vae.config.posterior, vae.config.prior
    # Free bits are a floor under each latent's KL, and want a KL that is a sum over latents.
    summed = posterior in {"diagonal", "categorical", "joint"} and prior in {"standard", "learned"}
    floor = ["free_bits of 0.1 or so"] if summed else []
    decoder = "a smaller decoder (hidden_dims)"
    return ["a lower kl_weight", "a longer kl_warmup", *floor, decoder, "objective='infovae'"]


def _too_wide(vae: VAE, rows: NDArray[Any]) -> list[str]:
    """Explain a collapse by a Gaussian likelihood that leaves nothing to explain.

    A linear model has a latent for each eigenvalue of the rows' covariance that is above the likelihood's variance
    (Lucas et al. 2019, arXiv:1911.02469, section 4).
    """
    if not isinstance(vae.likelihood, GaussianLikelihood):
        return []
    step = math.ceil(len(rows) / _SPECTRUM_ROWS)
    x_NF = vae.preprocessing(torch.from_numpy(np.array(rows[::step])).to(parameters_device(vae))).flatten(1)
    largest = float(torch.linalg.matrix_norm(x_NF - x_NF.mean(dim=0), ord=2)) ** 2 / len(x_NF)
    variance = float(vae.likelihood.std) ** 2
    if variance < largest:
        return []
    return [
        f"The likelihood's variance of {variance:.3g} is above the largest eigenvalue of the rows' covariance, "
        f"{largest:.3g}, where no latent pays for itself: take gaussian_std='learned', or below {largest**0.5:.2g}."
    ]
