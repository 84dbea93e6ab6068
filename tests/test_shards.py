"""Shards: whole or not at all, the same samples as a list in memory gives, each once, and damage that is said in one line."""
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from multimodal.checkpoint import load_tensors
from multimodal.core import UserError
from multimodal.dataloaders import CaptionDataset, make_loader
from multimodal.datasets import Item
from multimodal.encoder import EncoderConfig, ImageEncoder, ImageTransform
from multimodal.features import cache_facts
from multimodal.recipe import RunConfig
from multimodal.runs import train_captions
from multimodal.shapes import describe_scene, draw_scene, random_scene
from multimodal.shards import Packed, array_file, read_index, read_shard, write_shards
from multimodal.streams import ShardData, shuffled
from multimodal.text import Vocab
from multimodal.training import Trainer

SMALL = ImageTransform(32)


def samples(n, first=0):
    for k in range(first, first + n):
        scene = random_scene(random.Random(k), .75)
        draw_scene(scene, 32, k).save(f := io.BytesIO(), 'jpeg', quality=95, subsampling=0)
        yield Packed(f'scene_{k}.jpg', tuple(describe_scene(scene, seed=k)), {'jpg': f.getvalue()})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_shards({'train': samples(53), 'dev': samples(9, 53)}, tmp_path_factory.mktemp('s')/'shards', most=4e4)


@pytest.fixture(scope='module')
def vocab(folder): return Vocab.build(ShardData(folder).captions('train'), 1)


def names(loader):
    "Each batch as the sums of its pictures, which differ between samples"
    return [[] if b is None else b.images.double().flatten(1).sum(1).tolist() for b in loader]


