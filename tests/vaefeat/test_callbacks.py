"""scikit-learn's callbacks on the estimators that train: who is told what, who may end it, and that none changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.callback import ProgressBar, ScoringMonitor
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from vaefeat import FineTuneClassifier, VAEClassifier, VAETransformer

Y: NDArray[np.int64] = load_digits().target[:300]
KINDS = ["transformer", "fine-tuning", "generative"]


@pytest.fixture(scope="module")
def X(digits_rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return digits_rows[:300].reshape(300, -1)


@pytest.fixture(params=KINDS)
def estimator(request: pytest.FixtureRequest, digits_bundle: Path) -> Any:
    """Give an estimator whose fit has four tasks."""
    settings: dict[str, Any] = {"hidden_dims": (16,), "max_epochs": 4, "random_state": 0}
    if request.param == "transformer":
        return VAETransformer(4, batch_size=64, **settings)
    if request.param == "generative":
        return VAEClassifier(n_components=4, batch_size=64, **settings)
    return FineTuneClassifier(digits_bundle, max_steps=200, batch_size=16, patience=None, random_state=0)


def answers(estimator: Any, X: NDArray[np.uint8]) -> NDArray[Any]:
    given: NDArray[Any] = estimator.transform(X) if hasattr(estimator, "transform") else estimator.predict_proba(X)
    return given


class Diary:
    """Writes down what it is told, keeps the estimators that it is shown, and may say stop."""

    def __init__(self, *, stop_after: int = 99) -> None:
        self.lines: list[str] = []
        self.seen: list[Any] = []
        self.stop_after = stop_after

    def setup(self, estimator: Any, context: Any) -> None:
        self.lines.append("setup")

    def teardown(self, estimator: Any, context: Any) -> None:
        self.lines.append("teardown")

    def on_fit_task_begin(self, estimator: Any, context: Any) -> None:
        self.lines.append(f"{context.task_name} {context.task_id} of {context.max_subtasks} begins")

    def on_fit_task_end(self, estimator: Any, context: Any, *, fitted_estimator: Any) -> bool:
        self.lines.append(f"{context.task_name} {context.task_id} ends")
        self.seen.append(fitted_estimator)
        return len(self.seen) >= self.stop_after


def test_callback_is_told_of_every_task_and_shown_what_fit_would_leave(estimator: Any, X: NDArray[np.uint8]) -> None:
    alone, diary = clone(estimator).fit(X, Y), Diary()
    told = estimator.set_callbacks(diary).fit(X, Y)
    np.testing.assert_array_equal(answers(told, X), answers(alone, X))
    name = "steps" if isinstance(estimator, FineTuneClassifier) else "epoch"
    tasks = [line for task in range(4) for line in (f"{name} {task} of 0 begins", f"{name} {task} ends")]
    assert diary.lines == ["setup", "fit 0 of 4 begins", *tasks, "fit 0 ends", "teardown"]
    assert [seen.n_iter_ for seen in diary.seen[:4]] == [told.n_iter_ * (task + 1) // 4 for task in range(4)]
    for last in diary.seen[-2:]:
        np.testing.assert_array_equal(answers(last, X), answers(alone, X))
    assert not np.array_equal(answers(diary.seen[0], X), answers(alone, X))


def test_callback_that_says_stop_ends_training_with_what_it_was_shown(estimator: Any, X: NDArray[np.uint8]) -> None:
    diary = Diary(stop_after=2)
    stopped = estimator.set_callbacks(diary).fit(X, Y)
    assert [line for line in diary.lines if "ends" in line][-1] == "fit 0 ends"
    assert len(diary.seen) == 3
    assert stopped.n_iter_ == (100 if isinstance(estimator, FineTuneClassifier) else 2)
    np.testing.assert_array_equal(answers(stopped, X), answers(diary.seen[1], X))


def test_scoring_monitor_has_a_score_for_each_task_and_changes_nothing(estimator: Any, X: NDArray[np.uint8]) -> None:
    # scoring=None, an estimator's own score, fails in scikit-learn 1.9.1 with any estimator.
    monitor = ScoringMonitor(scoring={"score": lambda fitted, X, y: fitted.score(X, y)})
    alone = clone(estimator).fit(X, Y)
    estimator.set_callbacks(monitor).fit(X, Y)
    scores = {(row["task_name"], row["task_id"]): row["score"] for row in monitor.get_logs().data}
    assert len(scores) == 5
    name = "steps" if isinstance(estimator, FineTuneClassifier) else "epoch"
    assert scores[name, 3] == scores["fit", 0] == alone.score(X, Y)
    assert scores[name, 0] != scores[name, 3]
    np.testing.assert_array_equal(answers(estimator, X), answers(alone, X))


def test_progress_bar_of_a_pipeline_shows_the_epochs_inside(
    X: NDArray[np.uint8], capsys: pytest.CaptureFixture[str]
) -> None:
    features = VAETransformer(4, hidden_dims=(16,), max_epochs=2, random_state=0)
    pipe = make_pipeline(FunctionTransformer(), features).set_callbacks(ProgressBar(max_propagation_depth=None))
    with pytest.warns(UserWarning, match="FunctionTransformer does not support callbacks"):
        pipe.fit(X)
    assert "VAETransformer" in capsys.readouterr().out


def test_callback_is_torn_down_where_fit_fails(estimator: Any, X: NDArray[np.uint8]) -> None:
    class Failing(Diary):
        def on_fit_task_end(self, estimator: Any, context: Any, *, fitted_estimator: Any) -> bool:
            raise RuntimeError("nothing to see")

    diary = Failing()
    with pytest.raises(RuntimeError, match="nothing to see"):
        estimator.set_callbacks(diary).fit(X, Y)
    assert diary.lines[-1] == "teardown"
    assert not hasattr(estimator, "n_iter_")
