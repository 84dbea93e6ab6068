"Writing captions: against trying everything, against plain Python, against Hugging Face, and never a broken caption."
import math
from itertools import product
import pytest
import torch
from hypothesis import given, settings, strategies as st
from multimodal.captioner import FUSIONS, Captioner, CaptionerConfig
from multimodal.writing import QuickWriting
from multimodal.core import UserError
from multimodal.encoder import EncoderConfig
from multimodal.generate import GenerateConfig, ban_repeats, extend, generate, looks_of, restrict, sample
from multimodal.text import BOS, EOS, PAD, UNK

fast = settings(max_examples=20, deadline=None)


def reseed(model, seed, std=.3, ending=1.):
    "Strong opinions, and an end that gets likelier with each word"
    torch.manual_seed(seed)
    for part in model.text, model.fusion, model.decoder:
        for p in part.parameters():
            if p.dim() > 1: torch.nn.init.normal_(p, std=std)
    with torch.no_grad():
        model.text.positions.weight += ending*torch.arange(len(model.text.positions.weight))[:, None]*model.text.words.weight[EOS]
    return model


def build(V, fusion='cross', **kw):
    encoder = EncoderConfig(weights='none', stage=1, image_size=12)
    settings = {'embedding_dim': 32, 'n_layers': 2, 'n_heads': 4, 'max_len': 40, 'encoder': encoder} | kw
    return reseed(Captioner(CaptionerConfig(V, fusion=fusion, **settings)).eval(), 0)


@pytest.fixture(scope='module')
def models(): return {fusion: build(30, fusion) for fusion in FUSIONS}


@pytest.fixture(scope='module')
def tiny(): return build(7)


def score(model, features, ids):
    "Logprob of a caption, the plain way"
    tokens = torch.tensor([[BOS, *ids, EOS]])
    with torch.no_grad(): logprobs = model(features[None], tokens[:, :-1]).log_softmax(-1)[0]
    return logprobs.gather(1, tokens[0, 1:, None]).sum().item()


@pytest.mark.parametrize('penalty', [0., 1., 2.])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), max_len=st.integers(1, 3))
def test_beam_is_brute_force(tiny, seed, max_len, penalty):
    model, features = reseed(tiny, seed, ending=0.), torch.randn(4, 9, 64)
    every = [list(c) for n in range(1, max_len + 1) for c in product((4, 5, 6), repeat=n)]
    found = generate(model, features, GenerateConfig(beam=40, max_len=max_len, length_penalty=penalty))
    tokens = torch.tensor([[BOS] + c + [EOS] + [PAD]*(max_len - len(c)) for c in every])
    for f, caption in zip(features, found):
        with torch.no_grad(): logprobs = model(f[None].expand(len(every), -1, -1), tokens[:, :-1]).log_softmax(-1)
        each = logprobs.gather(2, tokens[:, 1:, None])[..., 0] * (tokens[:, 1:] != PAD)
        scores = [s / (len(c) + 1)**penalty for s, c in zip(each.sum(1).tolist(), every)]
        best = max(scores)
        assert scores[every.index(caption.ids)] == pytest.approx(best, abs=1e-4)
        assert caption.logprob / (len(caption.ids) + 1)**penalty == pytest.approx(best, abs=1e-4)


@torch.inference_mode()
def plain_beam(model, features, config):
    "One photo, no cache, no tensors of drafts"
    drafts, done = [(0., [])], []
    while drafts:
        longer, length = [], len(drafts[0][1]) + 1
        for total, words in drafts:
            logprobs = model(features[None], torch.tensor([[BOS] + words]))[:, -1].log_softmax(-1)
            logprobs = restrict(logprobs, torch.tensor([words], dtype=torch.long), config)[0].tolist()
            longer += [(total + p, words + [i]) for i, p in enumerate(logprobs) if p > -math.inf]
        longer.sort(reverse=True)
        done += [(s / length**config.length_penalty, w, s) for s, w in longer[:config.beam] if w[-1] == EOS]
        done = sorted(done, reverse=True)[:config.beam]
        drafts = [d for d in longer if d[1][-1] != EOS][:config.beam]
        if not drafts or len(done) == config.beam and drafts[0][0] / length**config.length_penalty <= done[-1][0]: break
    return done[0][1][:-1], done[0][2]


