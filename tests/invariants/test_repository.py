"""The repository as a whole: no trace of one machine, documents that name what exists, a ./dev that explains itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEV = ROOT / "dev"

# A path that exists on one machine only.
MACHINE_PATH = re.compile(r"(?<![\w.$}~-])/(?:root|work|opt|home/\w+|Users/\w+)/[\w.]")


def repository_files() -> list[Path]:
    """Tracked files and those about to be: what git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


def text_of(file: Path) -> str:
    content = file.read_bytes()
    return "" if b"\0" in content else content.decode(errors="replace")


def commands_of_dev() -> set[str]:
    """What the `case` at the end of the script accepts."""
    cases = DEV.read_text().split("case $command in")[1]
    labels = re.findall(r"^    ([a-z][a-z |-]*)\)", cases, re.MULTILINE)
    return {name for label in labels for name in label.split(" | ")}


def run_dev(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    shell = shutil.which("sh")
    assert shell is not None
    environment = {"PATH": str(path)} if path else None
    return subprocess.run(
        [shell, str(DEV), *arguments], capture_output=True, text=True, env=environment
    )


def test_no_file_knows_a_machine():
    found = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in repository_files()
        for match in MACHINE_PATH.finditer(text_of(file))
    ]
    assert not found, "\n".join(found)


def test_machine_paths_are_recognised():
    for start in ("root", "home/ada", "Users/ada", "opt"):
        assert MACHINE_PATH.search(f'data = "/{start}/corpus"')
    for harmless in ("/v1/work/items", "$HOME/home/x", "and/or", "/tmp/x", "~/opt/x"):
        assert not MACHINE_PATH.search(harmless)


def test_documents_name_commands_of_dev_that_exist():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]
    named = {
        (page.name, name)
        for page in pages
        for name in re.findall(r"\./dev ([a-z]+)", page.read_text())
    }
    assert named
    assert {(page, name) for page, name in named if name not in commands_of_dev()} == set()


def test_relative_links_of_documents_lead_somewhere():
    dead = [
        f"{page.relative_to(ROOT)} -> {target}"
        for page in repository_files()
        if page.suffix == ".md"
        for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not dead, "\n".join(dead)


def test_generated_pages_are_current():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_dev_explains_itself():
    done = run_dev()
    assert done.returncode == 0
    assert [
        name for name in ("demo", "test", "check", "bench", "docs") if name not in done.stdout
    ] == []


def test_dev_finds_a_python():
    done = run_dev("python")
    assert done.returncode == 0
    version = subprocess.run([done.stdout.strip(), "--version"], capture_output=True, text=True)
    assert version.stdout.startswith("Python 3.")


def test_dev_refuses_what_it_does_not_know():
    done = run_dev("tset")
    assert done.returncode == 2
    assert 'no command "tset"' in done.stderr


def fake_python(folder: Path, *, old: bool) -> Path:
    """A folder with a python3 that is either too old or cannot make environments."""
    question = "sys.version_info" if old else "import ensurepip"
    program = folder / "python3"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *"{question}"*) exit 1;; --version) echo Python 3.9.2;; esac\n'
    )
    program.chmod(0o755)
    return folder


def test_dev_without_python_says_so(tmp_path: Path):
    done = run_dev("python", path=tmp_path)
    assert done.returncode == 1
    assert "no Python found" in done.stderr
    assert "hint:" in done.stderr


def test_dev_with_an_old_python_says_so(tmp_path: Path):
    done = run_dev("python", path=fake_python(tmp_path, old=True))
    assert done.returncode == 1
    assert "Python 3.9.2 is too old" in done.stderr


def test_dev_without_venv_says_so(tmp_path: Path):
    done = run_dev("python", path=fake_python(tmp_path, old=False))
    assert done.returncode == 1
    assert "python3-venv" in done.stderr
