"""Populations, join tokens, devices: who may sign requests."""

from __future__ import annotations

import hashlib

from sqlalchemy import Connection, func, insert, select, update

from homespun.errors import NotAuthentic, NotFound
from homespun.protocol.views import PopulationView, TokenView
from homespun.server.store.database import Database
from homespun.server.store.events import add_event
from homespun.server.store.records import DeviceRecord
from homespun.server.store.schema import devices, populations, tokens


class Enrolment:
    """Named transactions about who belongs where."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create_population(self, name: str, now: float) -> PopulationView:
        """Idempotent: an existing population stays as it is."""
        with self._database.write() as connection:
            if not _exists(connection, name):
                connection.execute(insert(populations).values(name=name, created_at=now))
                add_event(connection, "population.created", now, name)
            return _populations(connection, name)[0]

    def populations(self) -> list[PopulationView]:
        with self._database.read() as connection:
            return _populations(connection)

    def create_token(
        self,
        population: str,
        token_id: str,
        token: str,
        max_uses: int | None,
        expires_at: float | None,
    ) -> TokenView:
        """Only the token's hash is kept. Raises `NotFound` for an unknown population."""
        with self._database.write() as connection:
            require_population(connection, population)
            connection.execute(
                insert(tokens).values(
                    token_id=token_id,
                    token_hash=_token_hash(token),
                    population=population,
                    max_uses=max_uses,
                    uses=0,
                    expires_at=expires_at,
                    revoked=False,
                )
            )
        return TokenView(
            token_id=token_id,
            population=population,
            token=token,
            max_uses=max_uses,
            expires_at=expires_at,
        )

    def revoke_token(self, population: str, token_id: str) -> None:
        """Idempotent. Devices that joined with it stay. Raises `NotFound`."""
        mine = (tokens.c.population == population) & (tokens.c.token_id == token_id)
        with self._database.write() as connection:
            if connection.execute(update(tokens).where(mine).values(revoked=True)).rowcount == 0:
                raise NotFound(f"population {population} has no token {token_id}")

    def enroll(
        self, population: str, token: str, device_id: str, public_key: bytes, now: float
    ) -> None:
        """Idempotent per key: a device counts once against its token, however often it asks.

        Raises `NotAuthentic` for a token that is unknown, used up, expired, revoked or of another population.
        """
        device = (devices.c.device_id == device_id) & (devices.c.population == population)
        with self._database.write() as connection:
            if connection.execute(select(devices).where(device)).first() is not None:
                return
            row = connection.execute(
                select(tokens).where(
                    tokens.c.token_hash == _token_hash(token), tokens.c.population == population
                )
            ).first()
            if row is None or row.revoked:
                raise NotAuthentic("this join token is not valid", hint="ask for a new one")
            if row.expires_at is not None and now >= row.expires_at:
                raise NotAuthentic("this join token has expired", hint="ask for a new one")
            if row.max_uses is not None and row.uses >= row.max_uses:
                raise NotAuthentic("this join token is used up", hint="ask for a new one")
            connection.execute(
                update(tokens)
                .where(tokens.c.token_id == row.token_id)
                .values(uses=tokens.c.uses + 1)
            )
            connection.execute(
                insert(devices).values(
                    device_id=device_id, population=population, public_key=public_key
                )
            )

    def device(self, device_id: str) -> DeviceRecord | None:
        """The key and the populations of a device."""
        query = select(devices).where(devices.c.device_id == device_id)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        if not rows:
            return None
        return DeviceRecord(
            device_id, rows[0].public_key, frozenset(row.population for row in rows)
        )


def require_population(connection: Connection, name: str) -> None:
    """Raise `NotFound` unless there is such a population."""
    if not _exists(connection, name):
        raise NotFound(
            f"there is no population {name!r}",
            hint=f"create it: homespun population create {name}",
        )


def _exists(connection: Connection, name: str) -> bool:
    query = select(populations.c.name).where(populations.c.name == name)
    return connection.execute(query).first() is not None


def _populations(connection: Connection, name: str | None = None) -> list[PopulationView]:
    query = (
        select(populations, func.count(devices.c.device_id).label("num_devices"))
        .outerjoin(devices, devices.c.population == populations.c.name)
        .group_by(populations.c.name, populations.c.created_at)
        .order_by(populations.c.name)
    )
    if name is not None:
        query = query.where(populations.c.name == name)
    return [PopulationView(**row) for row in connection.execute(query).mappings()]


def _token_hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
