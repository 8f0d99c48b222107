"""The benchmark beside other transformers: what contenders give, the comparison with bare calls, the last line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from benchmarks import sklearn, sklearn_contenders
from benchmarks.few_labels_tasks import open_task
from benchmarks.sklearn import app, ratios_of
from benchmarks.sklearn_contenders import CONTENDERS, Job, compare_with_runtime, run
from vaefeat import VAEFeatures, load_bundle
from vaefeat.errors import ConfigError, InputError

KINDS = {"uint8": "", "float32": "_float32", "float64": "_float64", "images": "_images"}


def quick(bundle: Path, **settings: Any) -> Job:
    return Job(**{"data": None, "bundle": str(bundle), "draws": 2, "seconds": 0.02, "quick": True, **settings})


def gave(threads: int, ratio: float) -> dict[str, Any]:
    """Make what a contender gives, with a ratio that names it."""
    return {
        "title": "VAEFeatures",
        "threads": threads,
        "rows": 9,
        "fit_seconds": 1.0,
        "fit_cpu_seconds": 1.0,
        "rows_per_s": 5.0,
        "memory_mib": {"before": 1.0, "after": 2.0, "peak": 3.0},
        "features": 4,
        "errors": {"100": {"mean": 7.5, "spread": 0.5, "draws": [7.0, 8.0]}},
        "settings": {},
        "runtime": {kind: {"transform": 1.0, "onnxruntime": 1.0, "ratio": ratio} for kind in KINDS},
    }


def test_quick_run_ends_with_a_line_of_ratios_and_contenders(digits_bundle: Path) -> None:
    result = CliRunner().invoke(
        app, ["--quick", "--bundle", str(digits_bundle), "--only", "pca", "--only", "vaefeatures"]
    )
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert set(last["ratios"]) == {f"transform_vs_onnxruntime{suffix}" for suffix in KINDS.values()}
    assert all(0 < ratio < 10 for ratio in last["ratios"].values())
    assert list(last["contenders"]) == ["pca, threads=1", "vaefeatures, threads=1"]
    assert last["quick"] is True
    for one in last["contenders"].values():
        memory = one["memory_mib"]
        # Of the contender's own program: this one has torch loaded, and theirs have not.
        assert 20 < memory["before"] <= memory["peak"] < 600
        assert one["fit_seconds"] > 0
        assert one["rows_per_s"] > 0
    assert last["contenders"]["vaefeatures, threads=1"]["settings"]["digest"] == load_bundle(digits_bundle).digest
    assert "VAEFeatures" in result.stdout


@pytest.mark.parametrize(
    "name",
    [
        "kernel_pca",
        "pythae",
        "vaetransformer",
        pytest.param(
            "umap", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ImportWarning")]
        ),
    ],
)
def test_contender_gives_features_that_tell_digits_apart(name: str, tmp_path: Path) -> None:
    found = run(name, quick(tmp_path / "bundle"))
    assert found["rows"] == len(open_task("digits", None, validation=True).train)
    assert found["rows_per_s"] > 0
    # Guessing would be 90.
    assert found["errors"]["100"]["mean"] < 45
    assert len(found["errors"]["100"]["draws"]) == 2
    assert json.loads(json.dumps(found)) == found
    if name == "vaetransformer":
        assert load_bundle(tmp_path / "bundle").digest == found["settings"]["digest"]
    else:
        assert found["features"] == 32


def test_errors_are_those_of_the_draws_of_few_labels(tmp_path: Path) -> None:
    task = open_task("digits", None, validation=True)
    judges, truth = task.judges()

    def scaled(rows: NDArray[Any]) -> NDArray[np.float32]:
        flat: NDArray[np.float32] = rows.reshape(len(rows), -1).astype(np.float32) / np.float32(16)
        return flat

    pca = PCA(32, random_state=0).fit(scaled(task.train))
    errors = []
    for seed in range(3):
        chosen = task.draw(100, seed)
        features = pca.transform(scaled(task.train[chosen]))
        scaler = StandardScaler().fit(features)
        line = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(features), task.train_labels[chosen])
        guessed = line.predict(scaler.transform(pca.transform(scaled(judges))))
        errors.append(100 * float((guessed != truth).mean()))
    found = run("pca", quick(tmp_path, draws=3))["errors"]["100"]
    assert found["draws"] == pytest.approx(errors)
    assert found["mean"] == pytest.approx(np.mean(errors))
    assert found["spread"] == pytest.approx(np.std(errors, ddof=1))


def test_kernel_is_of_as_many_rows_as_memory_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Half of it, for two matrices of float32.
    monkeypatch.setattr(sklearn_contenders, "available_memory", lambda: 500 * 500 * 4 * 2 * 2)
    assert run("kernel_pca", quick(tmp_path))["settings"]["rows"] == 500


def test_transform_that_dawdles_has_a_lower_ratio(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = VAEFeatures.transform

    def dawdle(self: VAEFeatures, X: Any) -> NDArray[np.float32]:
        before = time.perf_counter()
        features = transform(self, X)
        time.sleep(4 * (time.perf_counter() - before))
        return features

    monkeypatch.setattr(VAEFeatures, "transform", dawdle)
    found = compare_with_runtime(str(digits_bundle), digits_rows, threads=1, seconds=0.3)
    assert set(found) == set(KINDS)
    for one in found.values():
        assert one["ratio"] < 0.5
        assert one["transform"] < one["onnxruntime"]


def test_encoder_of_other_rows_is_refused(data_dir: Path, digits_bundle: Path) -> None:
    with pytest.raises(InputError, match="an encoder of other rows than these, wanted one of MNIST's training rows"):
        run("vaefeatures", Job(data=str(data_dir), bundle=str(digits_bundle)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--only", "kernelpca"], ConfigError, "did you mean 'kernel_pca'"),
        (["--quick", "--results", "figures.json"], InputError, "got --quick with --results"),
        (["--bundle", "mnist", "--only", "vaetransformer"], InputError, "got --bundle with vaetransformer"),
        (
            ["--only", "vaefeatures", "--work", "nowhere"],
            InputError,
            r"got no bundle in .*nowhere.*--only vaetransform",
        ),
    ],
)
def test_arguments_that_fit_nothing_are_refused(arguments: list[str], error: type[Exception], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, error)
    with pytest.raises(error, match=message):
        raise result.exception


def test_results_are_laid_over_what_the_file_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = iter([gave(1, 0.95), gave(1, 0.91)])
    monkeypatch.setattr(sklearn, "ask_module", lambda *arguments, **settings: next(answers))
    figures = tmp_path / "figures.json"
    for only in ("pca", "vaefeatures"):
        arguments = ["--only", only, "--bundle", str(tmp_path), "--results", str(figures)]
        assert CliRunner().invoke(app, arguments).exit_code == 0
    kept = json.loads(figures.read_text())
    assert list(kept["contenders"]) == ["pca, threads=1", "vaefeatures, threads=1"]
    assert kept["ratios"]["transform_vs_onnxruntime"] == 0.91
    assert all(one["commit"] and one["date"] for one in kept["contenders"].values())


def test_ratio_is_that_of_the_fewest_threads_and_none_where_not_measured() -> None:
    found = {"vaefeatures, threads=16": gave(16, 0.8), "vaefeatures, threads=2": gave(2, 0.97), "pca, threads=1": {}}
    assert ratios_of(found) == {f"transform_vs_onnxruntime{suffix}": 0.97 for suffix in KINDS.values()}
    assert ratios_of({"pca, threads=1": {}}) == {"transform_vs_onnxruntime": None}


def test_contenders_are_those_that_are_promised() -> None:
    assert set(CONTENDERS) == {"pca", "kernel_pca", "umap", "pythae", "vaetransformer", "vaefeatures"}
