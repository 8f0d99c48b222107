"""Teacher, thresholds, alignment and loss against computations of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch import Tensor, nn

from vaefeat.consistency import AdaptiveThresholds, Alignment, PseudoLabels, Teacher, consistency_loss

MEMORY = 0.99


def probabilities(n_rows: int, n_classes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn((n_rows, n_classes), generator=generator), dim=1)


def test_teacher_is_the_exponential_moving_average_of_the_students_weights() -> None:
    student, teacher_model = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        student.weight.fill_(0.0)
        teacher_model.weight.fill_(0.0)
    teacher = Teacher(student, teacher_model, decay=0.9)
    expected = 0.0
    for step in range(1, 200):
        with torch.no_grad():
            student.weight.fill_(float(step))
        teacher.follow()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(teacher_model.weight) == pytest.approx(expected, rel=1e-5)


def test_teacher_takes_over_buffers_and_stays_in_evaluation_mode() -> None:
    student = nn.BatchNorm1d(3)
    model = nn.BatchNorm1d(3)
    teacher = Teacher(student, model, decay=0.9)
    student.train()
    student(torch.randn(8, 3) + 5)
    teacher.follow()
    assert not teacher.model.training
    torch.testing.assert_close(model.running_mean, student.running_mean)
    assert not any(weight.requires_grad for weight in model.parameters())


def test_alignment_multiplies_by_target_over_running_mean() -> None:
    target = np.array([0.5, 0.3, 0.2])
    align, running = Alignment(torch.tensor(target, dtype=torch.float32)), target
    for seed in range(20):
        given = probabilities(16, 3, seed)
        got = align(given).numpy()
        p = given.numpy().astype(np.float64)
        running = MEMORY * running + (1 - MEMORY) * p.mean(axis=0)
        wanted = p * (target / running)
        np.testing.assert_allclose(got, wanted / wanted.sum(axis=1, keepdims=True), rtol=1e-5)


def test_alignment_of_a_teacher_that_names_one_class_too_often_moves_its_answers_to_the_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    align = Alignment(torch.full((4,), 0.25))
    for _ in range(1500):
        logits = torch.randn((64, 4), generator=generator) + torch.tensor([1.5, 0.0, 0.0, 0.0])
        given = torch.softmax(logits, dim=1)
        aligned = align(given)
    assert float(given.mean(dim=0)[0]) > 0.45
    assert abs(float(aligned.mean(dim=0)[0]) - 0.25) < 0.07


def test_alignment_of_a_class_that_never_occurs_stays_finite() -> None:
    align = Alignment(torch.tensor([0.5, 0.5]))
    for _ in range(5000):
        aligned = align(torch.tensor([[1.0, 0.0]] * 4))
    torch.testing.assert_close(aligned, torch.tensor([[1.0, 0.0]] * 4))


def test_thresholds_are_those_of_freematch_with_the_root_of_the_confidence() -> None:
    thresholds = AdaptiveThresholds()
    confidence, mean = None, None
    for seed in range(30):
        given = probabilities(16, 5, seed)
        pseudo = thresholds(given)
        p = given.numpy().astype(np.float64)
        batch_confidence, batch_mean = p.max(axis=1).mean(), p.mean(axis=0)
        confidence = batch_confidence if confidence is None else MEMORY * confidence + (1 - MEMORY) * batch_confidence
        mean = batch_mean if mean is None else MEMORY * mean + (1 - MEMORY) * batch_mean
        wanted = mean / mean.max() * confidence**0.25
        np.testing.assert_allclose(thresholds.threshold_K, wanted, rtol=1e-5)
        np.testing.assert_array_equal(pseudo.label_B, p.argmax(axis=1))
        np.testing.assert_array_equal(pseudo.trusted_B, p.max(axis=1) >= wanted[p.argmax(axis=1)])


def test_thresholds_have_no_warm_up() -> None:
    # As if they had started at 1 / K, as in the paper, a first minibatch of doubtful rows would all be trusted.
    given = probabilities(64, 10, 0)
    trusted = AdaptiveThresholds()(given).trusted_B
    assert 0 < int(trusted.sum()) < 64


def test_consistency_loss_is_the_cross_entropy_of_softmax_over_all_rows() -> None:
    logits = 3 * torch.randn((6, 4), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    trusted = torch.tensor([True, True, False, True, False, False])
    got = consistency_loss(logits, PseudoLabels(labels, trusted))
    probability = torch.softmax(logits.double(), dim=1).numpy()
    wanted = log_loss(labels[trusted], probability[trusted.numpy()], labels=range(4)) * 3 / 6
    assert float(got) == pytest.approx(wanted, rel=1e-5)


def test_consistency_loss_of_probabilities_in_place_of_logits_is_another_one() -> None:
    logits = torch.tensor([[8.0, 0.0, 0.0]])
    pseudo = PseudoLabels(torch.tensor([0]), torch.tensor([True]))
    assert float(consistency_loss(logits, pseudo)) < 1e-3
    assert float(consistency_loss(torch.softmax(logits, dim=1), pseudo)) > 0.5


def test_consistency_loss_without_a_trusted_row_is_zero_with_a_gradient_of_zero() -> None:
    logits = torch.randn((3, 2), requires_grad=True)
    loss = consistency_loss(logits, PseudoLabels(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()
