"""The file of features, and the proof that what is served is what is in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.config import DataConfig, RunConfig
from pipelines.features import EMBED, OUTPUTS, Features, compare_features, read_features
from pipelines.job import Job
from vaefeat import OnnxEncoder
from vaefeat.errors import InputError, RemoteError


@pytest.fixture
def job(digits_bundle: Path, tmp_path: Path) -> Job:
    """Give a job on digits whose bundle is there."""
    folder = tmp_path / "out"
    folder.mkdir()
    for path in digits_bundle.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return Job(RunConfig(name="digits", out=str(folder), data=DataConfig(test_share=0.3)))


def test_file_has_a_line_for_every_row_in_order_with_the_bits_of_the_library(job: Job) -> None:
    outcome = EMBED.work(job, "attempt")
    found, data, encoder = read_features(job.folder), job.dataset, OnnxEncoder(job.folder)
    for output in OUTPUTS:
        np.testing.assert_array_equal(found.train[output], encoder.embed(data.train, output=output))
        np.testing.assert_array_equal(found.test[output], encoder.embed(data.test, output=output))
    table = pq.read_table(job.folder / "features.parquet")
    assert table.schema.metadata[b"vaefeat.bundle"].decode() == encoder.digest
    assert table["row"].to_pylist() == [*range(len(data.train)), *range(len(data.test))]
    assert table["label"].to_pylist()[: len(data.train)] == [data.names[index] for index in data.train_labels]
    assert outcome.figures["rows"] == 1797
    assert [path.name for path in job.folder.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all"])
def test_file_that_holds_no_features_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "features.parquet").write_bytes(content)
    with pytest.raises(InputError, match="holds no features of ours"):
        read_features(tmp_path)


def test_one_other_bit_anywhere_is_an_error_that_names_the_row(job: Job) -> None:
    EMBED.work(job, "attempt")
    kept, data, local = read_features(job.folder), job.dataset, OnnxEncoder(job.folder)
    served = {output: (kept.train[output].copy(), kept.test[output].copy()) for output in OUTPUTS}
    agreed = compare_features(served, kept, local, data, provider=local.provider)
    assert agreed == {"same_bits": True, "largest_difference": 0.0, "rows": 1797}
    served["hidden"][1][7, 3] = np.nextafter(served["hidden"][1][7, 3], np.float32(np.inf))
    with pytest.raises(
        RemoteError, match=r"the service and the file differ in test rows: 1 rows .* the first number 7"
    ):
        compare_features(served, kept, local, data, provider=local.provider)
    told = compare_features(served, kept, local, data, provider="CUDAExecutionProvider")
    assert not told["same_bits"]
    assert 0 < told["largest_difference"] < 1e-5
    other = Features(kept.train, {**kept.test, "mean": kept.test["mean"] + np.float32(1)})
    with pytest.raises(RemoteError, match="test rows: 540 rows of output 'mean'"):
        compare_features(served, other, local, data, provider=local.provider)
    fewer = replace(kept, train={output: column[1:] for output, column in kept.train.items()})
    with pytest.raises(InputError, match="run the stage embed again"):
        compare_features(served, fewer, local, data, provider=local.provider)
