"""From rows to a bundle, for each kind of rows, and what is refused on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_breast_cancer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vaefeat import ModelConfig, OnnxEncoder, TrainConfig, load_bundle, pretrain
from vaefeat.decoder import OnnxDecoder
from vaefeat.errors import BundleError, CheckpointError, ConfigError, ExportError, InputError
from vaefeat.observers import EpochRecord, Observer
from vaefeat.pretraining import export_checkpoint, train_checkpoint

SMALL = ModelConfig(latent_dim=4, hidden_dims=(16,), channels=(8, 8))
SHORT = TrainConfig(max_epochs=2)


def test_pretrain_writes_a_whole_run_folder(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> None:
    bundle = load_bundle(digits_bundle)
    assert set(bundle.files) == {
        "README.md",
        "decoder.onnx",
        "encoder.onnx",
        "reconstructions.png",
        "reference.safetensors",
        "weights.safetensors",
    }
    assert {path.name for path in digits_bundle.iterdir()} == {*bundle.files, "bundle.json", "training"}
    manifest = bundle.manifest
    assert (manifest.name, manifest.latent_dim, manifest.input.shape) == ("digits", 8, (1, 8, 8))
    assert manifest.data["n_rows"] == len(digits_rows)
    assert (manifest.model["likelihood"], manifest.model["network"]) == ("bernoulli", "conv")
    assert manifest.metrics["elbo"] == pytest.approx(manifest.metrics["log_likelihood"] - manifest.metrics["kl"])
    history = json.loads((digits_bundle / "training" / "history.json").read_text())
    assert [record["epoch"] for record in history] == list(range(1, 16))


def test_event_files_hold_the_figures_of_every_epoch(digits_bundle: Path) -> None:
    events = EventAccumulator(str(digits_bundle / "training")).Reload()
    history = json.loads((digits_bundle / "training" / "history.json").read_text())
    points = events.Scalars("heldout/elbo")
    assert [point.step for point in points] == list(range(1, 16))
    assert [point.value for point in points] == pytest.approx([record["heldout_elbo"] for record in history], rel=1e-6)


def test_model_card_names_figures_and_shows_a_picture(digits_bundle: Path) -> None:
    card = (digits_bundle / "README.md").read_text()
    manifest = load_bundle(digits_bundle).manifest
    assert f"{manifest.metrics['elbo']:.2f} nats per row" in card
    assert "(reconstructions.png)" in card
    with Image.open(digits_bundle / "reconstructions.png") as picture:
        assert picture.size[0] > 600
        # Digits are white on black, and the gaps between them are white: all values occur.
        assert picture.getextrema()[0] == (0, 255)


def test_reconstructions_are_in_the_units_of_the_rows(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> None:
    bundle = load_bundle(digits_bundle)
    back = OnnxDecoder(bundle).decode(OnnxEncoder(bundle).embed(digits_rows))
    assert back.shape == digits_rows.shape
    assert 0 <= back.min() <= back.max() <= 16
    error = np.abs(back - digits_rows).mean()
    of_the_mean = np.abs(digits_rows.mean(axis=0) - digits_rows).mean()
    assert error < 0.9 * of_the_mean


def test_table_of_mixed_scales_gets_a_gaussian_and_no_picture(tmp_path: Path) -> None:
    table = load_breast_cancer().data
    bundle = pretrain(table, model=SMALL, train=TrainConfig(max_epochs=5), out=tmp_path / "table", progress=False)
    assert bundle.manifest.model["likelihood"] == "gaussian"
    assert bundle.manifest.input.dtype == "float32"
    assert "reconstructions.png" not in bundle.files
    features = OnnxEncoder(bundle).embed(table)
    assert features.shape == (569, 4)
    assert np.isfinite(features).all()


def test_colour_images_in_a_folder_are_pretrained_on(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for index in range(12):
        pixels = random.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    bundle = pretrain(tmp_path, model=SMALL, train=SHORT, name="colours", progress=False)
    assert bundle.manifest.input.shape == (3, 12, 10)
    assert bundle.path is None


def test_same_seed_gives_the_same_digest_and_another_seed_another(digits_rows: NDArray[np.uint8]) -> None:
    digests = [
        pretrain(digits_rows[:200], model=SMALL, train=TrainConfig(max_epochs=1, seed=seed), progress=False).digest
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_resumed_run_gives_the_digest_of_a_run_that_was_never_stopped(
    digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"model": SMALL, "train": TrainConfig(max_epochs=3), "name": "x", "progress": False}
    whole = pretrain(digits_rows, out=tmp_path / "whole", **settings)

    class Crash(Observer):
        def on_epoch(self, record: EpochRecord) -> None:
            if record.epoch == 2:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(digits_rows, out=tmp_path / "cut", observers=[Crash()], **settings)
    assert not (tmp_path / "cut" / "bundle.json").exists()
    continued = pretrain(digits_rows, out=tmp_path / "cut", resume=True, **settings)
    assert continued.digest == whole.digest


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((1, 5)), "got 1 row .* wanted at least 2"),
        (np.zeros((0, 5)), r"\(0, 5\), wanted at least one row"),
        (np.full((9, 5), 3.0), "all the same"),
        (np.array([[[[1.0, np.nan]]], [[[2.0, 3.0]]]]), "NaN"),
        (np.array([[1.0, np.nan], [2.0, np.nan]]), "'x1' without a single value"),
        (np.array([[1.0, np.inf], [2.0, 3.0]]), r"NaN|infinit"),
        (np.array([[1j, 2.0], [3.0, 4.0]]), "dtype"),
        (np.array([["a", "b"], ["a", "b"]]), "all the same"),
        (np.arange(6.0), "reshape"),
        ("no/such/place", "no/such/place"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        pretrain(rows, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_some_constant_columns_are_trained_on(tmp_path: Path) -> None:
    table = np.column_stack([np.full(60, 4.0), np.random.default_rng(0).normal(size=(60, 3))])
    bundle = pretrain(table, model=SMALL, train=SHORT, progress=False)
    assert np.isfinite(OnnxEncoder(bundle).embed(table)).all()


def test_bad_name_and_resume_without_a_folder_are_refused(digits_rows: NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match="bundle name"):
        pretrain(digits_rows, name="../x", progress=False)
    with pytest.raises(InputError, match="out="):
        pretrain(digits_rows, resume=True, progress=False)
    with pytest.raises(ConfigError, match="did you mean 'elbo'"):
        pretrain(digits_rows, train=TrainConfig(objective="elboo"), progress=False)


def test_failed_parity_writes_nothing(
    digits_rows: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tolerance of zero is one that no float32 graph meets: the real comparison fails on real figures.
    monkeypatch.setattr("vaefeat.export.PARITY_TOLERANCE", 0.0)
    with pytest.raises(ExportError, match="differs from torch's by"):
        pretrain(digits_rows, model=SMALL, train=SHORT, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "bundle.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="permissions of a folder")
def test_unwritable_folder_is_an_error_of_ours(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    bundle = pretrain(digits_rows[:50], model=SMALL, train=SHORT, progress=False)
    with pytest.raises(BundleError, match="could not write bundle"):
        bundle.save(blocked / "out")


def test_import_of_vaefeat_loads_neither_torch_nor_onnxruntime() -> None:
    program = "import sys, vaefeat; print({'torch', 'onnxruntime', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_training_and_exporting_apart_give_the_bundle_of_both_at_once(
    digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    whole = pretrain(digits_rows, model=SMALL, train=SHORT, out=tmp_path / "whole", name="digits", progress=False)
    train_checkpoint(digits_rows, model=SMALL, train=SHORT, out=tmp_path / "halves", progress=False)
    assert not (tmp_path / "halves" / "bundle.json").exists()
    left = {path.name: path.read_bytes() for path in (tmp_path / "halves" / "training").iterdir()}
    bundle = export_checkpoint(digits_rows, model=SMALL, train=SHORT, out=tmp_path / "halves", name="digits")
    assert bundle.digest == whole.digest == load_bundle(tmp_path / "halves").digest
    assert left == {path.name: path.read_bytes() for path in (tmp_path / "halves" / "training").iterdir()}


def test_export_without_its_training_is_refused(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train first"):
        export_checkpoint(digits_rows, model=SMALL, train=SHORT, out=tmp_path)
    train_checkpoint(digits_rows, model=SMALL, train=SHORT, out=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="another run"):
        export_checkpoint(digits_rows[:-1], model=SMALL, train=SHORT, out=tmp_path)
