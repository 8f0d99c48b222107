"""FineTuneClassifier on real rows: what it learns, what it refuses, and the silent faults of others."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.base import clone
from sklearn.datasets import load_digits, load_wine
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, ShuffleSplit

from vaefeat import (
    Bundle,
    FineTuneClassifier,
    ModelConfig,
    OnnxEncoder,
    TrainConfig,
    VAEFeatures,
    load_bundle,
    pretrain,
)
from vaefeat.errors import BundleError, ConfigError, InputError
from vaefeat.weights import restore_classifier, restore_vae

Y: NDArray[np.int64] = load_digits().target
N_TRAIN = 1400


def first_of_each(y: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Keep the first labels of each class, -1 for the rest."""
    kept = np.full(len(y), -1, dtype=np.int64)
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)[:count]
        kept[rows] = label
    return kept


def quick(bundle: Any, **settings: Any) -> FineTuneClassifier:
    return FineTuneClassifier(bundle, **{"max_steps": 60, "batch_size": 32, "random_state": 0, **settings})


@pytest.fixture(scope="module")
def X(digits_rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return digits_rows.reshape(len(digits_rows), -1)


@pytest.fixture(scope="module")
def few() -> NDArray[np.int64]:
    """Give ten labels a class among the training rows."""
    return first_of_each(Y[:N_TRAIN], 10)


@pytest.fixture(scope="module")
def fitted(digits_bundle: Path, X: NDArray[np.uint8], few: NDArray[np.int64]) -> FineTuneClassifier:
    return quick(digits_bundle, max_steps=300).fit(X[:N_TRAIN], few)


@pytest.fixture(scope="module")
def wine_bundle() -> Bundle:
    rows = load_wine().data.astype(np.float32)
    model = ModelConfig(latent_dim=3, hidden_dims=(32,))
    return pretrain(rows, model=model, train=TrainConfig(max_epochs=40, batch_size=32), progress=False)


class TestAccuracy:
    def test_classifier_of_ten_labels_a_class_beats_a_probe_of_the_pretrained_features(
        self, fitted: FineTuneClassifier, digits_bundle: Path, X: NDArray[np.uint8], few: NDArray[np.int64]
    ) -> None:
        features = VAEFeatures(digits_bundle, output="hidden").fit(X)
        known = few >= 0
        probe = LogisticRegression(max_iter=1000).fit(features.transform(X[:N_TRAIN][known]), few[known])
        before = probe.score(features.transform(X[N_TRAIN:]), Y[N_TRAIN:])
        assert fitted.score(X[N_TRAIN:], Y[N_TRAIN:]) > before + 0.02

    def test_classifier_of_one_label_a_class_beats_a_probe_by_far(
        self, digits_bundle: Path, X: NDArray[np.uint8]
    ) -> None:
        one = first_of_each(Y[:N_TRAIN], 1)
        features = VAEFeatures(digits_bundle, output="hidden").fit(X)
        probe = LogisticRegression(max_iter=1000).fit(features.transform(X[:N_TRAIN][one >= 0]), one[one >= 0])
        before = probe.score(features.transform(X[N_TRAIN:]), Y[N_TRAIN:])
        after = quick(digits_bundle, max_steps=200).fit(X[:N_TRAIN], one).score(X[N_TRAIN:], Y[N_TRAIN:])
        assert after > before + 0.05

    def test_classifier_without_unlabelled_rows_is_plain_fine_tuning(
        self, digits_bundle: Path, X: NDArray[np.uint8]
    ) -> None:
        classifier = quick(digits_bundle, max_steps=150).fit(X[:500], Y[:500])
        assert classifier.score(X[N_TRAIN:], Y[N_TRAIN:]) > 0.85
        assert classifier.bundle_.manifest.data["finetuning"]["n_unlabelled"] == 0

    def test_classifier_of_a_table_learns_from_unlabelled_rows(self, wine_bundle: Bundle) -> None:
        rows, y = load_wine(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(rows))
        rows, y = rows[order], y[order]
        classifier = quick(wine_bundle).fit(rows[:120], first_of_each(y[:120], 3))
        assert classifier.score(rows[120:], y[120:]) > 0.85

    def test_unlabelled_rows_of_another_distribution_do_little_harm(
        self, digits_bundle: Path, X: NDArray[np.uint8]
    ) -> None:
        labelled = np.arange(300)
        strange = np.random.default_rng(0).integers(0, 17, (600, 64)).astype(np.uint8)
        rows, y = np.concatenate([X[labelled], strange]), np.concatenate([Y[labelled], np.full(600, -1)])
        alone = quick(digits_bundle, max_steps=150).fit(X[labelled], Y[labelled]).score(X[N_TRAIN:], Y[N_TRAIN:])
        among = quick(digits_bundle, max_steps=150).fit(rows, y).score(X[N_TRAIN:], Y[N_TRAIN:])
        # Seeds differ by half of that.
        assert among > alone - 0.08

    def test_strong_imbalance_leaves_no_class_without_answers(self, digits_bundle: Path, X: NDArray[np.uint8]) -> None:
        rng = np.random.default_rng(0)
        rare, common = np.flatnonzero(Y[:N_TRAIN] == 1)[:12], np.flatnonzero(Y[:N_TRAIN] == 0)
        others = np.flatnonzero(Y[:N_TRAIN] == 3)
        rows = np.concatenate([rare, common, others])
        y = Y[rows].copy()
        # Three of the rare class, sixty of each of the others.
        keep = np.concatenate([np.arange(3), 12 + rng.permutation(len(common))[:60]])
        keep = np.concatenate([keep, 12 + len(common) + rng.permutation(len(others))[:60]])
        hidden = np.setdiff1d(np.arange(len(y)), keep)
        y[hidden] = -1
        classifier = quick(digits_bundle, max_steps=150).fit(X[rows], y)
        for label in (0, 1, 3):
            test = N_TRAIN + np.flatnonzero(Y[N_TRAIN:] == label)
            assert classifier.score(X[test], Y[test]) > 0.7, label

    def test_thousand_classes_of_one_label_each_are_told_apart_better_than_by_chance(self) -> None:
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(1000, 24)).astype(np.float32)
        y = np.tile(np.arange(1000), 3)
        rows = centres[y] + 0.2 * rng.normal(size=(3000, 24)).astype(np.float32)
        model = ModelConfig(latent_dim=16, hidden_dims=(128,))
        bundle = pretrain(rows, model=model, train=TrainConfig(max_epochs=5), progress=False)
        few = np.where(np.arange(3000) < 1000, y, -1)
        classifier = quick(bundle, max_steps=40).fit(rows, few)
        assert classifier.predict_proba(rows[:5]).shape == (5, 1000)
        assert classifier.score(rows[1000:], y[1000:]) > 0.1


