"""What every test wants of its process, set before PyTorch is imported."""
import os
import signal

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
