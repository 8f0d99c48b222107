"""Likelihoods p(x|z): from the decoder's output to a distribution over scaled rows, in nats.

B batch, K parameters per value of a row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from vaefeat.config import ModelConfig
from vaefeat.model.preprocessing import Scaling

__all__ = ["LIKELIHOODS", "BernoulliLikelihood", "GaussianLikelihood", "Likelihood"]

#: A standard deviation below this, on rows of variance one, is a decoder that has learned rows by heart.
_SMALLEST_LOG_STD = -6.0


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
        """Give log p(x|z) in nats per row (S * B,), for outputs (S * B, K, ...), sample by sample, and rows (B, ...)."""
        by_sample = output.view(-1, len(x), *output.shape[1:])
        repeated = x.expand(len(by_sample), *x.shape).flatten(0, 1)
        return self(output).log_prob(repeated)  # type: ignore[no-any-return]

    def mean(self, output: Tensor) -> Tensor:
        """Give E[x|z] in the scale of the network's input, (B, ...)."""
        return self(output).mean  # type: ignore[no-any-return]


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


class GaussianLikelihood(Likelihood):
    """Each value is Gaussian around the decoder's output; Kingma and Welling 2013 (arXiv:1312.6114), equation 12.

    With a fixed standard deviation this is the squared error in nats. A learned one, shared by all values, weighs
    reconstruction against KL by itself (Rybkin et al. 2021, arXiv:2006.13202, section 3).
    """

    scaling = "standard"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        learned = isinstance(config.gaussian_std, str)
        log_std = torch.tensor(0.0 if isinstance(config.gaussian_std, str) else math.log(config.gaussian_std))
        self.log_std = nn.Parameter(log_std, requires_grad=learned)

    @property
    def std(self) -> Tensor:
        """The standard deviation; a learned one cannot fall below exp(-6), and can always rise again."""
        if not self.log_std.requires_grad:
            return self.log_std.exp()
        return (_SMALLEST_LOG_STD + nn.functional.softplus(self.log_std - _SMALLEST_LOG_STD)).exp()

    def forward(self, output: Tensor) -> Distribution:
        """Give N(output, std^2)."""
        mean = output.squeeze(1)
        std = self.std.expand_as(mean)
        return Independent(Normal(mean, std, validate_args=False), mean.ndim - 1, validate_args=False)


def refuse_rows(name: str, config: ModelConfig, rows: NDArray[Any]) -> None:
    """Refuse rows that a likelihood has no meaning for."""
    return


LIKELIHOODS: dict[str, type[Likelihood]] = {"bernoulli": BernoulliLikelihood, "gaussian": GaussianLikelihood}
