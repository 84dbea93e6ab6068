"""Whatever happens to a training, what was saved is whole, and the run that goes on from there is the run never stopped."""
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout

import multimodal.durable
import multimodal.runs
from multimodal.core import UserError
from multimodal.download import checksum_of
from multimodal.durable import atomic_folder, damage, only_one, seal, whole_folder
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
    said = []
    found = kills.survive('caption', data, tmp_path, 6, seed=1, say=said.append)
    assert found['different'] and any('these differ' in line for line in said)


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
    assert result['spoilt'] == 25 and not result['read wrong']


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


@pytest.mark.parametrize('name', ['/dev/zero', '../secret', '', '.', 'pipe', 'link', 'sub/../../secret'])
def test_a_list_of_checksums_leads_nobody_out_of_the_folder(tmp_path, name):
    "The list may come from a stranger: a file without end, one elsewhere, a pipe that nobody writes to"
    folder = tmp_path/'run'
    (folder/'sub').mkdir(parents=True)
    (tmp_path/'secret').write_text('mine')
    os.mkfifo(folder/'pipe')
    (folder/'link').symlink_to('/dev/zero')
    digest = checksum_of(tmp_path/'secret')
    (folder/'SHA256SUMS').write_text(f'{digest}  {name}\n# 1 files\n')
    assert str(folder) in damage(folder)
    (folder/'SHA256SUMS').unlink()
    os.mkfifo(folder/'SHA256SUMS')
    assert 'cut short or spoilt' in damage(folder)


def test_names_in_a_list_of_checksums(tmp_path):
    for name in ('a b', 'ü\u2028', os.fsdecode(b'\xff.txt'), '#', 'deep/SHA256SUMS'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text(repr(name))
    seal(tmp_path)
    listed = (tmp_path/'SHA256SUMS').read_bytes()
    assert listed.endswith(b'# 5 files\n') and damage(tmp_path) is None
    (tmp_path/'SHA256SUMS').write_bytes(listed.replace(b'\n', b'\r\n'))                            # by an editor
    assert damage(tmp_path) is None
    for path in list(tmp_path.rglob('*')):
        if not path.is_file() or path == tmp_path/'SHA256SUMS': continue
        whole = path.read_bytes()
        path.write_text('other')
        assert 'not as it was written' in damage(tmp_path)
        path.write_bytes(whole)
    (tmp_path/'two\nlines').touch()
    with pytest.raises(UserError, match='one a line'): seal(tmp_path)


def test_a_file_is_not_taken_for_a_folder(tmp_path):
    (tmp_path/'mine').write_text('precious')
    for _ in range(3):
        with pytest.raises(UserError, match='is a file'):
            with atomic_folder(tmp_path/'mine') as new: (new/'a').touch()
    assert (tmp_path/'mine').read_text() == 'precious' and [p.name for p in tmp_path.iterdir()] == ['mine']


def test_ctrl_c_between_the_renames_is_put_in_order(tmp_path, monkeypatch):
    for text in 'one', 'two':
        with atomic_folder(tmp_path/'a') as new: (new/'f').write_text(text)
    real, renames = os.rename, []
    for stop in 1, 2, 3:
        def rename(*names):
            renames.append(names)
            real(*names)
            if len(renames) == stop: raise KeyboardInterrupt
        monkeypatch.setattr(os, 'rename', rename)
        with pytest.raises(KeyboardInterrupt):
            with atomic_folder(tmp_path/'a') as new: (new/'f').write_text('three')
        monkeypatch.setattr(os, 'rename', real)
        assert {p.name for p in tmp_path.iterdir()} == {'a', '.a.before'} and damage(tmp_path/'a') is None
        assert (tmp_path/'a'/'f').read_text() == ('three' if stop == 3 else 'two')
        renames.clear()


def test_where_nothing_was_saved_nothing_is_said_to_be_whole(tmp_path):
    with pytest.raises(UserError) as e:
        with atomic_folder(tmp_path/'a'): raise OSError(28, 'No space left on device')
    assert 'the disk is full' in str(e.value) and 'whole' not in str(e.value)


def test_nobody_gets_in_while_a_lock_is_taken_away(tmp_path, monkeypatch):
    run, tried = tmp_path/'run', []
    real = multimodal.durable.sweep
    def sweep(folder, made, alone):
        lock = FileLock(folder/'.lock')                                     # of its own, as in another process
        try: lock.acquire(timeout=0)
        except Timeout: tried.append('refused')
        else: tried.append('got in')
        real(folder, made, alone)
    monkeypatch.setattr(multimodal.durable, 'sweep', sweep)
    with only_one(run): pass
    assert tried == ['refused'] and not run.exists()


def test_a_run_that_came_to_nothing_leaves_nothing(data, tmp_path, monkeypatch):
    def loss(model, batch, **settings):
        total, n, shown = caption_loss(model, batch, **settings)
        return total*torch.nan, n, shown
    monkeypatch.setattr(multimodal.runs, 'caption_loss', loss)
    task, config = kills.CONFIGS['caption']
    for run in tmp_path/'new'/'run', tmp_path/'there':
        if run.name == 'there': run.mkdir()
        with pytest.raises(UserError, match='became nan at step 1') as e: train_run(task, data, run, config, device='cpu', say=lambda line: None)
        assert 'saved last' not in str(e.value)
    assert not (tmp_path/'new'/'run').exists() and (tmp_path/'there'/'config.json').exists()
