"""
Trainings that are killed and resumed, again and again, and compared with one that never was: `python tools/kills.py --kills 100
--out results/reliability.json` does it a hundred times for each kind of training (half an hour on two slow cores);
tests/test_survival.py does it a few times.
"""
import argparse
import contextlib
import io
import mmap
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from multimodal import checkpoint, durable, tasks, training
from multimodal.core import UserError, read_json, write_json
from multimodal.datasets import read_flickr8k
from multimodal.finder import RETRIEVAL, RetrieveConfig
from multimodal.painter import PAINTING, PaintConfig
from multimodal.recipe import RunConfig
from multimodal.runs import CAPTIONS
from multimodal.scst import SCST
from multimodal.shapes import make_shapes

# Small, and yet with all that a resumed run must know: features on disk, dropout, averaged weights, augmentation by views,
# captions drawn anew in each epoch, a saving after each second step, and an end by early stopping.
SMALL = dict(data='shapes', image_size=32, embedding_dim=32, n_heads=2, min_count=1, max_words=20, dropout=.1, epochs=6,
             batch_size=8, ema=.9, captions_per_image=2, save_every=2, patience=2, lr=2e-3)
FROZEN = dict(weights='none', trainable='none', stage=2, views='plain,flip')
CONFIGS = {'caption': (CAPTIONS, RunConfig(**SMALL, **FROZEN, n_layers=1, label_smoothing=.1)),
           'scst': (SCST, RunConfig(**{**SMALL, 'captions_per_image': 0}, **FROZEN, n_layers=1, samples=2)),
           'retrieve': (RETRIEVAL, RetrieveConfig(**SMALL, **FROZEN)),
           'paint': (PAINTING, PaintConfig(**SMALL, n_layers=1, text_layers=1, sketch_steps=5))}
PHASES = 'start', 'cache', 'step', 'validation', 'checkpoint', 'rest'


class Watch:
    "Where a process is, in memory that its parent sees too: the phase, how often each was entered, and nanoseconds in each."
    def __init__(self): self.memory = mmap.mmap(-1, 8*(1 + 2*len(PHASES)))
    def __getitem__(self, i): return int.from_bytes(self.memory[8*i:8*i + 8], 'little')
    def __setitem__(self, i, value): self.memory[8*i:8*i + 8] = value.to_bytes(8, 'little')
    def clear(self): self.memory[:] = bytes(len(self.memory))
    def phase(self): return PHASES[self[0]]
    def count(self, phase): return self[1 + PHASES.index(phase)]
    def seconds(self, phase): return self[1 + len(PHASES) + PHASES.index(phase)]/1e9/max(1, self.count(phase))

    def during(self, phase, function):
        "The function, and while it runs the process is in this phase"
        number = PHASES.index(phase)
        def watched(*args, **kwargs):
            before, began = self[0], time.perf_counter_ns()
            self[0], self[1 + number] = number, self[1 + number] + 1
            try: return function(*args, **kwargs)
            finally:
                self[1 + len(PHASES) + number] += time.perf_counter_ns() - began
                self[0] = before if before == number else PHASES.index('rest')
        return watched

    def on(self):
        "From now on, in this process, the phases are noted"
        tasks.checked_loaders = self.during('cache', tasks.checked_loaders)
        for phase, name in ('step', 'train_step'), ('validation', 'evaluate'):
            setattr(training.Trainer, name, self.during(phase, getattr(training.Trainer, name)))
        for name in 'save', 'close_epoch': setattr(training.Trainer, name, self.during('checkpoint', getattr(training.Trainer, name)))


def learn(name, data, run, log):
    "In a process of its own: go on with a run where there is one, else begin it; exit status 0 where it came to its end."
    task, config = CONFIGS[name]
    if task is SCST: config = replace(config, init=str(run.parent.parent/'captioner'))
    with open(log, 'a') as out: os.dup2(out.fileno(), 1); os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    begun = any((run/k).exists() for k in ('last', '.last.before'))
    tasks.train_run(task, data, run, config, begun, run.parent/'features', 'cpu', lambda line: os.write(1, f'{line}\n'.encode()))


