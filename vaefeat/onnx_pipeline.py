"""A whole scikit-learn pipeline, from rows to labels, as one ONNX file.

The encoder's graph comes out of its bundle, the steps behind it are written by :mod:`vaefeat.onnx_writers`, and both
are joined. Nothing is written unless ONNX Runtime gives the labels and probabilities that scikit-learn gives.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from vaefeat.atomic import replace_file
from vaefeat.bundle import MAX_NAME_LENGTH, Bundle, Manifest, check_name
from vaefeat.encoder import OnnxEncoder
from vaefeat.errors import BundleError, ExportError, InputError, requiring
from vaefeat.features import VAEFeatures
from vaefeat.finetune import FineTuneClassifier
from vaefeat.labels import class_names
from vaefeat.model_card import pipeline_card
from vaefeat.predictor import LABEL, PROBABILITIES, OnnxPredictor
from vaefeat.reference import REFERENCE_FILE, PredictionReference, Reference, load_reference
from vaefeat.temperature import TemperedClassifier
from vaefeat.transformer import VAETransformer

with requiring("export", what="export_pipeline"):
    from vaefeat.onnx_graph import GraphBuilder
    from vaefeat.onnx_steps import fitted_steps
    from vaefeat.onnx_writers import write_best, write_classifier, write_temperature, write_transformer

__all__ = ["PIPELINE_TOLERANCE", "export_pipeline"]

#: Largest difference of a probability between ONNX Runtime and scikit-learn.
PIPELINE_TOLERANCE = 1e-4
#: How many rows to compare on where none are given, as far as so many bytes allow.
_MADE_ROWS, _MADE_BYTES = 256, 64 * 2**20
_SUFFIX = "-pipeline"
_LIBRARIES = ("scikit-learn", "skl2onnx", "onnx")
#: Between the name of a step and the tensors in it.
_STEPS = "steps/"


def export_pipeline(
    pipe: Pipeline | FineTuneClassifier | TemperedClassifier | GridSearchCV | RandomizedSearchCV,
    path: str | PathLike[str] | None,
    *,
    X: ArrayLike | None = None,
    name: str | None = None,
) -> Bundle:
    """Write a fitted pipeline as one ONNX file: rows in, ``label`` and ``probabilities`` out.

    Parameters
    ----------
    pipe : Pipeline, FineTuneClassifier or TemperedClassifier, or a search around one
        Fitted. :class:`VAEFeatures` (of a bundle, not of a service) or :class:`VAETransformer` first, then scalers and
        the like (:data:`vaefeat.onnx_steps.TRANSFORMERS`), a classifier last
        (:data:`vaefeat.onnx_steps.CLASSIFIERS`, or what holds one: ``SelfTrainingClassifier``, ``FrozenEstimator``,
        a search, ``few_label_head``). Or :class:`FineTuneClassifier` alone. Or either in a
        :class:`vaefeat.temperature.TemperedClassifier`. Of a search, its ``best_estimator_``.
    path : path-like or None
        Ending in ``.onnx``: the file alone, which any ONNX Runtime loads. Else the folder of a bundle, which
        ``python -m serving`` serves, and :class:`OnnxPredictor` opens. None writes nothing: save the bundle later.
    X : array-like of shape (n, ...), optional
        Rows to compare on, the more the better: best those that the classifier learned from and some that it did not.
        When None, 256 rows made of the few reference rows of the encoder's bundle: pictures blended two by two, values
        of columns combined anew. They are rows like none of yours, and less of a proof.
    name : str, optional
        The model's name in a service; that of the encoder with ``-pipeline`` behind it when None.

    Returns
    -------
    Bundle
        Loaded back from the folder; in memory where no folder was written. ``manifest.pipeline["parity"]`` has
        the measured differences, which are in the file's metadata, too.

    Raises
    ------
    InputError
        A step that cannot be written as ONNX, by name, with what to do; no features to begin with, or a service's;
        labels other than whole numbers and texts.
    ExportError
        ONNX Runtime gives another label, or a probability that differs by more than :data:`PIPELINE_TOLERANCE`.
        A label may be another one of two that are as probable within this.
    BundleError
        `path` cannot be written.
    NotFittedError
        `pipe` is not fitted.

    Examples
    --------
    >>> from vaefeat import export_pipeline
    >>> export_pipeline(pipe, "pipeline.onnx", X=X)  # doctest: +SKIP
    """
    check_is_fitted(pipe)
    if type(pipe) in (GridSearchCV, RandomizedSearchCV):
        pipe = _best_of(pipe)
    whole, temperature = _untempered(pipe)
    encoder, output, steps = _taken_apart(whole)
    base = encoder.bundle.manifest
    name = name or base.name[: MAX_NAME_LENGTH - len(_SUFFIX)] + _SUFFIX
    check_name(name)
    names = getattr(whole, "feature_names_in_", None)
    spec = base.input.named(None if names is None else tuple(map(str, names)))
    known = load_reference(encoder.bundle)
    rows = _rows_to_compare(encoder.bundle, known) if X is None else spec.prepare(X)
    # The file alone has what people expect of a classifier; the bundle also what the service watches.
    alone = path is not None and Path(path).suffix == ".onnx"
    watched = known if isinstance(known, Reference) and not alone else None
    classes = _plain_classes(np.asarray(pipe.classes_))
    named = [*steps, *([] if temperature is None else [("temperature", pipe)])]
    described = {
        "encoder": {"name": base.name, "digest": encoder.digest, "output": output},
        "steps": [{"name": step, "class": type(part).__name__} for step, part in named],
        **({} if watched is None else {"means": base.latent_dim}),
    }
    manifest = replace(
        base,
        name=name,
        input=spec,
        outputs={PROBABILITIES: len(classes)},
        classes=classes,
        pipeline=described,
        versions={**base.versions, **{library: version(library) for library in _LIBRARIES}},
    )
    joined = _joined(
        encoder.bundle, output, steps, np.asarray(pipe.classes_), temperature=temperature, means=watched is not None
    )
    predictor = _opened(manifest, joined)
    parity = _measure_parity(pipe, predictor, rows, rows if X is None else X)
    if X is None:
        parity["n_made"] = len(rows)
    manifest = replace(manifest, pipeline={**described, "parity": parity})
    reference = PredictionReference.of(predictor, rows, encoder=watched)
    return _write(manifest, joined, reference, None if path is None else Path(path))


def _untempered(pipe: Any) -> tuple[Any, float | None]:
    """Give what a temperature was put on, and the temperature."""
    if type(pipe) is not TemperedClassifier:
        return pipe, None
    inner = pipe.estimator_
    return inner.estimator if type(inner) is FrozenEstimator else inner, pipe.temperature


def _best_of(search: Any) -> Any:
    if not hasattr(search, "best_estimator_"):
        raise InputError(
            f"got a {type(search).__name__} with refit={search.refit!r}, which keeps no estimator, wanted one with "
            "refit=True; or give the pipeline that you fitted with best_params_"
        )
    return search.best_estimator_


def _taken_apart(pipe: Any) -> tuple[OnnxEncoder, str, list[tuple[str, Any]]]:
    """Give the encoder, which of its outputs is used, and what follows."""
    steps = [("classifier", pipe)] if type(pipe) is FineTuneClassifier else list(getattr(pipe, "steps", ()))
    if not steps or type(pipe) not in (Pipeline, FineTuneClassifier):
        raise InputError(
            f"got a {type(pipe).__name__}, wanted a fitted Pipeline that begins with VAEFeatures or VAETransformer, or "
            "a FineTuneClassifier, or GridSearchCV or RandomizedSearchCV around one"
        )
    (name, first), *others = (step for step in steps if step[1] is not None and step[1] != "passthrough")
    if type(first) is FineTuneClassifier:
        return first.encoder_, "probability", []
    if type(first) not in (VAEFeatures, VAETransformer):
        later = [other for other, step in others if type(step) in (VAEFeatures, VAETransformer)]
        where = f"before the features of {later[0]!r}" if later else "and no features after it"
        raise InputError(
            f"got {type(first).__name__} as first step {name!r} {where}, wanted VAEFeatures or VAETransformer first: "
            "the file takes the rows that its encoder takes; do what comes before to the rows themselves, before the "
            "encoder is trained"
        )
    if not isinstance(first.encoder_, OnnxEncoder):
        raise InputError(
            f"got features from the service at {first.encoder_.url}, whose encoder is not here, wanted those of a "
            "bundle; copy its folder to this machine and take VAEFeatures(folder)"
        )
    return first.encoder_, first._output, fitted_steps(others)


def _plain_classes(classes: NDArray[Any]) -> tuple[str | int, ...]:
    names = class_names(classes)
    if all(isinstance(name, str) for name in names):
        return tuple(str(name) for name in names)
    if all(type(name) is int for name in names):
        return tuple(int(name) for name in names)
    raise InputError(
        f"got the classes {list(names[:5])}, wanted whole numbers or texts, which labels of an ONNX file can be; fit "
        "again with y.astype(int), or y.astype(str)"
    )


def _rows_to_compare(bundle: Bundle, reference: Reference | PredictionReference | None) -> NDArray[Any]:
    if not isinstance(reference, Reference):
        raise InputError(
            f"got no rows to compare on, and bundle {bundle.name!r} has no {REFERENCE_FILE}; pass some as X="
        )
    spec = bundle.manifest.input
    few, random = reference.rows, np.random.default_rng(0)
    n_made = max(0, min(_MADE_ROWS, _MADE_BYTES // spec.row_bytes) - len(few))
    if spec.kind == "vector":
        # Values of a column stay in it: they are codes, or missing, in no other.
        made = few[random.integers(len(few), size=(n_made, spec.n_features)), np.arange(spec.n_features)]
    else:
        one, other = few[random.integers(len(few), size=(2, n_made))]
        share = random.random((n_made, 1, 1, 1), dtype=np.float32)
        blended = share * one + (1 - share) * other
        made = (np.rint(blended) if spec.dtype == "uint8" else blended).astype(spec.dtype)
    return np.concatenate([few, made])


def _joined(
    bundle: Bundle,
    output: str,
    steps: list[tuple[str, Any]],
    classes: NDArray[Any],
    *,
    temperature: float | None,
    means: bool,
) -> onnx.ModelProto:
    """Put the steps behind one output of the encoder; what else it gives is left out, but for `means` behind them."""
    encoder = onnx.load_model_from_string(bundle.read("encoder.onnx"))
    graph = GraphBuilder(opset=next(entry.version for entry in encoder.opset_import if entry.domain == ""))
    x = "features"
    for _, step in steps[:-1]:
        x = write_transformer(graph, step, x)
    label, probabilities = write_classifier(graph, steps[-1][1], x) if steps else (write_best(graph, x, classes), x)
    if temperature is not None:
        probabilities = write_temperature(graph, probabilities, temperature)
    kind = TensorProto.INT64 if classes.dtype.kind in "iu" else TensorProto.STRING
    head = graph.model(
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", bundle.manifest.outputs[output]])],
        {
            label: helper.make_tensor_value_info(LABEL, kind, ["batch"]),
            probabilities: helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, ["batch", len(classes)]),
        },
        ir_version=encoder.ir_version,
    )
    prefixed = onnx.compose.add_prefix(head, _STEPS, rename_outputs=False)
    joined = onnx.compose.merge_models(
        encoder,
        prefixed,
        io_map=[(output, f"{_STEPS}features")],
        outputs=[LABEL, PROBABILITIES, *(["mean"] if means else [])],
    )
    # merge_models puts the encoder's before them.
    ordered = sorted(joined.graph.output, key=lambda value: value.name == "mean")
    del joined.graph.output[:]
    joined.graph.output.extend(ordered)
    onnx.checker.check_model(joined)
    return joined


def _opened(manifest: Manifest, model: onnx.ModelProto) -> OnnxPredictor:
    try:
        unproved = Bundle.of(manifest, {manifest.graph_file: model.SerializeToString()})
        return OnnxPredictor(unproved, device="cpu")
    except BundleError as error:
        raise ExportError(f"{error}; nothing was written") from error


def _measure_parity(pipe: Any, predictor: OnnxPredictor, rows: NDArray[Any], X: ArrayLike) -> dict[str, Any]:
    """Compare with scikit-learn; `rows` are those of `X` as the encoder takes them."""
    with warnings.catch_warnings():
        # Reference rows have no column names, and need none: they are in the encoder's order.
        warnings.filterwarnings("ignore", "X does not have valid feature names", UserWarning)
        wanted, labels = np.asarray(pipe.predict_proba(X)), np.asarray(pipe.predict(X))
    got, got_labels = predictor.predict_proba(rows), predictor.predict(rows)
    difference = float(np.abs(got - wanted).max())
    other = np.flatnonzero(got_labels != labels)
    ours, theirs = (np.searchsorted(pipe.classes_, some[other]) for some in (got_labels, labels))
    apart = float(np.abs(wanted[other, ours] - wanted[other, theirs]).max(initial=0.0))
    if not (difference <= PIPELINE_TOLERANCE and apart <= PIPELINE_TOLERANCE):
        raise ExportError(
            f"ONNX Runtime gives {len(other)} other labels than scikit-learn on {len(rows)} rows, and probabilities "
            f"that differ by up to {difference:.3g}, wanted at most {PIPELINE_TOLERANCE:g}, and another label only for "
            "one as probable; nothing was written. Take another classifier or other settings, and please report it"
        )
    return {
        "n_rows": len(rows),
        "tolerance": PIPELINE_TOLERANCE,
        "labels": {"tied": len(other)},
        "outputs": {PROBABILITIES: {"max_abs_difference": difference, "scale": 1.0}},
    }


def _write(manifest: Manifest, model: onnx.ModelProto, reference: PredictionReference, path: Path | None) -> Bundle:
    assert manifest.pipeline is not None
    described = {
        **manifest.pipeline,
        "classes": manifest.classes,
        "input": manifest.input.to_dict(),
        "versions": manifest.versions,
    }
    texts = {f"vaefeat.{key}": json.dumps(value) for key, value in described.items()}
    helper.set_model_props(model, {"vaefeat.name": manifest.name, **texts})
    content = model.SerializeToString()
    bundle = Bundle.of(
        manifest,
        {
            manifest.graph_file: content,
            REFERENCE_FILE: reference.to_bytes(),
            "README.md": pipeline_card(manifest).encode(),
        },
    )
    if path is None:
        return bundle
    if path.suffix != ".onnx":
        return bundle.save(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise BundleError(f"could not write {path}: {error.strerror or error}; choose another file") from error
    return bundle
