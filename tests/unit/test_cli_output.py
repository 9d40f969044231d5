"""What people see when something goes wrong, and how numbers are shown."""

import os
import subprocess
import sys

import msgspec
import pytest

from homespun.cli.output import percent, size
from homespun.cli.tasks import print_rounds
from homespun.learning.metrics import watched_names
from homespun.protocol.messages import TaskKind
from homespun.protocol.round import RoundState
from homespun.protocol.views import MetricView, RoundSummary


def homespun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "homespun.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_660_000, "1.7 MB"), (2.5e12, "2500.0 GB")],
)
def test_sizes_are_for_people(value: float, shown: str):
    assert size(value) == shown


def test_a_missing_share_is_a_dash():
    assert percent(None) == "-"
    assert percent(0.148) == "14.8 %"


def test_rounds_of_every_kind_fit_one_table(capsys, monkeypatch):
    monkeypatch.setattr("homespun.cli.output.out.width", 300)
    train = RoundSummary(
        task_id="t",
        task_name="train",
        kind=TaskKind.TRAIN,
        round_number=2,
        attempt=1,
        state=RoundState.SCRUBBED,
        num_assigned=5,
        num_carried=1,
        num_reported=4,
        metrics={"loss": MetricView(sum=1.0, count=2.0)},
    )
    watch = msgspec.structs.replace(
        train,
        task_name="watch",
        kind=TaskKind.EVALUATE,
        num_carried=0,
        metrics={name: MetricView(sum=0.5, count=10.0) for name in watched_names()},
    )
    print_rounds([train, watch])
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "4/5+1" in first
    assert "loss 0.500" in first
    assert "4/5 " in second
    assert "stage.primary 5.0 %, stage.latency 50.0 ms, stage.failed 5.0 %, control" in second


def test_no_command_shows_the_help_and_fails():
    result = homespun()
    assert result.returncode == 2
    assert "demo" in result.stdout + result.stderr


def test_version():
    assert homespun("--version").stdout.strip() == "0.1.0"


def test_a_failure_is_one_line_and_a_hint(tmp_path):
    result = homespun("task", "ls", "--data", str(tmp_path))
    assert result.returncode == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: no server is running in")
    assert lines[0].endswith("[invalid_config]")
    assert lines[1].startswith("  hint: ")
    assert len(lines) == 2


def test_an_unreachable_server_is_named():
    result = homespun("task", "ls", "--server", "http://127.0.0.1:9", "--token", "x")
    assert result.returncode == 1
    assert "no server answers at http://127.0.0.1:9" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot read"),
        ("goal = ", "is not TOML"),
        ('name = "x"', "missing required field"),
        ("\N{SNOWMAN} = 1", "is not TOML"),
    ],
)
def test_a_bad_task_description_is_named(tmp_path, content: str | None, complaint: str):
    file = tmp_path / "task.toml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    result = homespun("task", "create", str(file), "--server", "http://127.0.0.1:9", "--token", "x")
    assert result.returncode == 1
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_of_ours_leaves_a_report_not_a_trace(tmp_path):
    code = (
        "import homespun.cli.main as m, homespun.cli.doctor as d\n"
        "def broken(): raise RuntimeError('boom')\n"
        "d.CHECKS = (broken,)\n"
        "import sys; sys.argv = ['homespun', 'doctor']; m.main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (report,) = tmp_path.glob("homespun-crash-*.txt")
    assert str(report) in result.stderr
    assert "boom" in report.read_text()


def test_doctor_finds_this_machine_fit():
    result = homespun("doctor", "--json")
    assert result.returncode == 0, result.stdout
    assert '"ONNX Runtime"' in result.stdout


def test_a_model_of_the_zoo_can_be_built_and_shown(tmp_path):
    built = homespun("plan", "build", "digits", str(tmp_path / "plan"))
    assert built.returncode == 0, built.stderr
    shown = homespun("plan", "show", str(tmp_path / "plan"))
    assert "52,180 parameters, metrics: top1" in shown.stdout


def test_an_unknown_model_is_refused_with_the_known_ones():
    refused = homespun("plan", "build", "cats", "nowhere")
    assert refused.returncode == 1
    assert "one of: digits, keyboard, keyboard_2018" in refused.stderr
