"""The trainer: resumed runs are equal to the last bit, nothing saved is ever lost, and every mistake is one clear line."""
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from multimodal.checkpoint import load_tensors, read_history, save_tensors
from multimodal.core import UserError
from multimodal.durable import SUMS, atomic_folder, recover_folder
from multimodal.muon import Muon, make_optimizer, orthogonal
from multimodal.optim import Ema, TrainConfig, add_sums, choose_precision, means, param_groups, schedule
from multimodal.products import Linear, multiply, permit, stays_exact
from multimodal.threads import keep_memory, learn_at_once, use_cores
from multimodal.training import Interrupted, Trainer


class Noisy(Dataset):
    "Items that draw from every global generator there is, as a careless augmentation would."
    def __len__(self): return 30
    def __getitem__(self, i):
        x = torch.tensor([i / 30, random.random(), float(np.random.rand())])
        return x + 0.1 * torch.randn(3), i % 2


class Net(nn.Module):
    "Dropout, batch norm, a tied weight and a frozen part."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(3, 8).requires_grad_(False)
        self.body = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh())
        self.embed, self.head = nn.Embedding(2, 8), nn.Linear(8, 2, bias=False)
        self.head.weight = self.embed.weight
    def forward(self, x): return self.head(self.body(self.frozen(x)))


def loss_fn(model, batch):
    x, y = batch
    logits = model(x)
    return F.cross_entropy(logits, y, reduction='sum'), len(y), {'accuracy': (logits.argmax(1) == y).sum()}


def loader(workers=0):
    return DataLoader(Noisy(), batch_size=4, shuffle=True, generator=torch.Generator(), num_workers=workers)


DEV = [(torch.linspace(0, 1, 24).view(8, 3), torch.arange(8) % 2)]
CONFIG = TrainConfig(epochs=3, lr=0.01, ema=0.9, precision='fp32')        # 8 steps an epoch, 24 in all
MUON = replace(CONFIG, optimizer='muon')


def trainer(folder=None, config=CONFIG, loss=loss_fn, workers=0, **kw):
    return Trainer(Net(), loss, loader(workers), DEV, config, folder, device='cpu', **{'say': lambda line: None, **kw})


def facts(t):
    "All that a run ends with, but for the time it took."
    rows = [{k: v for k, v in r.items() if k != 'seconds'} for r in t.history]
    return rows, {**t.model.state_dict(), **{f'ema.{k}': v for k, v in (t.ema.model.state_dict() if t.ema else {}).items()}}


def assert_same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for k in a[1]: assert torch.equal(a[1][k], b[1][k]), k


@pytest.fixture(scope='module')
def straight():
    t = trainer()
    t.fit()
    return facts(t)


class CtrlC:
    "A loss function during whose n-th call (training and validation counted together) Ctrl-C is pressed."
    def __init__(self, n): self.left = n
    def __call__(self, model, batch):
        self.left -= 1
        if self.left == 0: signal.raise_signal(signal.SIGINT)
        return loss_fn(model, batch)


@pytest.mark.parametrize('call', [1, 5, 8, 9, 10, 18, 26, 27])      # 9, 18, 27 are validation; 8 and 26 an epoch's last step
def test_resumed_is_bit_identical_wherever_it_was_stopped(tmp_path, straight, call):
    stopped = trainer(tmp_path/'run', loss=CtrlC(call))
    try:
        stopped.fit()
        assert call == 27                                           # the very last validation: nothing is left to stop
    except Interrupted as e:
        assert 'To go on' in str(e) and stopped.state.step == call - call // 9
    resumed = trainer(tmp_path/'run')
    resumed.fit(resume=True)
    assert_same(facts(resumed), straight)


@pytest.fixture(scope='module')
def straight_muon(straight):
    t = trainer(config=MUON)
    t.fit()
    assert not torch.equal(t.model.body[1].weight, straight[1]['body.1.weight'])
    return facts(t)


@pytest.mark.parametrize('call', [1, 5, 9, 10, 26])
def test_resumed_with_muon_is_bit_identical_too(tmp_path, straight_muon, call):
    with pytest.raises(Interrupted): trainer(tmp_path/'run', MUON, CtrlC(call)).fit()
    with pytest.raises(UserError, match='optimizer=.muon., not .adamw.'): trainer(tmp_path/'run').fit(resume=True)
    resumed = trainer(tmp_path/'run', MUON)
    resumed.fit(resume=True)
    assert_same(facts(resumed), straight_muon)


