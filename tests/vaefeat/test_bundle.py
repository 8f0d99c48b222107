"""The bundle on the disk: what is written is read back, and nothing else is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vaefeat import Bundle, load_bundle
from vaefeat.bundle import SCHEMA_VERSION
from vaefeat.errors import BundleError, InputError

FILES = [
    *("README.md", "decoder.onnx", "encoder.onnx", "reconstructions.png", "reference.safetensors"),
    "weights.safetensors",
]
CHANGED = "do not match the bundle's hashes"


@pytest.fixture
def folder(digits_bundle: Path, tmp_path: Path) -> Path:
    """Copy a real bundle, to spoil."""
    return shutil.copytree(digits_bundle, tmp_path / "copy", ignore=shutil.ignore_patterns("training"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], *, forge: bool = False) -> None:
    """Change the manifest on the disk; with `forge`, recompute the digest as somebody with the source could."""
    path = folder / "bundle.json"
    values = json.loads(path.read_text())
    change(values)
    if forge:
        rest = {key: value for key, value in values.items() if key != "digest"}
        canonical = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
        values["digest"] = "sha256:" + hashlib.sha256(canonical).hexdigest()
    path.write_text(json.dumps(values))


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Permissions do not stop root, who runs tests in containers."""
    was = os.geteuid()
    os.seteuid(was or 65534)
    try:
        yield
    finally:
        os.seteuid(was)


def test_saved_bundle_is_loaded_as_it_was(digits_bundle: Path, tmp_path: Path) -> None:
    first = load_bundle(digits_bundle)
    second = first.save(tmp_path / "deep" / "folder")
    assert second.path == tmp_path / "deep" / "folder"
    assert (second.digest, second.manifest, second.files) == (first.digest, first.manifest, first.files)
    assert sorted(path.name for path in second.path.iterdir()) == sorted([*FILES, "bundle.json"])
    contents = {name: second.read(name) for name in reversed(FILES)}
    assert all(content == (digits_bundle / name).read_bytes() for name, content in contents.items())
    memory = Bundle.of(first.manifest, contents)
    assert (memory.digest, memory.path) == (first.digest, None)


def test_digest_changes_with_every_part(digits_bundle: Path) -> None:
    stored = load_bundle(digits_bundle)
    contents = {name: stored.read(name) for name in FILES}
    other = [
        Bundle.of(replace(stored.manifest, objective="another"), contents),
        Bundle.of(stored.manifest, {**contents, "README.md": b""}),
        Bundle.of(stored.manifest, {**contents, "more.md": b""}),
    ]
    assert len({stored.digest, *(bundle.digest for bundle in other)}) == 4


def test_order_of_the_keys_in_the_manifest_does_not_matter(folder: Path) -> None:
    values = json.loads((folder / "bundle.json").read_text(), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    (folder / "bundle.json").write_text(json.dumps(values))
    assert load_bundle(folder).digest == values["digest"]


def test_bundle_holds_no_pickle(digits_bundle: Path) -> None:
    assert {Path(name).suffix for name in load_bundle(digits_bundle).files} == {".md", ".onnx", ".png", ".safetensors"}
    for name in FILES:
        # Read as a pickle, arbitrary bytes fail in one way or another; some ask for more memory than there is.
        failures = (pickle.UnpicklingError, EOFError, IndexError, ValueError, KeyError, AttributeError, MemoryError)
        with pytest.raises(failures):
            pickle.loads((digits_bundle / name).read_bytes())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, -1])
def test_one_flipped_bit_in_any_file_is_refused(folder: Path, name: str, place: int) -> None:
    content = bytearray((folder / name).read_bytes())
    content[place] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} .*{CHANGED}"):
        load_bundle(folder)


@pytest.mark.parametrize("name", FILES)
def test_cut_and_missing_files_are_refused(folder: Path, name: str) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(10)
    with pytest.raises(BundleError, match=rf"{name} .*{CHANGED}"):
        load_bundle(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=rf"got no file .*{name}"):
        load_bundle(folder)


