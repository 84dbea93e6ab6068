"""Streams from shards: more of their promises, drawn at random, and what strangers, accidents and other commands do to them."""
import io
import json
import os
import pickle
import tarfile
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from multimodal.augment import flip_caption
from multimodal.core import UserError
from multimodal.dataloaders import CaptionDataset, make_loader
from multimodal.datasets import Item
from multimodal.encoder import EncoderConfig, ImageEncoder, ImageTransform
from multimodal.features import cache_facts
from multimodal.optim import TrainConfig, start_epoch
from multimodal.shards import Packed, array_file, photo_file, read_index, read_shard, write_shards
from multimodal.streams import ShardData, ShardLoader, shuffled
from multimodal.text import Vocab
from multimodal.training import Trainer

SIDE, SMALL = 8, ImageTransform(8)
SAID = ('a dog to the left of a cat', 'a dog on the right', 'two dogs', 'a cat', 'a black dog')
VOCAB = Vocab.build([*SAID, *map(flip_caption, SAID)], 1)


def picture(k):
    "A picture of one shade, which says its number; dark on the left, so that a mirror shows"
    pixels = np.full((SIDE, SIDE, 3), 20 + k % 220, np.uint8)
    pixels[:, :2], pixels[:, 2:4, 0] = 0, 20 + k // 220
    Image.fromarray(pixels).save(f := io.BytesIO(), 'png')
    return f.getvalue()


def samples(n): return (Packed(f'{k}.png', SAID, {'png': picture(k)}) for k in range(n))
def packed(folder, n, most=6_000): return ShardData(write_shards({'train': samples(n)}, folder, most=most))
def stream(data, **kw): return data.stream('train', VOCAB, None, SMALL, **kw)


def number(image):
    row = (SMALL.undo(image)*255).round()[:, 0]                          # [3, W]
    return int(row[1].max()) - 20 + 220*max(0, int(row[0, 2]) - 20)


def numbers(loader, epoch=0):
    loader.dataset.set_epoch(epoch)
    return [[] if b is None else [number(x) for x in b.images] for b in loader]


def first_tar(data): return data.folder/data.index['splits']['train'][0]['file']


def change(data, edit):
    "Rewrite the first shard member by member; the index is made to agree with its size, as a careful stranger would"
    path = first_tar(data)
    with tarfile.open(path) as tar: members = [(m.name, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as tar:
        for name, content in edit(members):
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    index = json.loads((data.folder/'index.json').read_text())
    index['splits']['train'][0]['bytes'] = path.stat().st_size
    (data.folder/'index.json').write_text(json.dumps(index))
    return ShardData(data.folder)


@pytest.fixture(scope='module')
def thirty(tmp_path_factory): return packed(tmp_path_factory.mktemp('shards')/'thirty', 30)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(), max_size=60), st.integers(1, 70), st.integers(0, 9))
def test_shuffling_loses_nothing_and_nobody_overtakes_by_more_than_the_buffer(values, size, seed):
    out = list(shuffled(enumerate(values), size, np.random.default_rng(seed)))
    assert sorted(i for i, _ in out) == list(range(len(values)))
    assert all(place >= i - size for place, (i, _) in enumerate(out))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(3, 12), world=st.integers(1, 3), epoch=st.integers(0, 3),
       most=st.sampled_from([1, 6_000, 10**6]), shuffle=st.booleans(), drop=st.booleans(), buffer=st.integers(1, 50))
