"""Writes what the code itself knows into the documents: `./dev docs`.

Pages under docs/reference are generated whole; docs/protocol.md is written by hand around regions that
are generated, between `<!-- generated: NAME -->` and `<!-- end of generated part -->`. `--check` writes
nothing and fails if something is not what the code says now; the tests run it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect as types

from homespun import errors
from homespun.learning import contribution, fedavg, fedopt
from homespun.learning.optimizers import ServerOptimizer
from homespun.protocol import frame, messages, release_request, signing, tasks
from homespun.protocol.group import GROUP
from homespun.protocol.machine import Machine
from homespun.protocol.release import (
    RELEASE,
)
from homespun.protocol.round import ROUND
from homespun.protocol.session import SESSION
from homespun.secagg import device as secagg_device
from homespun.secagg import graph
from homespun.secagg import messages as secagg

DOCS = Path(__file__).parent
_UNBOUNDED = 1e9
"""A bound from here on only keeps numbers readable in every language; the tables leave it out."""

WIRE = (
    messages.Enroll,
    messages.Enrolled,
    messages.CheckIn,
    messages.CheckInReply,
    messages.Claim,
    messages.Assigned,
    messages.Waiting,
    messages.Rejected,
    messages.Settled,
    messages.Receipt,
    messages.Abort,
    messages.SignedRelease,
    messages.ReleaseManifest,
)
"""The messages, in the order in which a device meets them."""

PARTS = (
    messages.Offer,
    messages.ReleaseNotice,
    messages.RetryWindow,
    messages.Criteria,
    messages.ExampleQuery,
    messages.Comparison,
    messages.Bucket,
    messages.Encoding,
    messages.Watch,
)
"""Records inside messages."""

STEPS = (
    secagg.Terms,
    messages.Carried,
    secagg.AdvertiseKeys,
    secagg.ShareKeysRequest,
    secagg.ShareKeys,
    secagg.MaskInputRequest,
    secagg.MaskedInput,
    secagg.AgreeRequest,
    secagg.Agree,
    secagg.UnmaskRequest,
    secagg.Unmask,
)
"""Secure aggregation: for each step what the server asks, then what the device answers."""

STEP_PARTS = (secagg.RosterEntry,)
"""Records inside those."""

TASK = (
    tasks.TaskSpec,
    tasks.GroupSpec,
    tasks.OptimizerSpec,
    messages.Criteria,
    messages.ExampleQuery,
    messages.Comparison,
    messages.Bucket,
    messages.RetryWindow,
    messages.Watch,
)

RELEASE_REQUEST = (
    release_request.ReleaseRequest,
    release_request.EvaluationSpec,
    release_request.Stage,
    release_request.WatchSpec,
    release_request.Reports,
    release_request.Limits,
    release_request.Trial,
    tasks.GroupSpec,
    messages.Criteria,
    messages.Bucket,
    messages.RetryWindow,
)

COMMON = {
    "population": "name of the population",
    "task_id": "which task",
    "task_name": "its name, for people",
    "kind": "what is computed",
    "round_number": "of the task, from 1",
    "attempt": "of the round, from 1",
    "plan_hash": "address of the plan",
    "aggregation": "how contributions are added up",
    "criteria": "what the device must hold and be",
    "assignment_id": "this device's place in this round attempt; unguessable",
    "wait_s": "how long the server may hold the answer (long poll); it caps this",
    "slot": "which model of the app",
    "sequence": "of the slot's releases; only grows",
    "retry": "when to come back",
    "survivors": "U3, bitmap",
}
"""Fields that mean the same wherever they occur. A record's docstring comes first."""


# --- Records ------------------------------------------------------------------------------------------


def meanings(kind: type[msgspec.Struct]) -> dict[str, str]:
    """What each field is for: the `name`: parts of the docstring, then COMMON. Fails for a field without."""
    text = " ".join(inspect.cleandoc(kind.__doc__ or "").split())
    found = dict(re.findall(r"`(\w+)`: (.+?)(?=[;.] `\w+`: |\.?$)", text))
    fields = kind.__struct_fields__
    if absent := [name for name in fields if name not in found and name not in COMMON]:
        sys.exit(f"{kind.__name__}.{absent[0]} has no meaning: add `{absent[0]}`: to its docstring")
    return {name: found.get(name) or COMMON[name] for name in fields}


def purpose(kind: type[msgspec.Struct]) -> str:
    """The docstring up to the fields."""
    return re.split(r"\s*`\w+`: ", inspect.cleandoc(kind.__doc__ or ""), maxsplit=1)[0].strip()


