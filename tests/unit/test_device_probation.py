"""Probation: a new model that breaks is replaced at once, even if it takes its process with it. Real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from homespun.clock import ManualClock
from homespun.device import models as module
from homespun.device.home import SERVING_FILE
from homespun.device.models import CRASHED, Models
from homespun.device.serving import PROBATION, Usage
from homespun.errors import NotFound, StorageFailure
from homespun.plan import features, run
from homespun.plan.suggest import Suggester
from homespun.tensors.codec import decode_tree, encode_tree
from tests.unit.device_server import POPULATION, FakeServer
from tests.unit.test_device_models import FIRST, KEYBOARD, SECOND, WORDS, folder, install, reasons
from tests.unit.test_device_stages import KEY

APP = """
import os, sys
from pathlib import Path
from homespun.device.models import Models
from homespun.plan.suggest import Suggester

models = Models(Path(sys.argv[1]), "tests", (), "salt")
"""
DIES = "Suggester.suggest = lambda *arguments: os._exit(9)\n"
HANGS = """
def hang(*arguments):
    print("begun", flush=True)
    sys.stdin.read()
Suggester.suggest = hang
"""
PREDICT = "print(models.predict('thank you'))\n"


def app(models: Models, *program: str) -> subprocess.CompletedProcess[str]:
    """Another process that predicts."""
    command = [sys.executable, "-c", "".join((APP, *program)), str(models._root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@contextmanager
def in_the_middle(models: Models) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a prediction."""
    process = subprocess.Popen(
        [sys.executable, "-c", "".join((APP, HANGS, PREDICT)), str(models._root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def server() -> FakeServer:
    return FakeServer(ManualClock())


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path / "models", POPULATION, (KEY,), "salt")


@pytest.fixture
def updated(models: Models, server: FakeServer) -> Models:
    """Two releases, the second one on probation."""
    install(models, server, server.release(KEYBOARD, FIRST, 1, release_id="a"))
    install(models, server, server.release(KEYBOARD, SECOND, 2, release_id="b"))
    return models


def served(models: Models) -> str | None:
    active = models.slots("default").active
    return active.release_id if active else None


def usage(models: Models) -> Usage:
    active = models.slots("default").active
    assert active is not None
    return models.usage("default", active)


def test_a_model_that_ends_the_process_is_replaced(updated: Models):
    done = app(updated, DIES, PREDICT)
    assert (done.returncode, done.stdout) == (9, "")
    assert app(updated, PREDICT).stdout.startswith("[Suggestion(")
    assert served(updated) == "a"
    assert reasons(updated) == [CRASHED]


def test_the_device_notices_the_crash_though_the_app_never_comes_back(updated: Models):
    app(updated, DIES, PREDICT)
    updated.settle()
    assert served(updated) == "a"
    assert updated.unserved() == []


def test_without_another_model_it_is_withdrawn(models: Models, server: FakeServer):
    install(models, server, server.release(KEYBOARD, FIRST, 1, release_id="a"))
    app(models, DIES, PREDICT)
    with pytest.raises(NotFound):
        models.predict("thank you")
    assert not install(models, server, server.release(KEYBOARD, FIRST, 2, release_id="a"))
    assert install(models, server, server.release(KEYBOARD, SECOND, 3, release_id="b"))
    assert models.predict("thank you")


def test_a_prediction_under_way_elsewhere_is_no_crash_until_its_process_dies(updated: Models):
    with in_the_middle(updated) as process:
        after = updated.predict("thank you")
        assert served(updated) == "b"
        process.kill()
        process.wait()
        before = updated.predict("thank you")
    assert served(updated) == "a"
    assert before != after


def test_a_number_of_a_process_that_is_used_again_hides_no_crash(
    updated: Models, monkeypatch: pytest.MonkeyPatch
):
    with in_the_middle(updated):
        monkeypatch.setattr("homespun.device.serving._began_at", lambda pid: 1e12 * bool(pid))
        updated.settle()  # the number is that of another process now
    assert reasons(updated) == [CRASHED]


def test_off_probation_there_are_no_notes(updated: Models):
    for _ in range(PROBATION):
        updated.predict("thank you")
    app(updated, DIES, PREDICT)
    updated.settle()
    assert (served(updated), reasons(updated)) == ("b", [])


def test_what_the_app_breaks_off_is_not_the_models_failure(updated: Models):
    interrupted = """
def interrupted(*arguments):
    raise KeyboardInterrupt
Suggester.suggest = interrupted
try:
    models.predict("thank you")
except KeyboardInterrupt:
    print("interrupted")
"""
    assert app(updated, interrupted).stdout == "interrupted\n"
    updated.settle()
    assert updated.predict("thank you")
    assert (served(updated), reasons(updated)) == ("b", [])


def test_a_failure_of_what_is_not_served_any_more_changes_nothing(
    updated: Models, server: FakeServer
):
    old = updated.slots("default").active
    assert old is not None
    install(updated, server, server.release(KEYBOARD, FIRST, 3, release_id="c"))
    updated.withdraw("default", old, ValueError())  # found by a process that had not noticed
    assert (served(updated), reasons(updated)) == ("c", [])


def test_any_exception_of_the_runtime_is_a_failure(
    updated: Models, monkeypatch: pytest.MonkeyPatch
):
    right = Suggester.suggest

    def broken(self: Suggester, *arguments: object) -> object:
        if served(updated) == "b":
            raise MemoryError
        return right(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Suggester, "suggest", broken)
    assert updated.predict("thank you")
    assert (served(updated), reasons(updated)) == ("a", ["MemoryError"])


def failing_after(word: str) -> bytes:
    """A checkpoint like FIRST that evaluates and starts well, and overflows when `word` is the last one.

    One dimension of the embedding is taken out of the model; then the word alone has a place in it, which the linear
    path to the output multiplies.
    """
    tree = {name: array.copy() for name, array in decode_tree(FIRST).items()}
    embedding, direct = tree["embedding.weight"], tree["direct"]
    width = embedding.shape[1]
    embedding[:, 0] = 0
    direct[:, 0] = 0
    tree["projection"][:, 0] = 0
    for name in ("input", "direct"):
        tree[name][[0, width]] = 0
    direct[0, 1:] = 1e30
    embedding[WORDS.encode(word)[-1], 0] = 1e30
    return encode_tree(tree)


def test_what_passes_evaluation_and_its_trial_may_still_fail_in_use(
    models: Models, server: FakeServer
):
    install(models, server, server.release(KEYBOARD, SECOND, 1, release_id="a"))
    before = models.predict("the hat")
    bad = failing_after("hat")
    rows = features.encode(KEYBOARD.manifest, KEYBOARD.assets, [{"text": "thank you for the cat"}])
    good, found = (run.evaluate(KEYBOARD, decode_tree(data), rows) for data in (FIRST, bad))
    assert found["loss"].mean == pytest.approx(good["loss"].mean, rel=0.01)
    assert install(models, server, server.release(KEYBOARD, bad, 2, release_id="b"))
    assert models.predict("the cat")
    assert models.predict("the hat and")
    assert served(models) == "b"
    assert models.predict("the hat") == before  # the answer of the model before, in the same call
    assert (served(models), reasons(models)) == ("a", ["the model's scores are not finite"])


def test_a_disk_that_cannot_be_written_keeps_nobody_from_predicting(updated: Models):
    connection = updated._record._db()
    assert connection is not None
    connection.execute("PRAGMA query_only = ON")
    assert updated.predict("thank you")
    connection.execute("PRAGMA query_only = OFF")
    assert usage(updated).num_predictions == 0
    assert updated.predict("thank you")
    assert usage(updated).num_predictions == 1


def test_several_processes_predict_at_once(updated: Models):
    program = APP + "for _ in range(60): models.predict('thank you')\n"
    command = [sys.executable, "-c", program, str(updated._root)]
    others = [subprocess.Popen(command) for _ in range(2)]
    for _ in range(30):
        updated.predict("thank you")
    assert [process.wait() for process in others] == [0, 0]
    updated.close()
    assert (served(updated), reasons(updated)) == ("b", [])
    assert (
        usage(updated).num_predictions == 150
    )  # through the probation, and what is batched after it


def test_several_processes_find_the_failure_at_once(updated: Models):
    (folder(updated) / module.CHECKPOINT_FILE).write_bytes(b"damaged by the disk")
    command = [sys.executable, "-c", APP + PREDICT, str(updated._root)]
    apps = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate()[0] for process in apps}
    assert answers == {f"{updated.predict('thank you')}\n"}  # all get that of the model before
    assert served(updated) == "a"
    assert len(reasons(updated)) == 1


def test_statistics_survive_the_end_of_the_process(updated: Models):
    app(updated, f"for _ in range({PROBATION} + 7): models.predict('thank you')\n")
    found = usage(updated)
    assert (found.num_predictions, found.num_failures) == (PROBATION + 7, 0)
    assert found.mean_s is not None
    assert 0 < found.mean_s < 1


def test_a_fork_has_a_connection_of_its_own(updated: Models):
    updated.predict("thank you")
    before, child = updated._record._db(), os.fork()
    if child == 0:
        try:
            updated.predict("thank you")
        finally:
            os._exit(int(updated._record._db() is before))
    assert os.waitpid(child, 0)[1] == 0
    assert usage(updated).num_predictions == 2


def test_a_damaged_record_is_told(updated: Models):
    updated.close()
    (updated._root / SERVING_FILE).write_bytes(b"damaged by the disk" * 100)
    with pytest.raises(StorageFailure, match="serving"):
        updated.predict("thank you")
