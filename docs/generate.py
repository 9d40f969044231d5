"""Writes the pages under docs/reference from the code itself: `./dev docs`.

Each page is one function that returns its text. `--check` writes nothing and fails if a page is not what
the code says now; the tests run it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from homespun import errors

REFERENCE = Path(__file__).parent / "reference"


def errors_page() -> str:
    """One row for each line of the tree at the top of errors.py."""
    lines = [
        "# Errors",
        "",
        "Every failure has a stable code. Over HTTP it arrives as a problem document (RFC 9457) with the status",
        "given here; in Python it is an exception of `homespun.errors`. An error's parent stands for it:",
        "who catches `InvalidInput` catches `InvalidCorpus`.",
        "",
        "| code | HTTP | exception | parent | meaning |",
        "|---|---|---|---|---|",
    ]
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ([│├└─ ]*)(\w+) +(\w+) +(\w+) *(.*)", line):
            indent, name, code, status, meaning = match.groups()
            path[len(indent) // 4 :] = [name]
            if len(path) > 1:
                lines.append(f"| `{code}` | {status} | `{name}` | `{path[-2]}` | {meaning} |")
    return "\n".join(lines) + "\n"


PAGES = {"errors.md": errors_page}


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for name, page in PAGES.items():
        file = REFERENCE / name
        text = page()
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                REFERENCE.mkdir(exist_ok=True)
                file.write_text(text, encoding="utf-8")
    verb = "is not what the code says: run ./dev docs" if check else "written"
    for name in stale:
        print(f"docs/reference/{name} {verb}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
