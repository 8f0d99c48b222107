"""Names of columns of numbers: known from training on, and compared wherever a data frame comes in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipelines.embedding.sources import Request, open_source
from pipelines.embedding.storage import Place
from tests.vaefeat.remote_servers import served
from vaefeat import (
    FineTuneClassifier,
    OnnxEncoder,
    OnnxPredictor,
    RemoteEncoder,
    VAEFeatures,
    VAETransformer,
    export_pipeline,
    load_bundle,
    pretrain,
)
from vaefeat.blocks import open_blocks
from vaefeat.bundle import Bundle
from vaefeat.cli_files import rows_for
from vaefeat.errors import InputError

FRAME, LABELS = load_breast_cancer(return_X_y=True, as_frame=True)
NAMES = tuple(FRAME.columns)
MOVED = FRAME[[*NAMES[1:], NAMES[0]]]
LIBRARIES: dict[str, Callable[[pd.DataFrame], Any]] = {
    "pandas": lambda frame: frame,
    "polars": pl.from_pandas,
    "pyarrow": lambda frame: pa.Table.from_pandas(frame, preserve_index=False),
}
SMALL: dict[str, Any] = {"preset": "textbook", "model": {"latent_dim": 4, "hidden_dims": (16,)}, "progress": False}


def trained(data: Any, **options: Any) -> Bundle:
    return pretrain(data, train={"max_epochs": 2, "seed": 0}, **SMALL, **options)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return trained(FRAME, out=tmp_path_factory.mktemp("bundles") / "cells")


@pytest.fixture(scope="module")
def nameless() -> Bundle:
    return trained(FRAME.to_numpy())


def test_bundle_of_a_frame_of_numbers_knows_its_columns_and_one_of_an_array_none(
    named: Bundle, nameless: Bundle
) -> None:
    assert named.path is not None
    loaded = load_bundle(named.path)
    assert loaded.manifest.input.names == NAMES
    assert (loaded.manifest.schema_version, nameless.manifest.schema_version) == (5, 1)
    assert "names" not in nameless.manifest.to_dict()["input"]
    # They are the same rows, and it is the same model.
    np.testing.assert_array_equal(OnnxEncoder(named).embed(FRAME), OnnxEncoder(nameless).embed(FRAME))


@pytest.mark.parametrize("library", LIBRARIES)
def test_encoder_refuses_columns_in_another_order_and_takes_arrays_as_they_are(library: str, named: Bundle) -> None:
    encoder, of = OnnxEncoder(named), LIBRARIES[library]
    rows = FRAME.to_numpy()
    np.testing.assert_array_equal(encoder.embed(of(FRAME)), encoder.embed(rows))
    with pytest.raises(InputError, match=r"got the columns mean texture, .* and 22 more, which are in another order"):
        encoder.embed(of(MOVED))
    with pytest.raises(InputError, match=r"\(without mean radius, with size\)"):
        encoder.embed(of(FRAME.rename(columns={"mean radius": "size"})))


def test_frame_whose_columns_are_numbered_is_taken_for_an_array(named: Bundle) -> None:
    numbered = FRAME.set_axis(range(len(NAMES)), axis=1)
    np.testing.assert_array_equal(OnnxEncoder(named).embed(numbered), OnnxEncoder(named).embed(FRAME))


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_features_refuse_in_fit_what_the_encoder_was_not_trained_on(library: str, named: Bundle) -> None:
    of = LIBRARIES[library]
    with pytest.raises(InputError, match="another order"):
        VAEFeatures(named).fit(of(MOVED))
    fitted = VAEFeatures(named).fit(of(FRAME))
    with pytest.raises(ValueError, match=r"feature names should match.*\n.*same order"):
        fitted.transform(of(MOVED))


@pytest.mark.filterwarnings("ignore:X has feature names, but VAEFeatures was fitted without:UserWarning")
def test_features_fitted_to_an_array_still_know_the_encoders_columns(named: Bundle) -> None:
    fitted = VAEFeatures(named).fit(FRAME.to_numpy())
    fitted.transform(FRAME)
    with pytest.raises(InputError, match="another order"):
        fitted.transform(MOVED)


def test_service_tells_the_names_to_its_client(named: Bundle) -> None:
    assert named.path is not None
    with served(named.path) as address, RemoteEncoder(address) as remote:
        np.testing.assert_array_equal(remote.embed(FRAME), OnnxEncoder(named).embed(FRAME))
        with pytest.raises(InputError, match="another order"):
            remote.embed(MOVED)


def test_transformer_saves_the_names(tmp_path: Path) -> None:
    fitted = VAETransformer(2, hidden_dims=(8,), max_epochs=1, random_state=0, preset="textbook").fit(FRAME)
    fitted.save_bundle(tmp_path / "bundle")
    with pytest.raises(InputError, match="another order"):
        OnnxEncoder(tmp_path / "bundle").embed(MOVED)


def test_images_in_a_frame_keep_the_names_of_their_pixels(digits_rows: NDArray[np.uint8]) -> None:
    pixels = pd.DataFrame(digits_rows[:200].reshape(200, -1)).add_prefix("pixel")
    fitted = VAETransformer(
        2, image_shape=(1, 8, 8), network="mlp", hidden_dims=(8,), max_epochs=1, preset="textbook"
    ).fit(pixels)
    encoder = OnnxEncoder(fitted.bundle_)
    np.testing.assert_array_equal(encoder.embed(pixels), encoder.embed(digits_rows[:200]))
    with pytest.raises(InputError, match="another order"):
        encoder.embed(pixels[pixels.columns[::-1]])


def test_fine_tuned_classifier_and_exported_pipeline_learn_the_names_of_the_rows_they_are_fitted_to(
    nameless: Bundle, tmp_path: Path
) -> None:
    tuned = FineTuneClassifier(nameless, max_steps=2, random_state=0).fit(FRAME, LABELS)
    pipe = make_pipeline(VAEFeatures(nameless), StandardScaler(), LogisticRegression()).fit(FRAME, LABELS)
    tuned.save_bundle(tmp_path / "tuned")
    export_pipeline(pipe, tmp_path / "pipeline", X=FRAME)
    export_pipeline(pipe, tmp_path / "made")
    for folder in ("tuned", "pipeline", "made"):
        predictor = OnnxPredictor(tmp_path / folder)
        np.testing.assert_array_equal(predictor.predict(FRAME), (tuned if folder == "tuned" else pipe).predict(FRAME))
        with pytest.raises(InputError, match="another order"):
            predictor.predict(MOVED)
    with pytest.raises(InputError, match="another order"):
        export_pipeline(pipe, tmp_path / "other", X=MOVED)


def test_columns_of_parquet_are_found_by_their_names_in_any_order(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pandas(FRAME, preserve_index=False), tmp_path / "rows.parquet")
    moved = MOVED.assign(weight=1.0)
    pq.write_table(pa.Table.from_pandas(moved, preserve_index=False), tmp_path / "moved.parquet")
    bundle = trained(tmp_path / "rows.parquet")
    spec = bundle.manifest.input
    assert spec.names == NAMES == trained(open_blocks(tmp_path / "rows.parquet")).manifest.input.names
    rows = rows_for(spec, tmp_path / "moved.parquet", split="train", image_size=None)
    np.testing.assert_array_equal(rows, FRAME.to_numpy(np.float32))
    source = open_source(Place(str(tmp_path / "moved.parquet")), spec, Request())
    assert source.columns is not None
    assert source.columns.rows == NAMES
    missing = tmp_path / "missing.parquet"
    pq.write_table(pa.Table.from_pandas(FRAME.rename(columns={"mean area": "area"}), preserve_index=False), missing)
    with pytest.raises(InputError, match=r"without mean area, with area"):
        open_source(Place(str(missing)), spec, Request())
    with pytest.raises(InputError, match="mean area"):
        rows_for(spec, missing, split="train", image_size=None)