def test_a_run_from_before_there_was_a_choice_of_optimizer_resumes(tmp_path, straight):
    with pytest.raises(Interrupted): trainer(tmp_path/'run', loss=CtrlC(5)).fit()
    path = tmp_path/'run'/'last'/'state.json'
    kept = json.loads(path.read_text())
    del kept['config']['optimizer']
    path.write_text(json.dumps(kept))
    path.with_name(SUMS).unlink()                                   # nor were there checksums
    resumed = trainer(tmp_path/'run')
    resumed.fit(resume=True)
    assert_same(facts(resumed), straight)


def test_stopped_twice_and_in_workers(tmp_path):
    once = trainer(workers=2)
    once.fit()
    for call in (3, 4):
        t = trainer(tmp_path/'run', loss=CtrlC(call), workers=2)
        with pytest.raises(Interrupted): t.fit(resume=call != 3)
    last = trainer(tmp_path/'run', workers=2)
    last.fit(resume=True)
    assert_same(facts(last), facts(once))


def test_randomness_matters_at_all(straight):
    "Else the tests above would be worth nothing: another seed gives another run."
    t = trainer(config=replace(CONFIG, seed=1))
    t.fit()
    assert facts(t)[0] != straight[0]


SCRIPT = '''
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
import test_training as tt
slow = lambda model, batch: (time.sleep(0.02), tt.loss_fn(model, batch))[1]
t = tt.trainer(sys.argv[1], loss=slow, config=tt.replace(tt.CONFIG, save_every=1), say=lambda l: print(l, flush=True))
try: t.fit(resume='resume' in sys.argv)
except KeyboardInterrupt as e: print(e); sys.exit(130)
'''


def start(folder, *args):
    here = Path(__file__).resolve().parent
    code = SCRIPT.format(tests=str(here), root=str(here.parent))
    return subprocess.Popen([sys.executable, '-c', code, str(folder), *args], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def test_real_processes_stopped_and_killed(tmp_path, straight):
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
    processes = [start(tmp_path/str(sig)) for sig in signals]
    for sig, p in zip(signals, processes):
        assert 'epoch 1/3' in p.stdout.readline()
        p.send_signal(sig)
    for sig, p in zip(signals, processes):
        out, err = p.communicate(timeout=60)
        if sig == signal.SIGKILL: assert p.returncode == -9
        else:
            assert p.returncode == 130 and 'saved in' in out and 'To go on' in out
            assert 'Stopping after this step' in err
        t = trainer(tmp_path/str(sig), config=replace(CONFIG, save_every=1))
        t.fit(resume=True)
        assert t.state.step == 24
        assert_same(facts(t), straight)


def test_a_crash_at_any_moment_of_saving_leaves_a_state_that_resumes(tmp_path, straight):
    "A second process dies at its n-th operation on files, without any clean-up; then we resume."
    one = trainer(tmp_path/'one', loss=CtrlC(12))
    with pytest.raises(Interrupted): one.fit()
    moment, ended = 0, False
    while not ended:
        moment += 1
        run = tmp_path/str(moment)
        shutil.copytree(tmp_path/'one', run)
        pid = os.fork()
        if pid == 0:
            left = [moment]
            def die(event, args):
                if event in ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'shutil.rmtree') or \
                        event == 'open' and isinstance(args[0], (str, Path)) and str(run) in str(args[0]):
                    left[0] -= 1
                    if not left[0]: os._exit(1)
            t = trainer(run)
            t.load()
            sys.addaudithook(die)
            t.fit_epoch(None, tqdm(disable=True))
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        load_tensors(recover_folder(run/'best')/'model.safetensors')
        t = trainer(run)
        t.load()
        if moment % 4 == 0 or ended:                                # to the end from each would take long
            t.fit(resume=True)
            assert_same(facts(t), straight)
    assert moment > 20


