"""The device's policy: in device.json, changed by the person at any time, heeded by the running device at once
(`device.current`).

Nothing that comes from a server is ever merged into it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import msgspec

from homespun.device.home import Home
from homespun.device.journal import Journal
from homespun.errors import Conflict, InvalidConfig
from homespun.protocol.eligibility import Policy

_WORDS = {"yes": True, "no": False, "on": True, "off": False, "none": None}


def policy_of(home: Home) -> Policy:
    """The policy of a directory, also of one that cannot be used or is no device yet; then the default."""

    class _Settings(msgspec.Struct):
        policy: Policy = Policy()

    try:
        return msgspec.json.decode(home.settings_file.read_bytes(), type=_Settings).policy
    except (OSError, msgspec.MsgspecError):
        return Policy()


def set_policy(home: Home, assignments: Iterable[str]) -> Policy:
    """Apply `NAME=VALUE`s, all or none; the new policy. Plans that were refused are looked at again.

    Raises `InvalidConfig` naming the rule that does not exist or the value that it cannot have.
    """
    settings = home.settings()
    changes = dict(_parsed(each) for each in assignments)
    try:
        before = msgspec.to_builtins(settings.policy)
        policy = msgspec.convert({**before, **changes}, Policy, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidConfig(
            f"the policy cannot be changed so: {error}", hint="nothing was changed"
        ) from error
    home.write_settings(msgspec.structs.replace(settings, policy=policy))
    with suppress(Conflict):  # a running device sees by itself that the policy is another one
        journal = Journal(home.journal_file)
        try:
            journal.reconsider_plans()
        finally:
            journal.close()
    return policy


def _parsed(assignment: str) -> tuple[str, object]:
    """The rule and its value as plain data. Lists are separated by commas; an empty one is nothing."""
    name, equals, text = assignment.partition("=")
    name, text = name.strip(), text.strip()
    if not equals or name not in Policy.__struct_fields__:
        raise InvalidConfig(
            f"{assignment!r} sets no rule of the policy",
            hint="write NAME=VALUE; rules are " + ", ".join(Policy.__struct_fields__),
        )
    if isinstance(getattr(Policy(), name), tuple):
        return name, [part.strip() for part in text.split(",") if part.strip()]
    return name, _WORDS.get(text.lower(), text)


def in_words(policy: Policy) -> list[tuple[str, str, str]]:
    """(rule, its value as `set_policy` reads it, what that means) for every rule."""
    p = policy
    populations = ", ".join(p.populations) or "the one that it is enrolled in"
    tensors = ", ".join(p.private_tensors)
    meanings = {
        "is_enabled": "takes part when it can" if p.is_enabled else "never contacts the server",
        "populations": f"serves {populations}",
        "allow_plain": "takes part without secure aggregation, too: the server then reads its updates"
        if p.allow_plain
        else "takes part in secure aggregation only",
        "min_group": f"is only part of sums over {p.min_group} devices or more",
        "private_tensors": f"never sends {tensors}"
        if tensors
        else "sends any parameter of a model",
        "unknown_is_met": "counts a condition that cannot be told as "
        + ("met" if p.unknown_is_met else "not met"),
        "max_daily_participations": f"takes part at most {p.max_daily_participations} times in 24 hours",
        "max_daily_bytes": f"moves at most {p.max_daily_bytes / 1e6:g} MB in 24 hours",
        "max_memory_bytes": f"gives a plan at most {p.max_memory_bytes / 1e6:g} MB of memory",
        "max_cpu_share": f"gives a plan at most {p.max_cpu_share:.0%} of one processor core",
    }
    return [(name, _written(getattr(p, name)), meanings[name]) for name in Policy.__struct_fields__]


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(value) if isinstance(value, tuple) else str(value)