@pytest.mark.parametrize('fusion', FUSIONS)
@fast
@given(seed=st.integers(0, 10_000), beam=st.integers(2, 6), max_len=st.integers(1, 9), min_len=st.integers(1, 9),
       penalty=st.sampled_from([-1., 0., .7, 1., 2.]), n=st.integers(0, 3))
def test_batch_is_its_members_and_plain_python(models, fusion, seed, beam, max_len, min_len, penalty, n):
    model, features = reseed(models[fusion], seed), torch.randn(5, 9, 64)
    config = GenerateConfig(beam=beam, max_len=max_len, min_len=min(min_len, max_len), length_penalty=penalty, no_repeat_ngram=n)
    for f, caption in zip(features, generate(model, features, config)):
        alone = generate(model, f[None], config)[0]
        ids, logprob = plain_beam(model, f, config)
        assert caption.ids == alone.ids == ids
        assert caption.logprob == pytest.approx(logprob, abs=1e-3) == pytest.approx(alone.logprob, abs=1e-3)
        assert caption.logprob == pytest.approx(score(model, f, ids), abs=1e-3)


@pytest.mark.parametrize('method', ['greedy', 'sample'])
@fast
@given(seed=st.integers(0, 10_000), n=st.integers(0, 2))
def test_one_by_one_in_a_batch(models, method, seed, n):
    model, features = reseed(models['cross'], seed), torch.randn(6, 9, 64)
    config = GenerateConfig(method, max_len=12, no_repeat_ngram=n, seed=seed)
    batch = generate(model, features, config)
    for f, caption in zip(features, batch): assert caption.logprob == pytest.approx(score(model, f, caption.ids), abs=1e-3)
    if method == 'greedy':
        for f, caption in zip(features, batch): assert generate(model, f[None], config)[0].ids == caption.ids
    else: assert [c.ids for c in batch[:3]] == [c.ids for c in generate(model, features[:3], config)]    # same lots


@fast
@given(seed=st.integers(0, 10_000), method=st.sampled_from(['greedy', 'beam', 'sample']), beam=st.integers(1, 7),
       max_len=st.integers(1, 20), min_len=st.integers(1, 20), n=st.integers(0, 3), temperature=st.sampled_from([.01, 1., 50.]),
       top_k=st.integers(0, 5), top_p=st.sampled_from([1e-6, .5, 1.]), ending=st.sampled_from([-5., 0., 5.]),
       std=st.sampled_from([0., .02, 1., 5.]))
def test_never_empty_never_unfinished(models, seed, method, beam, max_len, min_len, n, temperature, top_k, top_p, ending, std):
    model, features = reseed(models['cross'], seed, std, ending), torch.randn(3, 9, 64)
    config = GenerateConfig(method, beam, max_len, min(min_len, max_len), no_repeat_ngram=n, temperature=temperature,
                            top_k=top_k, top_p=top_p, seed=seed)
    for caption in generate(model, features, config):
        ids = caption.ids
        assert 1 <= len(ids) <= max_len and all(i > UNK for i in ids) and math.isfinite(caption.logprob)
        assert n or len(ids) >= config.min_len
        runs = [tuple(ids[i:i+n]) for i in range(len(ids) - n + 1)] if n else []
        assert len(runs) == len(set(runs))


@pytest.mark.parametrize('method', ['greedy', 'beam', 'sample'])
def test_when_no_draft_ever_ends_and_when_all_end_at_once(models, method):
    model = models['cross']
    for ending, length in (-1e4, 7), (1e4, 1):
        model.decoder.norm.bias.data.zero_()
        reseed(model, 0, ending=0.)
        direction = model.text.words.weight[EOS] / model.text.words.weight[EOS].norm()
        model.decoder.norm.bias.data.copy_(ending * direction)
        captions = generate(model, torch.randn(4, 9, 64), GenerateConfig(method, max_len=7))
        assert [len(c.ids) for c in captions] == [length]*4
    model.decoder.norm.bias.data.zero_()


