"""Exported pipelines on the real rows of MNIST, and of encoders of other kinds: int8, tables of float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import SVC

from vaefeat import ModelConfig, OnnxPredictor, TrainConfig, VAEFeatures, VAETransformer, export_pipeline, pretrain
from vaefeat.bundle import Bundle
from vaefeat.data import load_rows
from vaefeat.quantization import QuantizationGate, quantize
from vaefeat.reference import PredictionReference, load_reference

pytest.importorskip("skl2onnx")

Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]


@pytest.fixture(scope="module")
def mnist(data_dir: Path) -> Labelled:
    rows = load_rows(data_dir / "MNIST", split="test", max_rows=3000)
    assert rows.labels is not None
    return rows.array, np.asarray(rows.labels)


@pytest.fixture(scope="module")
def mnist_bundle(mnist: Labelled, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pretrain(
        mnist[0][:2000],
        model=ModelConfig(network="mlp", latent_dim=16, hidden_dims=(128,)),
        train=TrainConfig(max_epochs=2, batch_size=128),
        out=tmp_path_factory.mktemp("bundles") / "mnist",
        progress=False,
    )


@pytest.mark.parametrize(
    ("scaler", "classifier"),
    [
        (StandardScaler(), RandomForestClassifier(50, random_state=0)),
        (MinMaxScaler(), HistGradientBoostingClassifier(max_iter=5)),
        ("passthrough", KNeighborsClassifier()),
        (StandardScaler(), CalibratedClassifierCV(SVC(), ensemble=False, cv=3)),
        (StandardScaler(), LogisticRegression(max_iter=2000)),
    ],
    ids=["forest", "boosting", "neighbours", "svc", "line"],
)
def test_exported_pipeline_agrees_on_rows_of_mnist_that_it_never_saw(
    scaler: Any, classifier: Any, mnist: Labelled, mnist_bundle: Bundle, tmp_path: Path
) -> None:
    images, labels = mnist
    pipe = make_pipeline(VAEFeatures(mnist_bundle, output="hidden"), scaler, classifier).fit(images[:500], labels[:500])
    # Proved on rows that were fitted, and compared on others: parity holds beyond what export looked at.
    bundle = export_pipeline(pipe, tmp_path / "pipeline.onnx", X=images[:500])
    predictor = OnnxPredictor(bundle, device="cpu")
    np.testing.assert_allclose(predictor.predict_proba(images), pipe.predict_proba(images), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(predictor.predict(images), pipe.predict(images))


def test_encoder_in_int8_is_exported_with_its_steps(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    coarse = quantize(VAEFeatures(digits_bundle).fit(digits_rows).encoder_.bundle, digits_rows, gate=ANY)  # type: ignore[union-attr]
    pipe = make_pipeline(VAEFeatures(coarse), LogisticRegression(max_iter=2000))
    pipe.fit(digits_rows, load_digits().target)
    bundle = export_pipeline(pipe, tmp_path / "pipeline", X=digits_rows)
    predictor = OnnxPredictor(bundle, device="cpu")
    assert predictor.precision == "int8"
    np.testing.assert_array_equal(predictor.predict(digits_rows), pipe.predict(digits_rows))


ANY = QuantizationGate(difference=10.0, error=100.0)


def test_table_of_float32_with_column_names_is_exported_and_nobodys_row_is_kept(tmp_path: Path) -> None:
    table, labels = load_breast_cancer(return_X_y=True, as_frame=True)
    features = VAETransformer(4, max_epochs=2, random_state=0, preset="textbook")
    pipe = make_pipeline(features, StandardScaler(), LogisticRegression()).fit(table, labels)
    bundle = export_pipeline(pipe, tmp_path / "pipeline", X=table)
    predictor = OnnxPredictor(bundle, device="cpu")
    rows = table.to_numpy(np.float32)
    np.testing.assert_array_equal(predictor.predict(rows), pipe.predict(table))
    reference = load_reference(bundle)
    assert isinstance(reference, PredictionReference)
    known = {row.tobytes() for row in rows}
    assert not any(row.tobytes() in known for row in reference.rows)
    without_names = export_pipeline(pipe, tmp_path / "again", name="again")
    assert without_names.manifest.pipeline is not None
    assert without_names.manifest.pipeline["parity"]["n_made"] == 256