def test_each_photo_once_in_all_processes_together(tmp_path_factory, n, batch, world, epoch, most, shuffle, drop, buffer):
    data = packed(tmp_path_factory.mktemp('x')/'s', n, most)
    each = lambda *part: numbers(ShardLoader(stream(data), batch, shuffle=shuffle, drop_last=drop, part=part, buffer=buffer), epoch)
    whole, shares = each(0, 1), [each(rank, world) for rank in range(world)]
    assert {len(s) for s in shares} == {len(whole)} == {n//batch if drop else -(-n//batch)}   # as many steps everywhere
    seen = Counter(k for s in shares for b in s for k in b)
    assert seen == Counter(k for b in whole for k in b) and set(seen.values()) <= {1}
    assert len(seen) == (n//batch*batch if drop else n) and (shuffle or drop or seen == Counter(range(n)))
    for b, *parts in zip(whole, *shares): assert sorted(b) == sorted(k for p in parts for k in p)  # the same global batch


def test_order_and_views_are_drawn_from_seed_and_epoch(thirty):
    how = dict(views=('plain', 'flip'), flip_caption=flip_caption, captions_per_image=2)
    def epoch(seed, epoch):
        loader = make_loader(stream(thirty, seed=seed, **how), 7, shuffle=True, seed=seed)
        loader.dataset.set_epoch(epoch)
        return [(b.images.tolist(), [t.tolist() for t in b.tokens]) for b in loader]
    assert epoch(1, 0) == epoch(1, 0)
    assert len({json.dumps(epoch(*pair)) for pair in [(1, 0), (1, 1), (2, 0)]}) == 3


def test_samples_are_those_of_a_list(thirty, tmp_path):
    items = []
    for p in samples(30):
        (tmp_path/p.name).write_bytes(p.files['png'])
        items.append(Item(tmp_path/p.name, p.captions))
    shy = lambda c: None if 'two' in c else flip_caption(c)
    change_colours = lambda image, captions, rng: (image.point(lambda v: (v*3 + int(rng.integers(9))) % 256), captions[::-1])
    for flip, change in (flip_caption, None), (shy, None), (flip_caption, change_colours):
        how = dict(seed=4, captions_per_image=3, views=('plain', 'flip', 'crop0_flip', 'crop1'), flip_caption=flip, augment=change)
        listed, streamed = CaptionDataset(items, VOCAB, SMALL, 5, **how), stream(thirty, max_len=5, **how)
        for epoch in 0, 3:
            listed.set_epoch(epoch), streamed.set_epoch(epoch)
            for i, files in streamed.numbered():
                a, b = listed[i], streamed.decode(i, files)
                assert torch.equal(a.image, b.image)
                assert [c.tolist() for c in a.captions] == [c.tolist() for c in b.captions]


def test_features_are_read_as_they_were_written_in_the_view_that_was_drawn(tmp_path):
    encoder = ImageEncoder(EncoderConfig(weights='none', stage=1, image_size=SIDE))
    shape = (encoder.n_patches, encoder.channels)
    mark = {'plain': 0, 'flip': 100}
    kept = (Packed(f'{k}', ('two dogs',) if k % 2 else ('a dog to the left of a cat',),
                   {f'{v}.npy': array_file(np.full(shape, k + m)) for v, m in mark.items()}) for k in range(12))
    facts = {k: v for k, v in cache_facts(encoder, SMALL, []).items() if k != 'files'}
    data = ShardData(write_shards({'train': kept}, tmp_path/'f', features=dict(facts=facts, views=[*mark], shape=shape, settings={})))
    shy = lambda c: None if 'two' in c else flip_caption(c)
    dataset, found = data.stream('train', VOCAB, encoder, SMALL, views=(*mark,), flip_caption=shy, seed=1), set()
    for epoch in range(4):
        dataset.set_epoch(epoch)
        for b in make_loader(dataset, 5, shuffle=True):
            for tokens, owners in zip(b.tokens, b.owners):
                for row, owner in zip(tokens, owners):
                    value, said = int(b.images[owner, 0, 0]), VOCAB.decode(row.tolist())
                    assert said == ('two dogs' if value % 2 else flip_caption(SAID[0]) if value >= 100 else SAID[0])
                    assert value < 100 or value % 2 == 0
                    found.add(value)
    assert {v >= 100 for v in found} == {True, False}
    with pytest.raises(UserError, match="no features of view 'crop0'"):
        data.stream('train', VOCAB, encoder, SMALL, views=('plain', 'crop0'))
    with pytest.raises(UserError, match='augment'):
        data.stream('train', VOCAB, encoder, SMALL, augment=lambda *a, **k: a)


@pytest.mark.parametrize('other, name', [(dict(stage=2), 'stage'), (dict(pool='vector'), 'pool'), (dict(image_size=16), 'image_size'),
                                         (dict(), 'weights'), (None, 'trainable')])
def test_features_of_another_encoder_are_refused_in_one_line_that_names_the_setting(tmp_path, other, name):
    torch.manual_seed(0)
    config = EncoderConfig(weights='none', stage=1, image_size=SIDE)
    encoder = ImageEncoder(config)
    facts = {k: v for k, v in cache_facts(encoder, SMALL, []).items() if k != 'files'}
    shape = (encoder.n_patches, encoder.channels)
    one = Packed('0', SAID, {'plain.npy': array_file(np.zeros(shape))})
    data = ShardData(write_shards({'train': [one]}, tmp_path/'f', features=dict(facts=facts, views=['plain'], shape=shape, settings={})))
    data.stream('train', VOCAB, encoder, SMALL)
    if other is not None:
        made = ImageEncoder(EncoderConfig(**{**vars(config), **other}))
        if name != 'weights': made.trunk.load_state_dict(encoder.trunk.state_dict(), strict=False)
    with pytest.raises(UserError) as e:
        data.stream('train', VOCAB, None if other is None else made, ImageTransform((other or {}).get('image_size', SIDE)))
    assert name in str(e.value) and '\n' not in str(e.value)


def test_a_training_stopped_in_the_middle_of_an_epoch_goes_on_exactly(thirty, tmp_path):
    def trainer(folder, seen):
        torch.manual_seed(0)
        model = torch.nn.Linear(SIDE, 1)
        def loss(model, batch):
            if model.training: seen.append(sorted(number(x) for x in batch.images))
            out = model(batch.images).pow(2)
            return out.sum(), out.numel(), {'loss': out.detach().sum()}
        loader = lambda: make_loader(stream(thirty, seed=3), 7, shuffle=True, seed=3)
        return Trainer(model, loss, loader(), loader(), TrainConfig(epochs=3, save_every=1, seed=3), folder,
                       device='cpu', say=lambda line: None)
    class Stop(Exception): pass
    at_once, first, rest = [], [], []
    whole = trainer(tmp_path/'whole', at_once)
    whole.fit()
    stopped = trainer(tmp_path/'parts', first)
    step = stopped.train_step
    def until(batch):
        if stopped.state.step == 7: raise Stop
        return step(batch)
    stopped.train_step = until
    with pytest.raises(Stop): stopped.fit()
    gone_on = trainer(tmp_path/'parts', rest)
    gone_on.fit(resume=True)
    assert len(first) == 7 and first + rest == at_once
    for a, b in zip(whole.model.parameters(), gone_on.model.parameters()): assert torch.equal(a, b)
    assert len({json.dumps(at_once[i:i + 5]) for i in (0, 5, 10)}) == 3                     # three different epochs


def test_start_epoch_reaches_the_stream(thirty):
    loader = make_loader(stream(thirty), 7, shuffle=True)
    start_epoch(loader, 0, 2)
    assert loader.dataset.epoch == 2


def test_words_are_counted_without_keeping_captions(tmp_path):
    import tracemalloc
    def peak(n):
        data = packed(tmp_path/str(n), n)
        tracemalloc.start()
        Vocab.build(data.captions('train'), 1)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most
    peak(10)                                                                # imports
    assert peak(1_500) < 1.5*peak(150)
    assert Vocab.build(ShardData(tmp_path/'150').captions('train'), 1) == Vocab.build(SAID, 1)


@pytest.mark.parametrize('at', [0, 100, 512, 1700, 0.5, -1, -1024, -1536])
@pytest.mark.parametrize('index_knows', [True, False])
def test_a_shard_cut_short_is_named(tmp_path, at, index_knows):
    data = packed(tmp_path/'s', 12)
    path = first_tar(data)
    whole, photos = path.read_bytes(), data.index['splits']['train'][0]['photos']
    path.write_bytes(whole[:int(at*len(whole)) if isinstance(at, float) else at])
    shard = dict(data.index['splits']['train'][0], bytes=path.stat().st_size if index_knows else len(whole))
    got = []
    try:
        for sample in read_shard(data.folder, shard): got.append(sample)
    except UserError as e:
        assert path.name in str(e) and '\n' not in str(e)
    else:                                                  # only what fills up the end is missing, and no photo
        assert index_knows and len(got) == photos
    with pytest.raises(UserError, match='gone.tar'): list(read_shard(data.folder, dict(shard, file='gone.tar')))


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, .999), value=st.binary(min_size=1, max_size=600))
def test_damage_anywhere_is_a_clear_error_or_a_sample_left_out(thirty, tmp_path_factory, place, value):
    "Bytes overwritten at any place: never a traceback, and never more photos than there are"
    data = packed(tmp_path_factory.mktemp('x')/'s', 8)
    path = first_tar(data)
    whole = bytearray(path.read_bytes())
    start = int(place*len(whole))
    whole[start:start + len(value)] = value[:len(whole) - start]
    path.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: found = sum(len(b.images) for b in make_loader(stream(data), 8))
        except UserError as e: assert '\n' not in str(e)
        else: assert found <= 8


