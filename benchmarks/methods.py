"""Every method of the library on the same real rows: trained as long, exported, and measured the same way.

``python -m benchmarks.methods --data PATH`` prints a table, and one JSON line last; ``docs/methods.md`` quotes it. A
few epochs on some thousand rows tell that a method works and what it costs, not which one is best: for that see
``benchmarks.likelihood``.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import ArrayLike, NDArray
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from benchmarks.small_images import SMALL_SIDE, TABLE, shrink, tabulated
from benchmarks.surroundings import surroundings
from pipelines.probes import draw_labels, probe
from vaefeat import ModelConfig, OnnxEncoder, TrainConfig, pretrain
from vaefeat.atomic import replace_file
from vaefeat.bundle import Bundle
from vaefeat.cli import run_command_line
from vaefeat.data import Rows, load_rows
from vaefeat.decoder import OnnxDecoder
from vaefeat.errors import InputError
from vaefeat.feeds import split_heldout
from vaefeat.generation import interpolate, manifold, sample, sample_around, sweep
from vaefeat.inference import anomaly_scores, denoise, impute
from vaefeat.model.diagnostics import diagnose, rate_distortion
from vaefeat.model.marginal_likelihood import (
    Estimate,
    annealed_importance_sampling,
    hamiltonian_estimator,
    importance_sampling,
)
from vaefeat.observers import Observer
from vaefeat.placement import using_threads
from vaefeat.settings import unknown_name
from vaefeat.weights import restore_vae

__all__ = ["METHODS", "USES", "Method", "main", "measure", "quoting"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

#: What every method starts from: a variational auto-encoder with one hidden layer. Short runs need no more.
BASE_MODEL: Mapping[str, Any] = {"network": "mlp", "hidden_dims": (256,), "latent_dim": 16, "likelihood": "bernoulli"}
BASE_TRAIN: Mapping[str, Any] = {"learning_rate": 2e-3, "device": "cpu", "threads": 1}
N_LABELS, N_DRAWS = 100, 10
#: The last rows of the training set judge the features; no method trains on them, and the test rows stay untouched.
N_VALIDATION = 5_000
_BOUND_SAMPLES = 64
_SEED = 0


@dataclass(frozen=True)
class Method:
    """A method, as what it changes in the base.

    Attributes
    ----------
    model, train : mapping
        Fields of ModelConfig and of TrainConfig.
    small : bool
        On images of 7 by 7 pixels.
    table : bool
        On these as a table: see :func:`tabulated`.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    small: bool = False
    table: bool = False

    def rows(self, images: NDArray[np.uint8]) -> Rows:
        """Give images (n, 1, 28, 28) as the method has them."""
        if self.table:
            return Rows(array=tabulated(images), table=TABLE)
        return Rows(array=shrink(images) if self.small else images)

    def model_config(self, **others: Any) -> ModelConfig:
        """Build the model's settings; `others` come between the base and the method."""
        return ModelConfig.from_dict({**BASE_MODEL, **others, **self.model})

    def train_config(self, **others: Any) -> TrainConfig:
        """Build the settings of training; `others` come between the base and the method."""
        return TrainConfig.from_dict({**BASE_TRAIN, **others, **self.train})


