"""Several models of one architecture as one: each layer holds the weights of all, and computes for all at once.

What lies between the layers (activations, sampling, likelihoods, objectives) looks at one row at a time, so it needs no
change: the rows of all models make one long minibatch (M * B, ...), model by model, which each layer cuts up again.

On a processor this is several times faster than torch.vmap over whole models, whose rules for batching are looked up at
each operation and take compound operations, such as the binary cross-entropy, apart.

M models, U different minibatches among them, B rows of each, S samples of each row's posterior, N = S * B, L latents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vaefeat.model.likelihoods import GaussianLikelihood
from vaefeat.model.networks import parameters_device
from vaefeat.model.vae import VAE

__all__ = ["StackedVAE"]

#: Values of one model's input from which, on a processor, one convolution after another is faster than a grouped one.
_LARGE_INPUT = 2**16


class StackedVAE(VAE):
    """M models side by side, for rows (M * B, ...) and latents (M * B, L) or (S, M * B, L).

    Models with fewer latents than the largest are padded: their weights fill the leading part of each tensor, the rest
    is zero. A padded latent has a posterior equal to its prior and no weight in the decoder, so it adds nothing to the
    likelihood or the KL divergence; with the gradients of the padding masked, the model is the small one exactly.

    Parameters
    ----------
    vaes : sequence of VAE
        Of one configuration but for ``latent_dim``, on one device, with one scaling. Their weights become views of the
        stacked ones: what an optimizer does to those, these models show.
    minibatch_of : sequence of int
        Which of the minibatches that :meth:`observe` is given each model sees.

    Attributes
    ----------
    n_models : int
        M.
    stacked : dict of str to Parameter
        Every weight that is trained, (M, ...), under its name in a single model.
    masks : dict of str to Tensor
        Of those with padding, 1 where a weight is and 0 where padding is.
    """

    def __init__(self, vaes: Sequence[VAE], minibatch_of: Sequence[int]) -> None:
        largest = max(vaes, key=lambda vae: vae.config.latent_dim)
        super().__init__(largest.config, largest.row_shape, preprocessing=copy.deepcopy(largest.preprocessing))
        self.n_models = len(vaes)
        _stack_layers(self, self.n_models)
        self.to(parameters_device(largest))
        self._minibatch_of = torch.tensor(minibatch_of, device=parameters_device(largest))
        self._n_minibatches = max(minibatch_of) + 1
        self.stacked = {name: weight for name, weight in self.named_parameters() if weight.requires_grad}
        self.masks: dict[str, Tensor] = {}
        for model, vae in enumerate(vaes):
            for name, weight in vae.named_parameters():
                if name in self.stacked:
                    self._take_in(model, name, weight)

    def observe(self, rows: Tensor) -> Tensor:
        """Scale minibatches (U * B, ...), minibatch by minibatch, and hand them out: (M * B, ...), model by model."""
        x = self.distribute(rows)
        return torch.bernoulli(x) if self.config.binarize else x

    def distribute(self, rows: Tensor) -> Tensor:
        """Do what :meth:`observe` does, but draw nothing."""
        x: Tensor = self.preprocessing(rows)
        handed_out: Tensor = x.unflatten(0, (self._n_minibatches, -1))[self._minibatch_of]
        return handed_out.flatten(0, 1)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Give log p(x|z) in nats per row: (M * B,) or (S, M * B), for z with L after that."""
        # Samples come sample by sample; layers want them model by model.
        z_SMBL = z.reshape(-1, self.n_models, len(x) // self.n_models, z.shape[-1])
        output = self._computed(self.decoder, z_SMBL.transpose(0, 1).flatten(0, 2))
        by_model = output.unflatten(0, (self.n_models, len(z_SMBL), -1))
        return self.likelihood.log_prob(by_model.transpose(0, 1).flatten(0, 2), x).view(z.shape[:-1])

    @torch.no_grad()
    def _take_in(self, model: int, name: str, weight: nn.Parameter) -> None:
        stacked = self.stacked[name]
        place: tuple[int | slice, ...] = (model, *(slice(size) for size in weight.shape))
        stacked[place] = weight
        weight.data = stacked.data[place]
        if weight.shape != stacked.shape[1:]:
            self.masks.setdefault(name, torch.ones_like(stacked))[model] = 0
            self.masks[name][place] = 1


class _StackedLayer(nn.Module):
    """A layer of M models: (M * N, ...) -> (M * N, ...), model by model."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Module, n_models: int) -> None:
        super().__init__()
        self.n_models = n_models
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(parameter.new_zeros((n_models, *parameter.shape))))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x.unflatten(0, (self.n_models, -1))).flatten(0, 1)

    def compute(self, x_MN: Tensor) -> Tensor:
        """Compute (M, N, ...) -> (M, N, ...)."""
        raise NotImplementedError


class _StackedLinear(_StackedLayer):
    def compute(self, x_MN: Tensor) -> Tensor:
        return _Products.apply(x_MN, self.weight, self.bias)  # type: ignore[no-any-return]


class _Products(torch.autograd.Function):
    """x W^T + b for each model, with a gradient of W that lies in memory as W does.

    The one that autograd finds for torch.baddbmm is transposed, and each later pass over it would copy it.
    """

    @staticmethod
    def forward(ctx: Any, x_MNI: Tensor, weight_MOI: Tensor, bias_MO: Tensor) -> Tensor:
        ctx.save_for_backward(x_MNI, weight_MOI)
        return torch.baddbmm(bias_MO.unsqueeze(1), x_MNI, weight_MOI.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x_MNI, weight_MOI = ctx.saved_tensors
        given_MNO = gradients[0]
        passed = torch.bmm(given_MNO, weight_MOI) if ctx.needs_input_grad[0] else None
        return passed, torch.bmm(given_MNO.mT, x_MNI), given_MNO.sum(dim=1)


class _StackedLayerNorm(_StackedLayer):
    def __init__(self, layer: nn.LayerNorm, n_models: int) -> None:
        super().__init__(layer, n_models)
        self._shape, self._eps = list(layer.normalized_shape), layer.eps

    def compute(self, x_MN: Tensor) -> Tensor:
        normalised = functional.layer_norm(x_MN, self._shape, eps=self._eps)
        return torch.addcmul(self.bias.unsqueeze(1), normalised, self.weight.unsqueeze(1))


class _StackedGroupNorm(_StackedLayer):
    def __init__(self, layer: nn.GroupNorm, n_models: int) -> None:
        super().__init__(layer, n_models)
        self._n_groups, self._eps = layer.num_groups, layer.eps

    def compute(self, x_MN: Tensor) -> Tensor:
        normalised = functional.group_norm(x_MN.flatten(0, 1), self._n_groups, eps=self._eps).view(x_MN.shape)
        return torch.addcmul(self.bias[:, None, :, None, None], normalised, self.weight[:, None, :, None, None])


class _StackedConvolution(_StackedLayer):
    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d, n_models: int) -> None:
        super().__init__(layer, n_models)
        settings: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding}
        if isinstance(layer, nn.ConvTranspose2d):
            settings["output_padding"] = layer.output_padding
            self._convolve: Callable[..., Tensor] = partial(functional.conv_transpose2d, **settings)
        else:
            self._convolve = partial(functional.conv2d, **settings)

    def compute(self, x_MN: Tensor) -> Tensor:
        if x_MN.device.type == "cpu" and x_MN[0].numel() >= _LARGE_INPUT:
            return torch.stack([self._convolve(*each) for each in zip(x_MN, self.weight, self.bias, strict=True)])
        channels = x_MN.transpose(0, 1).flatten(1, 2)
        output = self._convolve(channels, self.weight.flatten(0, 1), self.bias.flatten(), groups=self.n_models)
        by_model: Tensor = output.unflatten(1, (self.n_models, -1))
        return by_model.transpose(0, 1)


class _StackedGaussian(GaussianLikelihood):
    """A standard deviation for each model, learned."""

    def __init__(self, likelihood: GaussianLikelihood, vae: StackedVAE) -> None:
        super().__init__(vae.config)
        self._n_models = vae.n_models
        self._counts = (1, 1)
        self.log_std = nn.Parameter(likelihood.log_std.new_zeros(vae.n_models))

    @property
    def std(self) -> Tensor:
        """Of each row that is being compared, sample by sample."""
        n_samples, n_rows = self._counts
        std_M: Tensor = super().std
        return std_M.repeat_interleave(n_rows).repeat(n_samples)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Give the log-density, (S * M * B,)."""
        self._counts = len(output) // len(x), len(x) // self._n_models
        return super().log_prob(output, x)


#: What stands for a layer and those derived from it.
_STACKED: dict[type[nn.Module], Callable[[Any, int], nn.Module]] = {
    nn.Linear: _StackedLinear,
    nn.LayerNorm: _StackedLayerNorm,
    nn.GroupNorm: _StackedGroupNorm,
    nn.Conv2d: _StackedConvolution,
    nn.ConvTranspose2d: _StackedConvolution,
}


def _stack_layers(module: nn.Module, n_models: int) -> None:
    for name, child in module.named_children():
        stacked = next((_STACKED[kind] for kind in _STACKED if isinstance(child, kind)), None)
        if stacked is not None:
            setattr(module, name, stacked(child, n_models))
        elif isinstance(child, GaussianLikelihood) and child.kind == "learned":
            assert isinstance(module, StackedVAE)
            module.likelihood = _StackedGaussian(child, module)
        else:
            _stack_layers(child, n_models)
            # A weight outside of these layers would silently be shared by all models.
            assert not any(weight.requires_grad for weight in child.parameters(recurse=False)), type(child).__name__
