"""Divergences of samples against slow double loops, optimal assignments and what is known of shifted Gaussians."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from vaefeat.model.divergences import maximum_mean_discrepancy, sliced_wasserstein


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def slow_discrepancy(a: Tensor, b: Tensor) -> float:
    """Sum kernels pair by pair, in plain numbers: Tolstikhin et al. 2018, algorithm 2, unbiased."""

    def kernel(x: list[float], y: list[float]) -> float:
        squared = sum((i - j) ** 2 for i, j in zip(x, y, strict=True))
        widths = [2 * len(x) * scale for scale in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)]
        return sum(width / (width + squared) for width in widths) / len(widths)

    ours, theirs, n = a.tolist(), b.tolist(), len(a)
    within = sum(kernel(s[i], s[j]) for s in (ours, theirs) for i in range(n) for j in range(n) if i != j)
    return within / (n * (n - 1)) - 2 * sum(kernel(x, y) for x in ours for y in theirs) / n**2


@pytest.mark.parametrize("n_latents", [1, 4])
def test_mmd_equals_a_slow_double_loop(n_latents: int) -> None:
    a, b = normal(9, n_latents), 0.5 + normal(9, n_latents, seed=1)
    assert maximum_mean_discrepancy(a, b).item() == pytest.approx(slow_discrepancy(a, b), abs=1e-12)


@pytest.mark.parametrize(("n_samples", "n_latents"), [(2, 1), (8, 1), (8, 6)])
def test_mmd_of_equal_distributions_is_zero_in_the_mean(n_samples: int, n_latents: int) -> None:
    estimates = torch.stack(
        [
            maximum_mean_discrepancy(*normal(2, n_samples, n_latents, seed=seed).unbind())
            for seed in range(3000)  # a biased estimate would be off by about 1 / n_samples
        ]
    )
    standard_error = (estimates.std() / math.sqrt(len(estimates))).item()
    assert estimates.mean().abs().item() < 4 * standard_error
    assert standard_error < 0.02
    assert (estimates < 0).any()


def test_mmd_grows_with_the_distance_of_the_distributions() -> None:
    a, b = normal(300, 3), normal(300, 3, seed=1)
    values = [maximum_mean_discrepancy(a + shift, b).item() for shift in (0.0, 0.3, 0.6, 1.2, 2.4)]
    assert abs(values[0]) < 0.01
    assert values == sorted(values)
    assert values[-1] > 0.3
    assert maximum_mean_discrepancy(0.1 * a, b) > 0.1  # same mean, other spread


def test_mmd_of_one_sample_counts_nothing_and_changes_no_argument() -> None:
    assert maximum_mean_discrepancy(normal(1, 3), normal(1, 3, seed=1)).item() == 0
    a, b = normal(5, 3), normal(5, 3, seed=1)
    maximum_mean_discrepancy(a, b)
    assert torch.equal(a, normal(5, 3))
    assert torch.equal(b, normal(5, 3, seed=1))


def test_mmd_gradient_equals_finite_differences_and_pulls_towards_the_prior() -> None:
    a, b = normal(5, 2).requires_grad_(), normal(5, 2, seed=1)
    assert torch.autograd.gradcheck(lambda z: maximum_mean_discrepancy(z, b), a)
    far = (normal(50, 2) + 3).requires_grad_()
    (gradient,) = torch.autograd.grad(maximum_mean_discrepancy(far, normal(50, 2, seed=1)), far)
    assert (gradient.mean(dim=0) > 0).all()


@pytest.mark.parametrize("n_projections", [1, 7])
def test_sliced_wasserstein_of_one_latent_is_the_cost_of_the_best_assignment(n_projections: int) -> None:
    a, b = normal(40, 1, dtype=torch.float32), 0.7 + 2 * normal(40, 1, seed=1, dtype=torch.float32)
    costs = (a - b.T).square().numpy()
    wanted = costs[scipy.optimize.linear_sum_assignment(costs)].mean()
    # On a line every direction is +1 or -1.
    assert sliced_wasserstein(a, b, n_projections=n_projections).item() == pytest.approx(wanted, rel=1e-5)


def test_sliced_wasserstein_of_the_same_set_in_any_order_is_zero() -> None:
    a = normal(30, 5, dtype=torch.float32)
    order = np.random.default_rng(0).permutation(30)
    assert sliced_wasserstein(a, a[order], n_projections=20).item() == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_of_a_shift_is_its_mean_square_along_the_directions() -> None:
    torch.manual_seed(0)
    a, shift = normal(30, 4, dtype=torch.float32), torch.tensor([1.0, -2.0, 0.5, 3.0])
    # A direction's component of the shift has a mean square of |shift|^2 / L.
    got = sliced_wasserstein(a, a + shift, n_projections=50_000).item()
    assert got == pytest.approx(shift.square().sum().item() / 4, rel=0.03)


def test_sliced_wasserstein_gradient_moves_samples_onto_the_prior() -> None:
    torch.manual_seed(0)
    z, prior = (0.2 * normal(64, 2, dtype=torch.float32) + 3).requires_grad_(), normal(64, 2, seed=1).float()
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        sliced_wasserstein(z, prior, n_projections=20).backward()
        optimizer.step()
    torch.testing.assert_close(z.detach().mean(dim=0), prior.mean(dim=0), atol=0.1, rtol=0)
    torch.testing.assert_close(z.detach().std(dim=0), prior.std(dim=0), atol=0.1, rtol=0)
