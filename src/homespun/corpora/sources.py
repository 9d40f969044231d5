"""Text of people, read from what people have: a folder, a table, or a chat export.

Every reader gives one `UserText` per person, sorted by name, with the texts in the order of the
file. What cannot be used raises InvalidCorpus, which names the file and, where it can, the line.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from homespun.errors import InvalidCorpus

TELEGRAM_STYLES = frozenset({"bold", "italic", "underline", "strikethrough", "spoiler", "plain"})

# "31/12/2024, 21:41 - Anna: text" (Android), "[31.12.24, 21:41:05] Anna: text" (iOS). Lines about
# the chat itself have no name. iOS marks them, and attachments, with U+200E.
CHAT_LINE = re.compile(
    r"\u200e?\[?\d{1,4}[./-]\d{1,2}[./-]\d{1,4},?\s+\d{1,2}[:.]\d{2}(?:[:.]\d{2})?"
    r"(?:\s?[ap]\.?\s?m\.?)?\]?\s+(?:-\s+)?(?:(?P<user>[^:]{1,100}): )?(?P<text>.*)",
    re.IGNORECASE,
)
ATTACHMENT = re.compile(r"\u200e|<[^<>]*omitted>", re.IGNORECASE)


@dataclass(frozen=True)
class UserText:
    """What one person wrote."""

    user: str
    texts: tuple[str, ...]


def read(path: str | Path) -> tuple[UserText, ...]:
    """The users of `path`, which is one of

    - a folder: one text file per user (files whose names begin with a dot are skipped);
    - a `.parquet`, `.jsonl` or `.ndjson` table with the columns `user` and `text` and any others;
    - a chat export: WhatsApp's `.txt` or Telegram's `result.json`.

    Raises InvalidCorpus for a path that is missing or unreadable, of another kind, or without text.
    """
    path = Path(path)
    if not path.exists():
        raise InvalidCorpus(f"there is no file or folder {path}")
    if path.is_dir():
        pairs = _folder(path)
    elif path.suffix == ".parquet":
        pairs = _parquet(path)
    elif path.suffix in {".jsonl", ".ndjson"}:
        pairs = _json_lines(path)
    elif path.suffix == ".json":
        pairs = _telegram(path)
    elif path.suffix == ".txt":
        pairs = _whatsapp(path)
    else:
        raise InvalidCorpus(
            f"{path} is not a kind of corpus we read",
            hint="give a folder with one text file per user, a .parquet or .jsonl table with the "
            "columns user and text, or a chat export (.txt, .json)",
        )
    texts: dict[str, list[str]] = {}
    for user, text in pairs:
        if text.strip():
            texts.setdefault(user, []).append(text)
    if not texts:
        raise InvalidCorpus(f"there is no text in {path}")
    return tuple(UserText(user, tuple(texts[user])) for user in sorted(texts))


def gather(users: Iterable[UserText], num_users: int) -> tuple[UserText, ...]:
    """Exactly `num_users` users, sorted by name: those with the most text, who share out the rest.

    Each other user's texts, the longest first, join those of the one who has the least by then. Text
    is measured in characters, ties go by name. Raises InvalidCorpus when there are too few users.
    """
    ranked = sorted(users, key=lambda user: (-_num_characters(user), user.user))
    if not 0 < num_users <= len(ranked):
        raise InvalidCorpus(
            f"{num_users} users are needed and the text has {len(ranked)}",
            hint="give text of more people, or ask for fewer devices",
        )
    gathered = ranked[:num_users]
    for user in ranked[num_users:]:
        index, least = min(enumerate(gathered), key=lambda at: (_num_characters(at[1]), at[1].user))
        gathered[index] = UserText(least.user, least.texts + user.texts)
    return tuple(sorted(gathered, key=lambda user: user.user))


def _num_characters(user: UserText) -> int:
    return sum(len(text) for text in user.texts)


def read_text(path: Path) -> str:
    """A UTF-8 file, a byte-order mark removed. Raises InvalidCorpus when it is not one."""
    data = _read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidCorpus(
            f"{path} is not UTF-8 text: byte {error.start}, line {line}",
            hint="convert it to UTF-8, or remove it from the folder",
        ) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidCorpus(f"{path} cannot be read: {error.strerror or error}") from error


def _folder(path: Path) -> Iterator[tuple[str, str]]:
    try:
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise InvalidCorpus(f"{path} cannot be read: {error.strerror or error}") from error
    for file in files:
        if file.is_file():
            yield file.name, read_text(file)


def _parquet(path: Path) -> Iterator[tuple[str, str]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise InvalidCorpus(
            f"reading {path} needs pyarrow, which is not installed",
            hint='pip install "homespun[parquet]", or convert the table to .jsonl',
        ) from error
    data = _read_bytes(path)
    arrow = importlib.import_module("pyarrow")
    try:
        with parquet.ParquetFile(arrow.BufferReader(data)) as table:
            _require_columns(table.schema_arrow.names, f"{path}")
            columns = table.read(columns=["user", "text"]).to_pydict()
    except (arrow.ArrowException, OSError) as error:
        raise InvalidCorpus(f"{path} is not a readable Parquet file: {error}") from error
    rows = zip(columns["user"], columns["text"], strict=True)
    for number, (user, text) in enumerate(rows, start=1):
        yield _user_and_text(user, text, f"{path}, row {number}")


def _json_lines(path: Path) -> Iterator[tuple[str, str]]:
    # Not splitlines(): it also splits at U+2028, which JSON allows inside a string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _parse_json(line, where)
        if not isinstance(row, dict):
            raise InvalidCorpus(
                f"{where}: expected an object with user and text, got {type(row).__name__}"
            )
        _require_columns(row, where)
        yield _user_and_text(row["user"], row["text"], where)


def _telegram(path: Path) -> Iterator[tuple[str, str]]:
    document = _parse_json(read_text(path), str(path))
    messages = document.get("messages") if isinstance(document, dict) else None
    if not isinstance(messages, list):
        raise InvalidCorpus(
            f"{path} is not a Telegram export: it has no list of messages",
            hint="export one chat as machine-readable JSON, or give a .jsonl table",
        )
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("from"), str):
            yield message["from"], _telegram_text(message.get("text"))


def _telegram_text(text: Any) -> str:
    """Plain, or a list of plain and marked-up parts; links, code and the like are left out."""
    if isinstance(text, str):
        return text
    parts: list[str] = []
    for part in text if isinstance(text, list) else ():
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, dict) and part.get("type") in TELEGRAM_STYLES:
            parts.append(str(part.get("text", "")))
    return "".join(parts)


def _whatsapp(path: Path) -> Iterator[tuple[str, str]]:
    messages: list[tuple[str, list[str]]] = []
    for line in read_text(path).split("\n"):
        line = line.rstrip("\r")
        if match := CHAT_LINE.fullmatch(line):
            messages.append((match["user"] or "", [match["text"]]))
        elif messages:
            messages[-1][1].append(line)
        elif line.strip():
            raise InvalidCorpus(
                f"{path}, line 1 is not a chat message (date, time - name: text)",
                hint="a single .txt must be a chat export; for one file per user give the folder",
            )
    for user, lines in messages:
        text = "\n".join(lines)
        if user and not ATTACHMENT.search(text):
            yield user, text


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise InvalidCorpus(
            f"{where}{line}, column {error.colno}: not JSON: {error.msg}"
        ) from error
    except RecursionError as error:
        raise InvalidCorpus(f"{where}: JSON nested too deeply") from error


def _require_columns(columns: Iterable[str], where: str) -> None:
    names = list(columns)
    missing = [name for name in ("user", "text") if name not in names]
    if missing:
        raise InvalidCorpus(
            f"{where} has no column {' and no column '.join(missing)}; "
            f"it has {', '.join(names[:20]) or 'none'}",
            hint="a table needs the columns user and text; others are ignored",
        )


def _user_and_text(user: object, text: object, where: str) -> tuple[str, str]:
    if isinstance(user, int) and not isinstance(user, bool):
        user = str(user)
    if not isinstance(user, str) or not user:
        raise InvalidCorpus(f"{where}: user must be a name or a number, got {type(user).__name__}")
    if text is None:
        return user, ""
    if not isinstance(text, str):
        raise InvalidCorpus(f"{where}: text must be a string, got {type(text).__name__}")
    return user, text