@pytest.mark.parametrize("manifest_text", ["", "{", "[1]", "null", '"x"', "[" * 100_000, "1" * 9999, "\x00"])
def test_manifest_that_is_no_json_object_is_refused(folder: Path, manifest_text: str) -> None:
    (folder / "bundle.json").write_text(manifest_text)
    with pytest.raises(BundleError, match="export it again"):
        load_bundle(folder)


def test_manifest_of_unreasonable_size_is_refused_unread(folder: Path) -> None:
    with (folder / "bundle.json").open("r+b") as file:
        file.truncate(2**34)  # a sparse file: 16 GiB that take no space
    with pytest.raises(BundleError, match=CHANGED):
        load_bundle(folder)


def test_newer_schema_says_to_upgrade(folder: Path) -> None:
    edit(folder, lambda values: values.update(schema_version=SCHEMA_VERSION + 1, novelty=1), forge=True)
    with pytest.raises(BundleError, match="newer vaefeat: upgrade with pip install -U vaefeat"):
        load_bundle(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(name="other"),
        lambda values: values.update(digest="sha256:" + "0" * 64),
        lambda values: values.update(digest=None),
        lambda values: values["metrics"].update(elbo=0.0),
        lambda values: values["input"].update(low=-1.0),
        lambda values: values["files"]["encoder.onnx"].update(bytes=1),
        lambda values: values["files"].pop("README.md"),
    ],
)
def test_edited_manifest_is_refused(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=rf"bundle.json .*{CHANGED}"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(schema_version="1"), r"got schema '1' .* wanted 1"),
        (lambda values: values.pop("schema_version"), r"got schema None .* wanted 1"),
        (lambda values: values.update(novelty=1), r"unknown keys \['novelty'\]"),
        (lambda values: values.pop("parity"), r"without \['parity'\]"),
        (lambda values: values["files"].pop("encoder.onnx"), "lists no encoder.onnx"),
        (lambda values: values.update(files=["encoder.onnx"]), "lists no encoder.onnx"),
        (lambda values: values["files"]["encoder.onnx"].update(bytes=1), CHANGED),
        (lambda values: values["files"]["encoder.onnx"].update(bytes=-1), "bad size or hash"),
        (lambda values: values["files"]["encoder.onnx"].update(sha256=1), "bad size or hash"),
        (lambda values: values["files"]["encoder.onnx"].update(more=1), "not ours"),
        (lambda values: values.update(name="../x"), "bundle name"),
        (lambda values: values.update(latent_dim="8"), "latent_dim of the wrong form"),
        (lambda values: values.update(latent_dim=9), "for 9 latent variables"),
        (lambda values: values.update(active_units=[8]), "for 8 latent variables"),
        (lambda values: values.update(active_units=3), "active_units of the wrong form"),
        (lambda values: values.update(outputs=[["mean", 8]]), "outputs of the wrong form"),
        (lambda values: values.update(model=[]), "model of the wrong form"),
        (lambda values: values["input"].update(dtype="int64"), "got an input described by"),
        (lambda values: values["input"].pop("low"), "value of the wrong form"),
        (lambda values: values.update(input={}), "value of the wrong form"),
    ],
)
def test_manifest_with_a_right_digest_and_wrong_contents_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit(folder, change, forge=True)
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "bundle.json", "a\\b", "a\x00", "x" * 65]
)
def test_file_entry_that_leaves_the_folder_is_refused_unopened(folder: Path, name: str) -> None:
    secret = folder.parent / "secret"
    os.mkfifo(secret)  # would block whoever opened it
    edit(folder, lambda values: values["files"].update({name: {"sha256": "0" * 64, "bytes": 0}}), forge=True)
    with pytest.raises(BundleError, match="with the file entry"):
        load_bundle(folder)


def test_other_files_in_the_folder_are_ignored_and_left_alone(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "training").mkdir()
    bundle = load_bundle(folder)
    with pytest.raises(BundleError, match=r"got no notes.txt"):
        bundle.read("notes.txt")
    assert bundle.save(folder).digest == bundle.digest
    assert (folder / "notes.txt").read_text() == "mine"