class TestSilentFaults:
    def test_probabilities_are_the_softmax_of_the_heads_logits(
        self, fitted: FineTuneClassifier, X: NDArray[np.uint8]
    ) -> None:
        classifier = restore_classifier(fitted.bundle_)
        with torch.no_grad():
            scaled = classifier.vae.preprocessing(torch.from_numpy(X[:50].reshape(-1, 1, 8, 8)))
            hidden = classifier.vae.encoder(scaled).numpy().astype(np.float64)
        weight, bias = (p.detach().numpy().astype(np.float64) for p in classifier.head.parameters())
        np.testing.assert_allclose(
            fitted.predict_proba(X[:50]), softmax(hidden @ weight.T + bias, axis=1), rtol=1e-4, atol=1e-6
        )

    def test_labels_of_rows_marked_unlabelled_change_nothing(
        self, digits_bundle: Path, X: NDArray[np.uint8], few: NDArray[np.int64]
    ) -> None:
        """There is no way for them to come in: any mark of a missing label gives the same classifier."""
        marked = few.astype(object)
        marked[few == -1] = None
        one = quick(digits_bundle, max_steps=10).fit(X[:N_TRAIN], few)
        two = quick(digits_bundle, max_steps=10).fit(X[:N_TRAIN], marked)
        np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))

    def test_rows_to_predict_change_neither_classifier_nor_one_another(
        self, fitted: FineTuneClassifier, X: NDArray[np.uint8]
    ) -> None:
        whole, digest = fitted.predict_proba(X), fitted.bundle_.digest
        for part in (slice(0, 1), slice(5, 12), slice(900, 100, -3)):
            np.testing.assert_array_equal(fitted.predict_proba(X[part]), whole[part])
        assert fitted.bundle_.digest == digest

    def test_scaling_of_the_pretrained_bundle_is_kept(self, fitted: FineTuneClassifier, digits_bundle: Path) -> None:
        before, after = restore_vae(load_bundle(digits_bundle)), restore_vae(fitted.bundle_)
        torch.testing.assert_close(after.preprocessing.state_dict(), before.preprocessing.state_dict(), rtol=0, atol=0)

    def test_every_layer_of_the_encoder_has_moved_in_a_run_of_any_length(
        self, digits_bundle: Path, X: NDArray[np.uint8], few: NDArray[np.int64]
    ) -> None:
        before = dict(restore_vae(load_bundle(digits_bundle)).encoder.named_parameters())
        for max_steps in (1, 2, 7):
            classifier = quick(digits_bundle, max_steps=max_steps, unfreezing=1.0).fit(X[:N_TRAIN], few)
            after = dict(restore_classifier(classifier.bundle_).vae.encoder.named_parameters())
            still = [name for name, weight in before.items() if torch.equal(weight, after[name])]
            assert not still, max_steps


