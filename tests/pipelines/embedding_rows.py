"""What tests of the embedding job share: rows written in every form, and a job without Ray."""

from __future__ import annotations

import gzip
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.embedding.encoding import PartEncoder
from pipelines.embedding.ids import refuse_doubtful_ids
from pipelines.embedding.output import Output
from pipelines.embedding.parts import plan_parts
from pipelines.embedding.sources import Request, open_source
from pipelines.embedding.storage import Place
from vaefeat import OnnxEncoder
from vaefeat.input_spec import InputSpec

__all__ = [
    "Here",
    "embedding_of",
    "fixed_lists",
    "flat",
    "floats",
    "idx",
    "lists",
    "npy",
    "numbers",
    "open_spec",
    "packed_idx",
    "raw",
    "several_npy",
    "table_of",
    "tensors",
]


class Here:
    """The job in this process: the rooms that Ray Data's actors and the job itself call, one after another."""

    def __init__(
        self, bundle: Path, data: object, out: object, *, part_rows: int | None = None, threads: int = 1, **request: Any
    ) -> None:
        encoder = OnnxEncoder(bundle, device="cpu", threads=1)
        source = open_source(Place(str(data)), encoder.input, Request(**request))
        self.plan = plan_parts(source, encoder.input, width=encoder.latent_dim, part_rows=part_rows)
        identity: dict[str, Any] = {"bundle": encoder.digest, "name": encoder.name, "output": "mean"}
        identity |= {"input": source.fingerprint(), "columns": source.columns and asdict(source.columns)}
        self.output = Output(Place(str(out)), identity)
        self.encoder = PartEncoder(
            encoder,
            source=source,
            headers=self.plan.headers,
            output="mean",
            metadata=self.output.metadata,
            threads=threads,
        )
        self.encoder.try_first(self.plan.parts[0])
        refuse_doubtful_ids(source)

    def run(self) -> dict[str, Any]:
        """Do what is left, and give the manifest."""
        receipts = self.output.begin(len(self.plan.parts))
        done = {receipt.index for receipt in receipts}
        left = [part for part in self.plan.parts if part.index not in done]
        for part, encoded in zip(left, self.encoder.encode(left), strict=True):
            receipts.append(self.output.write(part.index, encoded))
        return self.output.finish(receipts, n_parts=len(self.plan.parts), n_rows=self.plan.n_rows)


def embedding_of(out: Path) -> tuple[list[Any], NDArray[np.float32], Any]:
    """Read ids, features and the whole table, as pyarrow reads any folder of Parquet."""
    table = pq.read_table(out).combine_chunks()
    column = table.column("embedding").combine_chunks()
    features = column.flatten().to_numpy().reshape(-1, column.type.list_size)
    return table.column("id").to_pylist(), features, table


def flat(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return rows.reshape(len(rows), -1)


def npy(folder: Path, rows: NDArray[Any]) -> Path:
    np.save(folder / "rows.npy", rows)
    return folder / "rows.npy"


def several_npy(folder: Path, rows: NDArray[np.uint8]) -> Path:
    np.save(folder / "a.npy", rows[:7])
    np.save(folder / "b.npy", flat(rows[7:]))
    return folder


def floats(folder: Path, rows: NDArray[np.uint8]) -> Path:
    return npy(folder, rows.astype(np.float64))


def idx(folder: Path, rows: NDArray[np.uint8]) -> Path:
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *rows[:, 0].shape) + rows.tobytes())
    return path


def packed_idx(folder: Path, rows: NDArray[np.uint8]) -> Path:
    plain = idx(folder, rows)
    plain.with_name(f"{plain.name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return folder


def table_of(rows: NDArray[np.uint8]) -> Any:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat(rows).reshape(-1)), flat(rows).shape[1])
    return pa.table({"key": [f"row {i}" for i in range(len(rows))], "pixels": vectors, "label": list(range(len(rows)))})


def fixed_lists(folder: Path, rows: NDArray[np.uint8]) -> Path:
    pq.write_table(table_of(rows), folder / "rows.parquet", row_group_size=90)
    return folder / "rows.parquet"


def raw(folder: Path, rows: NDArray[np.uint8]) -> Path:
    pixels = pa.array([row.tobytes() for row in rows], pa.binary(64))
    pq.write_table(pa.table({"pixels": pixels}), folder / "rows.parquet", row_group_size=70)
    return folder


def lists(folder: Path, rows: NDArray[np.uint8]) -> Path:
    pq.write_table(pa.table({"pixels": pa.array(flat(rows).tolist(), pa.list_(pa.uint8()))}), folder / "rows.parquet")
    return folder


def tensors(folder: Path, rows: NDArray[np.uint8]) -> Path:
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(rows)
    pq.write_table(pa.table({"pixels": column}), folder / "rows.parquet", row_group_size=1)
    return folder


def numbers(folder: Path, rows: NDArray[np.uint8]) -> Path:
    pixels = {f"p{i}": flat(rows)[:, i] for i in range(64)}
    pq.write_table(pa.table({"label": np.zeros(len(rows)), **pixels}), folder / "a.parquet")
    return folder


def open_spec() -> InputSpec:
    return InputSpec(kind="image", shape=(1, 8, 8), dtype="uint8", low=0, high=16)