def test_disk_full_loses_nothing(tmp_path, straight):
    "Files may not grow beyond 1 kB from the second epoch on: writing fails for real, half-way."
    t = trainer(tmp_path/'run', config=replace(CONFIG, ema=0.9))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    t.say = lambda line: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match='what was saved before is still whole'): t.fit()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name for p in (tmp_path/'run').iterdir()} == {'.lock', 'history.jsonl', 'last', 'best'}
    again = trainer(tmp_path/'run')
    again.fit(resume=True)
    assert_same(facts(again), straight)


@pytest.mark.parametrize('name', ['model.safetensors', 'optimizer.safetensors', 'ema.safetensors', 'state.json'])
@pytest.mark.parametrize('harm', ['gone', 'cut', 'empty'])
def test_a_half_written_state_is_one_clear_line(tmp_path, name, harm):
    t = trainer(tmp_path/'run', loss=CtrlC(3))
    with pytest.raises(Interrupted): t.fit()
    path = tmp_path/'run'/'last'/name
    if harm == 'gone': path.unlink()
    else: path.write_bytes(path.read_bytes()[:40] if harm == 'cut' else b'')
    with pytest.raises(UserError) as e: trainer(tmp_path/'run').fit(resume=True)
    assert name in str(e.value) and '\n' not in str(e.value)


def test_a_state_of_another_model_or_configuration_is_refused(tmp_path):
    t = trainer(tmp_path/'run', loss=CtrlC(3))
    with pytest.raises(Interrupted): t.fit()
    with pytest.raises(UserError, match='lr=0.01, not 0.5'): trainer(tmp_path/'run', config=replace(CONFIG, lr=0.5)).fit(True)
    state = tmp_path/'run'/'last'/'state.json'
    kept = json.loads(state.read_text())
    state.with_name(SUMS).unlink()
    state.write_text(json.dumps({**kept, 'state': {**kept['state'], 'stepp': 1}}))
    with pytest.raises(UserError, match='state.json is not the state of a run'): trainer(tmp_path/'run').fit(True)
    state.write_text(json.dumps(kept))
    tensors = load_tensors(tmp_path/'run'/'last'/'model.safetensors')
    save_tensors(tmp_path/'run'/'last'/'model.safetensors', {**tensors, 'embed.weight': torch.zeros(3, 8)})
    with pytest.raises(UserError, match='does not fit this model: 1 of .* embed.weight'): trainer(tmp_path/'run').fit(True)


def test_a_run_is_never_overwritten_and_nothing_is_not_resumed(tmp_path):
    trainer(tmp_path/'run').fit()
    before = {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()}
    with pytest.raises(UserError, match='holds a run already'): trainer(tmp_path/'run').fit()
    assert {p: p.read_bytes() for p in (tmp_path/'run').rglob('*') if p.is_file()} == before
    with pytest.raises(UserError, match='nothing to resume'): trainer(tmp_path/'other').fit(resume=True)


def test_a_setting_newer_than_the_run_was_at_its_default_then(tmp_path):
    config = replace(CONFIG, patience=0)
    trainer(tmp_path/'run', config).fit()
    path = tmp_path/'run'/'last'/'state.json'
    kept = json.loads(path.read_text())
    del kept['config']['patience']
    path.write_text(json.dumps(kept))
    path.with_name(SUMS).unlink()
    assert trainer(tmp_path/'run', config).fit(resume=True) == read_history(tmp_path/'run'/'history.jsonl')
    with pytest.raises(UserError, match='patience=0, not 2'):
        trainer(tmp_path/'run', replace(config, patience=2)).fit(resume=True)


def test_best_is_the_lowest_validation_loss_and_of_the_averaged_weights(tmp_path):
    losses = iter([5, 3, 4])
    def loss(model, batch):
        total, n, shown = loss_fn(model, batch)
        return (total, n, shown) if model.training else (total, n, {'loss': next(losses) * n})
    t, averages = trainer(tmp_path/'run', loss=loss), []
    t.say = lambda line: averages.append({k: v.clone() for k, v in t.ema.model.state_dict().items()})
    assert t.fit() == read_history(tmp_path/'run'/'history.jsonl')
    best = load_tensors(tmp_path/'run'/'best'/'model.safetensors')
    assert 'frozen.weight' not in best and 'head.weight' not in best            # nothing twice, nothing that was given
    for k, v in best.items(): assert torch.equal(v, averages[1][k]), k
    assert not torch.equal(best['embed.weight'], averages[2]['embed.weight'])


