"""All that learns and all that writes, with its tensors on another device; what forgets to take one along is found here."""
from dataclasses import replace
from functools import partial

import pytest
import torch
from elsewhere import DEVICE, There, elsewhere

from multimodal.core import load_image
from multimodal.datasets import load_dataset
from multimodal.encoder import ImageTransform
from multimodal.ensemble import together
from multimodal.explain import drops, explain
from multimodal.finder import RETRIEVAL
from multimodal.generate import GenerateConfig
from multimodal.neighbours import ask_neighbours
from multimodal.painter import PAINTING, load_painter
from multimodal.races import race
from multimodal.roundtrip import tell
from multimodal.runs import CAPTIONS, load_run
from multimodal.scst import SCST, scst_recipe
from multimodal.shapes import make_shapes
from multimodal.tasks import train_run

SMALL = dict(weights='none', trainable='none', stage=2, image_size=32, embedding_dim=32, n_layers=1, n_heads=2, epochs=2, min_count=1,
             max_words=20, batch_size=16, dropout=0., ema=.9)
PAINTER = dict(epochs=2, batch_size=16, image_size=16, embedding_dim=32, n_layers=1, text_layers=1, n_heads=2, mend_layers=1, width=8,
               sketch_steps=3, min_count=1, max_words=20, dropout=0., blank=0., ema=.9, steps=3)
HERE, AWAY = 'cpu', DEVICE.type
WAYS = {'greedy': GenerateConfig('greedy'), 'beam': GenerateConfig('beam', flip=True), 'sample': GenerateConfig('sample', no_repeat_ngram=2)}


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('devices')


@pytest.fixture(scope='module')
def data(folder): return load_dataset(make_shapes(folder/'shapes', 70, size=32))


@pytest.fixture(scope='module')
def run(data, folder):
    train_run(CAPTIONS, data, folder/'captioner', CAPTIONS.config(**SMALL), device=HERE, say=lambda line: None)
    return folder/'captioner'


@pytest.fixture(scope='module')
def painter(data, folder):
    config = PAINTING.config(**PAINTER)
    return train_run(PAINTING, data, folder/'painter', config, device=HERE, say=lambda line: None).folder


def same(a, b, name):
    "Histories and weights of two runs, up to rounding: a device of another kind may add up in another order"
    for x, y in zip(a.history, b.history, strict=True):
        for key in x.keys() - {'seconds'}: assert x[key] == pytest.approx(y[key], rel=1e-3, abs=1e-4), (name, key)


def test_such_a_device_finds_what_is_mixed():
    with elsewhere():
        x = torch.ones(3, device=DEVICE)
        assert isinstance(x + 1, There) and (x + torch.tensor(1)).device == DEVICE and x.tolist() == [1., 1., 1.]
        with pytest.raises(RuntimeError, match='one tensor is elsewhere'): x + torch.ones(3)
        with pytest.raises(RuntimeError, match='one tensor is elsewhere'): torch.nn.Linear(3, 3)(x)
        with pytest.raises(TypeError, match='no numbers here'): x.numpy()


def learned_there(task, data, folder, config, name, **more):
    "Train here and there, and compare; the run that was trained there"
    runs = [train_run(task, data, folder/f'{name} {HERE}', config, device=HERE, say=lambda line: None, **more)]
    with elsewhere() as used:
        runs.append(train_run(task, data, folder/f'{name} {AWAY}', config, device=AWAY, say=lambda line: None, **more))
    assert used.count > 100 and all(isinstance(p, There) for p in runs[1].model.parameters())
    return runs


@pytest.mark.parametrize('more', [{}, {'stage': 1, 'trainable': 'all', 'optimizer': 'muon', 'word_dropout': .1},
                                  {'fusion': 'both', 'label_smoothing': .1, 'n_layers': 2}, {'fusion': 'fc', 'pool': 'vector'}], ids=str)
def test_captions_are_learned_there(data, folder, more):
    a, b = learned_there(CAPTIONS, data, folder, CAPTIONS.config(**{**SMALL, **more}), f'captions {len(str(more))}')
    if 'word_dropout' not in more: same(a, b, more)


def test_searching_is_learned_and_done_there(data, folder):
    runs = learned_there(RETRIEVAL, data, folder, RETRIEVAL.config(**SMALL, captions_per_image=2), 'finder')
    same(*runs, 'finder')
    found = [runs[0].evaluate(data, 'test')]
    with elsewhere(): found.append(runs[1].evaluate(data, 'test'))
    for key, value in found[0].items(): assert found[1][key] == (pytest.approx(value, abs=.05) if isinstance(value, float) else value), key


