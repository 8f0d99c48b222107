"""Every method, from settings to a bundle: it learns, exports, embeds and decodes, and is reached in three ways.

The mathematics of each is tested in ``tests/vaefeat/model``; here it is that the parts fit together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.methods import METHODS
from pipelines.config import load_config
from vaefeat import ModelConfig, OnnxEncoder, TrainConfig, VAETransformer, load_bundle, pretrain
from vaefeat.data import load_rows
from vaefeat.decoder import OnnxDecoder
from vaefeat.export import PARITY_TOLERANCE
from vaefeat.model.evaluation import evaluate, fixed_noise
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.vae import VAE
from vaefeat.training import Trainer

#: Narrow networks and short runs: what is asked is whether the parts fit, not how good they are.
SMALL: dict[str, Any] = {"hidden_dims": (24,), "flow_hidden_dim": 16, "prior_components": 8, "posterior_flows": 2}
SHORT: dict[str, Any] = {"max_epochs": 2, "batch_size": 16}
#: Export takes seconds: what shares its graphs with one of these is exported by the slow tests.
WITH_A_GRAPH_OF_ITS_OWN = {
    "autoencoder",
    "vae",
    "gaussian_learned",
    "categorical",
    "tokens",
    "table",
    "continuous_bernoulli",
    "full_covariance",
    "inverse_autoregressive_flow",
    "categorical_latents",
    "joint_latents",
    "convolutional",
}


@pytest.fixture(scope="module")
def mnist_rows(data_dir: Path) -> NDArray[np.uint8]:
    """Read the first 256 training images, (n, 1, 28, 28)."""
    return np.array(load_rows(data_dir / "MNIST", split="train", max_rows=256).array)


def settings(name: str) -> tuple[ModelConfig, TrainConfig]:
    return METHODS[name].model_config(**SMALL), METHODS[name].train_config(**SHORT)


@pytest.mark.parametrize("name", METHODS)
def test_method_learns_from_real_rows(name: str, mnist_rows: NDArray[np.uint8]) -> None:
    model, train = settings(name)
    rows = METHODS[name].rows(mnist_rows).array
    with fixed_noise(train.seed, torch.device("cpu")):
        vae = VAE.for_rows(model, rows)
    trainer = Trainer(vae, rows, train)
    before = evaluate(
        vae,
        OBJECTIVES[train.objective](train),
        rows[trainer.feed.heldout],
        kl_weight=train.kl_weight,
        batch_size=512,
        seed=train.seed,
    )
    result = trainer.run()
    assert all(np.isfinite(record.heldout_objective) for record in result.history)
    # Nobody gains much from thirty steps, but standing still takes no nats off at all.
    assert result.evaluation.objective > before.objective + 1


@pytest.mark.parametrize(
    "name",
    [name if name in WITH_A_GRAPH_OF_ITS_OWN else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_method_exports_loads_embeds_and_decodes(name: str, mnist_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    model, train = settings(name)
    trained_on = METHODS[name].rows(mnist_rows)
    rows = trained_on.array
    bundle = pretrain(trained_on, model=model, train=train, out=tmp_path / "method", progress=False)

    outputs = bundle.manifest.parity["outputs"]
    assert set(outputs) == {"mean", "logvar", "hidden", "reconstruction"}
    assert all(o["max_abs_difference"] <= PARITY_TOLERANCE * o["scale"] for o in outputs.values())

    loaded = load_bundle(tmp_path / "method")
    features = OnnxEncoder(loaded, device="cpu", threads=1).embed(rows)
    assert features.shape == (len(rows), model.latent_dim)
    assert np.isfinite(features).all()
    assert features.std(axis=0).max() > 0, "all rows have the same feature"

    back = OnnxDecoder(loaded, device="cpu").decode(features)
    assert back.shape == rows.shape
    assert -1 < back.min() < back.max() < 256 or model.likelihood in {"gaussian", "table"}
    error, of_grey = (np.nanmean(np.square(made - rows.astype(np.float32))) for made in (back, 127.5))
    assert error < of_grey, "grey images, an untrained decoder's, are nearer to the rows than what is decoded"


@pytest.mark.parametrize("name", METHODS)
def test_method_is_written_in_toml_and_read_back_the_same(name: str, tmp_path: Path) -> None:
    model, train = settings(name)
    config = load_config(toml_file(tmp_path, model, train))
    assert (ModelConfig.from_dict(config.model), TrainConfig.from_dict(config.train)) == (model, train)


@pytest.mark.parametrize("name", ["denoising_autoencoder", "joint_latents", "iwae_5_dreg"])
def test_method_gives_one_digest_from_toml_and_from_transformer(
    name: str, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    rows = digits_rows[:200]
    model, train = settings(name)
    transformer = as_transformer(model, train).fit(rows)
    # An estimator draws the seed of training from its random state.
    seed = transformer.bundle_.manifest.train["seed"]
    config = load_config(toml_file(tmp_path, model, train), [f"train.seed={seed}"])
    bundle = pretrain(rows, preset="textbook", model=config.model, train=config.train, progress=False)

    assert transformer.bundle_.digest == bundle.digest
    np.testing.assert_array_equal(transformer.transform(rows), OnnxEncoder(bundle, device="cpu").embed(rows))


def toml_file(folder: Path, model: ModelConfig, train: TrainConfig) -> Path:
    """Write all settings as the tables [model] and [train]; TOML has no null, so what is None is left out."""
    lines = []
    for table, values in (("model", model.to_dict()), ("train", train.to_dict())):
        lines += [f"[{table}]", *(f"{key} = {json.dumps(v)}" for key, v in values.items() if v is not None), ""]
    path = folder / "run.toml"
    path.write_text("\n".join(lines))
    return path


def as_transformer(model: ModelConfig, train: TrainConfig) -> VAETransformer:
    """Give settings as the estimator's own parameters where it has them, else as options."""
    own = VAETransformer().get_params()
    fields: dict[str, dict[str, Any]] = {"model_options": model.to_dict(), "train_options": train.to_dict()}
    fields["model_options"]["n_components"] = fields["model_options"].pop("latent_dim")
    del fields["train_options"]["seed"]
    parameters: dict[str, Any] = {"random_state": 0, "preset": "textbook"}
    for options, values in fields.items():
        parameters |= {key: value for key, value in values.items() if key in own}
        parameters[options] = {key: value for key, value in values.items() if key not in own}
    return VAETransformer(**parameters)
