"""What one slot of a device holds, and how it changes when a release arrives or fails; `serving` keeps it.

A release has several stages, which are manifests of growing sequence; the model that it serves is the same in all of
them. So a failure belongs to a release and a model, and whatever names the same model needs no download.
"""

from __future__ import annotations

import msgspec

from homespun.protocol.messages import ReleaseManifest

MAX_FAILURES = 32
"""Older ones are forgotten."""


def name_of(manifest: ReleaseManifest) -> str:
    """What all stages of a release have in common."""
    return manifest.release_id or str(manifest.sequence)


def content_of(manifest: ReleaseManifest) -> str:
    """Names the model itself, whatever release it comes with: its directory."""
    return f"{manifest.plan_hash[:32]}-{manifest.checkpoint[:32]}"


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A release that failed here, and why. `during`: the newest release known at that time."""

    release: str
    version: str
    content: str
    during: str
    reason: str


class Slots(msgspec.Struct, frozen=True, kw_only=True):
    """What one slot holds. `newest`: the highest sequence seen, for this device or not, so that an older release can
    never be replayed; `deployed`: the highest that was for every device; `failed`: the latest last.
    """

    newest: ReleaseManifest | None = None
    deployed: int = 0
    active: ReleaseManifest | None = None
    candidate: ReleaseManifest | None = None
    previous: ReleaseManifest | None = None
    failed: tuple[Failure, ...] = ()

    @property
    def sequence(self) -> int:
        return self.newest.sequence if self.newest else 0

    @property
    def kept(self) -> frozenset[str]:
        """The models whose files are needed."""
        held = (self.active, self.candidate, self.previous)
        return frozenset(content_of(manifest) for manifest in held if manifest is not None)

    def has_failed(self, manifest: ReleaseManifest) -> bool:
        """Whether this release, with this model, must not be installed again."""
        release, content = name_of(manifest), content_of(manifest)
        return any((f.release, f.content) == (release, content) for f in self.failed)

    def seen(self, manifest: ReleaseManifest) -> Slots:
        """After a release has been dealt with, whether it is for this device or not."""
        newest = max(self.newest or manifest, manifest, key=lambda each: each.sequence)
        deployed = max(self.deployed, manifest.sequence if manifest.fraction >= 1 else 0)
        return msgspec.structs.replace(self, newest=newest, deployed=deployed, candidate=None)

    def trying(self, manifest: ReleaseManifest | None) -> Slots:
        """With `manifest` on its way to be served; None: it is not any more."""
        return msgspec.structs.replace(self, candidate=manifest)

    def arrived(self, newest: ReleaseManifest, wanted: ReleaseManifest | None) -> Slots:
        """After `newest` was seen, and the files of `wanted` are here, which this device is to serve: `newest` too, or
        what is deployed. It may have failed in the meantime, where somebody predicts.
        """
        after = self.seen(newest)
        if wanted is None or self.has_failed(wanted):
            return after
        return after.seen(wanted).switched(wanted)

    def settled(self, active: ReleaseManifest) -> Slots:
        """Without PREVIOUS, which nobody goes back to from `active` any more."""
        return msgspec.structs.replace(self, previous=None) if self.active == active else self

    def switched(self, manifest: ReleaseManifest) -> Slots:
        """With `manifest` served. Another stage of what is served changes the record only; going back to PREVIOUS
        leaves nothing to go back to.
        """
        active, content = self.active, content_of(manifest)
        if active is not None and content_of(active) == content:
            return msgspec.structs.replace(self, active=manifest)
        back = self.previous is not None and content_of(self.previous) == content
        return msgspec.structs.replace(self, active=manifest, previous=None if back else active)

    def failing(self, manifest: ReleaseManifest, reason: str, *, crashed: bool = False) -> Slots:
        """After a failure: PREVIOUS is served again. Without one the model stays, unless it ends whoever uses it."""
        failure = Failure(
            release=name_of(manifest),
            version=manifest.version,
            content=content_of(manifest),
            during=name_of(self.newest or manifest),
            reason=reason,
        )
        known = any(msgspec.structs.replace(f, reason=reason) == failure for f in self.failed)
        failed = self.failed if known else (*self.failed, failure)[-MAX_FAILURES:]
        after = msgspec.structs.replace(self, failed=failed)
        if self.active == manifest and (self.previous is not None or crashed):
            return msgspec.structs.replace(after, active=self.previous, previous=None)
        return after
