"""The stages between bundle and judgement: features of every row in a file, and the proof of what is served.

``features.parquet`` has a line for every training row and then every test row, in their order: ``split``, ``row`` (its
number within the split), ``label`` (the name of its class; no such column where rows come without labels), ``mean`` and
``hidden`` (lists of float32 of fixed size).
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from pipelines.datasets import Dataset, Parts
from pipelines.job import Job
from pipelines.progress import shown_progress
from pipelines.server import running_server
from pipelines.stages import Outcome, Stage
from vaefeat.atomic import replace_file
from vaefeat.bundle import MANIFEST_FILE
from vaefeat.data import batches
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import InputError, RemoteError
from vaefeat.remote import RemoteEncoder

__all__ = [
    "CHECK",
    "CHECK_FILE",
    "EMBED",
    "FEATURES_FILE",
    "OUTPUTS",
    "Features",
    "compare_features",
    "read_features",
]

FEATURES_FILE = "features.parquet"
CHECK_FILE = "check.json"
#: The encoder's outputs that are kept and judged.
OUTPUTS = ("mean", "hidden")
_ROWS_A_CALL = 4096
#: As the library computes them again: enough to tell another graph or another way to compute.
_ROWS_AGAIN = 256


@dataclass(frozen=True)
class Features:
    """Features of training and test rows.

    Attributes
    ----------
    train, test : mapping of str to ndarray of shape (n, width), float32
        By the encoder's output, a name in :data:`OUTPUTS`.
    """

    train: Mapping[str, NDArray[np.float32]]
    test: Mapping[str, NDArray[np.float32]]


def read_features(folder: Path) -> Features:
    """Read the features of a job.

    Raises
    ------
    InputError
        Something else is in the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / FEATURES_FILE
    try:
        table = pq.read_table(path)
        tests = table["split"].to_numpy() == "test"
        columns = {}
        for output in OUTPUTS:
            column = table[output].combine_chunks()
            columns[output] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(tests), -1)
    except (pa.ArrowInvalid, KeyError) as error:
        raise InputError(f"got {path}, which holds no features of ours ({error}); run the stage embed again") from error
    return Features(
        {output: column[~tests] for output, column in columns.items()},
        {output: column[tests] for output, column in columns.items()},
    )


def _embed(job: Job, attempt: str) -> Outcome:
    del attempt  # begun anew each time: it takes seconds
    data, encoder = job.parts, OnnxEncoder(job.folder)
    n_rows = len(data.train) + len(data.test)
    started = time.perf_counter()
    with shown_progress() as progress:
        task = progress.add_task("embed", total=n_rows)
        parts = []
        for rows in (data.train, data.test):
            for chunk in batches(rows, encoder.batch_size):
                # Both outputs of one pass; embed() gives one at a time.
                parts.append(encoder.compute(encoder.input.prepare(chunk), OUTPUTS))
                progress.advance(task, len(chunk))
    seconds = time.perf_counter() - started
    columns = dict(zip(OUTPUTS, map(np.concatenate, zip(*parts, strict=True)), strict=True))
    _write_features(job.folder / FEATURES_FILE, data, columns, digest=encoder.digest)
    summary = f"{n_rows:,} rows in {FEATURES_FILE}"
    return Outcome((FEATURES_FILE,), summary, {"rows": n_rows, "rows_per_s": n_rows / seconds})


def _embedded(
    encoder: RemoteEncoder, rows: NDArray[Any], output: str, progress: Progress, task: Any
) -> NDArray[np.float32]:
    features = np.empty((len(rows), encoder.outputs[output]), dtype=np.float32)
    for start in range(0, len(rows), _ROWS_A_CALL):
        part = rows[start : start + _ROWS_A_CALL]
        features[start : start + len(part)] = encoder.embed(part, output=output)
        progress.advance(task, len(part))
    return features


