"""Combinations of settings that make no sense: each is refused by name, with the nearest that works.

Only names that come with the library are judged; what others register is theirs to combine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vaefeat.errors import ConfigError

if TYPE_CHECKING:
    from vaefeat.config import ModelConfig, TrainConfig

__all__ = ["refuse_model", "refuse_pair", "refuse_training", "refuse_workers"]

_CATEGORICAL = {"categorical", "joint"}
_FLOWS = {"planar", "iaf"}
_TRAINED_PRIORS = {"learned", "mixture", "vamp", "flow"}
_PRIORS_WITHOUT_CLOSED_FORM = {"mixture", "vamp", "flow"}
#: Whose KL divergence is no sum over latents, or none.
_OTHER_POSTERIORS = {*_CATEGORICAL, *_FLOWS, "full", "deterministic"}
_BOUNDS = {"elbo", "iwae", "infovae"}
_WITHOUT_VIEWS = {*_BOUNDS, "mmd", "sliced_wasserstein", "reconstruction"}


def refuse_model(config: ModelConfig) -> None:
    """Refuse a model that cannot be.

    Raises
    ------
    ConfigError
    """
    if config.posterior in _CATEGORICAL:
        _refuse_latents(config)
        if config.prior in _TRAINED_PRIORS:
            raise ConfigError(
                f"got posterior={config.posterior!r} with prior={config.prior!r}, which is over continuous latents "
                "alone; take prior='standard', which is uniform over categories"
            )
    if config.style_dim >= config.latent_dim:
        raise ConfigError(
            f"got style_dim={config.style_dim} of latent_dim={config.latent_dim}, which leaves no content; take "
            f"latent_dim={config.style_dim + 1} or more, or a smaller style_dim"
        )
    if config.posterior == "full" and config.latent_dim == 1:
        raise ConfigError(
            "got posterior='full' with latent_dim=1, which has nothing to correlate; take posterior='diagonal'"
        )
    if config.prior == "vamp" and config.posterior in {*_FLOWS, "deterministic"}:
        raise ConfigError(
            f"got prior='vamp' with posterior={config.posterior!r}: a VampPrior is a mixture of posteriors and needs "
            "their density everywhere; take posterior='full' or 'diagonal', or prior='mixture' or 'flow'"
        )
    if config.likelihood == "tokens" and config.prior == "vamp":
        raise ConfigError(
            "got prior='vamp' with likelihood='tokens': its pseudo-inputs are learned by gradient, which ids have "
            "none of; take prior='mixture' or 'flow'"
        )
    if config.binarize and config.likelihood not in {"auto", "bernoulli"}:
        raise ConfigError(
            f"got binarize=True with likelihood={config.likelihood!r}: binary rows are coins; take "
            "likelihood='bernoulli', or binarize=False"
        )
    if config.columns or config.likelihood == "table":
        _refuse_with_columns(config)
    if config.likelihood == "tokens" and config.network == "conv":
        raise ConfigError("got likelihood='tokens' with network='conv', which is for images; take network='mlp'")


def refuse_training(config: TrainConfig) -> None:
    """Refuse an objective with settings that are not its own.

    Raises
    ------
    ConfigError
    """
    if config.objective == "iwae" and config.kl_estimator == "analytic":
        raise ConfigError(
            "got objective='iwae' with kl_estimator='analytic': the bound weighs samples, and has no KL term to solve; "
            "take kl_estimator='auto', or objective='elbo'"
        )
    if config.gradient == "doubly_reparameterized" and config.objective != "iwae":
        raise ConfigError(
            f"got gradient='doubly_reparameterized' with objective={config.objective!r}: only weighted samples have "
            "one; take gradient='auto', or objective='iwae' with n_samples above 1"
        )
    if config.objective == "contrastive" and config.batch_size == 1:
        raise ConfigError(
            "got batch_size=1 with objective='contrastive', which tells rows of a minibatch from each other"
        )
    if config.neighbours > config.remembered:
        raise ConfigError(
            f"got neighbours={config.neighbours} of remembered={config.remembered} views; take as many of them or fewer"
        )
    if config.objective == "contrastive" and config.patience is not None:
        raise ConfigError(
            f"got patience={config.patience} with objective='contrastive', whose values in different epochs cannot be "
            "compared; leave patience out, and set max_epochs"
        )
    if config.free_bits and (config.objective != "elbo" or config.kl_estimator == "sampled"):
        raise ConfigError(
            f"got free_bits={config.free_bits:g} with objective={config.objective!r} and "
            f"kl_estimator={config.kl_estimator!r}: they are a floor under each latent's KL in closed form; take "
            "objective='elbo' and kl_estimator='auto', or free_bits=0"
        )


def refuse_pair(model: ModelConfig, train: TrainConfig) -> None:
    """Refuse an objective that the model has no terms for, or that leaves unheard what was asked for.

    Raises
    ------
    ConfigError
    """
    _refuse_unheard(model, train)
    pair = f"posterior={model.posterior!r} and prior={model.prior!r}"
    if model.posterior == "deterministic" and train.objective in _BOUNDS:
        raise ConfigError(
            f"got objective={train.objective!r} with posterior='deterministic', whose KL divergence is infinite; take "
            "objective='reconstruction' (an auto-encoder), 'mmd' or 'sliced_wasserstein' (a Wasserstein one), or "
            "posterior='diagonal'"
        )
    if train.objective == "contrastive" and (
        model.posterior in _OTHER_POSTERIORS
        or model.prior in _PRIORS_WITHOUT_CLOSED_FORM
        or train.kl_estimator == "sampled"
    ):
        raise ConfigError(
            f"got objective='contrastive' with {pair} and kl_estimator={train.kl_estimator!r}: it weighs the KL "
            "divergence latent by latent, in closed form; take posterior='diagonal', prior='standard' or 'learned' and "
            "kl_estimator='auto', or preset='textbook', whose objective is the evidence lower bound"
        )
    if train.kl_estimator == "analytic" and (model.posterior in _FLOWS or model.prior in _PRIORS_WITHOUT_CLOSED_FORM):
        raise ConfigError(
            f"got kl_estimator='analytic' with {pair}, whose KL divergence has no closed form; take "
            "kl_estimator='auto' or 'sampled'"
        )
    if train.free_bits and (model.posterior in {*_FLOWS, "full"} or model.prior in _PRIORS_WITHOUT_CLOSED_FORM):
        raise ConfigError(
            f"got free_bits={train.free_bits:g} with {pair}, whose KL divergence is no sum over latents; take "
            "posterior='diagonal' with prior='standard' or 'learned', or free_bits=0"
        )
    if train.gradient == "doubly_reparameterized" and model.posterior not in {"diagonal", "full"}:
        raise ConfigError(
            f"got gradient='doubly_reparameterized' with posterior={model.posterior!r}, whose density cannot be "
            "followed back to z; take gradient='auto', or posterior='diagonal' or 'full'"
        )
    sampled = train.objective == "iwae" or train.kl_estimator == "sampled"
    if model.posterior in _CATEGORICAL and sampled and not train.straight_through:
        raise ConfigError(
            f"got straight_through=False with posterior={model.posterior!r}, objective={train.objective!r} and "
            f"kl_estimator={train.kl_estimator!r}: soft samples have no probability to weigh; take "
            "straight_through=True, or objective='elbo' with kl_estimator='auto'"
        )
    if model.likelihood == "tokens" and train.corruption in {"gaussian", "salt_and_pepper"}:
        raise ConfigError(
            f"got corruption={train.corruption!r} with likelihood='tokens', whose ids are no quantities; take "
            "corruption='masking', which makes an id 0"
        )
    if (model.columns or model.likelihood == "table") and train.corruption in {"gaussian", "salt_and_pepper"}:
        raise ConfigError(
            f"got corruption={train.corruption!r} for a table, whose categories are no quantities; take "
            "corruption='masking', which makes values missing"
        )
    if train.objective in {"mmd", "sliced_wasserstein", "reconstruction"} and model.prior in _TRAINED_PRIORS:
        raise ConfigError(
            f"got objective={train.objective!r} with prior={model.prior!r}, which nothing would train: the objective "
            "asks the prior for samples at most; take prior='standard', or objective='infovae'"
        )


def refuse_workers(model: ModelConfig, train: TrainConfig, *, n_workers: int) -> None:
    """Refuse what several workers cannot compute, each from its part of a minibatch.

    Raises
    ------
    ConfigError
    """
    if n_workers == 1:
        return
    if train.batch_size < n_workers:
        raise ConfigError(f"got batch_size={train.batch_size} for {n_workers} workers, wanted a row each")
    if model.gaussian_std == "optimal":
        raise ConfigError(
            "got gaussian_std='optimal' with several workers, each of which would find another one in its part of a "
            "minibatch; take gaussian_std='learned', or one worker"
        )
    if train.objective in {"mmd", "infovae", "sliced_wasserstein"}:
        raise ConfigError(
            f"got objective={train.objective!r} with several workers: it compares the whole minibatch's latents with "
            "the prior's, and each worker has a part; take another objective, or one worker"
        )


def _refuse_unheard(model: ModelConfig, train: TrainConfig) -> None:
    # Here and not where a configuration is made: bundles of such pairs were trained, and must still load.
    if train.objective not in _WITHOUT_VIEWS:
        return
    for name, value in (("style_dim", model.style_dim), ("neighbours", train.neighbours)):
        if value:
            raise ConfigError(
                f"got {name}={value} with objective={train.objective!r}, which has no views of a row to compare and "
                f"would leave it unheard; take objective='contrastive', or {name}=0"
            )


def _refuse_with_columns(config: ModelConfig) -> None:
    if config.likelihood not in {"auto", "table"}:
        raise ConfigError(
            f"got likelihood={config.likelihood!r} for a table of other columns than numbers, or with missing values; "
            "take likelihood='auto', which has a distribution for each kind of column"
        )
    if config.network == "conv":
        raise ConfigError("got network='conv', which is for images, for a table; take network='mlp'")
    if config.prior == "vamp":
        raise ConfigError(
            "got prior='vamp' for a table: its pseudo-inputs are learned by gradient, which categories have none of; "
            "take prior='mixture' or 'flow'"
        )
    if config.gaussian_std == "optimal":
        raise ConfigError(
            "got gaussian_std='optimal' for a table, whose quantities have a standard deviation each; take "
            "gaussian_std='learned', or a number"
        )
    if config.binarize:
        raise ConfigError("got binarize=True for a table, whose columns say themselves what is yes or no; leave it out")


def _refuse_latents(config: ModelConfig) -> None:
    width = config.n_categories
    if config.posterior == "categorical" and config.latent_dim % width:
        nearest = max(1, round(config.latent_dim / width)) * width
        raise ConfigError(
            f"got posterior='categorical' with latent_dim={config.latent_dim} and n_categories={width}, wanted a "
            f"multiple of {width}: latent_dim counts every category of every variable; take latent_dim={nearest}"
        )
    if config.posterior == "joint" and config.latent_dim <= config.n_categorical * width:
        needed = config.n_categorical * width
        raise ConfigError(
            f"got posterior='joint' with latent_dim={config.latent_dim}, of which n_categorical={config.n_categorical} "
            f"variables of n_categories={width} take {needed} and leave no continuous one; take latent_dim="
            f"{needed + 1} or more, or posterior='categorical'"
        )
