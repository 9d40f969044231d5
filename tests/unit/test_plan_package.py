"""Plans that are not what they should be are refused with the reason; a plan has one form of bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homespun import zoo
from homespun.errors import HomespunError, PlanError, TooLarge, UnsupportedPlan, UntrustedPlan
from homespun.plan import package
from homespun.plan.package import Plan

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLISHER = KEY.public_key().public_bytes_raw()
UNSIGNED = zoo.load("keyboard").with_assets({"vocabulary": b"words"})
SIGNED = UNSIGNED.sign(KEY)


def zipped(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def entries(plan: Plan = SIGNED, **replaced: bytes) -> list[tuple[str, bytes]]:
    files = plan.files()
    names = {name.replace(".", "_"): name for name in files}
    return list((files | {names[key]: data for key, data in replaced.items()}).items())


def test_round_trip_through_bytes_and_directory(tmp_path):
    data = SIGNED.to_bytes()
    assert Plan.read(data) == SIGNED
    assert Plan.read(data).to_bytes() == data
    assert SIGNED.hash == hashlib.sha256(data).hexdigest()
    SIGNED.write(tmp_path / "plan")
    (tmp_path / "plan.zip").write_bytes(data)
    assert Plan.read(tmp_path / "plan").hash == Plan.read(tmp_path / "plan.zip").hash == SIGNED.hash


def test_a_signature_by_a_trusted_publisher_verifies():
    Plan.read(SIGNED.to_bytes()).verify([PUBLISHER])
    SIGNED.check_publishable()


def test_unsigned_foreign_and_altered_plans_are_untrusted():
    with pytest.raises(UntrustedPlan, match="not signed"):
        UNSIGNED.verify([PUBLISHER])
    with pytest.raises(UntrustedPlan, match="not trusted"):
        SIGNED.verify([bytes(32)])
    altered = msgspec.structs.replace(SIGNED.manifest, clip_norm=1e6)
    forged = Plan.read(dataclasses.replace(SIGNED, manifest=altered).to_bytes())
    with pytest.raises(UntrustedPlan, match="does not fit"):
        forged.verify([PUBLISHER])
    with pytest.raises(UntrustedPlan):
        dataclasses.replace(SIGNED, publisher=bytes(32)).verify([bytes(32)])


def test_changes_drop_the_signature():
    for plan in (SIGNED.with_settings(learning_rate=0.5), SIGNED.with_assets({"vocabulary": b"x"})):
        assert plan.signature is None
        assert plan.hash != SIGNED.hash
        with pytest.raises(UntrustedPlan):
            plan.check_publishable()


def test_a_plan_without_its_assets_is_not_publishable():
    bare = zoo.load("keyboard").sign(KEY)
    assert bare.missing_assets == ("vocabulary",)
    with pytest.raises(PlanError, match="lacks"):
        bare.check_publishable()


@pytest.mark.parametrize("file", ["train.onnx", "assets/vocabulary"])
def test_a_changed_file_does_not_fit_the_manifest(file):
    with pytest.raises(PlanError, match="not the one that the manifest names"):
        Plan.read(zipped(list((dict(entries()) | {file: b"other"}).items())))


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        "assets/../../x",
        "assets/a/b",
        "assets/",
        "train.onnx.bak",
        "a\\b",
        "x\n",
    ],
)
def test_names_that_no_plan_has(name):
    with pytest.raises(PlanError, match="which no plan has"):
        Plan.read(zipped([*entries(), (name, b"data")]))


def test_zip_tricks():
    with pytest.raises(PlanError, match="compressed"):
        Plan.read(zipped(entries(), zipfile.ZIP_DEFLATED))
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = zipped([*entries(), ("train.onnx", b"second")])
    with pytest.raises(PlanError, match="repeats a name"):
        Plan.read(twice)
    with pytest.raises(PlanError, match="canonical"):
        Plan.read(b"hidden" + SIGNED.to_bytes())
    with pytest.raises(PlanError, match="canonical"):
        Plan.read(zipped(list(reversed(entries()))))
    with pytest.raises(PlanError, match="files"):
        Plan.read(zipped([(f"assets/{i}", b"") for i in range(package.MAX_FILES + 1)]))


def test_sizes_are_capped(monkeypatch, tmp_path):
    SIGNED.write(tmp_path)
    monkeypatch.setattr(package, "MAX_FILE_BYTES", 1000)
    for source in (SIGNED.to_bytes(), tmp_path):
        with pytest.raises(TooLarge):
            Plan.read(source)
    monkeypatch.setattr(package, "MAX_PLAN_BYTES", 1000)
    with pytest.raises(TooLarge):
        Plan.read(SIGNED.to_bytes())


def test_every_cut_and_every_flipped_byte_is_refused():
    data = SIGNED.to_bytes()
    for length in range(0, len(data), 1009):
        with pytest.raises(HomespunError):
            Plan.read(data[:length])
    for position in range(0, len(data), 509):
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        with pytest.raises(HomespunError):
            Plan.read(bytes(damaged)).verify([PUBLISHER])


def test_missing_and_unknown_parts():
    with pytest.raises(PlanError, match="no manifest"):
        Plan.read(zipped([]))
    with pytest.raises(PlanError, match="graphs are"):
        Plan.read(zipped([e for e in entries() if e[0] != "train.onnx"]))
    with pytest.raises(PlanError, match="96"):
        Plan.read(zipped(entries(manifest_sig=b"short")))
    with pytest.raises(PlanError, match="canonical"):
        Plan.read(zipped(entries(manifest_json=SIGNED.manifest.to_bytes() + b" ")))
    other = SIGNED.manifest.to_bytes().replace(b'"format":1', b'"format":7')
    with pytest.raises(UnsupportedPlan, match="format 7"):
        Plan.read(zipped(entries(manifest_json=other)))


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.read(tmp_path / "nothing.zip")
