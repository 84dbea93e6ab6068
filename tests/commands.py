"""Commands as users start them, each in a process of its own."""
import subprocess
import sysconfig
from pathlib import Path

SCRIPTS = Path(sysconfig.get_path('scripts'))


def call(command, *args):
    "Exit status, what it printed, and what it complained of; a traceback is never what a user should see."
    r = subprocess.run([SCRIPTS/command, *map(str, args)], capture_output=True, text=True, timeout=120)
    assert 'Traceback' not in r.stderr, r.stderr
    return r.returncode, r.stdout, r.stderr
