"""What the parent imports of supervisor, and what it does where that is not enough."""

import subprocess
import sys

import pytest

SHOW = """
import sys
{before}
from worker import lean
{tamper}
lean.import_supervisor()
import worker.machine
import http.client, tempfile, platform
print("xmlrpc.client" in sys.modules, http.client.HTTPConnection.__name__, callable(tempfile.mkstemp))
print(worker.machine.Supervisor.__module__, worker.machine.Supervisor.runforever.__name__)
"""


def show(*, before: str = "", tamper: str = "") -> list[str]:
    code = SHOW.format(before=before, tamper=tamper)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_supervisor_comes_without_its_http_side_and_leaves_no_stand_in_behind():
    """Whoever imports http.client afterwards, like the baton, gets the real one."""
    assert show() == ["False HTTPConnection True", "supervisor.supervisord runforever"]


@pytest.mark.parametrize("wanted", ["del lean.STAND_INS['xmlrpc.client']", "lean.STAND_INS['xmlrpc.client'] = ()"])
def test_a_supervisor_that_wants_more_gets_the_real_modules(wanted):
    """A name that a stand-in lacks is no reason not to start."""
    assert show(tamper=wanted) == ["True HTTPConnection True", "supervisor.supervisord runforever"]


def test_modules_that_are_there_already_are_left_alone():
    """A stand-in never replaces a module that somebody has."""
    assert show(before="import http.client, xmlrpc.client")[0] == "True HTTPConnection True"