_POINT = {"posterior": "deterministic"}
METHODS: Mapping[str, Method] = {
    "vae": Method(),
    "autoencoder": Method(_POINT, {"objective": "reconstruction"}),
    "autoencoder_squared_error": Method(
        {**_POINT, "likelihood": "gaussian", "gaussian_std": 1.0}, {"objective": "reconstruction"}
    ),
    "denoising_autoencoder": Method(
        _POINT, {"objective": "reconstruction", "corruption": "masking", "corruption_level": 0.3}
    ),
    "binarized": Method({"binarize": True}),
    "gaussian_fixed": Method({"likelihood": "gaussian", "gaussian_std": 1.0}),
    "gaussian_learned": Method({"likelihood": "gaussian", "gaussian_std": "learned"}),
    "gaussian_optimal": Method({"likelihood": "gaussian", "gaussian_std": "optimal"}),
    "continuous_bernoulli": Method({"likelihood": "continuous_bernoulli"}),
    "categorical": Method({"likelihood": "categorical", "hidden_dims": (64,)}, small=True),
    "tokens": Method({"likelihood": "tokens", "hidden_dims": (64,)}, small=True),
    "table": Method({"likelihood": "table", "columns": TABLE.sizes}, small=True, table=True),
    "full_covariance": Method({"posterior": "full"}),
    "planar_flow": Method({"posterior": "planar"}),
    "inverse_autoregressive_flow": Method({"posterior": "iaf"}),
    "categorical_latents": Method({"posterior": "categorical", "latent_dim": 100}),
    "categorical_latents_relaxed": Method({"posterior": "categorical", "latent_dim": 100}, {"straight_through": False}),
    "joint_latents": Method({"posterior": "joint", "latent_dim": 26}),
    "learned_prior": Method({"prior": "learned"}),
    "mixture_prior": Method({"prior": "mixture"}),
    "vamp_prior": Method({"prior": "vamp"}),
    "flow_prior": Method({"prior": "flow"}),
    "beta_quarter": Method(train={"kl_weight": 0.25}),
    "beta_four": Method(train={"kl_weight": 4.0}),
    "collapsed": Method(train={"kl_weight": 100.0, "kl_warmup": 0.0}),
    "free_bits": Method(train={"free_bits": 0.5}),
    "estimator_a": Method(train={"kl_estimator": "sampled"}),
    "samples_5": Method(train={"n_samples": 5}),
    "iwae_5": Method(train={"objective": "iwae", "n_samples": 5, "gradient": "reparameterized"}),
    "iwae_5_dreg": Method(train={"objective": "iwae", "n_samples": 5}),
    "mmd": Method(train={"objective": "mmd"}),
    "wasserstein_mmd": Method(_POINT, {"objective": "mmd"}),
    "infovae": Method(train={"objective": "infovae", "kl_weight": 0.5}),
    "sliced_wasserstein": Method(_POINT, {"objective": "sliced_wasserstein"}),
    "contrastive": Method({"latent_dim": 72, "style_dim": 8}, {"objective": "contrastive"}),
    "neighbours": Method(
        {"latent_dim": 72, "style_dim": 8}, {"objective": "contrastive", "neighbours": 12, "remembered": 4096}
    ),
    "denoising_vae_gaussian": Method(train={"corruption": "gaussian"}),
    "denoising_vae_masking": Method(train={"corruption": "masking"}),
    "denoising_vae_salt_and_pepper": Method(train={"corruption": "salt_and_pepper"}),
    "adam": Method(train={"optimizer": "adam"}),
    "adagrad": Method(train={"optimizer": "adagrad", "learning_rate": 0.03}),
    "sgd_momentum": Method(train={"optimizer": "sgd", "learning_rate": 3e-3}),
    "muon": Method(train={"optimizer": "muon", "learning_rate": 0.01}),
    "constant_rate": Method(train={"lr_schedule": "constant"}),
    "map": Method(train={"weight_prior_std": 1.0}),
    "xavier": Method({"initialization": "xavier"}),
    "three_latents": Method({"latent_dim": 3}),
    "convolutional": Method({"network": "conv", "channels": (16, 32), "hidden_dims": (128,)}),
}


@dataclass(frozen=True)
class Data:
    """Rows (n, 1, H, W), uint8, that are trained on, and others that judge; with labels (n,) to judge by."""

    train: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    validation: NDArray[np.uint8]
    validation_labels: NDArray[np.int64]

    @classmethod
    def load(cls, path: Path, *, n_rows: int) -> Data:
        """Take the first rows of the training set to train on, and its last to judge; no test row."""
        rows = load_rows(path, split="train")
        _require_enough(rows, n_rows)
        labels = np.asarray(rows.labels, dtype=np.int64)
        return cls(rows.array[:n_rows], labels[:n_rows], rows.array[-N_VALIDATION:], labels[-N_VALIDATION:])


class _Clock(Observer):
    """Processor seconds of training, evaluation included and export left out: other work on the machine counts not."""

    def on_start(self, *, epochs: int, steps_per_epoch: int, epoch: int) -> None:
        self.seconds = -time.process_time()

    def on_end(self) -> None:
        self.seconds += time.process_time()


