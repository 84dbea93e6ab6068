"""Runs notebooks in the background through nbdev's own runner, each in a process of its own; `#| slow` cells are left out."""
import os
import queue
import subprocess
import sysconfig
import threading
import time
from concurrent.futures import Future
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
waiting, results = queue.SimpleQueue(), {}        # notebooks to run; notebook → `Future` of a `CompletedProcess`
seconds = {}                                      # notebook → how long it took, beside whatever else was running


def run(notebook: str) -> subprocess.CompletedProcess:
    command = [str(Path(sysconfig.get_path('scripts'))/'nbdev_test'), '--path', f'nbs/{notebook}.ipynb', '--n_workers', '0']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONPATH': str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


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
    for notebook in notebooks:
        results[notebook] = Future()
        waiting.put(notebook)
    one_more_worker()


def stop():
    "Those that have not begun are left out."
    while not waiting.empty(): waiting.get_nowait()
