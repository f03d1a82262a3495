"""How a process ends."""

import subprocess
import sys

import pytest

from tests.distributed.launching import ROOT


@pytest.mark.parametrize(("ending", "code"), [("pass", 0), ("raise UserError('u')", 2), ("raise KeyError('k')", 1)])
@pytest.mark.launches
def test_a_thread_that_still_works_does_not_abort_the_end(ending: str, code: int) -> None:
    """Python's own shutdown ends such a process by SIGABRT, with "terminate called without an active exception"."""
    script = f"""
import threading, time, torch
from data.errors import UserError
from loop.guard.process import end_process, exit_codes
def work():
    x = torch.ones(4, requires_grad=True)
    while True:
        x.sum().backward()
@exit_codes()
def main(argv):
    for _ in range(4):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.3)
    print("written", end="")
    {ending}
end_process(main)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (code, "written"), done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
