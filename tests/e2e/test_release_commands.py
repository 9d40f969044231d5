"""Releases by the commands, against a real server: what they print, and how they end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from homespun import zoo
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.release_request import (
    Trial,
)
from homespun.protocol.views import ReleaseView
from homespun.tensors.codec import encode_tree
from tests.e2e.processes import Server, assert_fails, homespun, printed

DIGITS = zoo.load("digits")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("releases") / "data")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def models(server: Server) -> tuple[str, list[str]]:
    """A plan and three checkpoints of it."""
    server.client.create_population("people")
    plan = server.client.push_plan(DIGITS.to_bytes()).hash
    trees = (encode_tree(initial_checkpoint(DIGITS.manifest, seed)) for seed in range(3))
    return plan, [server.client.push_checkpoint(tree, plan).hash for tree in trees]


def test_a_release_from_its_beginning_to_its_end(
    server: Server, models: tuple[str, list[str]], tmp_path: Path
):
    here = ("--data", server.data)
    plan, (first, second, third) = models
    release = ("model", "release", "people", plan)
    said = printed(*release, first, "--version", "1.0", "--follow", *here)
    assert "checked\n" in said
    assert said.endswith(f"release 1.0 of {first[:12]}: deployed: the first release of its slot\n")

    terms = tmp_path / "terms.toml"
    terms.write_text(
        "stages = [{ fraction = 0.5, soak_s = 2 }]\n[evaluation.reports]\ngoal = 12\nminimum = 12\n"
    )
    said = printed(*release, second, "--version", "1.1", "--terms", terms, *here)
    assert said == f"release 1.1 of {second[:12]}: evaluating\n"
    said = printed("model", "show", "1.1", *here)
    assert "waits for reports of devices that did not train it" in said
    view = json.loads(printed("model", "show", "1.1", "--json", *here))
    assert view["request"]["evaluation"]["reports"]["goal"] == 12
    assert view["request"]["trial"]["runtime"].startswith("onnxruntime ")
    assert view["incumbent_id"] == server.client.releases()[0].release_id
    assert server.client.tasks()[-1].spec.name == f"evaluate-{view['release_id']}"

    said = printed("model", "hold", view["release_id"][:8], "--reason", "not today", *here)
    assert said == f"release 1.1 of {second[:12]}: held: not today\n"
    busy = homespun(*release, third, "--version", "1.2", *here)
    assert_fails(busy, "conflict", "1.1", "still on its way: held", "hint: ", "rollback")
    said = printed("model", "resume", "1.1", *here)
    assert said == f"release 1.1 of {second[:12]}: evaluating: a person resumed it\n"
    said = printed("model", "rollback", "1.1", *here)
    assert said == f"release 1.1 of {second[:12]}: rolled_back: a person took it back\n"
    assert {task.state for task in server.client.tasks()} == {"stopped"}

    done = homespun("model", "rollback", "1.0", *here)
    assert done.returncode == 1
    assert "held: there is nothing to go back to" in done.stdout
    printed("model", "resume", "1.0", *here)
    listed = json.loads(printed("model", "ls", "--json", *here))["releases"]
    assert [(r["version"], r["state"]) for r in listed] == [
        ("1.0", "deployed"),
        ("1.1", "rolled_back"),
    ]


def test_a_model_is_tried_before_it_is_released(server: Server, models: tuple[str, list[str]]):
    here = ("--data", server.data)
    plan, (first, *_) = models
    release = ("model", "release", "people", plan, first, "--slot", "tried")
    printed(*release, "--version", "t1", *here)
    said = printed("model", "check", "t1", *here)
    assert said.startswith("predictions as recorded; ")
    trial = msgspec.json.decode(printed("model", "check", "t1", "--json", *here), type=Trial)
    ((name, values),) = trial.outputs.items()
    assert 0 < len(values) <= 16
    wrong = {"runtime": "other", "latency_s": 0.0, "outputs": {name: [v + 1 for v in values]}}
    view = server.client.create_release(
        population="people",
        slot="other",
        plan_hash=plan,
        checkpoint=first,
        version="t2",
        trial=wrong,
    )
    assert isinstance(view, ReleaseView)
    assert_fails(homespun("model", "check", "t2", *here), "numeric_failure", "other", "hint: ")


def test_what_people_get_wrong(server: Server, models: tuple[str, list[str]], tmp_path: Path):
    here = ("--data", server.data)
    plan, (first, *_) = models
    release = ("model", "release", "people", plan, first, "--slot", "wrong", "--version", "w")
    terms = tmp_path / "terms.toml"
    for text, part in (
        ("stages = 3", "stages"),
        ("surprise = 1", "surprise"),
        ("stages = [{ fraction = 0.5 }, { fraction = 0.1 }]", "more devices"),
        ("= 1", "TOML"),
    ):
        terms.write_text(text)
        assert_fails(homespun(*release, "--terms", terms, *here), "invalid_config", part)
    assert_fails(
        homespun(*release, "--terms", tmp_path / "none", *here), "invalid_input", "cannot read"
    )
    for verb in ("show", "hold", "resume", "rollback", "check"):
        assert_fails(homespun("model", verb, "nope", *here), "not_found", "nope", "model ls")
    evaluate = ("model", "evaluate", "people", plan, first, "--slot", "wrong")
    assert_fails(homespun(*evaluate, *here), "not_found", "serves nothing", "--incumbent")
    slow = homespun(
        *release,
        "--terms",
        _written(terms, "[limits]\nmax_latency_s = 1e-9\n[watch]\nlatency_s = 1e-10"),
        *here,
    )
    assert slow.returncode == 1
    assert "rejected: a prediction took" in slow.stdout


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
