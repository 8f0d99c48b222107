"""Pretraining in the workers of Ray Train: started, watched, replaced when they are lost, and stopped for certain.

Importing this module imports Ray, which reads its environment then: :mod:`pipelines.ray_environment` comes first.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config import RunConfig, WorkersConfig
from pipelines.datasets import open_rows
from pipelines.desk import Desk, Display, Report, Teller
from pipelines.pretrain import train_worker
from pipelines.ray_session import last_line, ray_errors_told_plainly, running_ray
from vaefeat.data import Rows
from vaefeat.errors import ConfigError, DeviceError, TrainingError, TrainingInterrupted, VaefeatError, WorkerLostError
from vaefeat.interruption import StopRequest, request_stop, stop_on_signals
from vaefeat.pretraining import TRAINING_FOLDER
from vaefeat.processors import available_cpus
from vaefeat.world import World

__all__ = ["train_on_workers"]

#: Type checkers are shown the first API of Ray Train where programs get the second.
_API: Any = ray.train
_TICK_S = 0.2
_LISTEN_S = 1.0
#: For Ray Train to end by itself, once a worker has told why it did: whoever shuts Ray down under it may be ended by
#: Ray's core with a status of its own, or leave processes behind.
_GRACE_S = 30.0
_LOG_FILE = "ray.log"


def train_on_workers(config: RunConfig, *, launch: str) -> None:
    """Train in workers of Ray, which must all see the output folder and, unless rows are shared, the data.

    Parameters
    ----------
    config : RunConfig
    launch : str
        Names the attempt, see :func:`pipelines.pretrain.train_worker`.

    Raises
    ------
    ConfigError
        More workers than there is room for.
    DeviceError
        CUDA was asked for and Ray finds fewer GPUs than workers.
    TrainingInterrupted
        SIGINT or SIGTERM arrived; the state is in the checkpoint.
    TrainingError
        A worker met an error that others would meet, too, or too many were lost.
    """
    workers = config.workers
    if workers.address == "local":
        _refuse_without_room(workers, {"CPU": available_cpus()}, "this machine", use_gpu=False)
    everywhere = config.everywhere()  # workers have other working directories
    out = Path(everywhere.out)
    rows = None
    if workers.rows == "share":
        opened = open_rows(everywhere)
        assert isinstance(opened, Rows)
        rows = replace(opened, labels=None)
    store_bytes = 0 if rows is None else rows.array.nbytes
    with ray_errors_told_plainly(), _log(out), running_ray(workers.address, store_bytes=store_bytes):
        resources = ray.cluster_resources()
        use_gpu = _uses_gpu(config, resources)
        _refuse_without_room(workers, resources, "the cluster", use_gpu=use_gpu)
        desk = _open_desk()
        job = {
            "config": everywhere.to_dict(),
            "launch": launch,
            "rows": None if rows is None else ray.put(rows),
            "desk": desk,
        }
        with _storage(out) as storage:
            fit = _Fit(_trainer(workers, job, storage=storage, use_gpu=use_gpu))
            _watch(fit, desk, workers)


def train_in_worker(job: dict[str, Any]) -> None:
    """Train; what Ray Train runs in each worker, in a thread that is not the main one."""
    # Ray shows what its workers log, and whoever is to know is told at the desk.
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    desk, world = job["desk"], World.current()
    if ray.get(desk.over.remote()):
        return  # Ray Train replaces workers whatever they failed with
    ended = threading.Event()
    threading.Thread(target=_listen, args=(desk, ended), daemon=True).start()
    try:
        config = RunConfig.from_dict(job["config"])
        train_worker(
            config,
            launch=job["launch"],
            rows=None if job["rows"] is None else ray.get(job["rows"]),
            observers=(Teller(desk.tell.remote, n_workers=world.size),),
            progress=False,
        )
    except TrainingInterrupted as stop:
        ray.get(desk.interrupt.remote(str(stop)))
    except WorkerLostError:
        raise  # no error of this worker; a new group can go on
    except (VaefeatError, OSError) as error:
        ray.get(desk.fail.remote(f"worker {world.rank} on {platform.node()}: {error}"))
        raise
    finally:
        ended.set()


def _listen(desk: Any, ended: threading.Event) -> None:
    """Give signs of life, and pass on a request to stop, for which no signal can be sent to a thread."""
    with contextlib.suppress(RayError):
        while not ended.wait(_LISTEN_S):
            if (number := ray.get(desk.listen.remote())) is not None:
                request_stop(signal.Signals(number))


class _Fit:
    """Ray Train at work, in a thread of its own: this one shows progress and takes signals."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self._trainer = trainer
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def over_within(self, seconds: float) -> bool:
        """Wait for the end for a while."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def raise_error(self) -> None:
        """Raise what ended it, in one line."""
        if self._error is not None:
            raise TrainingError(
                f"the workers failed, and were not replaced any more: {last_line(str(self._error))}. What was reached "
                f"is in the checkpoint: the same command goes on; see also {TRAINING_FOLDER}/{_LOG_FILE}"
            ) from self._error

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # handed over to the main thread
            self._error = error


def _watch(fit: _Fit, desk: Any, workers: WorkersConfig) -> None:
    """Show what workers tell until they have ended; pass on a request to stop."""
    display, asked = Display(), False
    try:
        with stop_on_signals() as stop:
            while not fit.over_within(_TICK_S):
                report: Report = ray.get(desk.take.remote())
                display.show(report)
                asked = asked or _pass_on(stop, desk)
                if report.failure or report.interruption:
                    fit.over_within(_GRACE_S)
                    break
                if report.silent_s > workers.timeout_s:
                    raise TrainingError(_nobody_answers(workers, report.silent_s))
        report = ray.get(desk.take.remote())
        display.show(report)
    finally:
        display.close()
    if report.interruption:
        raise TrainingInterrupted(report.interruption)
    if report.failure:
        raise TrainingError(report.failure)
    fit.raise_error()


def _pass_on(stop: StopRequest, desk: Any) -> bool:
    if stop.signal is None:
        return False
    ray.get(desk.ask_to_stop.remote(int(stop.signal)))
    return True


def _nobody_answers(workers: WorkersConfig, silent_s: float) -> str:
    free = {name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
    return (
        f"no worker has given a sign of life for {silent_s:.0f} s; wanted {workers.bounds[0]} with {workers.cpus} "
        f"processors each, and the cluster has {free['CPU']:g} processors and {free['GPU']:g} GPUs free. What was "
        "reached is in the checkpoint: the same command goes on"
    )


def _refuse_without_room(workers: WorkersConfig, resources: dict[str, float], where: str, *, use_gpu: bool) -> None:
    """Refuse at once what Ray would wait for without an end."""
    least = workers.bounds[0]
    room = int(resources.get("CPU", 0) // workers.cpus)
    if use_gpu and resources.get("GPU", 0) < least:
        raise DeviceError(
            f"got {least} workers, each on a GPU, and {where} has {resources.get('GPU', 0):g} GPUs; "
            "take fewer workers, or train.device=cpu"
        )
    if room < least:
        raise ConfigError(
            f"got {least} workers of {workers.cpus} processors, and {where} has {resources.get('CPU', 0):g} of them; "
            f"take at most {room} workers, fewer workers.cpus, or another workers.address"
        )


def _uses_gpu(config: RunConfig, resources: dict[str, float]) -> bool:
    """Whether each worker gets a GPU: Ray hides them all from a process that asked for none."""
    if config.device == "auto":
        return resources.get("GPU", 0) >= config.workers.bounds[0]
    return config.device == "cuda"


def _trainer(workers: WorkersConfig, job: dict[str, Any], *, storage: Path, use_gpu: bool) -> TorchTrainer:
    least, most = workers.bounds
    return TorchTrainer(
        train_in_worker,
        train_loop_config=job,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        scaling_config=_API.ScalingConfig(
            num_workers=(least, most) if workers.elastic else least,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=_API.RunConfig(
            name=storage.name,
            storage_path=str(storage.parent),
            failure_config=_API.FailureConfig(max_failures=workers.max_failures),
            logging_config=_API.LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _open_desk() -> Any:
    """Start the desk on this machine: it must outlive any other."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Desk).options(scheduling_strategy=here).remote()


@contextlib.contextmanager
def _storage(out: Path) -> Iterator[Path]:
    """Give Ray Train the folder that it wants all workers to see; our own checkpoint lies beside it."""
    folder = out / TRAINING_FOLDER / "ray"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _log(out: Path) -> Iterator[None]:
    """Write to a file what Ray prints, which is about its processes; standard output is for the result."""
    folder = out / TRAINING_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOG_FILE).open("w", buffering=1) as file, contextlib.redirect_stdout(file):
        yield
