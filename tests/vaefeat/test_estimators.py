"""What users of scikit-learn count on, of all four estimators: rows alone, seeds, processes, searches, weights."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits, make_blobs
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, ShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer

from vaefeat import FineTuneClassifier, VAEClassifier, VAEFeatures, VAETransformer

Y: NDArray[np.int64] = load_digits().target[:400]
FEW: NDArray[np.int64] = np.where(np.arange(400) < 100, Y, -1)
KINDS = ["features", "transformer", "fine-tuning", "generative"]
TRAINED, CLASSIFIERS = KINDS[1:], KINDS[2:]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def X(digits_rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return digits_rows[:400].reshape(400, -1)


@pytest.fixture(scope="module")
def estimators(digits_bundle: Path) -> dict[str, Any]:
    return {
        "features": VAEFeatures(str(digits_bundle), device="cpu"),
        "transformer": VAETransformer(3, hidden_dims=(16,), batch_size=64, max_epochs=2, device="cpu", random_state=0),
        "fine-tuning": FineTuneClassifier(
            str(digits_bundle), max_steps=20, batch_size=16, device="cpu", random_state=0
        ),
        "generative": VAEClassifier(
            n_components=3, hidden_dims=(16,), batch_size=64, max_epochs=2, device="cpu", random_state=0
        ),
    }


@pytest.fixture(scope="module")
def fitted(estimators: dict[str, Any], X: NDArray[np.uint8]) -> dict[str, Any]:
    return {kind: clone(estimator).fit(X, FEW) for kind, estimator in estimators.items()}


def answers(estimator: Any, X: NDArray[Any]) -> NDArray[Any]:
    given: NDArray[Any] = estimator.transform(X) if hasattr(estimator, "transform") else estimator.predict_proba(X)
    return given


class TestRowsAlone:
    @pytest.mark.parametrize("kind", KINDS)
    def test_any_order_and_any_chunks_give_the_same_bits(
        self, fitted: dict[str, Any], X: NDArray[np.uint8], kind: str
    ) -> None:
        rng = np.random.default_rng(0)
        for name in ("transform", "predict_proba", "decision_function", "predict"):
            if not hasattr(fitted[kind], name):
                continue
            ask = getattr(fitted[kind], name)
            whole = ask(X)
            for _ in range(10):
                order = rng.permutation(len(X))
                cuts = np.sort(rng.choice(np.arange(1, len(X)), rng.integers(1, 30), replace=False))
                parts = np.concatenate([ask(part) for part in np.split(X[order], cuts)])
                np.testing.assert_array_equal(parts, whole[order])
            np.testing.assert_array_equal(ask(np.concatenate([X, X])), np.concatenate([whole, whole]))


class TestSeeds:
    @pytest.mark.parametrize("kind", TRAINED)
    def test_equal_generators_give_equal_models_and_a_used_one_another(
        self, estimators: dict[str, Any], X: NDArray[np.uint8], kind: str
    ) -> None:
        torch.manual_seed(1)
        states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        generator = np.random.RandomState(3)
        # clone would copy the generator.
        one = clone(estimators[kind]).set_params(random_state=generator).fit(X, FEW)
        first = answers(one, X)
        two = clone(estimators[kind]).set_params(random_state=np.random.RandomState(3)).fit(X, FEW)
        np.testing.assert_array_equal(answers(two, X), first)
        assert not np.array_equal(answers(one.fit(X, FEW), X), first)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), str(np.random.get_state())) == states[1:]

    def test_scores_and_samples_leave_the_generators_alone(self, fitted: dict[str, Any], X: NDArray[np.uint8]) -> None:
        torch.manual_seed(1)
        states = torch.get_rng_state(), str(np.random.get_state())
        for kind in ("transformer", "generative"):
            fitted[kind].score(X[:20], Y[:20])
            fitted[kind].sample(n_samples=3)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert str(np.random.get_state()) == states[1]

    @pytest.mark.parametrize("kind", TRAINED)
    def test_no_seed_gives_other_models(self, estimators: dict[str, Any], X: NDArray[np.uint8], kind: str) -> None:
        free = clone(estimators[kind]).set_params(random_state=None)
        assert not np.array_equal(answers(free.fit(X, FEW), X), answers(clone(free).fit(X, FEW), X))


def run_elsewhere(program: str, folder: Path, **environment: str) -> str:
    """Run a program in a fresh process from the root of the checkout, with `folder` in sys.argv."""
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", textwrap.dedent(program), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=free | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ANSWER = """
    import sys, joblib, numpy as np
    folder = sys.argv[1]
    fitted, X = joblib.load(folder + "/fitted.joblib"), np.load(folder + "/X.npy")
    ask = fitted.transform if hasattr(fitted, "transform") else fitted.predict_proba
    np.save(folder + "/answers.npy", ask(X))
