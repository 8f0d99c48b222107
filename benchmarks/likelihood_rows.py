"""What ``python -m benchmarks.likelihood`` measures: models, their training, and the published figures beside them."""

from __future__ import annotations

from dataclasses import dataclass

from vaefeat.config import ModelConfig, TrainConfig

__all__ = ["ROWS", "Published", "Row"]


@dataclass(frozen=True)
class Published:
    """A figure from elsewhere: nats per image, and where it stands."""

    nll: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model.

    Attributes
    ----------
    name, title : str
    model : ModelConfig
    train : TrainConfig
    after : str or None
        The row whose best weights this one begins with.
    n_samples : int or None
        Importance samples for each test row; None for rows that are not evaluated by them.
    samples_per_chunk : int
        Of them, decoded at a time.
    published : Published or None
    """

    name: str
    title: str
    model: ModelConfig
    train: TrainConfig
    after: str | None = None
    n_samples: int | None = None
    samples_per_chunk: int = 100
    published: Published | None = None


_BURDA = "Burda et al. 2015, arXiv:1509.00519, table 1"
_ONE_LAYER = ModelConfig(
    latent_dim=50,
    hidden_dims=(200, 200),
    network="mlp",
    activation="tanh",
    normalization=False,
    initialization="xavier",
    likelihood="bernoulli",
    binarize=True,
)
_BEST = ModelConfig(
    latent_dim=40,
    network="conv",
    channels=(32, 64),
    hidden_dims=(512,),
    posterior="iaf",
    posterior_flows=2,
    prior="flow",
    prior_flows=4,
    flow_hidden_dim=320,
    likelihood="bernoulli",
    binarize=True,
)
#: 1,000 of the 60,000 training images choose the best weights; the test images are read once, at the end.
_HELDOUT = 1 / 60


def _curve(latent_dim: int) -> Row:
    return Row(
        name=f"curve_z{latent_dim}",
        title=f"2013 paper's figure 2, z of {latent_dim}",
        model=ModelConfig(
            latent_dim=latent_dim,
            hidden_dims=(500,),
            network="mlp",
            activation="tanh",
            normalization=False,
            initialization="xavier",
            likelihood="bernoulli",
            binarize=True,
        ),
        train=TrainConfig(
            optimizer="adagrad",
            learning_rate=0.02,
            lr_schedule="constant",
            lr_warmup=0.0,
            kl_warmup=0.0,
            weight_prior_std=1.0,
            batch_size=100,
            max_epochs=20,
            heldout=_HELDOUT,
        ),
    )


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            name="notes_2d",
            title="784-512-2, batches of 50, 10 epochs",
            model=ModelConfig(
                latent_dim=2,
                hidden_dims=(512,),
                network="mlp",
                activation="relu",
                normalization=False,
                likelihood="bernoulli",
                binarize=True,
            ),
            train=TrainConfig(
                optimizer="adam", learning_rate=1e-3, batch_size=50, max_epochs=10, kl_warmup=0.0, heldout=_HELDOUT
            ),
            n_samples=500,
        ),
        *(_curve(latent_dim) for latent_dim in (3, 5, 10, 20, 200)),
        Row(
            name="vae_1l",
            title="VAE, one layer of 50 latents (784-200-200-50, tanh)",
            model=_ONE_LAYER,
            train=TrainConfig(
                optimizer="muon",
                learning_rate=3e-3,
                weight_decay=0.0,
                batch_size=200,
                max_epochs=300,
                kl_warmup=0.02,
                lr_warmup=0.02,
                precision="bfloat16",
                heldout=_HELDOUT,
                threads=1,
                checkpoint_every=5,
            ),
            n_samples=5000,
            published=Published(86.76, _BURDA),
        ),
        Row(
            name="iwae50_1l",
            title="IWAE, k = 50, the same network, from the VAE's weights",
            model=_ONE_LAYER,
            train=TrainConfig(
                objective="iwae",
                n_samples=50,
                optimizer="muon",
                learning_rate=2e-3,
                weight_decay=0.0,
                batch_size=100,
                max_epochs=30,
                kl_warmup=0.0,
                lr_warmup=0.02,
                precision="bfloat16",
                heldout=_HELDOUT,
                threads=1,
                checkpoint_every=2,
            ),
            after="vae_1l",
            n_samples=5000,
            published=Published(84.78, _BURDA),
        ),
        Row(
            name="best",
            title="convolutions, 40 latents, autoregressive posterior and prior",
            model=_BEST,
            train=TrainConfig(
                learning_rate=2e-3,
                batch_size=128,
                max_epochs=100,
                kl_warmup=0.05,
                lr_warmup=0.02,
                precision="bfloat16",
                heldout=_HELDOUT,
                threads=1,
                checkpoint_every=2,
            ),
            n_samples=5000,
            published=Published(82.90, _BURDA + " (IWAE, two layers, k = 50)"),
        ),
    )
}
