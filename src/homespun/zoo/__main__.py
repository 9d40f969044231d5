"""`python -m homespun.zoo build [--check]`: make the pre-built plans again, or compare them."""

from __future__ import annotations

import sys
from pathlib import Path

from homespun.errors import HomespunError
from homespun.zoo import NAMES, load
from homespun.zoo.builders import BUILDERS


def main(arguments: list[str]) -> int:
    """Exit code 0 when written or equal, 1 when different or not buildable, 2 for a wrong call."""
    if arguments not in (["build"], ["build", "--check"]):
        print("usage: python -m homespun.zoo build [--check]", file=sys.stderr)
        return 2
    different = False
    for name in NAMES:
        plan = BUILDERS[name]()
        if "--check" not in arguments:
            plan.write(Path(__file__).parent / "prebuilt" / name)
        equal = load(name).hash == plan.hash
        different |= not equal
        print(f"{name}: {plan.manifest.num_parameters:,} parameters, {plan.hash[:12]}", end="")
        print("" if equal else " differs from the pre-built plan")
    return int(different)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except HomespunError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        sys.exit(1)
