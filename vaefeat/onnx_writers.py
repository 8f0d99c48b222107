"""Fitted steps of scikit-learn as operators of ONNX.

skl2onnx translates what it was measured to translate exactly; the rest is written here. Every step takes and gives
float32, as scikit-learn's do with features of float32, and computes in between as scikit-learn does: in float64, or
in float32 where it does. Dividing in another order, or multiplying by a reciprocal, would move values across the
thresholds of trees.

References
----------
https://onnx.ai/sklearn-onnx (version 1.20); the modules of scikit-learn 1.9 that are named below.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import onnx
import skl2onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, PowerTransformer, RobustScaler, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from vaefeat.errors import ExportError
from vaefeat.onnx_graph import DOUBLE, ML_OPSET, SINGLE, GraphBuilder
from vaefeat.onnx_steps import fitted_steps
from vaefeat.temperature import LEAST_PROBABILITY

__all__ = ["write_best", "write_classifier", "write_temperature", "write_transformer"]

#: skl2onnx writes graphs that do not fit together for these from float64.
_SINGLE_ONLY = (PowerTransformer,)
#: Of these two classes are often as probable as each other, half of the trees being for either.
_TREES = (DecisionTreeClassifier, ExtraTreesClassifier, RandomForestClassifier)
#: Probabilities of trees are told apart in so many steps: sums of float32 differ in the last bits.
_STEPS = 2.0**20
#: What temperature scaling adds before it takes a logarithm (sklearn/calibration.py).
_TINY = 1e-12
_BRANCHES = ("treeids", "nodeids", "featureids", "modes", "truenodeids", "falsenodeids")


def write_transformer(graph: GraphBuilder, step: Any, x: str) -> str:
    """Write a transformer: from features `x`, float32 of shape (n, F), to its output, float32.

    Raises
    ------
    ExportError
        skl2onnx cannot translate it.
    """
    if type(step) is StandardScaler:
        # In float32, with constants of float32 (sklearn/preprocessing/_data.py).
        centred = graph("Sub", x, _single(step.mean_)) if step.with_mean else x
        return graph("Div", centred, _single(step.scale_)) if step.with_std else centred
    if type(step) in (MaxAbsScaler, MinMaxScaler, RobustScaler):
        for op, values in _in_place(step):
            x = graph("Cast", graph(op, graph("Cast", x, to=DOUBLE), values.astype(np.float64)), to=SINGLE)
        if type(step) is MinMaxScaler and step.clip:
            x = graph("Clip", x, *(np.array(bound, np.float32) for bound in step.feature_range))
        return x
    (y,) = _translated(graph, step, x)
    return graph("Cast", y, to=SINGLE)


def write_classifier(graph: GraphBuilder, step: Any, x: str) -> tuple[str, str]:
    """Write a classifier: from features `x` to labels (n,), int64 or string, and probabilities (n, K), float32.

    Raises
    ------
    ExportError
        skl2onnx cannot translate it.
    """
    if type(step) in (CalibratedClassifierCV, HistGradientBoostingClassifier, KNeighborsClassifier):
        probabilities = _probabilities(graph, step, x)
        label = write_best(graph, probabilities, step.classes_)
    else:
        label, probabilities = _translated(graph, _with_wide_classes(step), x)
        label = graph("Reshape", label, np.array([-1]))
        if type(step) in _TREES:
            # ONNX Runtime takes the second of two equals, scikit-learn the first.
            steps = graph("Mul", graph("Cast", probabilities, to=SINGLE), np.array(_STEPS, np.float32))
            label = write_best(graph, graph("Round", steps), step.classes_)
    return label, graph("Cast", probabilities, to=SINGLE)


def write_best(graph: GraphBuilder, probabilities: str, classes: NDArray[Any]) -> str:
    """Write the label (n,) of the largest probability, the first of equals."""
    values = classes.astype(object if classes.dtype.kind in "OU" else np.int64)
    return graph("Gather", values, graph("ArgMax", probabilities, axis=1, keepdims=0))


def _with_wide_classes(step: Any) -> Any:
    """Give labels of uint8, as images often have, the type that ONNX has for whole numbers."""
    wide = copy.copy(step)
    if step.classes_.dtype.kind in "iu":
        wide.classes_ = step.classes_.astype(np.int64)
    return wide


def write_temperature(graph: GraphBuilder, probabilities: str, temperature: float) -> str:
    """Write what :func:`vaefeat.temperature.tempered` does to probabilities (n, K), float32."""
    bounded = graph("Max", graph("Cast", probabilities, to=DOUBLE), np.array(LEAST_PROBABILITY))
    return graph("Cast", _softmax(graph, graph("Div", graph("Log", bounded), np.array(temperature))), to=SINGLE)


def _in_place(step: Any) -> list[tuple[str, NDArray[Any]]]:
    """Give a scaler's operations. Each is one of NumPy's on float32 in place: in float64, rounded."""
    if type(step) is MinMaxScaler:
        return [("Mul", step.scale_), ("Add", step.min_)]
    if type(step) is MaxAbsScaler:
        return [("Div", step.scale_)]
    centring = [("Sub", step.center_)] if step.with_centering else []
    return [*centring, *([("Div", step.scale_)] if step.with_scaling else [])]


def _translated(graph: GraphBuilder, step: Any, x: str, **options: Any) -> list[str]:
    """Let skl2onnx translate; in float64, of which nothing is lost before the end."""
    single = type(step) in _SINGLE_ONLY
    tensor = (FloatTensorType if single else DoubleTensorType)([None, step.n_features_in_])
    if hasattr(step, "classes_"):
        options["zipmap"] = False
    try:
        with warnings.catch_warnings():
            # It reads attributes that scikit-learn is about to remove, and says so for each.
            warnings.simplefilter("ignore")
            model: onnx.ModelProto = skl2onnx.to_onnx(
                step,
                initial_types=[("x", tensor)],
                target_opset={"": graph.opset, "ai.onnx.ml": ML_OPSET},
                options={id(step): options},
            )
    except Exception as error:  # whatever a converter fails with
        raise ExportError(
            f"skl2onnx {skl2onnx.__version__} cannot translate this {type(step).__name__} ({error}); nothing was "
            "written. Take other settings, or another estimator"
        ) from error
    return graph.include(model, x if single else graph("Cast", x, to=DOUBLE))


def _probabilities(graph: GraphBuilder, step: Any, x: str) -> str:
    """Write probabilities (n, K), float64."""
    if type(step) is HistGradientBoostingClassifier:
        scores = _boosted_scores(graph, step, x)
        return _two_sided(graph, graph("Sigmoid", scores)) if len(step.classes_) == 2 else _softmax(graph, scores)
    if type(step) is CalibratedClassifierCV:
        parts = [_calibrated(graph, part, x) for part in step.calibrated_classifiers_]
        total = parts[0] if len(parts) == 1 else graph("Sum", *parts)
        return graph("Div", total, np.array(float(len(parts))))
    if type(step) is KNeighborsClassifier:
        return _neighbours(graph, step, x)
    _, probabilities = _translated(graph, step, x)
    return graph("Cast", probabilities, to=DOUBLE)


def _neighbours(graph: GraphBuilder, step: KNeighborsClassifier, x: str) -> str:
    """Write the classes of the nearest fitted rows, weighted, as shares (sklearn/neighbors/_base.py, _get_weights).

    skl2onnx finds the rows; its own classifier is up to 0.9 off with ``weights="distance"``.
    """
    finder = NearestNeighbors(n_neighbors=step.n_neighbors, radius=None).fit(step._fit_X)
    places, distances = _translated(graph, finder, x)
    of_fitted = np.eye(len(step.classes_))[step._y]
    votes = graph("Gather", of_fitted, places)
    if step.weights == "distance":
        distances = graph("Unsqueeze", graph("Abs", graph("Cast", distances, to=DOUBLE)), np.array([2]))
        here = graph("Cast", graph("Equal", distances, np.array(0.0)), to=DOUBLE)
        # Fitted rows that the row is equal to are the only ones that count.
        weights = graph(
            "Where",
            graph("Cast", graph("ReduceMax", here, np.array([1])), to=onnx.TensorProto.BOOL),
            here,
            graph("Div", np.array(1.0), distances),
        )
        votes = graph("Mul", votes, weights)
    counted = graph("ReduceSum", votes, np.array([1]), keepdims=0)
    return graph("Div", counted, graph("ReduceSum", counted, np.array([1]), keepdims=1))


def _scores(graph: GraphBuilder, step: Any, x: str) -> str:
    """Write the decision function, or else the probabilities, float64: (n, K), of two classes (n, 1) of the second."""
    if type(step) is LogisticRegression:
        product = graph("MatMul", graph("Cast", x, to=DOUBLE), step.coef_.T.astype(np.float64))
        return graph("Add", product, step.intercept_.astype(np.float64))
    if type(step) is HistGradientBoostingClassifier:
        return _boosted_scores(graph, step, x)
    if type(step) is SVC:
        bare = copy.copy(step)  # with probabilities, skl2onnx gives those
        bare.probability, bare._probA, bare._probB = False, np.empty(0), np.empty(0)
        _, wide = _translated(graph, bare, x, raw_scores=True)
        wide = graph("Cast", wide, to=DOUBLE)
    else:
        wide = _probabilities(graph, step, x)
    return graph("Gather", wide, np.array([1]), axis=1) if len(step.classes_) == 2 else wide


def _calibrated(graph: GraphBuilder, part: Any, x: str) -> str:
    """Write one of the classifiers that a :class:`CalibratedClassifierCV` averages (sklearn/calibration.py)."""
    *before, (_, last) = fitted_steps([("estimator", part.estimator)], calibrated=True)
    for _, step in before:
        x = write_transformer(graph, step, x)
    scores, n_classes = _scores(graph, last, x), len(part.classes)
    if part.method == "temperature":
        decides = hasattr(last, "decision_function")
        if n_classes == 2:
            scores = graph("Concat", graph("Neg", scores), scores, axis=1) if decides else _two_sided(graph, scores)
        logits = scores if decides else graph("Log", graph("Add", scores, np.array(_TINY)))
        return _softmax(graph, graph("Mul", logits, np.array(float(part.calibrators[0].beta_))))
    columns = [
        _calibrated_column(graph, calibrator, graph("Gather", scores, np.array([column]), axis=1))
        for column, calibrator in enumerate(part.calibrators)
    ]
    if n_classes == 2:
        return _two_sided(graph, columns[0])
    # A fold may have had fewer classes; the others' probability is 0 there. Of two there is one column, which
    # scikit-learn takes for the first's.
    placed = np.zeros((len(columns), n_classes))
    placed[np.arange(len(columns)), np.searchsorted(part.classes, last.classes_[: len(columns)])] = 1.0
    wide = graph("MatMul", graph("Concat", *columns, axis=1), placed)
    total = graph("ReduceSum", wide, np.array([1]), keepdims=1)
    nothing = graph("Equal", total, np.array(0.0))
    return graph("Where", nothing, np.full((1, n_classes), 1 / n_classes), graph("Div", wide, total))


def _calibrated_column(graph: GraphBuilder, calibrator: Any, t: str) -> str:
    """Write one class's calibration, (n, 1) float64: Platt's sigmoid, or the steps of an isotonic regression."""
    if not isinstance(calibrator, IsotonicRegression):
        linear = graph("Add", graph("Mul", t, np.array(float(calibrator.a_))), np.array(float(calibrator.b_)))
        return graph("Sigmoid", graph("Neg", linear))
    knots = calibrator.X_thresholds_.astype(np.float64)
    values = calibrator.y_thresholds_.astype(np.float64)
    if len(knots) == 1:
        return graph("Add", graph("Mul", t, np.array(0.0)), values)
    t = graph("Clip", t, np.array(knots[0]), np.array(knots[-1]))
    # Of the pieces between knots, the one that t is in: so many inner knots lie below it.
    below = graph("Cast", graph("Greater", t, knots[None, 1:-1]), to=onnx.TensorProto.INT64)
    piece = graph("ReduceSum", below, np.array([1]), keepdims=1)
    slopes = np.diff(values) / np.diff(knots)
    rise = graph("Mul", graph("Gather", slopes, piece), graph("Sub", t, graph("Gather", knots[:-1], piece)))
    return graph("Add", rise, graph("Gather", values[:-1], piece))


def _two_sided(graph: GraphBuilder, second: str) -> str:
    return graph("Concat", graph("Sub", np.array(1.0), second), second, axis=1)


def _softmax(graph: GraphBuilder, scores: str) -> str:
    return graph("Softmax", scores, axis=1)


def _boosted_scores(graph: GraphBuilder, step: HistGradientBoostingClassifier, x: str) -> str:
    """Write what gradient boosting adds up, float64; of two classes (n, 1). skl2onnx 1.20 fails with onnx 1.23 here.

    Thresholds are float64, where a feature of float32 is on the same side as in scikit-learn, and so are the sums:
    ONNX Runtime adds in another order for other numbers of rows and threads.
    """
    nodes: dict[str, list[Any]] = {name: [] for name in _BRANCHES}
    leaves: dict[str, list[Any]] = {name: [] for name in ("treeids", "nodeids", "ids")}
    thresholds, weights = [], []
    trees = [(column, tree.nodes) for round_ in step._predictors for column, tree in enumerate(round_)]
    for number, (column, tree) in enumerate(trees):
        for place, node in enumerate(tree):
            branch: tuple[int, str, int, int] = (0, "LEAF", 0, 0)
            if node["is_leaf"]:
                weights.append(float(node["value"]))
                for name, value in zip(leaves, (number, place, column), strict=True):
                    leaves[name].append(value)
            else:
                branch = (int(node["feature_idx"]), "BRANCH_LEQ", int(node["left"]), int(node["right"]))
            thresholds.append(0.0 if node["is_leaf"] else float(node["num_threshold"]))
            for name, given in zip(_BRANCHES, (number, place, *branch), strict=True):
                nodes[name].append(given)
    baseline = np.ravel(step._baseline_prediction).astype(np.float64)
    summed = graph(
        "TreeEnsembleRegressor",
        graph("Cast", x, to=DOUBLE),
        domain="ai.onnx.ml",
        n_targets=len(baseline),
        nodes_values_as_tensor=numpy_helper.from_array(np.array(thresholds)),
        target_weights_as_tensor=numpy_helper.from_array(np.array(weights)),
        **{f"nodes_{name}": values for name, values in nodes.items()},
        **{f"target_{name}": values for name, values in leaves.items()},
    )
    return graph("Add", graph("Cast", summed, to=DOUBLE), baseline)


def _single(values: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)
