"""What the device serves: a release, and the one before it to fall back on.

    models/<slot>/slots.json             which release is ACTIVE, CANDIDATE, PREVIOUS; replaced atomically
    models/<slot>/<sequence>/plan.zip    checkpoint.safetensors

Only a signed release changes what is served. It is installed as CANDIDATE, loaded and tried, and becomes
ACTIVE by one rename. Predicting needs no network. When the active model does not load or gives numbers
that are not finite, the device goes back to PREVIOUS by itself and remembers why.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from homespun.device.child import try_model
from homespun.device.home import (
    Home,
    Settings,
    remove,
    storage,
    sync_directory,
    sync_file,
    write_atomically,
)
from homespun.errors import (
    BadFrame,
    HomespunError,
    InvalidInput,
    NotAuthentic,
    NotFound,
    NumericFailure,
    PlanError,
    ShapeMismatch,
    StorageFailure,
    TooLarge,
)
from homespun.plan.manifest import TextFeature
from homespun.plan.package import MAX_PLAN_BYTES, Plan
from homespun.protocol import messages
from homespun.protocol.messages import ReleaseManifest, SignedRelease
from homespun.protocol.signing import RELEASE_CONTEXT, verify
from homespun.rng import derive_seed, unit_interval
from homespun.tensors.codec import decode_tree
from homespun.types import FloatArray, Hash

if TYPE_CHECKING:  # they load ONNX Runtime
    from homespun.plan.suggest import Suggester, Suggestion

POINTER_FILE = "slots.json"
PLAN_FILE = "plan.zip"
CHECKPOINT_FILE = "checkpoint.safetensors"
HEADER_BYTES = 1 << 20
"""Room for the names in a checkpoint file, beside its numbers."""

_UNFIT = (PlanError, ShapeMismatch, NumericFailure, TooLarge)
"""A model that fails like this will never be served here; anything else may go better next time."""

Fetch = Callable[[Hash, Path, int], bool]
"""Download a blob into a file of at most so many bytes; False: it was stopped."""


class Slots(msgspec.Struct, frozen=True, kw_only=True):
    """slots.json. `sequence`: the highest seen, so that an older release can never be replayed;
    `failed`: sequences that cannot be served here, with the reason.
    """

    sequence: int = 0
    active: ReleaseManifest | None = None
    candidate: ReleaseManifest | None = None
    previous: ReleaseManifest | None = None
    failed: dict[int, str] = {}


class Models:
    """The served models below `root`, one per slot of the population."""

    def __init__(
        self, root: Path, population: str, publisher_keys: tuple[str, ...], salt: str
    ) -> None:
        self._root, self._population, self._salt = root, population, salt
        self._keys = tuple(base64.b64decode(key) for key in publisher_keys)
        self._loaded: tuple[Path, Suggester] | None = None

    def served(self) -> dict[str, Slots]:
        """Every slot that holds something, by name."""
        return {path.parent.name: self._slots(path.parent.name) for path in self._pointers()}

    def sequence(self, slot: str) -> int:
        """The highest release sequence seen; only a higher one is of interest."""
        return self._slots(slot).sequence

    def install(self, slot: str, signed: SignedRelease, fetch: Fetch) -> bool:
        """Serve a release from now on; False if it is not for this device, or `fetch` was stopped.

        Raises `NotAuthentic` for a release that our publishers did not sign or that is older than one
        seen, `PlanError`, `ShapeMismatch` or `NumericFailure` for a model that cannot be served, and what
        `fetch` raises. What was served stays in place.
        """
        manifest = self._verified(slot, signed)
        slots = self._slots(slot)
        if manifest.sequence <= slots.sequence:
            raise NotAuthentic(
                f"release {manifest.sequence} of {slot} is not newer than one already seen",
                hint="somebody replays old releases; nothing was changed",
                expected=f"> {slots.sequence}",
                got=manifest.sequence,
            )
        seen = msgspec.structs.replace(slots, sequence=manifest.sequence, candidate=None)
        if not unit_interval(manifest.stage_salt, self._salt) < manifest.fraction:
            self._write(slot, seen)
            return False
        self._write(slot, msgspec.structs.replace(slots, candidate=manifest))
        after = slots  # as if nothing had happened: the same release may come again
        try:
            if not self._fetch_candidate(slot, manifest, fetch):
                return False
            after = msgspec.structs.replace(seen, active=manifest, previous=slots.active)
            return True
        except _UNFIT as error:
            failed = {**slots.failed, manifest.sequence: error.message}
            after = msgspec.structs.replace(seen, failed=failed)
            raise
        finally:
            self._write(slot, after)
            self.remove_unserved()

    def predict(
        self, text: str, k: int = 3, slot: str | None = None, prefix: str = ""
    ) -> list[Suggestion]:
        """The `k` likeliest next words after `text`, offline. Raises `NotFound` while nothing is served."""
        slot = slot or self._only_slot()
        while (active := self._slots(slot).active) is not None:
            try:
                return self._suggester(slot, active).suggest(text, k, prefix)
            except InvalidInput:
                raise  # what was asked is wrong, not the model
            except HomespunError as error:
                self._loaded = None
                if self._slots(slot).previous is None:
                    raise
                self._roll_back(slot, active, error.message)
        raise _nothing_served(slot)

    def unserved(self) -> list[Path]:
        """Whatever lies here and is neither ACTIVE nor PREVIOUS: what a crash left, or was superseded."""
        found: list[Path] = []
        for directory in self._root.glob("*/"):
            slots = self._slots(directory.name)
            kept = {str(m.sequence) for m in (slots.active, slots.previous) if m is not None}
            found += [
                path for path in directory.iterdir() if path.name not in {*kept, POINTER_FILE}
            ]
        return found

    def remove_unserved(self) -> None:
        for path in self.unserved():
            remove(path)

    def _verified(self, slot: str, signed: SignedRelease) -> ReleaseManifest:
        try:
            signed_bytes = base64.b64decode(signed.manifest, validate=True)
        except ValueError as error:
            raise BadFrame("the release's manifest is not base64") from error
        for key in self._keys:
            try:
                verify(key, signed.signature, RELEASE_CONTEXT + signed_bytes)
                break
            except NotAuthentic:
                continue
        else:
            raise NotAuthentic(
                f"the release of {slot} is not signed by a publisher of this device",
                hint="nothing was changed; enrol again if the publisher's key has changed",
            )
        manifest: ReleaseManifest = messages.decode(signed_bytes, ReleaseManifest)
        if (manifest.population, manifest.slot) != (self._population, slot):
            raise NotAuthentic(
                "the release is for another population or slot",
                hint="nothing was changed",
                expected=f"{self._population}/{slot}",
                got=f"{manifest.population}/{manifest.slot}",
            )
        return manifest

    def _fetch_candidate(self, slot: str, manifest: ReleaseManifest, fetch: Fetch) -> bool:
        directory = self._directory(slot, manifest)
        if not fetch(manifest.plan_hash, directory / PLAN_FILE, MAX_PLAN_BYTES):
            return False
        plan = Plan.read(directory / PLAN_FILE)
        plan.verify(self._keys)
        largest = 4 * plan.manifest.num_parameters + HEADER_BYTES
        if not fetch(manifest.checkpoint, directory / CHECKPOINT_FILE, largest):
            return False
        try_model(directory)
        with storage(directory):
            for path in (directory / PLAN_FILE, directory / CHECKPOINT_FILE):
                sync_file(path)
            sync_directory(directory)
            sync_directory(directory.parent)
        return True

    def _roll_back(self, slot: str, failed: ReleaseManifest, reason: str) -> None:
        slots = self._slots(slot)
        self._write(
            slot,
            msgspec.structs.replace(
                slots,
                active=slots.previous,
                previous=None,
                failed={**slots.failed, failed.sequence: reason},
            ),
        )

    def _suggester(self, slot: str, manifest: ReleaseManifest) -> Suggester:
        from homespun.plan.suggest import Suggester

        directory = self._directory(slot, manifest)
        if self._loaded is None or self._loaded[0] != directory:
            plan = Plan.read(directory / PLAN_FILE)
            if not any(isinstance(feature, TextFeature) for feature in plan.manifest.features):
                raise InvalidInput(f"the model in {slot} does not read text")
            self._loaded = (directory, Suggester(plan, _checkpoint(directory)))
        return self._loaded[1]

    def _directory(self, slot: str, manifest: ReleaseManifest) -> Path:
        return self._root / slot / str(manifest.sequence)

    def _pointers(self) -> list[Path]:
        return sorted(self._root.glob(f"*/{POINTER_FILE}"))

    def _only_slot(self) -> str:
        names = [path.parent.name for path in self._pointers()]
        if len(names) > 1:
            raise NotFound(
                f"several models are served: {', '.join(names)}", hint="name one with --slot"
            )
        if not names:
            raise _nothing_served("any slot")
        return names[0]

    def _slots(self, slot: str) -> Slots:
        pointer = self._root / slot / POINTER_FILE
        if not pointer.exists():
            return Slots()
        with storage(pointer):
            data = pointer.read_bytes()
        try:
            return msgspec.json.decode(data, type=Slots)
        except msgspec.MsgspecError as error:
            raise StorageFailure(
                f"{pointer} is damaged: {error}",
                hint=f"remove {pointer.parent}; it is fetched again",
            ) from error

    def _write(self, slot: str, slots: Slots) -> None:
        pointer = self._root / slot / POINTER_FILE
        write_atomically(pointer, msgspec.json.format(msgspec.json.encode(slots), indent=2))


def open_models(home: Home, settings: Settings) -> Models:
    """What an enrolled device serves."""
    salt = str(derive_seed(settings.seed, "stage"))
    return Models(home.models, settings.population, settings.publisher_keys, salt)


def _checkpoint(directory: Path) -> dict[str, FloatArray]:
    with storage(directory / CHECKPOINT_FILE):
        data = (directory / CHECKPOINT_FILE).read_bytes()
    return decode_tree(data)


def _nothing_served(slot: str) -> NotFound:
    return NotFound(
        f"no model is served in {slot} yet",
        hint="the device fetches a release when it checks in: homespun device run",
    )
