"""A device that is gone in the middle of secure aggregation, as phones are: their battery falls out, their train
enters a tunnel. A drill, for the demo and for tests with real processes.
"""

from __future__ import annotations

import os

from homespun.device.connection import Connection
from homespun.protocol.messages import Assigned, GroupReply

EXIT_CODE = 75
"""Of a process that vanished, to tell it from one that failed."""


class VanishingConnection(Connection):
    """Ends the process without a word, right after its answer to `vanish_after` was taken.

    `vanish_after`: advertise-keys, share-keys, mask-input, agree or unmask.
    """

    vanish_after = ""

    def answer_group(self, assigned: Assigned, step: str, body: bytes, wait_s: float) -> GroupReply:
        if step != self.vanish_after:
            return super().answer_group(assigned, step, body, wait_s)
        super().answer_group(assigned, step, body, 0.0)
        os._exit(EXIT_CODE)
