"""The plan file: a manifest, its graphs and its assets, as one signed, content-addressed piece of
data.

On disk it is a directory, on the wire a zip without compression and with fixed timestamps, so that
the same plan always has the same bytes and the same address (`Plan.hash`):

    manifest.json   manifest.sig   train.onnx   evaluate.onnx   predict.onnx   assets/<name>

Reading trusts nothing: names are allow-listed, counts and sizes capped, every file is compared with
the hash in the manifest, every operator is allowed or refused. Whether the publisher is trusted is
asked separately (`Plan.verify`), because the answer depends on who asks.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from homespun.errors import PlanError, TooLarge, UntrustedPlan
from homespun.plan.manifest import GRAPHS, NAME, Manifest
from homespun.plan.operators import check_graph
from homespun.types import Hash

MAX_FILES = 32
MAX_FILE_BYTES = 16 * 2**20
MAX_PLAN_BYTES = 32 * 2**20

_CONTEXT = b"homespun plan 1\0"  # a signature for a plan is never one for something else
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold


@dataclass(frozen=True)
class Plan:
    """What a device executes. `publisher` is a raw Ed25519 public key, `signature` its 64 bytes."""

    manifest: Manifest
    graphs: Mapping[str, bytes]
    assets: Mapping[str, bytes] = field(default_factory=dict)
    publisher: bytes | None = None
    signature: bytes | None = None

    @classmethod
    def read(cls, source: bytes | Path) -> Plan:
        """A plan from the bytes of its zip, or from a path to a zip or a directory.

        Raises UnsupportedPlan (format, operators), TooLarge, or PlanError (anything else that is
        wrong).
        """
        if isinstance(source, bytes):
            return cls._from_files(_read_zip(source), source)
        try:
            if source.is_dir():
                return cls._from_files(_read_directory(source))
            if source.stat().st_size > MAX_PLAN_BYTES:
                raise _too_large(source.name, source.stat().st_size, MAX_PLAN_BYTES)
            data = source.read_bytes()
        except OSError as error:
            raise PlanError(
                f"the plan at {source} cannot be read: {error.strerror}",
                hint="check the path; it is a plan's directory or its .zip",
            ) from error
        return cls._from_files(_read_zip(data), data)

    @classmethod
    def _from_files(cls, files: dict[str, bytes], packed: bytes | None = None) -> Plan:
        if "manifest.json" not in files:
            raise PlanError(
                "the plan has no manifest.json", hint="this is not a plan, or it was cut short"
            )
        signed = files.get("manifest.sig")
        if signed is not None and len(signed) != 96:
            raise PlanError(
                f"manifest.sig has {len(signed)} bytes, expected 96 (public key, signature)",
                hint="sign the plan again",
            )
        plan = cls(
            manifest=Manifest.from_bytes(files["manifest.json"]),
            graphs={n[:-5]: data for n, data in files.items() if n.endswith(".onnx")},
            assets={n[7:]: data for n, data in files.items() if n.startswith("assets/")},
            publisher=signed[:32] if signed else None,
            signature=signed[32:] if signed else None,
        )
        if plan.manifest.to_bytes() != files["manifest.json"]:
            raise PlanError(
                "manifest.json is not in canonical form", hint="write it with Plan, not by hand"
            )
        plan._check_contents()
        if packed is not None and plan.to_bytes() != packed:
            raise PlanError(
                "the plan's zip is not in canonical form: something is hidden in it, or other "
                "software wrote it",
                hint="write it with Plan.to_bytes",
            )
        return plan

    def _check_contents(self) -> None:
        for kind, found, expected in (
            ("graph", self.graphs, self.manifest.graphs),
            ("asset", self.assets, self.manifest.assets),
        ):
            if set(found) != set(expected):
                raise PlanError(
                    f"the plan's {kind}s are {sorted(found)}, the manifest names {sorted(expected)}",
                    hint="the plan is incomplete; fetch or build it again",
                )
            for name, data in found.items():
                if _sha256(data) != expected[name]:
                    raise PlanError(
                        f"{kind} {name} is not the one that the manifest names "
                        f"(SHA-256 {_sha256(data)[:12]}..., expected {expected[name][:12]}...)",
                        hint="the plan was damaged or changed; fetch it again from its publisher",
                    )
        for name in GRAPHS:
            check_graph(name, self.graphs[name], self.manifest.runtime)

    def files(self) -> dict[str, bytes]:
        """Every file of the plan by its name, in the order in which they are packed."""
        files = {"manifest.json": self.manifest.to_bytes()}
        if self.publisher is not None and self.signature is not None:
            files["manifest.sig"] = self.publisher + self.signature
        files |= {f"{name}.onnx": self.graphs[name] for name in GRAPHS}
        files |= {f"assets/{name}": self.assets[name] for name in sorted(self.assets)}
        return files

    def to_bytes(self) -> bytes:
        """The plan's zip; the same plan gives the same bytes everywhere."""
        return self._packed

    @cached_property
    def _packed(self) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, data in self.files().items():
                info = zipfile.ZipInfo(name, _EPOCH)
                info.create_system = 3
                info.external_attr = 0o644 << 16
                archive.writestr(info, data)
        return buffer.getvalue()

    @cached_property
    def hash(self) -> Hash:
        """The plan's address: SHA-256 of `to_bytes()`."""
        return _sha256(self._packed)

    def write(self, directory: Path) -> None:
        """Write the plan as a directory, which is created."""
        for name, data in self.files().items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    @property
    def missing_assets(self) -> tuple[str, ...]:
        """Assets that must be added before the plan can be published."""
        return tuple(name for name in self.manifest.needed_assets if name not in self.assets)

    def check_publishable(self) -> None:
        """Raises PlanError while an asset is missing, UntrustedPlan while it is not signed."""
        if self.missing_assets:
            raise PlanError(
                f"plan {self.manifest.name} lacks {list(self.missing_assets)}",
                hint="add them with Plan.with_assets",
            )
        if self.publisher is None:
            raise UntrustedPlan(
                f"plan {self.manifest.name} is not signed", hint="sign it with Plan.sign"
            )
        self.verify([self.publisher])

    def with_assets(self, assets: Mapping[str, bytes]) -> Plan:
        """The plan with these assets added or replaced, unsigned."""
        for name, data in assets.items():
            if not NAME.fullmatch(name):
                raise PlanError(
                    f"asset name {name!r} is not a plain name", hint="letters, digits, _ . -"
                )
            if len(data) > MAX_FILE_BYTES:
                raise _too_large(f"asset {name}", len(data), MAX_FILE_BYTES)
        merged = {**self.assets, **assets}
        hashes = {name: _sha256(data) for name, data in merged.items()}
        manifest = msgspec.structs.replace(self.manifest, assets=hashes)
        return replace(self, manifest=manifest, assets=merged, publisher=None, signature=None)

    def with_settings(self, **changes: Any) -> Plan:
        """The plan with other settings (see Manifest.with_settings), unsigned."""
        manifest = self.manifest.with_settings(**changes)
        return replace(self, manifest=manifest, publisher=None, signature=None)

    def sign(self, key: Ed25519PrivateKey) -> Plan:
        """The plan signed by its publisher, over the manifest, which holds every file's hash."""
        return replace(
            self,
            publisher=key.public_key().public_bytes_raw(),
            signature=key.sign(_CONTEXT + self.manifest.to_bytes()),
        )

    def verify(self, trusted: Collection[bytes]) -> None:
        """Raises UntrustedPlan unless one of the `trusted` raw public keys signed the plan."""
        if self.publisher is None or self.signature is None:
            raise UntrustedPlan(
                f"plan {self.manifest.name} is not signed", hint="only signed plans run on devices"
            )
        if self.publisher not in trusted:
            raise UntrustedPlan(
                f"plan {self.manifest.name} is signed by {self.publisher.hex()[:16]}..., "
                "who is not trusted here",
                hint="add the publisher's key to the device's trusted publishers if you know it",
                publisher=self.publisher.hex(),
            )
        try:
            Ed25519PublicKey.from_public_bytes(self.publisher).verify(
                self.signature, _CONTEXT + self.manifest.to_bytes()
            )
        except (InvalidSignature, ValueError) as error:
            raise UntrustedPlan(
                f"the signature of plan {self.manifest.name} does not fit its manifest",
                hint="the plan was changed after signing; fetch it again from its publisher",
                publisher=self.publisher.hex(),
            ) from error