def type_in_words(info: types.Type) -> str:
    match info:
        case types.UnionType(types=options):
            return " or ".join(type_in_words(option) for option in options)
        case types.NoneType():
            return "null"
        case types.BoolType():
            return "boolean"
        case types.BytesType(min_length=low, max_length=high):
            if high is None:
                return "bytes"
            return f"{high} bytes" if low == high else f"at most {high} bytes"
        case types.EnumType(cls=cls):
            return " or ".join(f'`"{member.value}"`' for member in cls)
        case types.LiteralType(values=values):
            return " or ".join(f"`{value}`" for value in values)
        case types.StructType(cls=cls):
            return f"[{cls.__name__}](#{cls.__name__.lower()})"
        case types.VarTupleType(item_type=item):
            return f"list of {type_in_words(item)}"
        case types.DictType(value_type=value):
            return f"names to {type_in_words(value)}"
        case types.StrType(pattern=pattern, max_length=max_length):
            patterns = {
                _pattern(messages.Name): "name",
                _pattern(messages.Sha256): "SHA-256",
                _pattern(messages.FieldName): "field name",
            }
            word = patterns.get(pattern or "", "text")
            return f"{word}, at most {max_length} characters" if max_length else word
        case types.IntType(ge=low, le=high, lt=above):
            return _between("integer", low, None, above - 1 if above else high, None)
        case types.FloatType(ge=low, gt=below, le=high, lt=above):
            return _between("number", low, below, high, above)
        case _:
            raise TypeError(f"no words for {info}")


def _between(
    word: str, low: float | None, below: float | None, high: float | None, above: float | None
) -> str:
    """`word` with its bounds: `low` and `high` are allowed, `below` and `above` are not."""
    if high is not None and high >= _UNBOUNDED:
        high = None
    if low is not None and low <= -_UNBOUNDED:
        low = None
    least = f">= {low:g}" if low is not None else f"> {below:g}" if below is not None else ""
    most = f"<= {_plain(high)}" if high is not None else f"< {above:g}" if above is not None else ""
    if low is not None and high is not None:
        return f"{word} from {low:g} to {_plain(high)}"
    return " ".join((word, ", ".join(filter(None, (least, most))))).strip()


def _plain(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:g}"


def _pattern(annotated: Any) -> str:
    (meta,) = annotated.__metadata__
    return str(meta.pattern)


def default_in_words(field: types.Field) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return f"`{messages.encode(value).decode()}`"


