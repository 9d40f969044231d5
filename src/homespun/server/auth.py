"""Who asks: devices by their signature, operators by their token."""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets

from starlette.requests import Request

from homespun.clock import Clock
from homespun.errors import NotAllowed, NotAuthentic
from homespun.protocol import signing
from homespun.server.keys import Keys
from homespun.server.store import Store
from homespun.server.store.records import DeviceRecord
from homespun.types import Hash

_MAX_REMEMBERED = 100_000


class Doorkeeper:
    """Remembers the keys of devices that came before, so that a signature costs no database work."""

    def __init__(self, store: Store, clock: Clock, keys: Keys) -> None:
        self._store = store
        self._clock = clock
        self._keys = keys
        self._devices: dict[str, DeviceRecord] = {}

    async def device(self, request: Request) -> DeviceRecord:
        """Who the request says it is from, not yet proven. Raises `NotAuthentic` for an unknown device."""
        device_id = request.headers.get(signing.DEVICE_HEADER, "")
        known = self._devices.get(device_id)
        if known is None:
            known = await asyncio.to_thread(self._store.enrolment.device, device_id)
            if known is None:
                raise NotAuthentic("this device is not enrolled here", hint="enrol it first")
            if len(self._devices) >= _MAX_REMEMBERED:
                self._devices.clear()
            self._devices[device_id] = known
        return known

    def forget(self, device_id: str) -> None:
        """It joined another population: look it up again."""
        self._devices.pop(device_id, None)

    def check_signature(self, request: Request, public_key: bytes, body_hash: Hash) -> None:
        """Raise `NotAuthentic` unless `public_key` signed this request with this body, recently."""
        signing.verify_request(
            public_key,
            request.method,
            request.scope["path"],
            request.headers.get(signing.TIME_HEADER, ""),
            request.headers.get(signing.SIGNATURE_HEADER, ""),
            body_hash,
            self._clock.now(),
        )

    def check_operator(self, token: str) -> None:
        """Raise `NotAuthentic` unless `token` is the operator's."""
        if not secrets.compare_digest(token.encode(), self._keys.operator_token.encode()):
            raise NotAuthentic(
                "the operator token is not right",
                hint="it is in operator.token in the server's data directory",
            )


def require_member(device: DeviceRecord, population: str) -> None:
    """Raise `NotAllowed` unless the device joined `population`."""
    if population not in device.populations:
        raise NotAllowed(f"this device is not in population {population}", hint="enrol it there")


def decode_key(text: str) -> bytes:
    """A raw Ed25519 public key from base64. Raises `NotAuthentic`."""
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise NotAuthentic("the public key is not base64") from error
    if len(key) != 32:
        raise NotAuthentic("the public key is not an Ed25519 key", expected=32, got=len(key))
    return key
