"""A scikit-learn classifier from a pretrained encoder and few labels.

It imports torch only in ``fit``: predictions run on ONNX Runtime, so a fitted classifier, its pickle and its bundle
give the same numbers where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from vaefeat.bundle import Bundle, load_bundle
from vaefeat.callbacks import ClassifierTasks, FitTasks, with_callbacks
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import requiring
from vaefeat.estimator_inputs import checked_rows, named_augmentations
from vaefeat.finetune_config import FineTuneConfig
from vaefeat.labels import UNLABELLED, class_names, class_shares, given_shares
from vaefeat.model_card import renamed
from vaefeat.partly_labelled import PartlyLabelledClassifier
from vaefeat.settings import plain_value, refuse_other_model
from vaefeat.table_columns import column_names

__all__ = ["FineTuneClassifier"]

#: What `augmentations="auto"` takes: of images by their channels, of tables by what they hold.
_AUTO_IMAGE = ("affine", "brightness", "erasing")
_AUTO_COLOUR = (*_AUTO_IMAGE, "crop", "flip", "color")
_AUTO_TABLE = ("replacement",)


class FineTuneClassifier(PartlyLabelledClassifier):
    """Train a pretrained encoder and a linear head together, on few labelled rows and many unlabelled ones.

    A teacher, the moving average of the weights, labels weakly changed views of the unlabelled rows; the classifier
    learns those labels that are trusted on strongly changed views (FixMatch, Mean Teacher, FreeMatch, with ReMixMatch's
    alignment of class shares). Without unlabelled rows it is plain fine-tuning. No label is spent on deciding when to
    stop. ``docs/finetuning.md`` says more.

    Parameters
    ----------
    bundle : path-like or Bundle
        The pretrained encoder, or a classifier to fine-tune further. A constructor argument, so that
        :func:`sklearn.base.clone` and searches keep it.
    max_steps : int
    batch_size : int
    unlabelled_ratio : float
    learning_rate, layer_decay, weight_decay : float
    unfreezing : float
    unlabelled_weight : float
    elbo_weight : float
        With 0 the bundle has no decoder: the pretrained one does not know what the encoder now says.
    teacher_decay : float
        See :class:`vaefeat.finetune_config.FineTuneConfig`.
    augmentations : {"auto"} or tuple of str
        Changes that leave a row's class alone, keys of :data:`vaefeat.model.augmentation.IMAGE_AUGMENTATIONS` or, for
        tables, of :data:`~vaefeat.model.augmentation.TABLE_AUGMENTATIONS`. ``auto`` takes those that the bundle was
        pretrained with, which its rows decided. Where there are none, it moves and brightens images and erases parts of
        them; those of three channels are also cropped and mirrored and get other colours. For tables it takes values
        from other rows. Name them where mirror images, say, are of another class.
    strength : float
        Of these changes.
    class_shares : array-like of shape (n_classes,), optional
        Share of each class, sorted, among the unlabelled rows. When None: equal shares, or those among the labelled
        rows where these are too unlike for chance.
    class_weight : mapping of labels to weights, "balanced" or None
        Of each class's labels in the loss, times `sample_weight`. ``balanced`` makes all classes weigh alike.
    unlabelled : int or None
        The number that stands in `y` for a missing label, beside None and NaN. None where each number is a class: with
        labels -1 and 1, say.
    calibration : int, optional
        Into how many folds the labelled rows are cut, at least 2, to find a temperature that probabilities are
        calibrated by: a copy is fitted without each fold, and asked for it, so that fitting takes as many times longer.
        None takes probabilities as they come. Labels stay what they are. ``docs/sklearn.md`` says when it helps.
    patience : int or None
        Checks, every 50 steps, at which the answers must have stayed the same before training ends early; None never
        ends it early.
    random_state : int, RandomState or None
        The same number, rows and machine give the same classifier.
    device : {"auto", "cpu", "cuda"}
        Where it is trained; predictions run on the CPU when that is asked for, else on a GPU where there is one.
    threads : int, optional
        Processor threads, in training and in predictions; None takes what suits the work.
    warm_start : bool
        Go on from the fitted encoder and head when fitted again, with the same bundle and classes; schedules begin
        anew, and steps add up.
    precision : {"auto", "float32", "bfloat16"}
        Of the networks that learn; ``auto`` takes bfloat16 in longer runs where it is measured to be faster. What is
        exported is float32.
    verbose : int
        Show a progress bar if not 0.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    bundle_ : Bundle
        The classifier as a bundle, in memory; :meth:`save_bundle` writes it.
    encoder_ : OnnxEncoder
    temperature_ : float
        What logits were divided by; 1 without `calibration`.
    n_iter_ : int
        Steps taken.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Where `X` had column names.

    References
    ----------
    Sohn et al. 2020, FixMatch, arXiv:2001.07685. Tarvainen and Valpola 2017, Mean Teacher, arXiv:1703.01780. Wang et
    al. 2023, FreeMatch, arXiv:2205.07246. Berthelot et al. 2020, ReMixMatch, arXiv:1911.09785. Kumar et al. 2022,
    arXiv:2202.10054 (the head first). Howard and Ruder 2018, ULMFiT, arXiv:1801.06146 (layers join one by one).

    Examples
    --------
    >>> import numpy as np
    >>> from vaefeat import FineTuneClassifier
    >>> y = np.where(np.arange(len(X)) < 100, y, -1)  # doctest: +SKIP
    >>> FineTuneClassifier("runs/digits").fit(X, y).predict(X_new)  # doctest: +SKIP
    """

    bundle_: Bundle
    encoder_: OnnxEncoder
    n_iter_: int
    _origin: str

    def __init__(
        self,
        bundle: str | PathLike[str] | Bundle,
        *,
        max_steps: int = 3000,
        batch_size: int = 64,
        unlabelled_ratio: float = 4.0,
        learning_rate: float = 2e-3,
        layer_decay: float = 0.8,
        weight_decay: float = 1e-2,
        unfreezing: float = 0.05,
        unlabelled_weight: float = 1.0,
        elbo_weight: float = 0.0,
        teacher_decay: float = 0.99,
        augmentations: str | tuple[str, ...] = "auto",
        strength: float = 1.0,
        class_shares: ArrayLike | None = None,
        class_weight: Mapping[Any, float] | str | None = None,
        unlabelled: int | None = UNLABELLED,
        calibration: int | None = None,
        patience: int | None = 3,
        random_state: int | np.random.RandomState | None = None,
        device: str = "auto",
        threads: int | None = None,
        precision: str = "auto",
        warm_start: bool = False,
        verbose: int = 0,
    ) -> None:
        self.bundle = bundle
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.unlabelled_ratio = unlabelled_ratio
        self.learning_rate = learning_rate
        self.layer_decay = layer_decay
        self.weight_decay = weight_decay
        self.unfreezing = unfreezing
        self.unlabelled_weight = unlabelled_weight
        self.elbo_weight = elbo_weight
        self.teacher_decay = teacher_decay
        self.augmentations = augmentations
        self.strength = strength
        self.class_shares = class_shares
        self.class_weight = class_weight
        self.unlabelled = unlabelled
        self.calibration = calibration
        self.patience = patience
        self.random_state = random_state
        self.device = device
        self.threads = threads
        self.precision = precision
        self.warm_start = warm_start
        self.verbose = verbose

    @with_callbacks
    def fit(self, X: ArrayLike, y: ArrayLike, *, sample_weight: ArrayLike | None = None) -> Self:
        """Train on labelled and unlabelled rows.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, C, H, W)
            Rows as the bundle takes them.
        y : array-like of shape (n,)
            -1, None or NaN where a row has no label. With strings, give an array of dtype object:
            ``np.array(["cat", "dog", -1], dtype=object)``.
        sample_weight : array-like of shape (n,), optional
            How many copies of it a labelled row stands for, which are the same to the last bit; it need not be whole.
            A row without a label is left out where it is 0; what else it is does not matter.

        Raises
        ------
        InputError
            Rows that the bundle does not take, fewer than two labelled classes, or impossible settings.
        BundleError, DeviceError
            The bundle cannot be loaded, or there is no such device.
        MissingExtraError
            torch is not installed.
        """
        base = self.bundle if isinstance(self.bundle, Bundle) else load_bundle(self.bundle)
        goes_on = self.warm_start and hasattr(self, "bundle_")
        rows = self._rows(X, base, reset=not goes_on)
        classes, targets = self._targets(rows, y, sample_weight)
        if goes_on:
            has = {"bundle": self._origin, "classes": self.classes_.tolist()}
            refuse_other_model(has, {"bundle": base.digest, "classes": classes.tolist()})
        names, shares = class_names(classes), self._shares(targets.class_counts())
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        config = self._config(base, seed)
        with requiring("train", what="FineTuneClassifier"):
            from vaefeat.finetuned import fine_tune
        n_before = self.n_iter_ if goes_on else 0
        temperature = self._temperature(rows, classes, targets)

        def fitted(bundle: Bundle, n_steps: int) -> dict[str, Any]:
            # Not the device of training, which another machine may lack; but who asks for the CPU means all of it.
            device = "cpu" if self.device == "cpu" else "auto"
            encoder = OnnxEncoder(bundle, device=device, threads=config.threads)
            return {
                "bundle_": bundle,
                "encoder_": encoder,
                "classes_": classes,
                "temperature_": temperature,
                "n_iter_": n_before + n_steps,
            }

        tasks = FitTasks(self, "steps", X=X, y=y, sample_weight=sample_weight)
        bundle, n_steps = fine_tune(
            self.bundle_ if goes_on else base,
            rows,
            targets,
            classes=names,
            shares=shares,
            config=config,
            columns=column_names(X),
            temperature=temperature,
            progress=self.verbose != 0,
            goes_on=goes_on,
            observer=ClassifierTasks(tasks, fitted),
        )
        self._origin = base.digest
        tasks.finish(fitted(bundle, n_steps))
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float32]:
        """Give the probability of each class.

        Returns
        -------
        ndarray of shape (n, n_classes), float32
            In the order of ``classes_``; what the bundle gives as ``output="probability"`` wherever it is served.
        """
        check_is_fitted(self)
        return self.encoder_.embed(self._rows(X, self.bundle_, reset=False), output="probability")

    def save_bundle(self, path: str | PathLike[str], *, name: str | None = None) -> Bundle:
        """Write the bundle to a folder, for the service and for :class:`vaefeat.VAEFeatures`.

        Parameters
        ----------
        path : path-like
        name : str, optional
            The model's name in a service; that of the pretrained bundle with ``-classifier`` behind it when None.

        Returns
        -------
        Bundle
            Loaded back and verified.
        """
        check_is_fitted(self)
        return (self.bundle_ if name is None else renamed(self.bundle_, name)).save(path)

    def _rows(self, X: ArrayLike, bundle: Bundle, *, reset: bool) -> NDArray[Any]:
        spec = bundle.manifest.input
        return spec.prepare(checked_rows(self, X, spec, reset=reset))

    def _shares(self, counts_K: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.class_shares is None:
            return class_shares(counts_K)
        return given_shares(self.class_shares, len(counts_K))

    def _config(self, base: Bundle, seed: int) -> FineTuneConfig:
        own = FineTuneConfig.__dataclass_fields__.keys() - {"augmentations", "seed"}
        values = {name: plain_value(getattr(self, name)) for name in own}
        return FineTuneConfig(**values, augmentations=self._augmentations(base), seed=seed)

    def _augmentations(self, base: Bundle) -> tuple[str, ...]:
        image = base.manifest.input.kind == "image"
        # Ids, unlike pixels, have no values in between.
        moving = image and base.manifest.model["likelihood"] != "tokens"
        if self.augmentations == "auto":
            pretrained = base.manifest.train
            if pretrained["objective"] == "contrastive" and isinstance(pretrained["augmentations"], list):
                return tuple(pretrained["augmentations"])
            colour = moving and base.manifest.input.shape[0] == 3
            return _AUTO_COLOUR if colour else _AUTO_IMAGE if moving else _AUTO_TABLE
        return named_augmentations(self.augmentations)