def record(kind: type[msgspec.Struct], level: str) -> str:
    """Heading, purpose and the table of fields."""
    info = types.type_info(kind)
    assert isinstance(info, types.StructType)
    says = meanings(kind)
    lines = [f"{level} {kind.__name__}", "", purpose(kind), ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    if info.tag is not None:
        lines.append(
            f'| `{info.tag_field}` | `"{info.tag}"` | required | tells the answers apart |'
        )
    for field in info.fields:
        words = (type_in_words(field.type), default_in_words(field), says[field.name])
        lines.append(f"| `{field.encode_name}` | " + " | ".join(words) + " |")
    return "\n".join(lines)


def records(kinds: tuple[type[msgspec.Struct], ...], level: str) -> str:
    return "\n\n".join(record(kind, level) for kind in kinds)


# --- Tables of docs/protocol.md -----------------------------------------------------------------------


def constants() -> str:
    rows = (
        ("protocol version", f"{messages.PROTOCOL_VERSION}", "the `v1` of every path"),
        ("report magic", f"`{frame.MAGIC.decode()}`", "first bytes of a report"),
        ("masked magic", f"`{frame.MASKED_MAGIC.decode()}`", "first bytes of a masked input"),
        (
            "auxiliary scale",
            f"{contribution.AUX_SCALE:.0f}",
            "steps per unit of an auxiliary value",
        ),
        ("auxiliary limit", f"{contribution.AUX_LIMIT:.0f}", "largest auxiliary value of a device"),
        ("largest group", f"{contribution.MAX_GROUP}", "contributions in one sum"),
        ("smallest group", f"{secagg_device.SMALLEST_GROUP}", "devices of a masked sum"),
        ("suite", f"`{secagg.SUITE}`", "the cryptography of secure aggregation"),
        ("complete graph", f"{graph.COMPLETE_UP_TO}", "devices of a group without a ring"),
        ("security", f"{graph.SECURITY_BITS} bits", "chance that a ring is not secret"),
        ("correctness", f"{graph.CORRECTNESS_BITS} bits", "chance that a ring cannot be opened"),
        ("clock skew", f"{signing.MAX_SKEW_S:.0f} s", "between `Homespun-Time` and the server"),
    )
    lines = ["| constant | value | what it bounds |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def error_tree() -> Iterator[tuple[str, str, str, str, str]]:
    """(code, status, class, parent, meaning) for each line of the tree at the top of errors.py."""
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ([│├└─ ]*)(\w+) +(\w+) +(\w+) *(.*)", line):
            indent, name, code, status, meaning = match.groups()
            path[len(indent) // 4 :] = [name]
            if len(path) > 1:
                yield code, status, name, path[-2], meaning


def error_codes() -> str:
    lines = ["| code | HTTP | meaning |", "|---|---|---|"]
    return "\n".join(
        [
            *lines,
            *(f"| `{code}` | {status} | {says} |" for code, status, _, _, says in error_tree()),
        ]
    )


def diagram(machine: Machine[Any, Any]) -> str:
    return f"```mermaid\n{machine.diagram()}\n```"


REGIONS: dict[str, Callable[[], str]] = {
    "constants": constants,
    "messages": lambda: records(WIRE, "###"),
    "parts": lambda: records(PARTS, "###"),
    "steps": lambda: records(STEPS + STEP_PARTS, "####"),
    "errors": error_codes,
    "session": lambda: diagram(SESSION),
    "round": lambda: diagram(ROUND),
    "group": lambda: diagram(GROUP),
    "release": lambda: diagram(RELEASE),
}

_REGION = re.compile(
    r"(<!-- generated: (\w+) -->\n)(.*?)(?=<!-- end of generated part -->)", re.DOTALL
)


def protocol_page() -> str:
    """docs/protocol.md with its regions as the code has them now."""
    page = (DOCS / "protocol.md").read_text(encoding="utf-8")
    if absent := REGIONS.keys() ^ {match[2] for match in _REGION.finditer(page)}:
        sys.exit(f"docs/protocol.md and REGIONS differ in {sorted(absent)}")
    return _REGION.sub(lambda match: f"{match[1]}\n{REGIONS[match[2]]()}\n\n", page)


# --- Whole pages --------------------------------------------------------------------------------------


def errors_page() -> str:
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
    lines += [
        f"| `{code}` | {status} | `{name}` | `{parent}` | {says} |"
        for code, status, name, parent, says in error_tree()
    ]
    return "\n".join(lines) + "\n"


def optimizers() -> Iterator[str]:
    """A row for each server optimizer: its name, its settings with their defaults, its formula."""
    for module in (fedavg, fedopt):
        for name, build in inspect.getmembers(module, inspect.isfunction):
            if build.__module__ == module.__name__ and not name.startswith("_"):
                settings = inspect.signature(build).parameters.values()
                optimizer: ServerOptimizer = build()
                values = ", ".join(f"`{setting.name} = {setting.default}`" for setting in settings)
                yield f"| `{optimizer.name}` | {values} | {inspect.getdoc(build)} |"


def task_page() -> str:
    lines = [
        "# Task descriptions",
        "",
        "What an operator asks of a population, as TOML or JSON. A field that is not listed here is refused.",
        "",
        records(TASK, "##"),
        "",
        "## Server optimizers",
        "",
        "`u` is the mean update, `x` the parameters, `lr` the learning rate. The last three also keep",
        "`m <- beta1 m + (1 - beta1) u` and move by `x <- x + lr m / (sqrt(v) + tau)`.",
        "Names are read without regard to case.",
        "",
        "| name | settings and their defaults | what it does |",
        "|---|---|---|",
        *optimizers(),
    ]
    return "\n".join(lines) + "\n"


def release_page() -> str:
    lines = [
        "# Release descriptions",
        "",
        "What an operator asks for with `POST /v1/operator/releases`; with `model release --terms FILE` as TOML,",
        "without what the command names itself. A field that is not listed here is refused. What it all means is",
        "in [releases.md](../releases.md).",
        "",
        records(RELEASE_REQUEST, "##"),
    ]
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "reference/errors.md": errors_page,
    "reference/task.md": task_page,
    "reference/release.md": release_page,
    "protocol.md": protocol_page,
}


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for name, page in PAGES.items():
        file = DOCS / name
        text = page()
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                file.parent.mkdir(exist_ok=True)
                file.write_text(text, encoding="utf-8")
    verb = "is not what the code says: run ./dev docs" if check else "written"
    for name in stale:
        print(f"docs/{name} {verb}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
