"""What the device serves: a release, and the one before it to fall back on.

    models/serving.db                     which release is ACTIVE, CANDIDATE, PREVIOUS, of every slot
    models/<slot>/<plan>-<checkpoint>/    plan.zip, checkpoint.safetensors

Only a signed release changes what is served. It is installed as CANDIDATE, loaded and tried, and becomes ACTIVE in
one durable transaction. Predicting needs no network. When the active model crashes its process, does not load, or gives
numbers that are not finite, the device goes back to PREVIOUS by itself and remembers why: whoever asked gets
that model's answer.

A release that is still being tried belongs to a share of the devices (`protocol.selection.arm`). The others serve what
is deployed. Files are kept by content, so another stage of a release, or going back to PREVIOUS, downloads nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING

from homespun.device.child import try_model
from homespun.device.home import (
    SERVING_FILE,
    TEMPORARY,
    Home,
    Settings,
    remove,
    storage,
    sync_directory,
    sync_file,
)
from homespun.device.serving import PROBATION, Record, Usage
from homespun.device.slots import Slots, content_of, name_of
from homespun.errors import (
    BadFrame,
    InvalidInput,
    NotAuthentic,
    NotFound,
    NumericFailure,
    PlanError,
    ShapeMismatch,
    TooLarge,
)
from homespun.plan.manifest import TextFeature
from homespun.plan.package import MAX_PLAN_BYTES, Plan
from homespun.protocol import messages
from homespun.protocol.messages import ReleaseManifest, SignedRelease
from homespun.protocol.selection import STAGE, arm
from homespun.protocol.signing import RELEASE_CONTEXT, verify
from homespun.rng import derive_seed
from homespun.tensors.codec import decode_tree
from homespun.types import FloatArray, Hash

if TYPE_CHECKING:  # they load ONNX Runtime
    from homespun.plan.suggest import Suggester, Suggestion

PLAN_FILE = "plan.zip"
CHECKPOINT_FILE = "checkpoint.safetensors"
HEADER_BYTES = 1 << 20
"""Room for the names in a checkpoint file, beside its numbers."""
CRASHED = "a prediction ended the process that asked for it"

_UNFIT = (PlanError, ShapeMismatch, NumericFailure, TooLarge)
"""A model that fails like this will never be served here; anything else may go better next time."""

Fetch = Callable[[Hash, Path, int], bool]
"""Download a blob into a file of at most so many bytes; False: it was stopped."""
Trial = Callable[[Path], bool]
"""Load the plan and the checkpoint in a directory and predict once; False: it was stopped."""


class Models:
    """The served models below `root`, one per slot of the population. Threads may share it; a process has its own."""

    def __init__(
        self, root: Path, population: str, publisher_keys: tuple[str, ...], salt: str
    ) -> None:
        self._root, self._population, self.salt = root, population, salt
        self._keys = tuple(base64.b64decode(key) for key in publisher_keys)
        self._record = Record(root / SERVING_FILE)
        self._loaded: tuple[Path, Suggester] | None = None
        self._lock = Lock()

    def close(self) -> None:
        """Write down what was counted."""
        self._record.close()

    def served(self) -> dict[str, Slots]:
        """Every slot that holds something, by name."""
        return self._record.all()

    def slots(self, slot: str) -> Slots:
        return self._record.slots(slot)

    def usage(self, slot: str, manifest: ReleaseManifest) -> Usage:
        """How a release has done on this device. Other processes may still have predictions to add."""
        return self._record.usage(slot, name_of(manifest))

    def sequence(self, slot: str) -> int:
        """The highest release sequence seen; only a higher one is of interest."""
        return self._record.slots(slot).sequence

    # --- installing ---------------------------------------------------------------------------------------

    def install(
        self,
        slot: str,
        signed: SignedRelease,
        fetch: Fetch,
        deployed: Callable[[], SignedRelease | None] = lambda: None,
        trial: Trial = try_model,
    ) -> bool:
        """Serve the newest release of the slot from now on, if it is for this device; else what `deployed` gives, the
        newest release that is for every device. False if it is not for this device, or `fetch` or `trial` was stopped.

        Raises `NotAuthentic` for a release that our publishers did not sign or that is older than one
        seen, `PlanError`, `ShapeMismatch` or `NumericFailure` for a model that cannot be served, and what
        `fetch`, `deployed` and `trial` raise. What was served stays in place.
        """
        newest, slots = self._verified(slot, signed), self._record.slots(slot)
        if newest.sequence <= slots.sequence:
            raise _replayed(slot, newest, f"> {slots.sequence}")
        wanted: ReleaseManifest | None = newest
        if arm(newest, self.salt) != STAGE or slots.has_failed(newest):
            wanted = self._deployed(slot, deployed(), slots)
        try:
            if wanted is not None and not self._bring(slot, wanted, fetch, trial):
                return False  # as if nothing had happened: the same release may come again
            self._record.change(slot, lambda s: s.arrived(newest, wanted))
        except _UNFIT as error:
            if wanted is not None:
                reason, unfit = error.message, wanted
                self._record.change(slot, lambda s: s.seen(newest).failing(unfit, reason))
            raise
        finally:
            if self._record.slots(slot).candidate is not None:
                self._record.change(slot, lambda s: s.trying(None))
            self.remove_unserved()
        return wanted is newest

    def _deployed(
        self, slot: str, signed: SignedRelease | None, slots: Slots
    ) -> ReleaseManifest | None:
        if signed is None:
            return None
        manifest = self._verified(slot, signed)
        if manifest.fraction < 1 or manifest.sequence < slots.deployed:
            raise _replayed(slot, manifest, f">= {slots.deployed}, for every device")
        return None if slots.has_failed(manifest) else manifest

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

    def _bring(self, slot: str, manifest: ReleaseManifest, fetch: Fetch, trial: Trial) -> bool:
        """Have the release's files here, loaded once and tried; False if that was stopped."""
        if content_of(manifest) in self._record.slots(slot).kept:
            return True
        self._record.change(slot, lambda s: s.trying(manifest))
        directory = self._directory(slot, manifest)
        if not fetch(manifest.plan_hash, directory / PLAN_FILE, MAX_PLAN_BYTES):
            return False
        plan = Plan.read(directory / PLAN_FILE)
        plan.verify(self._keys)
        largest = 4 * plan.manifest.num_parameters + HEADER_BYTES
        if not fetch(manifest.checkpoint, directory / CHECKPOINT_FILE, largest):
            return False
        if not trial(directory):
            return False
        with storage(directory):
            for path in (directory / PLAN_FILE, directory / CHECKPOINT_FILE):
                sync_file(path)
            sync_directory(directory)
            sync_directory(directory.parent)
        return True

    # --- predicting ---------------------------------------------------------------------------------------

    def predict(
        self, text: str, k: int = 3, slot: str | None = None, prefix: str = ""
    ) -> list[Suggestion]:
        """The `k` likeliest next words after `text`, offline. Raises `NotFound` while nothing is served."""
        with self._lock:
            while True:
                slot, active = self._active(slot)
                release = name_of(active)
                note = self._record.begin(slot, release)
                if note is not None and self._record.crashed(slot, release):
                    self._record.fail(slot, active, CRASHED, crashed=True)
                    continue
                try:
                    suggester = self._suggester(slot, active)
                    began = perf_counter()
                    found = suggester.suggest(text, k, prefix)
                    seconds = perf_counter() - began
                except InvalidInput:  # what was asked is wrong, not the model
                    self._record.strike(note)
                    raise
                except Exception as error:
                    self._loaded = None
                    if self.withdraw(slot, active, error).active == active:
                        raise
                except BaseException:  # not the model's end, but the app's
                    self._record.strike(note)
                    raise
                else:
                    self._record.finish(note, slot, release, seconds)
                    return found

    def withdraw(self, slot: str, manifest: ReleaseManifest, error: Exception) -> Slots:
        """A release that is served has failed here: PREVIOUS is served again, if there is one."""
        reason = getattr(error, "message", None) or f"{type(error).__name__}"
        return self._record.fail(slot, manifest, reason)

    def load(self, slot: str, manifest: ReleaseManifest) -> tuple[Plan, dict[str, FloatArray]]:
        """Plan and checkpoint of a release that is served. Raises `StorageFailure` and its kinds."""
        directory = self._directory(slot, manifest)
        return Plan.read(directory / PLAN_FILE), _checkpoint(directory)

    def _suggester(self, slot: str, manifest: ReleaseManifest) -> Suggester:
        from homespun.plan.suggest import Suggester

        directory = self._directory(slot, manifest)
        if self._loaded is None or self._loaded[0] != directory:
            plan, checkpoint = self.load(slot, manifest)
            if not any(isinstance(feature, TextFeature) for feature in plan.manifest.features):
                raise InvalidInput(f"the model in {slot} does not read text")
            self._loaded = (directory, Suggester(plan, checkpoint))
        return self._loaded[1]

    # --- keeping order ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """What crashed its process is withdrawn; what nothing will go back to any more is removed."""
        for slot, slots in self.served().items():
            active = slots.active
            if active is not None and self._record.crashed(slot, name_of(active)):
                self._record.fail(slot, active, CRASHED, crashed=True)
            elif (
                active is not None
                and slots.previous is not None
                and active.fraction >= 1
                and self.usage(slot, active).num_predictions >= PROBATION
            ):
                self._record.change(slot, methodcaller("settled", active))
        self.remove_unserved()

    def unserved(self) -> list[Path]:
        """Whatever lies here and is not served: what a crash left, or was superseded."""
        served = self.served()
        half = self._root / (SERVING_FILE + TEMPORARY)
        found = [half] if half.exists() else []
        for directory in self._root.glob("*/"):
            kept = served.get(directory.name, Slots()).kept
            found += [path for path in directory.iterdir() if path.name not in kept]
        return found

    def remove_unserved(self) -> None:
        for path in self.unserved():
            remove(path)

    def _directory(self, slot: str, manifest: ReleaseManifest) -> Path:
        return self._root / slot / content_of(manifest)

    def _active(self, slot: str | None) -> tuple[str, ReleaseManifest]:
        """The release that the slot serves; without a name, the only slot that serves one."""
        held = self.served() if slot is None else {slot: self._record.slots(slot)}
        found = [(name, slots.active) for name, slots in held.items() if slots.active is not None]
        if len(found) > 1:
            raise NotFound(
                f"several models are served: {', '.join(name for name, _ in found)}",
                hint="name one with --slot",
            )
        if not found:
            raise NotFound(
                f"no model is served in {slot or 'any slot'} yet",
                hint="the device fetches a release when it checks in: homespun device run",
            )
        return found[0]


def open_models(home: Home, settings: Settings) -> Models:
    """What an enrolled device serves."""
    salt = str(derive_seed(settings.seed, "stage"))
    return Models(home.models, settings.population, settings.publisher_keys, salt)


def _checkpoint(directory: Path) -> dict[str, FloatArray]:
    with storage(directory / CHECKPOINT_FILE):
        data = (directory / CHECKPOINT_FILE).read_bytes()
    return decode_tree(data)


def _replayed(slot: str, manifest: ReleaseManifest, expected: str) -> NotAuthentic:
    return NotAuthentic(
        f"release {manifest.sequence} of {slot} is older than one already seen",
        hint="somebody replays old releases; nothing was changed",
        expected=expected,
        got=manifest.sequence,
    )
