"""Both halves of every algorithm: what a device makes of its training, what the server makes of the sums."""

from homespun.learning import fedavg, fedopt  # noqa: F401, I001  (they make themselves known by name)
from homespun.learning import (  # noqa: F401  (after the optimizers, of which they are made)
    averaging,
    ditto,
    feddyn,
    fednova,
    fedper,
    fedprox,
    ifca,
    mime,
    qfedavg,
    robust,
    scaffold,
)
