"""What a trained model says about a row: cleaned of noise, with its missing values filled, and how unusual it is.

Every function takes a bundle, its folder or a :class:`~vaefeat.model.vae.VAE`, and gives NumPy arrays in the units of
the training rows. The same seed gives the same numbers.

B rows, L latents, K parameters of the likelihood per value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vaefeat.errors import InputError
from vaefeat.input_spec import InputSpec
from vaefeat.model.evaluation import importance_weighted_bound
from vaefeat.model.networks import parameters_device
from vaefeat.model.vae import VAE
from vaefeat.table_schema import holds_labels
from vaefeat.trained import Model, Trained, opened, whole

__all__ = ["Imputation", "anomaly_scores", "denoise", "impute"]

_ROWS_AT_A_TIME = 256
_STARTING_SAMPLES = 256


@dataclass(frozen=True)
class Imputation:
    """Rows with their missing values filled. Observed values are the ones that came in, to the bit.

    Attributes
    ----------
    rows : ndarray of the shape that the rows came in
        The posterior mean of each missing value. Floats keep their dtype; integers become float32, which holds the
        observed ones exactly.
    std : ndarray of the same shape, float32
        The posterior standard deviation of each missing value; 0 where observed.
    draws : ndarray of shape (n_draws, ...), of the dtype of `rows`
        Complete rows that the chain went through: multiple imputations.
    missing : ndarray of bool
    acceptance : float
        Share of the proposals that the correction accepted, 1 without it. Close to 0 the chain hardly moves, and means
        and deviations are those of few states.
    """

    rows: NDArray[np.floating[Any]]
    std: NDArray[np.float32]
    draws: NDArray[np.floating[Any]]
    missing: NDArray[np.bool_]
    acceptance: float


def denoise(model: Model, rows: ArrayLike) -> NDArray[np.float32]:
    """Clean corrupted rows: encode each, and decode the middle of its posterior.

    Works with any model, and best with one that was trained to (``TrainConfig.corruption``; Vincent et al. 2008).

    Parameters
    ----------
    model : VAE, Bundle or path-like
    rows : array-like of shape (n, ...) or flat (n, n_features)
        A model of uint8 rows takes floats here that noise made fractions, or led out of 0 to 255.

    Returns
    -------
    ndarray of shape (n, ...), float32

    Raises
    ------
    InputError
    """
    with opened(model) as trained:
        x = trained.scaled(rows, noisy=True)
        return np.concatenate(
            [trained.decoded(trained.middles(chunk)) for chunk in x.split(_ROWS_AT_A_TIME)], dtype=np.float32
        )


def impute(
    model: Model,
    rows: ArrayLike,
    *,
    missing: ArrayLike | None = None,
    corrected: bool = False,
    n_iterations: int = 500,
    n_draws: int = 1,
    seed: int = 0,
) -> Imputation:
    """Fill missing values with what the model expects, given the observed ones. Inpainting is the same with images.

    A chain for each row goes back and forth between z ~ q(z|x), with x filled as of now, and the missing values ~
    p(x|z) (pseudo-Gibbs; Rezende et al. 2014, arXiv:1401.4082, appendix F). Its limit is off by as much as q(z|x) is
    off the true posterior. With `corrected`, the draw of z is a proposal that is accepted or not (Metropolis within
    Gibbs; Mattei and Frellsen 2018, arXiv:1802.04826, algorithm 1), and the limit is the model's own p(missing |
    observed).

    Parameters
    ----------
    model : VAE, Bundle or path-like
    rows : array-like of shape (n, ...) or flat (n, n_features), or data frame
        What stands at missing places is not looked at. A row may be missing altogether. Of a table any column may have
        missing values; :meth:`vaefeat.table_schema.TableSchema.frame` gives the result its names back.
    missing : array-like of bool, optional
        True where missing: of the shape of `rows`, of one row, or (H, W) for images. When None, where `rows` are
        masked (:mod:`numpy.ma`) or NaN; plain integers are neither, and need it.
    corrected : bool
    n_iterations : int
        Steps of each chain. The first half brings it to where the row is likely (the first quarter without the
        correction, which would refuse to leave a poor start); means and deviations are over the second half.
    n_draws : int
        Complete rows to keep, evenly spaced over the second half, the last state among them.
    seed : int

    Returns
    -------
    Imputation

    Raises
    ------
    InputError
        Another shape, NaN at observed places, or a posterior that the correction cannot evaluate.
    """
    n_kept = whole("n_iterations", n_iterations, at_least=2) // 2
    if whole("n_draws", n_draws) > n_kept:
        raise InputError(
            f"got n_draws={n_draws} with n_iterations={n_iterations}, wanted at most {n_kept}: draws are taken from "
            "the second half; raise n_iterations"
        )
    with opened(model, seed=seed) as trained:
        if corrected:
            _refuse_correction(trained.vae.config.posterior)
        if isinstance(rows, np.ma.MaskedArray):
            missing = np.ma.getmaskarray(rows) if missing is None else missing
        table = trained.input.table
        array = np.asarray(rows if table is None or not holds_labels(rows) else table.encode(rows, holes=True))
        holes = _holes(array, missing, trained.input)
        # Any valid value at missing places satisfies the checks; the chain starts elsewhere.
        valid = trained.input.low if np.isfinite(trained.input.low) and table is None else 0.0
        x = trained.scaled(np.where(holes, np.asarray(valid, dtype=array.dtype), array))
        missing_B = torch.from_numpy(holes.reshape(x.shape)).to(trained.device)
        start = _expected_row(trained)
        all_chains = []
        for batch in zip(x.split(_ROWS_AT_A_TIME), missing_B.split(_ROWS_AT_A_TIME), strict=True):
            chains = _Chains(trained, *batch, start)
            chains.run(n_iterations, n_kept=n_kept, n_draws=n_draws, corrected=corrected)
            all_chains.append(chains)
        return _imputation(array, holes, all_chains)


def anomaly_scores(model: Model, rows: ArrayLike, *, n_samples: int = 64, seed: int = 0) -> NDArray[np.float64]:
    """Say how unusual each row is: minus its log-likelihood under the model, in nats; higher is more unusual.

    Minus the importance-weighted bound (Burda et al. 2015, arXiv:1509.00519, equation 8), so the exact figure is this
    or lower. It is of the scaled row, and comparable between rows and not between data sets. A row's score does not
    depend on its neighbours. An auto-encoder, which has no p(x), gives minus log p(x|z) at the row's code.

    A likelihood also tells how simple a row is: an empty image scores lower than a digit (Nalisnick et al. 2019,
    arXiv:1810.09136). Compare with the scores of rows that are known to be normal.

    Parameters
    ----------
    model : VAE, Bundle or path-like
    rows : array-like of shape (n, ...) or flat (n, n_features)
    n_samples : int
        Of the bound.
    seed : int

    Returns
    -------
    ndarray of shape (n,), float64

    Raises
    ------
    InputError
    """
    whole("n_samples", n_samples)
    with opened(model, seed=seed) as trained:
        vae = trained.vae
        if vae.posterior.has_density:
            return -importance_weighted_bound(vae, trained.input.prepare(rows), n_samples=n_samples, seed=seed)
        chunks = trained.scaled(rows).split(_ROWS_AT_A_TIME)
        return -np.concatenate([vae.log_likelihood(x, trained.middles(x)).double().cpu().numpy() for x in chunks])


class _Chains:
    """A chain for each row of a batch, and sums over its states, in the scale of the network's input.

    Parameters
    ----------
    trained : Trained
    x, missing : Tensor
        Scaled rows (B, ...), and where they are to be filled.
    start : Tensor
        (...): what stands there first.
    """

    def __init__(self, trained: Trained, x: Tensor, missing: Tensor, start: Tensor) -> None:
        self._trained, self._vae = trained, trained.vae
        self._prior = self._vae.prior_distribution()
        self._missing = missing
        self._x = torch.where(missing, start, x)
        self._z_BL, self._output = torch.empty(0), torch.empty(0)
        self._tally = _Tally(x, _are_names(self._vae))
        self.draws: list[NDArray[np.float32]] = []
        self.n_proposed = self.n_accepted = 0

    def run(self, n_iterations: int, *, n_kept: int, n_draws: int, corrected: bool) -> None:
        """Go `n_iterations` steps, and look at the last `n_kept` of them."""
        drawn_at = {n_iterations - 1 - i * n_kept // n_draws for i in range(n_draws)}
        burn_in = n_iterations - n_kept
        for step in range(n_iterations):
            if corrected and step > burn_in // 2:
                self._accept_or_stay()
            else:
                self._z_BL = self._trained.draws(self._x, self._noise())[0]
                self._output = self._vae.decoder(self._z_BL)
            x = self._vae.likelihood(self._output).sample()
            self._x = torch.where(self._missing, x, self._x)
            if step >= burn_in:
                self._tally.add(self._x, self._vae.likelihood.mean(self._output))
            if step in drawn_at:
                self.draws.append(self._trained.in_units(self._x).cpu().numpy())

    def summary(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Give mean and standard deviation of each value, (B, ...) in the units of the rows."""
        mean, std = self._tally.result()
        return self._trained.in_units(mean).cpu().numpy(), (std / self._vae.preprocessing.scale).cpu().numpy()

    def _noise(self) -> Tensor:
        return torch.randn(1, len(self._x), self._vae.config.latent_dim, device=self._x.device)

    def _accept_or_stay(self) -> None:
        """Propose z' from q(z|x); take it with probability min(1, w(z') / w(z)), w = p(x, z) / q(z|x)."""
        h_BF = self._vae.hidden(self._x)
        z_SBL, log_q_SB = self._vae.posterior.draw(h_BF, self._noise())
        proposal_BL, output = z_SBL[0], self._vae.decoder(z_SBL[0])
        log_q_here_B = self._vae.posterior(h_BF).log_prob(self._z_BL)
        here_B = self._log_joint(self._z_BL, self._output) - log_q_here_B
        there_B = self._log_joint(proposal_BL, output) - log_q_SB[0]
        accepted_B = torch.rand_like(here_B).log() < there_B - here_B
        self._z_BL = torch.where(accepted_B[:, None], proposal_BL, self._z_BL)
        self._output = torch.where(accepted_B.view(-1, *[1] * (output.ndim - 1)), output, self._output)
        self.n_proposed += len(accepted_B)
        self.n_accepted += int(accepted_B.sum())

    def _log_joint(self, z_BL: Tensor, output: Tensor) -> Tensor:
        log_joint_B: Tensor = self._vae.likelihood.log_prob(output, self._x) + self._prior.log_prob(z_BL)
        return log_joint_B


