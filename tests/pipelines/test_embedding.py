"""The embedding job, room by room and without Ray: every form of rows, ids, quarantine, resume, and bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.embedding.output import Output
from pipelines.embedding.parts import Part, plan_parts, shares
from pipelines.embedding.sources import Request, open_source
from pipelines.embedding.storage import Place
from pipelines.server import running_server
from tests.pipelines.embedding_rows import (
    Here,
    embedding_of,
    fixed_lists,
    flat,
    floats,
    idx,
    lists,
    npy,
    numbers,
    open_spec,
    packed_idx,
    raw,
    several_npy,
    table_of,
    tensors,
)
from vaefeat import OnnxEncoder
from vaefeat.bundle import Bundle
from vaefeat.errors import InputError, JobError

CHECKOUT = Path(__file__).parents[2]
N = 300

Write = Callable[[Path, NDArray[np.uint8]], Path]


@pytest.fixture(scope="module")
def rows(digits_rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return digits_rows[:N]


@pytest.fixture(scope="module")
def wanted(digits_bundle: Path, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    return OnnxEncoder(digits_bundle, device="cpu").embed(rows)


@pytest.mark.parametrize(
    "write", [npy, several_npy, floats, idx, packed_idx, fixed_lists, raw, lists, tensors, numbers]
)
@pytest.mark.parametrize("part_rows", [None, 41])
def test_rows_in_any_form_get_the_bits_of_the_encoder_in_order(
    write: Write, part_rows: int | None, digits_bundle: Path, rows: NDArray[np.uint8], wanted: Any, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    data = write(tmp_path / "in", rows)
    here = Here(digits_bundle, data, tmp_path / "out", part_rows=part_rows)
    manifest = here.run()
    ids, features, table = embedding_of(tmp_path / "out")
    assert ids == list(range(N))
    np.testing.assert_array_equal(features.view(np.uint32), wanted.view(np.uint32))
    assert manifest["rows_embedded"] == N
    assert len(manifest["files"]) == len(here.plan.parts) == (len(list((tmp_path / "out").glob("part-*"))))
    if part_rows is None:
        assert len(here.plan.parts) == (2 if write is several_npy else 1)
    else:
        assert len(here.plan.parts) >= N // part_rows
    assert table.schema.metadata[b"vaefeat.bundle"].decode() == OnnxEncoder(digits_bundle).digest
    assert table.schema.field("embedding").type == pa.list_(pa.field("element", pa.float32(), nullable=False), 8)


def test_parts_cover_uneven_row_groups_without_a_gap(rows: NDArray[np.uint8], tmp_path: Path) -> None:
    with pq.ParquetWriter(tmp_path / "rows.parquet", table_of(rows).schema) as writer:
        for start, stop in [(0, 3), (3, 8), (8, 9), (9, 250), (250, 255), (255, 300)]:
            writer.write_table(table_of(rows)[start:stop])
    spec = open_spec()
    source = open_source(Place(tmp_path), spec, Request())
    parts = plan_parts(source, spec, width=8, part_rows=50).parts
    assert [part.first for part in parts] == np.cumsum([0, *(part.n_rows for part in parts)])[:-1].tolist()
    assert [(part.groups, part.skip, part.n_rows) for part in parts] == [
        ((0, 1, 2), 0, 9),
        *(((3,), skip, 50) for skip in range(0, 200, 50)),
        ((3,), 200, 41),
        ((4, 5), 0, 50),
    ]


def encoded(row: NDArray[np.uint8], kind: str, *, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(row[0] * 15).resize((side, side)).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures(rows: NDArray[np.uint8]) -> list[bytes]:
    return [encoded(row, "JPEG" if i % 2 else "PNG", side=8 + i % 3) for i, row in enumerate(rows[:40])]


def test_images_equal_the_http_answers_to_the_last_bit(
    digits_bundle: Path, pictures: list[bytes], tmp_path: Path
) -> None:
    cells = [{"bytes": content, "path": f"{i}.jpg"} for i, content in enumerate(pictures)]
    keys = [1000 - i for i in range(len(cells))]
    pq.write_table(pa.table({"image": cells, "key": keys, "who": ["a"] * 40}), tmp_path / "in.parquet")
    for i, content in enumerate(pictures):
        place = tmp_path / "images" / str(i % 3) / f"{i:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    Here(
        digits_bundle, tmp_path / "in.parquet", tmp_path / "a", part_rows=13, id_column="key", keep=("who",), threads=3
    ).run()
    Here(digits_bundle, tmp_path / "images", tmp_path / "b", part_rows=7).run()
    with running_server(digits_bundle, engine="local", start_timeout_s=120) as address, httpx.Client() as client:
        headers = {"content-type": "image/png", "accept": "application/octet-stream"}
        answers = [client.post(f"{address}/v1/embed", content=one, headers=headers) for one in pictures]
    served = np.stack([np.frombuffer(answer.content, np.float32) for answer in answers])
    ids, features, table = embedding_of(tmp_path / "a")
    assert ids == keys
    assert table.column_names == ["id", "who", "embedding"]
    np.testing.assert_array_equal(features.view(np.uint32), served.view(np.uint32))
    ids, features, _ = embedding_of(tmp_path / "b")
    assert ids == sorted(f"{i % 3}/{i:03}.png" for i in range(40))
    order = [int(Path(one).stem) for one in ids]
    np.testing.assert_array_equal(features.view(np.uint32), served[order].view(np.uint32))


def test_images_that_cannot_be_read_are_set_aside_with_the_reason(
    digits_bundle: Path, pictures: list[bytes], tmp_path: Path
) -> None:
    colour = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(colour, "PNG")
    cells = [*pictures[:10], b"no image", None, pictures[3][:40], colour.getvalue(), *pictures[10:20]]
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), tmp_path / "in.parquet", row_group_size=6)
    manifest = Here(digits_bundle, tmp_path / "in.parquet", tmp_path / "out", part_rows=6).run()
    assert (manifest["rows_embedded"], manifest["rows_quarantined"]) == (20, 4)
    aside = pq.read_table(tmp_path / "out" / "_quarantine").to_pylist()
    assert [(row["id"], row["row"]) for row in aside] == [(i, i) for i in (10, 11, 12, 13)]
    for row, reason in zip(aside, ["cannot be read", "null", "cannot be read", "colour"], strict=True):
        assert reason in row["reason"]
    pq.write_table(pa.table({"image": pa.array(pictures[:20], pa.binary())}), tmp_path / "good.parquet")
    Here(digits_bundle, tmp_path / "good.parquet", tmp_path / "good").run()
    ids, features, _ = embedding_of(tmp_path / "out")
    assert ids == [*range(10), *range(14, 24)]
    np.testing.assert_array_equal(features.view(np.uint32), embedding_of(tmp_path / "good")[1].view(np.uint32))


def test_an_image_that_vanished_is_set_aside(digits_bundle: Path, pictures: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, content in enumerate(pictures[:5]):
        (tmp_path / "in" / f"{i}.png").write_bytes(content)
    here = Here(digits_bundle, tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "3.png").unlink()
    assert here.run()["rows_quarantined"] == 1
    (row,) = pq.read_table(tmp_path / "out" / "_quarantine").to_pylist()
    assert (row["id"], row["file"]) == ("3.png", "3.png")
    assert "No such file" in row["reason"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 300.5, -1.0])
def test_numbers_that_are_no_rows_are_set_aside_and_change_no_other(
    bad: float, digits_bundle: Path, rows: NDArray[np.uint8], wanted: Any, tmp_path: Path
) -> None:
    spoilt = rows.astype(np.float32)
    spoilt[[7, 150], 0, 3, 3] = bad
    manifest = Here(digits_bundle, npy(tmp_path, spoilt), tmp_path / "out", part_rows=100).run()
    assert manifest["rows_quarantined"] == 2
    assert [one["quarantined"] for one in manifest["files"]] == [1, 1, 0]
    ids, features, _ = embedding_of(tmp_path / "out")
    assert ids == [i for i in range(N) if i not in (7, 150)]
    np.testing.assert_array_equal(features.view(np.uint32), wanted[ids].view(np.uint32))


def test_nulls_among_numbers_are_set_aside(
    digits_bundle: Path, rows: NDArray[np.uint8], wanted: Any, tmp_path: Path
) -> None:
    values: list[Any] = flat(rows[:9]).tolist()
    values[2] = None
    values[4][5] = None
    values[6] = values[6][:-1]
    pq.write_table(pa.table({"pixels": pa.array(values, pa.list_(pa.uint8()))}), tmp_path / "rows.parquet")
    Here(digits_bundle, tmp_path / "rows.parquet", tmp_path / "out").run()
    ids, features, _ = embedding_of(tmp_path / "out")
    assert ids == [0, 1, 3, 5, 7, 8]
    np.testing.assert_array_equal(features.view(np.uint32), wanted[ids].view(np.uint32))
    reasons = pq.read_table(tmp_path / "out" / "_quarantine").column("reason").to_pylist()
    assert reasons == ["no row: the cell is null", "a number is null", "63 numbers, wanted 64"]


def test_features_that_are_not_finite_are_set_aside(
    variant: Callable[..., Bundle], rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    bundle = variant(factor=float("inf")).save(tmp_path / "bundle")
    assert bundle.path is not None
    manifest = Here(bundle.path, npy(tmp_path, rows[:5]), tmp_path / "out").run()
    assert (manifest["rows_embedded"], manifest["rows_quarantined"]) == (0, 5)
    aside = pq.read_table(tmp_path / "out" / "_quarantine").column("reason").to_pylist()
    assert {Output(Place(str(tmp_path / "out")), {}).commonest_reason(0)} == set(aside)


def test_a_job_that_goes_on_does_only_what_is_missing_or_damaged(
    digits_bundle: Path, rows: NDArray[np.uint8], wanted: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = Here(digits_bundle, npy(tmp_path, rows), out, part_rows=50)
    first.run()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    (out / "part-00000001.parquet").unlink()
    damaged = out / "part-00000004.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    again = Here(digits_bundle, tmp_path / "rows.npy", out, part_rows=50)
    receipts = again.output.begin(6)
    assert sorted(receipt.index for receipt in receipts) == [0, 2, 3, 5]
    assert not (out / "_manifest.json").exists(), "it said that the output was whole"
    manifest = again.run()
    assert manifest == json.loads((out / "_manifest.json").read_text())
    changed = {path.name for path in out.glob("part-*") if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"part-00000001.parquet", "part-00000004.parquet"}
    np.testing.assert_array_equal(embedding_of(out)[1].view(np.uint32), wanted.view(np.uint32))


def test_a_part_that_changed_after_it_was_written_is_found_before_the_manifest(
    digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    here = Here(digits_bundle, npy(tmp_path, rows), tmp_path / "out", part_rows=100)
    receipts = here.output.begin(3)
    receipts += [here.output.write(number, one) for number, one in enumerate(here.encoder.encode(here.plan.parts))]
    (tmp_path / "out" / "part-00000001.parquet").unlink()
    with pytest.raises(JobError, match="part-00000001"):
        here.output.finish(receipts, n_parts=3, n_rows=N)
    assert not (tmp_path / "out" / "_manifest.json").exists()


def test_what_a_killed_writer_left_half_written_is_removed_at_the_end(
    digits_bundle: Path, rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    here = Here(digits_bundle, npy(tmp_path, rows), out)
    here.output.begin(1)
    litter = out / ".part-00000000.parquet.x.tmp"
    litter.write_bytes(b"half")
    os.utime(litter, (1, 1))
    here.run()
    assert not litter.exists()


def test_a_full_disk_is_told_in_a_line_and_leaves_no_half_part(
    digits_bundle: Path, rows: NDArray[np.uint8], wanted: Any, tmp_path: Path
) -> None:
    here = Here(digits_bundle, npy(tmp_path, rows), tmp_path / "out", part_rows=150)
    here.output.begin(2)
    encoded_parts = list(here.encoder.encode(here.plan.parts))
    with limited_files(len(encoded_parts[0].content) // 2), pytest.raises(InputError, match="could not write") as told:
        here.output.write(0, encoded_parts[0])
    assert "same command goes on" in str(told.value)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"_job.json"}
    here.run()
    np.testing.assert_array_equal(embedding_of(tmp_path / "out")[1].view(np.uint32), wanted.view(np.uint32))


def limited_files(n_bytes: int) -> Any:
    @contextlib.contextmanager
    def limit() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limit()


def test_places_behind_fsspec_are_read_and_written_whole(
    digits_bundle: Path, rows: NDArray[np.uint8], wanted: Any
) -> None:
    data, out = Place("memory://embedding/in"), "memory://embedding/out"
    file = io.BytesIO()
    np.save(file, rows)
    data.write("rows.npy", file.getvalue())
    Here(digits_bundle, data.address, out, part_rows=100).run()
    names = [one.name for one in Place(out).find()]
    assert names == ["_job.json", "_manifest.json", *(f"part-0000000{i}.parquet" for i in range(3))]
    parts = [pq.read_table(Place(out).child(name).open()) for name in names[2:]]
    column = pa.concat_tables(parts).column("embedding").combine_chunks()
    np.testing.assert_array_equal(column.flatten().to_numpy().view(np.uint32), wanted.reshape(-1).view(np.uint32))
    with pytest.raises(InputError, match="has not written"):
        Here(digits_bundle, data.address, "memory://embedding").run()


def test_an_address_with_keys_is_told_without_them() -> None:
    place = Place("s3://KEY:SECRET@bucket/folder?region=eu-west-1&endpoint_override=localhost:1")
    assert str(place) == "s3://bucket/folder"
    assert place.child("a/b").address.startswith("s3://KEY:SECRET@bucket/folder/a/b?region")


@pytest.mark.parametrize(("n_parts", "n_encoders"), [(1, 8), (62, 2), (5000, 7)])
def test_shares_are_all_parts_in_order_and_small_at_the_end(n_parts: int, n_encoders: int) -> None:
    parts = [Part(index, index, 1, ("a",), index) for index in range(n_parts)]
    dealt = shares(parts, n_encoders)
    assert [part for share in dealt for part in share] == parts
    sizes = [len(share) for share in dealt]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= 16
    # What the last encoder still has to do when the others are done is one part.
    assert sizes[-n_encoders:] == [1] * min(n_encoders, n_parts)