class TestBundle:
    def test_bundle_is_served_with_class_names(
        self, fitted: FineTuneClassifier, X: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        saved = fitted.save_bundle(tmp_path / "classifier", name="digits-classifier")
        encoder = OnnxEncoder(tmp_path / "classifier")
        assert encoder.classes == tuple(range(10)) == saved.manifest.classes
        assert encoder.outputs == {"mean": 8, "logvar": 8, "hidden": 64, "probability": 10}
        np.testing.assert_array_equal(encoder.embed(X, output="probability"), fitted.predict_proba(X))
        np.testing.assert_array_equal(
            VAEFeatures(tmp_path / "classifier", output="probability").fit(X).transform(X), fitted.predict_proba(X)
        )
        assert "| classes | 10: 0, 1, 2" in saved.read("README.md").decode()

    def test_bundle_was_compared_with_torch(self, fitted: FineTuneClassifier) -> None:
        parity = fitted.bundle_.manifest.parity["outputs"]["probability"]
        assert parity["scale"] == 1.0
        assert 0 <= parity["max_abs_difference"] < 1e-5

    def test_bundle_says_what_it_was_made_from(self, fitted: FineTuneClassifier, digits_bundle: Path) -> None:
        run = fitted.bundle_.manifest.data["finetuning"]
        assert run["base"] == load_bundle(digits_bundle).digest
        assert (run["n_labelled"], run["n_unlabelled"]) == (100, N_TRAIN - 100)
        assert run["n_steps"] == fitted.n_iter_ <= 300

    def test_bundle_of_a_classifier_can_be_fine_tuned_further_to_other_classes(
        self, fitted: FineTuneClassifier, X: NDArray[np.uint8]
    ) -> None:
        parity = np.where(Y[:200] % 2 == 0, "even", "odd").astype(object)
        parity[100:] = None
        again = quick(fitted.bundle_).fit(X[:200], parity)
        assert again.bundle_.manifest.classes == ("even", "odd")
        assert again.bundle_.manifest.outputs["probability"] == 2
        assert again.score(X[N_TRAIN:], np.where(Y[N_TRAIN:] % 2 == 0, "even", "odd")) > 0.85

    def test_bundle_without_classes_keeps_the_form_that_older_readers_know(
        self, fitted: FineTuneClassifier, digits_bundle: Path, tmp_path: Path
    ) -> None:
        manifest = json.loads((digits_bundle / "bundle.json").read_bytes())
        assert manifest["schema_version"] == 1
        assert "classes" not in manifest
        fitted.save_bundle(tmp_path)
        manifest = json.loads((tmp_path / "bundle.json").read_bytes())
        assert manifest["schema_version"] == 2
        assert manifest["classes"] == list(range(10))

    def test_manifest_with_other_classes_than_probabilities_is_refused(self, fitted: FineTuneClassifier) -> None:
        with pytest.raises(BundleError, match="wanted a name, text or number, for each probability"):
            replace(fitted.bundle_.manifest, classes=(0, 1))

    def test_bundle_of_a_classifier_that_kept_its_elbo_reconstructs_better(
        self, digits_bundle: Path, X: NDArray[np.uint8], few: NDArray[np.int64]
    ) -> None:
        with_elbo, without = (
            quick(digits_bundle, elbo_weight=weight).fit(X[:N_TRAIN], few).bundle_.manifest.metrics["elbo"]
            for weight in (1.0, 0.0)
        )
        assert with_elbo > without

    def test_bundle_without_a_head_is_no_classifier(self, digits_bundle: Path) -> None:
        with pytest.raises(InputError, match="which is no classifier"):
            restore_classifier(load_bundle(digits_bundle))


class TestEstimator:
    def test_same_seed_gives_the_same_bundle_and_another_seed_another(
        self, digits_bundle: Path, X: NDArray[np.uint8], few: NDArray[np.int64]
    ) -> None:
        torch.manual_seed(17)
        before = torch.random.get_rng_state()
        one = quick(digits_bundle, max_steps=20).fit(X[:N_TRAIN], few)
        assert torch.equal(torch.random.get_rng_state(), before)
        two = clone(one).fit(X[:N_TRAIN], few)
        other = clone(one).set_params(random_state=1).fit(X[:N_TRAIN], few)
        assert one.bundle_.digest == two.bundle_.digest
        assert not np.array_equal(one.predict_proba(X), other.predict_proba(X))

    def test_strings_are_classes(self, digits_bundle: Path, X: NDArray[np.uint8], few: NDArray[np.int64]) -> None:
        names = np.array([f"digit {label}" for label in range(10)])
        y = np.where(few >= 0, names[few], np.array(None))
        classifier = quick(digits_bundle, max_steps=20).fit(X[:N_TRAIN], y)
        assert classifier.classes_.tolist() == names.tolist() == list(classifier.bundle_.manifest.classes)
        assert set(classifier.predict(X[:20])) <= set(names)
        numbers = quick(digits_bundle, max_steps=20).fit(X[:N_TRAIN], few)
        np.testing.assert_array_equal(classifier.predict_proba(X), numbers.predict_proba(X))

    def test_pickle_predicts_where_torch_is_not_installed(
        self, fitted: FineTuneClassifier, X: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        (tmp_path / "classifier.pickle").write_bytes(pickle.dumps(fitted))
        np.save(tmp_path / "rows.npy", X[:50])
        program = f"""
            import pickle, sys
            from pathlib import Path
            import numpy as np
            class Missing:
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] in ("torch", "onnxscript"):
                        raise ModuleNotFoundError(name, name=name)
            sys.meta_path.insert(0, Missing())
            folder = Path({str(tmp_path)!r})
            classifier = pickle.loads((folder / "classifier.pickle").read_bytes())
            np.save(folder / "predicted.npy", classifier.predict(np.load(folder / "rows.npy")))
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=Path(__file__).parents[2], check=True)
        np.testing.assert_array_equal(np.load(tmp_path / "predicted.npy"), fitted.predict(X[:50]))

    def test_grid_search_scores_labelled_rows(self, digits_bundle: Path, X: NDArray[np.uint8]) -> None:
        search = GridSearchCV(
            quick(str(digits_bundle), max_steps=np.int64(10)),
            {"learning_rate": np.array([1e-3, 2e-3])},
            cv=ShuffleSplit(1, random_state=0),
        )
        assert search.fit(X[:200], Y[:200]).best_score_ > 0.5

    def test_images_in_their_shape_give_what_flat_rows_give(
        self, fitted: FineTuneClassifier, digits_rows: NDArray[np.uint8], X: NDArray[np.uint8]
    ) -> None:
        np.testing.assert_array_equal(fitted.predict_proba(digits_rows), fitted.predict_proba(X))
        np.testing.assert_array_equal(fitted.predict_proba(X.astype(np.float64)), fitted.predict_proba(X))

    def test_column_names_are_remembered(self, digits_bundle: Path, X: NDArray[np.uint8]) -> None:
        frame = pd.DataFrame(X[:100], columns=[f"pixel{i}" for i in range(64)])
        classifier = quick(digits_bundle, max_steps=2).fit(frame, Y[:100])
        assert list(classifier.feature_names_in_) == list(frame.columns)

    def test_prediction_before_fit_says_so(self, digits_bundle: Path, X: NDArray[np.uint8]) -> None:
        with pytest.raises(NotFittedError):
            quick(digits_bundle).predict(X)


class TestRefusals:
    @pytest.mark.parametrize(
        ("y", "message"),
        [
            (np.full(100, -1), "no label among 100 rows"),
            (np.where(np.arange(100) < 5, 3, -1), "labels of one class only"),
            (None, "requires y to be passed"),
            (np.zeros(99), "inconsistent numbers of samples|of one class"),
            (np.linspace(0, 1, 100), "continuous"),
        ],
    )
    def test_labels_that_teach_nothing_are_refused(
        self, digits_bundle: Path, X: NDArray[np.uint8], y: Any, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            quick(digits_bundle).fit(X[:100], y)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_steps": 0}, "got max_steps=0"),
            ({"learning_rate": -1.0}, "got learning_rate=-1.0"),
            ({"layer_decay": 0.0}, "got layer_decay=0.0"),
            ({"teacher_decay": 1.0}, "got teacher_decay=1.0"),
            ({"augmentations": "strong"}, "got augmentations='strong'"),
            ({"augmentations": ("afine",)}, "did you mean 'affine'"),
            ({"augmentations": ("replacement",)}, "augmentation for rows of shape .* 'replacement'"),
            ({"augmentations": ("color",)}, "augmentation for rows of shape .* 'color'"),
            ({"augmentations": None}, "got augmentations=None"),
            ({"class_shares": [0.5, 0.5]}, "wanted 10 positive numbers"),
            ({"class_shares": "equal"}, "wanted 10 positive numbers"),
            ({"class_shares": [np.nan, *[0.1] * 9]}, "wanted 10 positive numbers"),
            ({"device": "gpu"}, "device 'gpu'"),
        ],
    )
    def test_settings_that_are_impossible_are_refused(
        self, digits_bundle: Path, X: NDArray[np.uint8], settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError if "shares" not in str(settings) else InputError, match=message):
            quick(digits_bundle, **settings).fit(X[:100], Y[:100])

    def test_rows_of_another_width_are_refused(self, digits_bundle: Path, X: NDArray[np.uint8]) -> None:
        with pytest.raises(InputError, match=r"wanted uint8 rows of shape \(n, 1, 8, 8\)"):
            quick(digits_bundle).fit(X[:100, :60], Y[:100])

    @pytest.mark.parametrize("bundle", [None, 3])
    def test_what_is_no_bundle_is_refused(self, bundle: Any, X: NDArray[np.uint8]) -> None:
        with pytest.raises(BundleError, match="wanted the path of a bundle's folder, or a Bundle"):
            quick(bundle).fit(X[:100], Y[:100])

    def test_folder_without_a_bundle_is_refused(self, tmp_path: Path, X: NDArray[np.uint8]) -> None:
        with pytest.raises(BundleError, match="wanted the folder of a bundle"):
            quick(tmp_path).fit(X[:100], Y[:100])


def test_rows_are_changed_as_in_pretraining_where_the_bundle_says_how(
    digits_rows: NDArray[np.uint8], digits_bundle: Path
) -> None:
    train = {"max_epochs": 1, "augmentations": ("affine",)}
    bundle = pretrain(digits_rows[:200], model={"hidden_dims": (16,)}, train=train, progress=False)
    assert FineTuneClassifier(bundle)._augmentations(bundle) == ("affine",)
    textbook = load_bundle(digits_bundle)
    assert FineTuneClassifier(textbook)._augmentations(textbook) == ("affine", "brightness", "erasing")