def test_patience_counts_epochs_without_improvement():
    losses = iter([5, 4, 6, 3, 4, 3.5, 2])
    def loss(model, batch):
        total, n, shown = loss_fn(model, batch)
        return (total, n, shown) if model.training else (total, n, {'loss': torch.tensor(next(losses) * n)})
    t = trainer(config=replace(CONFIG, epochs=20, patience=2), loss=loss)
    assert [r['dev_loss'] for r in t.fit()] == [5, 4, 6, 3, 4, 3.5]


def test_the_mean_is_over_items_and_a_shown_loss_replaces_the_one_minimised():
    t = trainer(loss=lambda m, b: (lambda x: (x[0], x[1], {**x[2], 'loss': 7.0 * x[1]}))(loss_fn(m, b)))
    row = t.fit()[0]
    assert row['train_loss'] == pytest.approx(7) and row['dev_loss'] == pytest.approx(7)
    sums = {}
    for loss, n in ((10.0, 1), (1.0, 9)): add_sums(sums, loss, n, {})
    assert means(sums) == {'loss': pytest.approx(1.1)}
    with pytest.raises(UserError): means({})


def test_the_gradient_is_never_longer_than_allowed_and_vectors_do_not_decay():
    t = trainer(config=replace(CONFIG, clip=1e-3, ema=0.0))
    step, norms = t.optimizer.step, []
    def watch(*a, **k):
        norms.append(torch.cat([p.grad.flatten() for p in t.model.parameters() if p.grad is not None]).norm().item())
        return step(*a, **k)
    t.optimizer.step = watch
    t.fit()
    assert len(norms) == 24 and max(norms) <= 1e-3 * 1.001
    groups = param_groups(Net(), CONFIG)
    assert sorted(p.ndim for g in groups if g['weight_decay'] for p in g['params']) == [2, 2]
    assert all(p.ndim < 2 for g in groups if not g['weight_decay'] for p in g['params'])


def test_slow_parts_move_less_and_frozen_parts_not_at_all():
    before = Net().state_dict()
    def moved(config):
        t = trainer(config=replace(config, epochs=1, weight_decay=0, ema=0.0))
        t.fit()
        return {k: (v - before[k]).abs().max().item() for k, v in t.model.state_dict().items() if v.is_floating_point()}
    fast, slow = moved(CONFIG), moved(replace(CONFIG, slow='body.1', slow_factor=1e-4))
    assert 0 < slow['body.1.weight'] < fast['body.1.weight'] / 1000 and slow['embed.weight'] > 1e-3
    assert fast['frozen.weight'] == 0


def groups(optimizer, model):
    "What each group of an optimizer is made of, by name."
    names = {p: k for k, p in model.named_parameters()}
    return [(g.get('muon'), g['scale'], g['weight_decay'], *(names[p] for p in g['params'])) for g in optimizer.param_groups]


def test_adamw_is_made_as_ever_and_muon_takes_matrices_only():
    model, slow = Net(), dict(slow='body.1', slow_factor=0.5, weight_decay=0.1)
    adamw = make_optimizer(model, replace(CONFIG, **slow))
    assert type(adamw) is torch.optim.AdamW and adamw.defaults['betas'] == (0.9, CONFIG.beta2)
    for a, b in zip(adamw.param_groups, param_groups(model, replace(CONFIG, **slow)), strict=True):
        assert all(p is q for p, q in zip(a['params'], b['params'], strict=True))
        assert (a['scale'], a['weight_decay'], a['lr']) == (b['scale'], b['weight_decay'], CONFIG.lr)
    assert groups(make_optimizer(model, replace(MUON, **slow)), model) == [
        (False, 1.0, 0.0, 'body.0.weight', 'body.0.bias'), (True, 0.5, 0.1, 'body.1.weight'),
        (False, 0.5, 0.0, 'body.1.bias'), (False, 1.0, 0.1, 'embed.weight')]
    model.by_adam = ('body',)
    assert not any(muon for muon, *_ in groups(make_optimizer(model, MUON), model))


