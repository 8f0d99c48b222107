"""What tests of the embedding job share: rows written in every form, and a job without Ray."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.embedding.encoding import PartEncoder
from pipelines.embedding.ids import refuse_doubtful_ids
from pipelines.embedding.output import Output
from pipelines.embedding.parts import plan_parts
from pipelines.embedding.sources import Request, open_source
from pipelines.embedding.storage import Place
from vaefeat import OnnxEncoder

__all__ = ["Here", "embedding_of"]


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
        for part in self.plan.parts:
            if part.index not in done:
                receipts.append(self.output.write(part.index, self.encoder.encode(part)))
        return self.output.finish(receipts, n_parts=len(self.plan.parts), n_rows=self.plan.n_rows)


def embedding_of(out: Path) -> tuple[list[Any], NDArray[np.float32], Any]:
    """Read ids, features and the whole table, as pyarrow reads any folder of Parquet."""
    table = pq.read_table(out).combine_chunks()
    column = table.column("embedding").combine_chunks()
    features = column.flatten().to_numpy().reshape(-1, column.type.list_size)
    return table.column("id").to_pylist(), features, table
