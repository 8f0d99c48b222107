"""Workers that train together, as real processes that talk over gloo."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from vaefeat import ModelConfig, TrainConfig
from vaefeat.checkpoint import read_checkpoint, restore_memory, under
from vaefeat.combinations import refuse_workers
from vaefeat.errors import ConfigError
from vaefeat.model.contrast import Memory
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.vae import VAE
from vaefeat.placement import threads_for, using_threads
from vaefeat.processors import available_cpus
from vaefeat.step import Knobs, TrainingStep
from vaefeat.training import Trainer
from vaefeat.world import World

CHECKOUT = Path(__file__).parents[2]
CPU = torch.device("cpu")
#: 271 training rows: the last minibatch of 6 has a single row, and of two workers the second gets none of it.
N_ROWS = 301
#: Nothing random but the weights and the order, so that only rounding depends on who computes which row.
NOISE_FREE = (
    ModelConfig(latent_dim=4, network="mlp", hidden_dims=(32,), posterior="deterministic"),
    TrainConfig(objective="reconstruction", max_epochs=3, batch_size=6, device="cpu", threads=1),
)
NOISY = (
    ModelConfig(latent_dim=4, network="mlp", hidden_dims=(32,)),
    TrainConfig(max_epochs=3, batch_size=4, device="cpu", threads=1, checkpoint_seconds=1e-9),
)
#: Whose workers each remember the views of their own rows, as few of them as two minibatches bring.
REMEMBERING = (
    ModelConfig(latent_dim=4, style_dim=1, network="mlp", hidden_dims=(32,)),
    TrainConfig(
        objective="contrastive",
        neighbours=2,
        remembered=4,
        max_epochs=3,
        batch_size=4,
        device="cpu",
        threads=1,
        checkpoint_seconds=1e-9,
    ),
)
SEEDS = (0, 1, 2)

#: What every worker runs. The workers of a group write what they found out to a file each.
PROGRAM = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, torch, torch.distributed as dist
from safetensors.torch import save_file
from vaefeat import ModelConfig, TrainConfig
from vaefeat.errors import InputError, TrainingInterrupted, WorkerLostError
from vaefeat.interruption import request_stop
from vaefeat.model.evaluation import fixed_noise
from vaefeat.model.objectives import OBJECTIVES
from vaefeat.model.vae import VAE
from vaefeat.observers import Observer
from vaefeat.step import Knobs, TrainingStep
from vaefeat.training import Trainer
from vaefeat.world import World

folder, rank, settings = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
cpu = torch.device("cpu")
rows = np.load(folder / "rows.npy")
noise_free, noisy, remembering = [(ModelConfig.from_dict(m), TrainConfig.from_dict(t)) for m, t in settings["runs"]]
facts, tensors = {}, {}

def trainer(model, train, data=rows, **more):
    with fixed_noise(train.seed, cpu):
        vae = VAE.for_rows(model, data)
    return Trainer(vae, data, train, **more)

def keep(name, vae):
    tensors.update({f"{name}.{key}": value.clone() for key, value in vae.state_dict().items()})

world = World.current()
facts["place"] = [world.rank, world.size, world.leads]
facts["shares"] = [np.arange(n)[world.share(n)].tolist() for n in range(9)]
parts = [torch.full((3,), 0.1 * (rank + 1)), torch.arange(4.0).reshape(2, 2) / (3 + rank)]
world.add(parts)
tensors.update({f"sum.{i}": part for i, part in enumerate(parts)})
facts["agreed"] = world.agree(torch.tensor([rank + 7])).tolist()
facts["any"] = [world.any(rank == 1, cpu), world.any(False, cpu)]
facts["collected"] = [part.tolist() for part in world.collect(torch.tensor([rank * 2]))]
facts["neighbours"] = world.neighbours(cpu)
facts["seed"] = world.seed(5)
world.refuse_disagreement("the same", cpu)
try:
    world.refuse_disagreement(f"worker {rank}", cpu)
except InputError as error:
    facts["disagreement"] = str(error)

model, train = noise_free
vae = trainer(model, train).vae.train()
step = TrainingStep(vae, OBJECTIVES[train.objective](train), train, n_train=100, full=33, world=world)
figures = step(torch.from_numpy(rows[:33][world.share(33)]), Knobs(1e-3, 1.0, 0.0), n_rows=33)
facts["figures"] = figures.tolist()
tensors.update({f"gradient.{name}": weight.grad.clone() for name, weight in vae.named_parameters()})

run = trainer(model, train)
facts["history"] = [record.train_elbo for record in run.run().history]
keep("trained", run.vae)

class StopAt(Observer):
    def on_steps(self, *, epoch, step, **figures):
        if (epoch, step) == (2, 50):
            request_stop(signal.SIGTERM)

facts["stopped"] = []
for name, (model, train) in {"noisy": noisy, "remembering": remembering}.items():
    whole = trainer(model, train, checkpoint=folder / f"{name}-whole.safetensors")
    whole.run()
    keep(f"{name}-whole", whole.vae)
    stopped = folder / f"{name}-stopped.safetensors"
    try:
        trainer(model, train, checkpoint=stopped, observers=[StopAt()]).run()
    except TrainingInterrupted as stop:
        facts["stopped"].append(str(stop))
    dist.barrier()
    if rank == 0:
        (folder / f"{name}-kept.safetensors").write_bytes(stopped.read_bytes())
    continued = trainer(model, train, checkpoint=stopped)
    continued.run(resume=True)
    keep(f"{name}-continued", continued.vae)
    tensors.update({f"{name}-memory.{key}": value for key, value in continued.objective.memory.state_dict().items()})

everything = np.load(folder / "everything.npy")
facts["elbos"] = []
for seed in settings["seeds"]:
    model = ModelConfig.from_dict(settings["elbo"][0])
    train = TrainConfig.from_dict(settings["elbo"][1] | {"seed": seed})
    facts["elbos"].append(trainer(model, train, everything).run().evaluation.elbo)

save_file(tensors, folder / f"{rank}.safetensors")
(folder / f"{rank}.json").write_text(json.dumps(facts))
dist.barrier()
if rank == 1:
    sys.stdout.flush()
    os._exit(0)  # as if it were killed
try:
    world.add([torch.zeros(1)])
except WorkerLostError as error:
    (folder / "lost").write_text(str(error))
# Threads of a group that has lost a member do not always end, and abort a process that waits for them.
os._exit(0)
"""
ELBO = (
    ModelConfig(latent_dim=8, network="mlp", hidden_dims=(64,)),
    TrainConfig(max_epochs=12, batch_size=64, device="cpu", threads=1),
)


