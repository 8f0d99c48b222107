"""Whole pipelines as one ONNX file: the labels and probabilities of scikit-learn, on real digits, wherever it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA, KernelPCA, TruncatedSVD
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import SelectKBest, VarianceThreshold
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import (
    Binarizer,
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.semi_supervised import SelfTrainingClassifier
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from tests.vaefeat.remote_servers import served
from vaefeat import (
    FineTuneClassifier,
    OnnxPredictor,
    VAEFeatures,
    VAETransformer,
    export_pipeline,
    few_label_head,
    load_bundle,
)
from vaefeat.bundle import Bundle
from vaefeat.errors import BundleError, ExportError, InputError
from vaefeat.onnx_pipeline import PIPELINE_TOLERANCE
from vaefeat.reference import load_reference

pytest.importorskip("skl2onnx")

N_FITTED = 400
TARGET = load_digits().target
NAMES = np.array(["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"])
LINE = LogisticRegression(max_iter=2000)

CLASSIFIERS: dict[str, Any] = {
    "logistic regression": LINE,
    "SVC with probability": SVC(probability=True, random_state=0),
    "random forest": RandomForestClassifier(50, random_state=0),
    "extra trees": ExtraTreesClassifier(20, random_state=0),
    "one tree": DecisionTreeClassifier(random_state=0),
    "gradient boosting": HistGradientBoostingClassifier(max_iter=10),
    "neighbours": KNeighborsClassifier(),
    "four neighbours": KNeighborsClassifier(4),
    "neighbours by distance": KNeighborsClassifier(weights="distance"),
    "calibrated neighbours": CalibratedClassifierCV(KNeighborsClassifier(weights="distance"), cv=2),
    "self-training": SelfTrainingClassifier(LINE),
    "few labels": few_label_head("spread", random_state=0),
    "search": GridSearchCV(LINE, {"C": [0.1, 1.0]}, cv=2),
    "calibrated SVC": CalibratedClassifierCV(SVC(), ensemble=False, cv=3),
    "calibrated forest": CalibratedClassifierCV(RandomForestClassifier(10, random_state=0), method="isotonic", cv=2),
    "calibrated boosting": CalibratedClassifierCV(HistGradientBoostingClassifier(max_iter=5), cv=2),
    "calibrated temperature": CalibratedClassifierCV(LINE, method="temperature", cv=2),
    "calibrated tree temperature": CalibratedClassifierCV(
        DecisionTreeClassifier(max_depth=5, random_state=0), method="temperature", cv=2
    ),
    "calibrated pipeline": CalibratedClassifierCV(make_pipeline(StandardScaler(), SVC()), cv=2),
}


@pytest.fixture(scope="module")
def rows(digits_rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return digits_rows.reshape(len(digits_rows), -1)


@pytest.fixture(scope="module")
def line(digits_bundle: Path, rows: NDArray[np.uint8]) -> Pipeline:
    return fitted(make_pipeline(VAEFeatures(digits_bundle), StandardScaler(), LINE), rows)


def fitted(pipe: Pipeline, rows: NDArray[np.uint8], labels: NDArray[Any] = TARGET) -> Pipeline:
    return pipe.fit(rows[:N_FITTED], labels[:N_FITTED])


def in_plain_runtime(content: bytes, rows: NDArray[np.uint8], *, threads: int = 1) -> list[NDArray[Any]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found: list[NDArray[Any]] = session.run(["label", "probabilities"], {"rows": rows.reshape(-1, 1, 8, 8)})
    return found


def assert_same(content: bytes, pipe: Pipeline, rows: NDArray[np.uint8]) -> None:
    labels, probabilities = in_plain_runtime(content, rows)
    wanted = pipe.predict_proba(rows)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, wanted, rtol=0, atol=PIPELINE_TOLERANCE)
    theirs, places = pipe.predict(rows), pipe.classes_.tolist()
    for row in np.flatnonzero(labels != theirs):
        one, other = (wanted[row, places.index(label)] for label in (labels[row], theirs[row]))
        assert abs(one - other) <= PIPELINE_TOLERANCE


@pytest.mark.filterwarnings("ignore:The `probability` parameter was deprecated:FutureWarning")
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_pipeline_of_each_classifier_gives_scikit_learns_answers_for_a_row_in_any_batch(
    kind: str, digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    labels = (
        np.where(np.arange(len(TARGET)) % 3 == 0, -1, TARGET) if kind in ("self-training", "few labels") else TARGET
    )
    features = VAEFeatures(digits_bundle, output="hidden" if kind == "gradient boosting" else "mean")
    pipe = fitted(make_pipeline(features, StandardScaler(), CLASSIFIERS[kind]), rows, labels)
    bundle = export_pipeline(pipe, tmp_path / "pipeline.onnx", X=rows)
    content = (tmp_path / "pipeline.onnx").read_bytes()
    assert_same(content, pipe, rows)
    together = in_plain_runtime(content, rows[:300])
    for alone in zip(*(in_plain_runtime(content, rows[i : i + 1]) for i in range(0, 300, 7)), strict=True):
        whole = together[0 if alone[0].ndim == 1 else 1][::7]
        np.testing.assert_array_equal(np.concatenate(alone), whole)
    for one, two in zip(together, in_plain_runtime(content, rows[:300], threads=2), strict=True):
        np.testing.assert_array_equal(one, two)
    assert bundle.manifest.pipeline is not None
    assert bundle.manifest.pipeline["parity"]["n_rows"] == len(rows)


@pytest.mark.filterwarnings("ignore:The `probability` parameter was deprecated:FutureWarning")
@pytest.mark.parametrize(
    "kind", ["logistic regression", "SVC with probability", "gradient boosting", "calibrated SVC", "calibrated forest"]
)
@pytest.mark.parametrize("labels", [NAMES[TARGET], np.where(TARGET > 4, 7, -3)], ids=["text", "two"])
def test_labels_are_those_that_were_fitted(
    kind: str, labels: NDArray[Any], digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    pipe = fitted(make_pipeline(VAEFeatures(digits_bundle), CLASSIFIERS[kind]), rows, labels)
    export_pipeline(pipe, tmp_path / "pipeline.onnx", X=rows)
    content = (tmp_path / "pipeline.onnx").read_bytes()
    assert_same(content, pipe, rows)
    assert in_plain_runtime(content, rows)[0].dtype == (object if labels.dtype.kind == "U" else np.int64)


@pytest.mark.parametrize(
    "scaler",
    [
        StandardScaler(with_std=False),
        MinMaxScaler(clip=True),
        MaxAbsScaler(),
        RobustScaler(),
        RobustScaler(with_centering=False),
        Binarizer(),
        QuantileTransformer(n_quantiles=50),
        SelectKBest(k=4),
        VarianceThreshold(),
    ],
    ids=str,
)
def test_scaler_before_trees_moves_no_row_across_a_threshold(
    scaler: Any, digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    forest = RandomForestClassifier(20, random_state=0)
    pipe = fitted(make_pipeline(VAEFeatures(digits_bundle), scaler, forest), rows)
    bundle = export_pipeline(pipe, tmp_path / "pipeline.onnx", X=rows)
    assert bundle.manifest.pipeline is not None
    # A row that another branch takes differs by a tree's share, 0.05.
    assert bundle.manifest.pipeline["parity"]["outputs"]["probabilities"]["max_abs_difference"] < 1e-6


@pytest.mark.parametrize(
    "scaler",
    [Normalizer(), PCA(4, whiten=True), TruncatedSVD(4), PowerTransformer(), KernelPCA(4, kernel="rbf")],
    ids=str,
)
def test_scaler_before_a_line_gives_scikit_learns_answers(
    scaler: Any, digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    pipe = fitted(make_pipeline(VAEFeatures(digits_bundle), "passthrough", scaler, LINE), rows)
    export_pipeline(pipe, tmp_path / "pipeline.onnx", X=rows)
    assert_same((tmp_path / "pipeline.onnx").read_bytes(), pipe, rows)


def test_frozen_features_and_nested_pipelines_are_taken_apart(
    digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    features = VAEFeatures(digits_bundle).fit(rows)
    head = make_pipeline(StandardScaler(), LINE).fit(features.transform(rows[:N_FITTED]), TARGET[:N_FITTED])
    pipe = Pipeline([("features", features), ("head", FrozenEstimator(head))]).fit(rows[:2], TARGET[:2])
    bundle = export_pipeline(pipe, tmp_path / "pipeline.onnx", X=rows)
    assert_same((tmp_path / "pipeline.onnx").read_bytes(), pipe, rows)
    assert bundle.manifest.pipeline is not None
    assert [step["class"] for step in bundle.manifest.pipeline["steps"]] == ["StandardScaler", "LogisticRegression"]


def test_pipeline_that_trains_its_encoder_is_exported_with_it(rows: NDArray[np.uint8], tmp_path: Path) -> None:
    features = VAETransformer(4, image_shape=(1, 8, 8), max_epochs=1, random_state=0, preset="textbook")
    pipe = fitted(make_pipeline(features, StandardScaler(), LINE), rows)
    bundle = export_pipeline(pipe, tmp_path / "pipeline.onnx", X=rows)
    assert_same((tmp_path / "pipeline.onnx").read_bytes(), pipe, rows)
    assert bundle.name == "encoder-pipeline"


@pytest.mark.parametrize("search", [GridSearchCV, partial(RandomizedSearchCV, n_iter=2, random_state=0)])
def test_search_around_a_pipeline_is_exported_as_its_best(
    search: Any, digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    pipe = Pipeline([("features", VAEFeatures(digits_bundle)), ("line", LogisticRegression(max_iter=1000))])
    found = search(pipe, {"line__C": [0.01, 1.0]}, cv=2).fit(rows, TARGET)
    bundle = export_pipeline(found, tmp_path / "best", X=rows)
    alone = export_pipeline(found.best_estimator_, tmp_path / "alone", X=rows)
    assert bundle.digest == alone.digest
    np.testing.assert_array_equal(OnnxPredictor(bundle).predict(rows), found.predict(rows))


def test_search_that_keeps_no_estimator_is_refused(
    digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    pipe = Pipeline([("features", VAEFeatures(digits_bundle)), ("line", LogisticRegression(max_iter=1000))])
    found = GridSearchCV(pipe, {"line__C": [0.01, 1.0]}, cv=2, refit=False).fit(rows, TARGET)
    with pytest.raises((InputError, NotFittedError), match="refit"):
        export_pipeline(found, tmp_path / "best", X=rows)


def test_file_alone_where_a_bundle_is_wanted_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "digits.onnx").write_bytes(b"a graph")
    with pytest.raises(BundleError, match=r"the file alone; give .*export_pipeline a folder's name, such as 'digits'"):
        OnnxPredictor(tmp_path / "digits.onnx")


def test_fine_tuned_classifier_alone_is_exported_with_labels(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    labels = np.where(np.arange(len(TARGET)) < 100, NAMES[TARGET].astype(object), -1)
    classifier = FineTuneClassifier(digits_bundle, max_steps=20, batch_size=32, random_state=0).fit(digits_rows, labels)
    pipe = Pipeline([("classifier", classifier)])
    for given in (pipe, classifier):
        export_pipeline(given, tmp_path / "pipeline.onnx", X=rows)
        found, probabilities = in_plain_runtime((tmp_path / "pipeline.onnx").read_bytes(), rows)
        np.testing.assert_array_equal(found, classifier.predict(rows))
        np.testing.assert_array_equal(probabilities, classifier.predict_proba(rows))


def test_file_runs_where_nothing_of_ours_is_imported(line: Pipeline, rows: NDArray[np.uint8], tmp_path: Path) -> None:
    export_pipeline(line, tmp_path / "pipeline.onnx", X=rows)
    np.save(tmp_path / "rows.npy", rows.reshape(-1, 1, 8, 8))
    program = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("pipeline.onnx", providers=["CPUExecutionProvider"])
label, probabilities = session.run(None, {"rows": np.load("rows.npy")})
np.save("label.npy", label)
np.save("probabilities.npy", probabilities)
told = session.get_modelmeta().custom_metadata_map
ours = [name for name in sys.modules if name.partition(".")[0] in ("vaefeat", "sklearn", "skl2onnx", "torch", "onnx")]
print(json.dumps({"ours": ours, "parity": json.loads(told["vaefeat.parity"])}))
"""
    # Isolated: neither the checkout nor what is installed beside it in this environment's path is on the way.
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["ours"] == []
    assert told["parity"]["n_rows"] == len(rows)
    assert told["parity"]["tolerance"] == PIPELINE_TOLERANCE
    np.testing.assert_array_equal(np.load(tmp_path / "label.npy"), line.predict(rows))
    np.testing.assert_allclose(np.load(tmp_path / "probabilities.npy"), line.predict_proba(rows), rtol=0, atol=1e-6)


