"""Classifiers as operators of ONNX, without an encoder before them: on thousands of rows that none was fitted to."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

pytest.importorskip("skl2onnx")

from onnx import TensorProto, helper

from vaefeat.onnx_graph import GraphBuilder
from vaefeat.onnx_writers import write_classifier

Rows = NDArray[np.float32]
N_FEATURES = 3


@pytest.fixture(scope="module")
def fitted_rows() -> tuple[Rows, NDArray[np.int64]]:
    """Rows of three classes that overlap, sorted by class."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 80)
    return (generator.normal(size=(240, N_FEATURES)) + 0.7 * labels[:, None]).astype(np.float32), labels


@pytest.fixture(scope="module")
def other_rows() -> Rows:
    return (np.random.default_rng(1).normal(size=(4000, N_FEATURES)) * 2).astype(np.float32)


def computed(classifier: Any, rows: Rows) -> tuple[NDArray[Any], Rows]:
    graph = GraphBuilder(opset=20)
    label, probabilities = write_classifier(graph, classifier, "features")
    kind = TensorProto.INT64 if classifier.classes_.dtype.kind in "iu" else TensorProto.STRING
    outputs = {
        label: helper.make_tensor_value_info("label", kind, ["batch"]),
        probabilities: helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", None]),
    }
    given = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", N_FEATURES])
    model = graph.model([given], outputs, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    labels, found = session.run(None, {"features": rows})
    return labels, found


@pytest.mark.parametrize("classes", [np.array([-5, 2, 9]), np.array(["b", "a", "c"])], ids=["numbers", "texts"])
@pytest.mark.parametrize(
    "trees",
    [
        RandomForestClassifier(10, random_state=0),
        ExtraTreesClassifier(4, random_state=0),
        DecisionTreeClassifier(max_depth=3, random_state=0),
    ],
    ids=lambda trees: type(trees).__name__,
)
def test_trees_of_which_half_are_for_either_class_decide_as_in_scikit_learn(
    trees: Any, classes: NDArray[Any], fitted_rows: tuple[Rows, NDArray[np.int64]], other_rows: Rows
) -> None:
    rows, labels = fitted_rows
    two = labels < 2
    trees.fit(rows[two], classes[labels[two]])
    wanted = trees.predict_proba(other_rows)
    if len(getattr(trees, "estimators_", ())) > 1:
        assert (wanted[:, 0] == wanted[:, 1]).sum() > 100
    found, probabilities = computed(trees, other_rows)
    np.testing.assert_allclose(probabilities, wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found, trees.predict(other_rows))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
@pytest.mark.parametrize("classifier", [KNeighborsClassifier(), LogisticRegression()], ids=["neighbours", "line"])
def test_labels_of_any_whole_type_are_written(
    classifier: Any, dtype: type, fitted_rows: tuple[Rows, NDArray[np.int64]], other_rows: Rows
) -> None:
    rows, labels = fitted_rows
    classifier.fit(rows, labels.astype(dtype))
    found, probabilities = computed(classifier, other_rows)
    np.testing.assert_array_equal(found, classifier.predict(other_rows))
    np.testing.assert_allclose(probabilities, classifier.predict_proba(other_rows), rtol=0, atol=1e-6)
    assert classifier.classes_.dtype == dtype  # what was fitted is left alone


@pytest.mark.filterwarnings("ignore:The `probability` parameter was deprecated:FutureWarning")
@pytest.mark.parametrize("n_classes", [2, 3])
def test_calibrated_svc_that_has_probabilities_itself_is_calibrated_by_its_decisions(
    n_classes: int, fitted_rows: tuple[Rows, NDArray[np.int64]], other_rows: Rows
) -> None:
    rows, labels = fitted_rows
    some = labels < n_classes
    classifier = CalibratedClassifierCV(SVC(probability=True, random_state=0), ensemble=False)
    classifier.fit(rows[some], labels[some])
    _, probabilities = computed(classifier, other_rows)
    np.testing.assert_allclose(probabilities, classifier.predict_proba(other_rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_folds", [3, 6])
def test_calibration_over_folds_that_lack_classes_is_scikit_learns(
    n_folds: int, fitted_rows: tuple[Rows, NDArray[np.int64]], other_rows: Rows
) -> None:
    # Sorted by class, so that each of three folds is fitted to two classes.
    classifier = CalibratedClassifierCV(LogisticRegression(), cv=KFold(n_folds)).fit(*fitted_rows)
    _, probabilities = computed(classifier, other_rows)
    np.testing.assert_allclose(probabilities, classifier.predict_proba(other_rows), rtol=0, atol=1e-6)
