"""OnnxPredictor over both kinds of bundles that classify, and what it refuses."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from vaefeat import FineTuneClassifier, OnnxEncoder, OnnxPredictor, VAEFeatures, export_pipeline, load_bundle
from vaefeat.bundle import Bundle
from vaefeat.errors import BundleError, InputError
from vaefeat.reference import PredictionReference, load_reference

NAMES = np.array(["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"])
LABELS = NAMES[load_digits().target]


@pytest.fixture(scope="module")
def pipe(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> Pipeline:
    line = LogisticRegression(max_iter=2000)
    return make_pipeline(VAEFeatures(digits_bundle), line).fit(digits_rows[:300], LABELS[:300])


@pytest.fixture(scope="module")
def bundle(pipe: Pipeline, digits_rows: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_pipeline(pipe, tmp_path_factory.mktemp("bundles") / "pipeline", X=digits_rows)


@pytest.fixture(scope="module")
def fine_tuned(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> FineTuneClassifier:
    labels = np.where(np.arange(len(LABELS)) < 100, LABELS.astype(object), -1)
    return FineTuneClassifier(digits_bundle, max_steps=10, batch_size=32, random_state=0).fit(digits_rows, labels)


def test_predictions_of_a_pipeline_are_scikit_learns(
    bundle: Bundle, pipe: Pipeline, digits_rows: NDArray[np.uint8]
) -> None:
    predictor = OnnxPredictor(bundle, device="cpu", batch_size=100)
    np.testing.assert_array_equal(predictor.predict(digits_rows), pipe.predict(digits_rows))
    np.testing.assert_allclose(predictor.predict_proba(digits_rows), pipe.predict_proba(digits_rows), rtol=0, atol=1e-6)
    assert predictor.classes == tuple(pipe.classes_)


def test_predictions_of_a_fine_tuned_bundle_are_the_classifiers(
    fine_tuned: FineTuneClassifier, digits_rows: NDArray[np.uint8]
) -> None:
    predictor = OnnxPredictor(fine_tuned.bundle_, device="cpu")
    np.testing.assert_array_equal(predictor.predict(digits_rows), fine_tuned.predict(digits_rows))
    np.testing.assert_array_equal(predictor.predict_proba(digits_rows), fine_tuned.predict_proba(digits_rows))
    mean, code = predictor.compute(digits_rows[:5], ["mean", "label"])
    np.testing.assert_array_equal(mean, fine_tuned.encoder_.embed(digits_rows[:5]))
    assert code.dtype == np.int64
    assert [predictor.classes[place] for place in code] == fine_tuned.predict(digits_rows[:5]).tolist()


def test_predictor_survives_a_pickle(bundle: Bundle, digits_rows: NDArray[np.uint8]) -> None:
    predictor = OnnxPredictor(bundle, device="cpu", threads=1)
    copied = pickle.loads(pickle.dumps(predictor))
    np.testing.assert_array_equal(copied.predict_proba(digits_rows[:9]), predictor.predict_proba(digits_rows[:9]))


def test_each_kind_of_bundle_is_refused_where_the_other_is_wanted(bundle: Bundle, digits_bundle: Path) -> None:
    with pytest.raises(BundleError, match="export both with vaefeat"):
        OnnxPredictor(digits_bundle)
    with pytest.raises(BundleError, match="a whole pipeline, which gives labels and no features"):
        OnnxEncoder(bundle)
    with pytest.raises(InputError, match="has no decoder"):
        bundle.refuse_decoding()


def test_graph_that_gives_something_else_than_the_manifest_says_is_refused(bundle: Bundle) -> None:
    contents = {file: bundle.read(file) for file in bundle.files}
    fewer = replace(bundle.manifest, classes=bundle.manifest.classes[:9], outputs={"probabilities": 9})
    with pytest.raises(BundleError, match="for 9 classes"):
        OnnxPredictor(Bundle.of(fewer, contents))
    numbers = replace(bundle.manifest, classes=tuple(range(10)))
    with pytest.raises(BundleError, match=r"tensor\(int64\)"):
        OnnxPredictor(Bundle.of(numbers, contents))


@pytest.mark.parametrize("change", [{"classes": ()}, {"outputs": {"probabilities": 10, "mean": 8}}, {"outputs": {}}])
def test_manifest_of_a_pipeline_that_contradicts_itself_is_refused(bundle: Bundle, change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="classes"):
        replace(bundle.manifest, **change)


def test_what_hides_in_a_subgraph_is_refused(bundle: Bundle) -> None:
    graph = onnx.load_model_from_string(bundle.read("pipeline.onnx"))
    noise = helper.make_node("RandomUniform", [], ["noise"], shape=[1])
    inner = helper.make_graph([noise], "inner", [], [helper.make_tensor_value_info("noise", TensorProto.FLOAT, [1])])
    true = helper.make_node("Constant", [], ["true"], value=helper.make_tensor("v", TensorProto.BOOL, [], [True]))
    graph.graph.node.extend([true, helper.make_node("If", ["true"], ["x"], then_branch=inner, else_branch=inner)])
    contents = {file: bundle.read(file) for file in bundle.files} | {"pipeline.onnx": graph.SerializeToString()}
    with pytest.raises(BundleError, match="the random node RandomUniform"):
        OnnxPredictor(Bundle.of(bundle.manifest, contents))


def test_reference_tells_other_probabilities_and_labels_from_its_own(bundle: Bundle) -> None:
    reference = load_reference(load_bundle(str(bundle.path)))
    assert isinstance(reference, PredictionReference)
    labels, probabilities = OnnxPredictor(bundle, device="cpu").compute(reference.rows, reference.outputs)
    assert reference.difference(labels, probabilities) == 0
    assert reference.difference(labels, probabilities + np.float32(0.25)) == pytest.approx(0.25)
    assert reference.difference((labels + 1) % 10, probabilities) == np.inf
    assert reference.difference(labels, probabilities * np.float32(np.nan)) == np.inf
