"""Aggregation: from the sums of a round to the next checkpoint, and how contributions are encoded for it."""

from __future__ import annotations

import hashlib

from homespun.errors import NumericFailure
from homespun.learning.algorithm import Algorithm
from homespun.learning.contribution import Aggregate, ContributionCodec
from homespun.learning.metrics import paired_names, watched_names
from homespun.learning.optimizers import server_optimizer
from homespun.plan.manifest import Manifest
from homespun.protocol.frame import decode_contribution, frame_size, masked_frame_size
from homespun.protocol.messages import Aggregation, Encoding, TaskKind, checkpoints_hash
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import MetricView
from homespun.rng import derive_seed
from homespun.secagg.messages import Terms
from homespun.server.blobs import Blobs
from homespun.server.library import Library
from homespun.server.store.records import RoundRecord, RoundResult, TaskRecord, Trained
from homespun.tensors import codec as tensors
from homespun.types import FloatArray, Hash


def round_seed(spec: TaskSpec, number: int, attempt: int) -> int:
    """Public randomness of a round attempt."""
    return derive_seed(spec.seed, number, attempt)


def encoding(spec: TaskSpec, manifest: Manifest, number: int, attempt: int) -> Encoding:
    """How devices of a round attempt make integers. Evaluation carries metrics only, every device alike; what it
    clips is the difference of the two models on a device.
    """
    train = spec.kind is TaskKind.TRAIN
    seed = round_seed(spec, number, attempt)
    return Encoding(
        bits=spec.bits,
        clip_norm=manifest.clip_norm if train else spec.difference_clip,
        max_weight=manifest.max_weight if train else 0,
        max_group=spec.max_group,
        rotation_seed=derive_seed(seed, "rotation") if train and spec.rotate else None,
    )


def contribution_codec(
    spec: TaskSpec, manifest: Manifest, number: int, attempt: int
) -> ContributionCodec:
    """The codec that both ends of a round attempt use."""
    how = encoding(spec, manifest, number, attempt)
    train = spec.kind is TaskKind.TRAIN
    return ContributionCodec(
        dimension=manifest.num_parameters if train else 0,
        clip_norm=how.clip_norm,
        max_weight=how.max_weight,
        metrics=_metric_names(spec, manifest),
        max_group=how.max_group,
        bits=how.bits,
        rotation_seed=how.rotation_seed,
    )


def _metric_names(spec: TaskSpec, manifest: Manifest) -> tuple[str, ...]:
    if spec.watch is not None:
        return watched_names()
    metrics = ("loss", *manifest.metrics)
    return metrics if spec.kind is TaskKind.TRAIN else paired_names(metrics, len(spec.checkpoints))


def report_size(spec: TaskSpec, codec: ContributionCodec) -> int:
    """Bytes of a report body: of a contribution, or of a masked one."""
    size = masked_frame_size if spec.aggregation is Aggregation.SECURE else frame_size
    return size(codec.bits, len(codec.aux_names), codec.dimension)


def group_terms(
    task: TaskRecord, base: Hash, number: int, attempt: int, codec: ContributionCodec
) -> Terms:
    """What all groups of a round attempt compute, and how well they are protected."""
    spec = task.spec
    return Terms(
        task=spec.name,
        round_number=number,
        attempt=attempt,
        checkpoint_hash=checkpoints_hash(round_checkpoints(spec, base)),
        plan_hash=spec.plan_hash,
        bits=codec.bits,
        dimension=codec.dimension,
        num_aux=len(codec.aux_names),
        schema=codec.schema,
        clip=codec.clip,
        n_min=spec.min_group,
        n_max=codec.max_group,
        corrupt_fraction=spec.groups.corrupt_fraction,
        drop_out_fraction=spec.groups.drop_out_fraction,
        max_staleness=spec.max_staleness,
    )


def round_checkpoints(spec: TaskSpec, base: Hash) -> tuple[Hash, ...]:
    """What a device of a round downloads: the base to train from, or all that are to be evaluated."""
    return (base,) if spec.kind is TaskKind.TRAIN else spec.checkpoints


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
    """Turn the stored sums into the round's result; its blobs are durable, nothing refers to them yet.

    The same sums give the same bytes, so a crash and a second try change nothing. Raises `NumericFailure` when
    the sum cannot be used.
    """
    task = record.task
    manifest = library.manifest(task.spec.plan_hash)
    codec = contribution_codec(task.spec, manifest, record.number, record.attempt)
    scope = round_scope(private, record.round_id)
    sums = [decode_contribution(scope.get(address)) for address in record.sums]
    if task.spec.kind is TaskKind.EVALUATE:
        return Trained(None, None, None, _result(codec.decode(*sums), record))
    optimizer = server_optimizer(task.spec.optimizer.name, task.spec.optimizer.settings)
    algorithm = Algorithm(manifest.shapes, codec, optimizer)
    parameters = library.checkpoint(record.base)
    moved, state, totals = algorithm.server_update(
        parameters, _state(task, private) or optimizer.init(parameters), *sums
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
    # Devices of a watch are of two kinds; of which kind there are too few, nothing is said.
    spec = record.task.spec
    fewest = spec.min_group if spec.watch is not None else 0
    return RoundResult(
        weight=totals.weight,
        clipped_share=totals.clipped_share,
        metrics={
            name: MetricView(sum=value.sum, count=value.count)
            for name, value in totals.metrics.items()
            if value.count >= fewest
        },
    )