class _Tally:
    """Over states, :class:`_Moments` of quantities and :class:`_Modes` of names, where there are any of each."""

    def __init__(self, x: Tensor, names: Tensor) -> None:
        self._names = names
        self._moments = None if names.all() else _Moments(x)
        self._modes = _Modes(x) if names.any() else None

    def add(self, x: Tensor, mean: Tensor) -> None:
        for tally in (self._moments, self._modes):
            if tally is not None:
                tally.add(x, mean)

    def result(self) -> tuple[Tensor, Tensor]:
        found = [tally.result() for tally in (self._moments, self._modes) if tally is not None]
        (middle, spread), (name, others) = found[0], found[-1]
        return torch.where(self._names, name, middle), torch.where(self._names, others, spread)


class _Moments:
    """Mean and standard deviation over states."""

    def __init__(self, x: Tensor) -> None:
        self._n = 0
        self._means, self._sums, self._squares = torch.zeros((3, *x.shape), dtype=torch.float64, device=x.device)

    def add(self, x: Tensor, mean: Tensor) -> None:
        self._n += 1
        # E[x|z] averaged over z has the limit that x has, and less noise.
        self._means += mean
        self._sums += x
        self._squares += x.double() ** 2

    def result(self) -> tuple[Tensor, Tensor]:
        variance = self._squares / self._n - (self._sums / self._n) ** 2
        return (self._means / self._n).float(), variance.clamp_min(0).sqrt().float()


