"""The loop: schedules, early stopping, exact resume, and what happens when something goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vaefeat import ModelConfig, TrainConfig
from vaefeat.checkpoint import read_checkpoint
from vaefeat.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    InputError,
    NonFiniteLossError,
    TrainingInterrupted,
)
from vaefeat.feeds import split_heldout
from vaefeat.model.evaluation import evaluate
from vaefeat.model.posteriors import CategoricalPosterior
from vaefeat.model.vae import VAE
from vaefeat.observers import EpochRecord, Observer
from vaefeat.placement import threads_for
from vaefeat.processors import available_cpus
from vaefeat.schedules import kl_warmup_factor, learning_rate_factor
from vaefeat.training import Trainer

MODEL = ModelConfig(latent_dim=4, hidden_dims=(32,), network="mlp")


def trainer(
    rows: NDArray[Any],
    *,
    model: ModelConfig = MODEL,
    checkpoint: Path | None = None,
    observers: Any = (),
    **settings: Any,
) -> Trainer:
    torch.manual_seed(0)
    vae = VAE.for_rows(model, rows)
    config = TrainConfig(**{"max_epochs": 4, "batch_size": 256, **settings})
    return Trainer(vae, rows, config, checkpoint=checkpoint, observers=observers)


def weights(of: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in of.vae.state_dict().items()}


class StopAfter(Observer):
    """Sends a real signal to this process at the first reading of the losses in an epoch."""

    def __init__(self, epoch: int, number: signal.Signals) -> None:
        self.epoch, self.number = epoch, number

    def on_steps(self, *, epoch: int, **figures: Any) -> None:
        if epoch == self.epoch:
            os.kill(os.getpid(), self.number)


def test_training_raises_the_heldout_bound(digits_rows: NDArray[np.uint8]) -> None:
    result = trainer(digits_rows, max_epochs=8).run()
    assert result.history[-1].heldout_elbo > result.history[0].heldout_elbo + 1
    assert result.evaluation.objective == max(record.heldout_objective for record in result.history)


def test_training_twice_gives_the_same_weights_and_leaves_the_generator_alone(
    digits_rows: NDArray[np.uint8],
) -> None:
    first, second = trainer(digits_rows, max_epochs=2), trainer(digits_rows, max_epochs=2)
    state = torch.get_rng_state()
    first.run()
    assert torch.equal(state, torch.get_rng_state())
    second.run()
    for name, value in first.vae.state_dict().items():
        assert torch.equal(value, second.vae.state_dict()[name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_resume_after_a_signal_in_mid_epoch_equals_a_run_that_was_never_stopped(
    digits_rows: NDArray[np.uint8], tmp_path: Path, number: signal.Signals
) -> None:
    whole = trainer(digits_rows, batch_size=16, max_epochs=4)
    whole_result = whole.run()
    path = tmp_path / "checkpoint.safetensors"
    handler = signal.getsignal(number)
    stopped = trainer(digits_rows, batch_size=16, max_epochs=4, checkpoint=path, observers=[StopAfter(3, number)])
    with pytest.raises(TrainingInterrupted, match=rf"{number.name} in epoch 3 after batch 50 of 102.*resume=True"):
        stopped.run()
    assert signal.getsignal(number) == handler
    continued = trainer(digits_rows, batch_size=16, max_epochs=4, checkpoint=path)
    result = continued.run(resume=True)
    for name, value in whole.vae.state_dict().items():
        torch.testing.assert_close(continued.vae.state_dict()[name], value, atol=1e-6, rtol=0)
    for ours, theirs in zip(result.history, whole_result.history, strict=True):
        assert ours.heldout_elbo == pytest.approx(theirs.heldout_elbo, abs=1e-6)
        assert ours.train_elbo == pytest.approx(theirs.train_elbo, abs=1e-6)


SMALL: dict[str, Any] = {"latent_dim": 4, "hidden_dims": (8,), "network": "mlp"}
CATEGORICAL = ModelConfig(**{**SMALL, "latent_dim": 9}, posterior="categorical", n_categories=3)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        *((ModelConfig(**SMALL), {"optimizer": name}) for name in ("adamw", "adam", "adagrad", "sgd", "muon")),
        (ModelConfig(**SMALL), {"optimizer": "sgd", "momentum": 0.0, "weight_prior_std": 1.0}),
        (ModelConfig(**SMALL), {"precision": "bfloat16"}),
        (ModelConfig(**SMALL, binarize=True), {"objective": "iwae", "n_samples": 3}),
        (ModelConfig(**SMALL, prior="vamp", prior_components=5), {"corruption": "masking"}),
        (ModelConfig(**SMALL, posterior="iaf", prior="flow", flow_hidden_dim=8), {"lr_schedule": "constant"}),
        (CATEGORICAL, {"temperature_start": 3.0, "temperature_end": 0.1}),
        (CATEGORICAL, {"straight_through": False}),
        (ModelConfig(**SMALL, posterior="deterministic"), {"objective": "sliced_wasserstein"}),
        (ModelConfig(**SMALL, style_dim=1), {"objective": "contrastive", "neighbours": 3, "remembered": 50}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value.posterior,
)
def test_resume_of_any_kind_of_run_equals_one_that_was_never_stopped(
    digits_rows: NDArray[np.uint8], tmp_path: Path, model: ModelConfig, settings: dict[str, Any]
) -> None:
    rows, path = digits_rows[:500], tmp_path / "checkpoint.safetensors"
    settings = {"model": model, "batch_size": 8, "max_epochs": 2, "learning_rate": 1e-3, "threads": 1, **settings}
    whole = trainer(rows, **settings)
    whole_result = whole.run()
    stopped = trainer(rows, checkpoint=path, observers=[StopAfter(2, signal.SIGTERM)], **settings)
    with pytest.raises(TrainingInterrupted, match=r"in epoch 2 after batch 50 of 57"):
        stopped.run()
    continued = trainer(rows, checkpoint=path, **settings)
    result = continued.run(resume=True)
    for name, value in whole.vae.state_dict().items():
        assert torch.equal(continued.vae.state_dict()[name], value), name
    for ours, theirs in zip(result.history, whole_result.history, strict=True):
        assert ours.heldout_objective == theirs.heldout_objective
        assert ours.train_elbo == pytest.approx(theirs.train_elbo, abs=1e-9)


def test_last_weights_are_kept_where_objectives_of_epochs_cannot_be_compared(digits_rows: NDArray[np.uint8]) -> None:
    settings: dict[str, Any] = {"objective": "contrastive", "neighbours": 5, "remembered": 64, "max_epochs": 24}
    run = trainer(digits_rows[:400], batch_size=64, contrastive_temperature=0.02, learning_rate=5e-3, **settings)
    history = run.run().history
    assert max(record.heldout_objective for record in history) > history[-1].heldout_objective
    assert run.best_epoch == 24


def test_temperature_has_fallen_to_its_end_when_training_ends(digits_rows: NDArray[np.uint8]) -> None:
    settings: dict[str, Any] = {"model": CATEGORICAL, "temperature_start": 3.0, "temperature_end": 0.1}
    run = trainer(digits_rows, batch_size=8, max_epochs=1, **settings)
    run.run()
    assert isinstance(run.vae.posterior, CategoricalPosterior)
    assert run.vae.posterior.temperature == pytest.approx(0.1, rel=0.03)


def test_half_precision_trains_as_well_and_leaves_evaluation_alone(digits_rows: NDArray[np.uint8]) -> None:
    runs = {precision: trainer(digits_rows, max_epochs=8, precision=precision) for precision in ("float32", "bfloat16")}
    results = {precision: run.run() for precision, run in runs.items()}
    exact, half = results["float32"], results["bfloat16"]
    assert half.evaluation.elbo == pytest.approx(exact.evaluation.elbo, abs=0.3)
    assert half.history[-1].train_elbo == pytest.approx(exact.history[-1].train_elbo, abs=0.3)
    assert half.history[0].train_elbo != exact.history[0].train_elbo  # it is another arithmetic
    run = runs["bfloat16"]
    assert all(weight.dtype == torch.float32 for weight in run.vae.parameters())
    evaluations, rows = [], digits_rows[half.heldout]
    for dtype in (torch.bfloat16, torch.float32):
        run.vae.network_dtype = dtype
        evaluations.append(evaluate(run.vae, run.objective, rows, kl_weight=1.0, batch_size=512, seed=0))
    assert evaluations[0] == evaluations[1] == half.evaluation


def test_resume_of_a_finished_run_trains_no_further(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    first = trainer(digits_rows, max_epochs=2, checkpoint=path)
    first.run()
    again = trainer(digits_rows, max_epochs=2, checkpoint=path)
    result = again.run(resume=True)
    assert [record.epoch for record in result.history] == [1, 2]
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(first).items())


def test_resume_without_a_checkpoint_starts_from_the_beginning(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    result = trainer(digits_rows, max_epochs=1, checkpoint=tmp_path / "none.safetensors").run(resume=True)
    assert len(result.history) == 1


def test_resume_with_other_settings_is_refused_and_names_them(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    trainer(digits_rows, max_epochs=1, checkpoint=path).run()
    with pytest.raises(CheckpointError, match=r"train\.learning_rate: 0\.002 there, 0\.01 here"):
        trainer(digits_rows, max_epochs=1, learning_rate=0.01, checkpoint=path).run(resume=True)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_resume_from_a_damaged_checkpoint_is_refused(
    digits_rows: NDArray[np.uint8], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a checkpoint of vaefeat or is corrupt"):
        trainer(digits_rows, checkpoint=path).run(resume=True)


def test_resume_from_a_truncated_checkpoint_is_refused(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    trainer(digits_rows, max_epochs=1, checkpoint=path).run()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="corrupt"):
        trainer(digits_rows, max_epochs=1, checkpoint=path).run(resume=True)


def test_checkpoint_holds_no_pickle(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    trainer(digits_rows, max_epochs=1, checkpoint=path).run()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    import safetensors.numpy

    # An independent reader opens it.
    assert any(name.startswith("optimizer.0.") for name in safetensors.numpy.load_file(path))


def test_full_disk_keeps_the_checkpoint_before_and_says_so(tmp_path: Path) -> None:
    """A limit on the size of files refuses the second checkpoint as a full disk does, by an error of the system."""
    program = """
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        import torch
        from vaefeat.checkpoint import read_checkpoint, write_checkpoint
        from vaefeat.errors import CheckpointError
        path = Path(sys.argv[1])
        write_checkpoint(path, {"a": torch.arange(5)}, {"epoch": 1})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            write_checkpoint(path, {"a": torch.zeros(100_000)}, {"epoch": 2})
        except CheckpointError as error:
            print(error)
        tensors, meta = read_checkpoint(path)
        print(meta, tensors["a"].tolist(), sorted(p.name for p in path.parent.iterdir()))
    """
    path = tmp_path / "checkpoint.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(path)], capture_output=True, text=True, check=True
    )
    message, state = done.stdout.splitlines()
    assert "could not write the checkpoint" in message
    assert "the checkpoint before it is intact" in message
    assert state == "{'epoch': 1} [0, 1, 2, 3, 4] ['checkpoint.safetensors']"


def test_non_finite_loss_names_term_epoch_and_batch_and_keeps_the_checkpoint(
    digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    good = b""

    class Spoil(Observer):
        def on_steps(
            self, *, epoch: int, step: int, elbo: float, log_likelihood: float, kl: float, rows_per_s: float
        ) -> None:
            nonlocal good
            if epoch == 3 and not good:
                good = path.read_bytes()
                with torch.no_grad():
                    run.vae.posterior.get_parameter("logvar.bias")[0] = torch.nan

    run = trainer(digits_rows, checkpoint=path, observers=[Spoil()], batch_size=16)
    with pytest.raises(NonFiniteLossError, match=r"nan in epoch 3, batch 51 of 102; the last good checkpoint is"):
        run.run()
    assert path.read_bytes() == good


def test_signal_in_the_step_that_spoils_the_weights_does_not_save_them(
    digits_rows: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    run = trainer(digits_rows, checkpoint=path, batch_size=16)

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if run.epoch == 1 and run.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)
            return gradient * torch.nan
        return gradient

    run.vae.posterior.get_parameter("mean.weight").register_hook(spoil)
    with pytest.raises(NonFiniteLossError, match=r"gradient became nan in epoch 2, batch 21 of 102"):
        run.run()
    tensors, meta = read_checkpoint(path)
    assert meta["epoch"] == 1
    assert all(value.isfinite().all() for name, value in tensors.items() if name.startswith("model.posterior"))


def test_non_finite_loss_before_the_first_checkpoint_names_none(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    run = trainer(digits_rows, checkpoint=tmp_path / "checkpoint.safetensors")
    run.vae.posterior.get_parameter("mean.bias").data.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match=r"batch 1 of 7\. Lower"):
        run.run()


@pytest.mark.parametrize(
    ("spoiled", "term"),
    [("decoder.layers.1.bias", "log-likelihood"), ("prior.log_scale", "KL divergence")],
)
def test_non_finite_loss_names_the_term_that_went_first(
    digits_rows: NDArray[np.uint8], spoiled: str, term: str
) -> None:
    run = trainer(digits_rows, model=ModelConfig(**SMALL, prior="learned"))
    run.vae.get_parameter(spoiled).data[0] = torch.nan
    with pytest.raises(NonFiniteLossError, match=rf"the {term} became nan in epoch 1, batch 1 of 7\. Lower"):
        run.run()


def test_signal_during_the_last_evaluation_is_not_swallowed(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    class StopLate(Observer):
        def on_epoch(self, record: EpochRecord) -> None:
            if record.epoch == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(TrainingInterrupted, match="after the last epoch"):
        trainer(digits_rows, max_epochs=2, checkpoint=path, observers=[StopLate()]).run()
    assert len(trainer(digits_rows, max_epochs=2, checkpoint=path).run(resume=True).history) == 2


def test_exploding_learning_rate_stops_with_an_error_and_not_with_nan(digits_rows: NDArray[np.uint8]) -> None:
    rows = digits_rows.reshape(len(digits_rows), -1).astype(np.float32)
    with pytest.raises(NonFiniteLossError, match="Lower learning_rate"):
        trainer(rows, learning_rate=1e30, gradient_clip=1e30).run()


def test_early_stopping_waits_for_the_warm_up_and_keeps_the_best_weights(digits_rows: NDArray[np.uint8]) -> None:
    rows = digits_rows[:60]  # few rows: the held-out bound falls after a while
    run = trainer(rows, max_epochs=300, patience=5, batch_size=16, learning_rate=1e-2, kl_warmup=0.05)
    result = run.run()
    objectives = [record.heldout_objective for record in result.history]
    assert 300 * 0.05 < len(objectives) < 300
    assert result.evaluation.objective == max(objectives)
    assert len(objectives) - 1 - int(np.argmax(objectives)) >= 5


@pytest.mark.parametrize("total_steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_kl_warm_up_reaches_its_ceiling_in_runs_of_any_length(total_steps: int, share: float) -> None:
    factors = [kl_warmup_factor(step, total_steps, share) for step in range(total_steps)]
    assert factors[-1] == 1.0
    assert factors == sorted(factors)
    assert all(0 <= factor <= 1 for factor in factors)
    if share == 0.5 and total_steps == 1000:
        assert factors[0] == 0
        assert factors[250] == pytest.approx(0.5)
        assert factors[500] == 1


def test_learning_rate_rises_then_falls_along_a_cosine() -> None:
    factors = [learning_rate_factor(step, 1000, 0.1) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[100] == pytest.approx(1.0)
    assert np.argmax(factors) in {99, 100}
    assert factors[550] == pytest.approx(0.505, abs=0.002)
    assert factors[-1] == pytest.approx(0.01)


def test_constant_learning_rate_rises_and_stays() -> None:
    factors = [learning_rate_factor(step, 1000, 0.1, "constant") for step in range(1000)]
    assert factors[:100] == [learning_rate_factor(step, 1000, 0.1) for step in range(100)]
    assert set(factors[100:]) == {1.0}
    assert learning_rate_factor(0, 1, 0.0, "constant") == 1.0


def test_constant_learning_rate_is_what_the_optimizer_has_at_the_end(digits_rows: NDArray[np.uint8]) -> None:
    result = trainer(digits_rows, max_epochs=2, learning_rate=3e-3, lr_schedule="constant").run()
    assert [record.learning_rate for record in result.history] == [3e-3, 3e-3]


@pytest.mark.parametrize("n_rows", [2, 3, 10, 1797])
def test_heldout_split_leaves_rows_on_both_sides_and_none_on_two(n_rows: int) -> None:
    train, heldout = split_heldout(n_rows, 0.1, seed=0)
    assert len(train) >= 1
    assert len(heldout) >= 1
    assert sorted([*train, *heldout]) == list(range(n_rows))


def test_one_row_is_refused() -> None:
    with pytest.raises(InputError, match="at least 2"):
        split_heldout(1, 0.1, seed=0)


def test_unknown_objective_is_refused(digits_rows: NDArray[np.uint8]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'elbo'"):
        trainer(digits_rows, objective="elob")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that must be missing")
def test_cuda_asked_for_and_absent_is_an_error(digits_rows: NDArray[np.uint8]) -> None:
    with pytest.raises(DeviceError, match="device='cpu'"):
        trainer(digits_rows, device="cuda")


@pytest.mark.gpu
def test_training_on_a_gpu_reaches_the_cpus_bound(digits_rows: NDArray[np.uint8]) -> None:
    bounds = [trainer(digits_rows, max_epochs=8, device=device).run().evaluation.elbo for device in ("cpu", "cuda")]
    assert bounds[0] == pytest.approx(bounds[1], abs=0.5)


def test_training_reads_a_memory_map(digits_rows: NDArray[np.uint8], tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", digits_rows)
    mapped = trainer(np.load(tmp_path / "rows.npy", mmap_mode="r"), max_epochs=1)
    mapped.run()
    loaded = trainer(digits_rows, max_epochs=1)
    loaded.run()
    assert all(torch.equal(value, weights(mapped)[name]) for name, value in weights(loaded).items())


def test_threads_follow_the_work_in_a_step_and_are_put_back(digits_rows: NDArray[np.uint8]) -> None:
    small = trainer(digits_rows, max_epochs=1)
    assert small.threads == 1
    assert trainer(digits_rows, threads=2).threads == 2
    before = torch.get_num_threads()
    small.run()
    assert torch.get_num_threads() == before
    vae = VAE(ModelConfig(), (3, 64, 64))
    assert threads_for(vae, 256) == min(available_cpus(), torch.get_num_threads())
