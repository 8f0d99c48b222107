"""The training of generative classifiers: what a step maximises, and on which rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaefeat import ModelConfig, TrainConfig
from vaefeat.errors import NonFiniteLossError
from vaefeat.labelled_training import LabelledEpoch, LabelledTrainer
from vaefeat.model.labelled import M2, Terms
from vaefeat.targets import Targets

CONFIG = ModelConfig(latent_dim=2, network="mlp", hidden_dims=(8,))
UNIFORM = torch.full((3,), 1 / 3).log()


class Recording(M2):
    """M2 that remembers which rows it was shown, and with which labels and weights."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.labelled_rows: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.unlabelled_rows: list[Tensor] = []
        self.kl_weights: list[float] = []

    def labelled(self, x: Tensor, y_B: Tensor, *, kl_weight: float = 1.0) -> Terms:
        self.labelled_rows.append(x.detach().clone())
        self.labels.append(y_B.clone())
        self.kl_weights.append(kl_weight)
        return super().labelled(x, y_B, kl_weight=kl_weight)

    def unlabelled(self, x: Tensor, *, kl_weight: float = 1.0) -> Terms:
        self.unlabelled_rows.append(x.detach().clone())
        assert kl_weight == self.kl_weights[-1]
        return super().unlabelled(x, kl_weight=kl_weight)


def table(n_rows: int = 50) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Make rows that are known by their first value, of which every fifth has a label."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(n_rows, 4)).astype(np.float32)
    rows[:, 0] = np.arange(n_rows)
    return rows, np.where(np.arange(n_rows) % 5 == 0, np.arange(n_rows) % 3, -1)


def trained(
    rows: NDArray[np.float32], labels: NDArray[np.int64], *, labelled_batch_size: int = 4, **settings: Any
) -> tuple[Recording, tuple[LabelledEpoch, ...]]:
    torch.manual_seed(0)
    model = Recording(CONFIG, (4,), log_prior_K=UNIFORM)
    config = TrainConfig(**{"batch_size": 8, "max_epochs": 3, "device": "cpu", **settings})
    trainer = LabelledTrainer(
        model, rows, Targets.of(labels), config, labelled_batch_size=labelled_batch_size, classification_weight=10.0
    )
    return model, trainer.run()


def test_labelled_rows_keep_their_labels_and_stay_out_of_the_unlabelled_stream() -> None:
    rows, labels = table()
    model, _ = trained(rows, labels)
    shown = torch.cat(model.labelled_rows)[:, 0].long().numpy()
    np.testing.assert_array_equal(labels[shown], torch.cat(model.labels).numpy())
    without = torch.cat(model.unlabelled_rows)[:, 0].long().numpy()
    # Each of them once an epoch, and no other.
    np.testing.assert_array_equal(np.bincount(without, minlength=len(rows)), 3 * (labels == -1))
    # Ten labels in minibatches of four: every label comes round.
    assert set(shown) == set(np.flatnonzero(labels >= 0))


def test_order_differs_from_epoch_to_epoch() -> None:
    model, _ = trained(*table())
    order = torch.cat(model.unlabelled_rows)[:, 0]
    assert not torch.equal(order[:40], order[40:80])


@pytest.mark.parametrize(("max_epochs", "share"), [(1, 0.9), (3, 0.2), (1, 1.0)])
def test_warm_up_starts_at_zero_and_ends_in_a_run_of_any_length(max_epochs: int, share: float) -> None:
    model, history = trained(*table(), max_epochs=max_epochs, kl_warmup=share)
    assert model.kl_weights[0] == 0
    assert model.kl_weights == sorted(model.kl_weights)
    assert model.kl_weights[-1] == history[-1].kl_weight == 1


