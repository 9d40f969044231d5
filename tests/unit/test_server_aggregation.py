"""Aggregation: how contributions are encoded, and what never becomes a result."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from homespun.errors import NumericFailure
from homespun.learning.metrics import MetricSum
from homespun.protocol.frame import frame_parts, frame_size, masked_frame_size
from homespun.protocol.messages import Aggregation, Criteria, TaskKind
from homespun.protocol.round import RoundState, RoundView
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import TaskState
from homespun.server.aggregation import (
    aggregate,
    chain,
    contribution_codec,
    encoding,
    group_terms,
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
        "min_group": 3,
        "criteria": Criteria(),
        **fields,
    }
    return TaskSpec(**values)  # type: ignore[arg-type]


def test_training_is_encoded_as_the_plan_says():
    how = encoding(spec(TaskKind.TRAIN), MANIFEST, 1, 1)
    assert (how.bits, how.clip_norm, how.max_weight, how.max_group) == (16, 2.0, 50, 10)
    task = spec(TaskKind.TRAIN, bits=12)
    codec = contribution_codec(task, MANIFEST, 1, 1)
    assert (codec.dimension, codec.bits, codec.metrics) == (10, 12, ("loss", "accuracy"))
    assert report_size(task, codec) == masked_frame_size(12, 7, 10)
    plain = spec(TaskKind.TRAIN, aggregation=Aggregation.PLAIN)
    assert encoding(plain, MANIFEST, 1, 1).max_group == 20
    assert report_size(plain, contribution_codec(plain, MANIFEST, 1, 1)) == frame_size(16, 7, 10)


def test_every_round_attempt_is_rotated_in_its_own_way():
    seeds = {
        encoding(spec(TaskKind.TRAIN), MANIFEST, *place).rotation_seed
        for place in ((1, 1), (1, 2), (2, 1))
    }
    assert len(seeds) == 3
    assert encoding(spec(TaskKind.TRAIN, rotate=False), MANIFEST, 1, 1).rotation_seed is None


def test_a_group_is_told_what_the_task_says():
    task = record(0, ()).task
    codec = contribution_codec(task.spec, MANIFEST, 1, 1)
    terms = group_terms(task, "1" * 64, 4, 2, codec)
    assert (terms.task, terms.round_number, terms.attempt) == ("t", 4, 2)
    assert (terms.n_min, terms.n_max) == (3, 10)
    assert (terms.bits, terms.dimension, terms.num_aux) == (16, 0, 17)
    # Both checkpoints count: to compare with another incumbent is another computation.
    assert terms.checkpoint_hash == hashlib.sha256(b"1" * 64 + b"\n" + b"2" * 64).hexdigest()


def test_evaluation_is_metrics_only_and_weighs_every_device_alike():
    how = encoding(spec(TaskKind.EVALUATE), MANIFEST, 1, 1)
    assert (how.clip_norm, how.max_weight, how.rotation_seed) == (0.1, 0, None)
    codec = contribution_codec(spec(TaskKind.EVALUATE), MANIFEST, 1, 1)
    assert codec.dimension == 0
    assert codec.metrics[:4] == ("0.loss", "0.accuracy", "1.loss", "1.accuracy")
    assert codec.metrics[4:] == ("difference", "difference_squared", "wins")


def test_the_chain_depends_on_every_part():
    links = {chain(None, "a", 1), chain("x", "a", 1), chain("x", "b", 1), chain("x", "b", 2)}
    assert len(links) == 4


def record(num_reported: int, sums: tuple[str, ...]) -> RoundRecord:
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
        pool_target=10,
        select_at=0.0,
        deadline_at=0.0,
        num_waiting=0,
        num_assigned=10,
        num_open=0,
        num_reported=num_reported,
    )
    return RoundRecord(5, task, 1, 1, "1" * 64, 3, sums, None, view)


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
    codec = contribution_codec(spec(TaskKind.EVALUATE), MANIFEST, 1, 1)
    totals = [codec.empty(), codec.empty()]  # of two groups
    metrics = {name: MetricSum(1.0, 2.0) for name in codec.metrics}
    for index in range(in_sum):
        codec.add(
            totals[index % 2],
            codec.encode(np.zeros(0, np.float32), 1, metrics, np.random.default_rng(0)),
        )
    scope = round_scope(private, 5)
    closing = record(reported, tuple(scope.put(*frame_parts(total)) for total in totals))
    if works:
        trained = aggregate(closing, Shelf(), private, private)  # type: ignore[arg-type]
        assert trained.checkpoint is None
        assert trained.result.metrics["0.loss"].sum == in_sum
    else:
        with pytest.raises(NumericFailure, match="devices that reported"):
            aggregate(closing, Shelf(), private, private)  # type: ignore[arg-type]


def test_no_sum_is_no_result(tmp_path: Path):
    blobs = LocalBlobs(tmp_path, 10_000)
    with pytest.raises(NumericFailure, match="no weight"):
        aggregate(record(0, ()), Shelf(), blobs, blobs)  # type: ignore[arg-type]