def _write_features(path: Path, data: Parts, columns: Mapping[str, NDArray[np.float32]], *, digest: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = {"train": len(data.train), "test": len(data.test)}
    labels = {}
    if isinstance(data, Dataset):
        labels["label"] = pa.array(np.array(data.names)[np.concatenate([data.train_labels, data.test_labels])])
    table = pa.table(
        {
            "split": pa.array(np.repeat(list(sizes), list(sizes.values()))),
            "row": pa.array(np.concatenate([np.arange(size) for size in sizes.values()])),
            **labels,
            **{
                output: pa.FixedSizeListArray.from_arrays(pa.array(column.ravel()), column.shape[1])
                for output, column in columns.items()
            },
        }
    ).replace_schema_metadata({"vaefeat.bundle": digest})
    file = io.BytesIO()
    pq.write_table(table, file)
    replace_file(path, file.getvalue())


def _check(job: Job, attempt: str) -> Outcome:
    """Embed every row over HTTP, as any client would, and compare with the file and with the library."""
    del attempt
    kept, data, serve = read_features(job.folder), job.parts, job.config.serve
    n_rows = len(data.train) + len(data.test)
    with shown_progress() as progress:
        task = progress.add_task(f"start the service ({serve.engine})", total=None)
        started = time.perf_counter()
        with running_server(job.folder, engine=serve.engine, start_timeout_s=serve.start_timeout_s) as address:
            start_s = time.perf_counter() - started
            progress.remove_task(task)
            task = progress.add_task("embed over HTTP", total=len(OUTPUTS) * n_rows)
            started = time.perf_counter()
            with RemoteEncoder(address, model=job.config.name) as remote:
                served = {
                    output: (
                        _embedded(remote, data.train, output, progress, task),
                        _embedded(remote, data.test, output, progress, task),
                    )
                    for output in OUTPUTS
                }
                embed_s = time.perf_counter() - started
                where = remote.provider
            progress.remove_task(task)
            progress.add_task("stop the service", total=None)
    found = compare_features(served, kept, OnnxEncoder(job.folder), data, provider=where)
    rates = {"rows_per_s": len(OUTPUTS) * n_rows / embed_s, "start_s": start_s, "embed_s": embed_s}
    content = {**found, "engine": serve.engine, "provider": where, **rates}
    replace_file(job.folder / CHECK_FILE, f"{json.dumps(content, indent=1)}\n".encode())
    agreement = "the same bits" if found["same_bits"] else f"within {found['largest_difference']:.2g}"
    summary = f"{n_rows:,} rows over HTTP, {agreement} as in the file and from the library"
    return Outcome((CHECK_FILE,), summary, {"rows": n_rows, **rates})


def compare_features(
    served: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    kept: Features,
    local: OnnxEncoder,
    data: Parts,
    *,
    provider: str,
) -> dict[str, Any]:
    """Require the same bits from service, file and library; where a GPU computes some of them, tell what differs.

    Parameters
    ----------
    served : mapping of str to (train, test)
        By the encoder's output.
    kept : Features
        From the file.
    local : OnnxEncoder
    data : Parts
        Of which the library embeds some again: test rows, or training rows where there are none.
    provider : str
        ONNX Runtime's, in the service.

    Returns
    -------
    dict
        ``same_bits``, ``largest_difference``, ``rows``.

    Raises
    ------
    RemoteError
        Some bits differ on a processor.
    InputError
        The file is of other rows.
    """
    again_of, compared_with = ("test", kept.test) if data.has_test else ("training", kept.train)
    n_again = min(_ROWS_AGAIN, len(data.shown))
    largest = 0.0
    for output, (train, test) in served.items():
        again = local.embed(data.shown[:n_again], output=output)
        for name, one, other in (
            ("the service and the file differ in training rows", train, kept.train[output]),
            ("the service and the file differ in test rows", test, kept.test[output]),
            (f"the library and the file differ in {again_of} rows", again, compared_with[output][:n_again]),
        ):
            if one.shape != other.shape:
                raise InputError(f"{name}: shapes {one.shape} and {other.shape}; run the stage embed again")
            largest = max(largest, float(np.abs(one - other).max(initial=0.0)))
            # Two devices round differently, and so may one GPU from call to call.
            if local.device == "cpu" and provider == local.provider and not np.array_equal(one, other):
                differing = np.flatnonzero((one != other).any(axis=1))
                raise RemoteError(
                    f"{name}: {len(differing)} rows of output {output!r}, the first number {differing[0]}; wanted the "
                    "same bits on a processor. Run the stage embed again; if it stays, please report it"
                )
    exact = local.device == "cpu" and provider == local.provider
    return {"same_bits": exact, "largest_difference": largest, "rows": sum(len(part) for part in served["mean"])}


EMBED = Stage(
    name="embed",
    does="write the features of every row",
    settings=lambda config: {},  # the digest of the rows says where training rows end, too
    rows="parts",
    reads=(MANIFEST_FILE,),
    writes=(FEATURES_FILE,),
    work=_embed,
)
CHECK = Stage(
    name="check",
    does="prove that HTTP, library and file agree",
    settings=lambda config: {"serve.engine": config.serve.engine},
    rows="parts",
    reads=(MANIFEST_FILE, FEATURES_FILE),
    writes=(CHECK_FILE,),
    work=_check,
)
