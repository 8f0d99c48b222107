"""The bundle's README.md and its picture, written from what is known about the encoder."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vaefeat.bundle import Bundle, Manifest

__all__ = ["model_card", "pipeline_card", "reconstruction_picture", "renamed"]

_CELL_PIXELS = 56
_COLUMNS = 12
_GAP = 4
_CLASSES_SHOWN = 20
_VARIATIONAL = "A variational auto-encoder's encoder"
_KINDS = {"deterministic": "An auto-encoder's encoder"}
_MEAN = "the mean of the posterior q(z|x)"
#: What the feature is, where it is not the posterior's mean.
_FEATURES = {
    "planar": "the mean of the Gaussian that the posterior's flow starts from",
    "iaf": "the mean of the Gaussian that the posterior's flow starts from",
    "categorical": "the probabilities of the posterior q(z|x)",
    "joint": "the mean of the posterior q(z|x) and, after it, the probabilities of its categories",
    "deterministic": "the code",
}


def model_card(manifest: Manifest, *, picture: str | None) -> str:
    """Describe a bundle in Markdown.

    Parameters
    ----------
    manifest : Manifest
    picture : str or None
        File name of the picture of reconstructions; tables have none.
    """
    metrics, parity = manifest.metrics, manifest.parity["outputs"]["mean"]
    shown = f"![rows above, their reconstructions below]({picture})\n\n" if picture else ""
    posterior = manifest.model["posterior"]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return f"""# {manifest.name}

{_KINDS.get(posterior, _VARIATIONAL)}: it turns {manifest.input} into {manifest.latent_dim} features,
{_FEATURES.get(posterior, _MEAN)}. Scaling is inside the graph.

{shown}| | |
|---|---|
| trained on | {manifest.data["n_rows"]:,} rows, `{manifest.data["fingerprint"][:23]}...` |
| values | {manifest.input.low:g} to {manifest.input.high:g} |
| model | {posterior} posterior, {manifest.model["prior"]} prior, \
{manifest.model["likelihood"]} likelihood, {manifest.model["network"]} network |
| objective | {manifest.objective}, {metrics["epochs"]} epochs |
{_bound(manifest)}
| active units | {len(manifest.active_units)} of {manifest.latent_dim} |
{_collapse(manifest)}{_classes(manifest)}{_precision(manifest)}\
| ONNX against torch | mean differs by at most {parity["max_abs_difference"]:.2g} \
(scale {parity["scale"]:.2g}) on {manifest.parity["n_rows"]} rows |
| made with | {versions} |

```python
from vaefeat import OnnxEncoder

features = OnnxEncoder("this folder").embed(rows)  # (n, {manifest.latent_dim}) float32
```

{_probabilities(manifest)}\
`encoder.onnx` also gives the posterior's log-variance (`logvar`) and the last hidden layer (`hidden`,
{manifest.outputs["hidden"]} values); {_decoder(manifest)}; `weights.safetensors` holds the torch
weights. `bundle.json` lists every file with its SHA-256 and the whole configuration.
"""


def pipeline_card(manifest: Manifest) -> str:
    """Describe the bundle of a whole pipeline in Markdown."""
    assert manifest.pipeline is not None
    encoder, parity = manifest.pipeline["encoder"], manifest.pipeline["parity"]
    steps = " -> ".join(step["class"] for step in manifest.pipeline["steps"])
    difference, tied = parity["outputs"]["probabilities"]["max_abs_difference"], parity["labels"]["tied"]
    labels = f"{tied} labels, each of two as probable" if tied else "no label"
    made = " (made of the encoder's reference)" if "n_made" in parity else ""
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return f"""# {manifest.name}

A classifier: it turns {manifest.input} into labels and probabilities. Scaling is inside the graph.

| | |
|---|---|
| encoder | {encoder["name"]} (`{encoder["digest"][:19]}...`), its {encoder["output"]} |
| steps behind it | {steps or "none"} |
{_class_names(manifest)}\
| ONNX Runtime differs from scikit-learn in | on {parity["n_rows"]:,} rows{made} {labels} and \
probabilities by at most {difference:.2g} |
| made with | {versions} |

`pipeline.onnx` needs nothing but ONNX Runtime:

