"""A grid of small models - latents, betas, seeds - trained as one batched run, which is what takes a grid its time."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vaefeat.atomic import replace_file
from vaefeat.bundle import Bundle, check_name, load_bundle
from vaefeat.bundle_making import make_bundle, warn_of_collapse
from vaefeat.combinations import refuse_pair
from vaefeat.config import ModelConfig, TrainConfig
from vaefeat.data import Rows, fingerprint, load_rows
from vaefeat.ensemble import OWN_SETTINGS, Ensemble, bytes_of, refuse_alone
from vaefeat.errors import BundleError, ConfigError, InputError, NonFiniteLossError, OutOfMemoryError
from vaefeat.memory import ran_out_of_memory
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.preprocessing import Preprocessing
from vaefeat.model.vae import VAE
from vaefeat.observers import ProgressBar, shown_activity
from vaefeat.pretraining import ONE_AT_A_TIME, make_folder, refuse_untrainable
from vaefeat.settings import check_choice, check_int, plain_value, unknown_name
from vaefeat.training import TrainingResult

__all__ = ["GRID_FILE", "GridRun", "best_run", "pretrain_grid"]

#: Inside the output folder: settings and figures of all models.
GRID_FILE = "grid.json"
#: What may differ between the models of a grid.
_KEYS = ("latent_dim", *OWN_SETTINGS)
#: What "auto" lets models take at once. A constant, because a model's noise depends on which are trained beside it.
_MEMORY_BYTES = 2 * 2**30
#: Values to show whoever gave none.
_EXAMPLES = {
    "latent_dim": "8, 16, 32",
    "kl_weight": "0.5, 1, 4",
    "learning_rate": "1e-3, 3e-3",
    "weight_decay": "0, 1e-4",
    "seed": "0, 1, 2",
}
_LOG = logging.getLogger("vaefeat")


@dataclass(frozen=True, kw_only=True, eq=False)
class GridRun:
    """One model of a grid.

    Attributes
    ----------
    name : str
        Its settings, as a name of a bundle: ``latent_dim-8-kl_weight-0.5-seed-0``.
    settings : dict
        What sets it apart: a value for each key of the grid.
    model : ModelConfig
    train : TrainConfig
    vae : VAE
        With its best weights, on the processor, in evaluation mode.
    result : TrainingResult or None
        History, held-out figures and rows, as a training on its own has them; None when it failed. The figures come
        from the noise that a training on its own is measured with, those in the history do not.
    failed : str or None
        Why it was given up.
    path : Path or None
        The folder of its bundle, where one was written.
    """

    name: str
    settings: dict[str, Any]
    model: ModelConfig
    train: TrainConfig
    vae: VAE
    result: TrainingResult | None = None
    failed: str | None = None
    path: Path | None = None
    _rows: NDArray[Any]
    _data: dict[str, Any]

    @property
    def figures(self) -> dict[str, Any]:
        """What the table holds: nats per held-out row, active units, epochs, rows per second; None where it failed.

        ``rows_per_s`` are those of this model while the others were trained beside it.
        """
        names = ("elbo", "log_likelihood", "kl", "active_units", "epochs", "rows_per_s")
        if self.result is None:
            return dict.fromkeys(names)
        evaluation, history = self.result.evaluation, self.result.history
        rows_per_s = sum(record.rows_per_s for record in history) / len(history)
        values = (evaluation.elbo, evaluation.log_likelihood, evaluation.kl, len(evaluation.active), len(history))
        return dict(zip(names, (*values, rows_per_s), strict=True))

    def bundle(self) -> Bundle:
        """Give the model as :func:`vaefeat.pretrain` would: from its folder, or exported now, in about a second.

        Raises
        ------
        NonFiniteLossError
            The model failed.
        ExportError
            The ONNX graph does not compute what the model computes.
        BundleError
            Its folder was changed.
        """
        if self.path is not None:
            return load_bundle(self.path)
        if self.result is None:
            raise NonFiniteLossError(f"got no model from {self.name} to make a bundle of: {self.failed}")
        # The exporter's state belongs to the whole process, as torch's generator does.
        with ONE_AT_A_TIME:
            bundle = make_bundle(
                self.vae,
                self._rows,
                self.result,
                train=self.train,
                name=self.name,
                data=self._data,
            )
        warn_of_collapse(bundle)
        return bundle


def pretrain_grid(
    data: str | PathLike[str] | ArrayLike | Rows,
    *,
    model: ModelConfig | None = None,
    train: TrainConfig | None = None,
    grid: Mapping[str, Sequence[Any]],
    out: str | PathLike[str] | None = None,
    bundles: Literal["all", "best", "none"] = "all",
    models_at_once: int | Literal["auto"] = "auto",
    progress: bool = True,
) -> list[GridRun]:
    """Train all combinations of some settings side by side, as one batched run.

    Each model gets the first weights, the order of rows, the held-out split, the schedules and the clipping that its
    settings give it in :func:`vaefeat.pretrain`; only its noise is drawn from a generator that all models share. So its
    weights differ from those of a training on its own as with another seed of noise, and they are the same whenever the
    same grid is run.

    Parameters
    ----------
    data : path-like, array-like or Rows
        Anything that :func:`vaefeat.data.load_rows` reads. Labels in it are not looked at.
    model : ModelConfig, optional
    train : TrainConfig, optional
        What all models have in common.
    grid : mapping of str to sequence
        Values to combine, for any of ``latent_dim``, ``kl_weight``, ``learning_rate``, ``weight_decay`` and ``seed``.
    out : path-like, optional
        A folder that gets a bundle for each model in a folder with its name, and ``grid.json``, a table of settings and
        figures. Written whenever the models that were trained at once are done. Nothing is written without it.
    bundles : {"all", "best", "none"}
        Of which models bundles are written: a bundle takes about a second to export and to prove. ``best`` is the one
        that :func:`best_run` chooses.
    models_at_once : int or "auto"
        Models in one batched run; more than these are trained in several. ``auto`` takes as many as are estimated to
        need 2 GiB (see :func:`vaefeat.ensemble.bytes_of`).
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    list of GridRun
        A run for each combination; the last key varies fastest.

    Notes
    -----
    How much faster this is depends on the size of the models. On a processor it saves what calling an operation costs:
    on one thread it takes an eighth of the time of one after another for 27 models of 64 units on rows of 64 values
    with 32 rows in a minibatch, and about two fifths with 128, but four fifths for 12 models of 200 units on MNIST,
    where multiplying matrices is what takes the time.

    There is no checkpoint: what is interrupted is lost, but for what is already written to `out`. Precision is float32.

    A model whose loss becomes infinite or NaN is given up, says so in ``failed``, and does not disturb the others.

    Raises
    ------
    InputError
        Rows that cannot be trained on.
    ConfigError
        A setting that cannot be part of a grid, values that are none, or settings with which models cannot be trained
        together.
    DeviceError
        CUDA was asked for and there is none.
    ExportError
        The ONNX graph does not compute what the model computes.
    BundleError
        The folder cannot be written.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from vaefeat import ModelConfig, TrainConfig
    >>> from vaefeat.grid import best_run, pretrain_grid
    >>> images = load_digits().images.astype("uint8")[:, None]
    >>> runs = pretrain_grid(images, model=ModelConfig(hidden_dims=(32,), channels=(8,)),
    ...                      train=TrainConfig(max_epochs=1), grid={"latent_dim": [2, 8], "seed": [0, 1]},
    ...                      progress=False)
    >>> [run.name for run in runs]
    ['latent_dim-2-seed-0', 'latent_dim-2-seed-1', 'latent_dim-8-seed-0', 'latent_dim-8-seed-1']
    >>> best_run(runs).bundle().manifest.latent_dim in (2, 8)
    True
    """
    check_choice("bundles", bundles, ("all", "best", "none"))
    if models_at_once != "auto":
        check_int("models_at_once", models_at_once, at_least=1)
    combinations = _combinations(grid)
    models, trains = _configurations(model or ModelConfig(), train or TrainConfig(), combinations)
    refuse_alone(models, trains[0])
    names = _names(combinations)
    folder = Path(out) if out is not None else None
    loaded = data if isinstance(data, Rows) else load_rows(data)
    if loaded.table is not None:
        raise InputError(
            f"got {loaded.table} from {loaded.source}, wanted rows of numbers without a gap: grids train no tables; "
            "train its models one by one, with pretrain"
        )
    rows = loaded.array
    refuse_untrainable(rows, loaded.source)
    described = {"fingerprint": fingerprint(rows), "n_rows": len(rows)}
    if folder is not None:
        make_folder(folder)
    runs: list[GridRun] = []
    with ONE_AT_A_TIME:
        build = _Builder(models, trains, rows)
        at_once = build.at_once() if models_at_once == "auto" else models_at_once
        for first in range(0, len(models), at_once):
            chosen = range(first, min(first + at_once, len(models)))
            vaes = [build(number) for number in chosen]
            watching = [ProgressBar()] if progress else []
            for bar in watching if at_once < len(models) else ():
                bar.on_note(f"models {first + 1} to {chosen.stop} of {len(models)}")
            with _explained_memory(len(chosen)):
                outcomes = Ensemble(vaes, rows, [trains[number] for number in chosen], observers=watching).run()
            for number, vae, outcome in zip(chosen, vaes, outcomes, strict=True):
                failed = str(outcome) if isinstance(outcome, NonFiniteLossError) else None
                if failed:
                    _LOG.warning("%s is given up: %s", names[number], failed)
                run = GridRun(
                    name=names[number],
                    settings=combinations[number],
                    model=models[number],
                    train=trains[number],
                    vae=vae.cpu(),
                    result=None if isinstance(outcome, NonFiniteLossError) else outcome,
                    failed=failed,
                    _rows=rows,
                    _data=described,
                )
                runs.append(run)
            if folder is not None:
                whole = chosen.stop == len(models)
                _write(folder, runs, bundles if whole or bundles == "all" else "none", shown=progress)
    return runs


@contextmanager
def _explained_memory(n_models: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        fewer = f"models_at_once={n_models // 2}" if n_models > 1 else "a smaller batch_size"
        raise OutOfMemoryError(
            f"{n_models} models side by side do not fit into memory ({str(error).splitlines()[0]}); set {fewer}. "
            "What was written before is kept"
        ) from error


def best_run(runs: Sequence[GridRun]) -> GridRun:
    """Choose the run with the highest held-out evidence lower bound, in which ``kl_weight`` has no part.

    It is a measure of models of the rows. For features, compare what they are for.

    Raises
    ------
    InputError
        No run, or none that did not fail.
    """
    good = [run for run in runs if run.result is not None]
    if not good:
        raise InputError(f"got {len(runs)} runs that all failed, wanted one that did not; lower learning_rate")
    return max(good, key=lambda run: run.figures["elbo"])


class _Builder:
    """Makes the untrained models, each as it would be made alone, with one scaling that is fitted once."""

    def __init__(self, models: Sequence[ModelConfig], trains: Sequence[TrainConfig], rows: NDArray[Any]) -> None:
        self._models, self._trains, self._rows = models, trains, rows
        self._scaling: Preprocessing = VAE.for_rows(models[0], rows).preprocessing

    def __call__(self, number: int) -> VAE:
        config, row_shape = self._models[number], tuple(self._rows.shape[1:])
        scaling = Preprocessing.identity(row_shape)
        scaling.load_state_dict(self._scaling.state_dict())
        with fixed_noise(self._trains[number].seed, torch.device("cpu")):
            return VAE(config, row_shape, preprocessing=scaling)

    def at_once(self) -> int:
        largest = max(range(len(self._models)), key=lambda number: self._models[number].latent_dim)
        return max(1, _MEMORY_BYTES // bytes_of(self(largest), self._trains[largest]))


def _combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    values = {}
    for key, given in grid.items():
        if key not in _KEYS:
            if key in {field.name for config in (ModelConfig, TrainConfig) for field in fields(config)}:
                raise ConfigError(
                    f"got {key!r} in a grid, which models trained side by side must have in common, wanted any of "
                    f"{', '.join(_KEYS)}; call pretrain_grid once for each {key}"
                )
            raise unknown_name("grid key", key, _KEYS)
        if isinstance(given, str) or not isinstance(given, Sequence | np.ndarray) or not len(given):
            raise ConfigError(f"got {key}={given!r} in a grid, wanted its values, such as [{_EXAMPLES[key]}]")
        # NumPy's numbers are no numbers of Python's, which is what configurations and JSON hold.
        values[key] = [plain_value(value) for value in given]
        if twice := [value for value in values[key] if values[key].count(value) > 1]:
            raise ConfigError(f"got {key}={twice[0]!r} twice in a grid, wanted each value once; leave one out")
    if not values:
        raise ConfigError(f"got a grid without keys, wanted values for any of {', '.join(_KEYS)}; see vaefeat.pretrain")
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _configurations(
    model: ModelConfig, train: TrainConfig, combinations: Sequence[dict[str, Any]]
) -> tuple[list[ModelConfig], list[TrainConfig]]:
    models, trains = [], []
    for settings in combinations:
        own = {key: value for key, value in settings.items() if key in OWN_SETTINGS}
        models.append(replace(model, latent_dim=settings.get("latent_dim", model.latent_dim)))
        trains.append(replace(train, **own))
        refuse_pair(models[-1], trains[-1])
    return models, trains


def _names(combinations: Sequence[dict[str, Any]]) -> list[str]:
    """Name each combination by its settings, or by its number where that is too long for the name of a bundle."""
    names = ["-".join(f"{key}-{value}" for key, value in settings.items()) for settings in combinations]
    names = [name.replace("+", "") for name in names]
    try:
        for name in names:
            check_name(name)
    except InputError:
        width = len(str(len(names) - 1))
        names = [f"run-{number:0{width}}" for number in range(len(names))]
    return names


def _write(folder: Path, runs: list[GridRun], bundles: str, *, shown: bool) -> None:
    """Write the table, then the bundles that are wanted and not yet there, then the table that names them."""
    _write_table(folder, runs)
    good = [run for run in runs if run.result is not None]
    chosen = {"all": good, "best": [best_run(good)] if good else []}.get(bundles, [])
    with shown_activity("export to ONNX, and compare with torch", shown=shown):
        for number, run in enumerate(runs):
            if run in chosen and run.path is None:
                run.bundle().save(folder / run.name)
                runs[number] = replace(run, path=folder / run.name)
    _write_table(folder, runs)


def _write_table(folder: Path, runs: Sequence[GridRun]) -> None:
    rows = list(_table(runs))
    try:
        replace_file(folder / GRID_FILE, (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise BundleError(
            f"could not write {folder / GRID_FILE}: {error.strerror or error}; free some space, or choose another "
            "folder with out="
        ) from error


def _table(runs: Sequence[GridRun]) -> Iterator[dict[str, Any]]:
    for run in runs:
        bundle = None if run.path is None else run.path.name
        yield {"name": run.name, "settings": run.settings, **run.figures, "failed": run.failed, "bundle": bundle}
