"""The store: what must survive the process, as named transactions, by topic.

Whoever calls it says what happened, not how it is written down. Everything is SQLAlchemy Core over `schema`, so
that another database is another URL.
"""

from __future__ import annotations

from homespun.server.store.catalogue import Catalogue
from homespun.server.store.claims import Claims
from homespun.server.store.database import Database
from homespun.server.store.enrolment import Enrolment
from homespun.server.store.events import Events
from homespun.server.store.groups import Groups
from homespun.server.store.pacing import Pacing
from homespun.server.store.rates import Rates
from homespun.server.store.releases import Releases
from homespun.server.store.reports import Reports
from homespun.server.store.rounds import Rounds
from homespun.server.store.tasks import Tasks


class Store:
    """All transactions over one database, whose tables are made or upgraded on opening."""

    def __init__(self, url: str) -> None:
        self.database = Database(url)
        self.database.upgrade()
        self.enrolment = Enrolment(self.database)
        self.catalogue = Catalogue(self.database)
        self.tasks = Tasks(self.database)
        self.rounds = Rounds(self.database)
        self.claims = Claims(self.database)
        self.reports = Reports(self.database)
        self.groups = Groups(self.database)
        self.rates = Rates(self.database)
        self.pacing = Pacing(self.database)
        self.releases = Releases(self.database)
        self.events = Events(self.database)

    def close(self) -> None:
        self.database.close()
