"""One step: the same gradients kernel by kernel and compiled, for one worker and for its parts."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaefeat import ModelConfig, TrainConfig
from vaefeat.errors import CompileError
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.vae import VAE
from vaefeat.optimizers import make_optimizers
from vaefeat.step import Knobs, TrainingStep, _laid_like
from vaefeat.tuning import choose_engine
from vaefeat.world import World

SMALL: dict[str, Any] = {"latent_dim": 4, "hidden_dims": (16,), "network": "mlp"}
CPU = torch.device("cpu")
#: Of whose second step on neighbours look.
NEIGHBOURS: dict[str, Any] = {"objective": "contrastive", "neighbours": 3, "remembered": 150}


def make_step(rows: NDArray[Any], model: dict[str, Any] | None = None, **train: Any) -> TrainingStep:
    config = TrainConfig(**{"batch_size": len(rows), "device": "cpu", **train})
    with fixed_noise(0, CPU):
        vae = VAE.for_rows(ModelConfig(**{**SMALL, **(model or {})}), rows)
    vae.train()
    objective = OBJECTIVES[config.objective](config)
    objective.start(vae)
    return TrainingStep(vae, objective, config, n_train=len(rows), full=len(rows), world=World())


def after_steps(step: TrainingStep, rows: Tensor, n_steps: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    with fixed_noise(1, CPU):
        figures = [step(rows, Knobs(1e-2, 0.7, 0.1 + 0.5 * i), n_rows=len(rows)) for i in range(n_steps)]
    return torch.stack(figures), {name: value.clone() for name, value in step.vae.state_dict().items()}


@pytest.mark.parametrize(
    ("model", "train"),
    [
        pytest.param({}, {}, id="elbo"),
        # Its gradient passes through a hook on the samples, which a compiler could lose without a word.
        pytest.param(
            {}, {"objective": "iwae", "n_samples": 3}, id="doubly-reparameterized", marks=pytest.mark.slow
        ),
        # Its temperature changes from step to step: a compiled graph must not take it for a constant.
        pytest.param({"posterior": "joint", "latent_dim": 14}, {}, id="joint", marks=pytest.mark.slow),
        pytest.param({"posterior": "iaf", "prior": "mixture"}, {}, id="flow", marks=pytest.mark.slow),
        # What it remembers is written within the graph.
        pytest.param({"style_dim": 1}, NEIGHBOURS, id="neighbours", marks=pytest.mark.slow),
        pytest.param({"posterior": "full"}, {"gradient_clip": 0.5}, id="full-clipped", marks=pytest.mark.slow),
        pytest.param(
            {"likelihood": "gaussian", "gaussian_std": "optimal"}, {"corruption": "masking"}, id="optimal-variance",
            marks=pytest.mark.slow,
        ),
        pytest.param({"network": "conv"}, {"weight_prior_std": 1.0}, id="convolutions-map", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_compiled_steps_equal_steps_kernel_by_kernel(
    digits_rows: NDArray[np.uint8], model: dict[str, Any], train: dict[str, Any]
) -> None:
    rows = torch.from_numpy(digits_rows[:96])
    plain, compiled = make_step(digits_rows[:96], model, **train), make_step(digits_rows[:96], model, **train)
    # The compiler's own random numbers are others; for the comparison it is to call torch's.
    with torch._inductor.config.patch(fallback_random=True):
        compiled.compile(rows)
        figures, weights = after_steps(compiled, rows)
    wanted_figures, wanted = after_steps(plain, rows)
    torch.testing.assert_close(figures, wanted_figures, rtol=1e-4, atol=1e-3)
    for ours, theirs in zip(compiled.objective.memory.buffers(), plain.objective.memory.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    for name, value in wanted.items():
        # Adam's first steps have the size of the learning rate however small a gradient is: most must agree closely.
        apart = (weights[name] - value).abs()
        assert (apart > 1e-3).float().mean() < 0.02, name


def test_untouched_step_forgets_the_views_it_saw(digits_rows: NDArray[np.uint8]) -> None:
    rows = torch.from_numpy(digits_rows[:64])
    step = make_step(digits_rows[:64], **NEIGHBOURS)
    after_steps(step, rows)
    before, noise = copy.deepcopy(step.objective.memory.state_dict()), torch.get_rng_state()
    with step.untouched():
        step.gradients(rows, n_rows=64)
        assert step.objective.memory.n_seen == before["n_seen"] + 64
    for name, value in step.objective.memory.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), noise)


@pytest.mark.slow
def test_compiling_and_measuring_remember_nothing(digits_rows: NDArray[np.uint8]) -> None:
    rows = torch.from_numpy(digits_rows[:64])
    step = make_step(digits_rows[:64], **NEIGHBOURS, compile=True)
    after_steps(step, rows)
    before = copy.deepcopy(step.objective.memory.state_dict())
    engine = choose_engine(step, rows, step.config, n_rows=64, n_steps=10**9, threads=1)
    assert engine.compiled
    for name, value in step.objective.memory.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.fixture(scope="module")
def compiled(digits_rows: NDArray[np.uint8]) -> TrainingStep:
    """Give a step for minibatches of 64, compiled with a short one: a run that is continued may begin with that."""
    step = make_step(digits_rows[:64])
    step.compile(torch.from_numpy(digits_rows[:5]))
    return step


def test_compiled_step_draws_new_noise_at_each_call_and_the_same_from_the_same_seed(
    compiled: TrainingStep, digits_rows: NDArray[np.uint8]
) -> None:
    rows, step = torch.from_numpy(digits_rows[:64]), compiled
    with fixed_noise(3, CPU):
        first, second = step.gradients(rows, n_rows=64), step.gradients(rows, n_rows=64)
    with fixed_noise(3, CPU):
        again = step.gradients(rows, n_rows=64)
    assert first[1] != second[1]
    assert torch.equal(first, again)


def test_compiled_step_takes_the_short_minibatch_at_the_end_kernel_by_kernel(
    compiled: TrainingStep, digits_rows: NDArray[np.uint8]
) -> None:
    figures = compiled(torch.from_numpy(digits_rows[:5]), Knobs(1e-3, 1.0, 0.0), n_rows=5)
    assert figures[4] == 5


def test_step_is_compiled_for_full_minibatches_whichever_comes_first(
    compiled: TrainingStep, digits_rows: NDArray[np.uint8]
) -> None:
    rows = torch.from_numpy(digits_rows[:64])
    with torch._dynamo.config.patch(error_on_recompile=True), fixed_noise(0, CPU):
        figures = compiled.gradients(rows, n_rows=64)
    assert figures[4] == 64
    assert compiled._fitting(rows, 64) != compiled._differentiate


def test_share_of_a_short_minibatch_that_is_as_large_as_of_a_full_one_is_taken_kernel_by_kernel(
    digits_rows: NDArray[np.uint8],
) -> None:
    """Of two workers the first has 16 rows of a minibatch of 32 and of one of 31; the graph holds the 32."""
    alone = make_step(digits_rows[:64])
    step = TrainingStep(alone.vae, alone.objective, alone.config, n_train=63, full=32, world=World(0, 2))
    rows = torch.from_numpy(digits_rows[:16])
    step.compile(rows)
    full, short = step.gradients(rows, n_rows=32), step.gradients(rows, n_rows=31)
    assert full[4] == short[4] == 16


def test_failing_compiler_is_an_error_that_gives_its_reason_and_leaves_the_step_as_it_was(
    digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.from_numpy(digits_rows[:32])
    step = make_step(digits_rows[:32])
    before = copy.deepcopy(step.vae.state_dict())
    # A real failure of Inductor: no C++ compiler by that name.
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False, force_disable_caches=True),
        pytest.raises(CompileError, match=r"no-such-compiler|[Cc]ompiler"),
    ):
        step.compile(rows)
    assert all(torch.equal(before[name], value) for name, value in step.vae.state_dict().items())
    assert step(rows, Knobs(1e-3, 1.0, 0.0), n_rows=32)[4] == 32


def test_gradients_are_clipped_to_the_norm_that_torch_clips_to(digits_rows: NDArray[np.uint8]) -> None:
    rows = torch.from_numpy(digits_rows[:32])
    step = make_step(digits_rows[:32], {"posterior": "deterministic"}, objective="reconstruction", gradient_clip=0.5)
    twin = copy.deepcopy(step.vae)
    figures = step(rows, Knobs(0.0, 1.0, 0.0), n_rows=32)
    terms = OBJECTIVES["reconstruction"](step.config)(twin, rows, kl_weight=1.0)
    (-terms.objective.mean()).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    assert figures[3].item() == pytest.approx(norm.item(), rel=1e-5)
    for ours, theirs in zip(step.vae.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_steps_are_those_of_a_plain_loop(digits_rows: NDArray[np.uint8], network: str, optimizer: str) -> None:
    model = {"posterior": "deterministic", "network": network}
    step = make_step(digits_rows[:32], model, objective="reconstruction", optimizer=optimizer, learning_rate=1e-2)
    twin = copy.deepcopy(step.vae)
    optimizers = make_optimizers(twin, step.config)
    for _ in range(3):
        # Gradients of some convolutions come with other strides than their weights have.
        step(torch.from_numpy(digits_rows[:32]), Knobs(1e-2, 1.0, 0.0), n_rows=32)
        for other in optimizers:
            other.zero_grad()
        terms = OBJECTIVES["reconstruction"](step.config)(twin, torch.from_numpy(digits_rows[:32]), kl_weight=1.0)
        (-terms.objective.mean()).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), step.config.gradient_clip)
        for other in optimizers:
            other.step()
    for (name, ours), theirs in zip(step.vae.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)


def test_gradients_that_come_channels_last_are_laid_out_as_their_weights_are() -> None:
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    gradient = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    laid = _laid_like(gradient, weight)
    assert laid is not None
    assert laid.stride() == weight.stride()
    assert torch.equal(laid, gradient)
    before, weight.grad = weight.detach().clone(), laid
    torch.optim.SGD([weight], lr=1.0, fused=True).step()
    torch.testing.assert_close(before - weight.detach(), gradient)


def test_measuring_gradients_changes_no_weight(digits_rows: NDArray[np.uint8]) -> None:
    rows = torch.from_numpy(digits_rows[:32])
    step = make_step(digits_rows[:32])
    before = copy.deepcopy(step.vae.state_dict())
    step.gradients(rows, n_rows=32)
    assert all(torch.equal(before[name], value) for name, value in step.vae.state_dict().items())


@pytest.mark.gpu
def test_step_captured_as_a_cuda_graph_equals_steps_kernel_by_kernel(digits_rows: NDArray[np.uint8]) -> None:
    settings: dict[str, Any] = {"objective": "reconstruction", "device": "cuda"}
    weights = []
    for compile_ in ("auto", False):
        config = TrainConfig(**settings, compile=compile_, batch_size=64)
        with fixed_noise(0, CPU):
            vae = VAE.for_rows(ModelConfig(**SMALL, posterior="deterministic"), digits_rows[:64]).cuda().train()
        step = TrainingStep(vae, OBJECTIVES["reconstruction"](config), config, n_train=64, full=64, world=World())
        rows = torch.from_numpy(digits_rows[:64]).cuda()
        for i in range(12):
            step(rows, Knobs(1e-3 * (i + 1), 1.0, i / 12), n_rows=64)
        weights.append({name: value.cpu() for name, value in vae.state_dict().items()})
        assert (step._graph is not None) == (compile_ == "auto")
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-4, atol=1e-5)
