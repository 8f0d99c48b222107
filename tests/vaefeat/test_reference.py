"""What a service proves itself by: made, bounded, read back, added to a bundle that has none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray
from typer.testing import CliRunner

from vaefeat import OnnxEncoder, reference
from vaefeat.bundle import Bundle, load_bundle
from vaefeat.cli import app
from vaefeat.errors import BundleError, InputError
from vaefeat.reference import REFERENCE_FILE, Reference, load_reference, with_reference


def of_rows(bundle: Bundle, k: int) -> Bundle:
    """Give a bundle a reference of k equal rows."""
    found = load_reference(bundle)
    assert isinstance(found, Reference)
    rows, features = (np.repeat(array[:1], k, axis=0) for array in (found.rows, found.features))
    contents = {file: bundle.read(file) for file in bundle.files}
    contents[REFERENCE_FILE] = replace(found, rows=rows, features=features).to_bytes()
    return Bundle.of(bundle.manifest, contents)


def test_reference_of_many_rows_is_read_up_to_a_bound(digits_bundle: Path) -> None:
    bundle = load_bundle(digits_bundle)
    found = load_reference(of_rows(bundle, 256))
    assert found is not None
    assert len(found.rows) == 256
    with pytest.raises(BundleError, match="of 257 rows"):
        load_reference(of_rows(bundle, 257))


def test_reference_of_many_bytes_is_refused_unread(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = of_rows(load_bundle(digits_bundle), 100)
    monkeypatch.setattr(reference, "_MOST_FILE_BYTES", 1000)
    monkeypatch.setattr(Bundle, "read", lambda *_: pytest.fail("it was read"))
    with pytest.raises(BundleError, match=r"reference.safetensors of \d+ bytes.*wanted at most 1000"):
        load_reference(bundle)


@pytest.mark.parametrize(("most_bytes", "k"), [(10**9, 8), (3 * 64, 3), (1, 1)])
def test_reference_of_large_rows_has_fewer(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], most_bytes: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_MOST_ROW_BYTES", most_bytes)
    made = Reference.of(load_bundle(digits_bundle), digits_rows[:100], seed=0)
    assert (len(made.rows), len(made.features)) == (k, k)


def test_difference_of_the_first_rows_is_from_their_own_features(digits_bundle: Path) -> None:
    found = load_reference(load_bundle(digits_bundle))
    assert isinstance(found, Reference)
    assert found.difference(found.features[:3]) == 0
    assert found.difference(found.features[1:4]) > 0.01


def test_with_reference_gives_a_bundle_what_another_service_computes(
    digits_bundle: Path, variant: Callable[..., Bundle], digits_rows: NDArray[np.uint8]
) -> None:
    bare = variant(factor=1.0, reference=False)
    made = with_reference(bare, digits_rows[:200])
    assert made.digest not in (bare.digest, load_bundle(digits_bundle).digest)
    found = load_reference(made)
    assert isinstance(found, Reference)
    np.testing.assert_array_equal(found.features, OnnxEncoder(digits_bundle).embed(digits_rows[:8]))
    with pytest.raises(InputError, match="got 63 rows"):
        with_reference(bare, digits_rows[:63])


def test_reference_on_the_command_line_adds_one(
    variant: Callable[..., Bundle], digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    variant(reference=False).save(tmp_path / "bare")
    np.save(tmp_path / "rows.npy", digits_rows[:100])
    arguments = ["reference", str(tmp_path / "bare"), str(tmp_path / "rows.npy"), str(tmp_path / "proved")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "a reference of 8 rows" in done.output
    assert set(safetensors.numpy.load((tmp_path / "proved" / REFERENCE_FILE).read_bytes())) == {
        *("rows", "features", "mean", "variance")
    }
    assert load_reference(load_bundle(tmp_path / "proved")) is not None
