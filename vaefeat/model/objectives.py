"""Objectives: what training maximises, in nats per row.

B batch, L latents, S samples of each row's posterior.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from vaefeat.config import TrainConfig
from vaefeat.data import batches
from vaefeat.model.augmentation import TABLE_AUGMENTATIONS, augment, suitable
from vaefeat.model.basis import equal_variance_basis
from vaefeat.model.contrast import Memory, info_nce, neighbour_info_nce
from vaefeat.model.corruption import corrupt
from vaefeat.model.distributions import factors
from vaefeat.model.divergences import maximum_mean_discrepancy, sliced_wasserstein

if TYPE_CHECKING:
    from vaefeat.model.vae import VAE

__all__ = [
    "ELBO",
    "IWAE",
    "OBJECTIVES",
    "Contrastive",
    "InfoVAE",
    "MaximumMeanDiscrepancy",
    "Objective",
    "Reconstruction",
    "SlicedWasserstein",
    "Terms",
    "kl_of",
]


class Terms(NamedTuple):
    """An objective's parts for a batch, each of shape (B,), in nats per row.

    Attributes
    ----------
    objective : Tensor
        What is maximised, weights included.
    log_likelihood : Tensor
        E_q[log p(x|z)], estimated.
    kl : Tensor
        KL(q(z|x) || p(z)), unweighted, whether or not it is part of the objective; 0 for a deterministic posterior,
        whose KL divergence is infinite.
    """

    objective: Tensor
    log_likelihood: Tensor
    kl: Tensor


class Objective(ABC):
    """What training maximises.

    Parameters
    ----------
    config : TrainConfig

    Attributes
    ----------
    memory : Module
        What it keeps from one minibatch to the next, in buffers: part of the state of a run.
    comparable : bool
        Whether a greater value on held-out rows means a better model, whatever the epochs; if not, the last weights
        are kept.
    """

    comparable: ClassVar[bool] = True

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.memory = nn.Module()

    def start(self, vae: VAE) -> None:
        """Make what it keeps, on the model's device, for a run of training; elsewhere it does without."""
        return

    def anneal(self, progress: float) -> None:
        """Turn what changes with the share of training that is done."""
        return

    def finish(self, vae: VAE, rows: NDArray[Any]) -> None:
        """Bring a trained model into the form in which it is exported, by some of the rows (n, ...)."""
        return

    @abstractmethod
    def __call__(self, vae: VAE, rows: Tensor, *, kl_weight: float | Tensor) -> Terms:
        """Estimate the terms on rows (B, ...) as they came, with gradients to every weight.

        Parameters
        ----------
        vae : VAE
        rows : Tensor
            uint8 or float32, not yet scaled.
        kl_weight : float or scalar Tensor
            Weight of the KL term.
        """

    def look(self, vae: VAE, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Give the scaled rows that must come out, and what is encoded: the same, or a corrupted copy."""
        x = vae.observe(rows)
        return x, self._corrupted(vae, x)

    def _corrupted(self, vae: VAE, x: Tensor) -> Tensor:
        return corrupt(x, self.config.corruption, self.config.corruption_level, blank=vae.preprocessing.blank)


class ELBO(Objective):
    """The evidence lower bound with L = ``n_samples`` reparameterized samples.

    log p(x) >= E_q[log p(x|z)] - kl_weight * KL(q(z|x) || p(z)). With the KL divergence in closed form this is
    estimator B of Kingma and Welling 2013 (arXiv:1312.6114), equation 7; with ``kl_estimator="sampled"``, and where
    posterior and prior have no closed form, estimator A, equation 6. ``kl_weight`` is beta (Higgins et al. 2017);
    ``free_bits`` are Kingma et al. 2016 (arXiv:1606.04934), appendix C.8: the KL of a latent, averaged over the
    minibatch, costs only what is above them.
    """

    def __call__(self, vae: VAE, rows: Tensor, *, kl_weight: float | Tensor) -> Terms:
        """Estimate the bound."""
        x, given = self.look(vae, rows)
        q, p = vae.encode(given), vae.prior_distribution()
        z_SBL = q.rsample(torch.Size([self.config.n_samples]))
        if self.config.kl_estimator == "sampled":
            kl_B = _sampled_kl(q, p, z_SBL)
        else:
            kl_B = kl_of(q, p, z_SBL)
        log_likelihood_B = vae.log_likelihood(x, z_SBL).mean(dim=0)
        return Terms(log_likelihood_B - kl_weight * self._cost(q, p, kl_B), log_likelihood_B, kl_B)

    def _cost(self, q: Distribution, p: Distribution, kl_B: Tensor) -> Tensor:
        if not self.config.free_bits:
            return kl_B
        per_latent = factors(q, p).mean(dim=0).clamp_min(self.config.free_bits)
        return per_latent.sum().expand_as(kl_B)


class IWAE(Objective):
    """The importance-weighted bound with k = ``n_samples``.

    log 1/k sum_s p(x, z_s) / q(z_s|x) (Burda et al. 2015, arXiv:1509.00519, equation 8); the evidence lower bound for
    k = 1. The gradient is doubly reparameterized where the posterior is Gaussian (Tucker et al. 2019,
    arXiv:1810.04152, equation 8): its signal does not vanish as k grows. A ``kl_weight`` other than 1 weighs
    log p(z) - log q(z|x) within each weight.
    """

    def __call__(self, vae: VAE, rows: Tensor, *, kl_weight: float | Tensor) -> Terms:
        """Estimate the bound."""
        x, given = self.look(vae, rows)
        h_BF, p = vae.hidden(given), vae.prior_distribution()
        q: Distribution = vae.posterior(h_BF)
        z_SBL = q.rsample(torch.Size([self.config.n_samples]))
        # The score of the posterior's own parameters is what the second reparameterization removes.
        held = vae.posterior.held(h_BF) if self.config.gradient != "reparameterized" else None
        ratio_SB = (held or q).log_prob(z_SBL) - p.log_prob(z_SBL)
        log_likelihood_SB = vae.log_likelihood(x, z_SBL)
        log_weight_SB = log_likelihood_SB - kl_weight * ratio_SB
        bound_B = torch.logsumexp(log_weight_SB, dim=0) - math.log(self.config.n_samples)
        if held is not None and z_SBL.requires_grad:
            share_SB = torch.softmax(log_weight_SB.detach(), dim=0)
            # On the way to the encoder each sample's gradient is weighted once more; under a KL weight other than 1 the
            # score that is replaced carries that weight, and so does its replacement.
            factor_SB = 1 - kl_weight + kl_weight * share_SB
            z_SBL.register_hook(lambda gradient: gradient * factor_SB.unsqueeze(-1))
        return Terms(bound_B, log_likelihood_SB.mean(dim=0), ratio_SB.mean(dim=0))


class Contrastive(Objective):
    """The evidence lower bound, and a mean that says the same of two views of a row and another thing of other rows.

    log p(t|z) - kl_weight * (content_kl_weight * KL_content + KL_style) - contrastive_weight * InfoNCE, for two views t
    and t' of a row (:mod:`vaefeat.model.augmentation`): the first is encoded and must come out again, and the means of
    both views' content must find each other among the views of the minibatch. Of a table's row, whose views have values
    of other rows, the first is the row itself. What differs between views, and so is
    needed for t but not for the other term, is left to the ``style_dim`` last latents. For evaluation the first view is
    the row itself: the bound is that of the data. Where views are corrupted, it is the clean one that must come out.

    After a share ``neighbours_after`` of training it is no longer the other view that looks, but one of its
    ``neighbours`` nearest among the last ``remembered`` views (:func:`vaefeat.model.contrast.neighbour_info_nce`).

    References
    ----------
    Kingma and Welling 2013, arXiv:1312.6114, equation 7; van den Oord et al. 2018, arXiv:1807.03748, equation 4; views
    in place of a supervised split as in Sinha and Dieng 2021, CR-VAE, arXiv:2105.14859, which ties their posteriors by
    a KL divergence; Dwibedi et al. 2021, arXiv:2104.14548, equation 3.
    """

    #: The term goes by neighbours that move; and features go on improving where the bound has ceased to.
    comparable = False

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self._by_neighbours = torch.zeros((), dtype=torch.bool)

    def start(self, vae: VAE) -> None:
        """Make room for views to remember."""
        if self.config.neighbours:
            device = next(vae.parameters()).device
            width = vae.config.latent_dim - vae.config.style_dim
            self.memory = Memory(self.config.remembered, width).to(device)
            self._by_neighbours = self._by_neighbours.to(device)

    def anneal(self, progress: float) -> None:
        """Let neighbours look, once enough of training is done."""
        self._by_neighbours.fill_(progress >= self.config.neighbours_after)

    def finish(self, vae: VAE, rows: NDArray[Any]) -> None:
        """Give the features axes along which all of them vary alike: a scaler behind them changes nothing then."""
        vae.basis = None
        means_NL = _exported_means(vae, rows).double().cpu().numpy()
        vae.basis = torch.from_numpy(equal_variance_basis(np.atleast_2d(np.cov(means_NL.T)))).to(next(vae.parameters()))

    def __call__(self, vae: VAE, rows: Tensor, *, kl_weight: float | Tensor) -> Terms:
        """Estimate bound and contrast; in a minibatch of one row there is nothing to contrast with."""
        x, n_content = vae.observe(rows), vae.config.latent_dim - vae.config.style_dim
        first, second, whole = self._views(vae, x)
        given = self._corrupted(vae, torch.cat([first, second]))
        h_2BF = vae.hidden(given)
        content_BL, other_BL = vae.posterior.statistics(h_2BF)[0][:, :n_content].chunk(2)
        contrast_B = self._contrast(content_BL, other_BL, remember=vae.training)
        q, p = vae.posterior(h_2BF[: len(x)]), vae.prior_distribution()
        z_SBL = q.rsample(torch.Size([self.config.n_samples]))
        log_likelihood_B = vae.log_likelihood(whole, z_SBL).mean(dim=0)
        kl_BL = factors(q, p)
        cost_B = self.config.content_kl_weight * kl_BL[:, :n_content].sum(dim=1) + kl_BL[:, n_content:].sum(dim=1)
        objective_B = log_likelihood_B - kl_weight * cost_B - self.config.contrastive_weight * contrast_B
        return Terms(objective_B, log_likelihood_B, kl_BL.sum(dim=1))

    def _contrast(self, first_BL: Tensor, second_BL: Tensor, *, remember: bool) -> Tensor:
        temperature = self.config.contrastive_temperature
        contrast_B = info_nce(first_BL, second_BL, temperature=temperature)
        if not isinstance(self.memory, Memory):
            return contrast_B
        # Both are computed at every step: what is compiled has no branches.
        by_neighbours_B = neighbour_info_nce(
            first_BL, second_BL, self.memory, n_nearest=self.config.neighbours, temperature=temperature
        )
        enough = self.memory.n_seen >= self.config.neighbours
        chosen_B = torch.where(self._by_neighbours & enough, by_neighbours_B, contrast_B)
        if remember:
            self.memory.remember(second_BL)
        return chosen_B

    def _views(self, vae: VAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give two views of each row, and what must come out of the first one."""
        scaling = vae.preprocessing
        names = suitable(x.shape[1:], self.config.augmentations, ids=scaling.whole)

        def view() -> Tensor:
            # A Bernoulli likelihood of what is brighter than 1 has no upper bound.
            return augment(x, names, strength=self.config.augmentation_strength).clamp(scaling.low, scaling.high)

        if not vae.training:
            return x, view(), x
        # A moved image is an image, and has its own style; values of other rows are noise, and nothing to reconstruct.
        noise = set(names) <= set(TABLE_AUGMENTATIONS)
        first = view()
        return (x, first, x) if noise else (first, view(), first)


class Reconstruction(Objective):
    """E[log p(x|z)] alone: an auto-encoder, where the posterior is deterministic.

    With a Gaussian likelihood of fixed standard deviation this is the squared error; with ``corruption`` a denoising
    auto-encoder (Vincent et al. 2010).
    """

    def __call__(self, vae: VAE, rows: Tensor, *, kl_weight: float | Tensor) -> Terms:
        """Estimate the log-likelihood."""
        x, given = self.look(vae, rows)
        q = vae.encode(given)
        z_SBL = q.rsample(torch.Size([self.config.n_samples]))
        log_likelihood_B = vae.log_likelihood(x, z_SBL).mean(dim=0)
        return Terms(log_likelihood_B, log_likelihood_B, _reported_kl(vae, q, z_SBL))


class _Matching(Objective):
    """Samples of the aggregate posterior are compared with as many of the prior."""

    @abstractmethod
    def divergence(self, z_NL: Tensor, prior_NL: Tensor) -> Tensor:
        """Give the divergence of two sets of samples, a scalar."""

    def __call__(self, vae: VAE, rows: Tensor, *, kl_weight: float | Tensor) -> Terms:
        """Estimate log-likelihood minus weighted divergence."""
        x, given = self.look(vae, rows)
        q = vae.encode(given)
        z_SBL = q.rsample(torch.Size([self.config.n_samples]))
        log_likelihood_B = vae.log_likelihood(x, z_SBL).mean(dim=0)
        z_NL = z_SBL.flatten(0, 1)
        divergence = self.divergence(z_NL, vae.sample_prior(len(z_NL)))
        return self.combine(vae, q, z_SBL, log_likelihood_B, self.config.divergence_weight * divergence, kl_weight)

    def combine(
        self,
        vae: VAE,
        q: Distribution,
        z_SBL: Tensor,
        log_likelihood_B: Tensor,
        cost: Tensor,
        kl_weight: float | Tensor,
    ) -> Terms:
        """Put the terms together; the divergence stands in place of the KL term."""
        return Terms(log_likelihood_B - kl_weight * cost, log_likelihood_B, _reported_kl(vae, q, z_SBL))


class MaximumMeanDiscrepancy(_Matching):
    """log p(x|z) - kl_weight * divergence_weight * MMD^2(q(z), p(z)): the Wasserstein auto-encoder, WAE-MMD.

    Tolstikhin et al. 2018, arXiv:1711.01558, equation 4.
    """

    def divergence(self, z_NL: Tensor, prior_NL: Tensor) -> Tensor:
        """Give MMD^2."""
        return maximum_mean_discrepancy(z_NL, prior_NL)


class InfoVAE(MaximumMeanDiscrepancy):
    """log p(x|z) - kl_weight * KL(q(z|x) || p(z)) - divergence_weight * MMD^2(q(z), p(z)).

    Zhao et al. 2019, arXiv:1706.02262, equation 6, with kl_weight = 1 - alpha and divergence_weight =
    alpha + lambda - 1.
    """

    def combine(
        self,
        vae: VAE,
        q: Distribution,
        z_SBL: Tensor,
        log_likelihood_B: Tensor,
        cost: Tensor,
        kl_weight: float | Tensor,
    ) -> Terms:
        """Put the terms together; the divergence stands beside the KL term."""
        p = vae.prior_distribution()
        kl_B = _sampled_kl(q, p, z_SBL) if self.config.kl_estimator == "sampled" else kl_of(q, p, z_SBL)
        return Terms(log_likelihood_B - kl_weight * kl_B - cost, log_likelihood_B, kl_B)


class SlicedWasserstein(_Matching):
    """log p(x|z) - kl_weight * divergence_weight * SW_2^2(q(z), p(z)): the sliced Wasserstein auto-encoder.

    Kolouri et al. 2019, arXiv:1804.01947.
    """

    def divergence(self, z_NL: Tensor, prior_NL: Tensor) -> Tensor:
        """Give the squared sliced Wasserstein-2 distance."""
        return sliced_wasserstein(z_NL, prior_NL, n_projections=self.config.n_projections)


@torch.no_grad()
def _exported_means(vae: VAE, rows: NDArray[Any]) -> Tensor:
    device = next(vae.parameters()).device
    return torch.cat([vae.features(torch.from_numpy(np.array(chunk)).to(device))[0] for chunk in batches(rows, 512)])


def kl_of(q: Distribution, p: Distribution, z_SBL: Tensor) -> Tensor:
    """Give KL(q || p) of each row (B,): in closed form where one is known, else estimated at the samples (S, B, L)."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return _sampled_kl(q, p, z_SBL)


def _sampled_kl(q: Distribution, p: Distribution, z_SBL: Tensor) -> Tensor:
    return (q.log_prob(z_SBL) - p.log_prob(z_SBL)).mean(dim=0)


@torch.no_grad()
def _reported_kl(vae: VAE, q: Distribution, z_SBL: Tensor) -> Tensor:
    """Give the KL divergence for the record, where there is one and it is no part of the objective."""
    if not vae.posterior.has_density:
        return z_SBL.new_zeros(z_SBL.shape[1])
    return kl_of(q, vae.prior_distribution(), z_SBL)


OBJECTIVES: dict[str, type[Objective]] = {
    "elbo": ELBO,
    "contrastive": Contrastive,
    "iwae": IWAE,
    "mmd": MaximumMeanDiscrepancy,
    "infovae": InfoVAE,
    "sliced_wasserstein": SlicedWasserstein,
    "reconstruction": Reconstruction,
}