```python
import onnxruntime

session = onnxruntime.InferenceSession("pipeline.onnx")
label, probabilities = session.run(["label", "probabilities"], {{"rows": rows}})
```
"""


def _bound(manifest: Manifest) -> str:
    metrics = manifest.metrics
    # A fine-tuned encoder is measured on rows that it may have seen.
    rows = "held-out " if metrics["n_heldout"] else ""
    log_likelihood = f"log-likelihood | {metrics['log_likelihood']:.2f} nats per row |"
    if manifest.model["posterior"] == "deterministic":
        return f"| {rows}{log_likelihood}"
    return (
        f"| {rows}ELBO | {metrics['elbo']:.2f} nats per row |\n"
        f"| = {log_likelihood}\n"
        f"| - KL divergence | {metrics['kl']:.2f} nats per row |"
    )


def _collapse(manifest: Manifest) -> str:
    # Bundles from before this was measured have no such figure.
    advice = manifest.metrics.get("advice")
    return f"| **posterior collapse** | {advice} |\n" if advice else ""


def _classes(manifest: Manifest) -> str:
    if not manifest.classes:
        return ""
    run = manifest.data["finetuning"]
    return (
        f"{_class_names(manifest)}"
        f"| fine-tuned on | {run['n_labelled']:,} labelled and {run['n_unlabelled']:,} unlabelled rows, "
        f"{run['n_steps']:,} steps |\n"
    )


def _class_names(manifest: Manifest) -> str:
    names = [str(name) for name in manifest.classes]
    shown = names if len(names) <= _CLASSES_SHOWN else [*names[:_CLASSES_SHOWN], "..."]
    return f"| classes | {len(names)}: {', '.join(shown)} |\n"


def _precision(manifest: Manifest) -> str:
    found = manifest.parity.get("quantization")
    if found is None:
        return ""
    errors = ""
    if "error" in found:
        coarse = found[f"error_{found['format']}"]
        errors = f", error with 10 labels a class {coarse:.2f} % against {found['error']:.2f} %"
    if "probability_difference" in found:
        errors += f", probabilities by {found['probability_difference']:.3f} at most"
    return (
        f"| arithmetic | {found['format']}; means differ from float32's by {found['difference']:.3f} deviations"
        f"{errors} |\n"
    )


def _decoder(manifest: Manifest) -> str:
    if manifest.decodes:
        return "`decoder.onnx` turns latents back into rows"
    return (
        "**there is no decoder**, since fine-tuning (`elbo_weight=0`) moved the encoder away from it:\n"
        "reconstructions, samples and scores are the pretrained bundle's"
    )


def _probabilities(manifest: Manifest) -> str:
    if not manifest.classes:
        return ""
    return (
        'It is a classifier, too: `embed(rows, output="probability")` gives a probability for each class, in the\n'
        "order of `OnnxEncoder(...).classes`.\n\n"
    )


def renamed(bundle: Bundle, name: str) -> Bundle:
    """Give a bundle another name, in memory: manifest and model card follow, and with them the digest."""
    manifest = replace(bundle.manifest, name=name)
    contents = {file: bundle.read(file) for file in bundle.files}
    picture = next((file for file in contents if file.endswith(".png")), None)
    contents["README.md"] = model_card(manifest, picture=picture).encode()
    return Bundle.of(manifest, contents)


def reconstruction_picture(rows: NDArray[Any], reconstructions: NDArray[np.float32]) -> bytes:
    """Draw images (n, C, H, W) above their reconstructions, as a PNG.

    Both are stretched from the smallest to the largest value of `rows`.
    """
    count = min(_COLUMNS, len(rows))
    low, high = float(rows[:count].min()), float(rows[:count].max())
    height, width = rows.shape[2:]
    zoom = max(1, round(_CELL_PIXELS / max(height, width)))
    step_y, step_x = height * zoom + _GAP, width * zoom + _GAP
    canvas = np.full((2 * step_y + _GAP, count * step_x + _GAP, 3), 255, dtype=np.uint8)
    for line, images in enumerate((rows, reconstructions)):
        for column in range(count):
            unit = np.clip((images[column].astype(np.float64) - low) / max(high - low, 1e-12), 0, 1)
            pixels = np.rint(unit * 255).astype(np.uint8).transpose(1, 2, 0).repeat(zoom, 0).repeat(zoom, 1)
            y, x = _GAP + line * step_y, _GAP + column * step_x
            # Grey is broadcast to three channels; a fourth (alpha) is not shown.
            canvas[y : y + height * zoom, x : x + width * zoom] = (
                pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1]
            )
    file = io.BytesIO()
    Image.fromarray(canvas).save(file, format="PNG", optimize=True)
    return file.getvalue()
