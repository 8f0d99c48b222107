"""A scikit-learn classifier that learns from few labels and many rows, and generates rows of each class.

Imports torch in ``fit`` and no sooner.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from vaefeat.bundle import Bundle, load_bundle
from vaefeat.callbacks import ClassifierTasks, FitTasks, with_callbacks
from vaefeat.config import ModelConfig, TrainConfig
from vaefeat.errors import ConfigError, InputError, requiring
from vaefeat.estimator_inputs import flat_images, plain_settings, training_rows
from vaefeat.input_spec import InputSpec
from vaefeat.labels import UNLABELLED
from vaefeat.partly_labelled import PartlyLabelledClassifier
from vaefeat.settings import check_int, check_number, refuse_other_model, unknown_name
from vaefeat.temperature import tempered

if TYPE_CHECKING:
    from vaefeat.model.labelled import LabelledVAE

__all__ = ["VAEClassifier"]

#: Fields of ModelConfig that have one value here: latents are Gaussian, and there are no views for one to compare.
_FIXED = {"posterior", "prior", "initialization", "style_dim"}
#: Fields of TrainConfig that this training knows; others would change nothing.
_TRAIN_OPTIONS = (
    "optimizer",
    "momentum",
    "weight_decay",
    "lr_warmup",
    "lr_schedule",
    "gradient_clip",
    "kl_weight",
    "threads",
)


class VAEClassifier(PartlyLabelledClassifier):
    """A generative semi-supervised classifier: a VAE of rows and classes, trained end to end.

    Of rows without a label every class is tried, and weighed with the classifier's own opinion; see
    ``docs/classifiers.md`` for equations and figures. In `y`, -1 and NaN stand for a missing label; beside strings so
    does None, and `y` is then a list or an array of objects.

    Parameters
    ----------
    model : {"m2", "m1m2", "adgm", "sdgm"}
        ``m2`` is the model of Kingma et al. 2014 with a latent style beside the class. ``m1m2`` is the same over the
        latents of a VAE that is trained first. ``adgm`` and ``sdgm`` have an auxiliary variable (Maaløe et al. 2016),
        and take somewhat longer.
    n_components : int
        Number of latent variables of the style.
    auxiliary_dim : int
        Width of the auxiliary variable of ``adgm`` and ``sdgm``.
    encoder : path-like or Bundle, optional
        The VAE under ``m1m2``, from :func:`vaefeat.pretrain`; a plain one of 50 latents is trained on
        `X` when None. One of ``preset="features"`` makes for far fewer errors.
    image_shape : tuple of int, optional
        (C, H, W) of the images in the rows of `X`. Not needed when `X` is given as (n, C, H, W). Without either, rows
        are vectors.
    network : {"auto", "mlp", "conv"}
        Of the classifier q(y|x) (and of the VAE under ``m1m2``); encoder and decoder, the latter of which runs for each
        row and class, are fully connected.
    hidden_dims, channels : tuple of int
    likelihood : str
        See :class:`vaefeat.config.ModelConfig`.
    model_options : mapping, optional
        Any other fields of :class:`vaefeat.config.ModelConfig` but posterior and prior, which are Gaussian,
        initialization and style_dim.
    classification_weight : float
        Nats of bound that a nat of log q(y|x), averaged over the labels, outweighs.
    consistency : float
        Where rows are changed at each look: weight of the classes that the classifier is certain of in unchanged rows,
        as labels of the changed ones, relative to the weight of the labels given (Sohn et al. 2020, arXiv:2001.07685).
        0 is the objective of the papers alone.
    class_weight : mapping of labels to weights, "balanced" or None
        Of each class's labels in the loss, times `sample_weight`. ``balanced`` makes all classes weigh alike. The prior
        p(y) does not feel it.
    unlabelled : int or None
        The number that stands in `y` for a missing label, beside None and NaN. None where each number is a class: with
        labels -1 and 1, say.
    calibration : int, optional
        Into how many folds the labelled rows are cut, at least 2, to find a temperature that probabilities are
        calibrated by: a copy is fitted without each fold, and asked for it, so that fitting takes as many times longer.
        None takes probabilities as they come. Labels stay what they are. ``docs/sklearn.md`` says when it helps.
    augmentations : "auto" or tuple of str
        How rows are changed at each look, labelled ones and others: names of
        :mod:`vaefeat.model.augmentation`. ``auto`` is ``("affine", "erasing")`` for images (small rotations, shears,
        shifts and changes of scale; a rectangle filled), and nothing for tables; ``()`` is nothing.
    max_epochs : int
        Passes over the rows without a label.
    batch_size : int
        Rows without a label in a minibatch.
    labelled_batch_size : int
        Rows with a label beside them; labels come round as often as it takes.
    learning_rate : float
    kl_warmup : float
        Share of all steps in which the weight of the KL term rises. While it is low the latents learn the class, too,
        and the decoder need not ask for it.
    device : {"auto", "cpu", "cuda"}
        See :class:`vaefeat.config.TrainConfig`. A model trained on a GPU predicts on any machine.
    train_options : mapping, optional
        Any of these fields of :class:`vaefeat.config.TrainConfig`: optimizer, momentum, weight_decay, lr_warmup,
        lr_schedule, gradient_clip, kl_weight, threads.
    warm_start : bool
        Go on from the fitted weights when fitted again, with the same networks and classes. The scaling of the rows
        stays, the optimizer and the schedules begin anew, and epochs add up.
    random_state : int, RandomState or None
        The same number, rows, labels and machine give the same model.
    verbose : int
        Show a progress bar if not 0.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    model_ : LabelledVAE
        The trained torch model, on the CPU.
    input_ : InputSpec
        The rows it takes.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Where `X` had column names.
    temperature_ : float
        What logits were divided by; 1 without `calibration`.
    n_iter_ : int
        Epochs trained.

    Notes
    -----
    The prior p(y) is the share of each class among the labels: with labels that were chosen balanced from unbalanced
    rows, the model believes that rows are balanced.

    Time and memory of a step grow with the number of classes; a minibatch is taken in parts where all pairs of its rows
    and classes would be too many.

    References
    ----------
    Kingma, Rezende, Mohamed and Welling 2014, Semi-Supervised Learning with Deep Generative Models, arXiv:1406.5298.
    Maaløe, Sønderby, Sønderby and Winther 2016, Auxiliary Deep Generative Models, arXiv:1602.05473.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from vaefeat import VAEClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> few = np.where(np.arange(len(y)) < 100, y, -1)
    >>> classifier = VAEClassifier(image_shape=(1, 8, 8), max_epochs=1, random_state=0).fit(X, few)
    >>> classifier.predict_proba(X).shape, classifier.sample(y=3, n_samples=5).shape
    ((1797, 10), (5, 64))
    """

    model_: LabelledVAE
    input_: InputSpec
    n_iter_: int
    _built_with: dict[str, Any]

    def __init__(
        self,
        model: str = "m2",
        *,
        n_components: int = 16,
        auxiliary_dim: int = 32,
        encoder: str | PathLike[str] | Bundle | None = None,
        image_shape: tuple[int, int, int] | None = None,
        network: str = "auto",
        hidden_dims: tuple[int, ...] = (256,),
        channels: tuple[int, ...] = (32, 64),
        likelihood: str = "auto",
        model_options: Mapping[str, Any] | None = None,
        classification_weight: float = 50.0,
        consistency: float = 1.0,
        class_weight: Mapping[Any, float] | str | None = None,
        unlabelled: int | None = UNLABELLED,
        calibration: int | None = None,
        augmentations: str | tuple[str, ...] = "auto",
        max_epochs: int = 20,
        batch_size: int = 100,
        labelled_batch_size: int = 32,
        learning_rate: float = 2e-3,
        kl_warmup: float = 0.0,
        device: str = "auto",
        train_options: Mapping[str, Any] | None = None,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.n_components = n_components
        self.auxiliary_dim = auxiliary_dim
        self.encoder = encoder
        self.image_shape = image_shape
        self.network = network
        self.hidden_dims = hidden_dims
        self.channels = channels
        self.likelihood = likelihood
        self.model_options = model_options
        self.classification_weight = classification_weight
        self.consistency = consistency
        self.class_weight = class_weight
        self.unlabelled = unlabelled
        self.calibration = calibration
        self.augmentations = augmentations
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.labelled_batch_size = labelled_batch_size
        self.learning_rate = learning_rate
        self.kl_warmup = kl_warmup
        self.device = device
        self.train_options = train_options
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    @with_callbacks
    def fit(self, X: ArrayLike, y: ArrayLike, *, sample_weight: ArrayLike | None = None) -> Self:
        """Train on all rows, and on the labels that there are.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, C, H, W)
            uint8, or anything that becomes float32. At least two rows.
        y : array-like of shape (n,)
            Labels of at least two classes, and -1 for rows without one.
        sample_weight : array-like of shape (n,), optional
            How many copies of it a labelled row stands for, which are the same to the last bit; it need not be whole.
            A row without a label is left out where it is 0; what else it is does not matter.

        Raises
        ------
        InputError
            Rows that cannot be trained on, no labels, or labels of one class.
        ConfigError
            Settings that do not fit each other or the rows.
        TrainingError
            The objective became NaN or infinite.
        """
        goes_on = self.warm_start and hasattr(self, "model_")
        rows = training_rows(self, X, self.image_shape, reset=not goes_on)
        classes, targets = self._targets(rows, y, sample_weight)
        self._refuse_settings()
        encoder = None if self.encoder is None else _opened(self.encoder)
        if encoder is not None:
            rows = encoder.manifest.input.prepare(rows)
        built = self._built(rows, classes, encoder)
        if goes_on:
            refuse_other_model(self._built_with, built)
        with requiring("train", what="Training"):
            from vaefeat.classification import train_classifier
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        n_before, spec = self.n_iter_ if goes_on else 0, encoder.manifest.input if encoder else InputSpec.of(rows)

        temperature = self._temperature(rows, classes, targets)

        def fitted(model: LabelledVAE, n_epochs: int) -> dict[str, Any]:
            return {
                "model_": model,
                "input_": spec,
                "classes_": classes,
                "temperature_": temperature,
                "n_iter_": n_before + n_epochs,
            }

        tasks = FitTasks(self, "epoch", X=X, y=y, sample_weight=sample_weight)
        model, n_epochs = train_classifier(
            self.model,
            rows,
            targets,
            model=self._model_config(),
            train=self._train_config(seed),
            auxiliary_dim=self.auxiliary_dim,
            encoder=encoder,
            classification_weight=self.classification_weight,
            labelled_batch_size=self.labelled_batch_size,
            consistency=self.consistency,
            augmentations=self.augmentations,
            progress=self.verbose != 0,
            observer=ClassifierTasks(tasks, fitted),
            start=self.model_ if goes_on else None,
        )
        self._built_with = built
        tasks.finish(fitted(model, n_epochs))
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Give each class's probability, q(y|x), calibrated where that was asked for.

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            Columns in the order of ``classes_``.
        """
        rows = self._rows(X)
        from vaefeat.classification import class_probabilities

        probabilities = class_probabilities(self.model_, rows)
        return probabilities if self.temperature_ == 1 else tempered(probabilities, self.temperature_)

    def sample(self, y: Any = None, n_samples: int | None = None) -> NDArray[np.float32]:
        """Generate rows: draw a style from p(z), and decode it with a class.

        Draws follow `random_state`.

        Parameters
        ----------
        y : label or array-like of labels, optional
            One for all rows, or one for each; drawn from p(y) when None.
        n_samples : int, optional
            Number of rows; 1 when None, or as many as `y` has.

        Returns
        -------
        ndarray of shape (n_samples, n_features_in_), float32
            E[x|y, z], in the units of the training rows.

        Raises
        ------
        InputError
            A label that is none of ``classes_``, or another number of labels than of rows.
        """
        check_is_fitted(self)
        if n_samples is not None:
            check_int("n_samples", np.asarray(n_samples).item(), at_least=1)
        from vaefeat.classification import generate

        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        if y is None:
            shares = self.model_.log_prior_K.double().exp().numpy()
            codes = random.choice(len(self.classes_), size=n_samples or 1, p=shares / shares.sum())
        else:
            given = np.atleast_1d(np.asarray(y))
            if given.size == 0:
                raise InputError("got no label in y, wanted one for each row to make; leave y out to draw them")
            codes = self._codes(np.repeat(given, n_samples or 1) if given.size == 1 else given)
        if n_samples is not None and len(codes) != n_samples:
            raise InputError(
                f"got {len(codes)} labels for n_samples={n_samples}, wanted one label, or one for each row"
            )
        return self._flat(generate(self.model_, codes.astype(np.int64), seed=seed), n_axes=1)

    def analogies(self, X: ArrayLike, y: ArrayLike | None = None) -> NDArray[np.float32]:
        """Write each row in every class, in its own style.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, C, H, W)
        y : array-like of shape (n,), optional
            The rows' classes; predicted when None.

        Returns
        -------
        ndarray of shape (n, n_classes, n_features_in_), float32
            Classes in the order of ``classes_``, in the units of the training rows.
            :func:`vaefeat.plots.analogies` draws them.

        Raises
        ------
        InputError
            A label that is none of ``classes_``.
        """
        rows = self._rows(X)
        from vaefeat.classification import analogies

        codes = self._codes(np.asarray(self.predict(X) if y is None else y))
        check_consistent_length(rows, codes)
        return self._flat(analogies(self.model_, rows, codes), n_axes=2)

    def _rows(self, X: ArrayLike) -> NDArray[Any]:
        check_is_fitted(self)
        return self.input_.prepare(validate_data(self, flat_images(X, self.input_.shape), dtype="numeric", reset=False))

    def _codes(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        places = {label: place for place, label in enumerate(self.classes_.tolist())}
        if unknown := [label for label in labels.ravel().tolist() if label not in places]:
            raise InputError(f"got the label {unknown[0]!r}, wanted one of {self.classes_.tolist()}")
        return np.array([places[label] for label in labels.ravel().tolist()], dtype=np.int64)

    @staticmethod
    def _flat(rows: NDArray[np.float32], *, n_axes: int) -> NDArray[np.float32]:
        return rows.reshape(*rows.shape[:n_axes], -1)

    def _refuse_settings(self) -> None:
        for name in ("auxiliary_dim", "labelled_batch_size"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("classification_weight", "consistency"):
            check_number(name, getattr(self, name), at_least=0)
        if self.encoder is not None and self.model != "m1m2":
            raise ConfigError(
                f"got an encoder for model={self.model!r}, which has none below it; take model='m1m2', or leave it out"
            )
        for name in self.model_options or {}:
            if name in _FIXED:
                raise ConfigError(f"got {name!r} in model_options, which these models do not leave open; leave it out")
        for name in self.train_options or {}:
            if name not in _TRAIN_OPTIONS:
                raise unknown_name("train_options key", name, _TRAIN_OPTIONS)

    def _built(self, rows: NDArray[Any], classes: NDArray[Any], encoder: Bundle | None) -> dict[str, Any]:
        """Name everything that the weights are made for."""
        return {
            "model": self.model,
            "classes": classes.tolist(),
            "dtype of rows": str(rows.dtype),
            "encoder": encoder.digest if encoder else None,
            "auxiliary_dim": self.auxiliary_dim,
            **self._model_config().to_dict(),
        }

    def _model_config(self) -> ModelConfig:
        names = ("network", "hidden_dims", "channels", "likelihood")
        own = {"latent_dim": self.n_components, **{name: getattr(self, name) for name in names}}
        return ModelConfig.from_dict(plain_settings(own, self.model_options, what="model_options"))

    def _train_config(self, seed: int) -> TrainConfig:
        names = ("max_epochs", "batch_size", "learning_rate", "kl_warmup", "device")
        own = {"seed": seed, **{name: getattr(self, name) for name in names}}
        return TrainConfig.from_dict(plain_settings(own, self.train_options, what="train_options"))


def _opened(encoder: str | PathLike[str] | Bundle) -> Bundle:
    return encoder if isinstance(encoder, Bundle) else load_bundle(encoder)