def test_a_vocabulary_of_one_word(models):
    model = build(5)
    for method in 'greedy', 'beam', 'sample':
        for n in 0, 1:
            for c in generate(model, torch.randn(3, 9, 64), GenerateConfig(method, max_len=4, min_len=3, no_repeat_ngram=n)):
                assert c.ids == ([4] if n else [4]*len(c.ids)) and len(c.ids) >= (1 if n else 3)


# ---- Hugging Face

@pytest.fixture(scope='module')
def transformers():
    transformers = pytest.importorskip('transformers')
    transformers.logging.set_verbosity_error()
    return transformers


@pytest.mark.parametrize('beam', [1, 2, 3, 5])
@pytest.mark.parametrize('rules', [{}, {'length_penalty': 0.}, {'length_penalty': 2.}, {'no_repeat_ngram': 2}, {'min_len': 6},
                                   {'no_repeat_ngram': 1, 'min_len': 3, 'length_penalty': .5}])
def test_hugging_face(models, transformers, beam, rules):
    from multimodal.peers import gpt2_of, write_by_gpt2
    model = models['cross']
    different = 0
    for seed in range(3):
        theirs = gpt2_of(reseed(model, seed, std=.35, ending=1.5))
        features = torch.randn(6, 9, 64)
        config = GenerateConfig(beam=beam, max_len=38, **rules)
        ours, expected = generate(model, features, config), write_by_gpt2(theirs, model.encode(features), config)
        assert [c.ids for c in ours] == expected
        different += len({tuple(c.ids) for c in ours})
    assert different > 6                                   # they were not all the same caption


# ---- the pieces

@fast
@given(drafts=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4), n=st.integers(1, 6))
def test_banned_are_just_the_repeats(drafts, n):
    logprobs = torch.zeros(len(drafts), 4)
    ban_repeats(logprobs, torch.tensor(drafts), n)
    for draft, row in zip(drafts, logprobs.tolist()):
        runs = {tuple(draft[i:i+n]) for i in range(len(draft) - n + 1)}
        assert [p == -math.inf for p in row] == [tuple((draft + [w])[-n:]) in runs for w in range(4)]


@fast
@given(N=st.integers(1, 3), k=st.integers(1, 4), j=st.integers(1, 8), seed=st.integers(0, 99))
def test_extend_keeps_the_best(N, k, j, seed):
    torch.manual_seed(seed)
    total, words, logprobs = torch.randn(N, k), torch.randint(9, (N, k, 2)), torch.randn(N*k, 5)
    best, longer, parent = extend(total, words, logprobs, j)
    for n in range(N):
        every = sorted(((total[n, i] + logprobs[n*k + i, w]).item(), i, w) for i in range(k) for w in range(5))[::-1][:j]
        assert best[n].tolist() == pytest.approx([s for s, _, _ in every])
        assert parent[n].tolist() == [i for _, i, _ in every]
        assert longer[n].tolist() == [words[n, i].tolist() + [w] for _, i, w in every]


@fast
@given(p=st.lists(st.floats(.01, 1), min_size=2, max_size=6), top_k=st.integers(0, 7), top_p=st.floats(.05, 1),
       temperature=st.floats(.3, 3))
def test_sampling_frequencies(p, top_k, top_p, temperature):
    p = torch.tensor(p) / sum(p)
    luck = (torch.arange(4000) + .5) / 4000
    config = GenerateConfig('sample', temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = sample(p.log().expand(4000, -1), luck, config).bincount(minlength=len(p)) / 4000
    q = (p.log() / temperature).softmax(0).tolist()
    order = sorted(range(len(q)), key=lambda i: -q[i])[:top_k or None]
    whole, sofar, wanted = sum(q[i] for i in order), 0., [0.]*len(q)
    for i in order:
        if sofar / whole < top_p - 1e-6: wanted[i] = q[i]
        sofar += q[i]
    wanted = torch.tensor(wanted) / sum(wanted)
    if len(set(p.tolist())) == len(p): assert (drawn - wanted).abs().max() < .01


def test_sampling_the_likeliest_only_is_greedy(models):
    model, features = reseed(models['cross'], 3), torch.randn(8, 9, 64)
    greedy = generate(model, features, GenerateConfig('greedy'))
    for kw in dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-4):
        assert [c.ids for c in generate(model, features, GenerateConfig('sample', **kw))] == [c.ids for c in greedy]
    assert [c.ids for c in generate(model, features, GenerateConfig(beam=1))] == [c.ids for c in greedy]


