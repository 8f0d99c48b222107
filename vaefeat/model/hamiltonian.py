"""Hamiltonian Monte Carlo over latents, along a path from a distribution that can be drawn to the posterior.

B batch, C chains of each row, F width of the hidden layer, L latents.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from vaefeat.errors import ConfigError
from vaefeat.model.distributions import Joint, OneHot
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.networks import parameters_device
from vaefeat.model.observation import Observed, RowNoise
from vaefeat.model.vae import VAE

__all__ = ["Origin", "Path", "State", "Transition", "adapted"]

#: Of proposals: what makes the best of each gradient in many dimensions (Neal 2011, arXiv:1206.1901, section 4.4).
_WANTED_ACCEPTANCE = 0.65
#: Steps vary between this share of the adapted one and all of it: no latent's period then fits the trajectory, which
#: would bring the chain back to where it came from (Neal 2011, section 3.2).
_SMALLEST_STEP = 0.6
_GOLDEN_RATIO = 0.618033988749895
_PRIOR_DRAWS = 1000
_POSTERIOR_DRAWS = 64
#: Of the prior's spread: what a posterior that has shrunk to a point is taken to have.
_SMALLEST_SPREAD = 1e-3


class State(NamedTuple):
    """Where the chains are.

    Attributes
    ----------
    z_CBL : Tensor
    start_CB : Tensor
        log p_0(z).
    gain_CB : Tensor
        log p(x, z) - log p_0(z).
    """

    z_CBL: Tensor
    start_CB: Tensor
    gain_CB: Tensor


class Path:
    """log f_t(z) = log p_0(z) + t (log p(x, z) - log p_0(z)), for temperatures t from 0 to 1.

    Parameters
    ----------
    vae : VAE
    x : Tensor
        Scaled rows (B, ...).
    prior : Distribution
        p(z).
    start : Distribution, optional
        p_0(z) with batch shape (B,), whose density can be evaluated anywhere; the prior when None.
    start_spread, end_spread : Tensor
        Rough standard deviations of each latent at t = 0 and t = 1, (B, L) or (L,): the units of a step. Right or
        wrong, they change how fast the chains move, and not where to.
    """

    def __init__(
        self,
        vae: VAE,
        x: Tensor,
        prior: Distribution,
        start: Distribution | None,
        *,
        start_spread: Tensor,
        end_spread: Tensor,
    ) -> None:
        self.vae, self.x, self.prior, self.start = vae, x, prior, start
        self._precisions = start_spread**-2.0, end_spread**-2.0

    def spread(self, temperature: float) -> Tensor:
        """Give the unit of a step for each latent: of Gaussians, precisions are what the path interpolates."""
        first, last = self._precisions
        return ((1 - temperature) * first + temperature * last).rsqrt()

    def state(self, z_CBL: Tensor) -> State:
        """Evaluate both ends of the path."""
        log_prior_CB = self.prior.log_prob(z_CBL)
        log_likelihood_CB = self.vae.log_likelihood(self.x, z_CBL)
        if self.start is None:
            return State(z_CBL, log_prior_CB, log_likelihood_CB)
        start_CB = self.start.log_prob(z_CBL)
        return State(z_CBL, start_CB, log_prior_CB + log_likelihood_CB - start_CB)

    def slope(self, z_CBL: Tensor, temperature: float) -> tuple[State, Tensor, Tensor]:
        """Give the state at z, log f_t (C, B) and its gradient (C, B, L)."""
        with torch.enable_grad():
            z_CBL = z_CBL.detach().requires_grad_()
            state = self.state(z_CBL)
            log_density_CB = state.start_CB + temperature * state.gain_CB
            (gradient_CBL,) = torch.autograd.grad(log_density_CB.sum(), z_CBL)
        return State(*(part.detach() for part in state)), log_density_CB.detach(), gradient_CBL


class Origin:
    """Where a model's chains begin.

    Parameters
    ----------
    vae : VAE

    Raises
    ------
    ConfigError
        Categorical latents.
    """

    def __init__(self, vae: VAE) -> None:
        self.vae = vae
        self.prior = vae.prior_distribution()
        if isinstance(self.prior, OneHot | Joint):
            raise ConfigError(
                f"got posterior={vae.config.posterior!r} with Hamiltonian Monte Carlo, which follows gradients in z; "
                "categorical latents have none; take importance_sampling, which needs none, or a model of continuous "
                "latents (posterior='diagonal', 'full', 'planar' or 'iaf')"
            )
        with fixed_noise(0, parameters_device(vae)):
            self._prior_spread_L = self.prior.sample(torch.Size([_PRIOR_DRAWS])).std(dim=0)

    def begin(
        self, batch: Observed, noise: RowNoise, *, n_chains: int, start: Literal["prior", "posterior"], annealed: bool
    ) -> tuple[Path, State]:
        """Draw the chains' first latents, and lay the path that they follow.

        Parameters
        ----------
        batch : Observed
        noise : RowNoise
            Of width L + 1.
        n_chains : int
            C.
        start : {"prior", "posterior"}
            Where the latents are drawn.
        annealed : bool
            The path begins there too; otherwise only its end is of interest.

        Raises
        ------
        ConfigError
            The path would begin at a q(z|x) whose density cannot be evaluated anywhere.
        """
        h_BF = self.vae.hidden(batch.x)
        held = self.vae.posterior.held(h_BF) if annealed and start == "posterior" else None
        if annealed and start == "posterior" and held is None:
            raise ConfigError(
                f"got start='posterior' with posterior={self.vae.config.posterior!r}, whose density is not known at "
                "every z; take start='prior', or a model with posterior='diagonal' or 'full'"
            )
        if self.vae.posterior.has_density:
            draws_SBL = self._draw(h_BF, noise, _POSTERIOR_DRAWS)
            end_spread = draws_SBL.std(dim=0).maximum(_SMALLEST_SPREAD * self._prior_spread_L)
        else:
            end_spread = self._prior_spread_L
        start_spread = self._prior_spread_L if held is None else end_spread
        path = Path(self.vae, batch.x, self.prior, held, start_spread=start_spread, end_spread=end_spread)
        z_CBL = self._draw(h_BF, noise, n_chains) if start == "posterior" else batch.draws(self.prior, n_chains)
        return path, path.state(z_CBL)

    def _draw(self, h_BF: Tensor, noise: RowNoise, n: int) -> Tensor:
        z_SBL, _ = self.vae.posterior.draw(h_BF, noise(n)[..., :-1])
        return z_SBL


class Transition:
    """One Hamiltonian transition after the other, each of which leaves its f_t as it is (Neal 2011, section 3).

    Parameters
    ----------
    path : Path
    n_leapfrog : int
        Gradients of a trajectory.
    noise : RowNoise
        Of width L + 1.
    """

    def __init__(self, path: Path, n_leapfrog: int, noise: RowNoise) -> None:
        self.path, self.n_leapfrog, self.noise = path, n_leapfrog, noise
        self._count = 0

    def __call__(self, state: State, temperature: float, step_B: Tensor) -> tuple[State, Tensor]:
        """Move every chain, or leave it where it is.

        Parameters
        ----------
        state : State
        temperature : float
        step_B : Tensor
            In units of the path's spread.

        Returns
        -------
        state : State
        acceptance_B : Tensor
            The mean over chains of the probability that the proposal is taken.
        """
        # The jitter follows a fixed sequence, not the chains: it is part of the kernel.
        self._count += 1
        jitter = _SMALLEST_STEP + (1 - _SMALLEST_STEP) * (self._count * _GOLDEN_RATIO % 1)
        unit = jitter * step_B.unsqueeze(-1) * self.path.spread(temperature)
        noise = self.noise(len(state.z_CBL))
        momentum_CBL, coin_CB = noise[..., :-1], noise[..., -1]

        _, before_CB, gradient_CBL = self.path.slope(state.z_CBL, temperature)
        before_CB = before_CB - 0.5 * momentum_CBL.square().sum(dim=-1)
        z_CBL, momentum_CBL = state.z_CBL, momentum_CBL + 0.5 * unit * gradient_CBL
        for leap in range(1, self.n_leapfrog + 1):
            z_CBL = z_CBL + unit * momentum_CBL
            proposal, after_CB, gradient_CBL = self.path.slope(z_CBL, temperature)
            momentum_CBL = momentum_CBL + (1.0 if leap < self.n_leapfrog else 0.5) * unit * gradient_CBL
        after_CB = after_CB - 0.5 * momentum_CBL.square().sum(dim=-1)

        # A trajectory that diverged has no density, and is refused.
        log_ratio_CB = (after_CB - before_CB).nan_to_num(nan=-torch.inf)
        # log_ndtr turns a normal number into the logarithm of a uniform one.
        taken_CB = torch.special.log_ndtr(coin_CB) < log_ratio_CB
        moved = State(
            torch.where(taken_CB.unsqueeze(-1), proposal.z_CBL, state.z_CBL),
            torch.where(taken_CB, proposal.start_CB, state.start_CB),
            torch.where(taken_CB, proposal.gain_CB, state.gain_CB),
        )
        return moved, log_ratio_CB.clamp_max(0).exp().mean(dim=0)


def adapted(step_B: Tensor, acceptance_B: Tensor, *, rate: float) -> Tensor:
    """Change a step so that proposals are accepted about as often as is best."""
    return step_B * torch.exp(rate * (acceptance_B - _WANTED_ACCEPTANCE))