def measure(name: str, data: Data, *, epochs: int) -> tuple[Bundle, dict[str, Any]]:
    """Train and export one method, and measure it.

    Parameters
    ----------
    name : str
        In :data:`METHODS`.
    data : Data
    epochs : int

    Returns
    -------
    bundle : Bundle
    figures : dict
        ``elbo``, ``log_likelihood``, ``kl`` and ``bound`` in nats per held-out row (None where the posterior is a
        point), ``active_units``, ``probe_error`` in percent, ``seconds`` of training on one processor, ``parity`` (the
        largest difference between ONNX Runtime and torch in units of the output's scale), and ``text``, the quotation.
    """
    method = METHODS[name]
    trained_on = method.rows(data.train)
    train, validation = trained_on.array, method.rows(data.validation).array
    model, settings = method.model_config(), method.train_config(max_epochs=epochs, seed=_SEED)
    clock = _Clock()
    bundle = pretrain(trained_on, model=model, train=settings, name=name, progress=False, observers=[clock])
    manifest, encoder = bundle.manifest, OnnxEncoder(bundle, device="cpu", threads=1)
    has_density = model.posterior != "deterministic"
    bound = _bound(bundle, train, settings) if has_density else None
    error, spread = _probe_error(encoder, data, train, validation)
    outputs = manifest.parity["outputs"].values()
    nats = manifest.metrics["log_likelihood"] if bound is None else bound
    n_active = len(manifest.active_units)
    return bundle, {
        "likelihood": manifest.model["likelihood"],
        "small": method.small,
        "elbo": manifest.metrics["elbo"] if has_density else None,
        "log_likelihood": manifest.metrics["log_likelihood"],
        "kl": manifest.metrics["kl"] if has_density else None,
        "bound": bound,
        "latents": manifest.latent_dim,
        "active_units": n_active,
        "probe_error": error,
        "probe_spread": spread,
        "seconds": clock.seconds,
        "parity": max(output["max_abs_difference"] / output["scale"] for output in outputs),
        "text": f"{nats:.1f} nats, {n_active}/{manifest.latent_dim}, {error:.1f} %" + "*" * method.small,
    }


def _bound(bundle: Bundle, rows: NDArray[Any], settings: TrainConfig) -> float:
    """Bound log p(x) with 64 importance samples on the rows that training held out."""
    _, heldout = split_heldout(len(rows), settings.heldout, settings.seed)
    chosen = rows[heldout]
    return importance_sampling(restore_vae(bundle), chosen, n_samples=_BOUND_SAMPLES, samples_per_chunk=64).mean


def _probe_error(
    encoder: OnnxEncoder, data: Data, train: NDArray[Any], validation: NDArray[Any]
) -> tuple[float, float]:
    """Give mean and standard deviation of the validation error over draws of labels, in percent."""
    draws = [draw_labels(data.train_labels, n_labels=N_LABELS, seed=seed) for seed in range(N_DRAWS)]
    features = {"mean": (encoder.embed(train), encoder.embed(validation))}
    probes = probe(features, data.train_labels, data.validation_labels, draws=draws)
    standardised = next(p for p in probes if p.head == "standardised")
    return standardised.mean, standardised.spread


def _require_enough(rows: Rows, n_rows: int) -> None:
    if rows.labels is None or rows.array.ndim != 4 or rows.row_shape[1] % SMALL_SIDE or rows.row_shape[2] % SMALL_SIDE:
        raise InputError(f"got rows of shape {rows.row_shape} from {rows.source}, wanted MNIST's images with labels")
    if n_rows + N_VALIDATION > len(rows):
        raise InputError(
            f"got --rows={n_rows} with {len(rows)} rows in {rows.source}, wanted at most {len(rows) - N_VALIDATION}: "
            f"{N_VALIDATION} are kept to judge by"
        )


def _estimated(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} ± {estimate.standard_error:.2f} nats"


def _use_importance_sampling(bundle: Bundle, data: Data) -> str:
    return _estimated(importance_sampling(restore_vae(bundle), data.validation[:20], n_samples=5000))


def _use_annealed_importance_sampling(bundle: Bundle, data: Data) -> str:
    vae, rows = restore_vae(bundle), data.validation[:20]
    return _estimated(annealed_importance_sampling(vae, rows, n_temperatures=50, start="posterior"))