def test_by_adam_finds_a_tied_weight_by_either_name():
    model = nn.Module()
    model.one, model.two, model.three = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    model.two.weight, model.by_adam = model.one.weight, ('two',)
    assert groups(make_optimizer(model, replace(MUON, weight_decay=0)), model) == [
        (True, 1.0, 0, 'three.weight'), (False, 1.0, 0, 'one.weight')]


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 32, 32), (3, 16, 64), (3, 64, 16), (2, 1, 9)])
def test_orthogonal_is_nearly_what_a_decomposition_gives(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    near, (u, s, vt) = orthogonal(g), torch.linalg.svd(g, full_matrices=False)
    inner = u.mT @ near @ vt.mT                                     # diagonal, where the directions are kept
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3
    strong = inner.diagonal(dim1=1, dim2=2)[s > 0.01 * g.flatten(1).norm(dim=1)[:, None]]
    assert 0.65 < strong.min() and strong.max() < 1.25
    torch.testing.assert_close(orthogonal(1000 * g), near, atol=1e-4, rtol=0)
    assert orthogonal(torch.zeros(shape)).eq(0).all()


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='this PyTorch has no Muon')
@pytest.mark.parametrize('shape', [(16, 16), (8, 24), (24, 8)])
def test_muon_is_pytorchs_but_for_the_bits(monkeypatch, shape):
    "PyTorch's own computes in bf16; made to keep 32 bits, it takes the same steps."
    monkeypatch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.clone)
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for _ in range(3)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    one = Muon([{'params': ours, 'muon': True, 'weight_decay': 0.1}], lr=0.02)
    two = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn='match_rms_adamw')
    for _ in range(5):
        for p, q in zip(ours, theirs): p.grad = torch.randn(shape); q.grad = p.grad.clone()
        one.step(); two.step()
    for p, q in zip(ours, theirs): torch.testing.assert_close(p, q, atol=1e-4, rtol=0)


def test_muon_takes_filters_flat_in_any_layout_and_leaves_alone_what_has_no_gradient():
    def moved(flat, layout=torch.contiguous_format):
        torch.manual_seed(0)
        p, rest, idle = torch.randn(6, 3, 2, 2), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(6, 12))
        p = nn.Parameter(p.flatten(1) if flat else p.contiguous(memory_format=layout))
        optimizer = Muon([{'params': [p, idle], 'muon': True}, {'params': [rest]}], lr=0.1)
        for _ in range(3):
            grad = torch.randn(6, 3, 2, 2)
            p.grad = grad.flatten(1) if flat else grad.contiguous(memory_format=layout)
            rest.grad = torch.ones(3)
            optimizer.step()
        assert idle.eq(1).all() and not optimizer.state.get(idle) and rest.lt(0.8).all()
        return p.detach().reshape(6, 12)
    torch.testing.assert_close(moved(False), moved(True))
    torch.testing.assert_close(moved(False, torch.channels_last), moved(True))


