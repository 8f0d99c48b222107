"""The parts of the fine-tuning loop: streams, schedules, and noticing the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from vaefeat import tuning
from vaefeat.config import ModelConfig, TrainConfig
from vaefeat.finetune_config import FineTuneConfig
from vaefeat.finetuning import FineTuner, Schedule, Settling, endless, layers_joined
from vaefeat.model import augmentation
from vaefeat.model.classifier import Classifier
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.objectives import ELBO
from vaefeat.model.vae import VAE
from vaefeat.propagation import spread_labels
from vaefeat.targets import Targets


@pytest.mark.parametrize("max_steps", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_layers_join_from_the_head_and_all_have_joined_at_the_last_step(max_steps: int, share: float) -> None:
    joined = [layers_joined(step, max_steps, share, 4) for step in range(max_steps)]
    assert joined == sorted(joined)
    assert joined[0] >= 1
    assert joined[-1] == 4


def test_layers_join_one_by_one() -> None:
    assert {layers_joined(step, 1000, 0.3, 4) for step in range(1000)} == {1, 2, 3, 4}
    assert layers_joined(299, 1000, 0.3, 4) == 3
    assert layers_joined(300, 1000, 0.3, 4) == 4


def test_layers_of_a_classifier_hold_head_and_encoder_once_from_the_head_down() -> None:
    config = ModelConfig(latent_dim=2, channels=(4, 8), hidden_dims=(16, 12), residual_blocks=1)
    classifier = Classifier(VAE(config, (1, 8, 8)), 3)
    layers = classifier.layers()
    assert len(layers) == 1 + 2 + 2
    assert layers[0][0] is classifier.head.weight
    assert layers[-1][0] is next(classifier.vae.encoder.parameters())
    found = [id(weight) for layer in layers for weight in layer]
    wanted = [id(weight) for weight in [*classifier.head.parameters(), *classifier.vae.encoder.parameters()]]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_head_starts_from_logistic_regression_on_standardised_features(n_classes: int) -> None:
    random = np.random.default_rng(0)
    y = np.arange(90) % n_classes
    h_NF = (5 + random.normal(size=(90, 12)) * np.arange(1, 13) + 2 * np.eye(n_classes, 12)[y]).astype(np.float32)
    classifier = Classifier(VAE(ModelConfig(latent_dim=2, hidden_dims=(12,)), (4,)), n_classes)
    classifier.start_head(h_NF, y)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=10 / 90, tol=1e-2)).fit(h_NF, y)
    with torch.no_grad():
        got = torch.softmax(classifier.head(torch.from_numpy(h_NF)), dim=1).numpy()
    np.testing.assert_allclose(got, probe.predict_proba(h_NF), atol=1e-3)
    assert np.ptp(got[:, 0]) > 0.1


def test_stream_gives_every_row_once_before_any_again() -> None:
    stream = endless(np.arange(10), 4, np.random.default_rng(0))
    given = np.concatenate([next(stream) for _ in range(10)])
    for start in range(0, 40, 10):
        assert sorted(given[start : start + 10]) == list(range(10))


def test_stream_of_fewer_rows_than_are_wanted_repeats_them() -> None:
    assert sorted(next(endless(np.array([5, 7]), 6, np.random.default_rng(0)))) == [5, 5, 5, 7, 7, 7]


def test_schedule_falls_to_zero_over_the_last_quarter() -> None:
    schedule = Schedule(100)
    factors = []
    while schedule.step < schedule.end:
        factors.append(schedule.factor)
        schedule.step += 1
    assert factors[:76] == [1.0] * 76
    np.testing.assert_allclose(factors[75:], np.arange(25, 0, -1) / 25)


def test_schedule_that_cools_early_ends_early_with_the_same_share() -> None:
    schedule = Schedule(1000)
    schedule.step = 300
    schedule.cool()
    assert schedule.cooling
    assert schedule.end == 400
    assert schedule.factor == 1.0


def test_answers_have_settled_after_as_many_calm_checks_in_a_row_as_patience_says() -> None:
    settling = Settling(2)
    calm, other = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.6, 0.4]])
    assert [settling(answers) for answers in (calm, calm, other, calm, calm, calm)] == [False] * 5 + [True]


def test_answers_without_patience_never_settle() -> None:
    settling = Settling(None)
    assert not any(settling(torch.tensor([[1.0, 0.0]])) for _ in range(20))


def table() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Make rows of three clusters, of which every fourth has a label."""
    random = np.random.default_rng(0)
    y = np.arange(60) % 3
    rows = (random.normal(size=(60, 4)) + 2.5 * np.eye(3, 4)[y]).astype(np.float32)
    return rows, np.where(np.arange(60) % 4 == 0, y, -1)