def _use_hamiltonian_estimator(bundle: Bundle, data: Data) -> str:
    return _estimated(hamiltonian_estimator(restore_vae(bundle), data.validation[:20], n_draws=20, n_warmup=50))


def _use_sample(bundle: Bundle, data: Data) -> str:
    drawn = sample(bundle, 1000, kind="draw")
    return f"mean pixel {drawn.mean():.1f}, of rows {data.validation.mean():.1f}"


def _use_reconstruct(bundle: Bundle, data: Data) -> str:
    rows = data.validation[:1000]
    back = OnnxDecoder(bundle, device="cpu").decode(OnnxEncoder(bundle, device="cpu", threads=1).embed(rows))
    return f"decoded features {_distance(back, rows):.1f} from the rows"


def _use_sample_around(bundle: Bundle, data: Data) -> str:
    row, another = data.validation[:2]
    near = sample_around(bundle, row, 100)
    return f"{_distance(near, row):.1f} from the row, {_distance(near, another):.1f} from another"


def _use_interpolate(bundle: Bundle, data: Data) -> str:
    lengths = np.diff(interpolate(bundle, *data.validation[:2], steps=11), axis=0)
    return f"ten steps of {_distance(lengths, 0):.1f}, ends {_distance(*data.validation[:2]):.1f} apart"


def _use_manifold(bundle: Bundle, data: Data) -> str:
    grid = manifold(bundle, side=20).rows
    return f"{grid.shape[0] * grid.shape[1]} rows, neighbours {_distance(grid[:, 1:], grid[:, :-1]):.1f} apart"


def _use_sweep(bundle: Bundle, data: Data) -> str:
    moved = sorted(_distance(line.rows, line.rows.mean(axis=0)) for line in sweep(bundle, data.validation[0]))
    return f"a latent moves pixels by {moved[0]:.1f} to {moved[-1]:.1f}"


def _use_denoise(bundle: Bundle, data: Data) -> str:
    rows = data.validation[:500]
    # The noise that this model was trained against.
    noisy = rows + np.random.default_rng(0).normal(0, 0.3 * 255, rows.shape)
    return f"error {_distance(noisy, rows):.1f} before, {_distance(denoise(bundle, noisy), rows):.1f} after"


def _use_impute(bundle: Bundle, data: Data, *, corrected: bool = False) -> str:
    rows, average = data.validation[:200], data.train.mean(axis=0)
    missing = np.random.default_rng(0).random(rows.shape) < 0.5
    filled = impute(bundle, rows, missing=missing, corrected=corrected, n_iterations=100)
    ours, plain = (
        _distance(part[missing], rows[missing]) for part in (filled.rows, np.broadcast_to(average, rows.shape))
    )
    accepted = f", {filled.acceptance:.0%} accepted" if corrected else ""
    return f"error {ours:.1f}, of the average image {plain:.1f}{accepted}"


def _use_anomaly_scores(bundle: Bundle, data: Data) -> str:
    rows = data.validation[:500]
    scores = anomaly_scores(bundle, np.concatenate([rows, rows[:, :, ::-1]]))
    return f"area under the curve {roc_auc_score(np.repeat([0, 1], len(rows)), scores):.3f}"


def _use_diagnose(bundle: Bundle, data: Data) -> str:
    found = diagnose(restore_vae(bundle), data.validation[:1000])
    assert found.mutual_information is not None
    low, high = found.mutual_information
    return f"collapse {found.collapse}, rate {found.rate:.1f}, information {low:.1f} to {high:.1f} nats"


def _use_rate_distortion(bundle: Bundle, data: Data) -> str:
    point = rate_distortion(restore_vae(bundle), data.validation[:1000])
    return f"rate {point.rate:.1f}, distortion {point.distortion:.1f} nats"