class _Modes:
    """For names, which have no mean: the most frequent of them over states, and the share of the others."""

    def __init__(self, x: Tensor) -> None:
        self._states: list[Tensor] = []

    def add(self, x: Tensor, mean: Tensor) -> None:
        self._states.append(x.to(torch.int32))

    def result(self) -> tuple[Tensor, Tensor]:
        states = torch.stack(self._states)
        modes = states.mode(dim=0).values
        return modes.float(), (states != modes).float().mean(dim=0)


def _expected_row(trained: Trained) -> Tensor:
    """Give what stands at missing places first, (...) in the scale of the network's input: E[x] from draws of p(z)."""
    likelihood, decoder = trained.vae.likelihood, trained.vae.decoder
    rows = likelihood.mean(decoder(trained.vae.sample_prior(_STARTING_SAMPLES)))
    return torch.where(_are_names(trained.vae), rows.mode(dim=0).values, rows.mean(dim=0))


def _are_names(vae: VAE) -> Tensor:
    """Say which values of a row are names, which have no mean: bool of a shape that fits a row's."""
    device = parameters_device(vae)
    if vae.config.columns:
        return torch.tensor([size > 0 for size in vae.config.columns], device=device)
    return torch.tensor(vae.config.likelihood == "tokens", device=device)


