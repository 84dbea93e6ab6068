"""
Trainings that are killed and resumed, again and again, and compared with one that never was: `python tools/kills.py --kills 100
--out results/reliability.json` does it a hundred times for each kind of training (half an hour on two slow cores);
tests/test_survival.py does it a few times.
"""
import argparse
import json
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
from multimodal.finder import RETRIEVE, RetrieveConfig
from multimodal.painter import PAINT, PaintConfig
from multimodal.recipe import RunConfig
from multimodal.runs import CAPTIONS
from multimodal.scst import SCST
from multimodal.shapes import make_shapes

# Small, and yet with all that a resumed run must know: features on disk, dropout, averaged weights, augmentation by views,
# captions drawn anew in each epoch, a saving after each second step, and an end by early stopping.
SMALL = dict(data='shapes', image_size=32, embedding_dim=32, n_heads=2, min_count=1, max_words=20, dropout=.1, epochs=4,
             batch_size=8, ema=.9, captions_per_image=2, save_every=2, patience=2, lr=2e-3)
FROZEN = dict(weights='none', trainable='none', stage=2, views='plain,flip')
CONFIGS = {'caption': (CAPTIONS, RunConfig(**SMALL, **FROZEN, n_layers=1, label_smoothing=.1)),
           'scst': (SCST, RunConfig(**SMALL, **FROZEN, n_layers=1, samples=2)),
           'retrieve': (RETRIEVE, RetrieveConfig(**SMALL, **FROZEN)),
           'paint': (PAINT, PaintConfig(**SMALL))}
PHASES = 'start', 'cache', 'step', 'validation', 'checkpoint', 'rest'


class Watch:
    "Where a process is, in memory that its parent sees too: the number of the phase, and how often each was entered."
    def __init__(self): self.memory = mmap.mmap(-1, 8*(1 + len(PHASES)))
    def __getitem__(self, i): return int.from_bytes(self.memory[8*i:8*i + 8], 'little')
    def __setitem__(self, i, value): self.memory[8*i:8*i + 8] = value.to_bytes(8, 'little')
    def clear(self): self.memory[:] = bytes(len(self.memory))
    def phase(self): return PHASES[self[0]]
    def count(self, phase): return self[1 + PHASES.index(phase)]

    def during(self, phase, function):
        "The function, and while it runs the process is in this phase"
        number = PHASES.index(phase)
        def watched(*args, **kwargs):
            before = self[0]
            self[0], self[1 + number] = number, self[1 + number] + 1
            try: return function(*args, **kwargs)
            finally: self[0] = before if phase == 'checkpoint' else PHASES.index('rest')
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
    with open(log, 'a') as out: os.dup2(out.fileno(), 1); os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    begun = any((run/k).exists() for k in ('last', '.last.before'))
    tasks.train_run(task, data, run, config, begun, run.parent/'features', 'cpu')


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


def kill(pid, watch, luck, seconds):
    "Kill a process at a moment drawn at random; the phase it was in, or None where it came to its end before"
    target, began = luck.choice(PHASES[:-1]), time.perf_counter()
    if target == 'start': wait = lambda: time.perf_counter() - began > start
    start, entries = luck.random()*seconds, luck.randint(1, {'cache': 1, 'validation': 2}.get(target, 6))
    if target != 'start': wait = lambda: watch.count(target) >= entries
    while not wait():
        if (status := ended(pid, block=False)) is not None: return None, status
    time.sleep(luck.random()*(.3 if target == 'cache' else .02))
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