"""


class TestProcesses:
    @pytest.mark.parametrize("kind", KINDS)
    def test_joblib_file_answers_the_same_in_another_process(
        self, fitted: dict[str, Any], X: NDArray[np.uint8], kind: str, tmp_path: Path
    ) -> None:
        joblib.dump(fitted[kind], tmp_path / "fitted.joblib")
        np.save(tmp_path / "X.npy", X)
        run_elsewhere(ANSWER, tmp_path)
        np.testing.assert_array_equal(np.load(tmp_path / "answers.npy"), answers(fitted[kind], X))

    @pytest.mark.parametrize("kind", TRAINED)
    def test_pickle_names_no_device_but_the_processor(self, fitted: dict[str, Any], kind: str) -> None:
        assert b"cuda" not in pickle.dumps(fitted[kind])

    @pytest.mark.gpu
    @pytest.mark.parametrize("kind", TRAINED)
    def test_model_fitted_on_a_gpu_answers_where_there_is_none(
        self, estimators: dict[str, Any], X: NDArray[np.uint8], kind: str, tmp_path: Path
    ) -> None:
        on_gpu = clone(estimators[kind]).set_params(device="cuda").fit(X, FEW)
        joblib.dump(on_gpu, tmp_path / "fitted.joblib")
        np.save(tmp_path / "X.npy", X)
        run_elsewhere(ANSWER, tmp_path, CUDA_VISIBLE_DEVICES="")
        np.testing.assert_allclose(np.load(tmp_path / "answers.npy"), answers(on_gpu, X), atol=1e-4)

    def test_workers_of_joblib_share_the_processors(self, fitted: dict[str, Any], tmp_path: Path) -> None:
        joblib.dump(fitted["features"], tmp_path / "fitted.joblib")
        program = """
            import json, os, sys, time, joblib
            from pathlib import Path
            from vaefeat.processors import available_cpus

            def look(features, wait=True):
                here = Path(sys.argv[1]) / "workers"
                here.mkdir(exist_ok=True)
                (here / str(os.getpid())).touch()
                # No worker does all the work before the other has started.
                while wait and len(list(here.iterdir())) < 2:
                    time.sleep(0.05)
                options = features.encoder_._graph.session.get_session_options()
                return os.getpid(), options.intra_op_num_threads

            if __name__ == "__main__":
                features = joblib.load(sys.argv[1] + "/fitted.joblib")
                here = look(features, wait=False)[1]
                found = joblib.Parallel(n_jobs=2)(joblib.delayed(look)(features) for _ in range(4))
                print(json.dumps([here, available_cpus(), found]))
        """
        here, processors, found = json.loads(run_elsewhere(program, tmp_path))
        assert here == processors
        assert len({worker for worker, _ in found}) == 2
        assert {threads for _, threads in found} == {max(1, processors // 2)}

    # Each of two workers imports torch and trains, twice.
    @pytest.mark.parametrize(
        "kind", ["features", "generative", *(pytest.param(k, marks=pytest.mark.slow) for k in TRAINED[:2])]
    )
    def test_search_with_workers_finds_what_one_without_finds(
        self, estimators: dict[str, Any], X: NDArray[np.uint8], kind: str
    ) -> None:
        steps: list[Any] = [("estimator", clone(estimators[kind]))]
        if kind not in CLASSIFIERS:
            steps.append(("head", LogisticRegression(max_iter=50, tol=1e-1)))
        setting = {"features": "output", "transformer": "n_components", "fine-tuning": "learning_rate"}
        values: dict[str, list[Any]] = {
            "output": ["mean", "hidden"],
            "n_components": [2, 3],
            "learning_rate": [1e-3, 2e-3],
        }
        name = setting.get(kind, "learning_rate")
        scores = [
            GridSearchCV(
                Pipeline(steps),
                {f"estimator__{name}": values[name]},
                cv=ShuffleSplit(1, random_state=0),
                n_jobs=n_jobs,
                refit=False,
                error_score="raise",
            )
            .fit(X[:200], Y[:200])
            .cv_results_["mean_test_score"]
            for n_jobs in (1, 2)
        ]
        np.testing.assert_array_equal(*scores)


class TestConventions:
    @pytest.mark.parametrize("kind", ["features", "fine-tuning"])
    def test_clone_of_a_clone_keeps_the_pretrained_encoder(
        self, fitted: dict[str, Any], digits_bundle: Path, kind: str
    ) -> None:
        copy = clone(clone(make_pipeline(fitted[kind])))
        assert str(digits_bundle) in copy.get_params().values()

    @pytest.mark.parametrize("kind", KINDS)
    def test_settings_are_reached_through_pipelines_and_shown_as_html(
        self, estimators: dict[str, Any], fitted: dict[str, Any], kind: str
    ) -> None:
        pipe = Pipeline([("inner", Pipeline([("estimator", clone(estimators[kind]))]))])
        pipe.set_params(inner__estimator__device="auto")
        assert pipe.get_params()["inner__estimator__device"] == "auto"
        assert pipe["inner"]["estimator"].device == "auto"
        for shown in (pipe, fitted[kind]):
            assert type(fitted[kind]).__name__ in shown._repr_html_()

    def test_scores_and_samples_are_those_of_a_density_in_scikit_learn(
        self, fitted: dict[str, Any], X: NDArray[np.uint8]
    ) -> None:
        """GaussianMixture's methods and types; samples come without components, which a VAE has none of."""
        ours, theirs = fitted["transformer"], GaussianMixture(2, random_state=0).fit(X + np.random.rand(*X.shape))
        assert ours.score_samples(X[:9]).shape == theirs.score_samples(X[:9]).shape == (9,)
        assert isinstance(ours.score(X[:9]), float)
        assert ours.score(X[:9]) == pytest.approx(ours.score_samples(X[:9]).mean())
        assert ours.sample(5).shape == theirs.sample(5)[0].shape == (5, 64)
        np.testing.assert_array_equal(ours.sample(5), ours.sample(5))

    @pytest.mark.parametrize("kind", CLASSIFIERS)
    def test_decisions_are_the_logarithms_of_the_probabilities(
        self, fitted: dict[str, Any], estimators: dict[str, Any], X: NDArray[np.uint8], kind: str
    ) -> None:
        decisions, probability = fitted[kind].decision_function(X), fitted[kind].predict_proba(X)
        assert decisions.shape == (400, 10)
        np.testing.assert_allclose(np.exp(decisions), probability, rtol=1e-6, atol=1e-30)
        two = clone(estimators[kind]).fit(X[Y < 2], Y[Y < 2])
        decisions, probability = two.decision_function(X), two.predict_proba(X)
        assert decisions.shape == (400,)
        np.testing.assert_array_equal(decisions > 0, two.predict(X) == 1)
        np.testing.assert_allclose(1 / (1 + np.exp(-decisions)), probability[:, 1], rtol=1e-4, atol=1e-30)


