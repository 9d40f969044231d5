"""What a device does with an assignment: fetch, check, train or evaluate, encode. Files in, one report out.

Everything is in `work/<session>/` and goes through these files, so that each step can be the last one
before a crash. Nothing of a plan is executed before `verified` has said what it is, and `perform`, which executes it,
is called in a process of its own (`device.labour`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from homespun.device.home import remove, storage, sync_directory, sync_file, write_atomically
from homespun.device.models import HEADER_BYTES, Fetch
from homespun.device.watching import Watcher
from homespun.errors import Conflict, NotAllowed, PlanError, ProtocolError
from homespun.learning.contribution import Contribution, ContributionCodec
from homespun.learning.metrics import MetricSum, paired, paired_names, watched_names
from homespun.plan import features
from homespun.plan.manifest import Manifest
from homespun.plan.package import MAX_PLAN_BYTES, Plan
from homespun.plan.seeds import participation_seed, rounding, training_seed
from homespun.protocol.frame import encode_contribution
from homespun.protocol.messages import Assigned, Offer, TaskKind
from homespun.tensors import tree as trees
from homespun.tensors.codec import decode_tree, digest
from homespun.types import FloatArray, Hash

ShouldStop = Callable[[], bool]
Examples = list[dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """One session's files and what they are for.

    `trusted`: raw keys of publishers whose plans may run; `private_tensors`: patterns of parameters that may not leave;
    `watcher`: of an evaluation of what the device serves, for which there is nothing to download.
    """

    directory: Path
    assigned: Assigned
    trusted: tuple[bytes, ...]
    private_tensors: tuple[str, ...] = ()
    watcher: Watcher | None = None

    @property
    def plan_file(self) -> Path:
        return self.directory / "plan.zip"

    @property
    def group_file(self) -> Path:
        return self.directory / "group.bin"

    @property
    def update_file(self) -> Path:
        return self.directory / "update.bin"

    @property
    def report_file(self) -> Path:
        return self.directory / "report.bin"

    @property
    def step_file(self) -> Path:
        return self.directory / "step.bin"

    def checkpoint_file(self, index: int) -> Path:
        return self.directory / f"checkpoint-{index}.safetensors"

    def download(self, fetch: Fetch) -> bool:
        """Fetch plan and checkpoints, durably; False if `fetch` was stopped. Raises as `verified` does."""
        if self.watcher is not None:
            return True
        if not self._have(fetch, self.assigned.plan_hash, self.plan_file, MAX_PLAN_BYTES):
            return False
        manifest = self.verified().manifest
        largest = 4 * manifest.num_parameters + HEADER_BYTES
        for index, checkpoint in enumerate(self.assigned.checkpoints):
            if not self._have(fetch, checkpoint, self.checkpoint_file(index), largest):
                return False
            self.checkpoint(index, manifest)
        with storage(self.directory):
            sync_directory(self.directory)
        return True

    def _have(self, fetch: Fetch, address: Hash, path: Path, max_bytes: int) -> bool:
        with storage(path):
            if path.exists():
                if digest(path.read_bytes()) == address:
                    return True
                remove(path)  # a power cut broke it
        if not fetch(address, path, max_bytes):
            return False
        with storage(path):
            sync_file(path)
        return True

    def verified(self) -> Plan:
        """The plan, once it is known to be one that may run and that the assignment does not stretch.

        Raises `PlanError` and its kinds, `TooLarge`, or `NotAllowed` for an encoding that the plan's
        signature does not cover.
        """
        plan = Plan.read(self.plan_file)
        plan.verify(self.trusted)
        encoding = self.assigned.encoding
        if self.assigned.kind is TaskKind.TRAIN:
            self._keep_private(plan.manifest)
            signed = (plan.manifest.clip_norm, plan.manifest.max_weight)
            if (encoding.clip_norm, encoding.max_weight) != signed:
                raise NotAllowed(
                    "the assignment asks for another clip bound or weight than the signed plan",
                    hint="nothing was sent; the operator must publish another plan",
                    expected=str(signed),
                    got=str((encoding.clip_norm, encoding.max_weight)),
                )
        return plan

    def _keep_private(self, manifest: Manifest) -> None:
        for name, _ in manifest.shapes:
            for pattern in self.private_tensors:
                if fnmatchcase(name, pattern):
                    raise PlanError(
                        f"the plan trains and sends {name}, which the device's policy keeps private ({pattern})",
                        hint="nothing was sent; homespun device policy shows the rule",
                    )

    def checkpoint(self, index: int, manifest: Manifest) -> dict[str, FloatArray]:
        """A downloaded checkpoint. Raises `BadFrame`, `ShapeMismatch`, `NumericFailure`."""
        with storage(self.checkpoint_file(index)):
            data = self.checkpoint_file(index).read_bytes()
        checkpoint = decode_tree(data)
        manifest.check_checkpoint(checkpoint)
        return checkpoint

    def codec(self, manifest: Manifest | None = None) -> ContributionCodec:
        """How the contribution of this assignment becomes integers. Raises `InvalidConfig`, and without `manifest` what
        `verified` raises."""
        encoding, dimension, metrics = self.assigned.encoding, 0, watched_names()
        if self.watcher is None:
            manifest = manifest or self.verified().manifest
            metrics = ("loss", *manifest.metrics)
            if self.assigned.kind is TaskKind.TRAIN:
                dimension = trees.dimension(manifest.shapes)
            else:
                metrics = paired_names(metrics, len(self.assigned.checkpoints))
        return ContributionCodec(
            dimension=dimension,
            clip_norm=encoding.clip_norm,
            max_weight=encoding.max_weight,
            metrics=metrics,
            max_group=encoding.max_group,
            bits=encoding.bits,
            rotation_seed=encoding.rotation_seed,
        )

    def perform(self, examples: Examples, device_seed: int, should_stop: ShouldStop) -> Hash | None:
        """Train or evaluate, write the report's bytes; their digest, or None if `should_stop` ended it.

        Training goes on where an earlier call was stopped or killed, and gives the same bytes as without that.
        Raises `InvalidExample`, `InvalidInput`, `NumericFailure` and what `verified` raises.
        """
        seed = participation_seed(self.assigned.seed, device_seed)
        contribution: Contribution | None
        if self.watcher is not None:
            contribution = _watch(self, self.watcher, examples, seed, should_stop)
        else:
            plan = self.verified()
            rows = features.encode(plan.manifest, plan.assets, examples)
            run = _train if self.assigned.kind is TaskKind.TRAIN else _evaluate
            contribution = run(self, plan, rows, seed, should_stop)
        if contribution is None:
            return None
        return self._write_report(contribution)

    def encode_again(self, staleness: int) -> Hash:
        """Write the report anew, of the same update for the round that this is now; its digest, the same every time.

        Raises `Conflict` if the update is not there any more, and what `verified` and `codec` raise.
        """
        with storage(self.update_file):
            kept = self.update_file.read_bytes() if self.update_file.exists() else b""
        try:
            update = msgspec.msgpack.decode(kept, type=Update)
        except msgspec.MsgspecError as error:
            raise Conflict("the update on disk is not the one that was made") from error
        assigned, codec = self.assigned, self.codec(self.verified().manifest)
        rng = rounding(update.seed, assigned.round_number, assigned.attempt)
        return self._write_report(update.encode(codec, rng, staleness))

    def _write_report(self, contribution: Contribution) -> Hash:
        body = encode_contribution(contribution)
        write_atomically(self.report_file, body)
        remove(self.step_file)
        return digest(body)

    def report(self, expected: Hash | None) -> bytes:
        """The bytes to send, the same every time. Raises `Conflict` if they are no longer those."""
        with storage(self.report_file):
            body = self.report_file.read_bytes() if self.report_file.exists() else b""
        if digest(body) != expected:
            raise Conflict("the report on disk is not the one that was journalled")
        return body


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """What training made, before it is encoded: kept while a later round may need it in another encoding.

    `vector`: the update `[d]`, float32, little-endian; `metrics`: name -> (sum, count); `seed`: of the rounding.
    """

    vector: bytes
    num_examples: int
    metrics: dict[str, tuple[float, float]]
    seed: int

    def encode(
        self, codec: ContributionCodec, rng: np.random.Generator, staleness: int = 0
    ) -> Contribution:
        metrics = {name: MetricSum(*value) for name, value in self.metrics.items()}
        vector = np.frombuffer(self.vector, "<f4")
        return codec.encode(vector, self.num_examples, metrics, rng, staleness)


def check_assignment(offer: Offer, assigned: Assigned) -> None:
    """Raise `ProtocolError` unless the assignment is what was offered and accepted."""
    for name in ("kind", "round_number", "attempt", "plan_hash", "aggregation", "max_staleness"):
        offered, got = getattr(offer, name), getattr(assigned, name)
        if offered != got:
            raise ProtocolError(
                f"the assignment has another {name} than the offer",
                expected=str(offered),
                got=str(got),
            )
    if not assigned.checkpoints or assigned.encoding.max_group < offer.min_group:
        raise ProtocolError("the assignment names no checkpoint, or too small a group")


def _train(
    work: Work, plan: Plan, rows: features.Rows, seed: int, should_stop: ShouldStop
) -> Contribution | None:
    from homespun.device.progress import StepCheckpoint
    from homespun.plan import run  # loads ONNX Runtime

    manifest, codec = plan.manifest, work.codec(plan.manifest)
    checkpoint = work.checkpoint(0, manifest)
    kept = StepCheckpoint(work.step_file, rows)
    result = run.train(
        plan,
        checkpoint,
        rows,
        training_seed(seed),
        should_stop,
        resume=kept.read(),
        after_step=kept.after_step,
    )
    if result.interrupted:
        kept.write(result.progress)
        return None
    vector = trees.flatten(result.update, manifest.shapes)
    update = Update(
        vector=vector.astype("<f4").tobytes(),
        num_examples=result.num_examples,
        metrics={name: (metric.sum, metric.count) for name, metric in result.metrics.items()},
        seed=seed,
    )
    if work.assigned.max_staleness:
        write_atomically(work.update_file, msgspec.msgpack.encode(update))
    return update.encode(codec, rounding(seed))


def _evaluate(
    work: Work, plan: Plan, rows: features.Rows, seed: int, should_stop: ShouldStop
) -> Contribution | None:
    from homespun.plan import run

    manifest, codec = plan.manifest, work.codec(plan.manifest)
    results = []
    for index in range(len(work.assigned.checkpoints)):
        if should_stop():
            return None
        checkpoint = work.checkpoint(index, manifest)
        results.append(run.evaluate(plan, checkpoint, rows, should_stop))
    if should_stop():
        return None
    update = trees.flatten({}, ())
    metrics = paired(results, manifest.metrics[0], codec.clip_norm)
    return codec.encode(update, features.num_rows(rows), metrics, rounding(seed))


def _watch(
    work: Work, watcher: Watcher, examples: Examples, seed: int, should_stop: ShouldStop
) -> Contribution | None:
    metrics = watcher.metrics(examples, should_stop)
    if metrics is None:
        return None
    update = trees.flatten({}, ())
    return work.codec().encode(update, len(examples), metrics, rounding(seed))
