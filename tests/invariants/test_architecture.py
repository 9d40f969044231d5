"""The architecture, as a test over the imports. `LAYERS` is the normative copy of the picture in ARCHITECTURE.md."""

from __future__ import annotations

import ast
import io
import pkgutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import homespun

SOURCE = Path(__file__).parents[2] / "src" / "homespun"

# Top to bottom. A module imports from lower rows only: not from a higher one and not from its neighbours.
LAYERS = (
    ("cli",),
    ("simulation", "zoo"),
    ("server", "device"),
    ("protocol", "plan"),
    ("learning",),
    ("privacy", "secagg"),
    ("tensors", "corpora"),
    ("types", "errors", "clock", "rng"),
)
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}
SHELLS = ROW["server"]  # the lowest row with I/O

NOT_BELOW_THE_SHELLS = frozenset(
    """
    asyncio concurrent http logging multiprocessing os random secrets select selectors shutil signal socket
    sqlite3 ssl subprocess tempfile threading time urllib uuid
    alembic anyio dbus_fast fastapi httpx psutil pydantic_settings sqlalchemy stamina starlette structlog uvicorn
    """.split()
)
ONLY_IN = {  # package -> files that may import it
    "torch": (
        "plan/build.py",
        "plan/build/",
        "zoo/",
        "simulation/api.py",
        "simulation/assembly.py",
        "simulation/cohort",
        "simulation/processes.py",
        "simulation/ray.py",
        "simulation/shards.py",
        "simulation/spec.py",  # by what it is made of
        "simulation/task.py",
        "simulation/workers.py",
    ),
    "llvmlite": ("simulation/cohort",),
    "onnx": ("plan/build.py", "plan/build/", "zoo/"),
    "onnxscript": ("plan/build.py", "plan/build/", "zoo/"),
    "onnxruntime": ("plan/engine.py",),
}
EXCEPTIONS = {("clock.py", "time")}  # SystemClock is the one place that reads the machine's clock


def imported(tree: ast.Module, path: str) -> Iterator[str]:
    """Absolute dotted names that a module imports, at its top or anywhere inside."""
    package = ("homespun", *Path(path).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            parts = (*base, *(node.module.split(".") if node.module else ()))
            yield from (".".join((*parts, alias.name)) for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    """What `source`, the file at `path` relative to the package, imports and must not."""
    layer = path.partition("/")[0].removesuffix(".py")
    if (
        layer == "__init__"
    ):  # homespun/__init__.py is the shop window: it may show names of every layer
        return []
    if layer not in ROW:
        return [f"{path}: {layer} is not in LAYERS"]
    found = []
    for name in imported(ast.parse(source), path):
        top, _, rest = name.partition(".")
        if top == "homespun":
            target = rest.partition(".")[0]
            if target in (layer, "__version__"):
                continue
            if target not in ROW:
                found.append(f"{path} imports {name}: take it from the module that defines it")
            elif ROW[target] <= ROW[layer]:
                found.append(f"{path} imports {name}: {layer} may not import {target}")
        elif top in NOT_BELOW_THE_SHELLS and ROW[layer] > SHELLS and (path, top) not in EXCEPTIONS:
            found.append(f"{path} imports {name}: I/O, time and randomness live in the shells")
        elif top in ONLY_IN and not path.startswith(ONLY_IN[top]):
            found.append(f"{path} imports {name}: only {' and '.join(ONLY_IN[top])} may")
    return found


def test_imports_point_downward():
    found = [
        violation
        for file in sorted(SOURCE.rglob("*.py"))
        for violation in violations(file.relative_to(SOURCE).as_posix(), file.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("learning/fedavg.py", "from homespun.server import app"),  # upward
        ("learning/fedavg.py", "from homespun import server"),
        ("learning/fedavg.py", "from ..server.app import serve"),
        ("learning/fedavg.py", "from homespun import Task"),  # around, through the shop window
        ("learning/fedavg.py", "import homespun"),
        ("server/app.py", "import homespun.device.runtime"),  # sideways
        (
            "plan/run.py",
            "def f():\n    from homespun.protocol import messages",
        ),  # inside a function
        ("errors.py", "from homespun.types import Hash"),
        ("protocol/round.py", "import time"),  # I/O below the shells
        ("secagg/graph.py", "from os import urandom"),
        ("privacy/noise.py", "import concurrent.futures"),
        ("server/app.py", "import torch.nn as nn"),  # the wrong framework
        ("device/runtime.py", "import onnxruntime"),
        ("simulation/history.py", "import torch"),
        ("plan/build_more.py", "import torch"),
        ("helpers/strings.py", ""),  # a package that the table does not know
    ],
)
def test_the_rules_catch(path: str, source: str):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from homespun.simulation import simulate"),
        ("cli/serve.py", "from homespun.server.app import serve\nimport os"),
        (
            "server/app.py",
            "from homespun import __version__, errors\nfrom . import intake\nimport asyncio",
        ),
        ("plan/build.py", "import torch\nfrom homespun.learning.model import Model"),
        ("plan/engine.py", "import onnxruntime as ort"),
        ("clock.py", "import time"),
    ],
)
def test_the_rules_allow(path: str, source: str):
    assert violations(path, source) == []


def test_devices_and_servers_work_without_pytorch():
    """Whatever is not about authoring plans imports with the authoring packages absent."""
    names = [
        module.name
        for module in pkgutil.walk_packages(homespun.__path__, "homespun.", onerror=print)
        if not any(
            module.name.removeprefix("homespun.")
            .replace(".", "/")
            .startswith(place.removesuffix(".py"))
            for place in ONLY_IN["torch"]
        )
        and "migrations" not in module.name  # run by Alembic, in its own context
    ]
    program = (
        "import importlib, sys\n"
        "for absent in ('torch', 'llvmlite', 'onnx', 'onnxscript', 'pyarrow'): sys.modules[absent] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def lines_of_code(source: str) -> int:
    """Lines that hold a token of code: no blank lines, comments or docstrings (decision 0001)."""
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    silent = {
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE,
        tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    }  # fmt: skip
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in silent
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(code - docstrings)


def test_lines_of_code_are_counted_without_prose():
    assert lines_of_code('"""A module\n\nof prose."""\n\n# why\nx = (\n    1,\n)\n') == 3


def test_files_stay_small():
    sources = {file: file.read_text() for file in SOURCE.rglob("*.py")}
    long = {file.name for file, text in sources.items() if len(text.splitlines()) > 600}
    assert long == set()
    assert sum(lines_of_code(text) for text in sources.values()) < 27_000
