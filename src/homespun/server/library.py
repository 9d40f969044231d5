"""The library: plans and checkpoints that operators hand in, checked before anything refers to them."""

from __future__ import annotations

import threading

from homespun.errors import NotFound
from homespun.plan.manifest import Manifest
from homespun.plan.package import Plan
from homespun.protocol.views import Stored
from homespun.server.blobs import Blobs
from homespun.server.keys import Keys
from homespun.server.store import Store
from homespun.tensors import codec
from homespun.types import FloatArray, Hash


class Library:
    """Keeps the manifests of plans in use in memory; graphs stay on disk."""

    def __init__(self, store: Store, blobs: Blobs, keys: Keys) -> None:
        self._store = store
        self._blobs = blobs
        self._keys = keys
        self._manifests: dict[Hash, Manifest] = {}
        self._lock = threading.Lock()

    def push_plan(self, data: bytes, now: float) -> Stored:
        """Take in a plan's zip; one without a signature is signed with the server's publisher key.

        Raises `PlanError` and its kinds, among them `UntrustedPlan` for a plan that somebody else signed.
        """
        plan = Plan.read(data)
        if plan.publisher is None:
            plan = plan.sign(self._keys.publisher)
        plan.check_publishable()
        plan.verify([self._keys.publisher_public])
        packed = plan.to_bytes()
        address = self._blobs.put(packed)
        name = plan.manifest.name
        self._store.catalogue.add_plan(address, name, len(packed), plan.manifest.to_bytes(), now)
        return Stored(hash=address, size_bytes=len(packed), name=name)

    def push_checkpoint(self, data: bytes, plan_hash: Hash, now: float) -> Stored:
        """Take in parameters of a plan, as canonical safetensors.

        Raises `BadFrame`, `ShapeMismatch` or `NumericFailure` when they are not; `NotFound` for the plan.
        """
        manifest = self.manifest(plan_hash)
        checkpoint = codec.decode_tree(data)
        manifest.check_checkpoint(checkpoint)
        canonical = codec.encode_tree(checkpoint)
        address = self._blobs.put(canonical)
        self._store.catalogue.add_checkpoint(address, plan_hash, len(canonical), now)
        return Stored(hash=address, size_bytes=len(canonical))

    def manifest(self, plan_hash: Hash) -> Manifest:
        """Raises `NotFound`."""
        with self._lock:
            if plan_hash not in self._manifests:
                data = self._store.catalogue.manifest(plan_hash)
                self._manifests[plan_hash] = Manifest.from_bytes(data)
            return self._manifests[plan_hash]

    def checkpoint(self, address: Hash) -> dict[str, FloatArray]:
        """The arrays of a checkpoint."""
        return codec.decode_tree(bytes(self._blobs.get(address)))

    def plan_bytes(self, plan_hash: Hash) -> bytes:
        """The zip of a plan; no other blob. Raises `NotFound`."""
        self.manifest(plan_hash)
        return bytes(self._blobs.get(plan_hash))

    def check(self, plan_hash: Hash, checkpoint: Hash) -> int:
        """Look at a plan and its parameters once more, as far as that needs no runtime. Their bytes together.

        Raises `PlanError` and its kinds for operators or graphs that no device takes and for files that are not what
        their publisher signed, `ShapeMismatch` or `NumericFailure` for parameters that do not fit or are not finite.
        """
        packed = self.plan_bytes(plan_hash)
        plan = Plan.read(packed)
        plan.check_publishable()
        plan.verify([self._keys.publisher_public])
        plan.manifest.check_checkpoint(self.checkpoint(checkpoint))
        return len(packed) + self._blobs.size(checkpoint)

    def checkpoint_bytes(self, address: Hash) -> bytes:
        """The file of a checkpoint; no other blob. Raises `NotFound`."""
        if not self._store.catalogue.has_checkpoint(address):
            raise NotFound(f"there is no checkpoint {address[:12]}")
        return bytes(self._blobs.get(address))
