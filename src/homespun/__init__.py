"""Homespun: federated learning for real devices.

Models learn from data that never leaves the devices, and the server only ever sees sums.
"""

__version__ = "0.1.0"
