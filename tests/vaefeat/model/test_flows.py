"""Flows against autograd's Jacobian: log-determinants, order, inverses, and that planar maps have one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vaefeat.model.flows import AutoregressiveFlow, AutoregressiveStep, PlanarFlow, PlanarStep

CONTEXT_DIM = 3


def strong(module: nn.Module) -> None:
    """Give large random weights: a fresh flow is close to the identity, where much would pass."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def autoregressive(latent_dim: int, *, orders: str, context: bool = False, hidden_dim: int = 16) -> AutoregressiveFlow:
    """Make a flow in float64 with a step for each letter: F counts from the first latent, R from the last."""
    torch.manual_seed(0)
    steps = nn.ModuleList(
        AutoregressiveStep(
            latent_dim, hidden_dim, context_dim=CONTEXT_DIM if context else 0, reverse={"F": False, "R": True}[order]
        )
        for order in orders
    )
    strong(steps)
    context_F = torch.randn(CONTEXT_DIM, dtype=torch.float64) if context else None
    return AutoregressiveFlow(steps.double(), context_F)


def planar(latent_dim: int, n_steps: int = 3) -> PlanarFlow:
    torch.manual_seed(0)
    steps = nn.ModuleList(PlanarStep(latent_dim, CONTEXT_DIM) for _ in range(n_steps))
    strong(steps)
    return PlanarFlow(steps.double(), torch.randn(CONTEXT_DIM, dtype=torch.float64))


def jacobian(flow: AutoregressiveFlow | PlanarFlow, z_L: Tensor) -> Tensor:
    """Give dy_i / dz_j by autograd."""
    matrix: Tensor = torch.autograd.functional.jacobian(flow, z_L)
    return matrix


