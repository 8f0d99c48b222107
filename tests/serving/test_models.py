"""Versions: loaded beside the old one, proved, put in place, chosen again; and what is bad changes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.errors import ModelError, RequestError, SetupError
from serving.models import Models, find_bundles
from serving.served_model import Place, ServedModel
from serving.service import Service
from serving.settings import Limits
from vaefeat.bundle import Bundle, load_bundle
from vaefeat.encoder import OnnxEncoder
from vaefeat.reference import REFERENCE_FILE, Reference, load_reference

PLACE = Place(device="cpu", max_batch_rows=8)


@pytest.fixture
def folder(tmp_path: Path, digits_bundle: Path) -> Path:
    load_bundle(digits_bundle).save(tmp_path / "digits")
    return tmp_path / "digits"


def test_load_of_a_new_bundle_takes_over_and_keeps_the_version_before(
    folder: Path, variant: Callable[..., Bundle], digits_rows: NDArray[np.uint8]
) -> None:
    models = Models.from_bundles([folder], place=PLACE)
    (old,) = models.current
    variant().save(folder)
    new = models.load("digits")
    assert models.find("digits") is new
    assert models.versions("digits") == (new.version, old.version)
    assert models.find("digits", old.version) is old
    assert models.find(None, old.digest) is old
    (before,), (after,) = (model.compute(digits_rows[:3], ["mean"]) for model in (old, new))
    np.testing.assert_array_equal(after, before * 2)


def test_version_may_be_shortened_to_twelve_digits(folder: Path, variant: Callable[..., Bundle]) -> None:
    models = Models.from_bundles([folder], place=PLACE)
    (old,) = models.current
    variant().save(folder)
    new = models.load("digits")
    assert [models.find("digits", model.version[:12]) for model in (old, new)] == [old, new]
    assert models.find("digits", old.digest[:19]) is old
    for wanted in (old.version[:11], old.version[:12] + "x", old.version + "0"):
        with pytest.raises(RequestError, match="wanted one of"):
            models.find("digits", wanted)


def test_swap_is_logged_as_a_roll_back_is(
    folder: Path, variant: Callable[..., Bundle], caplog: pytest.LogCaptureFixture
) -> None:
    models = Models.from_bundles([folder], place=PLACE)
    (old,) = models.current
    variant().save(folder)
    new = models.load("digits")
    models.choose("digits", old.version)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"serving digits in version {new.version[:12]}"),
        ("WARNING", f"serving digits in version {old.version[:12]}, as asked"),
    ]


def test_load_of_a_model_that_is_new_says_that_it_needs_a_restart(folder: Path) -> None:
    with pytest.raises(RequestError, match="a model that is new needs a restart"):
        Models.from_bundles([folder], place=PLACE).load("other")


def test_load_of_an_unchanged_bundle_changes_nothing(folder: Path) -> None:
    models = Models.from_bundles([folder], place=PLACE)
    (old,) = models.current
    assert models.load("digits") is old
    assert models.generation == 0


def test_load_of_a_third_version_lets_the_first_go(folder: Path, variant: Callable[..., Bundle]) -> None:
    models = Models.from_bundles([folder], place=PLACE)
    first = models.current[0].version
    for factor in (2.0, 3.0):
        variant(factor=factor).save(folder)
        models.load("digits")
    assert first not in models.versions("digits")
    assert len(models.versions("digits")) == 2


@pytest.mark.parametrize("fault", ["edited", "dishonest", "renamed", "gone"])
def test_load_of_a_bad_bundle_leaves_the_old_one_serving(
    folder: Path, variant: Callable[..., Bundle], fault: str
) -> None:
    models = Models.from_bundles([folder], place=PLACE)
    (old,) = models.current
    if fault == "edited":
        (folder / "encoder.onnx").write_bytes(b"something else")
    elif fault == "dishonest":
        variant(honest=False).save(folder)
    elif fault == "renamed":
        variant(name="other").save(folder)
    else:
        (folder / "bundle.json").unlink()
    with pytest.raises(ModelError):
        models.load("digits")
    assert models.find("digits") is old
    assert models.versions("digits") == (old.version,)


def test_choose_of_the_version_before_rolls_back_and_forth(folder: Path, variant: Callable[..., Bundle]) -> None:
    models = Models.from_bundles([folder], place=PLACE)
    (old,) = models.current
    variant().save(folder)
    new = models.load("digits")
    assert models.choose("digits", old.version) is old
    assert models.versions("digits") == (old.version, new.version)
    assert models.load("digits") is new  # what the folder holds
    with pytest.raises(RequestError) as caught:
        models.choose("digits", "0" * 64)
    assert caught.value.status == 404


def test_reload_keeps_what_was_chosen_until_the_folder_changes(folder: Path, variant: Callable[..., Bundle]) -> None:
    models = Models.from_bundles([folder], place=PLACE)
    (old,) = models.current
    variant().save(folder)
    new = models.load("digits")
    models.choose("digits", old.version)
    models.reload("digits")
    assert models.find("digits") is old
    variant(factor=3.0).save(folder)
    models.reload("digits")
    third = models.find("digits")
    assert third not in (old, new)
    models.choose("digits", old.version)
    load_bundle(folder).save(folder)  # written again, and the same
    models.reload("digits")
    assert models.find("digits") is old
    assert models.load("digits") is third  # asked for by name, the folder decides


def test_reload_of_what_was_chosen_and_then_put_into_the_folder_follows_the_folder_again(
    folder: Path, variant: Callable[..., Bundle], digits_bundle: Path
) -> None:
    models = Models.from_bundles([folder], place=PLACE)
    (old,) = models.current
    variant().save(folder)
    models.load("digits")
    models.choose("digits", old.version)
    load_bundle(digits_bundle).save(folder)
    models.reload("digits")
    assert models.find("digits") is old
    variant().save(folder)
    models.reload("digits")
    assert models.find("digits") is not old


def test_reload_of_a_name_that_was_unloaded_meanwhile_leaves_it_unloaded(
    folder: Path, variant: Callable[..., Bundle], tmp_path: Path
) -> None:
    variant(name="second").save(tmp_path / "second")
    models = Models.from_bundles([folder, tmp_path / "second"], place=PLACE)

    async def unload_while_reloading() -> None:
        service = Service(models, Limits(), lanes=1)
        under_way = asyncio.create_task(service.changes.run(time.sleep, 0.2))
        await asyncio.sleep(0.05)
        unloading = asyncio.create_task(service.changes.run(models.unload, "second"))
        await asyncio.sleep(0)
        await asyncio.gather(under_way, unloading, service.changes.reload())
        await service.stop()

    asyncio.run(unload_while_reloading())
    assert models.names == ["digits"]


def test_unload_of_the_last_model_is_refused_and_of_another_is_not(
    folder: Path, variant: Callable[..., Bundle], tmp_path: Path
) -> None:
    variant(name="second").save(tmp_path / "second")
    models = Models.from_bundles([folder, tmp_path / "second"], place=PLACE)
    models.unload("second")
    assert models.names == ["digits"]
    with pytest.raises(RequestError, match="only one"):
        models.unload("digits")
    assert models.load("second").name == "second"
    assert models.names == ["digits", "second"]


def test_find_of_what_is_not_served_says_what_is(folder: Path) -> None:
    models = Models.from_bundles([folder], place=PLACE)
    with pytest.raises(RequestError, match="wanted one of 'digits'") as caught:
        models.find("other")
    assert caught.value.status == 404


def test_warm_up_of_a_device_that_computes_something_else_fails(variant: Callable[..., Bundle]) -> None:
    with pytest.raises(ModelError, match="standard deviations"):
        ServedModel(variant(factor=1.1, honest=False), place=PLACE).warm_up()
    ServedModel(variant(factor=1.1), place=PLACE).warm_up()


def test_proof_of_many_rows_is_computed_in_batches_and_may_be_of_the_first_alone(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    bundle = load_bundle(digits_bundle)
    found = load_reference(bundle)
    assert isinstance(found, Reference)
    features = OnnxEncoder(bundle, device="cpu").embed(digits_rows[:20])
    contents = {file: bundle.read(file) for file in bundle.files}
    features[19] += 1.0  # nobody computes that
    contents[REFERENCE_FILE] = replace(found, rows=digits_rows[:20], features=features).to_bytes()
    model = ServedModel(Bundle.of(bundle.manifest, contents), place=PLACE)
    sizes: list[int] = []
    compute = model.compute

    def noted(rows: NDArray[np.uint8], outputs: Sequence[str]) -> list[NDArray[np.float32]]:
        sizes.append(len(rows))
        return compute(rows, outputs)

    model.compute = noted  # type: ignore[method-assign]
    model.prove(most_rows=3)
    with pytest.raises(ModelError, match="standard deviations"):
        model.prove()
    assert sizes == [3, 8, 8, 4]


def test_warm_up_without_a_reference_wants_finite_features_and_says_that_it_proves_nothing(
    variant: Callable[..., Bundle], caplog: pytest.LogCaptureFixture
) -> None:
    ServedModel(variant(), place=PLACE).warm_up()
    assert "unproved" not in caplog.text
    ServedModel(variant(reference=False), place=PLACE).warm_up()
    assert "unproved" in caplog.text
    with pytest.raises(ModelError, match="NaN or infinity"):
        ServedModel(variant(factor=float("inf"), reference=False), place=PLACE).warm_up()


@pytest.fixture
def padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have models padded to buckets as on a GPU, but computed on the CPU."""
    monkeypatch.setattr("serving.served_model.choose_device", lambda device: ("cuda", "for a test"))