def test_muon_calls_a_closure_once_and_steps_along_its_gradient():
    model = nn.Linear(3, 3)
    optimizer, calls = Muon([{'params': [model.weight], 'muon': True}, {'params': [model.bias]}], lr=0.1), []
    before = {k: v.clone() for k, v in model.state_dict().items()}
    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = model(torch.eye(3)).square().sum()
        loss.backward()
        return loss
    first = optimizer.step(closure)
    assert len(calls) == 1 and closure() < first
    assert all(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert optimizer.state[model.weight].keys() == {'step', 'momentum'}         # AdamW has not stepped there too


def test_loss_that_is_no_number_stops_before_the_weights_are_spoilt(tmp_path):
    calls = []
    def loss(model, batch):
        total, n, shown = loss_fn(model, batch)
        calls.append(1)
        return total * (float('inf') if len(calls) == 13 else 1), n, shown
    t = trainer(tmp_path/'run', loss=loss)
    with pytest.raises(UserError, match='loss became inf at step 12'): t.fit()
    assert all(v.isfinite().all() for v in t.model.state_dict().values())
    assert json.loads((tmp_path/'run'/'last'/'state.json').read_text())['state']['epoch'] == 1


def test_empty_loaders_and_impossible_settings():
    for loaders in (([], DEV), (DEV, [])):
        with pytest.raises(UserError, match='no items'): Trainer(Net(), loss_fn, *loaders, device='cpu', say=str).fit()
    for wrong in (dict(epochs=0), dict(lr=0), dict(lr=float('nan')), dict(warmup=1.0), dict(ema=1), dict(clip=-1),
                  dict(precision='half'), dict(beta2=1.5), dict(optimizer='sgd')):
        with pytest.raises(UserError, match=next(iter(wrong))): TrainConfig(**wrong)
    with pytest.raises(UserError, match='nothing to train'): param_groups(Net().requires_grad_(False), CONFIG)
    with pytest.raises(UserError, match='slow'): param_groups(Net(), replace(CONFIG, slow='bodyy'))
    with pytest.raises(UserError, match='fp16'): choose_precision('fp16', torch.device('cpu'))


def test_a_time_budget_ends_the_run_with_a_rate_of_zero(tmp_path):
    t = trainer(tmp_path/'run', config=replace(CONFIG, epochs=100_000, max_seconds=0.5))
    rows = t.fit()
    assert 0.45 < rows[-1]['seconds'] < 10 and rows[-1]['lr'] < CONFIG.lr * 0.01 and len(rows) < 100_000
    assert trainer(tmp_path/'run', config=t.config).fit(resume=True) == rows          # it is over, resuming changes nothing


def test_bf16_on_the_processor_learns_the_same_and_leaves_no_trace():
    matmul = getattr(torch.backends.mkldnn, 'matmul', None)
    if matmul: matmul.fp32_precision = 'ieee'
    rough, exact = trainer(config=replace(CONFIG, precision='bf16')), trainer()
    assert rough.fit()[-1]['dev_loss'] == pytest.approx(exact.fit()[-1]['dev_loss'], abs=0.02)
    if matmul: assert matmul.fp32_precision == 'ieee'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a graphics card')
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_on_a_graphics_card_too(tmp_path, precision, optimizer):
    config = replace(CONFIG, precision=precision, optimizer=optimizer)
    once = Trainer(Net(), loss_fn, loader(), DEV, config, device='cuda', say=str)
    rows, on_cpu = once.fit(), trainer(config=replace(CONFIG, optimizer=optimizer)).fit()
    assert rows[-1]['train_loss'] == pytest.approx(on_cpu[-1]['train_loss'], abs=0.2)
    stopped = Trainer(Net(), CtrlC(5), loader(), DEV, config, tmp_path/'run', device='cuda', say=str)
    with pytest.raises(Interrupted): stopped.fit()
    resumed = Trainer(Net(), loss_fn, loader(), DEV, config, tmp_path/'run', device='cuda', say=str)
    for a, b in zip(resumed.fit(resume=True), rows): assert a['dev_loss'] == pytest.approx(b['dev_loss'], abs=1e-3)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.99))
def test_the_schedule_rises_then_falls_within_bounds(p, q, warmup):
    p, q = sorted((p, q))
    a, b = schedule(p, warmup), schedule(q, warmup)
    assert 0 <= a <= 1 and 0 <= b <= 1
    if q <= warmup: assert a <= b
    if p >= warmup: assert a >= b - 1e-12
    assert schedule(1, warmup) < 1e-9


@given(st.dictionaries(st.text('abc', min_size=1, max_size=5), st.lists(st.floats(-1e6, 1e6, width=32), max_size=5), max_size=4))
def test_tensors_come_back_as_they_were(named):
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'x.safetensors'
        save_tensors(path, {k: torch.tensor(v) for k, v in named.items()})
        back = load_tensors(path)
    assert back.keys() == named.keys() and all(torch.equal(back[k], torch.tensor(v)) for k, v in named.items())


def test_averaged_weights_follow_the_rule():
    model = nn.Linear(1, 1, bias=False)
    ema, expected = Ema(model, 0.9), model.weight.item()
    for step in range(100):
        with torch.no_grad(): model.weight.fill_(float(step))
        d = min(0.9, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * step
        ema.update(step)
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-4)


