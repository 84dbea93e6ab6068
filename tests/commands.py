"""
Commands as users start them, each in a process of its own: a copy of one that has already imported what all of them need,
which takes seconds.
"""
import multiprocessing
import os
import runpy
import sys
import sysconfig
import tempfile
from pathlib import Path

SCRIPTS = Path(sysconfig.get_path('scripts'))
copies = multiprocessing.get_context('forkserver')
copies.set_forkserver_preload(['multimodal.cli', 'multimodal.finder', 'multimodal.painter', 'matplotlib.pyplot'])


def run(command, args, env, folder, out, err):
    "In the new process: the script, with its words, and all that it prints into two files."
    for fd, path in (1, out), (2, err): os.dup2(os.open(path, os.O_WRONLY), fd)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [str(SCRIPTS/command), *args]
    runpy.run_path(sys.argv[0], run_name='__main__')


def call(command, *args):
    "Exit status, what it printed, and what it complained of; a traceback is never what a user should see."
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder)/'out', Path(folder)/'err'
        for path in out, err: path.touch()
        process = copies.Process(target=run, args=(command, [str(a) for a in args], dict(os.environ), os.getcwd(), out, err))
        process.start()
        process.join(120)
        assert process.exitcode is not None, f'{command} has not ended: {err.read_text()}'
        said, complained = out.read_text(), err.read_text()
    assert 'Traceback' not in complained, complained
    return process.exitcode, said, complained
