"""Rows of tables: quantities, yes or no, and categories side by side, of which some are missing.

A row x has a value for each column, as float32: a scaled quantity; 0 or 1; the number of a category. NaN is a missing
value, which neither the encoder's weights nor the likelihood see.

B batch, F columns, W what a network takes or gives for all of them, Q quantities, Y booleans (yes or no), C categorical
columns, K categories of the column that has the most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn import functional

from vaefeat.config import ModelConfig

__all__ = ["TableInput", "TableLayout", "TableValues"]

#: Log-odds nearer to each other than this may be in another order on another processor.
_TIE = 1e-3


class TableLayout(nn.Module):
    """Which columns hold what, and which of a network's W outputs are theirs: quantities', booleans', categories'.

    Parameters
    ----------
    config : ModelConfig
        Of whose ``columns`` it is the index: tensors on the model's device, which follow from the configuration and
        are no part of the weights.
    """

    quantities_Q: Tensor
    booleans_Y: Tensor
    categorical_C: Tensor
    order_F: Tensor
    outputs_CK: Tensor
    absent_CK: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kinds: list[list[int]] = [[], [], []]
        for column, size in enumerate(config.columns):
            kinds[min(size, 2)].append(column)
        sizes = [config.columns[column] for column in kinds[2]]
        self.split = (len(kinds[0]), len(kinds[1]), sum(sizes))
        for name, columns in zip(("quantities_Q", "booleans_Y", "categorical_C"), kinds, strict=True):
            _keep(self, name, columns)
        together = [column for columns in kinds for column in columns]
        _keep(self, "order_F", [together.index(column) for column in range(len(together))])
        widest, starts = max(sizes, default=2), [sum(sizes[:number]) for number in range(len(sizes))]
        outputs = [
            [start + min(code, size - 1) for code in range(widest)] for start, size in zip(starts, sizes, strict=True)
        ]
        _keep(self, "outputs_CK", outputs, (len(sizes), widest))
        _keep(self, "absent_CK", [[code >= size for code in range(widest)] for size in sizes], (len(sizes), widest))

    @property
    def n_outputs(self) -> int:
        """W of a decoder."""
        return sum(self.split)

    def arranged(self, *kinds: Tensor) -> Tensor:
        """Give rows (..., F) from quantities (..., Q), booleans (..., Y) and codes (..., C)."""
        parts = [part for part in kinds if part.shape[-1]]
        return torch.cat([part.to(parts[0].dtype) for part in parts], dim=-1)[..., self.order_F]

    def log_probs(self, logits: Tensor) -> Tensor:
        """Normalise the categories' logits, (..., C, K); what lies past a column's last one has no chance."""
        columns = logits[..., self.outputs_CK.flatten()].unflatten(-1, self.outputs_CK.shape)
        possible: Tensor = columns.masked_fill(self.absent_CK.bool(), float("-inf"))
        return possible.log_softmax(dim=-1)


class TableInput(nn.Module):
    """x_BF -> (B, W): quantities and booleans, categories one-hot, and channels that say what is missing.

    A missing quantity is 0, the mean, and a missing category none of them (Nazabal et al. 2018, arXiv:1807.03653,
    section 2.1); the channels are of ``optional_columns``.

    Parameters
    ----------
    config : ModelConfig
    """

    plain: Tensor
    source: Tensor
    code: Tensor
    optional: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = config.columns
        _keep(self, "plain", [column for column, size in enumerate(sizes) if size < 2])
        _keep(self, "source", [column for column, size in enumerate(sizes) if size > 1 for _ in range(size)])
        _keep(self, "code", [code for size in sizes if size > 1 for code in range(size)])
        _keep(self, "optional", config.optional_columns)
        self.n_outputs = len(self.plain) + len(self.source) + len(self.optional)

    def forward(self, x_BF: Tensor) -> Tensor:
        """Encode to (B, W)."""
        parts = []
        if len(self.plain):
            values = x_BF[:, self.plain]
            parts.append(torch.where(torch.isnan(values), 0.0, values))
        if len(self.source):
            # Nothing equals NaN.
            parts.append((x_BF[:, self.source] == self.code).to(x_BF.dtype))
        if len(self.optional):
            parts.append(torch.isnan(x_BF[:, self.optional]).to(x_BF.dtype))
        return torch.cat(parts, dim=1)


class TableValues(Distribution):
    """Independent Gaussians, coins and dice, one for each column.

    Parameters
    ----------
    output : Tensor
        (..., W): means of quantities, logits of booleans, logits of every category.
    std_Q : Tensor
    layout : TableLayout

    References
    ----------
    Nazabal et al. 2018, Handling Incomplete Heterogeneous Data using VAEs, arXiv:1807.03653, sections 2.1 (missing
    values) and 2.2 (kinds of columns).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.real, 1)

    def __init__(self, output: Tensor, std_Q: Tensor, layout: TableLayout) -> None:
        self.layout, self.std = layout, std_Q
        self.location, self.logits, categories = output.split(layout.split, dim=-1)
        self.log_probs = layout.log_probs(categories)
        super().__init__(output.shape[:-1], layout.order_F.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Give the log-probability of rows (..., F): the sum over the values that are not NaN."""
        seen = ~torch.isnan(value)
        # Filled before it is used: NaN times 0 is NaN, in gradients, too.
        filled = torch.where(seen, value, 0.0)
        deviation = (filled[..., self.layout.quantities_Q] - self.location) / self.std
        gaussian = -0.5 * (deviation.square() + math.log(2 * math.pi)) - self.std.log()
        coin = filled[..., self.layout.booleans_Y] * self.logits - functional.softplus(self.logits)
        index = filled[..., self.layout.categorical_C].long().expand(self.log_probs.shape[:-1]).unsqueeze(-1)
        die = self.log_probs.gather(-1, index).squeeze(-1)
        return torch.where(seen, self.layout.arranged(gaussian, coin, die), 0.0).sum(dim=-1)

    @property
    def mean(self) -> Tensor:
        """The mean of quantities, and of all else the likeliest value: a row that the table could hold."""
        return self.layout.arranged(self.location, self.logits > 0, self.log_probs.argmax(dim=-1))

    @property
    def decided(self) -> Tensor:
        """Whether :attr:`mean` does not depend on who computes it, (..., F): false where two values are as likely."""
        first, second = self.log_probs.topk(2, dim=-1).values.unbind(dim=-1)
        quantities = torch.ones_like(self.location)
        return self.layout.arranged(quantities, self.logits.abs() > _TIE, first - second > _TIE).bool()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw rows, without gradient and with every value."""
        with torch.no_grad():
            shape = torch.Size(sample_shape)
            location, logits, log_probs = (
                part.expand(shape + part.shape) for part in (self.location, self.logits, self.log_probs)
            )
            quantities = location + self.std * torch.randn_like(location)
            # The largest of log-probabilities with Gumbel noise is a draw (Maddison et al. 2014, arXiv:1411.0030).
            codes = (log_probs - torch.empty_like(log_probs).exponential_().log()).argmax(dim=-1)
            return self.layout.arranged(quantities, torch.rand_like(logits) < logits.sigmoid(), codes)


def _keep(module: nn.Module, name: str, numbers: Sequence[Any], shape: Sequence[int] = (-1,)) -> None:
    module.register_buffer(name, torch.tensor(list(numbers), dtype=torch.int64).view(*shape), persistent=False)
