"""Priors p(z).

L latents, M components.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    TransformedDistribution,
)

from vaefeat.config import ModelConfig
from vaefeat.model.distributions import Joint, OneHot, standard_normal
from vaefeat.model.flows import AutoregressiveFlow, AutoregressiveStep

__all__ = [
    "PRIORS",
    "FlowPrior",
    "LearnedNormal",
    "MixtureOfNormals",
    "Prior",
    "StandardPrior",
    "VampPrior",
]

#: From scaled rows x_B... to q(z|x): what a prior that is a mixture of posteriors needs.
Encode = Callable[[Tensor], Distribution]


class Prior(nn.Module, ABC):
    """p(z).

    Parameters
    ----------
    config : ModelConfig
    row_shape : tuple of int
        Shape of one scaled row, for priors that hold pseudo-inputs.
    """

    #: Scaled training rows that :meth:`start` wants; 0 for none.
    n_starting_rows: int = 0

    def __init__(self, config: ModelConfig, row_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.latent_dim = config.latent_dim
        self.row_shape = row_shape

    @abstractmethod
    def forward(self, encode: Encode) -> Distribution:
        """Give p(z) with event shape (L,)."""

    def start(self, x: Tensor) -> None:
        """Begin from scaled training rows (n_starting_rows, ...)."""
        return


class StandardPrior(Prior):
    """p(z) = N(0, I), and uniform over the categories of categorical latents.

    Kingma and Welling 2013 (arXiv:1312.6114), section 3; Jang et al. 2017 (arXiv:1611.01144).
    """

    location: Tensor
    logits: Tensor

    def __init__(self, config: ModelConfig, row_shape: tuple[int, ...]) -> None:
        super().__init__(config, row_shape)
        n_variables = {"categorical": config.latent_dim // config.n_categories, "joint": config.n_categorical}.get(
            config.posterior, 0
        )
        # Buffers, so that the distribution is on the model's device; they are no weights and are not saved.
        n_continuous = config.latent_dim - n_variables * config.n_categories
        self.register_buffer("location", torch.zeros(n_continuous), persistent=False)
        self.register_buffer("logits", torch.zeros(n_variables, config.n_categories), persistent=False)

    def forward(self, encode: Encode) -> Distribution:
        """Give N(0, I), the uniform distribution, or both side by side."""
        if not len(self.logits):
            return standard_normal(self.location)
        uniform = OneHot(self.logits)
        return Joint(standard_normal(self.location), uniform) if len(self.location) else uniform


class LearnedNormal(Prior):
    """p(z) = N(m, diag(s^2)) with m and s learned."""

    def __init__(self, config: ModelConfig, row_shape: tuple[int, ...]) -> None:
        super().__init__(config, row_shape)
        self.location = nn.Parameter(torch.zeros(config.latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(config.latent_dim))

    def forward(self, encode: Encode) -> Distribution:
        """Give N(m, diag(s^2))."""
        normal = Normal(self.location, self.log_scale.exp(), validate_args=False)
        return Independent(normal, 1, validate_args=False)


class MixtureOfNormals(Prior):
    """p(z) = sum_m w_m N(mu_m, diag(s_m^2)) with weights, means and scales learned.

    Dilokthanakul et al. 2016, arXiv:1611.02648. The means start spread as N(0, I), which breaks the symmetry between
    components.
    """

    def __init__(self, config: ModelConfig, row_shape: tuple[int, ...]) -> None:
        super().__init__(config, row_shape)
        shape = (config.prior_components, config.latent_dim)
        self.locations = nn.Parameter(torch.randn(shape))
        self.log_scales = nn.Parameter(torch.zeros(shape))
        self.logits = nn.Parameter(torch.zeros(config.prior_components))

    def forward(self, encode: Encode) -> Distribution:
        """Give the mixture."""
        normals = Normal(self.locations, self.log_scales.exp(), validate_args=False)
        return _mixture(self.logits, Independent(normals, 1, validate_args=False))


class VampPrior(Prior):
    """p(z) = sum_m w_m q(z|u_m): a mixture of posteriors at learned pseudo-inputs u_m.

    Tomczak and Welling 2018 (arXiv:1705.07120), equation 9, with learned weights. The pseudo-inputs start at training
    rows, and are held in the scale of the network's input.
    """

    def __init__(self, config: ModelConfig, row_shape: tuple[int, ...]) -> None:
        super().__init__(config, row_shape)
        self.n_starting_rows = config.prior_components
        self.pseudo_inputs = nn.Parameter(torch.zeros(config.prior_components, *row_shape))
        self.logits = nn.Parameter(torch.zeros(config.prior_components))

    def start(self, x: Tensor) -> None:
        """Take rows as pseudo-inputs; repeated where there are fewer rows than components."""
        with torch.no_grad():
            repeats = math.ceil(len(self.pseudo_inputs) / len(x))
            self.pseudo_inputs.copy_(torch.cat([x] * repeats)[: len(self.pseudo_inputs)])

    def forward(self, encode: Encode) -> Distribution:
        """Encode the pseudo-inputs, and give the mixture."""
        return _mixture(self.logits, encode(self.pseudo_inputs))


class FlowPrior(Prior):
    """p(z) through a learned masked autoregressive flow from z to Gaussian noise.

    Papamakarios et al. 2017 (arXiv:1705.07057), used as a prior by Chen et al. 2017 (arXiv:1611.02731, section 3.2).
    The density takes one pass for each step; drawing goes latent by latent.
    """

    def __init__(self, config: ModelConfig, row_shape: tuple[int, ...]) -> None:
        super().__init__(config, row_shape)
        self.location = nn.Parameter(torch.zeros(config.latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(config.latent_dim))
        self.steps = nn.ModuleList(
            AutoregressiveStep(config.latent_dim, config.flow_hidden_dim, reverse=bool(index % 2))
            for index in range(config.prior_flows)
        )

    def forward(self, encode: Encode) -> Distribution:
        """Give the flow's distribution of z."""
        # The steps only contract z on its way to the noise; the noise's own scale makes up for it.
        noise = Independent(Normal(self.location, self.log_scale.exp(), validate_args=False), 1, validate_args=False)
        return TransformedDistribution(noise, [AutoregressiveFlow(self.steps, None).inv], validate_args=False)


def _mixture(logits: Tensor, components: Distribution) -> Distribution:
    return MixtureSameFamily(Categorical(logits=logits, validate_args=False), components, validate_args=False)


PRIORS: dict[str, type[Prior]] = {
    "standard": StandardPrior,
    "learned": LearnedNormal,
    "mixture": MixtureOfNormals,
    "vamp": VampPrior,
    "flow": FlowPrior,
}
