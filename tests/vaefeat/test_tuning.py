"""What ``auto`` chooses, when it measures, and what it says."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vaefeat import ModelConfig, TrainConfig, tuning
from vaefeat.checkpoint import read_checkpoint
from vaefeat.errors import CompileError, ConfigError, TrainingInterrupted
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.vae import VAE
from vaefeat.observers import Observer
from vaefeat.step import TrainingStep
from vaefeat.training import Trainer
from vaefeat.tuning import Engine, take_up
from vaefeat.world import World

MODEL = ModelConfig(latent_dim=4, hidden_dims=(16,), network="mlp")


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def nothing_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_MEASURED", {})


def train(rows: NDArray[Any], *, model: ModelConfig = MODEL, checkpoint: Path | None = None, **settings: Any) -> Any:
    with fixed_noise(0, torch.device("cpu")):
        vae = VAE.for_rows(model, rows)
    notes = Notes()
    config = TrainConfig(**{"max_epochs": 2, "batch_size": 256, "device": "cpu", **settings})
    result = Trainer(vae, rows, config, checkpoint=checkpoint, observers=[notes]).run(resume=checkpoint is not None)
    return result, notes.notes, vae


def pretend_runs_are_long(monkeypatch: pytest.MonkeyPatch, *, compiling_s: float) -> None:
    """Lower what counts as long, so that a run of a second is worth measuring; the measuring is real."""
    monkeypatch.setattr(tuning, "_SHORT_S", 0.0)
    monkeypatch.setattr(tuning, "_COMPILE_S", compiling_s)


def test_short_run_is_not_measured_and_not_compiled(digits_rows: NDArray[np.uint8]) -> None:
    result, notes, _ = train(digits_rows)
    assert result.engine == Engine("float32", compiled=False)
    assert notes == []


def test_long_run_takes_the_faster_precision_and_says_how_much_it_gains(
    digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_runs_are_long(monkeypatch, compiling_s=1e9)
    monkeypatch.setattr(tuning, "_time", lambda vae, compute, names: {"float32": 3.0, "bfloat16": 1.5})
    result, notes, vae = train(digits_rows)
    assert result.engine.precision == "bfloat16"
    assert vae.network_dtype == torch.bfloat16
    assert any("bfloat16 is 2.0 times as fast" in note for note in notes)
    assert any("would not earn it back" in note for note in notes)


def test_measuring_for_real_settles_on_one_of_the_two(
    digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_runs_are_long(monkeypatch, compiling_s=1e9)
    result, notes, _ = train(digits_rows)
    (note,) = [note for note in notes if note.startswith("precision")]
    assert note.startswith(f"precision {result.engine.precision}: bfloat16 is ")


def test_slower_precision_is_left_alone(digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_runs_are_long(monkeypatch, compiling_s=1e9)
    monkeypatch.setattr(tuning, "_time", lambda vae, compute, names: {"float32": 1.0, "bfloat16": 1.0})
    result, _, _ = train(digits_rows)
    assert result.engine.precision == "float32"


def test_later_runs_of_a_process_take_what_the_first_measured(
    digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_runs_are_long(monkeypatch, compiling_s=1e9)
    times = iter([{"float32": 2.0, "bfloat16": 1.0}, {"float32": 1.0, "bfloat16": 2.0}])
    monkeypatch.setattr(tuning, "_time", lambda vae, compute, names: next(times))
    first, _, first_vae = train(digits_rows)
    second, _, second_vae = train(digits_rows)
    assert first.engine.precision == second.engine.precision == "bfloat16"
    for name, value in first_vae.state_dict().items():
        assert torch.equal(value, second_vae.state_dict()[name]), name


def test_failing_compiler_leaves_training_as_it_is_and_says_why(
    digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_runs_are_long(monkeypatch, compiling_s=0.0)

    def fail(self: TrainingStep, rows: torch.Tensor) -> None:
        raise CompileError("no C++ compiler")

    monkeypatch.setattr(TrainingStep, "compile", fail)
    result, notes, _ = train(digits_rows)
    assert not result.engine.compiled
    assert "not compiled: no C++ compiler" in notes


def test_compiling_that_gains_nothing_is_dropped(
    digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_runs_are_long(monkeypatch, compiling_s=0.0)
    monkeypatch.setattr(TrainingStep, "compile", lambda self, rows: None)
    monkeypatch.setattr(tuning, "_time", lambda vae, compute, names: dict.fromkeys(names, 1.0))
    result, notes, _ = train(digits_rows)
    assert not result.engine.compiled
    assert any("made it 1.0 times as fast" in note for note in notes)


def test_compiling_that_was_asked_for_and_fails_is_an_error(
    digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("torch._dynamo.config.trace_autograd_ops")
    with pytest.raises(CompileError, match="newer"):
        train(digits_rows, compile=True)


def test_resume_computes_as_the_run_before_did(
    digits_rows: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopAtOnce(Observer):
        def on_epoch(self, record: object) -> None:
            raise TrainingInterrupted("enough")

    checkpoint = tmp_path / "checkpoint.safetensors"
    pretend_runs_are_long(monkeypatch, compiling_s=1e9)
    monkeypatch.setattr(tuning, "_time", lambda vae, compute, names: {"float32": 2.0, "bfloat16": 1.0})
    _whole, _, whole_vae = train(digits_rows, max_epochs=3)
    with fixed_noise(0, torch.device("cpu")):
        vae = VAE.for_rows(MODEL, digits_rows)
    config = TrainConfig(max_epochs=3, batch_size=256, device="cpu", checkpoint_seconds=1e-9)
    with pytest.raises(TrainingInterrupted):
        Trainer(vae, digits_rows, config, checkpoint=checkpoint, observers=[StopAtOnce()]).run()
    assert read_checkpoint(checkpoint)[1]["engine"]["precision"] == "bfloat16"
    # On this machine now the other one is faster: a run that is continued must not change over.
    monkeypatch.setattr(tuning, "_MEASURED", {})
    monkeypatch.setattr(tuning, "_time", lambda vae, compute, names: {"float32": 1.0, "bfloat16": 2.0})
    result, _, resumed = train(digits_rows, max_epochs=3, checkpoint=checkpoint, checkpoint_seconds=1e-9)
    assert result.engine.precision == "bfloat16"
    for name, value in whole_vae.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.slow
def test_resume_of_a_compiled_run_equals_one_that_was_never_stopped(
    digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    class StopAfter(Observer):
        def on_steps(self, *, epoch: int, **figures: Any) -> None:
            if epoch == 2:
                raise TrainingInterrupted("enough")

    checkpoint = tmp_path / "checkpoint.safetensors"
    settings: dict[str, Any] = {"max_epochs": 3, "batch_size": 128, "compile": True, "precision": "bfloat16"}
    _, _, whole = train(digits_rows, **settings)
    with fixed_noise(0, torch.device("cpu")):
        vae = VAE.for_rows(MODEL, digits_rows)
    config = TrainConfig(**settings, device="cpu")
    with pytest.raises(TrainingInterrupted):
        Trainer(vae, digits_rows, config, checkpoint=checkpoint, observers=[StopAfter()]).run()
    _, _, resumed = train(digits_rows, **settings, checkpoint=checkpoint)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_compilation_that_was_asked_for_and_fails_on_resume_is_an_error_too(
    digits_rows: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(batch_size=64)
    vae = VAE.for_rows(MODEL, digits_rows).train()
    step = TrainingStep(vae, OBJECTIVES["elbo"](config), config, n_train=64, full=64, world=World())
    monkeypatch.delattr("torch._dynamo.config.trace_autograd_ops")
    rows = torch.from_numpy(digits_rows[:64])
    with pytest.raises(CompileError, match="newer"):
        take_up(step, rows, Engine(compiled=True), TrainConfig(compile=True))
    engine = take_up(step, rows, Engine(compiled=True), TrainConfig())
    assert not engine.compiled
    assert "no longer compiled" in engine.notes[0]


def test_compiler_that_ctrl_c_stopped_is_not_taken_for_a_broken_one(
    digits_rows: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal reaches the compiler's processes, too; the run goes on later as one that has not chosen yet."""

    def interrupted(self: TrainingStep, rows: torch.Tensor) -> None:
        signal.raise_signal(signal.SIGINT)
        raise CompileError("g++ was interrupted")

    monkeypatch.setattr(TrainingStep, "compile", interrupted)
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(TrainingInterrupted):
        train(digits_rows, compile=True, checkpoint=checkpoint)
    assert read_checkpoint(checkpoint)[1]["engine"] is None


def test_impossible_choices_are_refused() -> None:
    with pytest.raises(ConfigError, match="precision"):
        TrainConfig(precision="float16")
    with pytest.raises(ConfigError, match="compile"):
        TrainConfig(compile="yes")
