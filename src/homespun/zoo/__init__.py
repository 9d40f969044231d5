"""Models that come with Homespun: the keyboard's next-word model and digits.

Their plans are shipped pre-built, so that loading one needs no PyTorch. `python -m homespun.zoo build`
makes them again from the modules in this folder; `--check` compares instead of writing.
"""

from __future__ import annotations

from importlib.resources import as_file, files

from homespun.errors import NotFound
from homespun.plan.package import Plan

NAMES = ("digits", "keyboard")


def load(name: str) -> Plan:
    """A pre-built plan, unsigned and without assets. Raises NotFound for a name that is not in NAMES."""
    if name not in NAMES:
        raise NotFound(
            f"there is no model named {name!r}", hint=f"choose one of {', '.join(NAMES)}"
        )
    with as_file(files("homespun.zoo") / "prebuilt" / name) as directory:
        return Plan.read(directory)
