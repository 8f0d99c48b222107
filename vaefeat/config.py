"""What is built and how it is trained: two frozen groups of settings that JSON and TOML can hold.

Names of posteriors, priors, likelihoods and objectives are checked where their classes are registered, when the model
is built; everything that can be judged by itself is checked here, at construction, and so are combinations that make no
sense (:mod:`vaefeat.combinations`).
"""

from __future__ import annotations

from dataclasses import dataclass

from vaefeat.combinations import refuse_model, refuse_training
from vaefeat.errors import ConfigError
from vaefeat.settings import (
    Settings,
    check_bool,
    check_choice,
    check_columns,
    check_int,
    check_number,
    check_text,
    check_tuple,
    unknown_name,
)

__all__ = ["FREE_SETTINGS", "ModelConfig", "TrainConfig"]

#: Of a training: what may differ between a run and its continuation, or a run and its repetition, to the same result.
FREE_SETTINGS = frozenset({"device", "threads", "checkpoint_every", "checkpoint_seconds"})

_TRAIN_CHOICES = {
    "kl_estimator": ("auto", "analytic", "sampled"),
    "gradient": ("auto", "reparameterized", "doubly_reparameterized"),
    "corruption": ("none", "gaussian", "masking", "salt_and_pepper"),
    "optimizer": ("adamw", "adam", "adagrad", "sgd", "muon"),
    "lr_schedule": ("cosine", "constant"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "float32", "bfloat16"),
}
#: Of images and tables; :mod:`vaefeat.model.augmentation` says what they are.
_AUGMENTATIONS = ("affine", "crop", "flip", "brightness", "color", "erasing", "replacement")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """Architecture and distributions of a variational auto-encoder.

    Parameters
    ----------
    latent_dim : int
        Number of latent variables; the width of the exported mean.
    style_dim : int
        Latents, the last ones, that may differ between two views of a row under ``objective="contrastive"``; the others
        are the content.
    network : {"auto", "mlp", "conv"}
        ``auto`` takes ``conv`` for images of at least 8 by 8 pixels, else ``mlp``.
    hidden_dims : tuple of int
        Widths of the hidden layers: all of an MLP, or those after the convolutions.
    channels : tuple of int
        Channels of the convolutions; each halves height and width.
    residual_blocks : int
        Residual blocks after each convolution.
    activation : {"silu", "relu", "tanh", "gelu"}
    normalization : bool
        Normalise each layer by row.
    initialization : {"default", "xavier"}
        Of the networks' weights: torch's, or Glorot and Bengio's (2010) with biases of zero.
    posterior : str
        q(z|x), a name in :data:`vaefeat.model.posteriors.POSTERIORS`.
    posterior_flows : int
        Steps of a ``planar`` or ``iaf`` posterior.
    n_categories : int
        Values of each variable of a ``categorical`` or ``joint`` posterior; it takes as many latents.
    n_categorical : int
        Categorical variables of a ``joint`` posterior; the other latents are Gaussian.
    prior : str
        p(z), a name in :data:`vaefeat.model.priors.PRIORS`.
    prior_components : int
        Components of a ``mixture`` or ``vamp`` prior.
    prior_flows : int
        Steps of a ``flow`` prior.
    flow_hidden_dim : int
        Width of the networks inside ``iaf`` and ``flow``.
    likelihood : str
        p(x|z), a name in :data:`vaefeat.model.likelihoods.LIKELIHOODS`, or ``auto``: Bernoulli for images, Gaussian for
        numbers, ``table`` for tables with other columns or missing values.
    gaussian_std : float or {"learned", "optimal"}
        Standard deviation of a Gaussian likelihood, in the scale of the network's input: a number (1 makes the
        log-likelihood minus half the squared error, up to a constant), one learned for all features, or at each step
        the one that fits best (sigma-VAE).
    levels : int
        Values that a ``categorical`` likelihood tells apart, or size of the vocabulary of ``tokens``.
    columns : tuple of int
        Of a ``table`` likelihood: what each column holds; 0 a quantity, 1 yes or no, more so many categories. It is
        read off the data (:mod:`vaefeat.table_schema`).
    optional_columns : tuple of int
        Numbers of the columns of which the encoder is told whether the value is missing.
    binarize : bool
        Dynamic binarization: values, scaled to [0, 1], are probabilities, and every look at a row draws a new binary
        one. Only with a Bernoulli likelihood. Features are computed from the probabilities themselves.
    """

    latent_dim: int = 32
    style_dim: int = 0
    network: str = "auto"
    hidden_dims: tuple[int, ...] = (256,)
    channels: tuple[int, ...] = (32, 64)
    residual_blocks: int = 0
    activation: str = "silu"
    normalization: bool = True
    initialization: str = "default"
    posterior: str = "diagonal"
    posterior_flows: int = 4
    n_categories: int = 10
    n_categorical: int = 1
    prior: str = "standard"
    prior_components: int = 50
    prior_flows: int = 4
    flow_hidden_dim: int = 128
    likelihood: str = "auto"
    gaussian_std: float | str = "learned"
    levels: int = 256
    columns: tuple[int, ...] = ()
    optional_columns: tuple[int, ...] = ()
    binarize: bool = False

    def __post_init__(self) -> None:
        check_int("latent_dim", self.latent_dim, at_least=1)
        check_int("style_dim", self.style_dim, at_least=0)
        for name in ("posterior", "prior", "likelihood"):
            check_text(name, getattr(self, name))
        check_choice("network", self.network, ("auto", "mlp", "conv"))
        check_choice("activation", self.activation, ("silu", "relu", "tanh", "gelu"))
        check_choice("initialization", self.initialization, ("default", "xavier"))
        for name in ("normalization", "binarize"):
            check_bool(name, getattr(self, name))
        check_int("residual_blocks", self.residual_blocks, at_least=0)
        for name in ("posterior_flows", "n_categorical", "prior_components", "prior_flows"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("n_categories", "levels", "flow_hidden_dim"):
            check_int(name, getattr(self, name), at_least=2)
        # Normalising a layer of one unit would leave a constant.
        for name, narrowest in (("hidden_dims", 2), ("channels", 1)):
            for width in check_tuple(name, getattr(self, name)):
                check_int(f"every width in {name}", width, at_least=narrowest)
        check_columns(self.columns, self.optional_columns)
        if self.gaussian_std not in ("learned", "optimal"):
            if isinstance(self.gaussian_std, str):
                raise unknown_name("gaussian_std", self.gaussian_std, ("learned", "optimal", "a number"))
            check_number("gaussian_std", self.gaussian_std, above=0)
        refuse_model(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """What is maximised, and how.

    Parameters
    ----------
    objective : str
        A name in :data:`vaefeat.model.objectives.OBJECTIVES`.
    kl_weight : float
        Weight of the KL term (beta), or of the divergence that stands in its place, once warm-up is over; 1 is the
        evidence lower bound.
    n_samples : int
        Samples of the posterior for each row: L of the evidence lower bound, k of ``iwae``.
    kl_estimator : {"auto", "analytic", "sampled"}
        The KL term in closed form (estimator B of Kingma and Welling 2013), or from the samples (estimator A); ``auto``
        takes the closed form where there is one.
    free_bits : float
        Nats of KL for each latent (averaged over a minibatch) that cost nothing.
    gradient : {"auto", "reparameterized", "doubly_reparameterized"}
        Of ``iwae``. ``auto`` is doubly reparameterized where the posterior's density can be followed back to z: for
        Gaussians.
    divergence_weight : float
        Weight of the divergence in ``mmd``, ``infovae`` and ``sliced_wasserstein``, whose values are of the order of 1
        or less while the log-likelihood is in nats per row.
    n_projections : int
        Directions of ``sliced_wasserstein``.
    corruption : {"none", "gaussian", "masking", "salt_and_pepper"}
        What is done to a row before it is encoded; the clean row is what must come out (denoising).
    corruption_level : float
        Standard deviation of the noise, or share of the values, in (0, 1].
    augmentations : {"auto"} or tuple of str
        What makes another view of a row for ``objective="contrastive"``: names in
        :data:`vaefeat.model.augmentation.IMAGE_AUGMENTATIONS` or ``TABLE_AUGMENTATIONS``. ``auto`` takes those that
        suit the kind of the rows; images are not mirrored unless ``flip`` is named.
    augmentation_strength : float
        Factor of their ranges.
    contrastive_weight : float
        Of the contrastive term, in nats per row, beside the log-likelihood.
    contrastive_temperature : float
        By which cosines are divided.
    neighbours : int
        Views in memory among whose nearest the one is drawn that looks for a row's other view; 0 lets the row's own
        views look for each other.
    neighbours_after : float
        Share of all steps after which neighbours look; before, rows do not lie by what they are yet.
    remembered : int
        Views in memory.
    content_kl_weight : float
        Factor of the KL term of the content's latents, whose spread the contrastive term sets.
    temperature_start, temperature_end : float
        Of the Gumbel-softmax, falling exponentially over the run.
    straight_through : bool
        Decode hard samples of categorical latents and pass the gradient of soft ones; else decode the soft ones.
    kl_warmup : float
        Share of all steps in which that weight rises linearly from 0; it is reached in runs of any length.
    max_epochs : int
        Passes over the training rows.
    batch_size : int
        Rows in a minibatch; at most as many as there are.
    optimizer : {"adamw", "adam", "adagrad", "sgd", "muon"}
        ``muon`` makes each step of a matrix orthogonal: fewer epochs for fully connected networks, at a learning
        rate of 3e-3 to 1e-2; ``adamw`` does the rest.
    learning_rate : float
    momentum : float
        Of ``sgd``.
    weight_decay : float
        Decoupled, of ``adamw`` and ``muon``; the others leave it out. For a Gaussian prior see `weight_prior_std`.
    weight_prior_std : float or None
        None is maximum likelihood, up to `weight_decay`. A number is the standard deviation of a Gaussian prior on all
        weights, whose log-density joins the objective: maximum a posteriori.
    lr_warmup : float
        Share of all steps in which the learning rate rises.
    lr_schedule : {"cosine", "constant"}
        After the rise: along a cosine to a hundredth, or constant.
    gradient_clip : float
        Largest norm of the gradient.
    heldout : float
        Share of the rows that are never trained on and measure the bound.
    patience : int or None
        Epochs without a better held-out bound after which training stops, counted from the end of the warm-up; None
        trains to the end. The best weights are kept in both cases; of ``contrastive``, which has no patience, the
        last ones.
    checkpoint_every : int
        Epochs between two checkpoints.
    checkpoint_seconds : float
        Seconds after which one is written within an epoch, too.
    device : {"auto", "cpu", "cuda"}
        ``auto`` takes CUDA where there is a device.
    threads : int or None
        Processor threads within an operation. None takes one where a step is so small that threads would wait for each
        other longer than they work (which on a busy machine costs far more than they bring), else all processors, or as
        many as OMP_NUM_THREADS allows.
    precision : {"auto", "float32", "bfloat16"}
        Of the networks' arithmetic in training; weights, likelihood, KL and log-sum-exp are float32 in any case.
        ``auto`` takes bfloat16 where a short measurement finds it faster, and float32 in runs of a few seconds.
    compile : {"auto"} or bool
        Whether torch.compile makes one graph of a step's forward pass, loss and backward pass (and, on a GPU, whether
        the whole step is captured as a CUDA graph). ``auto`` compiles runs that are long enough to earn it back, says
        why where it does not, and drops what turns out to be no faster. True is an error where it fails.
    seed : int
        Of weights, order, and noise. The same seed, rows, threads, precision, compilation, machine and versions give
        the same weights.
    """

    objective: str = "elbo"
    kl_weight: float = 1.0
    n_samples: int = 1
    kl_estimator: str = "auto"
    free_bits: float = 0.0
    gradient: str = "auto"
    divergence_weight: float = 100.0
    n_projections: int = 50
    corruption: str = "none"
    corruption_level: float = 0.3
    augmentations: str | tuple[str, ...] = "auto"
    augmentation_strength: float = 1.0
    contrastive_weight: float = 100.0
    contrastive_temperature: float = 0.5
    neighbours: int = 0
    neighbours_after: float = 0.2
    remembered: int = 16_384
    content_kl_weight: float = 0.3
    temperature_start: float = 1.0
    temperature_end: float = 0.5
    straight_through: bool = True
    kl_warmup: float = 0.2
    max_epochs: int = 20
    batch_size: int = 128
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    weight_prior_std: float | None = None
    lr_warmup: float = 0.05
    lr_schedule: str = "cosine"
    gradient_clip: float = 100.0
    heldout: float = 0.1
    patience: int | None = None
    checkpoint_every: int = 1
    checkpoint_seconds: float = 600.0
    device: str = "auto"
    threads: int | None = None
    precision: str = "auto"
    compile: bool | str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_text("objective", self.objective)
        for name, choices in _TRAIN_CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_bool("straight_through", self.straight_through)
        if self.compile != "auto":
            check_bool("compile", self.compile)
        for name in ("max_epochs", "batch_size", "checkpoint_every", "n_samples", "n_projections", "remembered"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("patience", "threads"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), at_least=1)
        for name in ("seed", "neighbours"):
            check_int(name, getattr(self, name), at_least=0)
        for name in ("kl_weight", "weight_decay", "free_bits", "divergence_weight", "content_kl_weight"):
            check_number(name, getattr(self, name), at_least=0)
        for name in (
            "learning_rate",
            "gradient_clip",
            "contrastive_weight",
            "contrastive_temperature",
            "augmentation_strength",
            "temperature_start",
            "temperature_end",
            "checkpoint_seconds",
        ):
            check_number(name, getattr(self, name), above=0)
        if self.augmentations != "auto":
            if not isinstance(self.augmentations, tuple):
                raise ConfigError(
                    f"got augmentations={self.augmentations!r}, wanted 'auto' or a tuple of names, () for none"
                )
            for augmentation in self.augmentations:
                check_choice("every name in augmentations", augmentation, _AUGMENTATIONS)
        if self.weight_prior_std is not None:
            check_number("weight_prior_std", self.weight_prior_std, above=0)
        check_number("corruption_level", self.corruption_level, above=0, at_most=1)
        check_number("momentum", self.momentum, at_least=0, below=1)
        for name in ("kl_warmup", "lr_warmup", "neighbours_after"):
            check_number(name, getattr(self, name), at_least=0, at_most=1)
        check_number("heldout", self.heldout, above=0, at_most=0.9)
        refuse_training(self)
