"""Labels and probabilities over HTTP, of a whole pipeline and of a fine-tuned encoder, by every door."""

from __future__ import annotations

import asyncio
import io
from base64 import b64encode
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from serving.codec import decode_npy, encode_npy
from serving.errors import ModelError
from serving.media import JSON, NPY, RAW
from serving.models import Models
from serving.served_model import Place, ServedModel
from tests.serving.conftest import save_logarithm
from tests.serving.running import within
from vaefeat import FineTuneClassifier, VAEFeatures, export_pipeline, load_bundle
from vaefeat.bundle import Bundle

TARGET = load_digits().target
NAMES = np.array(["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"])
CPU = Place(device="cpu", threads=1)


@pytest.fixture(scope="module")
def pipe(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> Pipeline:
    line = LogisticRegression(max_iter=2000)
    made = make_pipeline(VAEFeatures(digits_bundle, device="cpu"), StandardScaler(), line)
    return made.fit(digits_rows[:400], NAMES[TARGET[:400]])


@pytest.fixture(scope="module")
def folder(pipe: Pipeline, digits_rows: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "pipeline.onnx-bundle"
    export_pipeline(pipe, path, X=digits_rows, name="numerals")
    return path


@pytest.fixture(scope="module")
def fine_tuned(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> FineTuneClassifier:
    y = np.where(np.arange(len(TARGET)) < 100, TARGET, -1)
    return FineTuneClassifier(digits_bundle, max_steps=10, batch_size=32, random_state=0, device="cpu").fit(
        digits_rows, y
    )


@pytest.fixture(scope="module")
def models(
    digits_bundle: Path, folder: Path, fine_tuned: FineTuneClassifier, tmp_path_factory: pytest.TempPathFactory
) -> Models:
    """Give an encoder, ``digits``, and two classifiers: ``numerals`` of texts, a pipeline, and ``tuned`` of numbers."""
    tuned = tmp_path_factory.mktemp("bundles") / "tuned"
    fine_tuned.save_bundle(tuned, name="tuned")
    return Models.from_bundles([digits_bundle, folder, tuned], place=CPU)


def ask(models: Models, path: str, content: bytes, *, kind: str = NPY, accept: str | None = None) -> httpx.Response:
    headers = {"content-type": kind} | ({"accept": accept} if accept else {})
    answer = within(models, lambda client: client.post(path, content=content, headers=headers))
    assert isinstance(answer, httpx.Response)
    return answer


def as_png(row: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(row[0]).save(file, "PNG")
    return file.getvalue()


def bodies(rows: NDArray[np.uint8]) -> dict[str, bytes]:
    return {NPY: encode_npy(rows), RAW: rows.tobytes(), JSON: orjson.dumps({"rows": rows.tolist()})}


@pytest.mark.parametrize("kind", [NPY, RAW, JSON])
def test_predict_answers_labels_and_probabilities_with_class_names(
    kind: str, models: Models, pipe: Pipeline, digits_rows: NDArray[np.uint8]
) -> None:
    rows = digits_rows[:300]
    answer = ask(models, "/v1/predict?model=numerals", bodies(rows)[kind], kind=kind)
    assert answer.status_code == 200
    told = answer.json()
    assert set(told) == {"model", "version", "digest", "classes", "labels", "shape", "probabilities"}
    assert told["classes"] == pipe.classes_.tolist()
    assert told["labels"] == pipe.predict(rows).tolist()
    assert told["shape"] == [300, 10]
    np.testing.assert_allclose(np.array(told["probabilities"]), pipe.predict_proba(rows), rtol=0, atol=1e-6)
    assert answer.headers["x-vaefeat-digest"] == told["digest"]


def test_predict_of_a_fine_tuned_encoder_answers_alike(
    models: Models, fine_tuned: FineTuneClassifier, digits_rows: NDArray[np.uint8]
) -> None:
    told = ask(models, "/v1/predict?model=tuned", encode_npy(digits_rows[:50])).json()
    assert told["classes"] == list(range(10))
    assert told["labels"] == fine_tuned.predict(digits_rows[:50]).tolist()
    got = np.array(told["probabilities"], np.float32)
    np.testing.assert_array_equal(got, fine_tuned.predict_proba(digits_rows[:50]))


def test_predict_of_an_image_is_that_of_its_row(models: Models, pipe: Pipeline, digits_rows: NDArray[np.uint8]) -> None:
    told = ask(models, "/v1/predict?model=numerals", as_png(digits_rows[5]), kind="image/png").json()
    assert told["labels"] == pipe.predict(digits_rows[5:6]).tolist()


def test_predict_as_arrays_gives_what_output_names(
    models: Models, pipe: Pipeline, fine_tuned: FineTuneClassifier, digits_rows: NDArray[np.uint8]
) -> None:
    rows, content = digits_rows[:40], encode_npy(digits_rows[:40])
    probabilities = decode_npy(ask(models, "/v1/predict?model=numerals", content, accept=NPY).content)
    np.testing.assert_allclose(probabilities, pipe.predict_proba(rows), rtol=0, atol=1e-6)
    assert probabilities.dtype == np.float32
    raw = ask(models, "/v1/predict?model=numerals", content, accept=RAW)
    assert raw.headers["x-vaefeat-shape"] == "40,10"
    assert raw.content == probabilities.tobytes()
    labels = ask(models, "/v1/predict?model=numerals&output=label", content, accept=NPY).content
    np.testing.assert_array_equal(np.load(io.BytesIO(labels), allow_pickle=False), pipe.predict(rows))
    numbers = ask(models, "/v1/predict?model=tuned&output=label", content, accept=RAW)
    np.testing.assert_array_equal(np.frombuffer(numbers.content, "<i8"), fine_tuned.predict(rows))
    assert numbers.headers["x-vaefeat-shape"] == "40"
    told = ask(models, "/v1/predict?model=numerals&output=label", content).json()
    assert "probabilities" not in told
    assert told["labels"] == pipe.predict(rows).tolist()


@pytest.mark.parametrize(
    ("path", "accept", "told"),
    [
        ("/v1/predict?model=digits", None, "an encoder without classes"),
        ("/v1/predict?model=numerals&output=mean", None, "wanted 'label', 'probabilities' or none for both"),
        ("/v1/predict?model=numerals&output=label", RAW, "texts have no form"),
        ("/v1/embed?model=numerals", None, "got output='mean' of 'numerals'"),
        ("/v1/embed?model=tuned&output=label", None, "what it predicts is at /v1/predict"),
    ],
)
def test_request_for_what_a_model_does_not_give_is_refused_with_where_to_go(
    path: str, accept: str | None, told: str, models: Models, digits_rows: NDArray[np.uint8]
) -> None:
    answer = ask(models, path, encode_npy(digits_rows[:1]), accept=accept)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_parameter")
    assert told in answer.json()["error"]["message"]


def test_probabilities_of_a_pipeline_are_embedded_where_they_are_asked_for(
    models: Models, pipe: Pipeline, digits_rows: NDArray[np.uint8]
) -> None:
    answer = ask(models, "/v1/embed?model=numerals&output=probabilities", encode_npy(digits_rows[:9]))
    np.testing.assert_allclose(decode_npy(answer.content), pipe.predict_proba(digits_rows[:9]), rtol=0, atol=1e-6)


def test_openai_s_embeddings_of_a_pipeline_are_refused_with_where_to_go(
    models: Models, digits_rows: NDArray[np.uint8]
) -> None:
    body = orjson.dumps({"model": "numerals", "input": [digits_rows[0].ravel().tolist()]})
    answer = ask(models, "/v1/embeddings", body, kind=JSON)
    assert answer.status_code == 400
    assert "POST to /v1/predict" in answer.json()["error"]["message"]


def test_predict_of_several_images_tells_which_cannot_be_read(
    models: Models, pipe: Pipeline, digits_rows: NDArray[np.uint8]
) -> None:
    async def talk(client: httpx.AsyncClient) -> list[httpx.Response]:
        files = {"a": as_png(digits_rows[0]), "b": b"no image", "c": as_png(digits_rows[2])}
        return [
            await client.post("/v1/predict?model=numerals", files=files, headers={"accept": accept})
            for accept in (JSON, NPY)
        ]

    partly, refused = within(models, talk)
    told = partly.json()
    wanted = pipe.predict(digits_rows[[0, 2]])
    assert told["labels"] == [wanted[0], None, wanted[1]]
    assert [failed["index"] for failed in told["errors"]] == [1]
    assert told["probabilities"][1] == [0.0] * 10
    assert refused.status_code == 422


def infer(rows: NDArray[np.uint8], **fields: Any) -> bytes:
    tensor = {"name": "rows", "datatype": "UINT8", "shape": list(rows.shape), "data": rows.ravel().tolist()}
    return orjson.dumps({"inputs": [tensor], **fields})


@pytest.mark.parametrize(("model", "datatype"), [("numerals", "BYTES"), ("tuned", "INT64")])
def test_open_inference_protocol_describes_and_gives_labels_and_probabilities(
    model: str,
    datatype: str,
    models: Models,
    pipe: Pipeline,
    fine_tuned: FineTuneClassifier,
    digits_rows: NDArray[np.uint8],
) -> None:
    rows = digits_rows[:7]
    asked = [{"name": "label"}, {"name": "probabilities"}]

    async def talk(client: httpx.AsyncClient) -> tuple[Any, Any, httpx.Response]:
        described = await client.get(f"/v2/models/{model}")
        told = await client.post(f"/v2/models/{model}/infer", content=infer(rows, outputs=asked))
        binary = infer(rows, outputs=asked, parameters={"binary_data_output": True})
        return described.json(), told.json(), await client.post(f"/v2/models/{model}/infer", content=binary)

    described, told, binary = within(models, talk)
    tensors = {tensor["name"]: tensor for tensor in described["outputs"]}
    assert (tensors["label"]["datatype"], tensors["label"]["shape"]) == (datatype, [-1])
    assert (tensors["probabilities"]["datatype"], tensors["probabilities"]["shape"]) == ("FP32", [-1, 10])
    classifier: Any = pipe if model == "numerals" else fine_tuned
    wanted = classifier.predict(rows).tolist()
    labels, probabilities = told["outputs"]
    assert (labels["datatype"], labels["shape"], labels["data"]) == (datatype, [7], wanted)
    np.testing.assert_allclose(
        np.reshape(probabilities["data"], probabilities["shape"]), classifier.predict_proba(rows), rtol=0, atol=1e-6
    )
    length = int(binary.headers["inference-header-content-length"])
    head, rest = orjson.loads(binary.content[:length]), binary.content[length:]
    size = head["outputs"][0]["parameters"]["binary_data_size"]
    assert read_labels(rest[:size], datatype) == wanted
    assert len(rest) == size + head["outputs"][1]["parameters"]["binary_data_size"]


def read_labels(blob: bytes, datatype: str) -> list[Any]:
    if datatype == "INT64":
        return list(np.frombuffer(blob, "<i8"))
    found: list[Any] = []
    while blob:
        end = 4 + int.from_bytes(blob[:4], "little")
        found.append(blob[4:end].decode())
        blob = blob[end:]
    return found


def test_open_inference_protocol_gives_all_of_a_pipeline_where_nothing_is_named(
    models: Models, digits_rows: NDArray[np.uint8]
) -> None:
    told = ask(models, "/v2/models/numerals/infer", infer(digits_rows[:2]), kind=JSON).json()
    assert [output["name"] for output in told["outputs"]] == ["label", "probabilities"]
    told = ask(models, "/v2/models/tuned/infer", infer(digits_rows[:2]), kind=JSON).json()
    assert [output["name"] for output in told["outputs"]] == ["mean"]


def test_open_inference_protocol_has_no_label_for_an_image_that_cannot_be_read(models: Models) -> None:
    images = [b64encode(content).decode() for content in (b"no image", as_png(np.zeros((1, 8, 8), np.uint8)))]
    tensor = {"name": "images", "datatype": "BYTES", "shape": [2], "data": images}
    answer = ask(models, "/v2/models/numerals/infer", orjson.dumps({"inputs": [tensor]}), kind=JSON)
    assert answer.status_code == 400
    assert "item 0 cannot be read, so that it has no label" in answer.json()["error"]


def test_label_of_probabilities_that_are_no_numbers_is_not_given(tmp_path: Path) -> None:
    encoder = save_logarithm(tmp_path / "rest", of_rest=True)  # log(1 - x): no number where x is above 1
    rows = np.random.default_rng(0).uniform(0, 0.9, (50, 2)).astype(np.float32)
    pipe = make_pipeline(VAEFeatures(encoder, device="cpu"), LogisticRegression()).fit(
        rows, (rows[:, 0] > 0.4).astype(int)
    )
    export_pipeline(pipe, tmp_path / "pipeline", X=rows)
    models = Models.from_bundles([tmp_path / "pipeline"], place=CPU)
    tensor = {"name": "rows", "datatype": "FP32", "shape": [1, 2], "data": [2.0, 2.0]}
    body = orjson.dumps({"inputs": [tensor], "outputs": [{"name": "label"}]})
    answer = ask(models, "/v2/models/rest-pipeline/infer", body, kind=JSON)
    assert answer.status_code == 500
    assert "NaN or infinity computed for row 0" in answer.json()["error"]
    assert ask(models, "/v1/predict", encode_npy(rows * 3)).status_code == 500


def test_rows_of_many_requests_at_once_get_the_bits_that_each_gets_alone(
    models: Models, digits_rows: NDArray[np.uint8]
) -> None:
    async def talk(client: httpx.AsyncClient) -> tuple[list[Any], list[Any]]:
        async def one(i: int, path: str) -> Any:
            return (await client.post(path, content=encode_npy(digits_rows[i : i + 1 + i % 5]))).content

        client.headers.update({"content-type": NPY, "accept": NPY})
        paths = ["/v1/predict?model=numerals", "/v1/predict?model=tuned", "/v1/embed?model=tuned"]
        asked = [(i, path) for i in range(60) for path in paths]
        together = await asyncio.gather(*(one(i, path) for i, path in asked))
        return list(together), [await one(i, path) for i, path in asked]

    together, alone = within(models, talk)
    assert together == alone


def test_pipeline_whose_device_computes_something_else_is_not_served(folder: Path) -> None:
    bundle = load_bundle(folder)
    contents = {file: bundle.read(file) for file in bundle.files}
    figures = safetensors.numpy.load(contents["reference.safetensors"])
    ServedModel(bundle, place=CPU).warm_up()
    for name, wrong in (
        ("probabilities", figures["probabilities"][:, ::-1]),
        ("labels", (figures["labels"] + 1) % 10),
    ):
        spoilt = safetensors.numpy.save({**figures, name: np.ascontiguousarray(wrong)})
        lying = Bundle.of(bundle.manifest, {**contents, "reference.safetensors": spoilt})
        with pytest.raises(ModelError, match="computes labels or probabilities"):
            ServedModel(lying, place=CPU).warm_up()


def test_new_version_of_a_pipeline_takes_over_and_the_old_one_stays_to_be_asked(
    pipe: Pipeline, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = tmp_path / "numerals"
    first = export_pipeline(pipe, path, X=digits_rows, name="numerals")
    models = Models.from_bundles([path], place=CPU)
    second = export_pipeline(pipe, path, X=digits_rows[:100], name="numerals")
    assert models.load("numerals").digest == second.digest != first.digest
    told = ask(models, f"/v1/predict?version={first.digest}", encode_npy(digits_rows[:1])).json()
    assert told["digest"] == first.digest
    assert replace(first.manifest, pipeline=second.manifest.pipeline) == second.manifest


def test_card_tells_classes_and_outputs_of_a_pipeline(models: Models, pipe: Pipeline) -> None:
    async def talk(client: httpx.AsyncClient) -> Any:
        return (await client.get("/v1/models/numerals")).json()

    card = within(models, talk)
    assert card["classes"] == pipe.classes_.tolist()
    assert card["outputs"] == {"probabilities": 10}


def test_drift_of_predicted_rows_is_that_of_the_encoder_on_the_same_rows(
    folder: Path, fine_tuned: FineTuneClassifier, digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    dark, odd = digits_rows[:500], 16 - digits_rows[:500]
    encoders = (load_bundle(digits_bundle), fine_tuned.bundle_)
    for encoder, classifier in zip(encoders, (load_bundle(folder), fine_tuned.bundle_), strict=True):
        for rows, moved in ((dark, False), (odd, True)):
            watching, predicting = ServedModel(encoder, place=CPU), ServedModel(classifier, place=CPU)
            predicting.warm_up()
            assert watching.drift is not None
            assert predicting.drift is not None
            assert predicting.drift.read() is None, "proving itself was taken for what is served"
            watching.observe(["mean"], watching.compute(rows, ["mean"]))
            found = predicting.compute(rows, ["label", "probabilities"])
            assert [len(part.shape) for part in found] == [1, 2]
            theirs, ours = watching.drift.read(), predicting.drift.read()
            assert theirs is not None
            assert ours is not None
            assert vars(ours) == pytest.approx(vars(theirs), rel=1e-4)
            assert (ours.mean_shift > 0.5) == moved


def test_pipeline_without_means_in_its_graph_is_served_without_drift(
    digits_bundle: Path, pipe: Pipeline, digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    encoder = load_bundle(digits_bundle)
    contents = {file: encoder.read(file) for file in encoder.files if file != "reference.safetensors"}
    bare = Pipeline([("features", VAEFeatures(Bundle.of(encoder.manifest, contents))), *pipe.steps[1:]])
    bare[0].fit(digits_rows)
    bundle = export_pipeline(bare, tmp_path / "bare", X=digits_rows)
    assert bundle.manifest.schema_version == 4
    model = ServedModel(bundle, place=CPU)
    model.warm_up()
    assert model.drift is None
    np.testing.assert_array_equal(
        np.array(model.classes)[model.compute(digits_rows, ["label"])[0]], pipe.predict(digits_rows)
    )