def process(watch, *args):
    "Start `learn`; the number of the process"
    watch.clear()
    sys.stdout.flush()
    if pid := os.fork(): return pid
    try:
        watch.on()
        learn(*args)
        os._exit(0)
    except BaseException as e:
        os.write(2, f'{type(e).__name__}: {e}\n'.encode())
        os._exit(3)


def ended(pid, block=True):
    "Exit status of a process, minus the signal that killed it; None as long as it runs"
    which, status = os.waitpid(pid, 0 if block else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if which else None


def kill(pid, watch, luck, lasts):
    "Kill a process at a moment drawn at random; the phase it was in, or None where it came to its end before; its status"
    target, began, share = luck.choice(PHASES[:-1]), time.perf_counter(), luck.random()
    entries = luck.randint(1, {'cache': 1, 'validation': 2}.get(target, 8))
    def waits():
        if target == 'start': return time.perf_counter() - began < share*lasts[target]
        return watch.count(target) < entries
    while waits():
        if (status := ended(pid, block=False)) is not None: return None, status
    if target != 'start': time.sleep(share*lasts[target])
    where = watch.phase()
    os.kill(pid, signal.SIGKILL)
    status = ended(pid)
    return (where if status == -signal.SIGKILL else None), status


def contents(run):
    "All that a run ends with but the time it took: {file: its bytes, or plain values}"
    def timeless(rows): return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]
    found = {}
    for path in sorted(p for p in run.rglob('*') if p.is_file() and not p.name.startswith('.') and p.name != durable.SUMS):
        name = path.relative_to(run).as_posix()
        if name.startswith('.'): continue                                     # the state before the last
        if path.suffix == '.jsonl': found[name] = timeless(checkpoint.read_history(path))
        elif path.name == 'state.json':
            kept = read_json(path)
            found[name] = {**kept, 'state': {k: v for k, v in kept['state'].items() if k != 'seconds'}}
        else: found[name] = path.read_bytes()
    return found


def says(name, data, run):
    "What the trained model says or draws of a few photos of the dev split, at its best"
    task, _ = CONFIGS[name]
    found = tasks.open_run(task, run, device='cpu')
    if name in ('caption', 'scst'): return [(r['image'], r['caption'], r['logprob']) for r in found.predict(data, 'dev')[0]]
    if name == 'retrieve': return found.evaluate(data, 'dev')
    return [p.numpy().tobytes() for p in found.draw(list(data.captions('dev'))[:3])]


def survive(name, data, work, kills, seed=0, say=print, each=lambda line: None):
    "Kill trainings of one kind so many times, and tell `each` of it; counts those that end unlike one never killed"
    luck, watch, log, began, struck = random.Random(f'{name} {seed}'), Watch(), work/f'{name}.log', time.time(), Counter()
    runs = different = 0
    straight = work/f'{name}_straight'/'run'
    if name == 'scst': tasks.train_run(*(CONFIGS['caption'][0], data, work/'captioner', CONFIGS['caption'][1]), say=lambda line: None)
    assert ended(process(watch, name, data, straight, log)) == 0, log.read_text()
    lasts = {p: watch.seconds(p) for p in PHASES} | {'start': time.time() - began}
    right, said = contents(straight), says(name, data, straight)
    while struck.total() < kills:
        run, status = work/f'{name}_{runs}'/'run', None
        while status != 0:
            pid = process(watch, name, data, run, log)
            if struck.total() < kills: where, status = kill(pid, watch, luck, lasts)
            else: where, status = None, ended(pid)
            assert status in (0, -signal.SIGKILL), f'{name}, exit status {status}: {log.read_text()[-2000:]}'
            struck[where] += where is not None
            each(f'killed, in: {where}' if where else 'came to its end')
        found = contents(run)
        wrong = [k for k in found.keys() | right.keys() if k not in found or k not in right or found[k] != right[k]]
        if says(name, data, run) != said: wrong.append('what it says')
        if wrong: say(f'{name}: after {dict(struck)} these differ: {sorted(wrong)}')
        shutil.rmtree(run.parent)
        runs, different = runs + 1, different + bool(wrong)
    result = {'kills': struck.total(), 'in': {p: struck[p] for p in PHASES}, 'runs': runs, 'files_compared': len(right),
              'different': different, 'seconds': round(time.time() - began)}
    say(f'{name}: {result}')
    return result


