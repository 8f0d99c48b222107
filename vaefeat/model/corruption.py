"""What is done to a row before it is encoded, when the clean row must come out.

Vincent et al. 2010, Stacked Denoising Autoencoders, JMLR 11, section 3.3; for variational auto-encoders Im et al. 2017,
arXiv:1511.06406.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CORRUPTIONS", "corrupt"]


def corrupt(x: Tensor, kind: str, level: float, *, blank: float = 0.0) -> Tensor:
    """Corrupt scaled rows (B, ...), with noise from torch's global generator.

    Parameters
    ----------
    x : Tensor
    kind : str
        A name in :data:`CORRUPTIONS`; ``none`` gives `x` itself.
    level : float
        Standard deviation of the noise, or share of the values.
    blank : float
        What a masked value becomes; NaN in tables.
    """
    return x if kind == "none" else CORRUPTIONS[kind](x, level, blank)


def _gaussian(x: Tensor, level: float, blank: float) -> Tensor:
    return x + level * torch.randn_like(x)


def _masking(x: Tensor, level: float, blank: float) -> Tensor:
    return torch.where(torch.rand_like(x) < level, blank, x)


def _salt_and_pepper(x: Tensor, level: float, blank: float) -> Tensor:
    extremes = torch.where(torch.rand_like(x) < 0.5, x.amin(), x.amax())
    return torch.where(torch.rand_like(x) < level, extremes, x)


#: Gaussian noise is added; a masked value is blank: 0 is the darkest or the mean; salt and pepper are the largest and
#: smallest values of the minibatch.
CORRUPTIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "gaussian": _gaussian,
    "masking": _masking,
    "salt_and_pepper": _salt_and_pepper,
}
