"""The benchmark of all methods, and the page that quotes it: nothing in either may be missing, stale or untrue."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.methods import METHODS, USES, app, quoting
from benchmarks.small_images import TABLE, shrink, tabulated
from vaefeat import ModelConfig, TrainConfig
from vaefeat.combinations import refuse_pair
from vaefeat.config import _TRAIN_CHOICES
from vaefeat.errors import ConfigError
from vaefeat.model.corruption import CORRUPTIONS
from vaefeat.model.likelihoods import LIKELIHOODS
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.posteriors import POSTERIORS
from vaefeat.model.priors import PRIORS

CHECKOUT = Path(__file__).parents[2]
PAGE = (CHECKOUT / "docs" / "methods.md").read_text()
RESULTS = CHECKOUT / "benchmarks" / "results" / "methods.json"
#: Every name that a setting may have: each is measured, and each is on the page.
NAMES: dict[str, Iterable[str]] = {
    "posterior": POSTERIORS,
    "prior": PRIORS,
    "likelihood": LIKELIHOODS,
    "objective": OBJECTIVES,
    "corruption": CORRUPTIONS,
    "gaussian_std": ("learned", "optimal"),
    "optimizer": _TRAIN_CHOICES["optimizer"],
    "kl_estimator": ("analytic", "sampled"),
    "gradient": ("reparameterized", "doubly_reparameterized"),
    "lr_schedule": _TRAIN_CHOICES["lr_schedule"],
}
EVERY_NAME = [(setting, name) for setting, names in NAMES.items() for name in names]


class Line(NamedTuple):
    """A method's row in one of the page's tables."""

    method: str
    reference: str
    name: str
    test: str
    measured: str


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables(header: str) -> list[list[str]]:
    """Give the rows of all tables whose header begins with these words."""
    found: list[list[str]] = []
    inside = False
    for line in PAGE.splitlines():
        if line.startswith(f"| {header}"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            found.append(cells(line))
    return found


LINES = [Line(*row) for row in tables("method | equation and reference")]
REFUSED = tables("refused")


def settings_in(text: str) -> list[tuple[str, Any]]:
    """Read `name=value` in backticks, values as Python writes them."""
    return [(name, ast.literal_eval(value)) for name, value in re.findall(r"`(\w+)=([^`]+)`", text)]


def construct(settings: dict[str, Any]) -> tuple[ModelConfig, TrainConfig]:
    of_model = {field.name for field in fields(ModelConfig)}
    model = ModelConfig(**{key: value for key, value in settings.items() if key in of_model})
    train = TrainConfig(**{key: value for key, value in settings.items() if key not in of_model})
    refuse_pair(model, train)
    return model, train


def test_shrunken_images_are_the_means_of_blocks() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (3, 1, 28, 28), dtype=np.uint8)
    small = shrink(rows)
    assert small.shape == (3, 1, 7, 7)
    assert small[2, 0, 5, 6] == round(rows[2, 0, 20:24, 24:28].mean())


def test_tabulated_images_are_quantities_yes_or_no_and_shades_with_gaps() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 1, 28, 28), dtype=np.uint8)
    rows, pixels = tabulated(images), shrink(images).reshape(50, -1)
    assert 0.08 < np.isnan(rows).mean() < 0.12
    np.testing.assert_array_equal(TABLE.checked(rows), rows)
    wanted = np.where(np.arange(49) % 3 == 1, pixels > 127, np.where(np.arange(49) % 3 == 2, pixels // 64, pixels))
    np.testing.assert_array_equal(rows[~np.isnan(rows)], wanted[~np.isnan(rows)])


@pytest.mark.parametrize(("setting", "name"), EVERY_NAME)
def test_every_name_is_measured(setting: str, name: str) -> None:
    configs = [(method.model_config(), method.train_config()) for method in METHODS.values()]
    resolved = {"analytic": "auto", "doubly_reparameterized": "auto"}.get(name, name)
    assert any({**m.to_dict(), **t.to_dict()}[setting] in {name, resolved} for m, t in configs)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_combination_that_works(name: str) -> None:
    refuse_pair(METHODS[name].model_config(), METHODS[name].train_config())


def test_benchmark_prints_a_table_and_one_json_line_last(data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    arguments = ["--data", str(data_dir / "MNIST"), "--rows", "1000", "--epochs", "1", "--results", str(path)]
    done = CliRunner().invoke(app, [*arguments, "--only", "autoencoder", "--only", "denoising_vae_gaussian"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads(path.read_text())
    assert set(report["methods"]) == {"autoencoder", "denoising_vae_gaussian"}
    point, vae = report["methods"]["autoencoder"], report["methods"]["denoising_vae_gaussian"]
    assert point["elbo"] is None
    assert vae["elbo"] == pytest.approx(vae["log_likelihood"] - vae["kl"])
    assert vae["elbo"] < vae["bound"] + 20, "the bound encodes clean rows and weighs 64 samples: it is higher"
    assert 10 < vae["probe_error"] < 90
    assert set(report["uses"]) == {"denoise"}


def test_benchmark_refuses_a_method_that_is_not_there() -> None:
    done = CliRunner().invoke(app, ["--data", "nowhere", "--only", "vea"])
    assert isinstance(done.exception, ConfigError)
    assert "did you mean 'vae'" in str(done.exception)


def test_quotations_are_replaced_up_to_their_end_and_others_stay() -> None:
    page = "| `vae`: old, 1 %; `vae_b`: kept | `sample`: old |\ncommit `0`, `vae` elsewhere"
    got = quoting(page, {"vae": "new, 2 %", "sample": "3 ± 1"}, "abc+changes")
    assert got == "| `vae`: new, 2 %; `vae_b`: kept | `sample`: 3 ± 1 |\ncommit `abc+changes`, `vae` elsewhere"
    assert quoting(got, {"vae": "new, 2 %"}, "abc+changes") == got


def test_page_has_tables() -> None:
    assert len(LINES) > 60
    assert len(REFUSED) > 10
    assert all(all(line) for line in LINES), "a cell is empty"


@pytest.mark.parametrize(("setting", "name"), EVERY_NAME)
def test_every_name_is_on_the_page(setting: str, name: str) -> None:
    assert any((setting, name) in settings_in(line.name) for line in LINES)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.method)
def test_names_on_the_page_exist(line: Line) -> None:
    settings = settings_in(line.name)
    construct(dict(settings))
    for setting in settings:
        construct(dict([*settings, setting]))
    functions = re.findall(r"`(vaefeat\.[\w.]+)`", line.name)
    for function in functions:
        module, _, name = function.rpartition(".")
        owner: Any = importlib.import_module(module) if module != "vaefeat.VAETransformer" else _transformer()
        assert callable(getattr(owner, name))
    assert settings or functions, "nothing in backticks"


def _transformer() -> type:
    from vaefeat import VAETransformer

    return VAETransformer


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.method)
def test_tests_on_the_page_exist(line: Line) -> None:
    named = re.findall(r"`([^`]+)::(\w+)`", line.test)
    assert named
    for path, function in named:
        tree = ast.parse((CHECKOUT / path).read_text())
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, path


def test_figures_on_the_page_are_those_of_the_results() -> None:
    results = json.loads(RESULTS.read_text())
    figures = {name: row["text"] for name, row in results["methods"].items()} | results["uses"]
    assert set(figures) == {*METHODS, *USES}, "the results are of other methods; run the benchmark again"
    quoted = re.findall(r"`(\w+)`: ([^;|]+)", " | ".join(line.measured for line in LINES))
    assert {name for name, _ in quoted} >= set(figures), "a figure is on no line"
    for name, text in quoted:
        if name in figures:
            assert text.strip() == figures[name], name
    assert f"commit `{results['commit']}`" in PAGE


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0])
def test_combination_that_the_page_calls_refused_is(row: list[str]) -> None:
    with pytest.raises(ConfigError):
        construct(dict(settings_in(row[0])))
    construct(dict(settings_in(row[0])) | dict(settings_in(row[2])))


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http|#)[^)]+)\)", PAGE))))
def test_link_on_the_page_leads_to_a_file(link: str) -> None:
    assert (CHECKOUT / "docs" / link.partition("#")[0]).exists()


def test_python_on_the_page_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert any("PRIORS[" in block for block in blocks)
    program = "\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
