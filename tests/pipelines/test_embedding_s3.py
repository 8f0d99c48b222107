"""The embedding job on S3: through pyarrow's own client, against a server that speaks S3 on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipelines.embedding.storage import Place
from tests.pipelines.embedding_rows import Here
from vaefeat import OnnxEncoder
from vaefeat.errors import InputError

pytest.importorskip("moto.server", reason="moto is not installed")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Give an address with room for a name, of an empty bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = f"endpoint_override={quote(f'{host}:{port}')}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    address = f"s3://testing:testing@bucket{{}}?{options}"
    Place(address.format(""))._filesystem.create_dir("bucket")
    yield address
    server.stop()


def test_rows_and_features_in_a_bucket_are_those_of_the_encoder_and_a_job_goes_on_there(
    bucket: str, digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    rows = digits_rows[:300]
    np.save(tmp_path / "rows.npy", rows)
    Place(bucket.format("/in")).write("a/rows.npy", (tmp_path / "rows.npy").read_bytes())
    out = Place(bucket.format("/out.parquet"))
    Here(digits_bundle, bucket.format("/in"), out.address, part_rows=100).run()
    before = {file.name: file for file in out.find()}
    assert list(before) == ["_job.json", "_manifest.json", *(f"part-0000000{i}.parquet" for i in range(3))]
    assert "testing" not in out.read("_job.json").decode()
    out.remove("part-00000001.parquet")
    again = Here(digits_bundle, bucket.format("/in"), out.address, part_rows=100)
    assert [receipt.index for receipt in again.output.begin(3)] == [0, 2]
    assert not out.child("_manifest.json").is_file
    manifest = again.run()
    assert json.loads(out.read("_manifest.json")) == manifest
    assert again.run() == manifest
    features = np.concatenate([features_of(out, file["name"]) for file in manifest["files"]])
    wanted = OnnxEncoder(digits_bundle, device="cpu").embed(rows)
    np.testing.assert_array_equal(features.view(np.uint32), wanted.view(np.uint32))


def features_of(out: Place, name: str) -> Any:
    column = pq.read_table(out.child(name).open()).column("embedding").combine_chunks()
    return column.flatten().to_numpy().reshape(-1, column.type.list_size)


def test_a_bucket_that_is_not_there_is_told_in_a_line(bucket: str, digits_bundle: Path) -> None:
    with pytest.raises(InputError) as told:
        Here(digits_bundle, bucket.replace("bucket{}", "nobody{}").format("/in"), bucket.format("/nowhere"))
    assert "s3://nobody/in" in str(told.value)
    assert "testing" not in str(told.value)
    assert "\n" not in str(told.value)
