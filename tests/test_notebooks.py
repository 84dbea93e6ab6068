"""Every notebook through nbdev's own runner: begun when the session begins, and waited for here."""
import notebook_runner
import pytest

NOTEBOOKS = sorted(p.stem for p in (notebook_runner.ROOT/'nbs').glob('*.ipynb'))


@pytest.fixture(scope='module', autouse=True)
def second_worker():
    "All other tests are done, so both cores are free now."
    notebook_runner.one_more_worker()


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_notebook(notebook):
    r = notebook_runner.results[notebook].result()
    assert r.returncode == 0 and 'Success' in r.output, r.output[-6000:]