@pytest.mark.parametrize('world', [1, 2, 3])
@pytest.mark.parametrize('size', [3, 7, 53, 60])
def test_each_sample_once_between_all_processes(folder, vocab, world, size):
    stream = ShardData(folder).stream('train', vocab, None, SMALL)
    assert len(stream.shards) > 3
    shares = [names(make_loader(stream, size, shuffle=True, part=(rank, world))) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-53//size)}
    found = [x for share in shares for batch in share for x in batch]
    assert len(found) == len(set(found)) == 53
    assert sorted(found) == sorted(x for batch in names(make_loader(stream, 10)) for x in batch)


def test_batches_smaller_than_the_processes_are_refused(folder, vocab):
    with pytest.raises(UserError, match='cannot be shared'):
        make_loader(ShardData(folder).stream('train', vocab, None, SMALL), 2, part=(0, 3))


def test_order_depends_on_seed_and_epoch_and_on_nothing_else(folder, vocab):
    def order(seed, epoch):
        stream = ShardData(folder).stream('train', vocab, None, SMALL, seed=seed)
        stream.set_epoch(epoch)
        np.random.seed(random.randrange(2**31))
        return names(make_loader(stream, 7, shuffle=True, seed=seed))
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


@pytest.mark.parametrize('most', [None, 1, 3])
def test_samples_are_those_of_the_data_set_in_memory(folder, vocab, tmp_path, most):
    items = []
    for p in samples(53):
        (tmp_path/p.name).write_bytes(p.files['jpg'])
        items.append(Item(tmp_path/p.name, p.captions))
    def mirrored(c): return None if 'above' in c else c.replace('left', 'LEFT')
    how = dict(seed=3, captions_per_image=most, views=('plain', 'flip', 'crop0', 'crop1_flip'), flip_caption=mirrored)
    listed = CaptionDataset(items, vocab, SMALL, 9, **how)
    stream = ShardData(folder).stream('train', vocab, None, SMALL, 9, **how)
    for epoch in range(3):
        listed.set_epoch(epoch), stream.set_epoch(epoch)
        for i, files in stream.numbered():
            a, b = listed[i], stream.decode(i, files)
            assert torch.equal(a.image, b.image)
            assert [x.tolist() for x in a.captions] == [x.tolist() for x in b.captions]


def test_limit_takes_the_first(folder, vocab):
    data = ShardData(folder)
    all_of_it, few = (names(make_loader(data.stream('train', vocab, None, SMALL, most=m), 64))[0] for m in (None, 20))
    assert few == all_of_it[:20]


def test_a_run_goes_on_in_the_middle_of_an_epoch(folder, tmp_path, monkeypatch):
    config = RunConfig(weights='none', stage=1, image_size=32, embedding_dim=16, n_layers=1, n_heads=2, min_count=1,
                       epochs=2, batch_size=8, save_every=3, dropout=.1)
    train_captions(ShardData(folder), tmp_path/'whole', config, device='cpu', say=lambda line: None)
    step = Trainer.train_step
    def breaks(self, batch):
        if self.state.step == 10: raise RuntimeError('power cut')
        return step(self, batch)
    monkeypatch.setattr(Trainer, 'train_step', breaks)
    with pytest.raises(RuntimeError, match='power cut'):
        train_captions(ShardData(folder), tmp_path/'cut', config, device='cpu', say=lambda line: None)
    monkeypatch.undo()
    assert json.loads((tmp_path/'cut'/'last'/'state.json').read_text())['state']['step'] == 9     # 7 steps an epoch
    train_captions(ShardData(folder), tmp_path/'cut', config, resume=True, device='cpu', say=lambda line: None)
    a, b = (load_tensors(tmp_path/run/'last'/'model.safetensors') for run in ('whole', 'cut'))
    assert all(torch.equal(a[k], b[k]) for k in a)


def damaged(folder, tmp_path, change):
    "Samples read from a shard whose file and entry were changed"
    shard = read_index(folder)['splits']['train'][0]
    data, shard = change((folder/shard['file']).read_bytes(), shard)
    (tmp_path/shard['file']).write_bytes(data)
    return list(read_shard(tmp_path, shard))


@pytest.mark.parametrize('keep', [100, 512, 1536, 5_000, 20_480, 30_000])
@pytest.mark.parametrize('known', [False, True])
def test_a_truncated_shard_is_named(folder, tmp_path, keep, known):
    with pytest.raises(UserError, match='train-00000.tar: (has|damaged)'):
        damaged(folder, tmp_path, lambda data, shard: (data[:keep], shard | {'bytes': keep} if known else shard))


def test_a_shard_with_an_overwritten_header_is_named(folder, tmp_path):
    with pytest.raises(UserError, match='train-00000.tar: (has|damaged)'):
        damaged(folder, tmp_path, lambda data, shard: (data[:10_240] + b'x'*512 + data[10_752:], shard))


def test_a_missing_shard_is_named(folder, tmp_path):
    with pytest.raises(UserError, match='train-00000.tar: no such file'):
        list(read_shard(tmp_path, read_index(folder)['splits']['train'][0]))


def test_names_in_a_shard_are_only_data(folder, vocab, tmp_path):
    "Path traversal, a pickle that would make a file, and a link: nothing is written, run or followed"
    class Trap:
        def __reduce__(self): return (open, (str(tmp_path/'sprung'), 'w'))
    np.save(f := io.BytesIO(), np.array([Trap()], dtype=object))
    p = next(samples(1))
    about = json.dumps({'name': '../../x.jpg', 'captions': ['a red star']}).encode()
    members = [('../../evil.jpg', p.files['jpg']), ('../../evil.json', about), ('../../evil.pickle', pickle.dumps(Trap())),
               ('../../evil.pyd', pickle.dumps(Trap())), ('/b.json', about), ('/b.plain.npy', f.getvalue())]
    (tmp_path/'a'/'b').mkdir(parents=True)
    with tarfile.open(tmp_path/'a'/'b'/'t.tar', 'w') as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    size = (tmp_path/'a'/'b'/'t.tar').stat().st_size
    index = json.loads((folder/'index.json').read_text())
    index['splits'] = {'train': [dict(file='t.tar', photos=2, captions=2, bytes=size)]}
    (tmp_path/'a'/'b'/'index.json').write_text(json.dumps(index))
    before = sorted(tmp_path.rglob('*'))
    stream = ShardData(tmp_path/'a'/'b').stream('train', vocab, None, SMALL)
    with pytest.warns(UserWarning, match='left out: sample /b: no photo'): assert len(next(iter(make_loader(stream, 2))).images) == 1
    assert list(stream.skipped) == ['1']
    assert sorted(tmp_path.rglob('*')) == before and not (tmp_path/'sprung').exists()
    index['splits']['train'][0]['file'] = '../t.tar'
    (tmp_path/'a'/'b'/'index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match='cannot be a shard'): ShardData(tmp_path/'a'/'b')


def test_killed_while_writing_leaves_nothing_that_reads_as_whole(tmp_path):
    program = ('import sys, time; sys.path.insert(0, sys.argv[2]); from test_shards import samples, write_shards\n'
               'def slow():\n    for k, p in enumerate(samples(90)):\n        if k == 50: print("here", flush=True); time.sleep(60)\n'
               '        yield p\nwrite_shards({"train": slow()}, sys.argv[1], most=3e4)')
    child = subprocess.Popen([sys.executable, '-c', program, tmp_path/'out', os.path.dirname(__file__)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b'here\n'
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path/'out').exists() and not list(tmp_path.rglob('index.json')) and list(tmp_path.rglob('*.tar'))
    write_shards({'train': samples(5)}, tmp_path/'out')
    assert len(list(ShardData(tmp_path/'out').captions('train'))) == 25


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError(28, 'No space left on device')])
def test_interrupted_writing_cleans_up(tmp_path, error):
    def breaks():
        yield from samples(10)
        raise error
    with pytest.raises(UserError if isinstance(error, OSError) else error): write_shards({'train': breaks()}, tmp_path/'out')
    assert not list(tmp_path.iterdir())


def test_features_of_other_settings_are_refused(vocab, tmp_path):
    base = EncoderConfig(weights='none', stage=1, image_size=32)
    encoder = ImageEncoder(base)
    facts = {k: v for k, v in cache_facts(encoder, SMALL, []).items() if k != 'files'}
    packed = (Packed(f'{k}.jpg', ('a red star',), {'plain.npy': array_file(np.full((64, 64), k))}) for k in range(3))
    data = ShardData(write_shards({'train': packed}, tmp_path/'f', features=dict(facts=facts, views=['plain'], shape=[64, 64])))
    batch = next(iter(make_loader(data.stream('train', vocab, encoder, SMALL), 3)))
    assert batch.images[:, 5, 5].tolist() == [0, 1, 2]
    def other(**kw): return ImageEncoder(replace(base, **kw))
    for wrong, transform, setting in ((other(stage=2), SMALL, 'stage'), (other(pool='vector'), SMALL, 'pool'),
                                      (other(), SMALL, 'weights'), (encoder, ImageTransform(64), 'image_size')):
        with pytest.raises(UserError, match=f'change {setting} '): data.stream('train', vocab, wrong, transform)
    with pytest.raises(UserError, match='wants pixels'): data.stream('train', vocab, None, SMALL)
    with pytest.raises(UserError, match="no features of view 'flip'"):
        data.stream('train', vocab, encoder, SMALL, views=('plain', 'flip'), flip_caption=str)


def test_memory_holds_a_buffer_and_no_more():
    "However long the stream, no more samples are alive than the buffer has, and one"
    alive, most = [0], [0]
    class Thing:
        def __init__(self): alive[0] += 1; most[0] = max(most[0], alive[0])
        def __del__(self): alive[0] -= 1
    assert sum(1 for _ in shuffled((Thing() for _ in range(5000)), 50, np.random.default_rng(0))) == 5000
    assert most[0] <= 53


def test_reading_is_not_slower_for_more_shards(vocab, tmp_path):
    "20,000 captions beside 2,000: what a caption costs, not the sum, must be alike"
    few, many = (write_shards({'train': samples(n)}, tmp_path/str(n), most=1e6) for n in (400, 4000))
    def speed(where):
        began = time.process_time()
        n = sum(1 for k in range(4 if where == few else 1) for _ in ShardData(where).captions('train'))
        return n/(time.process_time() - began)
    turns = [(speed(few), speed(many)) for _ in range(3)]
    assert np.median([b for _, b in turns]) > .5*np.median([a for a, _ in turns])
