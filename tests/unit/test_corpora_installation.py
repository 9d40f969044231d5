"""Prose out of Python sources: a small library written here, and the real one."""

import ast
from pathlib import Path

import pytest

from homespun.corpora import UserText, Vocabulary, docstrings, public_text, words
from homespun.corpora.installation import prose
from homespun.errors import InvalidCorpus

MODULE = '''
"""Tools for tea."""

raise SystemExit("this file must never be executed")

class Pot:
    """A pot of tea.

    >>> Pot().pour()
    'tea'
    """

    async def pour(self):
        """Pour one cup."""

    def fill(self):
        "Pour one cup."
        x = "\\d"  # an invalid escape: a warning for the compiler, nothing for us
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    files = {
        "tea.py": MODULE,
        "broken.py": "def (:",
        "nul.py": "\0",
        "latin.py": "# coding: latin-1\n'Caf\xe9 au lait.'\n",
        "garden/__init__.py": '"The garden package."',
        "garden/roses/red.py": "def bloom():\n    'Bloom all summer.'",
        "garden/test/red.py": '"Tests are not read."',
        "site-packages/other.py": '"Not ours."',
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(source.encode("latin-1"))
    return tmp_path


def test_one_module_is_one_user(library: Path) -> None:
    assert docstrings(min_words=1, library=library) == (
        UserText("garden", ("The garden package.", "Bloom all summer.")),
        UserText("latin", ("Caf\xe9 au lait.",)),
        UserText("tea", ("Tools for tea.", "A pot of tea.\n\n\n", "Pour one cup.")),
    )


def test_small_modules_are_left_out(library: Path) -> None:
    assert [user.user for user in docstrings(min_words=6, library=library)] == ["garden", "tea"]
    with pytest.raises(InvalidCorpus, match="documentation strings of 99 words"):
        docstrings(min_words=99, library=library)


def test_prose_is_what_remains() -> None:
    text = """\
Return the sum. For example::

    total = add(
        the first number
    )

Then the text goes on:

   stmt ::= expression

=====  =====
 1      2
=====  =====

>>> add(1, 2)
here is the output

* a list item stays
    so does an indented line"""
    assert prose(text).split("\n") == [
        "Return the sum. For example::", *[""] * 5, "Then the text goes on:", *[""] * 10,
        "* a list item stays", "    so does an indented line",
    ]  # fmt: skip


def test_topics_are_read_not_imported(tmp_path: Path) -> None:
    (tmp_path / "pydoc_data").mkdir()
    path = tmp_path / "pydoc_data" / "topics.py"
    path.write_text(
        "topics = {'b': 'Second ' 'topic.', 'a': r'''First topic.'''}\nraise SystemExit\n"
    )
    assert public_text(library=tmp_path)[:2] == ("First topic.", "Second topic.")
    path.write_text("subjects = {}")
    with pytest.raises(InvalidCorpus, match="does not define topics"):
        public_text(library=tmp_path)
    path.write_text("topics = {'a': call()}")
    with pytest.raises(InvalidCorpus, match="does not define topics"):
        public_text(library=tmp_path)


def test_missing_topics_are_explained(tmp_path: Path) -> None:
    with pytest.raises(InvalidCorpus, match="cannot be read, the language reference's topics"):
        public_text(library=tmp_path)


def test_this_installation_has_enough_for_a_fleet() -> None:
    users = docstrings()
    assert len(users) >= 24
    assert users == tuple(sorted(users, key=lambda user: user.user))
    assert not {"test", "pydoc_data", "site-packages"} & {user.user for user in users}
    text = " ".join(text for user in users for text in user.texts)
    assert len(words(text)) > 100_000
    assert ">>>" not in text
    vocabulary = Vocabulary.build(public_text(), 4000)
    assert len(vocabulary.words) > 3000
    ids = vocabulary.encode(text)
    assert 0.05 < ids.count(vocabulary.unk_id) / len(ids) < 0.2


def test_a_parser_that_was_disturbed_is_asked_again(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPython 3.11 raises SystemError if garbage is collected, and its finalizers parse, inside `ast.parse`."""
    expected, parse, disturbed = docstrings(min_words=1, library=library), ast.parse, []

    def disturbed_once(source: bytes) -> ast.Module:
        if source not in disturbed:
            disturbed.append(source)
            raise SystemError("AST constructor recursion depth mismatch (before=150, after=200)")
        return parse(source)

    monkeypatch.setattr(ast, "parse", disturbed_once)
    assert docstrings(min_words=1, library=library) == expected
    assert disturbed
