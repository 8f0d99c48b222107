"""Features do not depend on anything but the row: batches, order, threads, processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vaefeat import Bundle, ModelConfig, OnnxEncoder, TrainConfig, load_bundle, pretrain
from vaefeat.errors import BundleError, InputError

N_ROWS = 300
KINDS = ["conv", "mlp", "vector"]


@pytest.fixture(scope="module")
def bundles(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> dict[str, Bundle]:
    """Give one bundle of each network and kind of rows; the widths are no multiples of what processors like."""
    train = TrainConfig(max_epochs=1)
    mlp = ModelConfig(latent_dim=5, network="mlp", hidden_dims=(70, 33))
    return {
        "conv": load_bundle(digits_bundle),
        "mlp": pretrain(digits_rows[:400], model=mlp, train=train, progress=False),
        "vector": pretrain(table_rows(), model=mlp, train=train, progress=False),
    }


def table_rows() -> NDArray[np.float32]:
    random = np.random.default_rng(0)
    return (random.normal(size=(N_ROWS, 13)) * 10.0 ** random.integers(-3, 4, 13)).astype(np.float32)


def rows_of(bundle: Bundle) -> NDArray[Any]:
    """Make rows that the bundle was not trained on, wild ones among them."""
    spec = bundle.manifest.input
    if spec.kind == "vector":
        return table_rows()[::-1] * np.float32(1.5)
    return np.random.default_rng(1).integers(0, 256, (N_ROWS, *spec.shape), dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", ["mean", "logvar", "hidden"])
def test_output_is_float32_of_the_width_in_the_manifest(bundles: dict[str, Bundle], kind: str, output: str) -> None:
    encoder = OnnxEncoder(bundles[kind], device="cpu")
    features = encoder.embed(rows_of(bundles[kind]), output=output)
    assert features.dtype == np.float32
    assert features.shape == (N_ROWS, encoder.outputs[output])
    assert np.isfinite(features).all()
    assert features.std(axis=0).min() > 0


def test_encoder_describes_its_bundle(bundles: dict[str, Bundle]) -> None:
    for bundle in bundles.values():
        encoder = OnnxEncoder(bundle, device="cpu")
        manifest = bundle.manifest
        assert (encoder.name, encoder.digest) == (manifest.name, bundle.digest)
        assert (encoder.input, encoder.outputs) == (manifest.input, manifest.outputs)
        assert (encoder.latent_dim, encoder.active_units) == (manifest.latent_dim, len(manifest.active_units))
        assert manifest.name in repr(encoder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", ["mean", "logvar", "hidden"])
def test_embed_gives_the_same_bits_for_any_batch_order_and_threads(
    bundles: dict[str, Bundle], kind: str, output: str
) -> None:
    bundle, rows = bundles[kind], rows_of(bundles[kind])
    whole = OnnxEncoder(bundle, device="cpu", threads=1).embed(rows, output=output)
    order = np.random.default_rng(2).permutation(N_ROWS)
    for threads in (1, 2):
        for batch_size in (1, 7, 64, 256, 1000):
            encoder = OnnxEncoder(bundle, device="cpu", threads=threads, batch_size=batch_size)
            np.testing.assert_array_equal(encoder.embed(rows, output=output), whole)
        np.testing.assert_array_equal(encoder.embed(rows[order], output=output), whole[order])
        one_by_one = [encoder.embed(rows[i : i + 1], output=output)[0] for i in range(50)]
        np.testing.assert_array_equal(one_by_one, whole[:50])


@pytest.mark.parametrize("kind", KINDS)
def test_embed_gives_the_same_bits_for_any_chunking(bundles: dict[str, Bundle], kind: str) -> None:
    rows = rows_of(bundles[kind])
    encoder = OnnxEncoder(bundles[kind], device="cpu")
    whole = encoder.embed(rows)

    @settings(max_examples=15, deadline=None)
    @given(cuts=st.sets(st.integers(1, N_ROWS - 1), max_size=12), threads=st.sampled_from([1, 2]))
    def check(cuts: set[int], threads: int) -> None:
        chunked = OnnxEncoder(bundles[kind], device="cpu", threads=threads)
        parts = [chunked.embed(part) for part in np.split(rows, sorted(cuts))]
        np.testing.assert_array_equal(np.concatenate(parts), whole)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_do_not_change_a_row(bundles: dict[str, Bundle], kind: str) -> None:
    rows = rows_of(bundles[kind])
    encoder = OnnxEncoder(bundles[kind], device="cpu")
    others = rows.copy()
    others[1:] = rows.max()
    np.testing.assert_array_equal(encoder.embed(rows)[0], encoder.embed(others)[0])


@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_flat_shaped_and_float_images_give_the_same_features(bundles: dict[str, Bundle], kind: str) -> None:
    rows = rows_of(bundles[kind])
    encoder = OnnxEncoder(bundles[kind], device="cpu")
    whole = encoder.embed(rows)
    for other in (rows.reshape(N_ROWS, -1), rows.astype(np.float64), rows.reshape(N_ROWS, -1).astype(np.int64)):
        np.testing.assert_array_equal(encoder.embed(other), whole)


def test_one_encoder_in_several_threads_gives_the_same_features(bundles: dict[str, Bundle]) -> None:
    rows = rows_of(bundles["conv"])
    encoder = OnnxEncoder(bundles["conv"], device="cpu", batch_size=32)
    whole = encoder.embed(rows)
    starts = np.random.default_rng(3).integers(0, N_ROWS - 1, 60)
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda start: encoder.embed(rows[start:]), starts))
    for start, result in zip(starts, results, strict=True):
        np.testing.assert_array_equal(result, whole[start:])


@pytest.mark.parametrize("kind", KINDS)
def test_pickled_encoder_gives_the_same_features(bundles: dict[str, Bundle], kind: str) -> None:
    rows = rows_of(bundles[kind])
    encoder = OnnxEncoder(bundles[kind], device="cpu", threads=1, batch_size=19)
    again = pickle.loads(pickle.dumps(encoder))
    assert (again.digest, again.batch_size, again.device) == (encoder.digest, 19, "cpu")
    assert again._graph.session.get_session_options().intra_op_num_threads == 1
    np.testing.assert_array_equal(again.embed(rows), encoder.embed(rows))


def test_encoder_unpickled_where_the_bundle_was_replaced_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    encoder = OnnxEncoder(bundles["conv"].save(tmp_path), device="cpu")
    pickled = pickle.dumps(encoder)
    bundles["mlp"].save(tmp_path)
    with pytest.raises(BundleError, match="do not match the bundle's hashes"):
        pickle.loads(pickled)


def test_encoder_in_a_fresh_process_gives_the_same_features_without_torch(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    rows = rows_of(bundles["conv"])
    bundles["conv"].save(tmp_path / "bundle")
    np.save(tmp_path / "rows.npy", rows)
    program = (
        "import sys, numpy as np; from vaefeat import OnnxEncoder;"
        "np.save('features.npy', OnnxEncoder('bundle').embed(np.load('rows.npy', mmap_mode='r')));"
        "print({'torch', 'sklearn', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "set()"
    expected = OnnxEncoder(bundles["conv"], device="cpu").embed(rows)
    np.testing.assert_array_equal(np.load(tmp_path / "features.npy"), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_not_finite_rows_are_refused(bundles: dict[str, Bundle], kind: str, bad: float) -> None:
    rows = rows_of(bundles[kind])[:4].astype(np.float32)
    rows[2].flat[0] = bad
    with pytest.raises(InputError, match="first in row 2"):
        OnnxEncoder(bundles[kind], device="cpu").embed(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_another_shape_and_no_rows_are_refused(bundles: dict[str, Bundle], kind: str) -> None:
    rows = rows_of(bundles[kind])
    encoder = OnnxEncoder(bundles[kind], device="cpu")
    for bad in (rows[..., :-1], rows[0], rows[None], rows[:0]):
        with pytest.raises(InputError, match="wanted"):
            encoder.embed(bad)


def test_unknown_output_and_batch_size_below_one_are_refused(bundles: dict[str, Bundle]) -> None:
    encoder = OnnxEncoder(bundles["mlp"], device="cpu")
    with pytest.raises(InputError, match=r"got output='latent', wanted one of \['hidden', 'logvar', 'mean'\]"):
        encoder.embed(rows_of(bundles["mlp"]), output="latent")
    with pytest.raises(InputError, match="got batch_size=0, wanted at least 1"):
        OnnxEncoder(bundles["mlp"], batch_size=0)


def test_encoder_of_another_bundle_under_this_manifest_is_refused(bundles: dict[str, Bundle]) -> None:
    for mine, others in (("conv", "vector"), ("vector", "conv"), ("mlp", "conv")):
        forged = Bundle.of(bundles[mine].manifest, {"encoder.onnx": bundles[others].read("encoder.onnx")})
        with pytest.raises(BundleError, match=r"encoder.onnx of bundle .* with the (in|out)puts"):
            OnnxEncoder(forged, device="cpu")