def tuner(model: ModelConfig | None = None, **settings: Any) -> FineTuner:
    torch.manual_seed(0)
    rows, labels = table()
    vae = VAE.for_rows(model or ModelConfig(latent_dim=2, hidden_dims=(8, 6)), rows)
    config = FineTuneConfig(**{"batch_size": 6, "unlabelled_ratio": 3.0, "device": "cpu", "threads": 1, **settings})
    return FineTuner(
        vae, rows, Targets.of(labels), shares=np.full(3, 1 / 3), objective=ELBO(TrainConfig()), config=config
    )


@pytest.mark.parametrize("elbo_weight", [0.0, 0.7])
def test_step_has_the_gradient_of_the_loss_written_out(elbo_weight: float) -> None:
    """Labels, the teacher's aligned and trusted guesses, and the loss of the pretraining."""
    tuned = tuner(unfreezing=0.0, unlabelled_weight=0.6, elbo_weight=elbo_weight, max_steps=1)
    rows, labels = (torch.from_numpy(values) for values in table())
    with fixed_noise(0, torch.device("cpu")):
        tuned._start()
        with torch.no_grad():
            # A teacher that says something else than the student, and one class too often.
            tuned.teacher.model.get_parameter("head.bias").copy_(torch.tensor([1.5, 0.0, 0.0]))
        running = tuned.alignment.running_K = torch.tensor([0.6, 0.3, 0.1])
        known, unknown = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
        tuned._labelled_stream = endless(known, 6, np.random.default_rng(1))
        tuned._unlabelled_stream = endless(unknown, 18, np.random.default_rng(2))
        chosen = next(endless(known, 6, np.random.default_rng(1)))
        given = next(endless(unknown, 18, np.random.default_rng(2)))
        student, vae = tuned.student, tuned.student.vae
        logits_BK = student(vae.preprocessing(rows[chosen]))
        loss = functional.cross_entropy(logits_BK, labels[chosen])
        x = vae.preprocessing(rows[given])
        p_BK = torch.softmax(tuned.teacher.model(x), dim=1)
        running = 0.99 * running + 0.01 * p_BK.mean(dim=0)
        p_BK = functional.normalize(p_BK * (1 / 3 / running), p=1, dim=1)
        highest, guess = p_BK.max(dim=1)
        thresholds = highest.mean() ** 0.25 * p_BK.mean(dim=0) / p_BK.mean(dim=0).max()
        trusted = highest >= thresholds[guess]
        assert 0 < trusted.sum() < 18
        guessed = functional.cross_entropy(student(x), guess, reduction="none")
        loss = loss + 0.6 * (guessed * trusted).mean()
        if elbo_weight:
            torch.manual_seed(5)
            q, p = vae.encode(x), vae.prior_distribution()
            z = q.rsample()
            bound = vae.log_likelihood(x, z) - torch.distributions.kl_divergence(q, p)
            loss = loss - elbo_weight * bound.mean() / 4
        learned = [weight for weight in student.parameters() if weight.requires_grad]
        wanted = torch.autograd.grad(loss, learned, allow_unused=True)
        tuned._join_layers()
        torch.manual_seed(5)
        value, share = tuned._take_step()
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    assert share == pytest.approx(float(trusted.float().mean()))
    for weight, gradient in zip(learned, wanted, strict=True):
        if gradient is not None:
            assert weight.grad is not None
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-5)


