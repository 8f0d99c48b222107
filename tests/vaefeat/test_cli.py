"""The command line as a shell runs it: one line for an error, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vaefeat import OnnxEncoder, load_bundle


def vaefeat(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from vaefeat.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_inspect_prints_the_digest_whole(digits_bundle: Path) -> None:
    done = vaefeat("inspect", digits_bundle)
    assert done.returncode == 0
    assert load_bundle(digits_bundle).digest in done.stdout


def test_inspect_as_json_is_the_manifest(digits_bundle: Path) -> None:
    values = json.loads(vaefeat("inspect", digits_bundle, "--json").stdout)
    assert values["latent_dim"] == 8
    assert values["digest"] == load_bundle(digits_bundle).digest


def test_embed_writes_what_the_encoder_gives(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    np.save(tmp_path / "rows.npy", digits_rows[:100])
    done = vaefeat("embed", digits_bundle, tmp_path / "rows.npy", tmp_path / "z.npy", "--output", "hidden")
    assert done.returncode == 0, done.stderr
    wanted = OnnxEncoder(digits_bundle).embed(digits_rows[:100], output="hidden")
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), wanted)


def test_pretrain_makes_a_bundle(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", digits_rows[:200])
    done = vaefeat(
        "pretrain", tmp_path / "rows.npy", "--out", tmp_path / "out", "--set", "train.max_epochs=1", "--set",
        "model.latent_dim=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    bundle = load_bundle(tmp_path / "out")
    assert (bundle.manifest.latent_dim, bundle.manifest.metrics["epochs"]) == (3, 1)
    assert bundle.digest in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "wanted the folder of a bundle"),
        (["embed", "nowhere", "x.npy", "z.npy"], "wanted the folder of a bundle"),
        (["embed", "{bundle}", "nowhere.npy", "z.npy"], "nowhere.npy"),
        (["embed", "{bundle}", "{wide}", "z.npy"], "wanted uint8 rows of shape (n, 1, 8, 8)"),
        (["embed", "{bundle}", "{rows}", "z.csv"], "ends in .npy"),
        (["embed", "{bundle}", "{rows}", "nowhere/z.npy"], "could not write"),
        (["embed", "{bundle}", "{rows}", "z.npy", "--output", "men"], "wanted one of"),
        (["embed", "{bundle}", "{rows}", "z.npy", "--device", "cuda"], "device='cuda'"),
        (["embed", "http://127.0.0.1:9", "{rows}", "z.npy"], "127.0.0.1:9"),
        (["pretrain", "{rows}", "--out", "o", "--set", "train.max_epoch=1"], "did you mean 'max_epochs'"),
        (["pretrain", "{rows}", "--out", "o", "--set", "model.latent_dim=0"], "latent_dim=0"),
        (["pretrain", "{rows}", "--out", "o", "--set", "latent_dim"], "wanted key=value"),
        (["pretrain", "{rows}", "--out", "o", "--set", "data.path=1"], "known: model, train"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    arguments: list[str], message: str, digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    np.save(tmp_path / "rows.npy", digits_rows[:10])
    np.save(tmp_path / "wide.npy", np.zeros((3, 65), dtype=np.uint8))
    places = {"bundle": digits_bundle, "rows": tmp_path / "rows.npy", "wide": tmp_path / "wide.npy"}
    if "cuda" in arguments and OnnxEncoder(digits_bundle).device == "cuda":
        pytest.skip("there is a CUDA device")
    done = vaefeat(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_inspect_does_not_load_torch(digits_bundle: Path) -> None:
    program = (
        f"import sys; sys.argv = ['vaefeat', 'inspect', {str(digits_bundle)!r}]\n"
        "from vaefeat.cli import app\napp(standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