@pytest.mark.parametrize("consistency", [0.0, 0.5])
def test_step_maximises_both_bounds_and_the_weighted_log_probability_of_labels(consistency: float) -> None:
    """The gradient of one step, against that of the objective written out for its minibatches."""
    rows, labels = table()
    torch.manual_seed(0)
    model = M2(CONFIG, (4,), log_prior_K=UNIFORM)
    with torch.no_grad():
        model.logits.bias.copy_(torch.tensor([0.0, 3.7, 0.0]))
    augmentations = ("replacement",) if consistency else ()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    config = TrainConfig(
        batch_size=40,
        max_epochs=1,
        optimizer="sgd",
        learning_rate=1.0,
        momentum=0.0,
        lr_schedule="constant",
        lr_warmup=0.0,
        kl_warmup=0.0,
        gradient_clip=1e9,
        device="cpu",
        seed=3,
    )
    trainer = LabelledTrainer(
        model,
        rows,
        Targets.of(labels),
        config,
        labelled_batch_size=10,
        classification_weight=7.0,
        consistency=consistency,
        augmentations=augmentations,
    )
    assert trainer.steps_per_epoch == 1
    (record,) = trainer.run()
    steps = {name: weight.detach() - before[name] for name, weight in model.named_parameters()}
    model.load_state_dict({**model.state_dict(), **before})
    labelled = torch.from_numpy(rows[labels >= 0])[next(trainer.labelled.epoch(0))]
    y = torch.from_numpy(labels[labels >= 0])[next(trainer.labelled.epoch(0))]
    assert trainer.unlabelled is not None
    unlabelled = next(trainer.unlabelled.epoch(0))
    torch.manual_seed(3)
    changed = model.observe(labelled, augmentations)
    known = model.train().labelled(changed, y)
    unknown = model.unlabelled(model.observe(unlabelled, augmentations))
    log_q = -torch.nn.functional.cross_entropy(model.look(changed).logits_BK, y)
    objective = (known.bound.sum() + unknown.bound.sum()) / 50 + 7 * log_q
    # Of rows as they are the classifier is certain or not; what it learns then is of the changed ones.
    highest, guess = torch.softmax(model.look(unlabelled).logits_BK, dim=1).max(dim=1)
    assert 0 < (highest > 0.95).sum() < 40
    objective = objective + 7 * consistency * (unknown.log_q[torch.arange(40), guess] * (highest > 0.95)).mean()
    found = torch.autograd.grad(objective, list(model.parameters()))
    for step, gradient in zip(steps.values(), found, strict=True):
        torch.testing.assert_close(step, gradient, rtol=1e-4, atol=1e-5)
    assert record.objective == pytest.approx(objective.item(), rel=1e-4)
    assert record.log_q == pytest.approx(log_q.item(), rel=1e-4)
    assert record.unlabelled_bound == pytest.approx(unknown.bound.mean().item(), rel=1e-4)


def test_gradient_is_clipped_to_its_largest_norm() -> None:
    rows, labels = table()
    settings: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "lr_schedule": "constant", "lr_warmup": 0.0}
    torch.manual_seed(0)
    before = Recording(CONFIG, (4,), log_prior_K=UNIFORM).state_dict()
    model, _ = trained(
        rows,
        labels,
        max_epochs=1,
        batch_size=40,
        learning_rate=1.0,
        gradient_clip=0.5,
        labelled_batch_size=10,
        **settings,
    )
    steps = [weight.detach() - before[name] for name, weight in model.named_parameters()]
    assert float(torch.nn.utils.get_total_norm(steps)) == pytest.approx(0.5, rel=1e-3)


def test_minibatch_in_parts_has_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = table()
    settings: dict[str, Any] = {"max_epochs": 1, "batch_size": 40, "optimizer": "sgd", "learning_rate": 1e-2}
    whole, _ = trained(rows, labels, **settings)
    monkeypatch.setattr("vaefeat.labelled_training._PAIRS_AT_A_TIME", 3 * 7)
    parts, _ = trained(rows, labels, **settings)
    assert [len(x) for x in parts.unlabelled_rows] == [7, 7, 7, 7, 7, 5]
    # The draws differ, and nothing else: weights of the classifier hardly feel them.
    moved = torch.cat([w.detach().ravel() for w in whole.logits.parameters()])
    again = torch.cat([w.detach().ravel() for w in parts.logits.parameters()])
    torch.testing.assert_close(again, moved, atol=2e-2, rtol=0)


def test_guessed_classes_count_where_they_are_certain_and_rows_are_changed() -> None:
    rows, labels = table()
    torch.manual_seed(0)
    model = M2(CONFIG, (4,), log_prior_K=UNIFORM)
    trainer = LabelledTrainer(
        model,
        rows,
        Targets.of(labels),
        TrainConfig(device="cpu"),
        labelled_batch_size=4,
        classification_weight=1.0,
        consistency=1.0,
        augmentations=("replacement",),
    )
    with torch.no_grad():
        model.logits.weight.zero_()
        model.logits.bias.copy_(torch.tensor([0.0, 4.0, 0.0]))
    x = torch.from_numpy(rows[:2])
    log_q = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    torch.testing.assert_close(trainer._agreed(x, log_q), torch.tensor([-2.0, -5.0]))
    with torch.no_grad():
        model.logits.bias.copy_(torch.tensor([0.0, 2.0, 0.0]))
    torch.testing.assert_close(trainer._agreed(x, log_q), torch.zeros(2))


def test_no_unlabelled_rows_is_training_on_labels_alone() -> None:
    rows, _ = table()
    model, history = trained(rows, np.arange(len(rows)) % 3)
    assert model.unlabelled_rows == []
    assert np.isnan(history[-1].unlabelled_bound)
    assert len(model.kl_weights) == 3 * 13


def test_objective_that_is_not_finite_is_an_error_that_names_the_epoch() -> None:
    rows, labels = table()
    rows[7] = 1e30
    with pytest.raises(NonFiniteLossError, match=r"in epoch 1.*Lower learning_rate"):
        trained(rows, labels)
