"""The scikit-learn transformers on real rows; scikit-learn's own checks are in test_estimator_checks.py."""

from __future__ import annotations

import io
import pickle
import random
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.datasets import load_digits, load_wine
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vaefeat import OnnxEncoder, VAEFeatures, VAETransformer, load_bundle
from vaefeat.data import load_rows
from vaefeat.errors import BundleError, ConfigError, InputError

Y: NDArray[np.int64] = load_digits().target
ONE_SPLIT = ShuffleSplit(1, random_state=0)


def small(n_components: int = 4, **settings: Any) -> VAETransformer:
    return VAETransformer(n_components, **{"hidden_dims": (16,), "max_epochs": 2, "random_state": 0, **settings})


@pytest.fixture(scope="module")
def X(digits_rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Give the digits flat, as scikit-learn has them."""
    return digits_rows.reshape(len(digits_rows), -1)


@pytest.fixture(scope="module")
def fitted(X: NDArray[np.uint8]) -> VAETransformer:
    return small(image_shape=(1, 8, 8), network="mlp", hidden_dims=(64,), batch_size=32, max_epochs=8).fit(X)


@pytest.fixture(params=["path", "bundle", "encoder"])
def features(request: pytest.FixtureRequest, digits_bundle: Path) -> VAEFeatures:
    """Give VAEFeatures each kind of encoder that is on this machine."""
    kinds: dict[str, Any] = {"path": str, "bundle": load_bundle, "encoder": OnnxEncoder}
    return VAEFeatures(kinds[request.param](digits_bundle))


class TestVAEFeatures:
    def test_features_are_those_of_the_encoder(
        self, features: VAEFeatures, digits_bundle: Path, X: NDArray[np.uint8]
    ) -> None:
        expected = OnnxEncoder(digits_bundle).embed(X)
        np.testing.assert_array_equal(features.fit_transform(X), expected)
        np.testing.assert_array_equal(features.fit(X[:1]).transform(X), expected)
        assert features.digest_ == load_bundle(digits_bundle).digest
        assert features.n_features_in_ == 64

    def test_clone_keeps_the_encoder(self, features: VAEFeatures, X: NDArray[np.uint8]) -> None:
        features.set_params(output="hidden")
        copy = clone(features.fit(X))
        np.testing.assert_array_equal(copy.fit_transform(X), features.transform(X))

    def test_pickle_and_joblib_keep_it_fitted(self, features: VAEFeatures, X: NDArray[np.uint8]) -> None:
        expected = features.fit(X).transform(X)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(features)).transform(X), expected)
        file = io.BytesIO()
        joblib.dump(features, file)
        file.seek(0)
        np.testing.assert_array_equal(joblib.load(file).transform(X), expected)

    @pytest.mark.parametrize(("output", "width"), [("mean", 8), ("logvar", 8), ("hidden", 64)])
    def test_names_and_frames_have_the_width_of_the_output(
        self, digits_bundle: Path, X: NDArray[np.uint8], output: str, width: int
    ) -> None:
        features = VAEFeatures(digits_bundle, output=output).set_output(transform="pandas").fit(X)
        names = [f"vaefeatures{i}" for i in range(width)]
        frame = features.transform(X)
        assert list(features.get_feature_names_out()) == list(frame.columns) == names
        assert set(frame.dtypes) == {np.dtype(np.float32)}
        np.testing.assert_array_equal(frame, OnnxEncoder(digits_bundle).embed(X, output=output))

    def test_subset_and_order_give_the_same_bits(self, digits_bundle: Path, X: NDArray[np.uint8]) -> None:
        features = VAEFeatures(digits_bundle, device="cpu").fit(X)
        whole = features.transform(X)
        for part in (slice(0, 1), slice(5, 12), slice(900, 100, -3), np.random.default_rng(0).permutation(len(X))):
            np.testing.assert_array_equal(features.transform(X[part]), whole[part])

    def test_shape_and_dtype_of_equal_rows_do_not_matter(
        self, digits_bundle: Path, digits_rows: NDArray[np.uint8], X: NDArray[np.uint8]
    ) -> None:
        features = VAEFeatures(digits_bundle)
        expected = features.fit_transform(X)
        for rows in (digits_rows, X.astype(np.float64), X.astype(np.int64), digits_rows.astype(np.float32), X.tolist()):
            np.testing.assert_array_equal(clone(features).fit_transform(rows), expected)
            np.testing.assert_array_equal(features.transform(rows), expected)

    def test_columns_are_remembered_and_other_columns_refused(self, digits_bundle: Path, X: NDArray[np.uint8]) -> None:
        frame = pd.DataFrame(X, columns=[f"pixel{i}" for i in range(64)])
        features = VAEFeatures(digits_bundle).fit(frame)
        assert list(features.feature_names_in_) == list(frame.columns)
        np.testing.assert_array_equal(features.transform(frame), OnnxEncoder(digits_bundle).embed(X))
        with pytest.raises(ValueError, match="feature names should match"):
            features.transform(frame[frame.columns[::-1]])

    def test_rows_that_the_bundle_does_not_take_are_refused(self, digits_bundle: Path, X: NDArray[np.uint8]) -> None:
        features = VAEFeatures(digits_bundle)
        for method in (features.transform, features.get_feature_names_out):
            with pytest.raises(NotFittedError):
                method(X)
        with pytest.raises(InputError, match=r"got rows of shape \(1, 63\), wanted uint8 rows"):
            features.fit(X[:, 1:])
        with pytest.raises(InputError, match="leave out the division by 255"):
            features.fit(X / 16)
        features.fit(X)
        with pytest.raises(ValueError, match="63 features, but VAEFeatures is expecting 64"):
            features.transform(X[:, 1:])
        for bad in (X + 0.5, X + 256.0, X.astype(np.float64) * 1e300):
            with pytest.raises(InputError, match="whole numbers from 0 to 255"):
                features.transform(bad)

    @pytest.mark.parametrize(("bad", "what"), [(np.nan, "NaN"), (-np.inf, "infinity")])
    def test_values_that_are_not_finite_are_refused_in_the_words_of_scikit_learn(
        self, digits_bundle: Path, X: NDArray[np.uint8], bad: float, what: str
    ) -> None:
        features = VAEFeatures(digits_bundle).fit(X)
        rows = X.astype(np.float64)
        rows[70, 3] = bad
        for given in (rows, pd.DataFrame(rows), rows.reshape(-1, 1, 8, 8), rows.astype(object)):
            with pytest.raises(ValueError, match=f"^Input X contains {what}.*"):
                features.transform(given)

    def test_wrong_settings_are_refused_in_fit_and_not_before(
        self, digits_bundle: Path, tmp_path: Path, X: NDArray[np.uint8]
    ) -> None:
        for wrong, message in (
            (VAEFeatures(digits_bundle, output="latent"), "got output='latent', wanted one of"),
            (VAEFeatures(tmp_path), "has no bundle"),
        ):
            with pytest.raises((InputError, BundleError), match=message):
                wrong.fit(X)

    def test_grid_search_chooses_the_output(self, digits_bundle: Path, X: NDArray[np.uint8]) -> None:
        pipe = make_pipeline(VAEFeatures(digits_bundle), StandardScaler(), LogisticRegression())
        grid = {"vaefeatures__output": ["mean", "hidden"]}
        search = GridSearchCV(pipe, grid, cv=ONE_SPLIT, error_score="raise").fit(X[:400], Y[:400])
        # 64 numbers say more about a digit than the 8 that are computed from them.
        assert search.best_params_ == {"vaefeatures__output": "hidden"}
        assert search.score(X[400:], Y[400:]) > 0.8


class TestVAETransformer:
    def test_saved_bundle_gives_the_same_features(
        self, fitted: VAETransformer, X: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        expected = fitted.transform(X)
        assert (expected.dtype.name, expected.shape) == ("float32", (len(X), 4))
        assert fitted.save_bundle(tmp_path / "bundle").digest == fitted.bundle_.digest
        np.testing.assert_array_equal(VAEFeatures(tmp_path / "bundle").fit_transform(X), expected)

    def test_fit_again_gives_the_same_bundle_and_leaves_the_generators_alone(
        self, fitted: VAETransformer, X: NDArray[np.uint8]
    ) -> None:
        states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        again = clone(fitted).fit(X)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), str(np.random.get_state())) == states[1:]
        assert again.bundle_.digest == fitted.bundle_.digest

    def test_images_of_floats_give_the_features_of_flat_bytes(
        self, fitted: VAETransformer, digits_rows: NDArray[np.uint8], X: NDArray[np.uint8]
    ) -> None:
        images = digits_rows.astype(np.float64)
        other = clone(fitted).set_params(image_shape=None).fit(images)
        assert (other.n_features_in_, other.bundle_.manifest.input.shape) == (64, (1, 8, 8))
        assert (other.bundle_.manifest.input.dtype, fitted.bundle_.manifest.input.dtype) == ("float32", "uint8")
        np.testing.assert_allclose(other.transform(X.astype(np.float64)), fitted.transform(images), atol=1e-5)
        for rows in (images, X, digits_rows):
            np.testing.assert_array_equal(other.transform(rows), other.transform(images))

    def test_inverse_transform_and_sample_are_rows_in_the_units_of_training(
        self, fitted: VAETransformer, X: NDArray[np.uint8]
    ) -> None:
        # In so few epochs the other preset has learned to tell rows apart, and little of how to draw them.
        textbook = clone(fitted).set_params(preset="textbook").fit(X)
        back = textbook.inverse_transform(textbook.transform(X))
        assert back.shape == X.shape == fitted.inverse_transform(fitted.transform(X)).shape
        assert np.abs(back - X).mean() < 0.9 * np.abs(X.mean(axis=0) - X).mean()
        samples = fitted.sample(50)
        assert samples.shape == (50, 64)
        assert 0 <= samples.min() < 4 < 8 < samples.max() <= 16
        assert len(np.unique(samples.round(3), axis=0)) == 50
        np.testing.assert_array_equal(fitted.sample(50), samples)
        with pytest.raises(InputError, match="got n_samples=0"):
            fitted.sample(0)

    def test_score_samples_tells_digits_from_noise_row_by_row(
        self, fitted: VAETransformer, X: NDArray[np.uint8]
    ) -> None:
        noise = np.random.default_rng(0).permuted(X[:40], axis=1)
        scores = fitted.score_samples(np.concatenate([X[:40], noise]))
        assert scores.dtype == np.float64
        assert np.median(scores[:40]) > scores[40:].max()
        np.testing.assert_array_equal(fitted.score_samples(X[:40]), scores[:40])
        np.testing.assert_array_equal(fitted.score_samples(X[7:8]), scores[7:8])
        assert fitted.score(X[:40], Y[:40]) == pytest.approx(scores[:40].mean())

    def test_training_on_a_table_of_mixed_scales_learns(self) -> None:
        table: NDArray[np.float64] = np.random.default_rng(0).permutation(load_wine().data)
        assert table.std(axis=0).max() > 1000 * table.std(axis=0).min()
        first, last = (small(max_epochs=n, batch_size=16, hidden_dims=(32,)).fit(table[:150]) for n in (1, 20))
        elbo = [each.bundle_.manifest.metrics["elbo"] for each in (first, last)]
        assert elbo[1] > elbo[0] + 1
        assert last.score(table[150:]) > first.score(table[150:]) + 1
        back = last.inverse_transform(last.transform(table))
        assert (np.abs(back - table).mean(axis=0) < np.abs(table.mean(axis=0) - table).mean(axis=0)).mean() > 0.8
        assert last.n_iter_ == 20

    def test_grid_search_chooses_the_number_of_components(self, X: NDArray[np.uint8]) -> None:
        pipe = make_pipeline(small(batch_size=32, max_epochs=5), StandardScaler(), LogisticRegression())
        grid = {"vaetransformer__n_components": np.array([1, 8])}
        search = GridSearchCV(pipe, grid, cv=ONE_SPLIT, error_score="raise").fit(X[:600], Y[:600])
        assert search.best_params_ == {"vaetransformer__n_components": 8}
        assert search.score(X[600:], Y[600:]) > 0.45

    def test_two_rows_are_enough_and_fewer_or_equal_ones_are_not(self, X: NDArray[np.uint8]) -> None:
        assert np.isfinite(small().fit(X[:2]).transform(X)).all()
        for rows in (X[:1], X[:0]):
            with pytest.raises(ValueError, match=r"sample\(s\) .*while a minimum of 2 is required"):
                small().fit(rows)
        with pytest.raises(InputError, match="all the same"):
            small().fit(np.ones((9, 3)))

    @pytest.mark.parametrize("method", ["transform", "inverse_transform", "score_samples", "score"])
    def test_unfitted_transformer_says_so(self, X: NDArray[np.uint8], method: str) -> None:
        with pytest.raises(NotFittedError):
            getattr(small(), method)(X)

    def test_cpu_asked_for_is_used_to_transform_too(self, fitted: VAETransformer, X: NDArray[np.uint8]) -> None:
        on_cpu = small(device="cpu", max_epochs=1).fit(X[:50])
        assert (on_cpu.encoder_.device, on_cpu.encoder_.device_reason) == ("cpu", "asked for")
        assert fitted.encoder_.device_reason != "asked for"


WITHOUT_TORCH = """
import sys

class NotInstalled:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "onnxscript", "matplotlib", "tensorboard"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
"""


def run_without_torch(program: str, folder: Path) -> str:
    """Run a program in a fresh process, where torch and what comes with it is not installed."""
    command = [sys.executable, "-c", WITHOUT_TORCH + textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout.strip()


@pytest.fixture
def folder(fitted: VAETransformer, X: NDArray[np.uint8], tmp_path: Path) -> Path:
    """Give a folder with a pickle and rows."""
    joblib.dump(fitted, tmp_path / "fitted.joblib")
    np.save(tmp_path / "X.npy", X)
    return tmp_path


def test_unpickled_transformer_transforms_and_decodes_without_torch(
    fitted: VAETransformer, X: NDArray[np.uint8], folder: Path
) -> None:
    program = """
        import joblib, numpy as np
        fitted = joblib.load("fitted.joblib")
        features = fitted.transform(np.load("X.npy"))
        np.savez("results.npz", features=features, rows=fitted.inverse_transform(features))
        print("torch" in sys.modules)
    """
    assert run_without_torch(program, folder) == "False"
    results = np.load(folder / "results.npz")
    np.testing.assert_array_equal(results["features"], fitted.transform(X))
    np.testing.assert_array_equal(results["rows"], fitted.inverse_transform(fitted.transform(X)))


def test_methods_that_need_torch_name_the_install_command(folder: Path) -> None:
    program = """
        import joblib, numpy as np
        from vaefeat import VAETransformer
        from vaefeat.errors import MissingExtraError

        fitted = joblib.load("fitted.joblib")
        for method in (VAETransformer().fit, fitted.score_samples, lambda X: fitted.sample(3)):
            try:
                method(np.load("X.npy"))
            except MissingExtraError as error:
                print(error)
    """
    command = "needs packages that are not installed; install them with: pip install 'vaefeat[train]'"
    wanted = [f"{what} {command}" for what in ("Training", "score_samples", "sample")]
    assert run_without_torch(program, folder).splitlines() == wanted


def test_saved_bundle_can_be_given_a_name(fitted: VAETransformer, tmp_path: Path) -> None:
    named = fitted.save_bundle(tmp_path / "named", name="digits-v2")
    assert named.name == "digits-v2"
    assert (tmp_path / "named" / "README.md").read_text().startswith("# digits-v2")
    assert named.digest != fitted.bundle_.digest


def test_list_of_rows_of_another_width_than_the_image_is_refused(X: NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match=r"got rows of 64 values, wanted 16 values for image_shape=\(1, 4, 4\)"):
        small(image_shape=(1, 4, 4)).fit(X[:40].tolist())


def test_fits_in_threads_give_what_a_fit_alone_gives(X: NDArray[np.uint8]) -> None:
    alone = small(max_epochs=1).fit(X[:100]).transform(X[:100])
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda _: small(max_epochs=1).fit(X[:100]).transform(X[:100]), range(3)))
    for features in together:
        np.testing.assert_array_equal(features, alone)


def test_rows_far_outside_the_training_range_are_not_called_likely(
    fitted: VAETransformer, X: NDArray[np.uint8]
) -> None:
    scores = fitted.score_samples(X[:50])
    beyond = fitted.score_samples(np.minimum(X[:50].astype(int) * 15, 255))
    assert (beyond <= 0).all()
    assert beyond.mean() < scores.mean()


def test_flow_posterior_inverse_transform_is_refused_and_sampling_works(digits_rows: NDArray[np.uint8]) -> None:
    rows = digits_rows[:100].reshape(100, -1)
    vae = VAETransformer(3, preset="textbook", posterior="iaf", hidden_dims=(16,), max_epochs=1, random_state=0).fit(
        rows
    )
    with pytest.raises(InputError, match=r"posterior='iaf'.*denoise"):
        vae.inverse_transform(vae.transform(rows))
    assert vae.sample(2).shape == (2, 64)


def test_options_reach_the_configurations_and_are_refused_where_they_cannot(digits_rows: NDArray[np.uint8]) -> None:
    rows = digits_rows[:100].reshape(100, -1)
    settings: dict[str, Any] = {"hidden_dims": (16,), "max_epochs": 1, "random_state": 0}
    vae = VAETransformer(
        4,
        preset="textbook",
        posterior="iaf",
        model_options={"posterior_flows": np.int64(2)},
        train_options={"corruption": "masking"},
        **settings,
    ).fit(rows)
    assert vae.bundle_.manifest.model["posterior_flows"] == 2
    assert vae.bundle_.manifest.train["corruption"] == "masking"
    with pytest.raises(InputError, match="'posterior' in model_options"):
        VAETransformer(4, model_options={"posterior": "full"}, **settings).fit(rows)
    with pytest.raises(ConfigError, match="did you mean 'corruption'"):
        VAETransformer(4, train_options={"corruptions": "masking"}, **settings).fit(rows)
    with pytest.raises(InputError, match="wanted a mapping"):
        VAETransformer(4, train_options=3, **settings).fit(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"n_components": 0}, "n_components=0"), ({"n_components": 1, "posterior": "full"}, "with n_components=1")],
)
def test_errors_about_the_number_of_components_call_it_so(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        small(**settings).fit(np.zeros((10, 3), np.float32))
    assert "latent_dim" not in str(caught.value)


def test_bundle_and_rows_are_shown_in_a_line(digits_bundle: Path) -> None:
    bundle = load_bundle(digits_bundle)
    assert repr(bundle).startswith("Bundle('digits', uint8 rows of shape")
    assert bundle.digest[:19] in repr(bundle)
    assert len(repr(bundle)) < 250 + len(str(digits_bundle))
    rows = load_rows(np.zeros((1000, 3), np.float32))
    assert repr(rows) == "Rows(float32 of shape (1000, 3), no labels, source='array')"
