"""Every kind of corpus people have, and every way it can be wrong."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from homespun.corpora import UserText, gather, read
from homespun.errors import InvalidCorpus

ANNA_AND_BEN = (UserText("anna", ("hello there", "again")), UserText("ben", ("hi",)))
ROWS = [
    {"user": "ben", "text": "hi", "time": 1},
    {"user": "anna", "text": "hello there", "time": 2},
    {"user": "anna", "text": "again", "time": 3},
    {"user": "anna", "text": "  ", "time": 4},
]


def test_a_folder_has_one_user_per_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfhi\r\n")
    (tmp_path / "a.md").write_text("hello", encoding="utf-8")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    assert read(tmp_path) == (UserText("a.md", ("hello",)), UserText("b.txt", ("hi\r\n",)))


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")
    assert read(path) == read(str(path)) == ANNA_AND_BEN


def test_json_lines_keep_line_separators_inside_strings(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"user": 7, "text": "a\u2028b"}\n{"user": 7, "text": null}', encoding="utf-8")
    assert read(path) == (UserText("7", ("a\u2028b",)),)


def test_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet") == ANNA_AND_BEN

    parquet.write_table(arrow.table({"name": ["a"], "text": ["b"]}), tmp_path / "columns.parquet")
    with pytest.raises(InvalidCorpus, match="no column user; it has name, text"):
        read(tmp_path / "columns.parquet")

    parquet.write_table(arrow.table({"user": ["a"], "text": [1]}), tmp_path / "types.parquet")
    with pytest.raises(InvalidCorpus, match="row 1: text must be a string, got int"):
        read(tmp_path / "types.parquet")

    (tmp_path / "cut.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-9])
    with pytest.raises(InvalidCorpus, match="not a readable Parquet file"):
        read(tmp_path / "cut.parquet")


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_module(name: str) -> Any:
        raise ModuleNotFoundError(name)

    (tmp_path / "t.parquet").touch()
    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(InvalidCorpus, match="pip install"):
        read(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    "lines",
    [
        [
            "31/12/2024, 21:41 - Messages are end-to-end encrypted.",
            "31/12/2024, 21:41 - ben: hi",
            "31/12/2024, 21:42 - anna: hello there",
            "1/1/2025, 00:00 - anna: <Media omitted>",
            "1/1/2025, 00:01 - anna: again",
        ],
        [
            "[31.12.24, 21:41:05] ben: hi",
            "\u200e[31.12.24, 21:41:09] ben: \u200eimage omitted",
            "[12/31/24, 9:42:00\u202fPM] anna: hello there",
            "[12/31/24, 9:42:00 PM] anna: again",
        ],
    ],
)
def test_whatsapp_exports(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "chat.txt").write_text("\r\n".join(lines), encoding="utf-8")
    assert read(tmp_path / "chat.txt") == ANNA_AND_BEN


def test_whatsapp_messages_run_over_lines(tmp_path: Path) -> None:
    (tmp_path / "chat.txt").write_text("1/1/25, 10:00 - a: one\ntwo: three\n", encoding="utf-8")
    assert read(tmp_path / "chat.txt") == (UserText("a", ("one\ntwo: three\n",)),)


def test_telegram_export(tmp_path: Path) -> None:
    messages = [
        {"type": "service", "actor": "ben", "text": ""},
        {"from": "ben", "text": "hi"},
        {"from": "anna", "text": [{"type": "bold", "text": "hello"}, " there"]},
        {"from": "anna", "text": ["again", {"type": "phone", "text": "+49171"}]},
        {"from": None, "text": "deleted account"},
    ]
    (tmp_path / "result.json").write_text(json.dumps({"messages": messages}), encoding="utf-8")
    assert read(tmp_path / "result.json") == ANNA_AND_BEN


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b"", "no text in"),
        ("t.jsonl", b'{"user": "a", "text": ""}', "no text in"),
        ("t.jsonl", b'{"user": "a", "text": "b"}\n{"user"', "line 2, column 8: not JSON"),
        ("t.jsonl", b"[1]", "line 1: expected an object"),
        (
            "t.jsonl",
            b'{"name": "a", "body": "b"}',
            "no column user and no column text; it has name, body",
        ),
        ("t.jsonl", b'{"user": null, "text": "b"}', "line 1: user must be a name"),
        ("t.jsonl", b'{"user": true, "text": "b"}', "line 1: user must be a name"),
        ("t.jsonl", b'{"user": "a", "text": 3}', "line 1: text must be a string, got int"),
        ("t.jsonl", b'{"user": "a",\xff', "not UTF-8 text: byte 13, line 1"),
        ("t.jsonl", b"[" * 100_000, "nested too deeply"),
        ("result.json", b"{", "not JSON"),
        ("result.json", b"[]", "not a Telegram export"),
        ("result.json", b'{"messages": {}}', "not a Telegram export"),
        ("result.json", b'{"messages": [1, {"from": "a", "text": 5}]}', "no text in"),
        ("notes.txt", b"dear diary", "must be a chat export"),
        ("t.parquet", b"PAR1", "Parquet"),
        ("photo.png", b"\x89PNG", "not a kind of corpus"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidCorpus, match=message) as caught:
        read(tmp_path / name)
    assert name in caught.value.message


def test_a_missing_path_an_empty_folder_and_a_damaged_file_in_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidCorpus, match="there is no file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(InvalidCorpus, match="no text in"):
        read(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xff")
    with pytest.raises(InvalidCorpus, match=r"b\.txt is not UTF-8 text: byte 8, line 2"):
        read(tmp_path)


def test_gathering_gives_the_rest_to_those_with_least() -> None:
    sizes = {"a": 3, "b": 10, "c": 1, "d": 8, "e": 2, "f": 8}
    users = [UserText(name, (name * size,)) for name, size in sizes.items()]
    gathered = gather(users, 3)
    # a joins d (8, before f), e joins f (8), c joins b (10, as f has 10 too and b comes first).
    assert [(user.user, "".join(user.texts)) for user in gathered] == [
        ("b", "b" * 10 + "c"),
        ("d", "d" * 8 + "aaa"),
        ("f", "f" * 8 + "ee"),
    ]
    assert gather(reversed(users), 3) == gathered
    assert gather(users, 6) == tuple(sorted(users, key=lambda user: user.user))


@pytest.mark.parametrize("num_users", [-1, 0, 3])
def test_gathering_more_users_than_there_are_is_refused(num_users: int) -> None:
    with pytest.raises(InvalidCorpus, match=f"{num_users} users are needed and the text has 2"):
        gather(ANNA_AND_BEN, num_users)