def test_labelled_rows_are_in_no_minibatch_of_unlabelled_ones_and_the_other_way_round() -> None:
    tuned = tuner(max_steps=60)
    _, labels = table()
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    tuned._start()
    tuned.student.register_forward_pre_hook(lambda _, given: seen["student"].append(given[0].clone()))
    tuned.teacher.model.register_forward_pre_hook(lambda _, given: seen["teacher"].append(given[0].clone()))
    tuned._join_layers()
    for _ in range(20):
        tuned._take_step()
    places = {row.tobytes(): place for place, row in enumerate(tuned._scaled(np.arange(60)).numpy())}
    known = [places[row.tobytes()] for x in seen["student"] for row in x[:6].numpy()]
    unknown = [places[row.tobytes()] for x in seen["student"] for row in x[6:].numpy()]
    assert set(known) == set(np.flatnonzero(labels >= 0))
    assert set(unknown) == set(np.flatnonzero(labels < 0))
    assert [places[row.tobytes()] for x in seen["teacher"] for row in x.numpy()] == unknown


def test_teacher_sees_weakly_changed_rows_and_the_student_strongly_changed_ones(
    monkeypatch: pytest.MonkeyPatch, digits_rows: NDArray[np.uint8]
) -> None:
    asked: list[tuple[int, tuple[str, ...], float]] = []

    def listening(x: Tensor, names: Sequence[str], *, strength: float) -> Tensor:
        asked.append((len(x), tuple(names), strength))
        return augmentation.augment(x, names, strength=strength)

    monkeypatch.setattr("vaefeat.finetuning.augment", listening)
    names = ("affine", "brightness", "erasing")
    config = FineTuneConfig(batch_size=4, unlabelled_ratio=2.0, augmentations=names, strength=0.8, device="cpu")
    vae = VAE.for_rows(ModelConfig(latent_dim=2, hidden_dims=(8,), network="mlp"), digits_rows[:40])
    labels = np.where(np.arange(40) < 20, np.arange(40) % 2, -1)
    tuned = FineTuner(
        vae, digits_rows[:40], Targets.of(labels), shares=np.full(2, 0.5), objective=ELBO(TrainConfig()), config=config
    )
    tuned._start()
    tuned._join_layers()
    tuned._take_step()
    assert asked == [(4, names, 0.8), (8, names, 0.8), (8, ("affine",), pytest.approx(0.24))]


def test_layers_learn_ever_more_slowly_downwards_and_not_before_they_have_joined() -> None:
    tuned = tuner(max_steps=100, unfreezing=1.0, learning_rate=1e-3, layer_decay=0.5)
    tuned._start()
    before = [[weight.detach().clone() for weight in layer] for layer in tuned.student.layers()]
    tuned._join_layers()
    assert [group["lr"] for group in tuned._optimizer.param_groups] == pytest.approx([1e-3, 5e-4, 2.5e-4])
    tuned._take_step()
    moved = [
        any(not torch.equal(weight, old) for weight, old in zip(layer, olds, strict=True))
        for layer, olds in zip(tuned.student.layers(), before, strict=True)
    ]
    assert moved == [True, False, False]


def test_run_gives_the_teacher_and_ends_when_its_answers_have_settled() -> None:
    tuned = tuner(max_steps=4000, patience=2)
    found = tuned.run()
    assert found.settled
    assert 100 < found.n_steps < 4000
    assert found.classifier is tuned.teacher.model
    assert not found.classifier.training
    weights = zip(found.classifier.parameters(), tuned.student.parameters(), strict=True)
    assert not all(torch.equal(own, other) for own, other in weights)
    whole = tuner(max_steps=120, patience=None).run()
    assert (whole.n_steps, whole.settled) == (120, False)


def test_rows_without_labels_are_left_out_at_a_weight_of_zero() -> None:
    assert len(tuner(unlabelled_weight=0.0).unlabelled) == 0


