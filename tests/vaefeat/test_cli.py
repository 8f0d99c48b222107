"""The command line as a shell runs it: one line for an error, never a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from vaefeat import ModelConfig, OnnxEncoder, TrainConfig, load_bundle, pretrain
from vaefeat.cli import app
from vaefeat.errors import VaefeatError
from vaefeat.generation import sample
from vaefeat.inference import anomaly_scores, impute
from vaefeat.model.diagnostics import diagnose
from vaefeat.weights import restore_vae


def vaefeat(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from vaefeat.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def in_process(*arguments: str | Path) -> str:
    """Run a verb without a new process, which takes seconds to load torch; errors are raised."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.replace("\n", "")


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
    "arguments",
    [
        ["samples", "-n", "9", "--kind", "draw"],
        ["around", "--data", "{rows}", "--row", "2", "-n", "4", "--scale", "2"],
        ["interpolation", "--data", "{rows}", "--to-row", "5", "--steps", "4", "--path", "spherical"],
        ["manifold", "--side", "5", "--latents", "1,3"],
        ["sweeps", "--data", "{rows}", "--latents", "0,7"],
    ],
)
def test_generate_draws_a_picture_and_writes_rows(
    arguments: list[str], digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    np.save(tmp_path / "rows.npy", digits_rows[:10])
    asked = [argument.format(rows=tmp_path / "rows.npy") for argument in arguments]
    for name in ("made.png", "made.npy"):
        said = in_process("generate", digits_bundle, "--out", tmp_path / name, "--what", *asked)
        assert said == f"{tmp_path / name}: {arguments[0]} of digits"
    with Image.open(tmp_path / "made.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    shapes = {"samples": (9,), "around": (4,), "interpolation": (4,), "manifold": (5, 5), "sweeps": (22,)}
    assert np.load(tmp_path / "made.npy").shape == (*shapes[arguments[0]], 1, 8, 8)


def test_generate_gives_what_the_library_gives(digits_bundle: Path, tmp_path: Path) -> None:
    in_process("generate", digits_bundle, "--out", tmp_path / "made.npy", "-n", "3", "--seed", "5")
    np.testing.assert_array_equal(np.load(tmp_path / "made.npy"), sample(digits_bundle, 3, seed=5))


def test_score_writes_the_scores_as_array_or_text(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    rows = np.concatenate([digits_rows[:20], np.full((1, 1, 8, 8), 16, dtype=np.uint8)])
    np.save(tmp_path / "rows.npy", rows)
    wanted = anomaly_scores(digits_bundle, rows)
    for name in ("s.npy", "s.csv"):
        said = in_process("score", digits_bundle, tmp_path / "rows.npy", "--out", tmp_path / name)
        assert f"most unusual: 20 ({wanted[20]:.1f})" in said
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), wanted)
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert lines[0] == "row,minus_log_likelihood_nats"
    assert [float(line.split(",")[1]) for line in lines[1:]] == wanted.tolist()


def test_impute_fills_what_a_mask_or_nan_leaves_out(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[:, 4:] = True
    holed = np.where(mask, np.nan, digits_rows[:6, 0].astype(float))
    np.save(tmp_path / "rows.npy", digits_rows[:6])
    np.save(tmp_path / "mask.npy", mask)
    np.save(tmp_path / "holed.npy", holed)  # (n, H, W), as other verbs take it, too
    chain = ["--iterations", "12"]
    for arguments in (["rows.npy", "--mask", tmp_path / "mask.npy"], ["holed.npy"], ["holed.npy", "--corrected"]):
        name, *options = arguments
        said = in_process("impute", digits_bundle, tmp_path / str(name), "--out", tmp_path / "o.npy", *options, *chain)
        assert "192 missing values in 6 rows filled" in said
        filled = np.load(tmp_path / "o.npy")
        np.testing.assert_array_equal(filled[:, 0, :, :4], digits_rows[:6, 0, :, :4])
        assert np.isfinite(filled).all()
        if len(arguments) > 1 and arguments[1] == "--mask":
            wanted = impute(digits_bundle, digits_rows[:6], missing=mask, n_iterations=12).rows
            np.testing.assert_array_equal(filled, wanted)


def test_diagnose_prints_what_the_library_finds(
    digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    np.save(tmp_path / "rows.npy", digits_rows[:300])
    wanted = diagnose(restore_vae(load_bundle(digits_bundle)), digits_rows[:200], seed=3)
    asked: list[str | Path] = ["diagnose", digits_bundle, tmp_path / "rows.npy", "--max-rows", "200", "--seed", "3"]
    assert json.loads(in_process(*asked, "--json")) == wanted.to_dict()
    said = in_process(*asked)
    assert f"{wanted.elbo:.2f} nats per row" in said
    assert f"{len(wanted.active)} of 8 latents vary" in said
    assert said.endswith(wanted.advice)


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
        (["generate", "nowhere", "--out", "o.png"], "wanted the folder of a bundle"),
        (["generate", "{bundle}", "--out", "nowhere/o.png"], "could not write"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    arguments: list[str],
    message: str,
    digits_bundle: Path,
    digits_rows: NDArray[np.uint8],
    tmp_path: Path,
    run_here: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    np.save(tmp_path / "rows.npy", digits_rows[:10])
    np.save(tmp_path / "wide.npy", np.zeros((3, 65), dtype=np.uint8))
    places = {"bundle": digits_bundle, "rows": tmp_path / "rows.npy", "wide": tmp_path / "wide.npy"}
    if "cuda" in arguments and OnnxEncoder(digits_bundle).device == "cuda":
        pytest.skip("there is a CUDA device")
    done = run_here(app, *(argument.format(**places) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_bad_input_of_a_process_is_one_line_and_status_two() -> None:
    done = vaefeat("inspect", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{bundle}", "--out", "{out}/o.jpg"], "ends in .png or .npy"),
        (["generate", "{bundle}", "--out", "{out}/o.png", "--what", "around"], "without --data"),
        (["generate", "{bundle}", "--out", "{out}/o.png", "--side", "3"], "it is for manifold"),
        (["generate", "{bundle}", "--out", "{out}/o.png", "--kind", "mode"], "known: draw, mean"),
        (["generate", "{bundle}", "--out", "{out}/o.png", "-n", "0"], "n=0"),
        (["generate", "{bundle}", "--out", "{out}/o.png", "--what", "manifold", "--latents", "0,a"], "--latents 0,a"),
        (
            ["generate", "{bundle}", "--out", "{out}/o.png", "--what", "sweeps", "--data", "{rows}", "--row", "10"],
            "0 to 9",
        ),
        (["score", "{bundle}", "{wide}", "--out", "{out}/o.npy"], "wanted uint8 rows of shape (n, 1, 8, 8)"),
        (["score", "{bundle}", "{rows}", "--out", "{out}/o.txt"], "ends in .npy or .csv"),
        (["impute", "{bundle}", "{rows}", "--out", "{out}/o.npy"], "without missing="),
        (["impute", "{bundle}", "{rows}", "--out", "{out}/o.npy", "--mask", "{wide}"], "wanted bool of shape"),
        (["impute", "{bundle}", "{rows}", "--out", "{out}/o.npy", "--mask", "nowhere.npy"], "nowhere.npy"),
    ],
)
def test_bad_requests_of_a_model_are_refused_and_write_nothing(
    arguments: list[str], message: str, digits_bundle: Path, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    np.save(tmp_path / "rows.npy", digits_rows[:10])
    np.save(tmp_path / "wide.npy", np.zeros((3, 65), dtype=np.uint8))
    places = {"bundle": digits_bundle, "rows": tmp_path / "rows.npy", "wide": tmp_path / "wide.npy", "out": tmp_path}
    with pytest.raises(VaefeatError, match=re.escape(message)):
        in_process(*(argument.format(**places) for argument in arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.npy", "wide.npy"]


def test_generate_of_a_table_writes_rows_and_draws_no_picture(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    pretrain(
        rows,
        model=ModelConfig(latent_dim=2, hidden_dims=(8,)),
        train=TrainConfig(max_epochs=1),
        out=tmp_path / "table",
        progress=False,
    )
    in_process("generate", tmp_path / "table", "--out", tmp_path / "made.npy", "-n", "3")
    assert np.load(tmp_path / "made.npy").shape == (3, 5)
    with pytest.raises(VaefeatError, match="give a name that ends in"):
        in_process("generate", tmp_path / "table", "--out", tmp_path / "made.png")


def test_inspect_does_not_load_torch(digits_bundle: Path) -> None:
    program = (
        f"import sys; sys.argv = ['vaefeat', 'inspect', {str(digits_bundle)!r}]\n"
        "from vaefeat.cli import app\napp(standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
