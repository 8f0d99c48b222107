"""Scikit-learn transformers: one that trains an encoder in ``fit``, one that serves an encoder trained before.

Neither imports torch until it trains or scores: a fitted :class:`VAETransformer` transforms with ONNX Runtime, so its
pickle works where torch is not installed, and gives the numbers that its bundle gives anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.callback import CallbackSupportMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from vaefeat.bundle import Bundle
from vaefeat.callbacks import EpochTasks, FitTasks, with_callbacks
from vaefeat.decoder import OnnxDecoder
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import InputError, requiring
from vaefeat.estimator_inputs import flat_images, plain_settings, training_rows
from vaefeat.model_card import renamed
from vaefeat.remote import RemoteEncoder

if TYPE_CHECKING:
    from sklearn.utils import Tags

__all__ = ["VAEFeatures", "VAETransformer"]

_MODEL_FIELDS = ("network", "hidden_dims", "channels", "posterior", "prior", "likelihood", "gaussian_std")
_TRAIN_FIELDS = (
    "objective",
    "kl_weight",
    "n_samples",
    "max_epochs",
    "batch_size",
    "learning_rate",
    "heldout",
    "patience",
)


class _Features(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """What both transformers share: an ``encoder_`` to ask, and float32 out."""

    encoder_: OnnxEncoder | RemoteEncoder
    _output = "mean"

    def transform(self, X: ArrayLike) -> NDArray[np.float32]:
        """Encode rows.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, C, H, W)

        Returns
        -------
        ndarray of shape (n, n_features_out), float32
        """
        check_is_fitted(self)
        rows = validate_data(self, flat_images(X, self.encoder_.input.shape), dtype="numeric", reset=False)
        return self.encoder_.embed(rows, output=self._output)

    @property
    def _n_features_out(self) -> int:
        return self.encoder_.outputs[self._output]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


class VAETransformer(CallbackSupportMixin, _Features):  # type: ignore[misc]  # sklearn has no types
    """Train a variational auto-encoder in ``fit``; transform to its posterior mean.

    Parameters
    ----------
    n_components : int, optional
        Number of latent variables, and of features.
    preset : {"features", "textbook"}
    effort : {"fast", "best"}
        What the features are for, and how long training may take; see :func:`vaefeat.presets.choose_settings`. Whatever
        is None below is the preset's to set.
    image_shape : tuple of int, optional
        (C, H, W) of the images in the rows of `X`. Not needed when `X` is given as (n, C, H, W). Without either,
        rows are vectors.
    network : {"auto", "mlp", "conv"}, optional
    hidden_dims, channels : tuple of int, optional
    posterior, prior, likelihood : str, optional
    gaussian_std : float or {"learned", "optimal"}, optional
        See :class:`vaefeat.config.ModelConfig`.
    model_options : mapping, optional
        Any other fields of :class:`vaefeat.config.ModelConfig`, such as ``{"posterior_flows": 8}``.
    objective : str, optional
    kl_weight : float, optional
    n_samples : int, optional
    max_epochs, batch_size : int, optional
    learning_rate : float, optional
    heldout : float, optional
    patience : int, optional
    device : {"auto", "cpu", "cuda"}
        See :class:`vaefeat.config.TrainConfig`. A model trained on a GPU transforms on any machine.
    train_options : mapping, optional
        Any other fields of :class:`vaefeat.config.TrainConfig`, such as ``{"corruption": "masking"}``.
    warm_start : bool
        Go on from the fitted weights when fitted again, with the same networks. The scaling of the rows stays, the
        optimizer and the schedules begin anew, and epochs add up.
    random_state : int, RandomState or None
        The same number, rows and machine give the same features.
    verbose : int
        Show a progress bar if not 0.

    Attributes
    ----------
    bundle_ : Bundle
        The trained encoder, decoder and weights, in memory; :meth:`save_bundle` writes it.
    encoder_ : OnnxEncoder
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Where `X` had column names.
    n_iter_ : int
        Epochs trained.

    References
    ----------
    Kingma and Welling 2013, Auto-Encoding Variational Bayes, arXiv:1312.6114.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from vaefeat import VAETransformer
    >>> X, y = load_digits(return_X_y=True)
    >>> features = VAETransformer(8, image_shape=(1, 8, 8), max_epochs=1, random_state=0)
    >>> pipe = make_pipeline(features, LogisticRegression(max_iter=1000))
    >>> pipe.fit(X, y).predict(X).shape
    (1797,)
    """

    bundle_: Bundle
    encoder_: OnnxEncoder
    n_iter_: int

    def __init__(
        self,
        n_components: int | None = None,
        *,
        preset: str = "features",
        effort: str = "fast",
        image_shape: tuple[int, int, int] | None = None,
        network: str | None = None,
        hidden_dims: tuple[int, ...] | None = None,
        channels: tuple[int, ...] | None = None,
        posterior: str | None = None,
        prior: str | None = None,
        likelihood: str | None = None,
        gaussian_std: float | str | None = None,
        model_options: Mapping[str, Any] | None = None,
        objective: str | None = None,
        kl_weight: float | None = None,
        n_samples: int | None = None,
        max_epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        heldout: float | None = None,
        patience: int | None = None,
        device: str = "auto",
        train_options: Mapping[str, Any] | None = None,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.preset = preset
        self.effort = effort
        self.image_shape = image_shape
        self.network = network
        self.hidden_dims = hidden_dims
        self.channels = channels
        self.posterior = posterior
        self.prior = prior
        self.likelihood = likelihood
        self.gaussian_std = gaussian_std
        self.model_options = model_options
        self.objective = objective
        self.kl_weight = kl_weight
        self.n_samples = n_samples
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.heldout = heldout
        self.patience = patience
        self.device = device
        self.train_options = train_options
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    @with_callbacks
    def fit(self, X: ArrayLike, y: object = None) -> Self:
        """Train on rows; labels are not looked at.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, C, H, W)
            uint8, or anything that becomes float32. At least two rows.
        y : None
            Ignored, for pipelines.

        Raises
        ------
        InputError
            Rows that cannot be trained on, or settings that do not fit them.
        """
        start = self.bundle_ if self.warm_start and hasattr(self, "bundle_") else None
        rows = training_rows(self, X, self.image_shape, reset=start is None)
        with requiring("train", what="Training"):
            from vaefeat.pretraining import pretrain
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        n_before = self.n_iter_ if start else 0

        def fitted(bundle: Bundle, n_epochs: int) -> dict[str, Any]:
            # Not the device of training, which another machine may lack; but who asks for the CPU means all of it.
            encoder = OnnxEncoder(bundle, device="cpu" if self.device == "cpu" else "auto")
            return {"bundle_": bundle, "encoder_": encoder, "n_iter_": n_before + n_epochs}

        tasks = FitTasks(self, "epoch", X=X, y=y)
        bundle = pretrain(
            rows,
            preset=self.preset,
            effort=self.effort,
            model=self._model_changes(),
            train=self._train_changes(seed),
            name="encoder",
            progress=self.verbose != 0,
            observers=[EpochTasks(tasks, fitted)],
            start=start,
        )
        tasks.finish(fitted(bundle, bundle.manifest.metrics["epochs"]))
        return self

    def inverse_transform(self, X: ArrayLike) -> NDArray[np.float32]:
        """Decode features to rows: the likelihood's mean.

        Parameters
        ----------
        X : array-like of shape (n, n_components)

        Returns
        -------
        ndarray of shape (n, n_features_in_), float32
            In the units of the training rows.

        Raises
        ------
        InputError
            Another shape, or a posterior with a flow: its features are no latents.
        """
        check_is_fitted(self)
        if (posterior := self.bundle_.manifest.model["posterior"]) in {"planar", "iaf"}:
            raise InputError(
                f"got features of posterior={posterior!r}, the mean before its flow, which are no latents; "
                "take vaefeat.inference.denoise for reconstructions, or posterior='diagonal' or 'full'"
            )
        rows = OnnxDecoder(self.bundle_, device=self.encoder_.device).decode(X)
        return rows.reshape(len(rows), -1)

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """Bound the log-likelihood of each row from below, in nats of the scaled row; lower is more unusual.

        The importance-weighted bound with 64 samples (Burda et al. 2015, equation 8), the same for a row whatever its
        neighbours. Needs torch.

        Returns
        -------
        ndarray of shape (n,), float64
        """
        check_is_fitted(self)
        rows = validate_data(self, flat_images(X, self.encoder_.input.shape), dtype="numeric", reset=False)
        with requiring("train", what="score_samples"):
            from vaefeat.model.evaluation import importance_weighted_bound
            from vaefeat.weights import restore_vae
        return importance_weighted_bound(restore_vae(self.bundle_), self.encoder_.input.prepare(rows))

    def score(self, X: ArrayLike, y: object = None) -> float:
        """Average :meth:`score_samples`, for model selection; `y` is ignored."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1) -> NDArray[np.float32]:
        """Generate rows: draw latents from the prior and decode them.

        Draws follow `random_state`. Needs torch.

        Returns
        -------
        ndarray of shape (n_samples, n_features_in_), float32
            The likelihood's mean for each draw, in the units of the training rows.
        """
        check_is_fitted(self)
        if n_samples < 1:
            raise InputError(f"got n_samples={n_samples}, wanted at least 1")
        with requiring("train", what="sample"):
            from vaefeat.generation import sample
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        rows = sample(self.bundle_, n_samples, seed=seed)
        return rows.reshape(len(rows), -1)

    def save_bundle(self, path: str | PathLike[str], *, name: str | None = None) -> Bundle:
        """Write the bundle to a folder, for :class:`VAEFeatures`, the service and the jobs.

        Parameters
        ----------
        path : path-like
        name : str, optional
            The model's name in a service; ``encoder`` when None.

        Returns
        -------
        Bundle
            Loaded back and verified. Its digest is that of ``bundle_``, or another one if it got a name.
        """
        check_is_fitted(self)
        return (self.bundle_ if name is None else renamed(self.bundle_, name)).save(path)

    def _model_changes(self) -> Mapping[str, Any]:
        own = {"latent_dim": self.n_components, **{name: getattr(self, name) for name in _MODEL_FIELDS}}
        return _given(plain_settings(own, self.model_options, what="model_options"))

    def _train_changes(self, seed: int) -> Mapping[str, Any]:
        own = {"device": self.device, "seed": seed, **{name: getattr(self, name) for name in _TRAIN_FIELDS}}
        return _given(plain_settings(own, self.train_options, what="train_options"))


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what the preset sets."""
    return {key: value for key, value in settings.items() if value is not None}


class VAEFeatures(_Features):
    """Features from an encoder that was trained before: a bundle on the disk, or a service.

    The encoder is a constructor argument, so :func:`sklearn.base.clone` and searches keep it; ``fit`` learns nothing.

    Parameters
    ----------
    encoder : path-like, URL, Bundle, OnnxEncoder or RemoteEncoder
        ``http://`` or ``https://`` asks the service there. For a service that wants a key, pass a RemoteEncoder that
        has it: copies within this process keep the key, pickles do not (see :meth:`RemoteEncoder.authenticate`).
    output : {"mean", "hidden", "logvar"}
        The posterior's mean, the encoder's last hidden layer, or the logarithm of the posterior's variance.
    model : str, optional
        Which of the service's models; needed when it has several.
    digest : str, optional
        The only bundle to accept, ``sha256:...`` (``digest_`` of a fitted one). Without it, each ``fit`` takes what is
        there by then, and keeps to it.
    device : {"auto", "cpu", "cuda"}
        Where a bundle runs.
    threads : int, optional
        For a bundle on the CPU: threads within an operator; see :class:`vaefeat.OnnxEncoder`.

    Attributes
    ----------
    encoder_ : OnnxEncoder or RemoteEncoder
    digest_ : str
        Of the bundle: two estimators with one digest give the same features.
    n_features_in_ : int

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from vaefeat import VAEFeatures
    >>> pipe = make_pipeline(VAEFeatures("runs/digits"), LogisticRegression())
    """

    def __init__(
        self,
        encoder: str | PathLike[str] | Bundle | OnnxEncoder | RemoteEncoder,
        *,
        output: str = "mean",
        model: str | None = None,
        digest: str | None = None,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        self.encoder = encoder
        self.output = output
        self.model = model
        self.digest = digest
        self.device = device
        self.threads = threads

    def fit(self, X: ArrayLike, y: object = None) -> Self:
        """Load the encoder and check that it takes rows like these; nothing is learned.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, C, H, W)
        y : None
            Ignored, for pipelines.

        Raises
        ------
        BundleError, RemoteError, DeviceError
            The encoder cannot be loaded.
        InputError
            It takes other rows, has no such output, or is another than `digest` says.
        """
        encoder = self._open()
        if self.digest is not None and encoder.digest != self.digest:
            raise InputError(
                f"got digest={self.digest!r} and an encoder with {encoder.digest}; pass the encoder that is meant, or "
                "leave out digest= to take this one"
            )
        rows = validate_data(self, flat_images(X, encoder.input.shape), dtype="numeric")
        encoder.input.prepare(rows[:1])
        if self.output not in encoder.outputs:
            raise InputError(f"got output={self.output!r}, wanted one of {sorted(encoder.outputs)}")
        self.encoder_ = encoder
        self.digest_: str = encoder.digest
        self._output = self.output
        return self

    def _open(self) -> OnnxEncoder | RemoteEncoder:
        if isinstance(self.encoder, OnnxEncoder | RemoteEncoder):
            return self.encoder
        if isinstance(self.encoder, str) and self.encoder.startswith(("http://", "https://")):
            if self.device != "auto" or self.threads is not None:
                raise InputError("got device or threads for a service, which decides both itself; leave them out")
            return RemoteEncoder(self.encoder, model=self.model, digest=self.digest)
        if self.model is not None:
            raise InputError(f"got model={self.model!r} for a bundle, which holds one model; leave it out")
        return OnnxEncoder(self.encoder, device=self.device, threads=self.threads)
