"""Normalizing flows: invertible maps of latents whose log-determinant is cheap in the direction that training needs.

B batch, L latents, F width of the context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

__all__ = ["AutoregressiveFlow", "AutoregressiveStep", "FlowTransform", "PlanarFlow", "PlanarStep"]

#: The gate of a fresh step is sigmoid(2) = 0.88: close to the identity, which keeps the first epochs stable.
_OPEN_GATE = 2.0
#: Its square, summed over latents, is within float32.
_FARTHEST = 1e15


class MaskedLinear(nn.Linear):
    """A linear layer of which some weights are held at zero (Germain et al. 2015, arXiv:1502.03509)."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the weights that are left."""
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


class AutoregressiveStep(nn.Module):
    """z -> gate * z + (1 - gate) * shift, where gate and shift of latent i see the latents before i alone.

    Kingma et al. 2016 (arXiv:1606.04934), equations 13 and 14; the Jacobian is triangular, so its log-determinant is
    the sum of the gates' logarithms.

    Parameters
    ----------
    latent_dim : int
    hidden_dim : int
        Width of the two hidden layers.
    context_dim : int
        F; 0 for none.
    reverse : bool
        Count the latents from the last, so that over several steps each is seen by each.
    """

    order: Tensor

    def __init__(self, latent_dim: int, hidden_dim: int, *, context_dim: int = 0, reverse: bool = False) -> None:
        super().__init__()
        degrees = torch.arange(latent_dim)
        order = degrees.flip(0) if reverse else degrees
        # Hidden units see the first 1 to L-1 latents; with one latent none is before it, and only the context is left.
        hidden = torch.arange(hidden_dim) % max(1, latent_dim - 1)
        if hidden_dim < latent_dim - 1:
            # Too few to count through: spread, so that no latent goes unseen.
            hidden = torch.linspace(0, latent_dim - 2, hidden_dim).round().long()
        seen = (hidden[:, None] >= order[None, :]) & (latent_dim > 1)
        inner = hidden[:, None] >= hidden[None, :]
        last = (order[:, None] > hidden[None, :]) & (latent_dim > 1)
        self.first = MaskedLinear(seen.float())
        self.second = MaskedLinear(inner.float())
        self.last = MaskedLinear(torch.cat([last, last]).float())
        self.context = nn.Linear(context_dim, hidden_dim, bias=False) if context_dim else None
        # The context may reach every output: it is no latent.
        self.context_out = nn.Linear(context_dim, 2 * latent_dim, bias=False) if context_dim else None
        self.activation = nn.ELU()
        self.register_buffer("order", torch.argsort(order), persistent=False)
        with torch.no_grad():
            self.last.weight.mul_(0.1)
            self.last.bias[:latent_dim].fill_(_OPEN_GATE)
            self.last.bias[latent_dim:].zero_()
            if self.context_out is not None:
                self.context_out.weight.mul_(0.1)

    def forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Give the gates' logarithms and the shifts, each of z's shape (..., L)."""
        hidden = self.first(z)
        if self.context is not None:
            hidden = hidden + self.context(context)
        hidden = self.activation(hidden)
        out = self.last(self.activation(self.second(hidden)))
        if self.context_out is not None:
            out = out + self.context_out(context)
        gate, shift = out.chunk(2, dim=-1)
        return nn.functional.logsigmoid(gate), shift


class PlanarStep(nn.Module):
    """z -> z + u tanh(w z + b), with u, w and b from the context.

    Rezende and Mohamed 2015 (arXiv:1505.05770), equations 10 to 12; u is moved so that w u >= -1, which keeps the map
    invertible (appendix A.1).
    """

    def __init__(self, latent_dim: int, context_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.parametrise = nn.Linear(context_dim, 2 * latent_dim + 1)
        with torch.no_grad():
            self.parametrise.weight.mul_(0.1)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Give the new latents (..., L), and the log-determinant (...)."""
        u, w, b = self.parametrise(context).split([self.latent_dim, self.latent_dim, 1], dim=-1)
        inner = (w * u).sum(dim=-1, keepdim=True)
        squared = w.pow(2).sum(dim=-1, keepdim=True)
        u = u + (nn.functional.softplus(inner) - 1 - inner) * w / squared.clamp_min(1e-12)
        tanh = torch.tanh((w * z).sum(dim=-1, keepdim=True) + b)
        slope = (1 - tanh.pow(2)) * (w * u).sum(dim=-1, keepdim=True)
        return z + u * tanh, torch.log1p(slope.clamp_min(-1 + 1e-6)).squeeze(-1)


class FlowTransform(Transform):
    """A flow's steps for one batch of contexts, as torch.distributions wants them.

    The latest forward map is remembered with its log-determinant: training asks for the density of what it has just
    drawn, and computes it once.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self) -> None:
        super().__init__(cache_size=1)
        self._known: tuple[Any, Any, Tensor] | None = None

    def _push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _pull(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("this flow has no inverse in closed form: only what it has just drawn has a density")

    def _call(self, x: Tensor) -> Tensor:
        z, log_determinant = self._push(x)
        self._known = (x, z, log_determinant)
        return z

    def _inverse(self, y: Tensor) -> Tensor:
        x, log_determinant = self._pull(y)
        self._known = (x, y, log_determinant)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Give log |det dy/dx| of shape (...)."""
        if self._known is not None and self._known[0] is x and self._known[1] is y:
            return self._known[2]
        return self._push(x)[1]


class AutoregressiveFlow(FlowTransform):
    """Inverse autoregressive flow: one pass forward; its inverse goes latent by latent, L passes a step."""

    def __init__(self, steps: nn.ModuleList, context: Tensor | None) -> None:
        super().__init__()
        self.steps, self.context = steps, context

    def _push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[:-1])
        for step in self.steps:
            log_gate, shift = step(z, self.context)
            gate = log_gate.exp()
            z = gate * z + (1 - gate) * shift
            total = total + log_gate.sum(dim=-1)
        return z, total

    def _pull(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.context is not None:
            z = z.expand(*torch.broadcast_shapes(z.shape[:-1], self.context.shape[:-1]), z.shape[-1])
        total = z.new_zeros(z.shape[:-1])
        for step in reversed(self.steps):
            before = torch.zeros_like(z)
            for latent in step.order.tolist():  # type: ignore[operator]
                log_gate, shift = step(before, self.context)
                gate = log_gate.exp()
                # Far from the mass the inverse grows without bound; what overflows would come back as NaN.
                solved = ((z - (1 - gate) * shift) / gate).clamp(-_FARTHEST, _FARTHEST)
                # Out of place: autograd still needs the latents that were known a moment ago.
                before = torch.cat(
                    [before[..., :latent], solved[..., latent : latent + 1], before[..., latent + 1 :]], -1
                )
            log_gate, _ = step(before, self.context)
            total = total + log_gate.sum(dim=-1)
            z = before
        return z, total


class PlanarFlow(FlowTransform):
    """Planar flow: forward only."""

    def __init__(self, steps: nn.ModuleList, context: Tensor) -> None:
        super().__init__()
        self.steps, self.context = steps, context

    def _push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[:-1])
        for step in self.steps:
            z, log_determinant = step(z, self.context)
            total = total + log_determinant
        return z, total
