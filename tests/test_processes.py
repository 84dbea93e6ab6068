"Two processes that `accelerate launch` starts learn what one would; one that dies ends the run; settings that differ are refused."
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from multimodal.checkpoint import load_tensors, read_history
from multimodal.core import UserError, place
from multimodal.dataloaders import Shares
from multimodal.optim import make_accelerator
from multimodal.processes import Team, ring_seconds
from multimodal.shapes import make_shapes

HOW = ['--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']
PROGRAM = """
import json, os, signal, sys
from dataclasses import replace
import torch
import multimodal.training as training
from multimodal.core import UserError, place
from multimodal.datasets import read_flickr8k
from multimodal.runs import CAPTIONS
from multimodal.tasks import train_run

data, run, kill_at, more = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
if more.pop('task', None): from multimodal.finder import RETRIEVAL as task
else: task = CAPTIONS
config = task.config(weights='none', trainable='none', stage=2, image_size=32, embedding_dim=32, n_layers=1, n_heads=2, epochs=2,
                     min_count=1, max_words=30, batch_size=7, dropout=0., save_every=3, lr=1e-3, ema=.9)
config = replace(config, **more)
seen, steps, first = [], [0], training.Trainer.train_step
def step(self, batch):
    steps[0] += 1
    seen.append([] if batch is None else batch.images.double().flatten(1).sum(1).tolist())
    if place()[0] == 1 and self.state.step + 1 == kill_at: os.kill(os.getpid(), signal.SIGKILL)
    return first(self, batch)
training.Trainer.train_step = step
clip = []
inside = training.Trainer.gradients
def kept(accelerator_clip):
    def clip_grad_norm_(parameters, most):
        parameters = list(parameters)
        clip.append([None if p.grad is None else p.grad.flatten()[:50].tolist() for p in parameters])
        return accelerator_clip(parameters, most)
    return clip_grad_norm_
start = training.Trainer.__init__
def begin(self, *args, **kw):
    start(self, *args, **kw)
    self.accelerator.clip_grad_norm_ = kept(self.accelerator.clip_grad_norm_)
training.Trainer.__init__ = begin
try: train_run(task, read_flickr8k(data), run, config, resume='resume' in sys.argv, device='cpu', say=lambda line: None)
except (UserError, KeyboardInterrupt) as e:
    sys.stderr.write(f'process {place()[0]}: {e}' + chr(10))              # in one piece, as the other writes too
    sys.exit(1)
with open(f'{run}.{place()[0]}.json', 'w') as f: json.dump({'seen': seen, 'steps': steps[0], 'gradients': clip[:4]}, f)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    make_shapes(folder/'shapes', n=60, size=32, p_two=0.0)
    (folder/'learn.py').write_text(PROGRAM)
    return folder


def launch(folder, run, n, kill_at=0, *words, **more):
    "Train in `n` processes of one thread each"
    many = ['--multi_gpu', '--num_processes', str(n)] if n > 1 else ['--num_processes', '1', '--cpu']
    what = [folder/'learn.py', folder/'shapes', folder/run, str(kill_at), json.dumps(more), *words]
    return subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', *many, *HOW, *map(str, what)], text=True,
                          capture_output=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'})


@pytest.fixture(scope='module')
def both(folder):
    "One process and two, with the same settings: what they noted, and the run folders"
    for run, n in ('one', 1), ('two', 2):
        done = launch(folder, run, n)
        assert not done.returncode, done.stderr[-3000:]
    told = lambda run, rank: json.loads((folder/f'{run}.{rank}.json').read_text())
    return told('one', 0), [told('two', rank) for rank in range(2)], folder


def test_gradients_are_those_of_one_process(both):
    one, two, _ = both
    assert two[0]['gradients'] == two[1]['gradients']                         # to the last bit
    for a, b in zip(one['gradients'], two[0]['gradients']):
        for p, q in zip(a, b):
            assert (p is None) == (q is None)
            if p is not None: assert (torch.tensor(p) - torch.tensor(q)).abs().max() < 1e-6
    assert max(abs(x) for p in one['gradients'][0] if p for x in p) > 1e-3      # they are not all nought


def test_same_steps_and_each_photo_once_an_epoch(both):
    one, two, _ = both
    assert one['steps'] == two[0]['steps'] == two[1]['steps'] == len(one['seen'])
    for k, whole in enumerate(one['seen']):
        shares = two[0]['seen'][k] + two[1]['seen'][k]
        assert sorted(shares) == pytest.approx(sorted(whole))
    n = len(one['seen'])//2
    assert len(one['seen'][n - 1]) % 2, 'the last batch is to be uneven here'
    epochs = [sorted(x for batch in one['seen'][k*n:(k + 1)*n] for x in batch) for k in range(2)]
    assert epochs[0] == pytest.approx(epochs[1]) and len(set(epochs[0])) == len(epochs[0])


def test_history_weights_and_single_writer(both):
    _, _, folder = both
    rows = [read_history(folder/run/'history.jsonl') for run in ('one', 'two')]
    assert len(rows[0]) == len(rows[1]) == 2
    for a, b in zip(*rows):
        for key in a.keys() - {'seconds'}: assert a[key] == pytest.approx(b[key], abs=1e-5), key
    kept = [load_tensors(folder/run/'last'/'ema.safetensors') for run in ('one', 'two')]
    for name in kept[0]:        # a bias of attention's keys has no gradient but rounding, which AdamW makes larger
        if not name.endswith('qkv.bias'): assert (kept[0][name] - kept[1][name]).abs().max() < 1e-4, name
    assert sorted(p.name for p in (folder/'two').rglob('*')) == sorted(p.name for p in (folder/'one').rglob('*'))


def test_losses_that_compare_see_the_whole_batch(folder):
    more = {'task': 'retrieve', 'captions_per_image': 2, 'word_dropout': 0., 'batch_size': 44}
    for run, n in ('seek', 1), ('seek_by_two', 2):
        done = launch(folder, run, n, **more)
        assert not done.returncode, done.stderr[-3000:]
    one, *two = [json.loads((folder/f'{name}.json').read_text()) for name in ('seek.0', 'seek_by_two.0', 'seek_by_two.1')]
    assert two[0]['gradients'] == two[1]['gradients'] and one['steps'] == two[0]['steps']
    assert [len(x) for x in one['seen'][:2]] == [44, 1] and len(two[1]['seen'][0]) == 22 and not two[1]['seen'][1]
    for step, (a, b) in enumerate(zip(one['gradients'], two[0]['gradients'])):
        for p, q in zip(a, b):
            assert (p is None) == (q is None)
            if p is not None: assert (torch.tensor(p) - torch.tensor(q)).abs().max() < 1e-6, step
    assert max(abs(x) for p in one['gradients'][0] if p for x in p) > 1e-3
    rows = [read_history(folder/run/'history.jsonl') for run in ('seek', 'seek_by_two')]
    for a, b in zip(*rows):
        for key in a.keys() - {'seconds'}: assert a[key] == pytest.approx(b[key], abs=1e-5), key


def test_a_killed_process_ends_the_run_and_it_resumes(both):
    _, two, folder = both
    killed = launch(folder, 'killed', 2, 8)                        # in its 8th step; saved after the 6th
    assert killed.returncode and 'process 0: another of the 2 processes is gone' in killed.stderr
    assert json.loads((folder/'killed'/'last'/'state.json').read_text())['state']['step'] in (6, 7)
    resumed = launch(folder, 'killed', 2, 0, 'resume')
    assert not resumed.returncode, resumed.stderr[-3000:]
    a, b = (read_history(folder/run/'history.jsonl') for run in ('two', 'killed'))
    assert [{**r, 'seconds': 0} for r in a] == [{**r, 'seconds': 0} for r in b]
    kept = [load_tensors(folder/run/'last'/'model.safetensors') for run in ('two', 'killed')]
    for name in kept[0]: assert torch.equal(kept[0][name], kept[1][name]), name


def test_sigterm_stops_all_after_the_same_step(folder):
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', *HOW,
               folder/'learn.py', folder/'shapes', folder/'long', '0', json.dumps({'epochs': 3000})]
    run = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    until = time.monotonic() + 120
    while not (folder/'long'/'last'/'state.json').exists() and time.monotonic() < until: time.sleep(.2)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=120)
    stopped = [line.partition(': ') for line in err.splitlines() if 'stopped after step' in line]
    assert run.returncode and sorted(who for who, _, _ in stopped) == ['process 0', 'process 1'], err[-3000:]
    assert stopped[0][2] == stopped[1][2]


def test_two_launchers_as_on_two_machines(both):
    _, two, folder = both
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    where = ['--main_process_ip', '127.0.0.1', '--main_process_port', port, '--num_machines', '2']
    what = [folder/'learn.py', folder/'shapes', folder/'far', '0', '{}']
    runs = [subprocess.Popen([sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', *where,
                              '--machine_rank', str(k), *HOW[2:6], *map(str, what)], stderr=subprocess.PIPE, text=True,
                             env={**os.environ, 'OMP_NUM_THREADS': '1'}) for k in range(2)]
    for run in runs:
        _, err = run.communicate(timeout=300)
        assert not run.returncode, err[-3000:]
    rows = [[{**r, 'seconds': 0} for r in read_history(folder/run/'history.jsonl')] for run in ('two', 'far')]
    assert rows[0] == rows[1]


def test_batches_smaller_than_the_team_are_refused(folder, monkeypatch):
    from multimodal.datasets import read_flickr8k
    from multimodal.recipe import RunConfig
    from multimodal.runs import train_captions
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    config = RunConfig(weights='none', trainable='none', stage=1, image_size=32, min_count=1, batch_size=1)
    with pytest.raises(UserError, match='batches of 1 cannot be shared by 2 processes'):
        train_captions(read_flickr8k(folder/'shapes'), folder/'small', config, device='cpu')
    assert not (folder/'small').exists()


@pytest.mark.parametrize('n,size,world', [(10, 4, 1), (10, 4, 3), (33, 16, 3), (5, 5, 5), (1, 4, 4)])
def test_shares_make_up_the_whole(n, size, world):
    parts = [list(Shares(range(n), size, False, rank, world)) for rank in range(world)]
    assert len({len(p) for p in parts}) == 1
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(n))
    for batches in zip(*parts): assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_a_team_of_one_changes_nothing():
    team, p = Team(make_accelerator(torch.device('cpu'), 'fp32')), torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 2.)
    assert team.add_up([p], torch.tensor(6.), 3, {'accuracy': 1}) == (torch.tensor(6.), 3, {'accuracy': 1})
    assert torch.equal(p.grad, torch.full((3,), 2.)) and place() == (0, 1)


def test_ring_grows_to_twice_the_vector():
    times = [ring_seconds(1e6, w, 1e6) for w in (1, 2, 8, 64)]
    assert times == sorted(times) and times[0] == 0 and times[1] == 1 and times[3] < 2
