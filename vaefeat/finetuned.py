"""From a pretrained bundle and few labels to a classifier's bundle: train, export, prove, describe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vaefeat.bundle import MAX_NAME_LENGTH, Bundle
from vaefeat.config import TrainConfig
from vaefeat.export import export_decoder, export_encoder, measure_parity
from vaefeat.finetune_config import FineTuneConfig
from vaefeat.finetuning import FineTuned, FineTuner
from vaefeat.inference import denoise
from vaefeat.model.evaluation import evaluate, fixed_noise
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model_card import model_card, reconstruction_picture
from vaefeat.observers import TaskObserver, shown_activity
from vaefeat.pretraining import ONE_AT_A_TIME
from vaefeat.reference import REFERENCE_FILE, Reference
from vaefeat.targets import Targets
from vaefeat.weights import restore_classifier, restore_vae, weights_of

__all__ = ["classifier_bundle", "fine_tune"]

_SHOWN_ROWS = 1000
_BATCH_SIZE = 256
_PICTURED = 12
_SUFFIX = "-classifier"


def fine_tune(
    base: Bundle,
    rows: NDArray[Any],
    targets: Targets,
    *,
    classes: tuple[str | int | float | bool, ...],
    shares: NDArray[np.float64],
    config: FineTuneConfig,
    columns: tuple[str, ...] | None = None,
    temperature: float = 1.0,
    progress: bool = False,
    goes_on: bool = False,
    observer: TaskObserver | None = None,
) -> tuple[Bundle, int]:
    """Train a classifier from a pretrained bundle.

    Parameters
    ----------
    base : Bundle
    rows : ndarray of shape (n, ...)
        As the bundle takes them.
    targets : Targets
        Its codes are indices into `classes`.
    classes : tuple
    shares : ndarray of shape (K,)
        What the share of each class among the unlabelled rows is taken to be.
    config : FineTuneConfig
    columns : tuple of str, optional
        What the columns of the rows were called, for a bundle of numbers that does not know it.
    temperature : float
        What the logits are divided by in the bundle, where its head is as much smaller.
    progress : bool
        Show a bar on standard error.
    goes_on : bool
        Begin with the head of `base`, which is a classifier of these classes, and keep its name.
    observer : TaskObserver, optional
        Told of every 50 steps; what training would leave is a Bundle for it.

    Returns
    -------
    bundle : Bundle
        In memory.
    n_steps : int

    Raises
    ------
    ConfigError
        An augmentation that there is none of for such rows.
    NonFiniteLossError, ExportError
        See :meth:`vaefeat.finetuning.FineTuner.run` and :func:`classifier_bundle`.
    """
    head = restore_classifier(base).head if goes_on else None
    name = base.name if goes_on else _classifier_name(base.name)
    objective = OBJECTIVES[base.manifest.objective](TrainConfig.from_dict(base.manifest.train))
    # Weights are drawn wherever a network is built, also those that are then loaded over.
    with ONE_AT_A_TIME, fixed_noise(config.seed, torch.device("cpu")):
        tuner = FineTuner(
            restore_vae(base), rows, targets, shares=shares, objective=objective, config=config, head=head
        )
        export = partial(
            classifier_bundle,
            base,
            tuner=tuner,
            classes=classes,
            name=name,
            columns=columns,
            temperature=temperature,
        )
        found = tuner.run(progress=progress, observer=_Exporting(observer, export) if observer else None)
        with shown_activity("export to ONNX, and compare with torch", shown=progress):
            bundle = export(found)
    return bundle, found.n_steps


def classifier_bundle(
    base: Bundle,
    found: FineTuned,
    *,
    tuner: FineTuner,
    classes: tuple[str | int | float | bool, ...],
    name: str,
    columns: tuple[str, ...] | None = None,
    temperature: float = 1.0,
) -> Bundle:
    """Export a fine-tuned classifier and describe it, in memory.

    Parameters
    ----------
    base : Bundle
        What fine-tuning began with. What is known of its pretraining stays; the held-out figures are measured again,
        for they are another encoder's now, and the decoder is left out where it was not trained along.
    found : FineTuned
    tuner : FineTuner
        Which found it.
    classes : tuple
        In the order of the probabilities.
    name : str
    columns : tuple of str, optional
    temperature : float

    Returns
    -------
    Bundle

    Raises
    ------
    ExportError
        The ONNX graph does not compute what the model computes.
    """
    classifier, manifest = found.classifier, base.manifest
    if temperature != 1:
        classifier = classifier.tempered(temperature)
    shown = _sample(tuner)
    kl_weight = tuner.objective.config.kl_weight
    measured = evaluate(
        classifier.vae,
        tuner.objective,
        shown,
        kl_weight=kl_weight,
        batch_size=_BATCH_SIZE,
        seed=tuner.config.seed,
    )
    contents = {
        "encoder.onnx": export_encoder(classifier, shown),
        "weights.safetensors": weights_of(classifier.vae),
        "head.safetensors": weights_of(classifier.head),
    }
    run = {
        "base": base.digest,
        "n_labelled": len(tuner.labelled),
        "n_unlabelled": len(tuner.unlabelled),
        "n_steps": found.n_steps,
        "settled": found.settled,
        "precision": str(tuner.student.vae.network_dtype).removeprefix("torch."),
        "config": tuner.config.to_dict(),
        **({} if temperature == 1 else {"temperature": temperature}),
    }
    figures = {"elbo": measured.elbo, "log_likelihood": measured.log_likelihood, "kl": measured.kl}
    manifest = replace(
        manifest,
        name=name,
        input=manifest.input.named(columns),
        outputs={**_without_classes(manifest.outputs), "probability": len(classes)},
        active_units=measured.active,
        classes=classes,
        data={**manifest.data, "finetuning": run},
        metrics={**manifest.metrics, **figures, "n_heldout": 0},
        parity={},
    )
    if manifest.decodes:
        contents["decoder.onnx"] = export_decoder(classifier.vae)
    exported = Bundle.of(manifest, contents)
    manifest = replace(manifest, parity=measure_parity(classifier, exported, shown))
    contents[REFERENCE_FILE] = Reference.of(exported, shown, seed=tuner.config.seed).to_bytes()
    picture = None
    if manifest.decodes and manifest.input.kind == "image":
        picture = "reconstructions.png"
        pictured = shown[:_PICTURED]
        contents[picture] = reconstruction_picture(pictured, denoise(classifier.vae, pictured))
    contents["README.md"] = model_card(manifest, picture=picture).encode()
    return Bundle.of(manifest, contents)


class _Exporting(TaskObserver):
    """Tells another, and makes bundles of what it is shown."""

    def __init__(self, told: TaskObserver, export: Callable[[FineTuned], Bundle]) -> None:
        self._told, self._export = told, export

    def on_start(self, *, n_tasks: int) -> None:
        self._told.on_start(n_tasks=n_tasks)

    def on_task_start(self) -> None:
        self._told.on_task_start()

    def on_task(self, now: Callable[[], FineTuned], *, n_done: int) -> bool | None:
        return self._told.on_task(lambda: self._export(now()), n_done=n_done)


def _sample(tuner: FineTuner) -> NDArray[Any]:
    """Spread over the rows, which may be sorted."""
    step = max(1, len(tuner.rows) // _SHOWN_ROWS)
    return np.array(tuner.rows[::step][:_SHOWN_ROWS])


def _classifier_name(base: str) -> str:
    """Name a classifier so that a service can hold it and its base at once; names are short (`check_name`)."""
    return base[: MAX_NAME_LENGTH - len(_SUFFIX)] + _SUFFIX


def _without_classes(outputs: dict[str, int]) -> dict[str, int]:
    return {name: width for name, width in outputs.items() if name != "probability"}
