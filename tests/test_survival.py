"""Whatever happens to a training, what was saved is whole, and the run that goes on from there is the run never stopped."""
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import multimodal.runs
from multimodal.core import UserError
from multimodal.durable import only_one, whole_folder
from multimodal.recipe import caption_loss
from multimodal.tasks import train_run
from multimodal.training import Trainer

from commands import call

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tools'))
import kills                                                                    # noqa: E402


@pytest.fixture(scope='module')
def data(tmp_path_factory): return kills.drawn(tmp_path_factory.mktemp('data')/'shapes')


@pytest.mark.parametrize('name', list(kills.CONFIGS))
def test_killed_at_random_moments_and_resumed_it_is_the_run_never_killed(name, data, tmp_path):
    result = kills.survive(name, data, tmp_path, 4, seed=random.SystemRandom().randrange(10**6))
    assert result['kills'] == 4 and not result['different']


def test_a_resumed_run_that_forgot_something_would_be_noticed(data, tmp_path, monkeypatch):
    "The averaged weights are not loaded: so the test above can fail."
    real = Trainer.load
    def forgetful(self):
        fresh = {k: v.clone() for k, v in self.ema.model.state_dict().items()}
        real(self)
        self.ema.model.load_state_dict(fresh)
    monkeypatch.setattr(Trainer, 'load', forgetful)
    with pytest.raises(AssertionError, match='these differ'): kills.survive('caption', data, tmp_path, 6, seed=1)


DISK = '''
import subprocess, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import test_training as tt
from multimodal.core import UserError

def mount(*options): subprocess.run(['mount', *options], check=True)

def fill(place):
    with open(place/'filler', 'wb', buffering=0) as f:
        try:
            while f.write(bytes(512)): pass
        except OSError: pass

def lose(how, place):
    place.mkdir()
    mount('-t', 'tmpfs', '-o', 'size=400k', 'tmpfs', str(place))
    filled = lambda line: how == 'full' and 'epoch 1' in line and fill(place)
    first = tt.trainer(place/'run', loss=tt.loss_fn if how == 'full' else tt.CtrlC(12), say=filled)
    try: first.fit()
    except (UserError, KeyboardInterrupt) as e: print(e)
    if how == 'closed': mount('-o', 'remount,ro', str(place))
    tt.trainer(place/'run').load()                                        # the last good state can be read
    try: tt.trainer(place/'run').fit(resume=True)
    except UserError as e: print(e)
    assert not [p for p in place.rglob('*.new')]
    if how == 'closed': mount('-o', 'remount,rw', str(place))
    else: (place/'filler').unlink()
    again = tt.trainer(place/'run')
    again.fit(resume=True)
    tt.assert_same(tt.facts(again), tt.facts(straight))
    print('the same')

straight = tt.trainer()
straight.fit()
for how in 'full', 'closed': lose(how, Path(sys.argv[1])/how)
'''


@pytest.mark.skipif(not shutil.which('unshare') or subprocess.run(['unshare', '-Urm', 'true'], capture_output=True).returncode,
                    reason='no file systems of one\'s own can be mounted here')
def test_a_full_disk_and_a_closed_folder_lose_nothing(tmp_path):
    here = Path(__file__).resolve().parent
    code = DISK.format(tests=str(here), root=str(here.parent))
    done = subprocess.run(['unshare', '-Urm', sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    full, again, same, stopped, closed, end = done.stdout.splitlines()
    assert (same, end) == ('the same', 'the same') and 'stopped after step' in stopped
    for line in full, again: assert str(tmp_path/'full'/'run') in line and ('No space left' in line or 'disk is full' in line)
    assert str(tmp_path/'closed'/'run') in closed and 'cannot be written to (' in closed and 'Read-only' in closed


def test_spoilt_files_are_noticed_or_harmless(data, tmp_path):
    result = kills.spoilt(data, tmp_path, 25, seed=random.SystemRandom().randrange(10**6))
    assert result['spoilt'] == 25 and not result['read_wrong']


def test_a_second_process_in_the_same_folder_is_told_so_and_leaves(data, tmp_path, monkeypatch):
    monkeypatch.setenv('MULTIMODAL_HOME', str(tmp_path/'home'))
    args = ['mm_train', 'shapes:60', tmp_path/'run', '--device', 'cpu', '--epochs', '1']
    with only_one(tmp_path/'run'):
        status, said, err = call(*args)
        assert status == 2 and 'another process is at work there' in err and len(err.strip().splitlines()) == 1
        assert [p.name for p in (tmp_path/'run').iterdir()] == ['.lock'] and not (tmp_path/'features').exists()
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('what', ['loss', 'gradient', 'validation loss'])
def test_a_loss_that_is_no_number_stops_with_the_names_of_the_photos(data, tmp_path, monkeypatch, what):
    names, calls = [], []
    def loss(model, batch, **settings):
        total, n, shown = caption_loss(model, batch, **settings)
        calls.append(model.training)
        if what == 'validation loss': return total, n, {**shown, 'loss': shown['loss']*(1 if model.training else torch.nan)}
        if model.training and sum(calls) == 4:
            names.extend(batch.names)
            total = total*torch.nan if what == 'loss' else total + (total - total.detach()).abs().sqrt()    # slope: 0 times inf
        return total, n, shown
    monkeypatch.setattr(multimodal.runs, 'caption_loss', loss)
    task, config = kills.CONFIGS['caption']
    with pytest.raises(UserError) as e: train_run(task, data, tmp_path/'run', config, device='cpu', say=lambda line: None)
    line = str(e.value)
    assert f'the {what} became' in line and '\n' not in line and 'the state saved last is whole' in line
    if what == 'validation loss': return
    assert len(names) == 8 and all(name in line for name in names) and 'at step 4' in line
    monkeypatch.undo()
    assert json.loads((whole_folder(tmp_path/'run'/'last')/'state.json').read_text())['state']['step'] == 2
    train_run(task, data, tmp_path/'run', config, resume=True, device='cpu', say=lambda line: None)