def test_file_swapped_after_loading_is_refused_when_it_is_read(folder: Path) -> None:
    bundle = load_bundle(folder)
    original = (folder / "encoder.onnx").read_bytes()
    for swapped in (original[:-1] + bytes([original[-1] ^ 1]), original + b"more", b""):
        (folder / "encoder.onnx").write_bytes(swapped)
        with pytest.raises(BundleError, match=CHANGED):
            bundle.read("encoder.onnx")
        with pytest.raises(BundleError, match=CHANGED):
            bundle.save(folder.parent / "other")
    assert not (folder.parent / "other").exists()
    (folder / "encoder.onnx").unlink()
    with pytest.raises(BundleError, match="could not read"):
        bundle.read("encoder.onnx")


def test_full_disk_leaves_the_previous_bundle_whole(digits_bundle: Path, folder: Path) -> None:
    # The graphs fit under the limit on the size of a file, the weights do not.
    program = textwrap.dedent("""
        import resource, signal, sys
        from dataclasses import replace
        from vaefeat import Bundle, load_bundle
        from vaefeat.errors import BundleError

        stored = load_bundle(sys.argv[1])
        contents = {name: stored.read(name) for name in stored.files} | {"weights.safetensors": bytes(2_000_000)}
        bundle = Bundle.of(replace(stored.manifest, objective="new"), contents)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        for path in sys.argv[2:]:
            try:
                bundle.save(path)
            except BundleError as error:
                print(error)
    """)
    fresh = folder.parent / "fresh"
    command = [sys.executable, "-c", program, str(digits_bundle), str(folder), str(fresh)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line, target in zip(done.stdout.splitlines(), (folder, fresh), strict=True):
        assert f"could not write bundle 'digits' to {target}: File too large; free some space" in line
    assert load_bundle(folder).digest == load_bundle(digits_bundle).digest
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "bundle.json"])
    assert list(fresh.iterdir()) == []


def test_place_that_cannot_be_written_is_a_bundle_error(digits_bundle: Path, tmp_path: Path) -> None:
    bundle = load_bundle(digits_bundle)
    contents = {name: bundle.read(name) for name in bundle.files}
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BundleError, match="could not write bundle"):
        bundle.save(tmp_path / "file")
    tmp_path.chmod(0)
    with ordinary_user(), pytest.raises(BundleError, match=r"Permission denied.*choose another folder"):
        Bundle.of(bundle.manifest, contents).save(tmp_path / "out")
    tmp_path.chmod(0o755)


@pytest.mark.parametrize("name", [".", "bundle.json", "encoder.onnx"])
def test_bundle_that_may_not_be_read_is_a_bundle_error(folder: Path, name: str) -> None:
    for parent in list(folder.parents)[:3]:
        parent.chmod(0o755)
    (folder / name).chmod(0)
    with ordinary_user(), pytest.raises(BundleError, match=r"could not read .*: Permission denied"):
        load_bundle(folder)
    (folder / name).chmod(0o755)


def test_path_without_a_bundle_says_how_to_make_one(folder: Path) -> None:
    for path in (folder.parent, folder / "missing", folder / "bundle.json"):
        with pytest.raises(BundleError, match=r"has no bundle.json.*vaefeat.pretrain"):
            load_bundle(path)


@pytest.mark.parametrize("name", ["", ".", "..", "-x", ".x", "a/b", "a b", "ä", "x" * 65, "a\n", "a\x00", None, 3])
def test_name_that_is_no_file_name_is_refused(digits_bundle: Path, name: Any) -> None:
    manifest = load_bundle(digits_bundle).manifest
    with pytest.raises(InputError, match="wanted 1 to 64 letters"):
        replace(manifest, name=name)


def test_name_of_letters_digits_and_dots_is_taken(digits_bundle: Path) -> None:
    for name in ("a", "0", "mnist-v1.2_x", "X" * 64):
        assert replace(load_bundle(digits_bundle).manifest, name=name).name == name


def test_pickled_bundle_reads_the_same_files(digits_bundle: Path) -> None:
    stored = load_bundle(digits_bundle)
    memory = Bundle.of(stored.manifest, {name: stored.read(name) for name in FILES})
    for bundle in (stored, memory):
        again = pickle.loads(pickle.dumps(bundle))
        assert again == bundle
        assert again.read("encoder.onnx") == stored.read("encoder.onnx")
