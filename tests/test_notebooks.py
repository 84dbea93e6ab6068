"""Every notebook through nbdev's own runner, two at a time, each in a process of its own; `#| slow` cells are left out."""
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))


def run(notebook: str) -> subprocess.CompletedProcess:
    command = [str(Path(sysconfig.get_path('scripts'))/'nbdev_test'), '--path', f'nbs/{notebook}.ipynb', '--n_workers', '0']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONPATH': str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope='module')
def results(request):
    "All notebooks that this session asks for, started at once on two workers; a test waits for its own."
    wanted = [i.callspec.params['notebook'] for i in request.session.items
              if i.path == request.path and hasattr(i, 'callspec')]
    pool = ThreadPoolExecutor(2)
    yield {n: pool.submit(run, n) for n in wanted}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize('notebook', [p.stem for p in NOTEBOOKS])
def test_notebook(notebook, results):
    r = results[notebook].result()
    assert r.returncode == 0 and 'Success' in r.stdout, (r.stdout + r.stderr)[-6000:]
