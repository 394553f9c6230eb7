"""The pool of ranks that the tests share."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.small import ENV, ROOT

KILLED = """
import os, sys
from tests import pool, test_pool
if __name__ == "__main__":
    print(*pool.Pool(2).run(2, test_pool.number_of_process), flush=True)
    os.kill(os.getpid(), int(sys.argv[1]))
"""


def number_of_process(comm):
    return os.getpid()


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_a_killed_parent(number, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script), str(int(number))], cwd=ROOT, env={**ENV, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    ranks = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -number and len(ranks) == 2
    end = time.monotonic() + 10
    while any(map(runs, ranks)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(runs, ranks))
