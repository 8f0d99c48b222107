"""Buckets, bound memory and the plan's thread: the same bits as the plain call, whatever comes before or beside."""

from __future__ import annotations

import gc
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from vaefeat import OnnxEncoder
from vaefeat.errors import DeviceError, InputError
from vaefeat.input_spec import InputSpec
from vaefeat.pinned import pinned_array
from vaefeat.plan import ExecutionPlan, buckets_up_to
from vaefeat.runtime import Interruption, OpenedGraph, open_graph

BUCKETS = (1, 8, 32)
ROWS = InputSpec(kind="vector", shape=(4,), dtype="float32", low=0.0, high=9.0)


@pytest.fixture
def plain(digits_bundle: Path) -> OnnxEncoder:
    return OnnxEncoder(digits_bundle, device="cpu", threads=1)


@pytest.fixture
def planned(digits_bundle: Path) -> OnnxEncoder:
    return OnnxEncoder(digits_bundle, device="cpu", threads=1, buckets=BUCKETS)


def doubling(*, divisor: int = 1, captures: bool = False) -> OpenedGraph:
    """Open a graph that doubles; with a divisor, one that fails on batches that it does not divide."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("rows", "mean")]
    shape = numpy_helper.from_array(np.array([divisor, -1, 4]), "shape")
    back = numpy_helper.from_array(np.array([-1, 4]), "back")
    nodes = [
        helper.make_node("Add", ["rows", "rows"], ["twice"]),
        helper.make_node("Reshape", ["twice", "shape"], ["parts"]),
        helper.make_node("Reshape", ["parts", "back"], ["mean"]),
    ]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], initializer=[shape, back])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return open_graph(model.SerializeToString(), what="a graph", device="cpu", threads=1, captures=captures)


def plan_of(opening: Any, *, captures: bool = False) -> ExecutionPlan:
    return ExecutionPlan(opening, captures=captures, buckets=BUCKETS, rows=ROWS, outputs={"mean": 4})


@pytest.mark.parametrize(
    ("max_rows", "buckets"),
    [(1, (1,)), (8, (1, 8)), (100, (1, 8, 32, 64, 100)), (256, (1, 8, 32, 64, 128, 256))],
)
def test_buckets_end_with_the_largest_batch(max_rows: int, buckets: tuple[int, ...]) -> None:
    assert buckets_up_to(max_rows) == buckets


def test_plan_gives_the_plain_call_s_bits_for_any_number_of_rows(
    plain: OnnxEncoder, planned: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    names = ["mean", "hidden", "logvar"]
    for n_rows in range(1, 2 * BUCKETS[-1] + 2):
        rows = digits_rows[n_rows : 2 * n_rows]
        for expected, found in zip(plain.compute(rows, names), planned.compute(rows, names), strict=True):
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            assert found.tobytes() == expected.tobytes()


def test_plan_s_answers_outlive_the_next_batch(planned: OnnxEncoder, digits_rows: NDArray[np.uint8]) -> None:
    (first,) = planned.compute(digits_rows[:5], ["mean"])
    kept = first.copy()
    planned.compute(digits_rows[100:108], ["mean"])
    np.testing.assert_array_equal(first, kept)
    # Nor does an answer hold on to what was computed for nobody.
    assert first.base is None


def test_plan_clears_other_rows_out_of_its_memory() -> None:
    # A graph that adds up the batch sees whatever stands in the padding.
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", 4])
    mean = helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["batch", 4])
    axes = numpy_helper.from_array(np.array([0]), "axes")
    nodes = [
        helper.make_node("ReduceSum", ["rows", "axes"], ["sum"], keepdims=1),
        helper.make_node("Sub", ["rows", "rows"], ["zeros"]),
        helper.make_node("Add", ["zeros", "sum"], ["mean"]),
    ]
    graph = helper.make_graph(nodes, "graph", [rows], [mean], initializer=[axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    def opening(*, captures: bool) -> OpenedGraph:
        return open_graph(model.SerializeToString(), what="a graph", device="cpu", threads=1, captures=captures)

    plan = plan_of(opening)
    plan.compute(np.full((8, 4), 7, np.float32), ["mean"])
    np.testing.assert_array_equal(plan.compute(np.ones((3, 4), np.float32), ["mean"])[0], np.full((3, 4), 3))


@pytest.mark.parametrize(("n_rows", "padding"), [(0, 1), (1, 0), (2, 6), (8, 0), (9, 23), (32, 0), (33, 0), (34, 6)])
def test_padding_is_what_is_computed_beside_the_rows(planned: OnnxEncoder, n_rows: int, padding: int) -> None:
    assert planned.padding(n_rows) == padding


def test_plain_encoder_pads_nothing(plain: OnnxEncoder) -> None:
    assert plain.padding(3) == 0
    assert (plain.mode.buckets, plain.mode.io_binding) == ((), False)


def test_plan_called_by_several_threads_gives_each_its_own_rows(
    plain: OnnxEncoder, planned: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    random = np.random.default_rng(0)
    cuts = [(int(start), int(start + n)) for start, n in zip(*random.integers(1, 40, (2, 400)), strict=True)]
    expected = plain.embed(digits_rows[:100])

    def is_right(cut: tuple[int, int]) -> bool:
        found = planned.compute(digits_rows[slice(*cut)], ["mean"])[0]
        return found.tobytes() == expected[slice(*cut)].tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_right, cuts))


def test_interrupted_plan_computes_no_further_bucket(planned: OnnxEncoder, digits_rows: NDArray[np.uint8]) -> None:
    interruption = Interruption()
    planned.compute(digits_rows[:3], ["mean"], interruption=interruption)
    interruption.interrupt()
    with pytest.raises(DeviceError, match="3 rows were not computed on cpu: interrupted"):
        planned.compute(digits_rows[:3], ["mean"], interruption=interruption)
    planned.compute(digits_rows[:3], ["mean"])


def test_plan_s_thread_ends_with_its_encoder(digits_bundle: Path) -> None:
    def threads() -> int:
        return sum(thread.name == "plan" for thread in threading.enumerate())

    gc.collect()
    before = threads()
    encoder = OnnxEncoder(digits_bundle, device="cpu", threads=1, buckets=BUCKETS)
    assert threads() == before + 1
    del encoder
    gc.collect()
    for _ in range(3000):
        if threads() <= before:
            break
        time.sleep(0.02)
    assert threads() <= before


def test_planned_encoder_comes_out_of_a_pickle_with_its_buckets(
    plain: OnnxEncoder, planned: OnnxEncoder, digits_rows: NDArray[np.uint8]
) -> None:
    opened = pickle.loads(pickle.dumps(planned))
    assert opened.mode == planned.mode
    assert opened.embed(digits_rows[:50]).tobytes() == plain.embed(digits_rows[:50]).tobytes()


@pytest.mark.parametrize("buckets", [(), (0, 8), (8, 1), (8, 8)])
def test_buckets_that_do_not_rise_are_refused(digits_bundle: Path, buckets: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="wanted rising numbers of rows"):
        OnnxEncoder(digits_bundle, device="cpu", buckets=buckets)


def test_mode_of_a_planned_encoder_on_the_cpu_says_what_is_off(planned: OnnxEncoder) -> None:
    assert planned.mode.to_dict() == {
        "device": "cpu",
        "provider": "CPUExecutionProvider",
        "precision": "float32",
        "buckets": list(BUCKETS),
        "io_binding": True,
        "graphs": "off: not on a GPU",
        "pinned": "off: not on a GPU",
    }


def test_capture_that_fails_goes_on_without_graphs_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    # What fails while it is captured is a graph that cannot compute 8 rows; the CPU has no captures to fail.
    opened: list[bool] = []

    def opening(*, captures: bool) -> OpenedGraph:
        opened.append(captures)
        return doubling(divisor=3 if captures else 1)

    plan = plan_of(opening, captures=True)
    assert plan.graphs == "on"
    (features,) = plan.compute(np.ones((5, 4), np.float32), ["mean"])
    np.testing.assert_array_equal(features, np.full((5, 4), 2))
    assert plan.graphs == "off: capturing failed"
    assert opened == [True, False]
    assert "CUDA graphs are off" in caplog.text
    # Clients read it, and ONNX Runtime's message names files of its build.
    assert "Reshape" in caplog.text
    assert "Reshape" not in plan.graphs


def test_graph_that_cannot_be_captured_is_opened_without(caplog: pytest.LogCaptureFixture) -> None:
    def opening(*, captures: bool) -> OpenedGraph:
        if captures:
            raise DeviceError("This session cannot use the graph capture feature")
        return doubling()

    plan = plan_of(opening, captures=True)
    assert plan.graphs == "off: ONNX Runtime refuses this graph"
    assert "cannot use the graph capture feature" in caplog.text
    plan.compute(np.ones((5, 4), np.float32), ["mean"])


def test_failure_after_the_capture_is_the_device_s(caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of(partial(doubling, divisor=8), captures=True)
    plan.compute(np.ones((8, 4), np.float32), ["mean"])
    plan._runner._captured.add(1)
    with pytest.raises(DeviceError, match="failed on 1 rows, padded to 1, on cpu"):
        plan.compute(np.ones((1, 4), np.float32), ["mean"])
    assert plan.graphs == "on"
    # The thread has survived.
    plan.compute(np.ones((8, 4), np.float32), ["mean"])


def test_failure_without_captures_is_raised_as_it_is() -> None:
    plan = plan_of(partial(doubling, divisor=3))
    with pytest.raises(DeviceError, match="failed on 4 rows, padded to 8"):
        plan.compute(np.ones((4, 4), np.float32), ["mean"])


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.mark.skipif(has_cuda(), reason="there is a CUDA device")
def test_pinned_memory_without_a_device_says_why() -> None:
    with pytest.raises(DeviceError, match=r"does not load|failed with status"):
        pinned_array((2, 3), dtype=np.float32)


@pytest.mark.gpu
def test_pinned_memory_is_an_array_and_is_given_back() -> None:
    # CUDA's runtime library is loaded with the provider.
    open_graph(doubling_bytes(), what="a graph", device="cuda")
    before = psutil.Process().memory_info().rss
    for _ in range(40):
        array = pinned_array((1 << 26,), dtype=np.float32)
        array[:3] = (1, 2, 3)
        assert array[:4].tolist() == [1, 2, 3, 0]
        del array
    assert psutil.Process().memory_info().rss - before < 1 << 30


@pytest.mark.gpu
def test_graphs_are_captured_and_replayed_with_new_rows(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> None:
    expected = OnnxEncoder(digits_bundle, device="cpu").embed(digits_rows[:200])
    encoder = OnnxEncoder(digits_bundle, device="cuda", buckets=buckets_up_to(64))
    for start in range(0, 128, 7):  # every bucket is captured once and replayed with other rows
        for n_rows in (1, 5, 20, 64):
            rows = slice(start, start + n_rows)
            found = encoder.compute(digits_rows[rows], ["mean", "logvar"])
            np.testing.assert_allclose(found[0], expected[rows], atol=1e-4)
    assert (encoder.mode.graphs, encoder.mode.pinned) == ("on", "on")


@pytest.mark.gpu
def test_graphs_give_the_bits_of_kernels_launched_one_by_one(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    captured = OnnxEncoder(digits_bundle, device="cuda", buckets=(64,))
    plain = OnnxEncoder(digits_bundle, device="cuda")
    for start in range(0, 640, 64):
        rows = digits_rows[start : start + 64]
        assert captured.embed(rows).tobytes() == plain.embed(rows).tobytes()
    assert captured.mode.graphs == "on"


@pytest.mark.gpu
def test_graphs_called_by_several_threads_give_each_its_own_rows(
    digits_bundle: Path, digits_rows: NDArray[np.uint8]
) -> None:
    encoder = OnnxEncoder(digits_bundle, device="cuda", buckets=(32,))
    expected = encoder.embed(digits_rows[:320])
    starts = list(np.random.default_rng(0).integers(0, 280, 400))

    def is_right(start: int) -> bool:
        rows = slice(start, start + 17)
        return encoder.compute(digits_rows[rows], ["mean"])[0].tobytes() == expected[rows].tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_right, starts))
    assert encoder.mode.graphs == "on"


@pytest.mark.gpu
def test_two_encoders_capture_side_by_side(digits_bundle: Path, digits_rows: NDArray[np.uint8]) -> None:
    # A service warms a new version up while the one before goes on serving.
    encoders = [OnnxEncoder(digits_bundle, device="cuda", buckets=buckets_up_to(256)) for _ in range(3)]
    expected = OnnxEncoder(digits_bundle, device="cpu").embed(digits_rows)

    def embed(encoder: OnnxEncoder) -> NDArray[np.float32]:
        return np.concatenate([encoder.compute(digits_rows[i : i + i % 97 + 1], ["mean"])[0][:1] for i in range(500)])

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(embed, encoders):
            np.testing.assert_allclose(found, expected[:500], atol=1e-4)
    assert {encoder.mode.graphs for encoder in encoders} == {"on"}


def doubling_bytes() -> bytes:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("rows", "mean")]
    graph = helper.make_graph([helper.make_node("Add", ["rows", "rows"], ["mean"])], "graph", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    serialised: bytes = model.SerializeToString()
    return serialised
