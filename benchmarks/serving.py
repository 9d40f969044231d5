"""What the record of what is served adds to a prediction: on probation, off it, and the bare model.

Every prediction is timed alone, in one process that nobody disturbs. `overhead` is with a model that does nothing.
"""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.harness import parse_options, report, rows
from homespun import zoo
from homespun.corpora.vocabulary import Vocabulary
from homespun.device.models import Models
from homespun.device.serving import PROBATION
from homespun.plan.initial import initial_checkpoint
from homespun.plan.suggest import Suggester, Suggestion
from homespun.protocol import messages
from homespun.protocol.messages import ReleaseManifest, SignedRelease
from homespun.protocol.signing import RELEASE_CONTEXT
from homespun.tensors.codec import digest, encode_tree

TEXT = "thank you for the"
KEY = Ed25519PrivateKey.generate()
WORDS = Vocabulary.build(["thank you for the cat and the hat"], 4000)
PLAN = zoo.load("keyboard").with_assets({"vocabulary": WORDS.to_bytes()}).sign(KEY)


def serving(root: Path, num_predictions: int) -> Models:
    """A slot that serves the keyboard model after so many predictions."""
    key = base64.b64encode(KEY.public_key().public_bytes_raw()).decode()
    models = Models(root, "bench", (key,), "salt")
    packed = PLAN.to_bytes()
    checkpoint = encode_tree(initial_checkpoint(PLAN.manifest, 0))
    blobs = {digest(data): data for data in (packed, checkpoint)}
    manifest = messages.encode(
        ReleaseManifest(
            population="bench",
            slot="default",
            sequence=1,
            release_id="a",
            version="1",
            plan_hash=digest(packed),
            checkpoint=digest(checkpoint),
            issued_at=0.0,
        )
    )
    signature = KEY.sign(RELEASE_CONTEXT + manifest)

    def fetch(address: str, path: Path, max_bytes: int) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blobs[address])
        return True

    signed = SignedRelease(
        manifest=base64.b64encode(manifest).decode(), signature=base64.b64encode(signature).decode()
    )
    models.install("default", signed, fetch)
    for _ in range(num_predictions):
        models.predict(TEXT)
    return models


def microseconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Of each of so many calls."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began) * 1e6)
    return found


def nothing(self: Suggester, *arguments: object) -> list[Suggestion]:
    """A model that costs nothing."""
    return []


def main() -> None:
    options = parse_options(__doc__)
    many = 500 if options.quick else 5000
    few = PROBATION - 2
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        young, old = serving(root / "young", 1), serving(root / "old", PROBATION)
        bare = Suggester(PLAN, initial_checkpoint(PLAN.manifest, 0))
        whole = {
            "the model alone": microseconds(lambda: bare.suggest(TEXT), many),
            "off probation": microseconds(lambda: old.predict(TEXT), many),
            "on probation": microseconds(lambda: young.predict(TEXT), few),
        }
        suggest, Suggester.suggest = Suggester.suggest, nothing  # type: ignore[method-assign, assignment]
        other = serving(root / "other", 1)
        added = {
            "on probation": microseconds(lambda: other.predict(TEXT), few),
            "off probation": microseconds(lambda: old.predict(TEXT), many),
        }
        Suggester.suggest = suggest  # type: ignore[method-assign]
    for case, timings in (("prediction", whole), ("overhead", added)):
        report(rows(case, timings, unit="us"), options)
        if not options.json:
            for side, values in timings.items():
                p99, worst = np.percentile(values, [99, 100])
                print(f"  {case}, {side}: 99 % within {p99:.0f} us, worst {worst:.0f} us")


if __name__ == "__main__":
    main()