def test_pickles_and_strange_names_are_only_data(tmp_path):
    class Trap:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/sprung',)
    objects = io.BytesIO()
    np.save(objects, np.array([Trap()], dtype=object), allow_pickle=True)
    def edit(members):
        for name, content in members:
            if name.startswith('000000000'): name = name.replace('000000000', '../../../escaped')
            yield name, content
            if name.endswith('.json'):
                key = name.removesuffix('.json')
                for ending in 'pickle', 'pyd', 'pkl', 'pth': yield f'{key}.{ending}', pickle.dumps(Trap())
                yield f'{key}.plain.npy', objects.getvalue()
    data = change(packed(tmp_path/'deep'/'er'/'s', 5, 10**6), edit)
    assert sorted(k for b in numbers(make_loader(stream(data), 4)) for k in b) == [0, 1, 2, 3, 4]
    assert not (tmp_path/'sprung').exists() and not list(tmp_path.rglob('*escaped*'))
    facts = dict(facts={}, views=['plain'], shape=[1, 1])
    data.index['features'] = facts
    from multimodal.streams import ShardStream
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        bad = ShardStream(data, 'train', VOCAB, SMALL)
        assert [bad.decode(i, f) for i, f in bad.numbered()] == [None]*5
    assert len(said) == 5 and not (tmp_path/'sprung').exists()


