"""A classifier on the encoder of a variational auto-encoder: one linear layer on its last hidden layer.

B batch, F width of the hidden layer, K classes, L latents, N labelled rows.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from vaefeat.model.networks import ResidualBlock
from vaefeat.model.vae import VAE

__all__ = ["Classifier"]

#: Of the L2 penalty of the head's first weights, on standardised features: inverse strength, times rows.
_PROBE_C = 10.0
_PROBE_ITERATIONS = 500
#: Of a feature, in units of the hidden layer's root mean square.
_SMALLEST_SPREAD = 0.01


class Classifier(nn.Module):
    """p(y|x) = softmax(W h(x) + b), h being the encoder's last hidden layer.

    Parameters
    ----------
    vae : VAE
        Its encoder is the classifier's; a change of one is a change of the other.
    n_classes : int
        K. The head starts at zero, from which all classes are equally probable.
    """

    def __init__(self, vae: VAE, n_classes: int) -> None:
        super().__init__()
        self.vae = vae
        self.head = nn.Linear(vae.encoder.hidden_dim, n_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Give logits (B, K) for scaled rows (B, ...): what losses want, not probabilities."""
        return self.head(self.vae.hidden(x))  # type: ignore[no-any-return]

    def features(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give what is exported for rows as they come: :meth:`VAE.features`, and probabilities (B, K)."""
        mu_BL, logvar_BL, h_BF = self.vae.features(rows)
        return mu_BL, logvar_BL, h_BF, torch.softmax(self.head(h_BF), dim=1)

    def tempered(self, temperature: float) -> Classifier:
        """Give a copy whose logits are divided by a temperature: its head is as much smaller."""
        calibrated = copy.deepcopy(self)
        with torch.no_grad():
            calibrated.head.weight.div_(temperature)
            calibrated.head.bias.div_(temperature)
        return calibrated

    def start_head(
        self, h_NF: NDArray[np.float32], labels_N: NDArray[np.int64], weights_N: NDArray[np.float32] | None = None
    ) -> None:
        """Start the head from weighted logistic regression on hidden layers and classes 0 to K - 1, each of them there.

        A head that starts elsewhere pulls the encoder away from what it learned before it has found its own place
        (Kumar et al. 2022, arXiv:2202.10054, section 3).
        """
        scaler = StandardScaler().fit(h_NF.astype(np.float64))
        # What hardly varies is mostly rounding, which weights of 1 / its spread would make logits of.
        scaler.scale_ = np.maximum(scaler.scale_, _SMALLEST_SPREAD * float(np.sqrt(np.mean(h_NF**2)) or 1.0))
        probe = LogisticRegression(C=_PROBE_C / len(h_NF), max_iter=_PROBE_ITERATIONS, tol=1e-2)
        with warnings.catch_warnings():
            # What it starts from need not be the optimum, and one row a class is no sign of a regression.
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            probe.fit(scaler.transform(h_NF), labels_N, sample_weight=weights_N)
        weight, bias = probe.coef_, probe.intercept_
        if len(weight) == 1:
            # Of two classes scikit-learn has the difference of their logits alone.
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        weight = weight / scaler.scale_
        bias = bias - weight @ scaler.mean_
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(weight))
            self.head.bias.copy_(torch.from_numpy(bias))

    def layers(self) -> list[list[nn.Parameter]]:
        """Give the weights that p(y|x) depends on, layer by layer from the head down to the rows.

        A layer is a linear map with its bias and what normalises it; residual blocks belong to the convolution before
        them.
        """
        found: list[list[nn.Parameter]] = []
        _collect_layers(self.vae.encoder, found)
        return [list(self.head.parameters()), *reversed(found)]


def _collect_layers(module: nn.Module, found: list[list[nn.Parameter]]) -> None:
    for child in module.children():
        normalises = isinstance(child, nn.LayerNorm | nn.GroupNorm | ResidualBlock)
        own = list(child.parameters(recurse=normalises))
        if own and normalises and found:
            found[-1] += own
        elif own:
            found.append(own)
        if not normalises:
            _collect_layers(child, found)