class Group:
    """What two workers found out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: list[dict[str, Any]] = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
        self.tensors = [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]

    def under(self, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
        found = {key: value for key, value in self.tensors[rank].items() if key.startswith(f"{name}.")}
        return {key.removeprefix(f"{name}."): value for key, value in found.items()}


@pytest.fixture(scope="module")
def rows(digits_rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return digits_rows[:N_ROWS]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory, digits_rows: NDArray[np.uint8], rows: NDArray[np.uint8]) -> Group:
    folder = tmp_path_factory.mktemp("group")
    np.save(folder / "rows.npy", rows)
    np.save(folder / "everything.npy", digits_rows)
    settings = {
        "runs": [[config.to_dict() for config in run] for run in (NOISE_FREE, NOISY, REMEMBERING)],
        "elbo": [config.to_dict() for config in ELBO],
        "seeds": SEEDS,
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM, str(folder), str(rank), json.dumps(settings)],
            cwd=CHECKOUT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=200)
        assert worker.returncode == 0, errors
    return Group(folder)


def alone(model: ModelConfig, train: TrainConfig, rows: NDArray[Any], **more: Any) -> Trainer:
    torch.manual_seed(train.seed)
    return Trainer(VAE.for_rows(model, rows), rows, train, **more)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_alone_nothing_is_communicated() -> None:
    world = World.current()
    assert world == World(0, 1)
    part = torch.ones(2)
    world.add([part])
    assert part.tolist() == [1, 1]
    assert (world.share(5), world.seed(3), world.neighbours(CPU)) == (slice(0, 5), 3, 1)
    assert world.collect(part)[0] is part


def test_every_worker_knows_its_place(group: Group) -> None:
    assert [facts["place"] for facts in group.facts] == [[0, 2, True], [1, 2, False]]
    assert [facts["neighbours"] for facts in group.facts] == [2, 2]
    seeds = [facts["seed"] for facts in group.facts]
    assert seeds[0] == 5
    assert seeds[1] != 5


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_a_partition_as_even_as_can_be(size: int) -> None:
    for n_rows in range(20):
        shares = [np.arange(n_rows)[World(rank, size).share(n_rows)] for rank in range(size)]
        assert np.concatenate(shares).tolist() == list(range(n_rows))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_of_real_workers_are_a_partition(group: Group) -> None:
    for n_rows, shares in enumerate(zip(*(facts["shares"] for facts in group.facts), strict=True)):
        assert sorted(itertools.chain(*shares)) == list(range(n_rows))


def test_added_tensors_are_sums_of_the_same_bits(group: Group) -> None:
    assert torch.allclose(group.tensors[0]["sum.0"], torch.full((3,), 0.3))
    assert torch.allclose(group.tensors[0]["sum.1"], torch.arange(4.0).reshape(2, 2) * (1 / 3 + 1 / 4))
    assert_same(group.under("sum", 0), group.under("sum", 1))


def test_workers_tell_each_other(group: Group) -> None:
    for facts in group.facts:
        assert facts["agreed"] == [7]
        assert facts["any"] == [True, False]
        assert facts["collected"] == [[0], [2]]


def test_workers_that_start_from_something_else_refuse_to_start(group: Group) -> None:
    for facts in group.facts:
        assert "on worker 1 than on worker 0" in facts["disagreement"]


def test_worker_whose_neighbour_died_says_so(group: Group) -> None:
    assert "worker 0 of 2 lost contact" in (group.folder / "lost").read_text()


def test_gradient_of_two_is_that_of_one(group: Group, rows: NDArray[np.uint8]) -> None:
    model, train = NOISE_FREE
    trainer = alone(model, train, rows)
    vae = trainer.vae.train()
    step = TrainingStep(vae, OBJECTIVES[train.objective](train), train, n_train=100, full=33, world=World())
    figures = step(torch.from_numpy(rows[:33]), Knobs(1e-3, 1.0, 0.0), n_rows=33)
    both = group.under("gradient")
    for name, weight in vae.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(both[name], weight.grad, rtol=1e-4, atol=1e-6)
    assert_same(both, group.under("gradient", 1))
    told = np.array([facts["figures"] for facts in group.facts])
    # Terms and rows are each worker's own, the norm is that of the sum.
    np.testing.assert_allclose(told[:, [0, 1, 2, 4]].sum(axis=0), figures.numpy()[[0, 1, 2, 4]], rtol=1e-5)
    np.testing.assert_allclose(told[:, 3], figures.numpy()[3], rtol=1e-4)


def test_noise_free_training_of_two_is_that_of_one(group: Group, rows: NDArray[np.uint8]) -> None:
    run = alone(*NOISE_FREE, rows)
    history = [record.train_elbo for record in run.run().history]
    for rank in (0, 1):
        assert group.facts[rank]["history"] == pytest.approx(history, rel=1e-4)
    trained = group.under("trained")
    for name, weight in run.vae.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-3, atol=1e-4)
    assert_same(trained, group.under("trained", 1))


@pytest.mark.parametrize("name", ["noisy", "remembering"])
def test_two_workers_that_were_stopped_go_on_as_if_they_had_not_been(group: Group, name: str) -> None:
    for rank in (0, 1):
        assert all("in epoch 2 after batch 50 of 68" in told for told in group.facts[rank]["stopped"])
        assert_same(group.under(f"{name}-continued", rank), group.under(f"{name}-whole", 0))


def test_each_worker_remembers_views_of_its_own(group: Group) -> None:
    first, second = (group.under("remembering-memory", rank) for rank in (0, 1))
    # 271 rows an epoch in minibatches of 4, of the last of which the second worker has one row, and the first two.
    assert [int(memory["n_seen"]) for memory in (first, second)] == [3 * 136, 3 * 135]
    assert not torch.equal(first["views"], second["views"])


@pytest.mark.parametrize("n_workers", [1, 3])
def test_checkpoint_gives_each_worker_its_own_memory_and_new_ones_the_first_ones(group: Group, n_workers: int) -> None:
    tensors, meta = read_checkpoint(group.folder / "remembering-kept.safetensors")
    assert meta["workers"] == 2
    kept = [under(f"memory.{rank}.", tensors) for rank in (0, 1)]
    assert not torch.equal(kept[0]["views"], kept[1]["views"])
    for rank in range(n_workers):
        memory = Memory(4, 3)
        restore_memory(memory, tensors, World(rank, n_workers))
        assert_same(memory.state_dict(), kept[rank if rank < 2 else 0])


def test_another_number_of_workers_goes_on_with_what_the_first_remembers(group: Group, rows: NDArray[np.uint8]) -> None:
    path = group.folder / "remembering-kept.safetensors"
    run = alone(*REMEMBERING, rows, checkpoint=path)
    run._load(path)
    seen = int(read_checkpoint(path)[0]["memory.0.n_seen"])
    assert seen == 136 + 2 * 50
    assert run.objective.memory.n_seen == seen
    assert len(alone(*REMEMBERING, rows, checkpoint=path).run(resume=True).history) == 3


def test_another_number_of_workers_goes_on_where_two_were_stopped(group: Group, rows: NDArray[np.uint8]) -> None:
    run = alone(*NOISY, rows, checkpoint=group.folder / "noisy-kept.safetensors")
    result = run.run(resume=True)
    assert len(result.history) == 3
    assert run.step == 0
    whole = alone(*NOISY, rows).run()
    # The same minibatches, and other noise for a third of them.
    assert result.evaluation.elbo == pytest.approx(whole.evaluation.elbo, rel=0.02)


def test_elbo_of_two_is_within_the_spread_of_one(group: Group, digits_rows: NDArray[np.uint8]) -> None:
    model, train = ELBO
    ones = []
    for seed in SEEDS:
        seeded = TrainConfig.from_dict(train.to_dict() | {"seed": seed})
        ones.append(alone(model, seeded, digits_rows).run().evaluation.elbo)
    spread = max(ones) - min(ones)
    assert group.facts[0]["elbos"] == group.facts[1]["elbos"]
    differences = np.abs(np.subtract(group.facts[0]["elbos"], ones))
    assert (differences < spread).all()


@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({"gaussian_std": "optimal", "likelihood": "gaussian"}, {}),
        ({}, {"objective": "mmd"}),
        ({}, {"objective": "infovae"}),
        ({"posterior": "deterministic"}, {"objective": "sliced_wasserstein"}),
    ],
)
def test_what_needs_the_whole_minibatch_is_refused_for_several_workers(
    model: dict[str, Any], train: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="several workers"):
        refuse_workers(ModelConfig(**model), TrainConfig(**train), n_workers=2)
    refuse_workers(ModelConfig(**model), TrainConfig(**train), n_workers=1)
    refuse_workers(ModelConfig(), TrainConfig(), n_workers=2)


def test_workers_of_a_machine_share_its_processors() -> None:
    vae = VAE.for_rows(ModelConfig(latent_dim=8, hidden_dims=(2048, 2048)), np.zeros((4, 784), np.uint8))
    with using_threads(64):
        assert threads_for(vae, 256, sharing=1) == available_cpus()
        assert threads_for(vae, 256, sharing=2) == max(1, available_cpus() // 2)
        assert threads_for(vae, 256, sharing=1000) == 1
    with using_threads(1):  # as OMP_NUM_THREADS=1 leaves torch
        assert threads_for(vae, 256) == 1
