"""The ablation: that every variant is a training which the library accepts, and differs in what its name says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.ablation import PARTS, _differs, _settings
from benchmarks.few_labels_tasks import Task, open_task
from vaefeat.combinations import refuse_pair
from vaefeat.presets import choose_settings


@pytest.fixture(scope="module", params=["digits", "table"])
def task(request: pytest.FixtureRequest) -> Task:
    return open_task(request.param, None, validation=True)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_a_training_that_is_accepted(task: Task, part: str) -> None:
    if not _differs(task, part):
        return
    model, train = _settings(task, part)
    refuse_pair(*choose_settings(task.train, n_rows=len(task.train), model=model, train=train))


def test_without_contrast_nothing_is_left_that_only_contrast_has_a_use_for(task: Task) -> None:
    model, train = _settings(task, "no contrast (plain bound, same network)")
    without = choose_settings(task.train, n_rows=len(task.train), model=model, train=train)
    preset = choose_settings(task.train, n_rows=len(task.train))
    assert (without[0].style_dim, without[1].neighbours, without[1].objective) == (0, 0, "elbo")
    assert replace(without[0], style_dim=preset[0].style_dim) == preset[0]
    assert without[1].batch_size == preset[1].batch_size