def test_seeds(models):
    model, features = reseed(models['cross'], 3), torch.randn(8, 9, 64)
    draw = lambda seed: generate(model, features, GenerateConfig('sample', seed=seed))
    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), state)      # nobody else's lots are touched


def test_several_draws_of_each_photo_to_choose_from(models):
    model, features, seen = reseed(models['both'], 4), torch.randn(6, 9, 64), []
    def choose(look, found, config):
        seen.append((look, found))
        return [captions[-1] for captions in found]
    last = generate(model, features, GenerateConfig('sample', draws=4, seed=2), choose)
    (look, found), = seen
    assert torch.equal(look, features) and [len(captions) for captions in found] == [4]*6
    assert last == [captions[-1] for captions in found] and len({tuple(c.ids) for captions in found for c in captions}) > 12
    generate(model, features, GenerateConfig('sample', draws=3, top_k=1), choose)             # nothing left to luck
    greedy = [c.ids for c in generate(model, features, GenerateConfig('greedy'))]
    assert [[c.ids for c in captions] for captions in seen[1][1]] == [[ids]*3 for ids in greedy]
    with pytest.raises(UserError, match='2 or more'): generate(model, features, GenerateConfig('sample'), choose)
    with pytest.raises(UserError, match='draws'): GenerateConfig('sample', draws=0)


def test_restrict_always_leaves_a_way():
    config = GenerateConfig(max_len=5, min_len=4, no_repeat_ngram=1)
    for t in range(6):
        logprobs = restrict(torch.randn(3, 6), torch.tensor([[4, 5, 4, 5, 4]]*3)[:, :t], config)
        allowed = [row.nonzero()[:, 0].tolist() for row in logprobs > -math.inf]
        assert allowed == [[[4, 5], [5], [EOS], [EOS], [EOS], [EOS]][t]]*3


# ---- the batch

@pytest.mark.parametrize('method,K', [('greedy', 1), ('beam', 4)])
def test_finished_captions_leave_the_batch(models, monkeypatch, method, K):
    model, features, sizes = reseed(models['cross'], 1), torch.randn(16, 9, 64), []
    step = QuickWriting.step
    def counted(self, tokens):
        sizes.append((len(tokens), self.n_photos))
        return step(self, tokens)
    monkeypatch.setattr(QuickWriting, 'step', counted)
    captions = generate(model, features, GenerateConfig(method, beam=K))
    assert sizes[0] == (16, 16)                            # the first word is read once a photo
    rows, photos = zip(*sizes[1:])
    assert list(photos) == sorted(photos, reverse=True) and photos[-1] < 16
    assert all(r == K*p for r, p in zip(rows, photos))
    if method == 'greedy': assert sum(r for r, _ in sizes) == sum(len(c.ids) + 1 for c in captions)


def test_no_photos(models): assert generate(models['cross'], torch.zeros(0, 9, 64)) == []


def test_pixels(models):
    pixels, model = torch.randn(2, 3, 12, 12), models['cross']
    with torch.no_grad(): features = model.encoder.features(pixels)
    assert [c.ids for c in generate(model, pixels)] == [c.ids for c in generate(model, features)]


def test_training_mode_is_put_back(models):
    model = models['cross'].train()
    try:
        a = generate(model, torch.ones(2, 9, 64))
        assert model.training and a == generate(model, torch.ones(2, 9, 64))       # no dropout while writing
        with pytest.raises(UserError): generate(model, torch.ones(2, 4, 64))       # the wrong number of patches
        assert model.training
    finally: model.eval()


