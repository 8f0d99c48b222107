"""The exported graphs compute what the model computes, and hold nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_wine

from vaefeat import Bundle, ModelConfig, TrainConfig, load_bundle, pretrain
from vaefeat.errors import BundleError, ExportError
from vaefeat.export import (
    OPSET,
    PARITY_TOLERANCE,
    export_decoder,
    export_encoder,
    measure_parity,
)
from vaefeat.feeds import split_heldout
from vaefeat.model.vae import VAE
from vaefeat.weights import restore_vae, weights_of

SMALL = ModelConfig(latent_dim=3, hidden_dims=(16,), channels=(8,))
KINDS = ["conv", "vector"]


@pytest.fixture(scope="module")
def wine() -> NDArray[np.float32]:
    table: NDArray[Any] = load_wine().data
    return table.astype(np.float32)


@pytest.fixture(scope="module")
def bundles(digits_bundle: Path, wine: NDArray[np.float32]) -> dict[str, Bundle]:
    vector = pretrain(wine, model=SMALL, train=TrainConfig(max_epochs=3), progress=False)
    return {"conv": load_bundle(digits_bundle), "vector": vector}


@pytest.fixture(scope="module")
def rows(digits_rows: NDArray[np.uint8], wine: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    return {"conv": digits_rows, "vector": wine}


def run(graph: bytes, **inputs: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
    """Run a graph by ONNX Runtime alone, without any code of ours."""
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@torch.no_grad()
def run_torch(bundle: Bundle, rows: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
    """Compute what the graphs should, from the parts of the restored model."""
    vae = restore_vae(bundle)
    hidden = vae.encoder(vae.preprocessing(torch.from_numpy(rows)))
    posterior = vae.posterior(hidden)
    mean, logvar = posterior.mean, 2 * posterior.stddev.log()
    return {"mean": mean.numpy(), "logvar": logvar.numpy(), "hidden": hidden.numpy()}


@pytest.mark.parametrize("kind", KINDS)
def test_parity_figures_hold_when_computed_by_another_route(
    bundles: dict[str, Bundle], rows: dict[str, NDArray[Any]], kind: str
) -> None:
    bundle, parity = bundles[kind], bundles[kind].manifest.parity
    _, heldout = split_heldout(len(rows[kind]), 0.1, seed=0)
    shown = rows[kind][heldout]
    wanted, got = run_torch(bundle, shown), run(bundle.read("encoder.onnx"), rows=shown)
    with torch.no_grad():
        vae = restore_vae(bundle)
        wanted["reconstruction"] = vae.reconstruct(torch.from_numpy(wanted["mean"])).numpy()
    got["reconstruction"] = run(bundle.read("decoder.onnx"), latents=wanted["mean"])["rows"]

    assert (parity["n_rows"], parity["tolerance"]) == (len(shown), PARITY_TOLERANCE)
    assert parity["outputs"].keys() == wanted.keys() == got.keys()
    aggregate = wanted["mean"].var(axis=0) + np.exp(wanted["logvar"]).mean(axis=0)
    scales = {name: values.std() for name, values in wanted.items()}
    scales |= {"mean": np.sqrt(aggregate).min(), "logvar": 1.0, "reconstruction": 1.0}
    # In the scale of the network's input, and but for float32's own steps.
    steps = 2 * np.spacing(np.abs(wanted["reconstruction"]))
    beyond = np.maximum(np.abs(got["reconstruction"] - wanted["reconstruction"]) - steps, 0)
    got["reconstruction"] = wanted["reconstruction"] + beyond * vae.preprocessing.scale.numpy()
    for name, figures in parity["outputs"].items():
        difference = np.abs(got[name] - wanted[name]).max()
        assert figures["scale"] == pytest.approx(scales[name], rel=1e-3)
        assert difference <= PARITY_TOLERANCE * figures["scale"]
        assert difference == pytest.approx(figures["max_abs_difference"], abs=1e-5 * figures["scale"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("weight", "amount"),
    [("posterior.mean.bias", 1e-3), ("posterior.logvar.weight", 1e-2), ("preprocessing.shift", 0.1)],
)
def test_graph_that_differs_from_the_model_is_found_out(
    bundles: dict[str, Bundle], rows: dict[str, NDArray[Any]], kind: str, weight: str, amount: float
) -> None:
    vae = restore_vae(bundles[kind])
    measure_parity(vae, bundles[kind], rows[kind][:100])
    with torch.no_grad():
        vae.state_dict()[weight].view(-1)[-1].add_(amount)
    with pytest.raises(ExportError, match=r"the ONNX graph's (mean|logvar|hidden) differs from torch's by .* of its"):
        measure_parity(vae, bundles[kind], rows[kind][:100])


def test_decoder_that_differs_from_the_model_is_found_out(
    bundles: dict[str, Bundle], rows: dict[str, NDArray[Any]]
) -> None:
    vae = restore_vae(bundles["vector"])
    with torch.no_grad():
        vae.state_dict()["decoder.layers.1.bias"].add_(0.01)
    with pytest.raises(ExportError, match="the ONNX graph's reconstruction differs"):
        measure_parity(vae, bundles["vector"], rows["vector"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graph", ["encoder.onnx", "decoder.onnx"])
def test_graph_is_plain_and_takes_any_number_of_rows(bundles: dict[str, Bundle], kind: str, graph: str) -> None:
    content = bundles[kind].read(graph)
    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert OPSET <= 22
    assert not model.functions
    assert not any(node.op_type.startswith("Random") or node.domain for node in model.graph.node)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    for end in (*model.graph.input, *model.graph.output):
        assert end.type.tensor_type.shape.dim[0].dim_param == "batch"
    spec = bundles[kind].manifest.input
    name, shape, dtype = ("rows", spec.shape, spec.dtype)
    if graph == "decoder.onnx":
        name, shape, dtype = "latents", (bundles[kind].manifest.latent_dim,), "float32"
    for n_rows in (1, 2, 3, 100):
        for output in run(content, **{name: np.ones((n_rows, *shape), dtype)}).values():
            assert len(output) == n_rows


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_nothing_of_this_machine(bundles: dict[str, Bundle], kind: str) -> None:
    here = [str(Path.cwd()), str(Path.home()), str(Path(torch.__file__).parents[1]), "site-packages"]
    here = [path for path in here if len(path) > 4]  # some containers have / as home
    bundle = bundles[kind]
    for name in bundle.files:
        content = bundle.read(name)
        assert not [word for word in here if word.encode() in content], name


@pytest.mark.parametrize("kind", KINDS)
def test_restored_model_is_the_one_that_was_exported(
    bundles: dict[str, Bundle], rows: dict[str, NDArray[Any]], kind: str
) -> None:
    bundle = bundles[kind]
    vae = restore_vae(bundle)
    assert not vae.training
    assert vae.row_shape == bundle.manifest.input.shape
    stored = safetensors.torch.load(bundle.read("weights.safetensors"))
    assert stored.keys() == vae.state_dict().keys()
    assert weights_of(vae) == bundle.read("weights.safetensors")
    again = {"encoder.onnx": export_encoder(vae, rows[kind][:1]), "decoder.onnx": export_decoder(vae)}
    for name, content in again.items():
        assert content == bundle.read(name)


def test_weights_that_do_not_fit_the_configuration_are_refused(bundles: dict[str, Bundle]) -> None:
    manifest, weights = bundles["vector"].manifest, bundles["vector"].read("weights.safetensors")
    tensors = safetensors.torch.load(weights)
    renamed = {f"x{name}": tensor for name, tensor in tensors.items()}
    spoiled = {
        "of another model": bundles["conv"].read("weights.safetensors"),
        "renamed": safetensors.torch.save(renamed),
        "fewer": safetensors.torch.save(dict(list(tensors.items())[1:])),
        "cut": weights[:-1],
        "none": b"",
    }
    for content in spoiled.values():
        forged = Bundle.of(manifest, {"encoder.onnx": b"", "weights.safetensors": content})
        with pytest.raises(BundleError, match="weights in bundle 'encoder' that do not fit its configuration"):
            restore_vae(forged)


@pytest.mark.parametrize(
    "change",
    [
        {"latent_dim": 4},
        {"hidden_dims": [17]},
        {"network": "conv"},
        {"prior": "unknown"},
        {"novelty": 1},
        {"hidden_dims": []},
    ],
    ids=str,
)
def test_configuration_that_does_not_fit_the_weights_is_refused(
    bundles: dict[str, Bundle], change: dict[str, Any]
) -> None:
    bundle = bundles["vector"]
    manifest = type(bundle.manifest).from_dict(
        {**bundle.manifest.to_dict(), "model": {**bundle.manifest.model, **change}}
    )
    forged = Bundle.of(manifest, {name: bundle.read(name) for name in bundle.files})
    with pytest.raises(BundleError, match="do not fit its configuration"):
        restore_vae(forged)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_one_example_row_is_enough_to_export(dtype: type) -> None:
    images: NDArray[Any] = np.random.default_rng(0).integers(0, 9, (5, 3, 8, 9)).astype(dtype)
    vae = VAE.for_rows(SMALL, images).eval()
    content = export_encoder(vae, images[:1])
    with torch.no_grad():
        expected = vae.features(torch.from_numpy(images))
    for got, wanted in zip(run(content, rows=images).values(), expected, strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)
