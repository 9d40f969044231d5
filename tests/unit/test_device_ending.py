"""Another process ends, and who waits for it goes on, whatever happened before."""

import subprocess
import sys
import threading

import psutil
import pytest

from homespun.device.ending import end


@pytest.fixture
def stubborn():
    """A process that does not stop when its standard input ends."""
    program = "import time; print(flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def gone(process):
    try:
        return psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_process_that_ends_is_not_killed():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=-3)
    assert process.stdin is not None
    process.stdin.close()
    end(process, 60.0)
    assert process.returncode == 1


def test_one_that_does_not_is(stubborn):
    end(stubborn, 0.1)
    assert stubborn.returncode < 0


def test_an_interrupted_poll_lets_nobody_wait_for_ever(stubborn):
    lock = stubborn._waitpid_lock
    lock.acquire()  # as a KeyboardInterrupt in the middle of `poll` leaves it
    waiting = threading.Thread(target=end, args=(stubborn, 0.1), daemon=True)
    waiting.start()
    waiting.join(60.0)
    went_on = not waiting.is_alive()
    lock.release()
    assert went_on
    assert gone(stubborn)