def test_bundle_holds_the_file_its_parity_and_reference_rows(
    line: Pipeline, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    bundle = export_pipeline(line, tmp_path / "pipeline.onnx-bundle", X=rows, name="numerals")
    loaded = load_bundle(tmp_path / "pipeline.onnx-bundle")
    assert loaded.digest == bundle.digest
    assert sorted(loaded.files) == ["README.md", "pipeline.onnx", "reference.safetensors"]
    manifest = loaded.manifest
    assert (manifest.name, manifest.schema_version, manifest.outputs) == ("numerals", 5, {"probabilities": 10})
    assert manifest.classes == tuple(range(10))
    assert manifest.pipeline is not None
    told = {prop.key: prop.value for prop in onnx.load_model_from_string(loaded.read("pipeline.onnx")).metadata_props}
    assert json.loads(told["vaefeat.parity"]) == manifest.pipeline["parity"]
    assert "StandardScaler -> LogisticRegression" in loaded.read("README.md").decode()
    predictor = OnnxPredictor(tmp_path / "pipeline.onnx-bundle", device="cpu")
    np.testing.assert_array_equal(predictor.predict(rows), line.predict(rows))


def test_export_without_rows_compares_on_many_made_of_the_encoders_reference(line: Pipeline, tmp_path: Path) -> None:
    bundle = export_pipeline(line, tmp_path / "pipeline")
    assert bundle.manifest.pipeline is not None
    parity = bundle.manifest.pipeline["parity"]
    assert parity["n_rows"] == parity["n_made"] == 256
    assert "made of the encoder's reference" in bundle.read("README.md").decode()


def test_export_without_rows_finds_a_difference_that_the_reference_rows_alone_do_not_show(
    digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    pipe = fitted(make_pipeline(VAEFeatures(digits_bundle), LogisticRegression(max_iter=2000)), rows)
    reference = load_reference(load_bundle(digits_bundle))
    assert reference is not None
    known = {row.tobytes() for row in pipe[0].transform(reference.rows)}
    right = pipe[-1].predict_proba

    def wrong_elsewhere(X: NDArray[np.float32]) -> NDArray[np.float64]:
        there = np.array([row.tobytes() in known for row in X])
        return np.asarray(np.where(there[:, None], right(X), right(X)[:, ::-1]))

    pipe[-1].predict_proba = wrong_elsewhere
    with pytest.raises(ExportError, match="on 256 rows"):
        export_pipeline(pipe, tmp_path / "pipeline.onnx")


def test_export_of_one_pipeline_twice_gives_one_digest(line: Pipeline, rows: NDArray[np.uint8], tmp_path: Path) -> None:
    made = [export_pipeline(line, tmp_path / f"{i}.onnx", X=rows[:50]) for i in range(2)]
    assert made[0].digest == made[1].digest


@pytest.mark.parametrize("answer", ["predict_proba", "predict"])
def test_export_that_differs_from_scikit_learn_is_refused_and_nothing_is_written(
    answer: str, digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    pipe = fitted(make_pipeline(VAEFeatures(digits_bundle), LogisticRegression(max_iter=2000)), rows)
    right = getattr(pipe[-1], answer)
    # The classifier itself says something else than what its coefficients, which are exported, say.
    setattr(pipe[-1], answer, lambda X: right(X)[::-1])
    with pytest.raises(ExportError, match="nothing was written"):
        export_pipeline(pipe, tmp_path / "pipeline.onnx", X=rows)
    assert list(tmp_path.iterdir()) == []


def test_subclass_of_a_classifier_is_refused(digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path) -> None:
    class Tilted(LogisticRegression):  # type: ignore[misc]
        """Computes what it likes."""

    pipe = fitted(make_pipeline(VAEFeatures(digits_bundle), Tilted(max_iter=2000)), rows)
    with pytest.raises(InputError, match="got Tilted as step 'tilted'"):
        export_pipeline(pipe, tmp_path / "pipeline.onnx", X=rows)


def test_features_of_a_service_are_refused_with_what_to_do(
    digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    with served(digits_bundle) as address:
        pipe = fitted(make_pipeline(VAEFeatures(address), LINE), rows)
        with pytest.raises(InputError, match="copy its folder to this machine"):
            export_pipeline(pipe, tmp_path / "pipeline.onnx", X=rows)


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([GradientBoostingClassifier(n_estimators=2)], "got GradientBoostingClassifier as step 'gradientboosting"),
        ([FunctionTransformer(), LINE], "got FunctionTransformer as step 'functiontransformer'"),
        ([SVC()], "CalibratedClassifierCV"),
        ([SVC(probability=True, break_ties=True)], "break_ties=True"),
        ([KNeighborsClassifier(metric="manhattan")], "the metric 'manhattan'"),
        ([Binarizer(), KNeighborsClassifier(1)], "left to chance"),
        ([few_label_head("prototype")], r"got FewLabelHead\('prototype'\)"),
        ([CalibratedClassifierCV(GradientBoostingClassifier(n_estimators=2), cv=2)], "got GradientBoostingClassifier"),
    ],
    ids=["boosting", "function", "svc", "ties", "metric", "steps", "prototype", "calibrated"],
)
@pytest.mark.filterwarnings("ignore:The `probability` parameter was deprecated:FutureWarning")
def test_step_that_cannot_be_written_is_refused_by_name(
    steps: list[Any], told: str, digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    pipe = fitted(make_pipeline(VAEFeatures(digits_bundle), *steps), rows)
    with pytest.raises(InputError, match=told):
        export_pipeline(pipe, tmp_path / "pipeline.onnx", X=rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_neighbours_of_which_some_are_equal_are_counted_as_by_scikit_learn_or_refused(
    weights: str, digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    twice, theirs = np.concatenate([rows[:200], rows[:200]]), np.concatenate([TARGET[:200], TARGET[:200]])
    pipe = make_pipeline(VAEFeatures(digits_bundle), KNeighborsClassifier(3, weights=weights)).fit(twice, theirs)
    export_pipeline(pipe, tmp_path / "pipeline.onnx", X=rows)
    assert_same((tmp_path / "pipeline.onnx").read_bytes(), pipe, rows)
    pipe.fit(twice, np.concatenate([TARGET[:200], (TARGET[:200] + 1) % 10]))
    with pytest.raises(InputError, match="200 fitted rows whose features are those of a row of another class"):
        export_pipeline(pipe, tmp_path / "other.onnx", X=rows)


def test_steps_before_the_features_are_refused(digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path) -> None:
    pipe = fitted(make_pipeline(FunctionTransformer(), VAEFeatures(digits_bundle), LINE), rows)
    with pytest.raises(InputError, match="got FunctionTransformer as first step 'functiontransformer' before the feat"):
        export_pipeline(pipe, tmp_path / "pipeline.onnx", X=rows)


def test_pipeline_without_features_and_what_is_no_pipeline_are_refused(rows: NDArray[np.uint8], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no features after it"):
        export_pipeline(fitted(make_pipeline(StandardScaler(), LINE), rows), tmp_path / "p.onnx")
    with pytest.raises(InputError, match="got a LogisticRegression, wanted a fitted Pipeline"):
        export_pipeline(LogisticRegression(max_iter=2000).fit(rows[:50], TARGET[:50]), tmp_path / "p.onnx")


def test_labels_that_are_no_whole_numbers_or_texts_are_refused(
    digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    pipe = fitted(make_pipeline(VAEFeatures(digits_bundle), LINE), rows, TARGET > 4)
    with pytest.raises(InputError, match=r"y\.astype\(int\)"):
        export_pipeline(pipe, tmp_path / "pipeline.onnx", X=rows)


def test_pipeline_that_is_not_fitted_is_refused(digits_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFittedError):
        export_pipeline(make_pipeline(VAEFeatures(digits_bundle), LogisticRegression()), tmp_path / "p.onnx")


def test_encoder_without_reference_asks_for_rows(digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path) -> None:
    bundle = load_bundle(digits_bundle)
    contents = {file: bundle.read(file) for file in bundle.files if file != "reference.safetensors"}
    pipe = fitted(make_pipeline(VAEFeatures(Bundle.of(bundle.manifest, contents)), LINE), rows)
    with pytest.raises(InputError, match="pass some as X="):
        export_pipeline(pipe, tmp_path / "pipeline.onnx")
