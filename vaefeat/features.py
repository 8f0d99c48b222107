"""What scikit-learn transformers around an encoder share, and the one that serves an encoder trained before."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import assert_all_finite
from sklearn.utils.validation import check_is_fitted

from vaefeat.bundle import Bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import InputError
from vaefeat.estimator_inputs import checked_rows, taking_tables
from vaefeat.remote import RemoteEncoder

if TYPE_CHECKING:
    from sklearn.utils import Tags

__all__ = ["Features", "VAEFeatures"]


class Features(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """What both transformers share: an ``encoder_`` to ask, and float32 out."""

    encoder_: OnnxEncoder | RemoteEncoder
    _output = "mean"

    def transform(self, X: ArrayLike) -> NDArray[np.float32]:
        """Encode rows.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, C, H, W), or data frame

        Returns
        -------
        ndarray of shape (n, n_features_out), float32
        """
        check_is_fitted(self)
        spec = self.encoder_.input
        # The encoder finds NaN and infinity while it converts: looking for them here, too, is one more pass over X.
        rows = checked_rows(self, X, spec, reset=False, finite=False)
        try:
            return self.encoder_.embed(rows, output=self._output)
        except InputError as error:
            refusal = error
        if spec.table is None:
            # Scikit-learn has words of its own for these.
            assert_all_finite(rows, estimator_name=type(self).__name__, input_name="X")
        raise refusal

    @property
    def _n_features_out(self) -> int:
        return self.encoder_.outputs[self._output]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


class VAEFeatures(Features):
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
        X : array-like of shape (n, n_features) or (n, C, H, W), or data frame
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
        rows = checked_rows(self, X, encoder.input, reset=True)
        encoder.input.prepare(rows[:1])
        if self.output not in encoder.outputs:
            raise InputError(f"got output={self.output!r}, wanted one of {sorted(encoder.outputs)}")
        self.encoder_ = encoder
        self.digest_: str = encoder.digest
        self._output = self.output
        return self

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        # Of a path or an address nothing is known before it is opened.
        known = getattr(self, "encoder_", self.encoder)
        spec = known.manifest.input if isinstance(known, Bundle) else getattr(known, "input", None)
        return tags if spec is None or spec.table is None else taking_tables(tags)

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
