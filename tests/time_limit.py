"""Stops work, with every process that it has started, when its time is up."""

import contextlib
import ctypes
import os
import pathlib
import signal
import subprocess
import time

# Of <linux/prctl.h>.
PR_SET_CHILD_SUBREAPER = 36


class TimeIsUp(Exception):
    """Work has reached its limit."""


@contextlib.contextmanager
def time_limit(seconds):
    """Raises `TimeIsUp` in the main thread after so many seconds, at least 1."""
    # Processes whose parent has ended become children of this one, so that they are found too.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGALRM, stop_work)
    signal.alarm(int(seconds))
    try:
        yield
    finally:
        signal.alarm(0)


def stop_work(_signal, _frame):
    # Twice: a process may have started another in the meantime.
    for _ in range(2):
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    raise TimeIsUp


def descendants(ancestor):
    """Ids of all processes below one, nearest first."""
    children = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in brackets, may contain anything.
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = list(children.get(ancestor, []))
    for pid in found:
        found += children.get(pid, [])
    return found


def test_everything_that_was_started_is_stopped():
    started = time.monotonic()
    try:
        with time_limit(1):
            # The inner shell ends at once, and leaves its child behind.
            subprocess.run(["sh", "-c", "sh -c 'sleep 60 &'; sleep 60"])
        raise AssertionError("the limit is not kept")
    except TimeIsUp:
        pass
    time.sleep(0.1)
    assert time.monotonic() - started < 10
    assert descendants(os.getpid()) == [], "a process is left behind"


if __name__ == "__main__":
    test_everything_that_was_started_is_stopped()
