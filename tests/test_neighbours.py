"""Neighbours: whom they find, what they say, and that what is kept is the same."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from multimodal.cider import cider
from multimodal.core import UserError
from multimodal.dataloaders import pad
from multimodal.generate import Caption, GenerateConfig
from multimodal.neighbours import Neighbours, agreement, chooser, consensus, load_neighbours, save_neighbours, way_to_write
from multimodal.text import EOS

C = 6


def make(seed=0, M=12, **how):
    "Photos with one to four captions each"
    rng = np.random.default_rng(seed)
    captions = [[np.array([*rng.integers(4, 9, rng.integers(1, 7)), EOS]) for _ in range(rng.integers(1, 5))] for _ in range(M)]
    keys = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(M, C))).float(), dim=1)
    owners = torch.arange(M).repeat_interleave(torch.tensor([len(cs) for cs in captions]))
    return Neighbours(keys, torch.zeros(C), pad([c for cs in captions for c in cs]), owners, **how), captions


def test_the_nearest_are_those_with_the_largest_cosine():
    asked, _ = make(k=4)
    features = torch.randn(5, 3, C, generator=torch.Generator().manual_seed(0))
    for row, photo in zip(asked.nearest(features).tolist(), features.mean(1)):
        cosines = [float(torch.cosine_similarity(photo, key, dim=0)) for key in asked.keys]
        assert row == sorted(range(len(cosines)), key=lambda j: -cosines[j])[:4]
    assert make(k=99)[0].nearest(features).shape == (5, 12)                      # no more than there are


def test_the_centre_is_taken_away_first():
    asked, _ = make(k=1)
    shifted = Neighbours(asked.keys, torch.full((C,), 7.), asked.tokens, asked.owners, k=1)
    features = torch.randn(5, 3, C, generator=torch.Generator().manual_seed(1))
    assert torch.equal(shifted.nearest(features + 7), asked.nearest(features))


def test_what_they_say_is_cider_of_each_caption_against_all_of_theirs():
    asked, captions = make()
    rng = np.random.default_rng(1)
    near = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i))[:3] for i in range(4)])
    mine = [[rng.integers(4, 9, rng.integers(1, 6)).tolist() for _ in range(n)] for n in (1, 3, 2, 5)]
    for said, row, cs in zip(agreement(asked, near, mine), near.tolist(), mine):
        theirs = pad([c for j in row for c in captions[j]]).numpy()
        assert len(said) == len(cs)
        for s, c in zip(said, cs):
            alone = cider(np.array([[*c, EOS]]), np.zeros(1, int), theirs, np.zeros(len(theirs), int), asked.idf)
            assert s == pytest.approx(alone[0], abs=1e-12)


def test_they_choose_by_logprob_and_what_they_say():
    asked, captions = make(k=1, weight=0.)
    run = SimpleNamespace(model=SimpleNamespace(encoder=SimpleNamespace(n_patches=3, channels=C)))
    theirs = captions[5][0][:-1].tolist()
    found = [[Caption([4, 4, 4], -1.), Caption(theirs, -1.5)]]
    look = asked.keys[5].expand(1, 3, C)
    assert chooser(run, asked)(look, found, GenerateConfig()) == [found[0][0]]
    asked.weight = 100.
    assert chooser(run, asked)(look, found, GenerateConfig()) == [found[0][1]]


def test_length_counts_as_the_memory_says_and_not_as_the_beam_searched():
    asked, _ = make(k=1, weight=0.)
    run = SimpleNamespace(model=SimpleNamespace(encoder=SimpleNamespace(n_patches=3, channels=C)))
    found = [[Caption([4]*2, -1.), Caption([5]*8, -1.5)]]            # 3 and 9 with the end: -1.5/9 > -1/3, but -1.5 < -1
    look = asked.keys[5].expand(1, 3, C)
    for asked.length_penalty, best in (0., 0), (1., 1):
        for searched in 0., 1.:
            assert chooser(run, asked)(look, found, GenerateConfig(length_penalty=searched)) == [found[0][best]]


def test_draws_judge_one_another_and_neighbours_help():
    asked, captions = make(k=1, weight=0.)
    run = SimpleNamespace(model=SimpleNamespace(encoder=SimpleNamespace(n_patches=3, channels=C)))
    theirs = captions[5][0][:-1].tolist()
    drawn = [[4, 5, 6, 7], [8, 8], [4, 5, 6, 8], theirs]
    table, one = pad([np.array([*c, EOS]) for c in drawn]).numpy(), np.zeros(4, int)
    mine, = consensus(asked, [drawn])
    assert mine == pytest.approx(cider(table, one, table, one, asked.idf)) and len(consensus(asked, [drawn, drawn[:2]])[1]) == 2
    found, look = [[Caption(c, -1.) for c in drawn]], asked.keys[5].expand(1, 3, C)
    choose = lambda: chooser(run, asked)(look, found, GenerateConfig('sample', draws=4))
    assert choose() == [found[0][mine.argmax()]] != [found[0][3]]
    asked.weight = 100.
    assert choose() == [found[0][3]]


def test_a_way_to_write():
    run = SimpleNamespace(choose=None, how=lambda **kw: GenerateConfig(**kw))
    assert way_to_write(run, 3, True) == GenerateConfig(beam=3, flip=True)
    assert way_to_write(run, 3, closer=True) == GenerateConfig(beam=3, closer=True)
    with pytest.raises(UserError, match='add --neighbours'): way_to_write(run, draws=9)
    run.choose = max
    assert (how := way_to_write(run, draws=9)).method == 'sample' and how.draws == 9
    with pytest.raises(UserError, match='several'): way_to_write(run, draws=1)


def test_what_is_kept_is_the_same(tmp_path):
    asked, _ = make(k=5)
    file, run = tmp_path/'neighbours.safetensors', SimpleNamespace(model=SimpleNamespace(encoder=SimpleNamespace(channels=C)))
    save_neighbours(asked, file)
    again, features = load_neighbours(file, run), torch.randn(9, 2, C, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(again.keys, asked.keys, atol=1e-3) and np.array_equal(again.table, asked.table)
    assert torch.equal(again.nearest(features)[:, 0], asked.nearest(features)[:, 0])
    run.model.encoder.channels = C + 1
    with pytest.raises(UserError, match='remove it'): load_neighbours(file, run)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match='neighbours'): load_neighbours(file, run)
