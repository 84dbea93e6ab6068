"""Runs notebooks in the background through nbdev's own runner, each in a process of its own; `#| slow` cells are left out.

A process that has imported the large libraries already is forked for each of them: importing takes longer than many a notebook.
"""
import multiprocessing
import os
import queue
import sys
import tempfile
import threading
import time
from collections import namedtuple
from concurrent.futures import Future
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ['torch', 'torchvision', 'matplotlib.pyplot', 'seaborn', 'nltk', 'nbdev.test']   # none starts a thread when imported
waiting, results = queue.SimpleQueue(), {}        # notebooks to run; notebook → `Future` of a `Ended`
seconds = {}                                      # notebook → how long it took, beside whatever else was running
running = set()
forks = multiprocessing.get_context('forkserver')
Ended = namedtuple('Ended', 'returncode output')


def run_here(notebook: str, output: str):
    "In a process of its own."
    with open(output, 'w') as f:
        for stream in 1, 2: os.dup2(f.fileno(), stream)
    os.chdir(ROOT)
    os.environ.update(MPLBACKEND='agg', PYTHONPATH=str(ROOT))
    sys.path.insert(0, str(ROOT))
    import matplotlib
    from nbdev.test import nbdev_test
    matplotlib.use('agg')
    multiprocessing.set_start_method(None, force=True)           # the system's own way for what notebooks start
    nbdev_test(path=f'nbs/{notebook}.ipynb', n_workers=0)


def run(notebook: str) -> Ended:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)/'output'
        process = forks.Process(target=run_here, args=(notebook, str(output)))
        process.start()
        running.add(process)
        process.join(600)
        late = process.is_alive()
        if late: process.kill()
        process.join()
        running.discard(process)
        return Ended(process.exitcode, output.read_text() + late*'\nnot done after 600 s')


def work():
    "One after the other, until there are no more."
    while True:
        try: notebook = waiting.get_nowait()
        except queue.Empty: return
        began = time.monotonic()
        try: results[notebook].set_result(run(notebook))
        except BaseException as e: results[notebook].set_exception(e)
        seconds[notebook] = time.monotonic() - began


def one_more_worker(): threading.Thread(target=work, daemon=True).start()


def start(notebooks: list):
    "Begin with one worker; the other core is for the other tests."
    forks.set_forkserver_preload(LIBRARIES)
    for notebook in notebooks:
        results[notebook] = Future()
        waiting.put(notebook)
    one_more_worker()


def stop():
    "Those that have not begun are left out, and those that run are ended, as nobody waits for them."
    while not waiting.empty(): waiting.get_nowait()
    for process in list(running): process.kill()