def _read_zip(data: bytes) -> dict[str, bytes]:
    if len(data) > MAX_PLAN_BYTES:
        raise _too_large("the plan", len(data), MAX_PLAN_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            _check_names([entry.filename for entry in entries])
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    raise PlanError(
                        f"{entry.filename} is compressed or encrypted",
                        hint="plans are stored as they are",
                    )
                if entry.file_size > MAX_FILE_BYTES or entry.file_size != entry.compress_size:
                    raise _too_large(entry.filename, entry.file_size, MAX_FILE_BYTES)
            return {entry.filename: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, OSError) as error:
        raise PlanError(
            f"the plan is not a readable zip: {error}",
            hint="it was cut short or damaged; fetch it again",
        ) from error


def _read_directory(root: Path) -> dict[str, bytes]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    _check_names([path.relative_to(root).as_posix() for path in paths])
    for path in paths:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _too_large(path.name, path.stat().st_size, MAX_FILE_BYTES)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def _check_names(names: list[str]) -> None:
    if len(names) > MAX_FILES or len(set(names)) != len(names):
        raise PlanError(
            f"the plan has {len(names)} files (at most {MAX_FILES}) or repeats a name",
            hint="this is not a plan",
        )
    plain = {"manifest.json", "manifest.sig", *(f"{graph}.onnx" for graph in GRAPHS)}
    for name in names:
        asset = name.startswith("assets/") and NAME.fullmatch(name[len("assets/") :])
        if name not in plain and not asset:
            raise PlanError(
                f"the plan contains a file named {name[:80]!r}, which no plan has",
                hint=f"a plan holds {sorted(plain)} and assets/<name>",
            )


def _too_large(what: str, size: int, limit: int) -> TooLarge:
    return TooLarge(
        f"{what} has {size} bytes, at most {limit} are allowed",
        hint="plans hold graphs and a vocabulary, no weights; use a smaller asset",
        expected=limit,
        got=size,
    )


def _sha256(data: bytes) -> Hash:
    return hashlib.sha256(data).hexdigest()
