"""The contrastive term and the objective that holds it, against plain loops and known cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vaefeat import ModelConfig, TrainConfig
from vaefeat.combinations import refuse_pair
from vaefeat.errors import ConfigError
from vaefeat.model.augmentation import augment, suitable
from vaefeat.model.contrast import Memory, info_nce, neighbour_info_nce
from vaefeat.model.distributions import factors
from vaefeat.model.evaluation import evaluate
from vaefeat.model.objectives import Contrastive
from vaefeat.model.vae import VAE


def by_loops(first: Tensor, second: Tensor, temperature: float) -> list[float]:
    """Give the term of each row, written out in Python's numbers."""
    views = [*first.tolist(), *second.tolist()]

    def cosine(a: list[float], b: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    n, terms = len(first), []
    for i in range(n):
        found = []
        for here, there in ((i, i + n), (i + n, i)):
            scores = [cosine(views[here], views[k]) / temperature for k in range(2 * n) if k != here]
            right = cosine(views[here], views[there]) / temperature
            found.append(math.log(math.fsum(math.exp(score) for score in scores)) - right)
        terms.append(sum(found) / 2)
    return terms


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_term_is_the_cross_entropy_written_out(temperature: float) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    got = info_nce(first, second, temperature=temperature)
    assert got.tolist() == pytest.approx(by_loops(first, second, temperature), rel=1e-12)


def test_views_that_say_nothing_give_chance_and_perfect_ones_nothing() -> None:
    same = torch.ones(8, 3)
    assert info_nce(same, same, temperature=0.2).tolist() == pytest.approx([math.log(15)] * 8, rel=1e-6)
    apart = torch.eye(8)
    assert info_nce(apart, apart, temperature=0.01).max() < 1e-6


def test_length_of_the_mean_does_not_count() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(6, 4), torch.randn(6, 4)
    longer = info_nce(first * 10, second * torch.arange(1.0, 7)[:, None], temperature=0.3)
    assert torch.allclose(longer, info_nce(first, second, temperature=0.3), atol=1e-6)


def test_memory_holds_the_last_views() -> None:
    memory, views = Memory(5, 3), torch.randn(7, 3)
    memory.remember(views[:4])
    assert int(memory.n_seen) == 4
    assert not memory.views[4].any()
    memory.remember(views[4:])
    unit = views / views.norm(dim=1, keepdim=True)
    assert sorted(memory.views.tolist()) == sorted(unit[2:].tolist())


def test_memory_draws_each_of_the_nearest_and_no_other() -> None:
    torch.manual_seed(0)
    memory, query = Memory(50, 4), torch.randn(1, 4)
    memory.remember(torch.randn(50, 4))
    cosines = (memory.views.numpy() @ query[0].numpy()) / np.linalg.norm(query)
    nearest = {int(place) for place in np.argsort(-cosines)[:6]}
    drawn = memory.neighbours(query.expand(300, 4) * 7, 6)
    places = [int(np.flatnonzero((memory.views.numpy() == row).all(axis=1))[0]) for row in drawn.numpy()]
    assert set(places) == nearest
    assert min(places.count(place) for place in nearest) > 20


def test_places_that_are_empty_yet_are_nobodys_neighbours() -> None:
    torch.manual_seed(0)
    memory = Memory(50, 4)
    # All of them point away from what looks.
    memory.remember(-torch.rand(3, 4) - 0.1)
    drawn = memory.neighbours(torch.rand(200, 4) + 0.1, 3)
    assert {tuple(row) for row in drawn.tolist()} == {tuple(row) for row in memory.views[:3].tolist()}


def test_neighbours_term_is_the_cross_entropy_written_out() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    memory = Memory(40, 4).double()
    memory.remember(torch.randn(40, 4, dtype=torch.float64))
    expected = np.zeros(6)
    for one, other in ((first.numpy(), second.numpy()), (second.numpy(), first.numpy())):
        unit = other / np.linalg.norm(other, axis=1, keepdims=True)
        for i, view in enumerate(one):
            looking = memory.views.numpy()[np.argmax(memory.views.numpy() @ view)]
            scores = unit @ looking / 0.3
            expected[i] += (np.log(np.exp(scores).sum()) - scores[i]) / 2
    got = neighbour_info_nce(first, second, memory, n_nearest=1, temperature=0.3)
    assert got.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.fixture
def rows(digits_rows: np.ndarray) -> Tensor:
    return torch.from_numpy(digits_rows[:40].copy())


def model(rows: Tensor, *, style_dim: int = 3) -> VAE:
    torch.manual_seed(0)
    return VAE.for_rows(ModelConfig(latent_dim=10, style_dim=style_dim, network="mlp", hidden_dims=(32,)), rows.numpy())


def test_objective_is_the_sum_of_its_weighted_terms(rows: Tensor) -> None:
    vae = model(rows).eval()
    config = TrainConfig(objective="contrastive", contrastive_weight=7.0, content_kl_weight=0.25)
    torch.manual_seed(3)
    terms = Contrastive(config)(vae, rows, kl_weight=0.5)
    kl_BL = factors(vae.encode(vae.observe(rows)), vae.prior_distribution())
    torch.manual_seed(3)
    x = vae.observe(rows)
    second = augment(x, suitable(x.shape[1:])).clamp(0, 1)
    means = (vae.encode(each).mean[:, :7] for each in (x, second))
    wanted = info_nce(*means, temperature=config.contrastive_temperature)
    contrast = (terms.log_likelihood - terms.objective - 0.5 * (0.25 * kl_BL[:, :7].sum(1) + kl_BL[:, 7:].sum(1))) / 7
    assert torch.allclose(terms.kl, kl_BL.sum(1), atol=1e-5)
    torch.testing.assert_close(contrast, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(contrast, contrast[0], atol=1e-3), "each row has its own"


def test_style_is_not_contrasted(rows: Tensor) -> None:
    """Moving the style's mean by anything leaves the contrastive term as it is."""
    config = TrainConfig(objective="contrastive", contrastive_weight=1e6, content_kl_weight=0)
    gradients: dict[int, Any] = {}
    for style_dim in (0, 3):
        vae = model(rows, style_dim=style_dim).eval()
        torch.manual_seed(0)
        Contrastive(config)(vae, rows, kl_weight=0.0).objective.sum().backward()
        gradients[style_dim] = vae.posterior.get_parameter("mean.weight").grad
    assert gradients[0][7:].abs().max() > 1e3
    assert gradients[3][7:].abs().max() < 1e2
    assert gradients[3][:7].abs().max() > 1e3


def test_held_out_bound_is_that_of_the_rows_not_of_views(rows: Tensor) -> None:
    """Evaluation gives the likelihood and KL that the plain bound's objective gives."""
    vae = model(rows)
    config = TrainConfig(objective="contrastive")
    found = evaluate(vae, Contrastive(config), rows.numpy(), kl_weight=1.0, batch_size=40, seed=0)
    with torch.no_grad():
        kl = factors(vae.encode(vae.observe(rows)), vae.prior_distribution()).sum(dim=1).mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-5)


def judged(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Give a list that the rows which must come out are put into."""
    rows, likelihood = [], vae.log_likelihood

    def listening(x: Tensor, z: Tensor) -> Tensor:
        rows.append(x)
        return likelihood(x, z)

    monkeypatch.setattr(vae, "log_likelihood", listening)
    return rows


def test_views_that_must_come_out_stay_where_the_likelihood_has_a_meaning(
    rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Bernoulli likelihood of values within [0, 1] is never positive; beyond, it has no upper bound."""
    vae = model(rows).train()
    wanted = judged(vae, monkeypatch)
    config = TrainConfig(objective="contrastive", augmentations=("brightness",), augmentation_strength=2.0)
    Contrastive(config)(vae, rows, kl_weight=1.0)
    assert wanted[0].min() >= 0
    assert wanted[0].max() <= 1
    assert not torch.equal(wanted[0], vae.observe(rows)), "a view, and not the row"


def test_corrupted_views_are_encoded_and_clean_ones_must_come_out(
    rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = model(rows).train()
    wanted, given = judged(vae, monkeypatch), list[Tensor]()
    vae.encoder.register_forward_hook(lambda _, inputs, output: given.append(inputs[0]))
    config = TrainConfig(objective="contrastive", corruption="masking", corruption_level=1.0, augmentations=("affine",))
    Contrastive(config)(vae, rows, kl_weight=1.0)
    assert not given[0].any()
    assert wanted[0].flatten(1).any(dim=1).all()


def test_what_must_come_out_is_the_view_of_an_image_and_the_row_of_a_table_itself(rows: Tensor) -> None:
    objective = Contrastive(TrainConfig(objective="contrastive"))
    vae = model(rows)
    x = vae.observe(rows)
    first, second, whole = objective._views(vae.train(), x)
    assert torch.equal(first, whole)
    assert not torch.equal(first, x)
    assert not torch.equal(first, second)
    first, second, whole = objective._views(vae.eval(), x)
    assert torch.equal(first, x)
    assert torch.equal(whole, x)
    assert not torch.equal(second, x)

    table = torch.randn(40, 6)
    vae = VAE.for_rows(ModelConfig(latent_dim=4, hidden_dims=(8,)), table.numpy())
    x = vae.observe(table)
    for training in (True, False):
        first, second, whole = objective._views(vae.train(training), x)
        assert torch.equal(first, x)
        assert torch.equal(whole, x)
        assert not torch.equal(second, x)


def test_one_row_alone_has_nothing_to_be_contrasted_with_and_a_finite_objective(rows: Tensor) -> None:
    terms = Contrastive(TrainConfig(objective="contrastive"))(model(rows), rows[:1], kl_weight=1.0)
    assert terms.objective.isfinite().all()


@pytest.mark.parametrize(
    "changes", [{"posterior": "iaf"}, {"prior": "vamp"}, {"posterior": "full"}, {"posterior": "deterministic"}]
)
def test_models_whose_kl_is_no_sum_over_latents_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="contrastive"):
        refuse_pair(ModelConfig(**changes), TrainConfig(objective="contrastive"))  # type: ignore[arg-type]


def test_style_that_leaves_no_content_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves no content"):
        ModelConfig(latent_dim=4, style_dim=4)


def test_neighbours_look_only_once_they_are_many_and_training_is_far_enough(rows: Tensor) -> None:
    vae = model(rows)
    plain, objective = (
        Contrastive(TrainConfig(objective="contrastive", neighbours=k, neighbours_after=0.5, remembered=60))
        for k in (0, 3)
    )
    objective.start(vae)

    def differs(progress: float) -> bool:
        objective.anneal(progress)
        found = []
        for each in (plain, objective):
            evaluation = evaluate(vae, each, rows.numpy(), kl_weight=1.0, batch_size=40, seed=0)
            found.append(evaluation.objective - evaluation.log_likelihood)
        return found[0] != pytest.approx(found[1], rel=1e-5)

    assert isinstance(objective.memory, Memory)
    assert not differs(0.9), "nothing is remembered"
    for _ in range(2):
        objective(vae.train(), rows, kl_weight=1.0)
    assert not differs(0.4), "too early"
    seen = int(objective.memory.n_seen)
    assert differs(0.6)
    assert seen == int(objective.memory.n_seen) == 80, "evaluation is not remembered"


def test_run_for_a_loss_alone_does_without_memory(rows: Tensor) -> None:
    objective = Contrastive(TrainConfig(objective="contrastive", neighbours=3))
    objective.anneal(1.0)
    assert objective(model(rows), rows, kl_weight=1.0).objective.isfinite().all()


def test_features_of_a_finished_model_vary_alike_and_are_the_same_latents(rows: Tensor) -> None:
    vae = model(rows).eval().requires_grad_(False)
    before, logvar, _ = vae.features(rows)
    q = vae.encode(vae.observe(rows))
    Contrastive(TrainConfig(objective="contrastive")).finish(vae, rows.numpy())
    mean, turned, _ = vae.features(rows)
    assert before.var(dim=0).max() > 2 * before.var(dim=0).min()
    assert mean.var(dim=0).tolist() == pytest.approx([float(before.var(dim=0).mean())] * 10, rel=1e-4)
    torch.testing.assert_close(mean @ mean.T, before @ before.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.latents(mean), before, atol=1e-5, rtol=1e-4)
    # The log-variance is that of the posterior along these axes, by its samples.
    assert vae.basis is not None
    torch.manual_seed(0)
    drawn = q.rsample(torch.Size([20_000])) @ vae.basis.T
    torch.testing.assert_close(drawn.var(dim=0).log(), turned, atol=0.06, rtol=0)
    assert not torch.allclose(turned, logvar, atol=0.06)
