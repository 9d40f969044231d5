"""The recorded sessions: this implementation makes them, byte for byte, and so must every other."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from homespun.secagg import device
from homespun.secagg.server import Group
from homespun.tensors.packing import word
from tests.vectors.secagg import FOLDER, SESSIONS, TRUSTING, make_work, message_of, record


def session(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / f"secagg_{name}.json").read_text())
    return document


@pytest.mark.parametrize("name", SESSIONS)
def test_the_recording_is_current(name):
    assert (FOLDER / f"secagg_{name}.json").read_text(encoding="utf-8") == record(name)


@pytest.mark.parametrize("name", SESSIONS)
def test_a_device_alone_replays_its_part(name):
    """What the file says is enough: secrets, entropy and requests give the answers."""
    document = session(name)
    entries = defaultdict(list)
    for entry in document["messages"]:
        entries[entry["device"]].append(entry)
    for one in document["devices"]:
        signer = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(one["identity_secret"]))
        identity = signer.public_key().public_bytes_raw()
        requests, answers = entries[one["index"]][::2], entries[one["index"]][1::2]
        terms = message_of(requests[0])
        main = np.array(one["main"], word(terms.bits))
        aux = np.array([int(value) for value in one["aux"]], "<u8")
        state: Any = None
        given: Any = None
        for request, answer in zip(requests, answers, strict=True):
            step, message = request["step"], message_of(request)
            entropy = Drawn(one["entropy"].get(step, ""))
            if step == "advertise_keys":
                work = make_work(terms)
                state, given = device.advertise_keys(
                    terms, work, TRUSTING, identity, signer, entropy
                )
            elif step == "share_keys":
                state, given = device.share_keys(state, message, entropy)
            elif step == "mask_input":
                state, given = device.mask_input(state, message, main, aux, signer)
            elif step == "agree":
                state, given = device.agree(state, message, signer)
            else:
                state, given = device.unmask(state, message)
            assert given == message_of(answer)
            assert entropy.left == b""
        if isinstance(state, device.Shared):
            assert state.transcript.hex() == document["transcript"]


@pytest.mark.parametrize("name", SESSIONS)
def test_a_server_alone_replays_its_part(name):
    document = session(name)
    group = Group(message_of(document["messages"][0]))
    close = {
        "share_keys": group.close_advertise_keys,
        "mask_input": group.close_share_keys,
        "agree": group.close_mask_input,
        "unmask": group.close_agree,
    }
    for entry in document["messages"]:
        step, index, message = entry["step"], entry["device"], message_of(entry)
        if step in close and entry["from"] == "server" and group.state.step != step:
            close[step]()
        if step == "advertise_keys":
            if entry["from"] == "device":
                group.advertise_keys(message)
        elif entry["from"] == "device":
            getattr(group, step)(index, message)
        elif step == "agree":
            assert group.agree_request() == message
        else:
            assert getattr(group, f"{step}_request")(index) == message
    main, aux = group.open_sum()
    assert group.transcript.hex() == document["transcript"]
    assert sorted(group.state.masked) == document["survivors"]
    assert main.tolist() == document["sum"]["main"]
    assert [str(value) for value in aux.tolist()] == document["sum"]["aux"]


class Drawn:
    """The recorded entropy of one step."""

    def __init__(self, text: str) -> None:
        self.left = bytes.fromhex(text)

    def __call__(self, size: int) -> bytes:
        taken, self.left = self.left[:size], self.left[size:]
        return taken