def test_painting_is_learned_and_done_there(data, folder, painter):
    runs = learned_there(PAINTING, data, folder, PAINTING.config(**PAINTER), 'painter')
    assert len(runs[1].history) == 2                              # noise is drawn on the device, so that losses differ
    here = load_painter(painter, device=HERE).draw(['a red circle', 'a big green square'], 3)
    with elsewhere(): there = load_painter(painter, device=AWAY).draw(['a red circle', 'a big green square'], 3)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=0)


def test_paid_captions_are_learned_there(data, folder, run):
    config = scst_recipe(load_run(run, device=HERE).config)
    runs = learned_there(SCST, data, folder, replace(config, epochs=1, batch_size=16), 'paid', init=run)
    same(*runs, 'paid')


@pytest.mark.parametrize('way', WAYS)
def test_captions_are_written_there(data, run, way):
    here, photos = load_run(run, device=HERE), [item.image for item in data['dev']]
    said = [r['caption'] for r in here.caption(photos, WAYS[way])]
    with elsewhere() as used: there = load_run(run, device=AWAY).caption(photos, WAYS[way])
    assert [r['caption'] for r in there] == said and used.count > 100


def test_measured_there(data, run):
    here = load_run(run, device=HERE).evaluate(data, 'dev')
    with elsewhere(): there = load_run(run, device=AWAY).evaluate(data, 'dev')
    assert here.keys() == there.keys()
    for key in here: assert here[key] == (pytest.approx(there[key], abs=1e-4) if isinstance(here[key], float) else there[key]), key


def test_several_write_together_there_and_ask_neighbours(data, run, folder):
    train_run(CAPTIONS, data, folder/'other', CAPTIONS.config(**SMALL, seed=5), device=HERE, say=lambda line: None)
    photos, told = [item.image for item in data['dev']], []
    def write(device):
        first, other = (load_run(f, device=device) for f in (run, folder/'other'))
        ask_neighbours(first, lambda: data)
        return [r['caption'] for r in together([first, other]).caption(photos, GenerateConfig('sample', draws=5, flip=True))]
    told.append(write(HERE))
    with elsewhere(): told.append(write(AWAY))
    assert told[0] == told[1]


def test_explained_there(data, run):
    photos, told = [load_image(item.image) for item in data['dev']], []
    def look(device):
        captioner = load_run(run, device=device)
        words = explain(captioner, photos)
        with torch.no_grad():
            pixels = ImageTransform(captioner.config.image_size)(photos[0])[None].to(next(captioner.model.parameters()).device)
            tokens = torch.tensor(captioner.vocab.encode('a red circle'))
            lost = drops(captioner.model, captioner.model.encode(pixels)[0], tokens, torch.rand(len(tokens) - 2, 4, 4), 2)
        return words, {way: v.shape for way, v in lost.items()}
    told.append(look(HERE))
    with elsewhere(): told.append(look(AWAY))
    assert [e.caption for e in told[0][0]] == [e.caption for e in told[1][0]] and told[0][1] == told[1][1]
    for a, b in zip(told[0][0], told[1][0]): torch.testing.assert_close(a.maps, b.maps, atol=1e-4, rtol=0)


def test_drawings_are_described_there(data, run):
    pictures = torch.rand(3, 3, 32, 32)
    said = tell(load_run(run, device=HERE), pictures)
    with elsewhere(): assert tell(load_run(run, device=AWAY), pictures) == said


def test_races_are_run_there(data, run, monkeypatch):
    from multimodal import benchmarks
    from multimodal.benchmarks import ALL, Bench, Speed
    once = lambda ours, theirs, rounds: race(ours, theirs, rounds, warm=0)
    monkeypatch.setattr(benchmarks, 'race', once)
    monkeypatch.setattr(benchmarks, 'large_product', partial(benchmarks.large_product, n=256))
    monkeypatch.setattr(benchmarks, 'word_times', partial(benchmarks.word_times, times=1))
    with elsewhere() as used:
        away = load_run(run, device=AWAY)
        away.config = replace(away.config, max_words=8)                  # each word costs a while there
        bench = Bench(away, data['train'][:16], rounds=1, quick=True)
        rows = [row for part in ALL for row in part(bench)]
    assert bench.device == DEVICE and used.count > 1000 and len(rows) > 15
    for row in rows: assert isinstance(row, Speed) and row.ours > 0 and row.ratio > 0, row
