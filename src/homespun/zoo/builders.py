"""How the zoo's plans are built, by name. Needs PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from homespun.plan.package import Plan
from homespun.zoo import digits, keyboard
from homespun.zoo.models import HARD_2018

BUILDERS: dict[str, Callable[[], Plan]] = {
    "digits": digits.build,
    "keyboard": keyboard.build,
    "keyboard_2018": lambda: keyboard.build(HARD_2018, "keyboard_2018"),
}
