"""The optimizers that a configuration names, and the prior on weights that makes training maximum a posteriori."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vaefeat.config import TrainConfig

__all__ = ["log_weight_prior", "make_optimizers"]


def make_optimizers(
    model: nn.Module, config: TrainConfig, *, capturable: bool = False
) -> tuple[torch.optim.Optimizer, ...]:
    """Make the optimizers of a run; together they hold every weight of the model once.

    AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), Adam (Kingma and Ba 2015, arXiv:1412.6980), Adagrad (Duchi et
    al. 2011, what Kingma and Welling 2013 used), stochastic gradient descent with momentum, or Muon (Jordan et al.
    2024; Liu et al. 2025, arXiv:2502.16982) for the matrices of linear layers with AdamW for all else. Muon's steps are
    scaled to the size of AdamW's; short runs want a learning rate of some five times theirs.

    With `capturable` the steps of AdamW, Adam and SGD can be captured in a CUDA graph.
    """
    decay, parameters = config.weight_decay, list(model.parameters())
    # A CUDA graph reads the learning rate where it stands, and steps are counted on the device.
    rate: float | Tensor = config.learning_rate
    if capturable and config.optimizer in {"adamw", "adam", "sgd"}:
        rate = torch.tensor(config.learning_rate, device=parameters[0].device)
    match config.optimizer:
        case "adamw":
            return (torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True, capturable=capturable),)
        case "adam":
            return (torch.optim.Adam(parameters, lr=rate, fused=True, capturable=capturable),)
        case "adagrad":
            return (torch.optim.Adagrad(parameters, lr=rate, fused=True),)
        case "sgd":
            return (torch.optim.SGD(parameters, lr=rate, momentum=config.momentum, fused=True),)
        case _:
            # A row or column alone has no direction to be made orthogonal to.
            matrices = [
                module.weight
                for module in model.modules()
                if isinstance(module, nn.Linear) and min(module.weight.shape) > 1
            ]
            chosen = {id(matrix) for matrix in matrices}
            others = [parameter for parameter in parameters if id(parameter) not in chosen]
            if not matrices:
                return (torch.optim.AdamW(others, lr=rate, weight_decay=decay, fused=True),)
            return (
                torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(others, lr=rate, weight_decay=decay, fused=True),
            )


def log_weight_prior(parameters: Iterable[torch.nn.Parameter], std: float) -> Tensor:
    """Give log N(w; 0, std^2 I) of all weights, in nats, up to a constant: a scalar.

    Kingma and Welling 2013 (arXiv:1312.6114), section 5: "the weight decay term corresponding to a prior of N(0, I)";
    full variational inference over the weights is their appendix F and is not what this is.
    """
    squares = [parameter.pow(2).sum() for parameter in parameters if parameter.requires_grad]
    return -torch.stack(squares).sum() / (2 * std**2)
