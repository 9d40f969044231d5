"""Real text that every machine already has: the documentation inside the Python installation.

`docstrings()` plays the private text of people: one standard-library module or package is one user,
who has a subject and a style of its own. `public_text()` plays what a server may see: the language
reference's topics, and the help texts of the modules that are compiled into the interpreter. The
two do not overlap: what has a source file is a user's, what has none is public. Source files are
parsed, never imported or executed.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType

from homespun.corpora.sources import UserText
from homespun.corpora.tokenizer import words
from homespun.errors import InvalidCorpus

# Tests, other people's code, and data: not what the module's author wrote to be read.
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "_vendor", "dist-packages", "ensurepip", "idle_test", "lib2to3",
        "pydoc_data", "site-packages", "test", "tests",
    }
)  # fmt: skip
TOPICS = Path("pydoc_data", "topics.py")
INSTALL_HINT = "use a full Python installation, or give a text of your own"

PLAIN_WORD = re.compile(r"[\"'(]*[A-Za-z]+(?:['-][A-Za-z]+)*[\"')]*[.,;:!?]*")


def docstrings(*, min_words: int = 800, library: Path | None = None) -> tuple[UserText, ...]:
    """One user per top-level module or package of the standard library, with its docstrings' prose.

    Sorted by name; only modules with at least `min_words` words; a docstring that a module repeats
    counts once. `library` is the folder with the modules, by default this interpreter's. Raises
    InvalidCorpus when it has no such modules.
    """
    library = library or standard_library()
    texts: dict[str, dict[str, None]] = {}
    for file in _sources(library):
        user = file.relative_to(library).parts[0].removesuffix(".py")
        texts.setdefault(user, {}).update(dict.fromkeys(_docstrings_of(file)))
    users = tuple(UserText(user, tuple(texts[user])) for user in sorted(texts))
    users = tuple(user for user in users if _num_words(user) >= min_words)
    if not users:
        raise InvalidCorpus(
            f"no module under {library} has documentation strings of {min_words} words",
            hint=INSTALL_HINT,
        )
    return users


def public_text(*, library: Path | None = None) -> tuple[str, ...]:
    """The prose of the language reference's topics, then of the compiled-in modules' help.

    Both sorted by name. `library` is the folder that holds `pydoc_data/topics.py`. Raises
    InvalidCorpus when that file is missing or not in the known form.
    """
    path = (library or standard_library()) / TOPICS
    try:
        tree = _parse(path)
    except OSError as error:
        raise InvalidCorpus(
            f"{path} cannot be read, the language reference's topics: {error.strerror or error}",
            hint=INSTALL_HINT,
        ) from error
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            try:
                topics: dict[str, str] = ast.literal_eval(node.value)
            except ValueError:
                break  # not the plain table of strings that it has always been
            texts = [topics[name] for name in sorted(topics)]
            return tuple(prose(text) for text in [*texts, *_compiled_in_help()])
    raise InvalidCorpus(f"{path} does not define topics", hint=INSTALL_HINT)


def _compiled_in_help() -> list[str]:
    """What `help()` says about modules without a source file, their functions and classes."""
    found: dict[str, None] = {}  # a text that several members share counts once
    for name in sorted(sys.builtin_module_names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some are deprecated; their help is still English
            module = importlib.import_module(name)
        documented: list[object] = [module]
        for _, member in sorted(vars(module).items()):
            # Only what the interpreter put there: a program may have replaced sys.stdout and so on.
            if isinstance(member, type) and member.__module__ == name:
                documented += [member, *(value for _, value in sorted(vars(member).items()))]
            elif isinstance(member, BuiltinFunctionType):
                documented.append(member)
        for thing in documented:
            text = getattr(thing, "__doc__", None)
            if isinstance(text, str):
                found.setdefault(text)
    return list(found)


def standard_library() -> Path:
    """The folder of this interpreter's standard library, as source files."""
    return Path(sysconfig.get_path("stdlib"))


def prose(text: str) -> str:
    """`text` without what is not prose: doctests, code blocks after `::`, grammar, tables, rules.

    Dropped are a block of lines from `>>>` to the next blank line, a block that is indented deeper
    than a line that ends with `::`, and every line of which less than half is plain words. An empty
    line takes the place of each, so that what is left does not run together.
    """
    kept: list[str] = []
    code_indent = -1  # of the line that ended with `::`; its block is what is indented deeper
    in_doctest = False
    for line in text.splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if not stripped:
            in_doctest = False
            kept.append("")
            continue
        if indent <= code_indent:
            code_indent = -1
        in_doctest = in_doctest or stripped.startswith(">>>")
        if in_doctest or code_indent >= 0 or not _is_prose(stripped):
            kept.append("")
            continue
        if stripped.endswith("::"):
            code_indent = indent
        kept.append(line)
    return "\n".join(kept)


def _is_prose(line: str) -> bool:
    if "::=" in line:
        return False
    chunks = line.removeprefix("* ").removeprefix("- ").split()
    return 2 * sum(PLAIN_WORD.fullmatch(chunk) is not None for chunk in chunks) >= len(chunks)


def _sources(folder: Path) -> Iterator[Path]:
    """The Python files below `folder`, sorted, without skipped folders; none if unreadable."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.suffix == ".py":
            yield entry
        elif entry.name not in SKIPPED_FOLDERS and entry.is_dir():
            yield from _sources(entry)


def _docstrings_of(file: Path) -> Iterator[str]:
    """The prose of a file's docstrings, in their order; nothing for a file that does not parse."""
    try:
        tree = _parse(file)
    except OSError:
        return
    if tree:
        yield from _docstrings_below(tree)


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = prose(ast.get_docstring(node) or "")
        if text.strip():
            yield text
    for child in ast.iter_child_nodes(node):
        # Only statements hold documented things; the expressions are most of the tree.
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from _docstrings_below(child)


def _parse(file: Path) -> ast.Module | None:
    """The syntax tree, or None: the library holds a few files that are wrong on purpose."""
    source = file.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files are not our business
            try:
                return ast.parse(source)
            except SystemError:
                # CPython 3.11 miscounts its depth if the garbage collector runs code that parses too, as the
                # printing of a traceback does (python/cpython#106905). The garbage is gone now.
                return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def _num_words(user: UserText) -> int:
    return sum(len(words(text)) for text in user.texts)