def _distance(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Give the root mean square difference, in pixel values of 0 to 255."""
    return float(np.sqrt(np.square(np.subtract(ours, theirs, dtype=np.float64)).mean()))


#: What one does with a model, and a figure that tells it does: the method it is done with, and the sentence.
USES: Mapping[str, tuple[str, Callable[[Bundle, Data], str]]] = {
    "importance_sampling": ("three_latents", _use_importance_sampling),
    "annealed_importance_sampling": ("three_latents", _use_annealed_importance_sampling),
    "hamiltonian_estimator": ("three_latents", _use_hamiltonian_estimator),
    "sample": ("vae", _use_sample),
    "reconstruct": ("vae", _use_reconstruct),
    "sample_around": ("vae", _use_sample_around),
    "interpolate": ("vae", _use_interpolate),
    "manifold": ("vae", _use_manifold),
    "sweep": ("vae", _use_sweep),
    "denoise": ("denoising_vae_gaussian", _use_denoise),
    "impute": ("vae", _use_impute),
    "impute_corrected": ("vae", partial(_use_impute, corrected=True)),
    "anomaly_scores": ("vae", _use_anomaly_scores),
    "diagnose": ("vae", _use_diagnose),
    "diagnose_collapsed": ("collapsed", _use_diagnose),
    "rate_distortion_beta_quarter": ("beta_quarter", _use_rate_distortion),
    "rate_distortion": ("vae", _use_rate_distortion),
    "rate_distortion_beta_four": ("beta_four", _use_rate_distortion),
}


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder with MNIST's IDX files.")],
    rows: Annotated[int, typer.Option(min=1000, help="Training rows, of which a tenth is held out.")] = 10_000,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    only: Annotated[list[str] | None, typer.Option(help="A method; may be repeated. All when not given.")] = None,
    results: Annotated[Path | None, typer.Option(help="A JSON file to write the figures to.")] = None,
    page: Annotated[Path | None, typer.Option(help="A page that quotes figures, to bring up to date.")] = None,
) -> None:
    """Train, export and measure, print a table and one line of JSON."""
    for name in only or ():
        if name not in METHODS:
            raise unknown_name("method", name, METHODS)
    chosen = [name for name in METHODS if not only or name in only]
    loaded = Data.load(data, n_rows=rows)
    # Of the code as it was loaded, whatever is written meanwhile.
    where = surroundings()
    measured: dict[str, dict[str, Any]] = {}
    used: dict[str, str] = {}
    with using_threads(1):
        for name in chosen:
            started = time.perf_counter()
            bundle, measured[name] = measure(name, loaded, epochs=epochs)
            used |= {use: make(bundle, loaded) for use, (method, make) in USES.items() if method == name}
            print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    report = {**where, "rows": rows, "epochs": epochs, "labels": N_LABELS, "draws": N_DRAWS, "seed": _SEED}
    report |= {"methods": measured, "uses": used}
    console = Console(width=130)
    console.print(_table(report))
    for use, text in used.items():
        console.print(f"{use}: {text}", highlight=False)
    if results is not None:
        replace_file(results, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    if page is not None:
        texts = {name: row["text"] for name, row in measured.items()} | used
        replace_file(page, quoting(page.read_text(), texts, report["commit"]).encode())
    print(json.dumps(report))


def quoting(page: str, texts: Mapping[str, str], commit: str) -> str:
    """Replace what a table's cells say after `name`:, each up to a semicolon or the cell's end, and the commit."""
    page = re.sub(r"(?<=commit `)[^`]*", commit, page)
    for name, text in texts.items():
        page = re.sub(rf"(?<=`{name}`: )[^;|\n]*?(?=;| \|)", text, page)
    return page


def _table(results: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"{results['rows']:,} MNIST rows, {results['epochs']} epochs, one thread; nats per held-out row "
        f"(of one likelihood comparable, of two not); error of a linear probe with {results['labels']} labels",
        title_justify="left",
    )
    table.add_column("method")
    table.add_column("likelihood")
    for column in ("ELBO", "log p(x|z)", "KL", f"bound, {_BOUND_SAMPLES}", "active", "error %", "s"):
        table.add_column(column, justify="right")
    for name, row in results["methods"].items():
        table.add_row(
            name,
            row["likelihood"] + " *" * row["small"],
            *("-" if row[key] is None else f"{row[key]:.1f}" for key in ("elbo", "log_likelihood", "kl", "bound")),
            f"{row['active_units']}/{row['latents']}",
            f"{row['probe_error']:.1f} ± {row['probe_spread']:.1f}",
            f"{row['seconds']:.1f}",
        )
    table.caption = f"* {SMALL_SIDE} by {SMALL_SIDE} pixels. A point has no ELBO. Denoising encodes a corrupted row."
    table.caption_justify = "left"
    return table


if __name__ == "__main__":
    run_command_line(app)