def test_a_folder_is_exchanged_whole_or_not_at_all(tmp_path):
    for text in ('one', 'two'):
        with atomic_folder(tmp_path/'a'/'b') as new: (new/'f').write_text(text)
    assert (tmp_path/'a'/'b'/'f').read_text() == 'two'
    with pytest.raises(KeyboardInterrupt):
        with atomic_folder(tmp_path/'a'/'b') as new:
            (new/'f').write_text('three')
            raise KeyboardInterrupt
    assert (tmp_path/'a'/'b'/'f').read_text() == 'two' and {p.name for p in (tmp_path/'a').iterdir()} == {'b', '.b.before'}
    assert (tmp_path/'a'/'.b.before'/'f').read_text() == 'one'
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='cannot write'):
        with atomic_folder(tmp_path/'file'/'b'): pass


PAGES = """
import resource, sys, torch
from multimodal.threads import keep_memory
torch.set_num_threads(1)
if sys.argv[1] == 'keep': keep_memory()
def pages(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(20): torch.zeros(1_000_000).add_(1)
work()
before = pages()
work()
print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another C library')
def test_memory_is_fetched_once_and_not_again():
    fetched = {how: int(subprocess.run([sys.executable, '-c', PAGES, how], capture_output=True, text=True, check=True).stdout)
               for how in ('keep', 'as ever')}
    assert fetched['keep'] < 200
    assert fetched['as ever'] > 10*max(1, fetched['keep']) or fetched['as ever'] < 200      # some systems count no pages


@pytest.mark.parametrize('error', [AttributeError, TypeError, OSError])
def test_without_glibc_memory_is_left_alone(monkeypatch, error):
    def no_library(name): raise error
    monkeypatch.setattr('multimodal.threads.ctypes.CDLL', no_library)
    keep_memory()


def switch(): return getattr(getattr(torch.backends.mkldnn, 'matmul', None), 'fp32_precision', None)


def test_threads_that_learn_at_once_leave_the_switch_alone_and_agree_with_one():
    "Gradients of weights go by a switch that holds for the whole process; two threads must not turn it under one another's hands."
    torch.manual_seed(0)
    model = nn.Sequential(Linear(64, 256), nn.GELU(), Linear(256, 64), nn.GELU(), Linear(64, 8))
    weights, x, before, seen = list(model.parameters()), torch.randn(400, 64), switch(), set()
    for layer in model: layer.register_full_backward_hook(lambda *_: seen.add(switch()) and None)
    found = []
    for cores in 1, 2, 2, 2:
        with use_cores(1):
            learn_at_once(lambda part: (model(part).square().sum(), len(part), {}), x.chunk(4), weights, cores)
        found.append([p.grad.clone() for p in weights])
    for other in found[1:]: assert all(torch.equal(a, b) for a, b in zip(found[0], other))
    assert seen == {before} and switch() == before


@pytest.mark.skipif(not stays_exact(), reason='@ does not go by oneDNN here, or not exactly')
def test_gradients_of_weights_by_the_switch_are_those_of_64_bits_and_it_is_turned_back_after_an_error():
    from multimodal.products import OneDNNLinear
    torch.manual_seed(0)
    x, w, g = torch.randn(300, 70, requires_grad=True), torch.randn(90, 70, requires_grad=True), torch.randn(300, 90)
    before = switch()
    dx, dw = torch.autograd.grad(OneDNNLinear.apply(x, w, None), (x, w), g)
    assert torch.allclose(dw.double(), g.double().T @ x.double(), atol=1e-4) and torch.allclose(dx.double(), g.double() @ w.double(), atol=1e-4)
    assert torch.allclose(dw, multiply(g.T, x.T), atol=1e-4) and switch() == before
    with pytest.raises(RuntimeError):
        with permit('bf16'): g.T @ x[:5]
    assert switch() == before


def test_adamw_in_one_go_takes_the_steps_of_adamw_and_resumes():
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    import copy
    two, config, x = copy.deepcopy(one), TrainConfig(lr=.01), torch.randn(20, 9)
    fused, plain = make_optimizer(one, config), torch.optim.AdamW(param_groups(two, config), lr=.01, betas=(.9, config.beta2), foreach=False)
    assert fused.defaults['fused']
    for _ in range(20):
        for model, optimizer in (one, fused), (two, plain):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(one.parameters(), two.parameters()): assert torch.allclose(a, b, atol=1e-5)
