"""What every test wants of its process, set before PyTorch is imported; and notebooks begun while other tests run."""
import os
import signal

import notebook_runner
import pytest

# One thread: a test forks processes, in which OpenMP's other threads would be missing and waited for without end; and two
# processes with two threads each on two cores slow one another down many times over.
os.environ['OMP_NUM_THREADS'] = '1'

# Started in the background by a shell, Python ignores Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Drawn scenes and indexes are kept in a folder of the tests' own."
    folder, before = tmp_path_factory.mktemp('home'), os.environ.get('MULTIMODAL_HOME')
    os.environ['MULTIMODAL_HOME'] = str(folder)
    yield folder
    if before is None: del os.environ['MULTIMODAL_HOME']
    else: os.environ['MULTIMODAL_HOME'] = before


def pytest_collection_modifyitems(items):
    "Notebooks last: they are run by a worker of their own while the other tests run, so that no core is idle."
    items.sort(key=lambda item: item.path.name == 'test_notebooks.py')


def pytest_collection_finish(session):
    wanted = [i.callspec.params['notebook'] for i in session.items if i.path.name == 'test_notebooks.py' and hasattr(i, 'callspec')]
    if not session.config.option.collectonly: notebook_runner.start(wanted)


def pytest_sessionfinish(session): notebook_runner.stop()


def pytest_terminal_summary(terminalreporter):
    "Which notebooks took longest: `--durations` only knows how long a test waited for one."
    slowest = sorted(notebook_runner.seconds.items(), key=lambda item: -item[1])[:10]
    if slowest: terminalreporter.write_line('slowest notebooks: ' + ', '.join(f'{name} {s:.0f} s' for name, s in slowest))
