"""Both halves of every algorithm: what a device makes of its training, what the server makes of the sums."""

from homespun.learning import fedavg, fedopt  # noqa: F401  (they make themselves known by name)
