"""What the doctor finds, and what it advises."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from vaefeat import ModelConfig, doctor
from vaefeat.doctor import Examination, examine
from vaefeat.errors import CompileError
from vaefeat.processors import available_cpus, available_memory
from vaefeat.runtime import choose_device
from vaefeat.step import TrainingStep


def refuse(self: TrainingStep, rows: torch.Tensor) -> None:
    raise CompileError("no compiler here")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Examination:
    monkeypatch.setattr(TrainingStep, "compile", refuse)
    small: dict[str, Any] = {"latent_dim": 2, "hidden_dims": (8,)}
    models = {"MLP": ModelConfig(network="mlp", **small), "convolutions": ModelConfig(channels=(4, 4), **small)}
    monkeypatch.setattr(doctor, "_MODELS", models)
    monkeypatch.setattr(doctor, "_BATCH_SIZE", 4)
    return examine(seconds=0.1)


def test_examination_measures_both_precisions_of_both_networks(found: Examination) -> None:
    measured = {(rate.model, rate.how.partition(",")[0]) for rate in found.measured}
    assert measured == {(name, how) for name in doctor._MODELS for how in ("float32", "bfloat16")}
    assert all(rate.rows_per_s > 0 for rate in found.measured)
    assert found.facts["processors"].startswith(str(available_cpus()))
    assert found.facts["torch.compile"] == "does not work: no compiler here"
    assert found.advice


def test_examination_says_where_bundles_are_embedded() -> None:
    found = Examination()
    doctor._look_at_runtime(found, torch.device("cpu"))
    device, reason = choose_device("auto")
    assert found.facts["ONNX Runtime"].endswith(f"{device}: {reason}")
    assert not found.advice


def test_onnx_runtime_that_misses_what_torch_finds_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "choose_device", lambda device: ("cpu", "CUDA's libraries do not load"))
    found = Examination()
    doctor._look_at_runtime(found, torch.device("cuda"))
    assert found.advice == ["torch finds a CUDA device and ONNX Runtime does not: CUDA's libraries do not load"]


def test_machine_without_a_compiler_is_told_to_install_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Examination()
    monkeypatch.setattr("shutil.which", lambda name: None)
    doctor._look_at_processors(found)
    assert found.facts["C++ compiler"] == "none"
    assert any("install a C++ compiler" in line for line in found.advice)


def test_machine_short_of_memory_is_told_to_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Examination()
    monkeypatch.setattr(doctor, "available_memory", lambda: 1 << 30)
    doctor._look_at_memory(found)
    assert found.facts["free memory"] == "1.0 GiB"
    assert any("--stream" in line for line in found.advice)


def test_threads_that_only_hinder_are_advised_against(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingStep, "compile", refuse)
    monkeypatch.setattr(doctor, "available_cpus", lambda: 4)
    monkeypatch.setattr(doctor, "_rate", lambda *a: 900.0 if torch.get_num_threads() == 1 else 300.0)
    found = Examination()
    doctor._measure(found, torch.device("cpu"), share_s=0.01)
    assert any("one thread is 3.0 times as fast as 4; set train.threads=1" in line for line in found.advice)


def test_free_memory_is_what_the_system_says() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    free = available_memory()
    assert free is not None
    psutil: Any = pytest.importorskip("psutil")
    assert 0 < free <= psutil.virtual_memory().total


@pytest.mark.slow
def test_doctor_on_the_command_line_prints_json() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from vaefeat.cli import main; main()", "doctor", "--json", "--seconds", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(json.loads(done.stdout)) == {"facts", "measured", "advice"}
