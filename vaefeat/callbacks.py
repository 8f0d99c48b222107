"""scikit-learn's callbacks, told of the epochs of a fit, and heard when they want it to end.

Experimental in scikit-learn 1.9, and so here: ``sklearn.callback``, and its developers' guide on callback support.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from numpy.typing import ArrayLike
from sklearn import callback
from sklearn.base import BaseEstimator

from vaefeat.bundle import Bundle
from vaefeat.observers import EpochRecord, Observer, TaskObserver

__all__ = ["ClassifierTasks", "EpochTasks", "FitTasks", "with_callbacks"]


_Method = TypeVar("_Method", bound=Callable[..., Any])


def with_callbacks(fit: _Method) -> _Method:
    """Close the callbacks down after `fit`, whatever happened in it; scikit-learn's decorator, with types."""
    managed: _Method = callback.with_callbacks(fit)
    return managed


class FitTasks:
    """The tasks of one fit, in order; each is begun and ended, and the fit itself with them.

    Parameters
    ----------
    estimator : BaseEstimator
        With :class:`sklearn.callback.CallbackSupportMixin`, inside a method ``with_callbacks``.
    name : str
        Of a task: ``epoch``.
    X, y : array-like
        What `fit` was given, for callbacks that score.
    sample_weight : array-like, optional
    """

    def __init__(
        self, estimator: BaseEstimator, name: str, *, X: ArrayLike, y: Any = None, sample_weight: Any = None
    ) -> None:
        self._estimator, self._name = estimator, name
        self._data = {
            "X": X,
            "y": y,
            "metadata": None if sample_weight is None else {"sample_weight": sample_weight},
        }
        self._fit: Any = None
        self._task: Any = None

    def start(self, n_tasks: int) -> None:
        """Say that there will be `n_tasks` at most."""
        self._fit = self._estimator._init_callback_context(max_subtasks=n_tasks)
        self._fit.call_on_fit_task_begin(estimator=self._estimator, **self._data)

    def begin(self) -> None:
        """Say that the next task begins."""
        self._task = self._fit.subcontext(task_name=self._name)
        self._task.call_on_fit_task_begin(estimator=self._estimator, **self._data)

    def end(self, fitted: Callable[[], Mapping[str, Any]]) -> bool:
        """Say that the task is over, and hear whether it shall be the last.

        Parameters
        ----------
        fitted : callable
            Gives the attributes that the estimator would have if fit ended here; called if a callback looks at it.
        """
        stop: bool = self._task.call_on_fit_task_end(
            estimator=self._estimator, reconstruction_attributes=fitted, **self._data
        )
        return stop

    def finish(self, fitted: Mapping[str, Any]) -> None:
        """Give the estimator the attributes that it has now, and say that the fit is over."""
        vars(self._estimator).update(fitted)
        self._fit.call_on_fit_task_end(estimator=self._estimator, reconstruction_attributes=fitted, **self._data)


class EpochTasks(Observer):
    """Makes tasks of the epochs of an encoder's training.

    Parameters
    ----------
    tasks : FitTasks
    fitted : callable
        Gives an estimator's attributes for a bundle and the number of epochs.
    """

    def __init__(self, tasks: FitTasks, fitted: Callable[[Bundle, int], Mapping[str, Any]]) -> None:
        self._tasks, self._fitted = tasks, fitted

    def on_model(self, export: Callable[[], Bundle]) -> None:
        """Remember how to make a bundle."""
        self._export = export

    def on_start(self, *, epochs: int, steps_per_epoch: int, epoch: int) -> None:
        """Begin the fit."""
        self._tasks.start(epochs)

    def on_epoch_start(self, *, epoch: int) -> None:
        """Begin a task."""
        self._tasks.begin()

    def on_epoch(self, record: EpochRecord) -> bool:
        """End it."""
        return self._tasks.end(lambda: self._fitted(self._export(), record.epoch))


class ClassifierTasks(TaskObserver):
    """Makes tasks of the parts of a classifier's training.

    Parameters
    ----------
    tasks : FitTasks
    fitted : callable
        Gives an estimator's attributes for the model and how much of its training is done.
    """

    def __init__(self, tasks: FitTasks, fitted: Callable[[Any, int], Mapping[str, Any]]) -> None:
        self._tasks, self._fitted = tasks, fitted

    def on_start(self, *, n_tasks: int) -> None:
        """Begin the fit."""
        self._tasks.start(n_tasks)

    def on_task_start(self) -> None:
        """Begin a task."""
        self._tasks.begin()

    def on_task(self, now: Callable[[], Any], *, n_done: int) -> bool:
        """End it."""
        return self._tasks.end(lambda: self._fitted(now(), n_done))