@pytest.mark.parametrize('broken', [{'png': b'no photo'}, {'png': picture(2)[:60]}, {}, {'json': b'{'}, {'json': b'[]'},
                                    {'json': b'{"name": "x", "captions": [7]}'}])
def test_broken_samples_are_counted_and_named_and_the_rest_goes_on(tmp_path, broken):
    def edit(members):
        for name, content in members:
            key, ending = name.split('.', 1)
            if key != '000000002': yield name, content
            elif broken and ending in broken: yield name, broken[ending]
            elif broken or ending == 'json': yield name, content
    data = change(packed(tmp_path/'s', 6, 10**6), edit)
    dataset = stream(data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert [k for b in numbers(make_loader(dataset, 4)) for k in b] == [0, 1, 3, 4, 5]
    assert list(dataset.skipped) == ['2'] and len(said) == 1 and '000000002' in str(said[0].message)


@pytest.mark.parametrize('part', [(0, 1), (2, 3)])
def test_a_broken_sample_that_is_alone_in_its_batch_or_share_does_not_stop_the_night(tmp_path, part):
    bad = lambda: (p._replace(files={'png': b'no photo'}) if k in (2, 6) else p for k, p in enumerate(samples(7)))
    data = ShardData(write_shards({'train': bad()}, tmp_path/'s'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        batches = list(make_loader(stream(data), 3, part=part))             # the last batch of 7 is the broken 6 alone
    assert len(batches) == 3


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt(), ValueError('any')])
@pytest.mark.parametrize('after', [0, 5, 29])
def test_writing_interrupted_leaves_nothing(tmp_path, error, after):
    def until():
        for k, p in enumerate(samples(30)):
            if k == after: raise error
            yield p
    with pytest.raises((UserError, KeyboardInterrupt, ValueError)) as e: write_shards({'train': until()}, tmp_path/'s')
    assert list(tmp_path.iterdir()) == []
    if isinstance(error, OSError): assert isinstance(e.value, UserError) and 'No space left' in str(e.value)


def test_writing_killed_leaves_nothing_that_reads_as_whole(tmp_path, monkeypatch):
    "As after a loss of power: nothing can be cleaned up any more"
    import shutil
    monkeypatch.setattr(shutil, 'rmtree', lambda *a, **k: None)
    def until():
        yield from samples(20)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_shards({'train': until()}, tmp_path/'s', most=6_000)
    left = [p for p in tmp_path.iterdir()]
    assert not (tmp_path/'s').exists() and left                          # the half-made folder is there, under another name
    for p in left:
        with pytest.raises(UserError): read_index(p)


def test_a_full_disk_is_one_clear_line(tmp_path):
    "A file system that is really full: /dev/full takes no byte"
    if not os.path.exists('/dev/full'): pytest.skip('no /dev/full')
    import builtins
    real = builtins.open
    full = lambda file, mode='r', *a, **k: real('/dev/full' if str(file).endswith('.tar') else file, mode.replace('x', 'w'), *a, **k)
    from unittest.mock import patch
    with patch('builtins.open', full), pytest.raises(UserError, match='No space left on device') as e:
        write_shards({'train': samples(400)}, tmp_path/'s')
    assert '\n' not in str(e.value) and list(tmp_path.iterdir()) == []


def test_names_and_captions_of_any_text_survive(tmp_path):
    name, said = b'caf\xe9.png'.decode('utf-8', 'surrogateescape'), ('ein Hund überquert die Straße', '犬', 'dog \U0001f415')
    data = ShardData(write_shards({'train': [Packed(name, said, {'png': picture(0)})]}, tmp_path/'s'))
    assert tuple(data.captions('train')) == said


def test_written_twice_the_same_bytes(tmp_path):
    a, b = (packed(tmp_path/name, 9) for name in 'ab')
    assert first_tar(a).read_bytes() == first_tar(b).read_bytes()
    with pytest.raises(UserError, match='there already'): packed(tmp_path/'a', 9)


def test_photos_go_in_as_they_are(tmp_path):
    for ending, kind in ('jpg', 'jpg'), ('png', 'png'), ('bmp', 'png'), ('gif', 'png'):
        Image.open(io.BytesIO(picture(3))).save(tmp_path/f'a.{ending}')
        (found, content), = photo_file(tmp_path/f'a.{ending}').items()
        assert found == kind and (ending != kind or content == (tmp_path/f'a.{ending}').read_bytes())
    (tmp_path/'a.jpg').write_bytes(b'nothing')
    with pytest.raises(UserError, match='a.jpg'): photo_file(tmp_path/'a.jpg')


@pytest.mark.parametrize('spoil', [lambda i: i.pop('splits'), lambda i: i.update(format='other'), lambda i: i.update(splits=[1]),
                                   lambda i: i['splits']['train'][0].update(file='../x.tar'),
                                   lambda i: i['splits']['train'][0].update(photos='many'),
                                   lambda i: i['splits']['train'][0].update(photos=-1), lambda i: i.pop('drawn')])
def test_an_index_that_is_none_is_refused(tmp_path, spoil):
    data = packed(tmp_path/'s', 5)
    index = json.loads((data.folder/'index.json').read_text())
    spoil(index)
    (data.folder/'index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match='index.json'): read_index(data.folder)


def test_shards_say_what_they_are_not_for(thirty):
    for ask in lambda: thirty['train'], lambda: stream(thirty).items:
        with pytest.raises(UserError) as e: ask()
        assert '\n' not in str(e.value)


def test_an_index_of_another_program_does_not_hide_a_data_set(tmp_path):
    from multimodal.shapes import make_shapes
    from multimodal.terminal import open_data
    folder = make_shapes(tmp_path/'drawn', n=24, size=24)
    (folder/'index.json').write_text('{"format": "of something else"}')
    assert len(open_data(str(folder))['train']) == 18


def test_packed_drawn_scenes_are_learned_by_their_recipe_and_other_uses_end_in_one_line(home, tmp_path, capsys):
    from multimodal.cli import mm_augment, mm_train, mm_validate
    from multimodal.packing import mm_shard
    from multimodal.wiring import config_to_train, task_of
    shards, run = str(tmp_path/'s'), str(tmp_path/'run')
    mm_shard('shapes:60', shards)
    assert config_to_train(task_of(None, None), shards, {}) == replace(config_to_train(task_of(None, None), 'shapes', {}), data=shards)
    mm_train(shards, run, epochs=1, device='cpu', set=['stage=1', 'embedding_dim=16', 'n_layers=1', 'image_size=24'])
    for ask in (lambda: mm_validate(run, device='cpu'), lambda: mm_augment(shards, sheet=str(tmp_path/'a.png')),
                lambda: mm_train(shards, str(tmp_path/'paid'), task='scst', init=run, device='cpu'), lambda: mm_shard(shards, run + '2')):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: ask()
        err = capsys.readouterr().err.strip()
        assert e.value.code == 2 and '\n' not in err and 'shards' in err
    assert not (tmp_path/'paid'/'config.json').exists()


def test_a_step_of_which_nothing_can_be_read_changes_no_weight(tmp_path):
    model = torch.nn.Linear(2, 1)
    loss = lambda model, batch: (model(batch).pow(2).sum(), len(batch), {})
    trainer = Trainer(model, loss, [None, torch.ones(3, 2)], [torch.ones(3, 2)], TrainConfig(epochs=1, warmup=0.), device='cpu',
                      say=lambda line: None)
    before = model.weight.clone()
    assert trainer.train_step(None) == 0 and trainer.state.step == 1 and torch.equal(model.weight, before)
    assert trainer.train_step(torch.ones(3, 2)) > 0 and not torch.equal(model.weight, before)