def test_temperature_of_categories_is_where_pretraining_left_it() -> None:
    tuned = tuner(ModelConfig(posterior="categorical", latent_dim=6, n_categories=3, hidden_dims=(8,)))
    assert float(tuned.student.vae.posterior.get_buffer("temperature")) == TrainConfig().temperature_end


def test_long_run_takes_the_precision_that_is_faster_and_exports_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_MEASURED", {})
    monkeypatch.setattr(tuning, "_time", lambda vae, compute, names: {"float32": 2.0, "bfloat16": 1.0})
    short = tuner(max_steps=2)
    short.run()
    assert short.student.vae.network_dtype == torch.float32
    monkeypatch.setattr(tuning, "_SHORT_S", 0.0)
    long = tuner(max_steps=2)
    found = long.run()
    assert long.student.vae.network_dtype == torch.bfloat16
    assert all(weight.dtype == torch.float32 for weight in found.classifier.parameters())
    assert found.classifier.vae.network_dtype == torch.float32


def test_measuring_changes_neither_weights_nor_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_MEASURED", {})
    monkeypatch.setattr(tuning, "_LEAST_GAIN", 1e9)
    wanted = tuner(max_steps=5, precision="float32", augmentations=("replacement",)).run()
    monkeypatch.setattr(tuning, "_SHORT_S", 0.0)
    got = tuner(max_steps=5, augmentations=("replacement",)).run()
    for one, other in zip(got.classifier.parameters(), wanted.classifier.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_half_precision_learns_as_well() -> None:
    rows, _ = table()
    answers = []
    for precision in ("float32", "bfloat16"):
        found = tuner(max_steps=300, patience=None, precision=precision).run()
        with torch.no_grad():
            logits = found.classifier(found.classifier.vae.preprocessing(torch.from_numpy(rows)))
        answers.append(logits.argmax(dim=1).numpy())
    assert (answers[0] == np.arange(60) % 3).mean() > 0.85
    assert (answers[0] == answers[1]).mean() > 0.9


def test_head_starts_from_labels_that_were_spread_over_the_pretrained_features() -> None:
    tuned, other = tuner(), tuner()
    _, labels = table()
    with torch.no_grad():
        h_NF = other.student.vae.hidden(other._scaled(np.arange(60))).numpy()
    spread = spread_labels(h_NF, labels, np.full(3, 1 / 3))
    assert (spread >= 0).sum() > (labels >= 0).sum()
    other.student.start_head(h_NF[spread >= 0], spread[spread >= 0])
    tuned._start()
    x = tuned._scaled(np.arange(60))
    with torch.no_grad():
        got, wanted = (torch.softmax(each.student(x), dim=1) for each in (tuned, other))
    torch.testing.assert_close(got, wanted, atol=0.02, rtol=0)


def test_step_clips_gradients_decays_weights_and_is_followed_by_the_teacher() -> None:
    plain, decayed = tuner(unfreezing=0.0, weight_decay=0.0), tuner(unfreezing=0.0, weight_decay=0.1)
    for tuned in (plain, decayed):
        tuned._start()
        with torch.no_grad():
            tuned.student.head.weight.mul_(1e3)
        tuned._join_layers()
    before = plain.student.head.weight.detach().clone()
    followed = plain.teacher.model.get_parameter("head.weight").clone()
    for tuned in (plain, decayed):
        tuned._take_step()
    assert plain.student.training
    gradients = [weight.grad for weight in plain.student.parameters() if weight.grad is not None]
    assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(10, rel=1e-3)
    shrunk = plain.student.head.weight - decayed.student.head.weight
    torch.testing.assert_close(shrunk, 2e-3 * 0.1 * before, rtol=1e-2, atol=1e-3)
    assert not torch.equal(plain.teacher.model.get_parameter("head.weight"), followed)


def test_answers_do_not_settle_before_all_layers_have_joined() -> None:
    assert not tuner(max_steps=3000, unfreezing=0.8, patience=1).run().settled
    assert tuner(max_steps=3000, unfreezing=0.0, patience=1).run().settled
