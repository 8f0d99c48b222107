"""The scikit-learn transformer that trains an encoder in ``fit``.

It imports torch when it trains or scores, and not before: once fitted it transforms with ONNX Runtime, so its pickle
works where torch is not installed, and gives the numbers that its bundle gives anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.callback import CallbackSupportMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from vaefeat.bundle import Bundle
from vaefeat.callbacks import EpochTasks, FitTasks, with_callbacks
from vaefeat.decoder import OnnxDecoder
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import InputError, requiring
from vaefeat.estimator_inputs import (
    checked_rows,
    given_settings,
    named_as,
    plain_settings,
    taking_tables,
    training_data,
)
from vaefeat.features import Features
from vaefeat.model_card import renamed
from vaefeat.table_columns import library_of
from vaefeat.table_schema import HandleUnknown

if TYPE_CHECKING:
    from sklearn.utils import Tags

__all__ = ["VAETransformer"]

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


class VAETransformer(CallbackSupportMixin, Features):  # type: ignore[misc]  # sklearn has no types
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
        rows are vectors, or tables: data frames of text, categories, booleans and numbers, and missing values.
    categorical_features : list of str or int, optional
        Columns that are categories although they hold numbers. An array holds them numbered from 0, as
        :class:`sklearn.preprocessing.OrdinalEncoder` does.
    handle_unknown : {"error", "ignore"}
        What ``transform`` does with a category that was not in ``fit``: refuse it, or take it for missing.
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
        categorical_features: Sequence[str | int] | None = None,
        handle_unknown: HandleUnknown = "error",
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
        self.categorical_features = categorical_features
        self.handle_unknown = handle_unknown
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
        X : array-like of shape (n, n_features) or (n, C, H, W), or data frame
            uint8, or anything that becomes float32; or a table of pandas or polars. NaN is a missing value. At least
            two rows.
        y : None
            Ignored, for pipelines.

        Raises
        ------
        InputError
            Rows that cannot be trained on, or settings that do not fit them.
        """
        start = self.bundle_ if self.warm_start and hasattr(self, "bundle_") else None
        rows = training_data(
            self,
            X,
            self.image_shape,
            categorical=self.categorical_features,
            handle_unknown=self.handle_unknown,
            like=None if start is None else start.manifest.input,
        )
        self._library = library_of(X)
        with requiring("train", what="Training"):
            from vaefeat.pretraining import pretrain
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        n_before = self.n_iter_ if start else 0

        def fitted(bundle: Bundle, n_epochs: int) -> dict[str, Any]:
            # Not the device of training, which another machine may lack; but who asks for the CPU means all of it.
            encoder = OnnxEncoder(bundle, device="cpu" if self.device == "cpu" else "auto")
            return {"bundle_": bundle, "encoder_": encoder, "n_iter_": n_before + n_epochs}

        tasks = FitTasks(self, "epoch", X=X, y=y)
        with named_as(latent_dim="n_components"):
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

    def inverse_transform(self, X: ArrayLike) -> Any:
        """Decode features to rows: the likelihood's mean.

        Parameters
        ----------
        X : array-like of shape (n, n_components)

        Returns
        -------
        ndarray of shape (n, n_features_in_), float32
            In the units of the training rows. Of a table that has others than numbers, or missing values, what the
            model was fitted to: a data frame, with the likeliest of categories and booleans.

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
        return self._as_given(OnnxDecoder(self.bundle_, device=self.encoder_.device).decode(X))

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """Bound the log-likelihood of each row from below, in nats of the scaled row; lower is more unusual.

        The importance-weighted bound with 64 samples (Burda et al. 2015, equation 8), the same for a row whatever its
        neighbours. Needs torch.

        Returns
        -------
        ndarray of shape (n,), float64
        """
        check_is_fitted(self)
        rows = checked_rows(self, X, self.encoder_.input, reset=False)
        with requiring("train", what="score_samples"):
            from vaefeat.model.evaluation import importance_weighted_bound
            from vaefeat.weights import restore_vae
        return importance_weighted_bound(restore_vae(self.bundle_), self.encoder_.input.prepare(rows))

    def score(self, X: ArrayLike, y: object = None) -> float:
        """Average :meth:`score_samples`, for model selection; `y` is ignored."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1) -> Any:
        """Generate rows: draw latents from the prior and decode them.

        Draws follow `random_state`. Needs torch.

        Returns
        -------
        ndarray of shape (n_samples, n_features_in_), float32
            The likelihood's mean for each draw, as :meth:`inverse_transform` gives it.
        """
        check_is_fitted(self)
        if n_samples < 1:
            raise InputError(f"got n_samples={n_samples}, wanted at least 1")
        with requiring("train", what="sample"):
            from vaefeat.generation import sample
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        return self._as_given(sample(self.bundle_, n_samples, seed=seed))

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

    def _as_given(self, rows: NDArray[np.float32]) -> Any:
        """Give rows as `fit` got them: flat, or with the names of categories."""
        flat, table = rows.reshape(len(rows), -1), self.encoder_.input.table
        return flat if table is None or self._library is None else table.frame(flat, library=self._library)

    def __sklearn_tags__(self) -> Tags:
        return taking_tables(super().__sklearn_tags__())

    def _model_changes(self) -> Mapping[str, Any]:
        own = {"latent_dim": self.n_components, **{name: getattr(self, name) for name in _MODEL_FIELDS}}
        return given_settings(plain_settings(own, self.model_options, what="model_options"))

    def _train_changes(self, seed: int) -> Mapping[str, Any]:
        own = {"device": self.device, "seed": seed, **{name: getattr(self, name) for name in _TRAIN_FIELDS}}
        return given_settings(plain_settings(own, self.train_options, what="train_options"))
