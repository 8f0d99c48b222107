"""Fitting again from where fit ended: what goes on, what begins anew, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.datasets import load_digits

from vaefeat import FineTuneClassifier, VAEClassifier, VAETransformer, load_bundle
from vaefeat.errors import ConfigError, InputError
from vaefeat.model.vae import VAE
from vaefeat.weights import restore_classifier, restore_vae

Y: NDArray[np.int64] = load_digits().target[:400]
KINDS = ["transformer", "fine-tuning", "generative"]
#: A rate at which a few steps move nothing to speak of.
STANDSTILL = 1e-12


@pytest.fixture(scope="module")
def X(digits_rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return digits_rows[:400].reshape(400, -1)


def made(kind: str, bundle: Path, **settings: Any) -> Any:
    if kind == "fine-tuning":
        return FineTuneClassifier(
            bundle, **{"max_steps": 40, "batch_size": 16, "random_state": 0, "warm_start": True, **settings}
        )
    both: dict[str, Any] = {"hidden_dims": (32,), "max_epochs": 3, "random_state": 0, "warm_start": True, **settings}
    if kind == "transformer":
        return VAETransformer(4, **{"preset": "textbook", "batch_size": 32, **both})
    return VAEClassifier(n_components=4, **{"batch_size": 64, **both})


@pytest.fixture(params=KINDS)
def estimator(request: pytest.FixtureRequest, digits_bundle: Path) -> Any:
    return made(request.param, digits_bundle)


def answers(estimator: Any, X: NDArray[np.uint8]) -> NDArray[Any]:
    given: NDArray[Any] = estimator.transform(X) if hasattr(estimator, "transform") else estimator.predict_proba(X)
    return given


def length(estimator: Any, n: int) -> dict[str, int]:
    return {"max_steps" if isinstance(estimator, FineTuneClassifier) else "max_epochs": n}


def test_second_fit_goes_on_from_the_weights_of_the_first(estimator: Any, X: NDArray[np.uint8]) -> None:
    """At a standstill it ends where it began; a cold one begins somewhere else."""
    first = answers(estimator.fit(X, Y), X)
    n_first = estimator.n_iter_
    estimator.set_params(learning_rate=STANDSTILL, **length(estimator, 1)).fit(X, Y)
    np.testing.assert_allclose(answers(estimator, X), first, atol=1e-4)
    assert estimator.n_iter_ == n_first + 1
    cold = clone(estimator).set_params(warm_start=False).fit(X, Y)
    assert np.abs(answers(cold, X) - first).max() > 0.02
    assert cold.n_iter_ == 1


def test_epochs_in_two_fits_lead_further_than_those_of_the_first(digits_bundle: Path, X: NDArray[np.uint8]) -> None:
    for kind in ("transformer", "generative"):
        estimator = made(kind, digits_bundle)
        scores = [estimator.fit(X, Y).score(X, Y) for _ in range(2)]
        assert scores[1] > scores[0], kind
        assert estimator.n_iter_ == 6


def test_scaling_of_the_first_rows_stays(digits_bundle: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(60, 5))
    for kind in ("transformer", "generative"):
        estimator = made(kind, digits_bundle, likelihood="gaussian").fit(rows, Y[:60])
        before = scaling(estimator)
        after = scaling(estimator.fit(100 + 7 * rows, Y[:60]))
        assert before.keys() == after.keys()
        assert before
        assert all(torch.equal(before[name], after[name]) for name in before), kind


def scaling(estimator: Any) -> dict[str, torch.Tensor]:
    model = restore_vae(estimator.bundle_) if isinstance(estimator, VAETransformer) else estimator.model_
    return {name: value.clone() for name, value in model.preprocessing.state_dict().items()}


def test_features_preset_keeps_what_it_knows_and_chooses_its_axes_anew(X: NDArray[np.uint8]) -> None:
    estimator = VAETransformer(4, hidden_dims=(16,), max_epochs=2, batch_size=64, warm_start=True, random_state=0).fit(
        X
    )
    first = restore_vae(estimator.bundle_)
    second = restore_vae(estimator.set_params(learning_rate=STANDSTILL).fit(X).bundle_)
    assert isinstance(first, VAE)
    for (name, before), after in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0, msg=name)
    assert second.basis is not None


def test_head_of_a_classifier_is_kept_and_its_name_too(digits_bundle: Path, X: NDArray[np.uint8]) -> None:
    estimator = made("fine-tuning", digits_bundle).fit(X, Y)
    head, name = restore_classifier(estimator.bundle_).head, estimator.bundle_.name
    estimator.set_params(learning_rate=STANDSTILL, max_steps=1).fit(X, Y)
    torch.testing.assert_close(restore_classifier(estimator.bundle_).head.weight, head.weight, atol=1e-5, rtol=0)
    assert estimator.bundle_.name == name == f"{load_bundle(digits_bundle).name}-classifier"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("transformer", {"n_components": 5}, "got n_components=5, but the weights to go on from have n_components=4"),
        ("transformer", {"hidden_dims": (8,)}, r"got hidden_dims=\[8\], but the weights to go on from have"),
        ("transformer", {"posterior": "full"}, "got posterior='full'"),
        (
            "transformer",
            {"image_shape": (1, 8, 8)},
            r"got shape of rows=\(1, 8, 8\), but the weights to go on from have shape of rows=\(64,\)",
        ),
        ("generative", {"n_components": 5}, "got latent_dim=5"),
        ("generative", {"model": "adgm"}, "got model='adgm', but the weights to go on from have model='m2'"),
        ("generative", {"hidden_dims": (8,)}, "got hidden_dims"),
    ],
)
def test_settings_that_weights_depend_on_are_refused(
    digits_bundle: Path, X: NDArray[np.uint8], kind: str, change: dict[str, Any], message: str
) -> None:
    estimator = made(kind, digits_bundle, max_epochs=1).fit(X, Y)
    before = answers(estimator, X)
    with pytest.raises(ConfigError, match=message):
        estimator.set_params(**change).fit(X, Y)
    np.testing.assert_array_equal(answers(estimator, X), before)
    assert estimator.n_iter_ == 1


def test_rows_and_labels_of_another_kind_are_refused(estimator: Any, X: NDArray[np.uint8]) -> None:
    estimator.set_params(**length(estimator, 1)).fit(X, Y)
    with pytest.raises(ValueError, match=r"X has 63 features, but .* is expecting 64"):
        estimator.fit(X[:, 1:], Y)
    if isinstance(estimator, VAETransformer):
        with pytest.raises(ConfigError, match=r"got dtype of rows='float32', but .* rows='uint8'"):
            estimator.fit(X + 0.5, Y)
        return
    for other in (np.where(Y == 3, 11, Y), np.where(Y == 3, 4, Y)):
        with pytest.raises(ConfigError, match="got classes="):
            estimator.fit(X, other)


def test_classifier_of_another_bundle_is_refused(digits_bundle: Path, X: NDArray[np.uint8]) -> None:
    estimator = made("fine-tuning", digits_bundle, max_steps=1).fit(X, Y)
    with pytest.raises(ConfigError, match="got bundle='sha256:"):
        estimator.set_params(bundle=estimator.bundle_).fit(X, Y)


def test_first_fit_and_a_fit_of_a_clone_are_cold(digits_bundle: Path, X: NDArray[np.uint8]) -> None:
    estimator = made("generative", digits_bundle, max_epochs=1).fit(X, Y)
    cold = made("generative", digits_bundle, max_epochs=1, warm_start=False).fit(X, Y)
    np.testing.assert_array_equal(answers(estimator, X), answers(cold, X))
    np.testing.assert_array_equal(answers(clone(estimator.fit(X, Y)).fit(X, Y), X), answers(cold, X))
    assert not hasattr(estimator, "partial_fit")


def test_likelihood_that_cannot_describe_the_new_rows_is_refused(digits_bundle: Path) -> None:
    rows = np.random.default_rng(0).random((40, 6)).astype(np.float32)
    estimator = made("transformer", digits_bundle, likelihood="bernoulli", max_epochs=1).fit(rows)
    with pytest.raises(InputError):
        estimator.fit(rows * 1e6 - 5)
