"""Likelihoods p(x|z): from the decoder's output to a distribution over scaled rows, in nats.

B batch, S samples of each row's latents, K parameters per value of a row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal
from torch.nn import functional

from vaefeat.config import ModelConfig
from vaefeat.data import batches
from vaefeat.errors import ConfigError, InputError
from vaefeat.model.preprocessing import Scaling
from vaefeat.model.table import TableLayout, TableValues
from vaefeat.model.value_distributions import ContinuousBernoulli, Levels, expected_level, level_index, log_integral

__all__ = [
    "LIKELIHOODS",
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "ContinuousBernoulliLikelihood",
    "GaussianLikelihood",
    "Likelihood",
    "TableLikelihood",
    "TokensLikelihood",
    "refuse_rows",
]

#: A standard deviation below this, on rows of variance one, is a decoder that has learned rows by heart.
_SMALLEST_LOG_STD = -6.0
#: Share of the running variance that stays at each minibatch.
_DECAY = 0.99
#: Values looked at a time when rows are judged.
_VALUES_AT_A_TIME = 2**22


class Likelihood(nn.Module, ABC):
    """p(x|z), parametrised by the decoder's output.

    Parameters
    ----------
    config : ModelConfig
    """

    #: K, what the decoder gives per value of a row; an instance may set its own.
    n_parameters: int = 1
    #: What rows are scaled to before they are encoded and compared.
    scaling: ClassVar[Scaling]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, output: Tensor) -> Distribution:
        """Turn the decoder's (B, K, ...) into p(x|z) with batch shape (B,) and the event shape of a row.

        ``log_prob`` sums over the values of a row: it is in nats per row.
        """

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Give log p(x|z) in nats per row (S * B,), for outputs (S * B, K, ...), sample by sample, and rows (B, ...).

        Those that come with the library compare all samples with the same rows; this one, for others, copies them.
        """
        repeated = x.expand(len(output) // len(x), *x.shape).flatten(0, 1)
        return self(output).log_prob(repeated)  # type: ignore[no-any-return]

    def mean(self, output: Tensor) -> Tensor:
        """Give E[x|z] in the scale of the network's input, (B, ...)."""
        return self(output).mean  # type: ignore[no-any-return]

    def decided(self, output: Tensor) -> Tensor:
        """Say of each value of :meth:`mean` whether it moves with the output, rather than jump at a tie: (B, ...)."""
        return torch.ones_like(self.mean(output), dtype=torch.bool)


class BernoulliLikelihood(Likelihood):
    """Each value is a coin; Kingma and Welling 2013 (arXiv:1312.6114), equation 11.

    Values between 0 and 1 are taken as the probability that a binary value is 1: the log-likelihood is then the
    expected one, the negative cross-entropy. The decoder gives logits, which stay exact where probabilities saturate.
    """

    scaling = "unit"

    def forward(self, output: Tensor) -> Distribution:
        """Give Bernoulli(sigmoid(output))."""
        logits = output.squeeze(1)
        return Independent(Bernoulli(logits=logits, validate_args=False), logits.ndim - 1, validate_args=False)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Give sum(x * logits - log(1 + exp(logits))), to the resolution of logits of any size."""
        logits = _by_sample(output, x)
        # One kernel each way: with many samples of each row, memory traffic is what this takes.
        loss = functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        return -_sum_values(loss)


class ContinuousBernoulliLikelihood(Likelihood):
    """Each value lies in [0, 1] with a density proportional to that of a coin, and integrates to one.

    Loaiza-Ganem and Cunningham 2019, arXiv:1907.06845. Unlike the Bernoulli log-likelihood of grey values, this is a
    log-density. The decoder gives logits.
    """

    scaling = "unit"

    def forward(self, output: Tensor) -> Distribution:
        """Give the continuous Bernoulli distribution of these logits."""
        logits = output.squeeze(1)
        return Independent(ContinuousBernoulli(logits), logits.ndim - 1, validate_args=False)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Give sum(x * logits - log of the integral of exp(x * logits))."""
        logits = _by_sample(output, x)
        return _sum_values(logits * x - log_integral(logits))


class GaussianLikelihood(Likelihood):
    """Each value is Gaussian around the decoder's output; Kingma and Welling 2013 (arXiv:1312.6114), equation 12.

    All values share one standard deviation, ``gaussian_std`` in the scale of the network's input.

    - A number stays as it is; 1 makes the log-likelihood minus half the squared error, less log(2 pi) / 2 a value.
    - ``learned`` is one of the weights. It weighs reconstruction against KL by itself.
    - ``optimal`` is, at each step of training, the one that gives the minibatch (with all its samples) the highest
      likelihood: the root of the mean squared error. A running average of the variance is kept for evaluation, and
      for :meth:`forward`, which have no minibatch.

    References
    ----------
    Rybkin et al. 2021, Simple and Effective VAE Training with Calibrated Decoders, arXiv:2006.13202, sections 3.1
    (shared) and 3.3 (optimal).
    """

    scaling = "standard"

    log_std: nn.Parameter
    running_variance: Tensor
    running_weight: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.kind = config.gaussian_std
        if self.kind == "optimal":
            self.register_buffer("running_variance", torch.tensor(0.0))
            self.register_buffer("running_weight", torch.tensor(0.0))
        else:
            log_std = torch.tensor(0.0 if isinstance(self.kind, str) else math.log(self.kind))
            self.log_std = nn.Parameter(log_std, requires_grad=self.kind == "learned")

    @property
    def std(self) -> Tensor:
        """The standard deviation; the running one of ``optimal``, 1 before the first minibatch.

        None but a given one can fall below exp(-6), and a learned one can always rise again.
        """
        if self.kind == "optimal":
            # The average began at zero, and is divided by what the minibatches since then weigh.
            seen = self.running_variance / self.running_weight.clamp_min(1 - _DECAY)
            return _floored(torch.where(self.running_weight > 0, seen, 1.0)).sqrt()
        if self.kind == "learned":
            return _learned_std(self.log_std)
        return self.log_std.exp()

    def forward(self, output: Tensor) -> Distribution:
        """Give N(output, std^2)."""
        mean = output.squeeze(1)
        std = self.std.expand_as(mean)
        return Independent(Normal(mean, std, validate_args=False), mean.ndim - 1, validate_args=False)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Give the log-density; in training, ``optimal`` fits the variance to these rows and remembers it."""
        squared = _sum_values((_by_sample(output, x) - x).square())
        n_values = math.prod(x.shape[1:])
        if self.kind == "optimal" and self.training:
            # Below the floor the gradient still reaches the decoder: through the error, as for a given variance.
            variance = _floored(squared.mean() / n_values)
            self._remember(variance)
        else:
            variance = self.std.square()
        return -0.5 * (squared / variance + n_values * (math.log(2 * math.pi) + variance.log()))

    def mean(self, output: Tensor) -> Tensor:
        """Give the output."""
        return output.squeeze(1)

    @torch.no_grad()
    def _remember(self, variance: Tensor) -> None:
        self.running_variance.lerp_(variance, 1 - _DECAY)
        self.running_weight.lerp_(torch.ones_like(self.running_weight), 1 - _DECAY)


class CategoricalLikelihood(Likelihood):
    """Each value is one of ``levels`` equal steps from 0 to 1, any distribution over which can be learned.

    Rows are rounded to the nearest level: 256 levels make bytes of them. The decoder gives as many logits a value, as
    in van den Oord et al. 2016, arXiv:1601.06759, section 2.2.
    """

    scaling = "unit"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.n_parameters = config.levels

    @property
    def highest(self) -> float:
        """The highest level, in units of one level."""
        return self.n_parameters - 1

    def forward(self, output: Tensor) -> Distribution:
        """Give the distribution over levels, each of which stands for its value in [0, 1]."""
        return Independent(Levels(output.movedim(1, -1), scale=self.highest), output.ndim - 2, validate_args=False)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Give minus the cross-entropy, summed over values."""
        return _minus_cross_entropy(output, level_index(x, self.highest))

    def mean(self, output: Tensor) -> Tensor:
        """Give the expected level in [0, 1]."""
        return expected_level(output, dim=1) / self.highest


class TokensLikelihood(Likelihood):
    """Each value is an id from a vocabulary of ``levels``, without order or distance.

    Rows are ids, as uint8 or as whole float32 numbers; they are not scaled.
    """

    scaling = "none"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.n_parameters = config.levels

    def forward(self, output: Tensor) -> Distribution:
        """Give the distribution over ids; its ``mean`` is the average id, which means nothing."""
        return Independent(Levels(output.movedim(1, -1), scale=1), output.ndim - 2, validate_args=False)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Give minus the cross-entropy, summed over tokens."""
        return _minus_cross_entropy(output, level_index(x, 1))

    def mean(self, output: Tensor) -> Tensor:
        """Give the mode, not the mean: each token's most probable id, as a float."""
        return output.argmax(dim=1).to(output.dtype)


class TableLikelihood(Likelihood):
    """Each column has a distribution of its own: Gaussian, Bernoulli or categorical. A missing value has none.

    The log-likelihood of a row is that of the values which were observed (Nazabal et al. 2018, arXiv:1807.03653,
    section 2.1); the bound is then one on log p(observed values). The decoder gives the mean of each quantity, whose
    standard deviation is ``gaussian_std`` or one learned for the column, the logit of each boolean, and a logit for
    each category.
    """

    scaling = "table"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.layout = TableLayout(config)
        given = config.gaussian_std
        start = 0.0 if isinstance(given, str) else math.log(given)
        self.log_std = nn.Parameter(torch.full((self.layout.split[0],), start), requires_grad=isinstance(given, str))

    @property
    def std(self) -> Tensor:
        """The standard deviations of the quantities, in the scale of the network's input."""
        return _learned_std(self.log_std) if self.log_std.requires_grad else self.log_std.exp()

    def forward(self, output: Tensor) -> TableValues:
        """Give the distribution over rows, in which nothing is missing; its ``mean`` has the modes of categories."""
        return TableValues(output.squeeze(1), self.std, self.layout)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Give the sum over the values of a row that are not NaN."""
        by_sample = output.view(-1, len(x), output.shape[-1])
        return TableValues(by_sample, self.std, self.layout).log_prob(x).flatten()

    def decided(self, output: Tensor) -> Tensor:
        """Leave out categories that are as likely as others."""
        decided: Tensor = self(output).decided
        return decided


def refuse_rows(name: str, config: ModelConfig, rows: NDArray[Any]) -> None:
    """Refuse rows that a likelihood has no meaning for.

    Parameters
    ----------
    name : str
        As it was asked for. What ``auto`` chooses scales rows of any range.
    config : ModelConfig
    rows : ndarray of shape (n, ...)
        Read in chunks, so a memory map is not pulled in whole.

    Raises
    ------
    InputError
        Tokens that are not ids of the vocabulary, or float rows outside [0, 1] that are to be probabilities.
    """
    if name == "tokens":
        _refuse_tokens(config.levels, rows)
    elif config.columns or name == "table":
        _refuse_codes(config.columns, rows)
    elif rows.dtype.kind == "f" and (name in {"bernoulli", "continuous_bernoulli"} or config.binarize):
        low, high, _ = _survey(rows)
        # NaN is outside too.
        if not (low >= 0 and high <= 1):
            asked, advice = f"likelihood={name!r}", "take likelihood='gaussian'"
            if config.binarize:
                asked, advice = "binarize=True", "take binarize=False and likelihood='gaussian'"
            raise InputError(
                f"got rows from {low:g} to {high:g} for {asked}, wanted values in [0, 1]; scale the rows to [0, 1], or "
                f"{advice}"
            )


def _refuse_tokens(levels: int, rows: NDArray[Any]) -> None:
    low, high, fractional = _survey(rows)
    wanted = f"wanted whole token ids from 0 to {levels - 1} (levels={levels})"
    if fractional is not None:
        raise InputError(
            f"got rows with the value {fractional:g} for likelihood='tokens', {wanted}; number the tokens, or take "
            "likelihood='gaussian' for quantities"
        )
    if low < 0 or high > levels - 1:
        advice = "number the tokens from 0" if low < 0 else f"take levels={int(high) + 1} or more"
        raise InputError(f"got rows from {low:g} to {high:g} for likelihood='tokens', {wanted}; {advice}")


def _refuse_codes(columns: tuple[int, ...], rows: NDArray[Any]) -> None:
    if not columns:
        raise ConfigError(
            "got likelihood='table' for rows that are no table; give a data frame, or say which columns are "
            "categories: load_rows(X, categorical=[...])"
        )
    if rows.ndim != 2 or rows.shape[1] != len(columns):
        raise InputError(f"got rows of shape {rows.shape[1:]} for a table of {len(columns)} columns; pass its rows")
    for column, size in enumerate(columns):
        codes = rows[:, column][~np.isnan(rows[:, column])] if size else np.empty(0)
        wrong = codes[(codes != codes.round()) | (codes < 0) | (codes >= max(size, 2))]
        if len(wrong):
            raise InputError(
                f"got the value {wrong[0]:g} in column {column}, wanted whole numbers from 0 to {max(size, 2) - 1}; "
                "number its categories"
            )


def _survey(rows: NDArray[Any]) -> tuple[float, float, float | None]:
    """Give the lowest and the highest value (NaN where there is one), and a value that is no whole number, if any."""
    low, high, fractional = math.inf, -math.inf, None
    for chunk in batches(rows, max(1, _VALUES_AT_A_TIME // math.prod(rows.shape[1:]))):
        low, high = float(np.minimum(low, chunk.min())), float(np.maximum(high, chunk.max()))
        if fractional is None and chunk.dtype.kind == "f":
            parts = chunk[~np.isfinite(chunk) | (chunk != chunk.round())]
            fractional = float(parts[0]) if len(parts) else None
    return low, high, fractional


def _learned_std(log_std: Tensor) -> Tensor:
    return (_SMALLEST_LOG_STD + functional.softplus(log_std - _SMALLEST_LOG_STD)).exp()


def _by_sample(output: Tensor, x: Tensor) -> Tensor:
    """View outputs (S * B, 1, ...) as (S, B, ...), to compare with x (B, ...)."""
    return output.view(-1, *x.shape)


def _sum_values(per_value: Tensor) -> Tensor:
    """Sum (S, B, ...) over the values of a row: (S * B,)."""
    return per_value.flatten(2).sum(dim=2).flatten()


def _floored(variance: Tensor) -> Tensor:
    return variance.clamp_min(math.exp(2 * _SMALLEST_LOG_STD))


def _minus_cross_entropy(output: Tensor, index: Tensor) -> Tensor:
    """Give sum(log softmax(output) at index) of each row, for (S * B, K, ...) and (B, ...): (S * B,)."""
    log_probs = output.log_softmax(dim=1).unflatten(0, (-1, len(index)))
    wanted = index.unsqueeze(1).expand(len(log_probs), -1, -1, *index.shape[1:])
    return _sum_values(log_probs.gather(2, wanted))


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": BernoulliLikelihood,
    "gaussian": GaussianLikelihood,
    "categorical": CategoricalLikelihood,
    "tokens": TokensLikelihood,
    "continuous_bernoulli": ContinuousBernoulliLikelihood,
    "table": TableLikelihood,
}