def test_nan_is_said(models):
    model = build(9)
    model.text.words.weight.data.fill_(math.nan)
    for method in 'greedy', 'beam', 'sample':
        with pytest.raises(UserError, match='NaN'): generate(model, torch.randn(2, 9, 64), GenerateConfig(method))


def test_longer_than_the_model(models):
    assert generate(models['cross'], torch.randn(1, 9, 64), GenerateConfig(max_len=39))
    with pytest.raises(UserError, match='room for 39 words'):
        generate(models['cross'], torch.randn(1, 9, 64), GenerateConfig(max_len=40))


def test_a_vocabulary_without_words():
    with pytest.raises(UserError, match='no words'): generate(build(4), torch.randn(1, 9, 64))


@pytest.mark.parametrize('bad', [dict(method='guess'), dict(beam=0), dict(beam=10**6), dict(draws=1001),
                                 dict(length_penalty=1e200), dict(length_penalty=math.nan), dict(min_len=0), dict(max_len=0), dict(max_len=3, min_len=4),
                                 dict(no_repeat_ngram=-1), dict(temperature=0.), dict(temperature=math.nan), dict(top_k=-1),
                                 dict(top_p=0.), dict(top_p=1.1)])
def test_bad_settings(bad):
    with pytest.raises(UserError, match=f'{next(iter(bad))} is .* must be'): GenerateConfig(**bad)


@pytest.mark.parametrize('fusion', list(FUSIONS))
@pytest.mark.parametrize('method', ['greedy', 'beam', 'sample'])
def test_several_looks_are_averaged(models, fusion, method):
    model, config = models[fusion], GenerateConfig(method, max_len=8)
    torch.manual_seed(3)
    a, b = torch.randn(2, 5, 9, 64)
    together = generate(model, [a, b], config)
    assert together == generate(model, (b, a), config)                      # in any order
    assert [c.ids for c in generate(model, [a, a], config)] == [c.ids for c in generate(model, a, config)]
    assert [c.logprob for c in together] != [c.logprob for c in generate(model, a, config)]
    for i, caption in enumerate(together):                                  # the logprob is that of the average
        tokens, logits = torch.tensor([[BOS, *caption.ids, EOS]]), 0
        with torch.no_grad():
            for look in (a, b): logits = logits + model(look[i:i+1], tokens[:, :-1])/2
        logprobs = torch.stack([restrict(x[None].log_softmax(-1), tokens[:, 1:t+1], config)[0]
                                for t, x in enumerate(logits[0])])
        if method == 'sample': continue                                     # no more than drawn from it
        assert math.isclose(logprobs.gather(1, tokens[0, 1:, None]).sum().item(), caption.logprob, abs_tol=1e-3)


def test_a_flip_is_a_second_look(models):
    model, config = models['both'], GenerateConfig(flip=True)
    torch.manual_seed(0)
    pixels = torch.randn(3, 3, 12, 12)
    with torch.no_grad(): looks = [model.encoder.features(x) for x in (pixels, pixels.flip(-1))]
    assert [c.ids for c in generate(model, pixels, config)] == [c.ids for c in generate(model, looks)]
    assert [c.ids for c in generate(model, pixels.flip(-1), config)] == [c.ids for c in generate(model, looks)]
    with pytest.raises(UserError, match='cannot be flipped'): generate(model, looks[0], config)
    with pytest.raises(UserError, match='enlarged'): generate(model, looks[0], GenerateConfig(closer=True))
    with pytest.raises(UserError, match='same photos'): generate(model, [looks[0], looks[1][:2]])
    assert generate(model, [looks[0][:0], looks[1][:0]]) == []


@pytest.mark.parametrize('flip', [False, True])
def test_a_closer_look_joins_each_look(flip):
    config = GenerateConfig(flip=flip, closer=True)
    torch.manual_seed(0)
    pixels = torch.randn(3, 3, 24, 24)
    whole = [pixels, pixels.flip(-1)][:1 + flip]
    middle = [torch.nn.functional.interpolate(x[..., 2:22, 2:22], (24, 24), mode='bilinear') for x in whole]
    looks = looks_of(pixels, config)
    assert len(looks) == 2 + 2*flip
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(looks, [*whole, *middle]))
