"""TOML and ``--set``: what they accept, and what they say when they don't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.config import RunConfig, load_config
from vaefeat.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "pipelines" / "configs"


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_shipped_configuration_is_valid(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.toml")
    assert (config.name, config.out) == (name, f"runs/{name}")
    assert RunConfig.from_dict(config.to_dict()) == config


def test_folder_is_named_after_the_job_where_none_is_given(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b'\xef\xbb\xbfname = "mine"\n')  # as some editors begin a file
    assert load_config(path).out == "runs/mine"
    assert load_config(path, ["out=elsewhere"]).out == "elsewhere"


def test_set_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "a"\n[train]\nmax_epochs = 3\n')
    config = load_config(
        path, ["train.max_epochs=7", "data.path=some/where", "model.hidden_dims=[64, 32]", "train.kl_weight=0.5"]
    )
    assert (config.train, config.data.path) == ({"max_epochs": 7, "kl_weight": 0.5}, "some/where")
    assert config.model == {"hidden_dims": [64, 32]}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("nam = 'x'", [], "did you mean 'name'"),
        ("[train]\nmax_epoch = 3", [], "did you mean 'max_epochs'"),
        ("max_epochs = 3", [], r"did you mean train.max_epochs, in \[train\]"),
        ("preset = 'feature'", [], "did you mean 'features'"),
        ("effort = 'fsat'", [], "did you mean 'fast'"),
        ("[train]\nlearning_rate = -1", [], "learning_rate"),
        ("train = 3", [], r"wanted a table \[train\]"),
        ("[data]\npretrain_on = 'trian'", [], "did you mean 'train'"),
        ("[data]\ntest_share = 1.5", [], "test_share"),
        ("[serve]\nengine = 'rai'", [], "did you mean 'ray'"),
        ("[probe]\nn_labels = 0", [], "n_labels=0"),
        ("name = ", [], "not TOML"),
        ("", ["train.max_epochs"], "wanted key=value"),
        ("", ["name.x=3"], "wanted a text"),
    ],
)
def test_bad_configuration_is_refused_by_name(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path, overrides)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        load_config(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"train": {"max_epoch": 3}}, r"key in \[train\] 'max_epoch'; did you mean 'max_epochs'"),
        ({"data": {"max_epochs": 3}}, r"got max_epochs in \[data\]; did you mean \[train\]"),
        ({"probe": {"nonsense": 3}}, r"key in \[probe\] 'nonsense'; known: n_draws, n_labels, seed"),
    ],
)
def test_unknown_key_is_told_with_its_table(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(table)