@pytest.mark.usefixtures("padding")
def test_warm_up_of_a_padded_model_computes_every_bucket(
    folder: Path, digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    compute = OnnxEncoder.compute

    def watched(encoder: OnnxEncoder, rows: NDArray[np.uint8], *arguments: Any, **named: Any) -> Any:
        computed.append(len(rows))
        return compute(encoder, rows, *arguments, **named)

    monkeypatch.setattr(OnnxEncoder, "compute", watched)
    model = ServedModel(load_bundle(folder), place=Place(device="cpu", max_batch_rows=100))
    model.warm_up()
    assert computed[:-1] == list(model.mode.buckets) == [1, 8, 32, 64, 100]
    assert model.padding(33) == 31
    (features,) = model.compute(digits_rows[:33], ["mean"])
    assert features.tobytes() == OnnxEncoder(folder, device="cpu").embed(digits_rows[:33]).tobytes()


def test_model_on_a_cpu_is_not_padded(folder: Path) -> None:
    model = ServedModel(load_bundle(folder), place=PLACE)
    assert (model.mode.buckets, model.padding(5)) == ((), 0)


def test_warm_up_of_all_counts_as_a_change_because_it_settles_the_mode(folder: Path) -> None:
    models = Models.from_bundles([folder], place=PLACE)
    before = models.generation
    models.warm_up(told=lambda name: None)
    assert models.generation > before


@pytest.mark.usefixtures("padding")
def test_padded_model_tells_its_mode_and_counts_its_padding(
    folder: Path, digits_rows: NDArray[np.uint8], talk: Callable[..., Any]
) -> None:
    async def conversation(client: Any) -> tuple[Any, Any, str]:
        answer = await client.post(
            "/v1/embed", content=digits_rows[:9].tobytes(), headers={"content-type": "application/octet-stream"}
        )
        assert answer.status_code == 200
        card = (await client.get("/v1/models/digits")).json()
        metadata = (await client.get("/v2/models/digits")).json()
        return card, metadata, (await client.get("/metrics")).text

    card, metadata, figures = talk(conversation, folder, limits=Limits(max_batch_rows=32))
    assert card["mode"]["buckets"] == [1, 8, 32]
    assert metadata["parameters"] == {**card["mode"], "buckets": "1,8,32"}
    assert metadata["parameters"]["graphs"].startswith("off: ")
    padded = [line for line in figures.splitlines() if line.startswith("vaefeat_padded_rows_total{")]
    assert [float(line.split()[-1]) for line in padded] == [23.0]


def test_find_bundles_in_a_folder_of_bundles_finds_all(
    folder: Path, variant: Callable[..., Bundle], tmp_path: Path
) -> None:
    variant(name="second").save(tmp_path / "other-folder")
    (tmp_path / "notes").mkdir()
    assert find_bundles([tmp_path]) == {"digits": folder, "second": tmp_path / "other-folder"}
    variant().save(tmp_path / "twice")
    with pytest.raises(SetupError, match="two bundles named 'digits'"):
        find_bundles([tmp_path])


def test_served_model_computes_the_encoder_s_bits(folder: Path, digits_rows: NDArray[np.uint8]) -> None:
    model = ServedModel(load_bundle(folder), place=PLACE)
    encoder = OnnxEncoder(folder, device="cpu")
    for output, features in zip(model.outputs, model.compute(digits_rows[:77], list(model.outputs)), strict=True):
        assert features.tobytes() == encoder.embed(digits_rows[:77], output=output).tobytes()