def fingerprint(run, said):
    "All that one gets from a run folder: to go on with, and to use; each as one of two states, and what was said about it"
    last = durable.whole_folder(run/'last', said.append)
    state = {p.name: p.read_bytes() for p in last.iterdir()}
    with contextlib.redirect_stderr(io.StringIO()) as err: found = tasks.open_run(CAPTIONS, run, device='cpu')
    said += err.getvalue().splitlines()
    weights = {k: v.numpy().tobytes() for k, v in found.model.state_dict().items()}
    return {'last': state, 'best': (weights, found.vocab.words, found.model.config), 'recipe': found.config, 'history': found.history}


def spoil(luck, path):
    "One bit of a file turned over, or its end cut off; what was done"
    data = path.read_bytes()
    place = luck.randrange(len(data))
    if luck.random() < .5: path.write_bytes(data[:place]); return 'cut'
    path.write_bytes(data[:place] + bytes([data[place] ^ 1 << luck.randrange(8)]) + data[place + 1:])
    return 'flip'


def spoilt(data, work, n, seed=0, say=print):
    "Spoil one file of a run folder, n times; counts by file what came of it, and what was read wrong without a word"
    luck, run, found = random.Random(seed), work/'spoilt'/'run', Counter()
    outcomes = 'the state before, and said', 'harmless', 'refused', 'read wrong'
    tasks.train_run(CAPTIONS, data, run, CONFIGS['caption'][1], device='cpu', say=lambda line: None)
    right, older = fingerprint(run, []), {}
    for what in 'last', 'best':                                       # each as it is where the newest is not there
        os.rename(run/what, run/'away')
        older[what] = fingerprint(run, [])[what]
        os.rename(run/'away', run/what)
        assert older[what] != right[what]
    files = [p for p in run.rglob('*') if p.is_file() and not any(q.startswith('.') for q in p.relative_to(run).parts)]
    for _ in range(n):
        path, said = luck.choice(files), []
        whole = path.read_bytes()
        how = spoil(luck, path)
        try: got = fingerprint(run, said)
        except UserError as e: outcome, said = 'refused', [str(e)]
        else:
            wrong = [k for k in right if got[k] != right[k] and not (k in older and got[k] == older[k] and said)]
            outcome = 'read wrong' if wrong else 'harmless' if got == right else 'the state before, and said'
            if wrong: say(f'{path}, {how}: wrong without a word: {wrong}')
        assert all(str(run) in line and '\n' not in line for line in said), said
        found[path.relative_to(run).as_posix(), outcome] += 1
        path.write_bytes(whole)
    names = sorted({name for name, _ in found})
    result = {'spoilt': n, 'files': len(files), 'by_file': {name: {o: found[name, o] for o in outcomes} for name in names},
              **{o: sum(found[name, o] for name in names) for o in outcomes}}
    say(f'spoilt files: {result}')
    return result


def drawn(folder): return read_flickr8k(make_shapes(folder, n=64, size=32))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Kill trainings and resume them')
    parser.add_argument('--kills', type=int, default=100, help='of each kind of training')
    parser.add_argument('--spoilt', type=int, default=1000, help='files of a run')
    parser.add_argument('--tasks', nargs='*', default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, help='JSON file; what it holds of other things stays')
    asked = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        data = drawn(work/'data')
        found = {name: survive(name, data, work, asked.kills, asked.seed) for name in asked.tasks}
        if asked.spoilt: found['files'] = spoilt(data, work, asked.spoilt, asked.seed)
    except UserError as e: sys.exit(str(e))
    finally: shutil.rmtree(work, ignore_errors=True)
    if asked.out:
        kept = read_json(asked.out) if asked.out.exists() else {}
        versions = {'torch': torch.__version__, 'python': platform.python_version()}
        command = 'python tools/kills.py ' + ' '.join(map(str, sys.argv[1:]))
        write_json(asked.out, {**kept, 'kills': {**found, 'command': command, 'date': time.strftime('%Y-%m-%d'), **versions}})
    if any(r.get('different') or r.get('read wrong') for r in found.values()): sys.exit('a killed run or a spoilt file made a difference')
