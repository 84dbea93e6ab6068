"""Captions that are paid: compared fairly, scored as coco-caption does, and learned from."""
import itertools
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from pycocoevalcap.cider.cider import Cider

from multimodal.captioner import Captioner, CaptionerConfig
from multimodal.core import UserError, set_seed
from multimodal.dataloaders import Sample, collate, pad
from multimodal.encoder import EncoderConfig
from multimodal.generate import GenerateConfig
from multimodal.datasets import load_dataset
from multimodal.recipe import RunConfig
from multimodal.runs import train_captions
from multimodal.scst import SCST, CiderPay, PaidLoss, advantages, logprobs, references_of, scst_recipe, train_scst, write
from multimodal.shapes import make_shapes
from multimodal.training import Interrupted
from multimodal.wiring import task_of
from multimodal.text import BOS, EOS, PAD, UNK

WORDS, PHOTOS = 12, 6


@pytest.fixture
def model():
    set_seed(0)
    encoder = EncoderConfig(embedding_dim=16, weights='none', stage=1, image_size=16)
    return Captioner(CaptionerConfig(vocab_size=WORDS, embedding_dim=16, n_layers=1, n_heads=2, max_len=12, dropout=.5, encoder=encoder))


def captions_and_batch(groups=3):
    rng = np.random.default_rng(0)
    captions = [[np.array([BOS, *rng.integers(4, WORDS, rng.integers(1, 8)), EOS]) for _ in range(rng.integers(2, 6))]
                for _ in range(PHOTOS)]
    return captions, collate([Sample(torch.randn(3, 16, 16), cs) for cs in captions], groups)


def test_advantages_compare_with_the_others():
    pay = torch.rand(4, 5)
    by_hand = [[pay[i, k] - (pay[i].sum() - pay[i, k])/4 for k in range(5)] for i in range(4)]
    torch.testing.assert_close(advantages(pay), torch.tensor(by_hand))
    torch.testing.assert_close(advantages(pay + 7), advantages(pay), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match='at least|two'): advantages(torch.ones(4, 1))


@pytest.mark.parametrize('groups', [1, 3, 50])
def test_references_are_those_of_their_photos(groups):
    captions, batch = captions_and_batch(groups)
    table, owners = references_of(batch)
    assert (np.diff(owners) >= 0).all()
    for i, cs in enumerate(captions):
        assert sorted(row[row != PAD].tolist() for row in table[owners == i]) == sorted(c[1:].tolist() for c in cs)


def test_pay_is_coco_captions_cider_with_the_end_as_a_word(model):
    captions, batch = captions_and_batch()
    photos = torch.arange(PHOTOS).repeat_interleave(2)
    memory = model.eval().remember(model.encode(batch.images)).select(photos)
    tokens = write(model, memory, GenerateConfig('sample', max_len=8, seed=1))
    say = lambda ids: ' '.join(str(int(i)) for i in ids if i not in (PAD, BOS))
    paid = CiderPay(captions)(tokens, batch)
    for k in range(2):
        mine = {i: [say(tokens[2*i + k])] for i in range(PHOTOS)}
        theirs = Cider().compute_score({i: [say(c) for c in cs] for i, cs in enumerate(captions)}, mine)[1]
        np.testing.assert_allclose(paid[:, k], theirs, atol=1e-5)


def test_what_is_paid_becomes_likelier(model):
    _, batch = captions_and_batch()
    pay = lambda tokens, batch: (tokens == 7).any(1).float().view(len(batch.images), -1)
    loss, optimizer = PaidLoss(pay, samples=4, max_words=6), torch.optim.AdamW(model.parameters(), lr=5e-3)
    with torch.no_grad(): before = loss(model.eval(), batch)[2]['paid']
    for _ in range(60):
        model.train()
        total, n, shown = loss(model, batch)
        assert n == PHOTOS and 0 <= shown['paid'] <= n and model.training
        (total/n).backward()
        optimizer.step(); optimizer.zero_grad()
    with torch.no_grad(): assert loss(model.eval(), batch)[2]['paid'] == PHOTOS > before


def test_the_log_probability_has_the_gradient_of_the_caption_alone(model):
    "Padding and other captions have no say in it."
    _, batch = captions_and_batch()
    memory = model.eval().remember(model.encode(batch.images))
    tokens = write(model, memory, GenerateConfig('sample', max_len=8, seed=2))
    both = logprobs(model, memory, tokens)
    for i in range(PHOTOS):
        alone = logprobs(model, memory.select(torch.tensor([i])), tokens[i:i + 1, :(tokens[i] != PAD).sum()])
        torch.testing.assert_close(alone[0], both[i], atol=1e-4, rtol=0)


def test_the_probabilities_of_all_that_can_be_drawn_add_up_to_one(model):
    "UNK, PAD, BOS and an empty caption are never drawn, and the last end is no choice: nothing may leak to them."
    words = range(UNK + 1, WORDS)
    every = pad([np.array([BOS, *ws, EOS]) for n in (1, 2) for ws in itertools.product(words, repeat=n)])
    with torch.no_grad():
        model.text.words.weight[UNK] += 3*torch.randn(16)
        memory = model.eval().remember(model.encode(torch.randn(1, 3, 16, 16))).select(torch.zeros(len(every), dtype=int))
        p = logprobs(model, memory, every, max_words=2).exp()
        drawn = write(model, memory.select(torch.zeros(20_000, dtype=int)), GenerateConfig('sample', max_len=2, seed=5))
    torch.testing.assert_close(p.sum(), torch.tensor(1.), atol=1e-5, rtol=0)
    for caption, share in zip(every[:8], p[:8]):                     # those of one word, beside how often they come
        often = (drawn == torch.nn.functional.pad(caption, (0, drawn.shape[1] - len(caption)), value=PAD)).all(1).float().mean()
        assert abs(often - share) < 4*(share/20_000)**.5


def test_a_paid_run_that_was_stopped_is_the_one_that_was_not(tmp_path):
    data, quiet = load_dataset(make_shapes(tmp_path/'shapes', n=60, size=32, p_two=0.)), lambda line: None
    small = RunConfig(data='shapes', weights='none', trainable='all', stage=1, image_size=32, embedding_dim=32, n_layers=1, epochs=1, min_count=1)
    train_captions(data, tmp_path/'taught', small, device='cpu', say=quiet)
    config, init = replace(scst_recipe(small), epochs=3), tmp_path/'taught'
    straight = train_scst(data, tmp_path/'straight', config, device='cpu', say=quiet, init=init)
    def stop(line):
        if line.startswith('epoch 1'): signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted): train_scst(data, tmp_path/'stopped', config, device='cpu', say=stop, init=init)
    assert task_of(None, tmp_path/'stopped') is SCST
    resumed = train_scst(data, tmp_path/'stopped', resume=True, device='cpu', say=quiet)
    pays = lambda run: [(r['train_paid'], r['dev_paid']) for r in run.history]
    assert pays(resumed) == pays(straight) and len(pays(straight)) == 3
    for a, b in zip(resumed.model.state_dict().values(), straight.model.state_dict().values()): assert torch.equal(a, b)
