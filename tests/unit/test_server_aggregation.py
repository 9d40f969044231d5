"""Aggregation: how contributions are encoded, and what never becomes a result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from homespun.errors import NumericFailure
from homespun.learning.metrics import MetricSum
from homespun.protocol.frame import frame_parts, frame_size
from homespun.protocol.messages import Criteria, TaskKind
from homespun.protocol.round import RoundState, RoundView
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import TaskState
from homespun.server.aggregation import (
    aggregate,
    chain,
    contribution_codec,
    encoding,
    report_size,
    round_scope,
)
from homespun.server.blobs import LocalBlobs
from homespun.server.store.records import RoundRecord, TaskRecord
from tests.fleet.world import synthetic_plan

MANIFEST = synthetic_plan().manifest


def spec(kind: TaskKind, **fields: object) -> TaskSpec:
    values = {
        "name": "t",
        "population": "p",
        "kind": kind,
        "plan_hash": "0" * 64,
        "checkpoints": ("1" * 64,) if kind is TaskKind.TRAIN else ("1" * 64, "2" * 64),
        "goal": 10,
        "minimum": 3,
        "criteria": Criteria(),
        **fields,
    }
    return TaskSpec(**values)  # type: ignore[arg-type]


def test_training_is_encoded_as_the_plan_says():
    how = encoding(spec(TaskKind.TRAIN, bits=16), MANIFEST)
    assert (how.bits, how.clip_norm, how.max_weight, how.max_group) == (16, 2.0, 50, 13)
    codec = contribution_codec(spec(TaskKind.TRAIN), MANIFEST)
    assert (codec.dimension, codec.metrics) == (10, ("loss", "accuracy"))
    assert report_size(codec) == frame_size(32, 7, 10)


def test_evaluation_is_metrics_only_and_weighs_every_device_alike():
    how = encoding(spec(TaskKind.EVALUATE), MANIFEST)
    assert (how.clip_norm, how.max_weight) == (1.0, 0)
    codec = contribution_codec(spec(TaskKind.EVALUATE), MANIFEST)
    assert codec.dimension == 0
    assert codec.metrics[:4] == ("0.loss", "0.accuracy", "1.loss", "1.accuracy")
    assert codec.metrics[4:] == ("difference", "difference_squared", "wins")


def test_the_chain_depends_on_every_part():
    links = {chain(None, "a", 1), chain("x", "a", 1), chain("x", "b", 1), chain("x", "b", 2)}
    assert len(links) == 4


def record(num_reported: int, snapshot: str | None) -> RoundRecord:
    task = TaskRecord(
        task_id="t1",
        spec=spec(TaskKind.EVALUATE),
        state=TaskState.ACTIVE,
        reason="",
        created_at=0.0,
        rounds_committed=0,
        head="1" * 64,
        chain="2" * 64,
        optimizer_state=None,
    )
    view = RoundView(
        state=RoundState.CLOSING,
        goal=10,
        minimum=3,
        over_selection=1.0,
        pool_target=10,
        select_at=0.0,
        deadline_at=0.0,
        num_waiting=0,
        num_assigned=10,
        num_open=0,
        num_reported=num_reported,
    )
    return RoundRecord(5, task, 1, 1, "1" * 64, snapshot, None, view)


class Shelf:
    """A library with one plan."""

    def manifest(self, _: str) -> object:
        return MANIFEST


@pytest.mark.parametrize(
    ("in_sum", "reported", "works"), [(3, 3, True), (3, 4, False), (2, 2, False), (4, 3, False)]
)
def test_only_a_sum_over_exactly_those_who_reported(
    tmp_path: Path, in_sum: int, reported: int, works: bool
):
    private = LocalBlobs(tmp_path, 10_000)
    codec = contribution_codec(spec(TaskKind.EVALUATE), MANIFEST)
    total = codec.empty()
    metrics = {name: MetricSum(1.0, 2.0) for name in codec.metrics}
    for _ in range(in_sum):
        codec.add(
            total,
            codec.encode(np.zeros(0, np.float32), 1, metrics, np.random.default_rng(0)),
        )
    snapshot = round_scope(private, 5).put(*frame_parts(total))
    closing = record(reported, snapshot)
    if works:
        trained = aggregate(closing, Shelf(), private, private)  # type: ignore[arg-type]
        assert trained.checkpoint is None
        assert trained.result.metrics["0.loss"].sum == in_sum
    else:
        with pytest.raises(NumericFailure, match="devices that reported"):
            aggregate(closing, Shelf(), private, private)  # type: ignore[arg-type]


def test_no_sum_is_no_result(tmp_path: Path):
    blobs = LocalBlobs(tmp_path, 10_000)
    with pytest.raises(NumericFailure, match="no sum"):
        aggregate(record(0, None), Shelf(), blobs, blobs)  # type: ignore[arg-type]
