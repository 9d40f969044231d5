"""Groups of secure aggregation for tests: real devices and a real server in one process, nothing random.

Every message passes through its JSON and every device's state through its bytes, so whatever a test shows
holds for phones that are killed between all steps.

Run as a script (`python -m tests.vectors.secagg`), it writes the recorded sessions `secagg_*.json` that other
implementations replay; `test_secagg_vectors.py` holds this one to them, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homespun.rng import stream
from homespun.secagg import device
from homespun.secagg.device import Demands, Work
from homespun.secagg.graph import Adversary
from homespun.secagg.messages import (
    AdvertiseKeys,
    Agree,
    AgreeRequest,
    MaskedInput,
    MaskInputRequest,
    Message,
    ShareKeys,
    ShareKeysRequest,
    Terms,
    Unmask,
    UnmaskRequest,
)
from homespun.secagg.server import Group
from homespun.tensors.packing import word

FOLDER = Path(__file__).parent
STEPS = ("share_keys", "mask_input", "agree", "unmask")
REQUESTS = {
    "advertise_keys": Terms,
    "share_keys": ShareKeysRequest,
    "mask_input": MaskInputRequest,
    "agree": AgreeRequest,
    "unmask": UnmaskRequest,
}
ANSWERS = {
    "advertise_keys": AdvertiseKeys,
    "share_keys": ShareKeys,
    "mask_input": MaskedInput,
    "agree": Agree,
    "unmask": Unmask,
}


def over_the_wire(message: Any) -> Any:
    """The same message after its JSON."""
    return msgspec.json.decode(msgspec.json.encode(message), type=type(message))


def make_terms(**changes: Any) -> Terms:
    values: dict[str, Any] = {
        "task": "keyboard",
        "round_number": 7,
        "attempt": 1,
        "checkpoint_hash": "c" * 64,
        "plan_hash": "a" * 64,
        "bits": 16,
        "dimension": 5,
        "num_aux": 2,
        "schema": "test",
        "clip": 8.0,
        "n_min": 3,
        "n_max": 1000,
    }
    return Terms(**(values | changes))


def make_work(terms: Terms) -> Work:
    return Work(
        task=terms.task,
        round_number=terms.round_number,
        attempt=terms.attempt,
        plan_hash=terms.plan_hash,
        ancestry=(terms.checkpoint_hash,),
        bits=terms.bits,
        dimension=terms.dimension,
        num_aux=terms.num_aux,
        schema=terms.schema,
        clip=terms.clip,
        n_max=terms.n_max,
    )


class Entropy:
    """SHA-256 in counter mode: as good as random here, and the same every time. Remembers what it gave."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counter = 0
        self.drawn = b""

    def __call__(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += hashlib.sha256(f"{self.name}/{self.counter}".encode()).digest()
            self.counter += 1
        self.drawn += data[:size]
        return data[:size]


TRUSTING = Demands(3, corrupt_fraction=0.0, adversary=Adversary.SEMI_HONEST)
"""So that tests can have graphs with few neighbours."""


@dataclass
class SimulatedDevice:
    """One device; `state` is bytes, as a phone would keep it."""

    name: str
    terms: Terms
    demands: Demands = TRUSTING
    state: bytes = b""
    draws: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.entropy = Entropy(self.name)
        self.identity_secret = self.entropy(32)
        self.signer = Ed25519PrivateKey.from_private_bytes(self.identity_secret)
        self.identity = self.signer.public_key().public_bytes_raw()
        rng = stream(0, "secagg", self.name)
        dtype = word(self.terms.bits)
        self.main = rng.integers(0, 2**self.terms.bits, self.terms.dimension, dtype)
        self.aux = rng.integers(0, 2**64, self.terms.num_aux, "<u8")

    def _do(self, step: str, function: Callable[..., tuple[Any, Any]], *args: Any) -> Any:
        self.entropy.drawn = b""
        if step == "advertise_keys":
            state, answer = function(*args)
        else:
            state, answer = function(device.load(self.state), *args)
        self.state = device.save(state)
        self.draws[step] = self.entropy.drawn.hex()
        return over_the_wire(answer)

    def advertise_keys(self, terms: Terms) -> Any:
        args = (terms, make_work(self.terms), self.demands, self.identity, self.signer)
        return self._do("advertise_keys", device.advertise_keys, *args, self.entropy)

    def share_keys(self, request: ShareKeysRequest) -> Any:
        return self._do("share_keys", device.share_keys, request, self.entropy)

    def mask_input(self, request: MaskInputRequest) -> Any:
        args = (request, self.main, self.aux, self.signer)
        return self._do("mask_input", device.mask_input, *args)

    def agree(self, request: AgreeRequest) -> Any:
        return self._do("agree", device.agree, request, self.signer)

    def unmask(self, request: UnmaskRequest) -> Any:
        return self._do("unmask", device.unmask, request)


class World:
    """A group and its devices, after step 0: `devices` by roster index. The server restarts after each step."""

    def __init__(
        self,
        num_devices: int,
        name: str = "world",
        on_message: Callable[[str, str, int, Message], None] = lambda *_: None,
        **terms: Any,
    ) -> None:
        self.terms = make_terms(**terms)
        self.group = Group(self.terms)
        self.on_message = on_message
        devices = [SimulatedDevice(f"{name}/{i}", self.terms) for i in range(num_devices)]
        for one in devices:
            self.group.advertise_keys(one.advertise_keys(self.terms))
        self.group.close_advertise_keys()
        self.devices = {self.group.index_of(one.identity): one for one in devices}
        for index in range(num_devices):
            on_message("server", "advertise_keys", index, self.terms)
            on_message("device", "advertise_keys", index, self.group.state.roster[index])

    def request(self, step: str, index: int) -> Any:
        made = {
            "share_keys": lambda: self.group.share_keys_request(index),
            "mask_input": lambda: self.group.mask_input_request(index),
            "agree": self.group.agree_request,
            "unmask": lambda: self.group.unmask_request(index),
        }[step]()
        return over_the_wire(made)

    def answer(self, step: str, index: int) -> Any:
        """One device's answer to a step, which the server has not seen yet."""
        request = self.request(step, index)
        answer = getattr(self.devices[index], step)(request)
        self.on_message("server", step, index, request)
        self.on_message("device", step, index, answer)
        return answer

    def run_step(self, step: str, indices: Iterable[int]) -> None:
        """These devices do a step, in this order; then the server closes it."""
        for index in indices:
            getattr(self.group, step)(index, self.answer(step, index))
        if step != "unmask":
            getattr(self.group, f"close_{step}")()
        self.group = Group.load(self.group.save(), self.group.main, self.group.aux)

    def up_to(self, step: str) -> World:
        """All devices have done all steps before `step`."""
        for earlier in STEPS[: STEPS.index(step)]:
            self.run_step(earlier, self.devices)
        return self

    def run(self, gone: Mapping[int, str], seed: int = 0) -> list[int]:
        """All steps; `gone`: the step from which a device is silent. Arrivals in an order of the seed.

        Gives U3, whose sum `open_sum` opens.
        """
        for number, step in enumerate(STEPS):
            before = STEPS[: number + 1]
            there = [index for index in self.devices if gone.get(index) not in before]
            self.run_step(step, stream(seed, step).permutation(there).tolist())
        return sorted(self.group.state.masked)

    def plain_sum(self, indices: Iterable[int]) -> tuple[list[int], list[int]]:
        """What the sum must be, in Python's own integers."""
        chosen = [self.devices[index] for index in indices]
        modulus = 2**self.terms.bits
        return (
            [sum(int(d.main[j]) for d in chosen) % modulus for j in range(self.terms.dimension)],
            [sum(int(d.aux[j]) for d in chosen) % 2**64 for j in range(self.terms.num_aux)],
        )


# --- recorded sessions --------------------------------------------------------------------------------


SESSIONS: dict[str, tuple[int, dict[int, str], dict[str, Any]]] = {
    # name: number of devices, who is silent from which step on, terms
    "all_stay": (3, {}, {"bits": 16}),
    "one_lost_before_masking": (4, {1: "mask_input"}, {"bits": 12, "dimension": 9}),
    "lost_at_different_steps": (7, {0: "mask_input", 4: "unmask"}, {"bits": 32}),
    "lost_before_sharing": (7, {2: "share_keys", 3: "mask_input"}, {"bits": 16}),
    "no_main_vector": (5, {4: "mask_input"}, {"dimension": 0, "num_aux": 9}),
}


def record(name: str) -> str:
    """One session as JSON: secrets, every message in order, and the sum."""
    num_devices, gone, terms = SESSIONS[name]
    messages: list[dict[str, Any]] = []

    def keep(sender: str, step: str, index: int, message: Message) -> None:
        content = msgspec.to_builtins(message)
        messages.append({"from": sender, "step": step, "device": index, "message": content})

    world = World(num_devices, name, keep, **terms)
    survivors = world.run(gone)
    main, aux = world.group.open_sum()
    document = {
        "origin": "written by tests/vectors/secagg.py; bytes are base64 in messages, hexadecimal elsewhere",
        "devices": [
            {
                "index": index,
                "identity_secret": one.identity_secret.hex(),
                "entropy": {step: drawn for step, drawn in one.draws.items() if drawn},
                "main": one.main.tolist(),
                "aux": [str(value) for value in one.aux.tolist()],
            }
            for index, one in sorted(world.devices.items())
        ],
        "messages": messages,
        "transcript": world.group.transcript.hex(),
        "survivors": survivors,
        "sum": {"main": main.tolist(), "aux": [str(value) for value in aux.tolist()]},
    }
    return json.dumps(document, indent=1) + "\n"


def message_of(entry: Mapping[str, Any]) -> Any:
    """The message of an entry of a recorded session."""
    kinds = REQUESTS if entry["from"] == "server" else ANSWERS
    return msgspec.convert(entry["message"], kinds[entry["step"]])


def write() -> Sequence[Path]:
    paths = []
    for name in SESSIONS:
        path = FOLDER / f"secagg_{name}.json"
        path.write_text(record(name), encoding="utf-8")
        paths.append(path)
    return paths


if __name__ == "__main__":
    for path in write():
        print(path.name, path.stat().st_size)
