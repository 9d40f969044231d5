"""Enrolment: a directory becomes a device of a population."""

from __future__ import annotations

import secrets

import msgspec

from homespun.clock import Clock
from homespun.device.connection import Connection, http_client
from homespun.device.home import Home, Settings
from homespun.device.identity import Identity
from homespun.errors import NotAllowed, NotAuthentic
from homespun.protocol.eligibility import check_population


def enroll(home: Home, settings: Settings, token: str, clock: Clock, seed: int | None) -> Settings:
    """Introduce the device at `settings.server` and write device.json; the settings as enrolled.

    The identity is kept when there is one already: enrolling again is the same device. `seed` makes it and
    everything random on the device reproducible, for experiments only. Raises what the server refuses, and
    `NotAllowed` for a population that the device's policy does not serve.
    """
    if (served := check_population(settings.policy, settings.population)).code:
        raise NotAllowed(served.text, hint="homespun device policy --set populations=NAME,...")
    with http_client(settings.server) as client:
        identity = Identity.load_or_create(home.identity_file, seed)
        enrolled = Connection(client, identity, clock).enroll(settings.population, token)
    if enrolled.device_id != identity.device_id:
        raise NotAuthentic(
            "the server enrolled another device",
            hint="do not use this server",
            expected=identity.device_id,
            got=enrolled.device_id,
        )
    settings = msgspec.structs.replace(
        settings,
        device_id=identity.device_id,
        publisher_keys=enrolled.publisher_keys,
        seed=secrets.randbits(63) if seed is None else seed,
    )
    home.write_settings(settings)
    return settings