def point(latent_dim: int) -> Tensor:
    return torch.randn(latent_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("latent_dim", [1, 2, 7])
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("orders", ["F", "R", "FRFR"])
def test_autoregressive_log_determinant_equals_that_of_autograds_jacobian(
    latent_dim: int, context: bool, orders: str
) -> None:
    flow, z = autoregressive(latent_dim, orders=orders, context=context), point(latent_dim)
    sign, wanted = torch.linalg.slogdet(jacobian(flow, z))
    assert sign == 1
    assert abs(wanted) > 0.1  # far from the identity
    torch.testing.assert_close(flow.log_abs_det_jacobian(z, flow(z)), wanted)


@pytest.mark.parametrize("latent_dim", [2, 7])
@pytest.mark.parametrize("context", [False, True])
def test_a_step_sees_only_the_latents_before_it_in_its_order(latent_dim: int, context: bool) -> None:
    z = point(latent_dim)
    forwards = jacobian(autoregressive(latent_dim, orders="F", context=context), z)
    backwards = jacobian(autoregressive(latent_dim, orders="R", context=context), z)
    assert not forwards.triu(1).any()
    assert not backwards.tril(-1).any()
    # And all of them: nothing that may be seen is masked away.
    assert forwards.tril().count_nonzero() == backwards.triu().count_nonzero() == latent_dim * (latent_dim + 1) // 2


@pytest.mark.parametrize("latent_dim", [2, 7])
def test_two_steps_in_turned_order_let_every_latent_see_every_other(latent_dim: int) -> None:
    z = point(latent_dim)
    assert jacobian(autoregressive(latent_dim, orders="FR"), z).all()
    assert jacobian(autoregressive(latent_dim, orders="RF"), z).all()
    assert not jacobian(autoregressive(latent_dim, orders="FF"), z).triu(1).any()


def test_hidden_layer_narrower_than_the_latents_still_sees_all_of_them() -> None:
    # Otherwise latents beyond the width of the hidden layer would go through as if they were independent.
    assert jacobian(autoregressive(9, orders="FR", hidden_dim=4), point(9)).all()


@pytest.mark.parametrize("latent_dim", [1, 2, 7])
@pytest.mark.parametrize("context", [False, True])
def test_autoregressive_inverse_undoes_the_flow_both_ways(latent_dim: int, context: bool) -> None:
    flow = autoregressive(latent_dim, orders="FRF", context=context)
    z = torch.randn(4, 5, latent_dim, dtype=torch.float64)
    pushed = flow(z)
    assert pushed.shape == z.shape
    # Copies, or the transform would hand back what it remembers.
    pulled = flow.inv(pushed.clone())
    torch.testing.assert_close(pulled, z, atol=1e-9, rtol=0)
    torch.testing.assert_close(flow(pulled.clone()), pushed, atol=1e-9, rtol=0)


def test_log_determinant_of_the_inverse_is_the_negative_one() -> None:
    flow = autoregressive(3, orders="FR", context=True)
    y = torch.randn(6, 3, dtype=torch.float64)
    x = flow.inv(y)
    fresh = flow.log_abs_det_jacobian(x.clone(), y.clone())
    torch.testing.assert_close(flow.inv.log_abs_det_jacobian(y, x), -fresh)


def test_gradient_through_the_inverse_equals_finite_differences() -> None:
    flow = autoregressive(3, orders="FR")

    def inverse(y: Tensor) -> tuple[Tensor, Tensor]:
        return flow._pull(y)

    assert torch.autograd.gradcheck(inverse, torch.randn(2, 3, dtype=torch.float64, requires_grad=True))


def test_context_changes_the_autoregressive_map_even_of_a_single_latent() -> None:
    flow, z = autoregressive(1, orders="F", context=True), point(1)
    other = AutoregressiveFlow(flow.steps, torch.zeros(CONTEXT_DIM, dtype=torch.float64))
    assert abs(flow(z) - other(z)) > 1e-3


def test_masked_weights_stay_without_effect_under_training() -> None:
    flow = autoregressive(4, orders="F")
    optimizer = torch.optim.SGD(flow.steps.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        flow(torch.randn(8, 4, dtype=torch.float64)).pow(2).sum().backward()
        optimizer.step()
    assert not jacobian(flow, point(4)).triu(1).any()


def test_remembered_log_determinant_is_not_given_for_other_latents() -> None:
    for flow in (autoregressive(2, orders="FR"), planar(2)):
        first, second = torch.randn(2, 3, 2, dtype=torch.float64)
        pushed = flow(first)
        remembered = flow.log_abs_det_jacobian(first, pushed)
        flow(second)
        torch.testing.assert_close(flow.log_abs_det_jacobian(first, pushed), remembered)
        assert (flow.log_abs_det_jacobian(second, flow(second)) - remembered).abs().min() > 1e-6


@pytest.mark.parametrize("latent_dim", [1, 2, 7])
@pytest.mark.parametrize("n_steps", [1, 4])
def test_planar_log_determinant_equals_that_of_autograds_jacobian(latent_dim: int, n_steps: int) -> None:
    flow = planar(latent_dim, n_steps)
    for seed in range(5):
        z = torch.randn(latent_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        sign, wanted = torch.linalg.slogdet(jacobian(flow, z))
        assert sign == 1
        torch.testing.assert_close(flow.log_abs_det_jacobian(z, flow(z)), wanted)


def opposed(scale: float, dtype: torch.dtype) -> PlanarStep:
    """Make a step whose raw u points against w: without the constraint its map would fold."""
    step = PlanarStep(2, CONTEXT_DIM).to(dtype)
    with torch.no_grad():
        step.parametrise.weight.zero_()
        step.parametrise.bias.copy_(torch.tensor([-2.0, 0.5, 1.0, 0.3, 0.1]) * scale)
    return step


@pytest.mark.parametrize("scale", [1e-9, 0.1, 1.0, 10.0, 1e3])
def test_planar_step_of_extreme_parameters_stays_invertible(scale: float) -> None:
    step, context = opposed(scale, torch.float64), torch.zeros(CONTEXT_DIM, dtype=torch.float64)
    w = step.parametrise.bias.detach()[2:4]
    b = step.parametrise.bias.detach()[4]

    def project(z: Tensor) -> Tensor:
        pushed: Tensor = step(z, context)[0]
        return pushed @ w

    # Where tanh is steepest, the slope along w is 1 + w u: the smallest determinant there is.
    steepest = -b * w / w.square().sum()
    slope = torch.autograd.functional.jacobian(project, steepest) @ w / w.square().sum()
    assert slope >= -1e-9
    # The determinant is along w alone, so an increasing projection means that no two points meet.
    line = torch.linspace(-3, 3, 2001, dtype=torch.float64)[:, None] * w / w.norm()
    assert (project(steepest + line).diff() > -1e-9 * scale).all()


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1.0, 30.0, 1e4])
def test_planar_log_determinant_of_extreme_parameters_stays_finite_with_its_gradient(scale: float) -> None:
    step = opposed(scale, torch.float32)
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    pushed, log_determinant = step(z, torch.zeros(CONTEXT_DIM))
    assert pushed.isfinite().all()
    assert log_determinant.isfinite().all()
    (pushed.sum() + log_determinant.sum()).backward()
    gradient = step.parametrise.bias.grad
    assert gradient is not None
    assert gradient.isfinite().all()


def test_planar_flow_refuses_an_inverse_it_does_not_have() -> None:
    flow = planar(2)
    with pytest.raises(NotImplementedError, match="no inverse in closed form"):
        flow.inv(torch.zeros(1, 2, dtype=torch.float64))
