"""What a sweep tries, and the rows that it judges by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pipelines.config import DataConfig
from pipelines.datasets import load_dataset, load_validation
from pipelines.sweep_space import choose_settings, read_space, with_settings
from vaefeat.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("model.latent_dim=8,16", [8, 16]),
        ("train.kl_weight=0.5,1", [0.5, 1]),
        ("train.objective=elbo,iwae", ["elbo", "iwae"]),
        ("model.hidden_dims=[64],[256,256]", [[64], [256, 256]]),
        ("effort=fast,best", ["fast", "best"]),
        ("train.seed=3", [3]),
    ],
)
def test_values_are_read_as_toml_or_as_names(text: str, values: list[Any]) -> None:
    assert read_space([text]) == {text.partition("=")[0]: values}


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([], "nothing to sweep over"),
        (["model.latent_dims=1,2"], "did you mean 'model.latent_dim'"),
        (["data.path=a,b"], "got --over key 'data.path'"),
        (["model.latent_dim"], "wanted key=value,value"),
        (["model.latent_dim=1,2", "model.latent_dim=3"], "twice"),
        (["model.latent_dim=1,2,1"], "the value 1 twice"),
    ],
)
def test_impossible_space_is_refused(over: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_space(over)


def test_trials_are_all_combinations_or_some_at_random() -> None:
    space: dict[str, list[Any]] = {"model.latent_dim": [2, 4, 8], "effort": ["fast", "best"]}
    every = choose_settings(space, trials=None, seed=0)
    assert len(every) == 6
    assert every[1] == {"model.latent_dim": 2, "effort": "best"}
    some = choose_settings(space, trials=4, seed=0)
    assert len(some) == 4
    assert all(one in every for one in some)
    assert some == choose_settings(space, trials=4, seed=0)
    assert any(some != choose_settings(space, trials=4, seed=seed) for seed in range(1, 5))
    with pytest.raises(ConfigError, match=r"got --trials 7, wanted 1 to 6"):
        choose_settings(space, trials=7, seed=0)


def test_settings_lie_over_a_configuration_that_stays_as_it_was() -> None:
    values = {"effort": "fast", "model": {"latent_dim": 3, "network": "mlp"}}
    merged = with_settings(values, {"model.latent_dim": 9, "effort": "best"})
    assert merged == {"effort": "best", "model": {"latent_dim": 9, "network": "mlp"}}
    assert values["model"] == {"latent_dim": 3, "network": "mlp"}


def test_validation_rows_are_training_rows_that_nothing_else_sees(tmp_path: Path) -> None:
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.uint8)
    # Test rows are told by a value that no other row has.
    images[:, 0, 0, 0] = np.arange(len(images)) % 200
    np.savez(tmp_path / "digits.npz", X=images, y=labels)
    config = DataConfig(path=str(tmp_path / "digits.npz"))
    run, held = load_dataset(config, seed=3), load_validation(config, seed=3)
    assert len(held.test) == len(run.train) // 6
    rows = {row.tobytes() for row in run.train}
    train, validation = ({row.tobytes() for row in part} for part in (held.train, held.test))
    assert train | validation == rows
    assert not train & validation
    assert not rows & {row.tobytes() for row in run.test}
    assert {row.tobytes() for row in held.pretraining.array} == train
    everything = load_validation(DataConfig(path=config.path, pretrain_on="all"), seed=3)
    assert {row.tobytes() for row in everything.pretraining.array} == rows
    by_content = {row.tobytes(): label for row, label in zip(images, labels, strict=True)}
    assert [by_content[row.tobytes()] for row in held.test] == held.test_labels.tolist()


def test_validation_rows_of_data_with_a_test_split_are_training_rows(data_dir: Path) -> None:
    held = load_validation(DataConfig(path=str(data_dir / "MNIST")), seed=0)
    assert (len(held.train), len(held.test), len(held.pretraining)) == (50_000, 10_000, 50_000)
