"""Aggregation: from the sum of a round to the next checkpoint, and how contributions are encoded for it."""

from __future__ import annotations

import hashlib

from homespun.errors import NumericFailure
from homespun.learning.algorithm import Algorithm
from homespun.learning.contribution import Aggregate, ContributionCodec
from homespun.learning.metrics import paired_names
from homespun.learning.optimizers import server_optimizer
from homespun.plan.manifest import Manifest
from homespun.protocol.frame import decode_contribution, frame_size
from homespun.protocol.messages import Encoding, TaskKind
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import MetricView
from homespun.server.blobs import Blobs
from homespun.server.library import Library
from homespun.server.store.records import RoundRecord, RoundResult, TaskRecord, Trained
from homespun.tensors import codec as tensors
from homespun.types import FloatArray, Hash


def encoding(spec: TaskSpec, manifest: Manifest) -> Encoding:
    """How devices turn what they have into integers. Evaluation carries metrics only, every device alike."""
    train = spec.kind is TaskKind.TRAIN
    return Encoding(
        bits=spec.bits,
        clip_norm=manifest.clip_norm if train else 1.0,
        max_weight=manifest.max_weight if train else 0,
        max_group=spec.cohort_size,
    )


def contribution_codec(spec: TaskSpec, manifest: Manifest) -> ContributionCodec:
    """The codec that both ends of a task use."""
    metrics = ("loss", *manifest.metrics)
    how = encoding(spec, manifest)
    train = spec.kind is TaskKind.TRAIN
    return ContributionCodec(
        dimension=manifest.num_parameters if train else 0,
        clip_norm=how.clip_norm,
        max_weight=how.max_weight,
        metrics=metrics if train else paired_names(metrics, len(spec.checkpoints)),
        max_group=how.max_group,
        bits=how.bits,
    )


def report_size(codec: ContributionCodec) -> int:
    """Bytes of a report body."""
    return frame_size(codec.bits, len(codec.aux_names), codec.dimension)


def chain(parent: Hash | None, checkpoint: Hash, number: int) -> Hash:
    """The next link of a task's hash chain; `parent` is None for the initial checkpoint, `number` 0."""
    return hashlib.sha256(f"{parent or ''}\n{checkpoint}\n{number}".encode()).hexdigest()


def round_scope(private: Blobs, round_id: int) -> Blobs:
    """Where the snapshots of a round's sum are."""
    return private.scope(f"round-{round_id}")


def task_scope(private: Blobs, task_id: str) -> Blobs:
    """Where a task's optimizer state is."""
    return private.scope(f"task-{task_id}")


def aggregate(record: RoundRecord, library: Library, blobs: Blobs, private: Blobs) -> Trained:
    """Turn the stored sum into the round's result; its blobs are durable, nothing refers to them yet.

    The same sum gives the same bytes, so a crash and a second try change nothing. Raises `NumericFailure` when
    the sum cannot be used.
    """
    task = record.task
    manifest = library.manifest(task.spec.plan_hash)
    codec = contribution_codec(task.spec, manifest)
    if record.sum_snapshot is None:
        raise NumericFailure("there is no sum")
    total = decode_contribution(round_scope(private, record.round_id).get(record.sum_snapshot))
    if task.spec.kind is TaskKind.EVALUATE:
        return Trained(None, None, None, _result(codec.decode(total), record))
    optimizer = server_optimizer(task.spec.optimizer.name, task.spec.optimizer.settings)
    algorithm = Algorithm(manifest.shapes, codec, optimizer)
    parameters = library.checkpoint(record.base)
    moved, state, totals = algorithm.server_update(
        parameters, _state(task, private) or optimizer.init(parameters), total
    )
    result = _result(totals, record)
    checkpoint = blobs.put(tensors.encode_tree(moved))
    return Trained(
        checkpoint=checkpoint,
        chain=chain(task.chain, checkpoint, record.number),
        optimizer_state=(
            task_scope(private, task.task_id).put(tensors.encode_tree(state)) if state else None
        ),
        result=result,
    )


def _state(task: TaskRecord, private: Blobs) -> dict[str, FloatArray] | None:
    if task.optimizer_state is None:
        return None
    return tensors.decode_tree(bytes(task_scope(private, task.task_id).get(task.optimizer_state)))


def _result(totals: Aggregate, record: RoundRecord) -> RoundResult:
    # A last look, whatever happened before: what leaves here is of at least `minimum` devices.
    if totals.num_clients != record.view.num_reported or totals.num_clients < record.view.minimum:
        raise NumericFailure(
            "the sum is not over the devices that reported",
            expected=record.view.num_reported,
            got=totals.num_clients,
        )
    return RoundResult(
        weight=totals.weight,
        clipped_share=totals.clipped_share,
        metrics={
            name: MetricView(sum=value.sum, count=value.count)
            for name, value in totals.metrics.items()
        },
    )