class TestWeights:
    @pytest.mark.parametrize("kind", CLASSIFIERS)
    def test_weight_is_as_many_copies_and_none_is_no_row(
        self, estimators: dict[str, Any], X: NDArray[np.uint8], kind: str
    ) -> None:
        """To the last bit, beside rows without a label, and in any order of the rows with one."""
        rng = np.random.default_rng(0)
        weights = np.where(FEW >= 0, rng.integers(0, 4, 400), 1)
        copies = np.repeat(np.arange(400), weights)
        labelled = copies[FEW[copies] >= 0]
        copies = np.concatenate([rng.permutation(labelled), copies[FEW[copies] < 0]])
        weighted = clone(estimators[kind]).fit(X, FEW, sample_weight=weights)
        repeated = clone(estimators[kind]).fit(X[copies], FEW[copies])
        np.testing.assert_array_equal(weighted.predict_proba(X), repeated.predict_proba(X))
        plain = clone(estimators[kind]).fit(X, FEW)
        assert np.abs(weighted.predict_proba(X) - plain.predict_proba(X)).max() > 1e-3
        # A weight of 0 also leaves out a row without a label.
        weights = (np.arange(400) < 300).astype(float)
        np.testing.assert_array_equal(
            clone(plain).fit(X, FEW, sample_weight=weights).predict_proba(X),
            clone(plain).fit(X[:300], FEW[:300]).predict_proba(X),
        )

    def test_weight_that_is_no_whole_number_lies_between(self, digits_bundle: Path, X: NDArray[np.uint8]) -> None:
        """One label of each row is wrong; the heavier of the two wins."""
        rows, names = np.concatenate([X[:60], X[:60]]), np.concatenate([Y[:60], (Y[:60] + 1) % 10])
        for heavy in (0, 1):
            weights = np.where(np.arange(120) // 60 == heavy, 0.9, 0.1)
            classifier = FineTuneClassifier(digits_bundle, max_steps=60, random_state=0, augmentations=())
            predicted = classifier.fit(rows, names, sample_weight=weights).predict(X[:60])
            assert (predicted == names[heavy * 60 :][:60]).mean() > 0.7

    @pytest.mark.parametrize("kind", CLASSIFIERS)
    def test_class_weight_moves_predictions_to_the_class(
        self, estimators: dict[str, Any], kind: str, digits_bundle: Path, X: NDArray[np.uint8]
    ) -> None:
        words = np.array(["one", "two"], dtype=object)
        rows, truth = X[(Y == 1) | (Y == 8)], Y[(Y == 1) | (Y == 8)] == 8
        rows = np.minimum(rows, np.random.default_rng(0).integers(0, 17, rows.shape)).astype(np.uint8)
        y = words[truth.astype(int)]
        y[::2] = -1
        counts = []
        for class_weight in ({"one": 200.0}, None, {"two": 200.0}):
            classifier = clone(estimators[kind]).set_params(class_weight=class_weight, augmentations=())
            if kind == "generative":
                classifier.set_params(max_epochs=20)
            counts.append((classifier.fit(rows, y).predict(rows) == "two").sum())
        assert counts[0] <= counts[1] <= counts[2]
        assert counts[0] + 5 < counts[2]

    @pytest.mark.parametrize("kind", CLASSIFIERS)
    def test_balanced_is_the_weights_that_scikit_learn_calls_so(
        self, estimators: dict[str, Any], X: NDArray[np.uint8], kind: str
    ) -> None:
        y = np.where((Y < 2) & (np.arange(400) < 120), Y, -1)
        y[np.flatnonzero(y == 1)[2:]] = -1
        n, counts = (y >= 0).sum(), np.bincount(y[y >= 0])
        given = {label: n / (2 * count) for label, count in enumerate(counts)}
        one, two = (
            clone(estimators[kind]).set_params(class_weight=weight).fit(X, y).predict_proba(X)
            for weight in ("balanced", given)
        )
        np.testing.assert_array_equal(one, two)

    @pytest.mark.parametrize("kind", CLASSIFIERS)
    def test_weights_are_routed_through_pipeline_and_search(
        self, estimators: dict[str, Any], X: NDArray[np.uint8], kind: str
    ) -> None:
        rows, y = X[:200], Y[:200]
        weights = (np.arange(200) % 4 > 0).astype(float)
        kept = weights > 0
        with config_context(enable_metadata_routing=True):
            classifier = clone(estimators[kind]).set_fit_request(sample_weight=True)
            pipe = make_pipeline(FunctionTransformer(), classifier.set_score_request(sample_weight=True))
            routed = clone(pipe).fit(rows, y, sample_weight=weights)
            direct = clone(estimators[kind]).fit(rows[kept], y[kept])
            np.testing.assert_array_equal(routed.predict_proba(rows), direct.predict_proba(rows))
            search = GridSearchCV(pipe, {f"{pipe.steps[1][0]}__learning_rate": [1e-3]}, cv=2, error_score="raise")
            search.fit(rows, y, sample_weight=weights)
            again = clone(pipe).set_params(**search.best_params_).fit(rows, y, sample_weight=weights)
            np.testing.assert_array_equal(search.predict_proba(rows), again.predict_proba(rows))
            without = GridSearchCV(pipe, search.param_grid, cv=2, error_score="raise").fit(rows, y)
            assert not np.array_equal(search.predict_proba(rows), without.predict_proba(rows))

    @pytest.mark.parametrize("kind", CLASSIFIERS)
    def test_mark_of_unlabelled_rows_is_a_setting(
        self, estimators: dict[str, Any], X: NDArray[np.uint8], kind: str
    ) -> None:
        rows, sign = X[Y < 2], np.where(Y[Y < 2] == 0, -1, 1)
        two = clone(estimators[kind]).set_params(unlabelled=None).fit(rows, sign)
        assert two.classes_.tolist() == [-1, 1]
        assert two.score(rows, sign) == (two.predict(rows) == sign).mean()
        zero = np.where(np.arange(len(rows)) % 2, sign, 0)
        marked = clone(estimators[kind]).set_params(unlabelled=0).fit(rows, zero)
        nan = clone(estimators[kind]).set_params(unlabelled=None).fit(rows, np.where(zero == 0, np.nan, zero))
        assert marked.classes_.tolist() == [-1, 1]
        np.testing.assert_array_equal(marked.predict_proba(rows), nan.predict_proba(rows))
        assert marked.score(rows, zero) == (marked.predict(rows) == sign)[zero != 0].mean()


def test_temperature_of_scikit_learn_calibrates_a_classifier_that_is_too_sure() -> None:
    rows, y = make_blobs(900, centers=3, n_features=5, cluster_std=6.0, random_state=0)
    sure = VAEClassifier(n_components=2, hidden_dims=(64,), max_epochs=150, random_state=0).fit(rows[:60], y[:60])
    calibrated = CalibratedClassifierCV(FrozenEstimator(sure), method="temperature").fit(rows[60:300], y[60:300])
    np.testing.assert_array_equal(calibrated.predict(rows), sure.predict(rows))
    losses = [log_loss(y[300:], each.predict_proba(rows[300:])) for each in (sure, calibrated)]
    errors = [calibration_error(each.predict_proba(rows[300:]), y[300:]) for each in (sure, calibrated)]
    assert losses[1] < losses[0] - 0.05
    assert errors[1] < errors[0] - 0.05


def calibration_error(probability: NDArray[Any], y: NDArray[np.int64]) -> float:
    """Give the mean distance of confidence and accuracy over ten bins of confidence, by their rows."""
    confidence, right = probability.max(axis=1), probability.argmax(axis=1) == y
    bins = np.minimum((confidence * 10).astype(int), 9)
    gaps = [(bins == b).mean() * abs(right[bins == b].mean() - confidence[bins == b].mean()) for b in np.unique(bins)]
    return float(np.sum(gaps))
