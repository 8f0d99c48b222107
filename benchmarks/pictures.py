"""The pictures of ``docs/methods.md``, drawn from models trained now on real MNIST.

``python -m benchmarks.pictures --data PATH`` takes some minutes on one core; the last line of the output is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vaefeat import ModelConfig, OnnxEncoder, TrainConfig, generation, inference, plots, pretrain
from vaefeat.atomic import replace_file
from vaefeat.bundle import Bundle
from vaefeat.cli import run_command_line
from vaefeat.data import load_rows
from vaefeat.model.diagnostics import diagnose, rate_distortion
from vaefeat.weights import restore_vae

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_SCALE: dict[str, Any] = {"low": 0, "high": 255}
_KL_WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder with MNIST's IDX files.")],
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("docs/images/methods"),
    rows: Annotated[int, typer.Option(help="Training images.")] = 20_000,
    epochs: Annotated[int, typer.Option(help="Of the larger model; the others train half as many.")] = 10,
) -> None:
    """Train three kinds of model and draw what they can do."""
    images = np.array(load_rows(data, max_rows=rows).array)
    unseen = load_rows(data, split="test", max_rows=4000)
    assert unseen.labels is not None
    out.mkdir(parents=True, exist_ok=True)
    large = _trained(images, ModelConfig(latent_dim=16), TrainConfig(max_epochs=epochs))
    flat = _trained(
        images, ModelConfig(latent_dim=2, network="mlp", hidden_dims=(512, 256)), TrainConfig(max_epochs=epochs)
    )
    cleaner = _trained(
        images,
        ModelConfig(latent_dim=16),
        TrainConfig(max_epochs=max(1, epochs // 2), corruption="gaussian", corruption_level=0.4),
    )
    drawn: dict[str, Callable[[], Figure]] = {
        **_generated(large, flat, np.array(unseen.array)),
        **_inferred(large, cleaner, np.array(unseen.array)),
        **_diagnosed(large, flat, np.array(unseen.array), unseen.labels),
        "rate-distortion": lambda: _rate_distortion(images, max(1, epochs // 2)),
    }
    for name, draw in drawn.items():
        replace_file(out / f"{name}.png", plots.png(draw()))
        print(f"wrote {out / name}.png", flush=True)
    print(json.dumps({"pictures": sorted(drawn), "elbo": large.manifest.metrics["elbo"]}))


def _trained(images: NDArray[Any], model: ModelConfig, train: TrainConfig) -> Bundle:
    return pretrain(images, model=model, train=train, name="mnist")


def _generated(large: Bundle, flat: Bundle, unseen: NDArray[Any]) -> dict[str, Callable[[], Figure]]:
    def interpolations() -> Figure:
        ways = [generation.interpolate(large, unseen[i], unseen[i + 1], steps=12) for i in range(0, 10, 2)]
        return plots.interpolations(np.stack(ways), **_SCALE)

    def neighbours() -> Figure:
        around = generation.sample_around(large, unseen[0], 36, scale=1.5, seed=0)
        return plots.neighbours(unseen[0], inference.denoise(large, unseen[:1])[0], around, **_SCALE)

    return {
        "samples": lambda: plots.samples(generation.sample(large, 64, seed=1), **_SCALE),
        "neighbours": neighbours,
        "interpolations": interpolations,
        "manifold": lambda: plots.manifold(generation.manifold(flat, side=20), **_SCALE),
        "sweeps": lambda: plots.sweeps(generation.sweep(large, unseen[0]), **_SCALE),
    }


def _inferred(large: Bundle, cleaner: Bundle, unseen: NDArray[Any]) -> dict[str, Callable[[], Figure]]:
    some = unseen[:12]

    def denoising() -> Figure:
        noise = np.random.default_rng(0).normal(0, 0.4 * 255, some.shape)
        noisy = np.clip(some + noise, 0, 255).round()
        return plots.denoising(some, noisy, inference.denoise(cleaner, noisy), **_SCALE)

    def inpainting() -> Figure:
        hidden = np.zeros_like(some[0, 0], dtype=bool)
        hidden[hidden.shape[0] // 2 :] = True
        found = inference.impute(large, some, missing=hidden, n_iterations=300, seed=0)
        return plots.inpainting(some, found.missing, found.rows, found.draws[0], **_SCALE)

    def anomalies() -> Figure:
        usual, turned = unseen[:600], np.rot90(unseen[600:900], axes=(2, 3)).copy()
        scores = inference.anomaly_scores(large, usual)
        order = np.argsort(scores)
        return plots.anomalies(
            scores,
            inference.anomaly_scores(large, turned),
            most_likely=usual[order[:18]],
            least_likely=usual[order[-18:][::-1]],
            unusual_name="digits turned by 90°",
            **_SCALE,
        )

    return {"denoising": denoising, "inpainting": inpainting, "anomalies": anomalies}


def _diagnosed(
    large: Bundle, flat: Bundle, unseen: NDArray[Any], labels: NDArray[Any]
) -> dict[str, Callable[[], Figure]]:
    def kl_per_latent() -> Figure:
        found = diagnose(restore_vae(large), unseen[:1000], seed=0)
        assert found.kl_per_unit is not None  # a diagonal Gaussian's always is a sum over latents
        return plots.kl_per_latent(found.kl_per_unit)

    def aggregate() -> Figure:
        encoder = OnnxEncoder(flat, device="cpu")
        mean, std = encoder.embed(unseen), np.exp(0.5 * encoder.embed(unseen, output="logvar"))
        noise = np.random.default_rng(0).normal(size=(2, *mean.shape))
        return plots.aggregate_posterior(mean + std * noise[0], noise[1])

    return {
        "kl-per-latent": kl_per_latent,
        "aggregate-posterior": aggregate,
        "latent-map": lambda: plots.latent_map(OnnxEncoder(flat, device="cpu").embed(unseen), labels),
    }


def _rate_distortion(images: NDArray[Any], epochs: int) -> Figure:
    rates, distortions = [], []
    for weight in _KL_WEIGHTS:
        model = ModelConfig(latent_dim=16, network="mlp", hidden_dims=(256,))
        bundle = _trained(images[:-1000], model, TrainConfig(kl_weight=weight, max_epochs=epochs))
        point = rate_distortion(restore_vae(bundle), images[-1000:])
        rates.append(point.rate)
        distortions.append(point.distortion)
    return plots.rate_distortion(rates, distortions, [f"beta {weight:g}" for weight in _KL_WEIGHTS])


if __name__ == "__main__":
    run_command_line(app)