def _refuse_correction(posterior: str) -> None:
    if posterior in {"planar", "deterministic"}:
        why = "has no density" if posterior == "deterministic" else "has no density but of what it has just drawn"
        raise InputError(
            f"got corrected=True for posterior={posterior!r}, which {why}: a proposal cannot be weighed; leave "
            "corrected=False, or train with posterior='diagonal', 'full' or 'iaf'"
        )


def _holes(rows: NDArray[Any], missing: ArrayLike | None, spec: InputSpec) -> NDArray[np.bool_]:
    """Say where rows are missing, in the shape of the rows."""
    if rows.dtype.kind not in "buif":
        raise InputError(f"got rows of dtype {rows.dtype}, wanted {spec}; convert every column to numbers first")
    if missing is None:
        if rows.dtype.kind != "f":
            raise InputError(
                f"got {rows.dtype} rows without missing=, wanted an array of bool, True where a value is missing: "
                "integers have no NaN"
            )
        holes: NDArray[np.bool_] = np.isnan(rows)
        return holes
    given = np.asarray(missing)
    # Of all rows, of one row for all, or of one channel for all.
    if given.dtype != np.bool_ or given.shape not in {rows.shape, rows.shape[1:], rows.shape[2:]} or not given.ndim:
        raise InputError(
            f"got missing of dtype {given.dtype} and shape {given.shape}, wanted bool of shape {rows.shape} or "
            f"{rows.shape[1:]}"
        )
    holes = np.broadcast_to(given, rows.shape).copy()
    return holes


def _imputation(rows: NDArray[Any], holes: NDArray[np.bool_], chains: list[_Chains]) -> Imputation:
    dtype = rows.dtype if rows.dtype.kind == "f" else np.dtype(np.float32)
    means, stds = (np.concatenate(parts) for parts in zip(*(chain.summary() for chain in chains), strict=True))
    draws = np.concatenate([np.stack(chain.draws) for chain in chains], axis=1)
    proposed = sum(chain.n_proposed for chain in chains)
    return Imputation(
        rows=np.where(holes, means.reshape(rows.shape).astype(dtype), rows.astype(dtype, copy=False)),
        std=np.where(holes, stds.reshape(rows.shape), np.float32(0)),
        draws=np.where(holes, draws.reshape(-1, *rows.shape).astype(dtype), rows.astype(dtype, copy=False)),
        missing=holes,
        acceptance=sum(chain.n_accepted for chain in chains) / proposed if proposed else 1.0,
    )
