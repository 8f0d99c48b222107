"""Scikit-learn's own checks of an estimator, on FineTuneClassifier.

A bundle takes rows of one width, and the checks fit rows of many: the estimator under test pretrains a tiny encoder for
the rows it is given, and is FineTuneClassifier from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Self

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from vaefeat import Bundle, FineTuneClassifier, ModelConfig, TrainConfig, pretrain

TINY = ModelConfig(latent_dim=2, hidden_dims=(16,))


@cache
def tiny_bundle(width: int) -> Bundle:
    rows = np.random.default_rng(0).normal(size=(100, width)).astype(np.float32)
    return pretrain(rows, model=TINY, train=TrainConfig(max_epochs=1), progress=False)


class AnyWidthClassifier(FineTuneClassifier):
    """FineTuneClassifier with a bundle of its own for each width of rows."""

    def __init__(
        self,
        bundle: Any = None,
        *,
        max_steps: int = 40,
        unfreezing: float = 0.05,
        class_weight: Any = None,
        unlabelled: int | None = None,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            bundle,
            max_steps=max_steps,
            unfreezing=unfreezing,
            class_weight=class_weight,
            unlabelled=unlabelled,
            random_state=random_state,
            batch_size=32,
        )

    def fit(self, X: Any, y: Any, *, sample_weight: Any = None) -> Self:
        given, shape = self.bundle, np.asarray(X).shape
        # What has no rows, or no columns, is refused whatever the bundle.
        self.bundle = tiny_bundle(shape[1] if len(shape) == 2 and shape[1] else 4)
        try:
            return super().fit(X, y, sample_weight=sample_weight)
        finally:
            self.bundle = given


# One of the checks has a class -1.
@parametrize_with_checks(  # type: ignore[untyped-decorator]  # sklearn has no types
    [AnyWidthClassifier(unlabelled=None, random_state=0)], xfail_strict=True
)
@pytest.mark.filterwarnings("ignore:A column-vector y was passed:UserWarning")
def test_classifier_passes_the_estimator_check(estimator: AnyWidthClassifier, check: Callable[[Any], None]) -> None:
    check(estimator)
