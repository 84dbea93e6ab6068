"""Numbers that cannot quietly be wrong: collapsed captioners are said, leaks are found, runs repeat to the last bit, published
figures come out again, and broken lines are noticed (tools/mutants.py; all of them in results/reliability.json)."""
import functools
import importlib.util
import json
import math
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from nltk.translate.bleu_score import corpus_bleu
from PIL import Image

from multimodal.captioner import FUSIONS, Captioner, CaptionerConfig
from multimodal.core import UserError, read_json, write_json
from multimodal.dataloaders import Batch
from multimodal.datasets import CaptionData, Item, load_dataset
from multimodal.encoder import EncoderConfig
from multimodal.generate import GenerateConfig, beam_search, one_by_one
from multimodal.leaks import copies, find_leaks, leak_lines, look_at, seen_before
from multimodal.metrics import caption_metrics, masked_cross_entropy, token_accuracy
from multimodal.optim import TrainConfig, seed_step
from multimodal.recipe import caption_loss
from multimodal.shapes import make_shapes
from multimodal.text import BOS, EOS, PAD, Vocab
from multimodal.variety import doubts, variety, with_doubts

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FAST = ROOT/'results', dict(tokenizer='python', meteor=False)
FLICKR8K, RESNET18 = os.environ.get('MULTIMODAL_FLICKR8K'), os.environ.get('MULTIMODAL_RESNET18')
few = settings(max_examples=25, deadline=None, database=None)


@pytest.fixture(scope='module')
def flickr8k(tmp_path_factory):
    "Flickr8k, and a way to have some of its photos on disk; of archives only those are unpacked, and all others are empty files."
    if not FLICKR8K: pytest.skip('MULTIMODAL_FLICKR8K is not set')
    root = Path(FLICKR8K)
    if not (root/'Flickr8k_text.zip').exists(): return load_dataset(root), lambda items: items
    folder, photos = tmp_path_factory.mktemp('flickr8k'), zipfile.ZipFile(root/'Flickr8k_Dataset.zip')
    with zipfile.ZipFile(root/'Flickr8k_text.zip') as text: text.extractall(folder)
    inside = {Path(name).name: name for name in photos.namelist() if name.endswith('.jpg')}
    for name in inside: (folder/name).touch()
    def unpacked(items):
        for item in items: item.image.write_bytes(photos.read(inside[item.image.name]))
        return items
    return load_dataset(folder), unpacked


# ---- captioners that have collapsed, or learned nothing

@pytest.fixture(scope='module')
def run(home, tmp_path_factory):
    "A captioner that has seen 180 scenes once."
    from multimodal.cli import mm_train
    folder = tmp_path_factory.mktemp('runs')/'once'
    mm_train('shapes:240', str(folder), epochs=1, device='cpu', set=['image_size=32', 'stage=1', 'embedding_dim=32', 'n_layers=1'])
    return folder


def scenes(home): return home/'shapes-240-48'


def test_a_captioner_that_has_learned_next_to_nothing_is_said_on_the_screen_and_in_json(run, capsys, monkeypatch):
    from multimodal.cli import mm_validate
    monkeypatch.setenv('PATH', '')                                 # METEOR takes seconds to start, and is not needed
    capsys.readouterr()
    mm_validate(str(run), beam=2, device='cpu')
    lines = capsys.readouterr().out.splitlines()
    assert sum('different captions for 20 pictures (people: 20)' in line for line in lines) == 1
    said, = (line for line in lines if line.startswith('DO NOT TRUST THIS: '))
    mm_validate(str(run), beam=2, device='cpu', json=True)
    scores = json.loads(capsys.readouterr().out)
    assert scores['variety']['people']['different'] == 20 and scores['doubts'] and all(d in said for d in scores['doubts'])
    assert scores['cider'] < scores['floor']['cider'] and any('constant caption' in d for d in scores['doubts'])


@pytest.mark.parametrize('what', ['random weights', 'blind'])
def test_a_captioner_with_random_weights_or_one_that_sees_nothing_is_said(run, what, tmp_path, capsys, monkeypatch):
    "The second has learned, but its image encoder gives the same for every picture, and so it says the same of all."
    from multimodal.cli import mm_validate
    from multimodal.durable import seal
    from multimodal.runs import build_captioner, load_run
    from multimodal.saving import save_model
    monkeypatch.setenv('PATH', '')
    shutil.copytree(run, tmp_path/'run')
    trained = load_run(tmp_path/'run', device='cpu')
    torch.manual_seed(0)
    model = build_captioner(trained.config, len(trained.vocab)) if what == 'random weights' else trained.model
    if what == 'blind':
        for p in model.encoder.parameters(): p.data.zero_()
    save_model(model, trained.vocab, tmp_path/'run'/'best')
    seal(tmp_path/'run'/'best')
    capsys.readouterr()
    mm_validate(str(tmp_path/'run'), beam=2, device='cpu', json=True)
    scores = json.loads(capsys.readouterr().out)
    assert scores['doubts'] and scores['cider'] < scores['floor']['cider']
    if what == 'blind': assert scores['variety']['different'] == 1 and '1 different caption for 20' in scores['doubts'][0]


def test_scores_of_somebodys_captions_are_doubted_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('PATH', '')
    from multimodal.cli import mm_score
    lines = {'same': ['a dog runs']*12, 'good': [f'a dog runs to tree {i}' for i in range(12)],
             'people': [f'the dog runs to tree {i}' for i in range(12)]}
    for name, text in lines.items(): (tmp_path/name).write_text('\n'.join(text) + '\n')
    said = {}
    for name in 'same', 'good':
        mm_score(str(tmp_path/name), [str(tmp_path/'people')])
        said[name] = capsys.readouterr().out
    assert 'DO NOT TRUST' in said['same'] and 'DO NOT TRUST' not in said['good'] and '12 different captions' in said['good']


PEOPLE = [[f'person {i} walks on road {i % 7}', f'on road {i % 7} somebody walks {i}'] for i in range(50)]

@few
@given(share=st.floats(.3, 1.), seed=st.integers(0, 99))
def test_one_caption_for_most_pictures_is_doubted_whatever_the_rest_says(share, seed):
    rng = random.Random(seed)
    captions = ['a man in a red shirt' if i < share*50 else rs[1] for i, rs in enumerate(PEOPLE)]
    rng.shuffle(captions)
    assert doubts({'variety': variety(captions, PEOPLE)})


@few
@given(n=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_handful_of_captions_is_doubted_unless_people_have_no_more(n, seed):
    rng = random.Random(seed)
    captions = [f'caption {rng.randrange(n)}' for _ in PEOPLE]
    assert doubts({'variety': variety(captions, PEOPLE)})
    assert not doubts({'variety': variety(captions, [[c] for c in captions])})


def test_captions_of_people_and_of_the_captioner_that_comes_along_are_not_doubted(run, home):
    for split in 'dev', 'test', 'heldout':
        references = [list(item.captions) for item in load_dataset(scenes(home))[split]]
        assert not doubts({'variety': variety([rs[1] for rs in references], references)})
    kept = kept_captions()
    assert not doubts({'variety': variety(list(kept.values()), [[f'{i}'] for i in range(len(kept))])})
    assert doubts({'variety': variety(['the same']*len(kept), [[c] for c in kept.values()])})


def test_words_that_repeat_the_last_are_doubted_however_many_captions_there_are():
    babble = [f'{w} {w} {w} {w} {i}' for i, w in enumerate('riders stretch apple lease puts'.split()*10)]
    why, = doubts({'variety': variety(babble, PEOPLE)})
    assert '60% of the words' in why
    scores = {'variety': variety([rs[1] for rs in PEOPLE], PEOPLE), 'cider': .1}
    assert doubts(scores | {'floor': {'cider': .2}}) and not doubts(scores | {'floor': {'cider': .05}})
    assert with_doubts(scores)['doubts'] == []


# ---- leaks

def photo(seed):
    "A photo like no other: a smooth surface of a few colours"
    grid = np.random.default_rng(seed).integers(0, 256, (7, 8, 3), np.uint8)
    return Image.fromarray(grid).resize((160, 140), Image.Resampling.BICUBIC)


@pytest.fixture(scope='module')
def leaky(tmp_path_factory):
    "40 training and 20 honest test photos, and five that are in both splits; which is which"
    folder, splits = tmp_path_factory.mktemp('leaky'), {'train': [], 'test': []}
    for i in range(60):
        photo(i).save(path := folder/f'{i:02}.jpg', quality=95)
        splits['train' if i < 40 else 'test'].append(Item(path, (f'caption number {i}',)))
    shutil.copy(folder/'03.jpg', folder/'under_another_name.jpg')
    photo(4).save(folder/'of_low_quality.jpg', quality=25)
    photo(5).resize((80, 70), Image.Resampling.LANCZOS).save(folder/'half.png')
    photo(6).resize((80, 70)).save(folder/'half_and_low.jpg', quality=40)
    photo(7).resize((160, 160)).point(lambda v: v*.95).save(folder/'square_and_darker.jpg', quality=90)
    planted = {'under_another_name.jpg': 3, 'of_low_quality.jpg': 4, 'half.png': 5, 'half_and_low.jpg': 6, 'square_and_darker.jpg': 7}
    splits['test'] += [Item(folder/name, (f'Caption number {i} .', 'something new')) for name, i in planted.items()]
    return CaptionData('leaky', {k: tuple(v) for k, v in splits.items()}, {}), {k: f'{v:02}.jpg' for k, v in planted.items()}


def test_a_photo_under_another_name_saved_anew_or_at_half_its_size_is_found_and_no_other(leaky):
    data, planted = leaky
    found = find_leaks(data)
    assert {p['image']: p['other'] for p in found['photos']} == planted
    assert [p['image'] for p in found['photos'] if p['same_file']] == ['under_another_name.jpg']
    assert (found['n_images'], found['captions'], found['n_captions']) == (25, 5, 30)
    assert json.loads(json.dumps(found)) == found
    photos, captions = leak_lines(found)
    assert '5 of 25 photos of test are in train' in photos and '5 of 30 captions of test (16.7%)' in captions


def test_what_cannot_be_compared_is_one_clear_line(leaky, tmp_path):
    data, _ = leaky
    for wrong in dict(split='exam'), dict(against='exam'), dict(split='train'):
        with pytest.raises(UserError): find_leaks(data, **wrong)
    (tmp_path/'broken.jpg').write_text('no photo')
    with pytest.raises(UserError, match='broken.jpg'): look_at([tmp_path/'broken.jpg'])
    assert len(look_at([tmp_path/'broken.jpg', data['train'][0].image]).paths) == 1
    with pytest.raises(UserError, match='no photos'): look_at([])


@few
@given(st.lists(st.sampled_from(['A dog runs.', 'a dog runs', 'two dogs run', 'A cat !', 'snow'])),
       st.lists(st.sampled_from(['a dog , runs', 'Two dogs run', 'a cat', 'rain'])), st.randoms())
def test_captions_seen_before_are_counted_as_a_plain_loop_counts_them(mine, theirs, rng):
    plain = lambda c: ''.join(x for x in c.lower() if x.isalpha() or x == ' ').split()
    there = list(map(plain, theirs))
    n, common = seen_before(mine, theirs)
    assert n == sum(plain(c) in there for c in mine)
    assert dict(common) == {' '.join(w): there.count(w) for c in mine if (w := plain(c)) in there}
    assert [k for _, k in common] == sorted((k for _, k in common), reverse=True)
    assert seen_before(rng.sample(mine, len(mine)), rng.sample(theirs, len(theirs))) == (n, common)


def test_mm_validate_finds_a_planted_leak(run, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('PATH', '')
    from multimodal.cli import mm_validate
    shutil.copytree(scenes(home), folder := tmp_path/'data')
    items = load_dataset(folder)['train']
    with Image.open(items[0].image) as x: x.save(folder/'Flicker8k_Dataset'/'planted.jpg', quality=60)
    with open(folder/'Flickr8k.token.txt', 'a') as f: f.write(f'planted.jpg#0\t{items[0].captions[0]}\n')
    with open(folder/'Flickr_8k.testImages.txt', 'a') as f: f.write('planted.jpg\n')
    capsys.readouterr()
    mm_validate(str(run), str(folder), beam=1, leaks=True, device='cpu', json=True, out=str(tmp_path/'kept.json'))
    found = json.loads(capsys.readouterr().out)['leaks']
    assert [(p['image'], p['other']) for p in found['photos']] == [('planted.jpg', items[0].image.name)]
    assert found['captions'] > 0 and read_json(tmp_path/'kept.json')['scores']['leaks'] == found
    with pytest.raises(SystemExit): mm_validate(str(run), split='train', leaks=True, device='cpu')
    assert 'choose another split' in capsys.readouterr().err
    for one, other in ('train', '_'), ('test', 'train'), ('_', 'test'):                    # test and train change places
        (folder/f'Flickr_8k.{one}Images.txt').rename(folder/f'Flickr_8k.{other}Images.txt')
    mm_validate(str(run), str(folder), beam=1, leaks=True, device='cpu')                   # against what the run learned from
    said, aside = capsys.readouterr()
    assert f'leaks: {len(items)} of {len(items)} photos of test are in train of {scenes(home).name}, too' in said
    assert 'went on' not in aside
    config = read_json(run/'config.json')
    shutil.copytree(run, later := tmp_path/'later')
    (later/'SHA256SUMS').unlink()
    write_json(later/'config.json', {**config, 'init': str(tmp_path/'gone')})
    mm_validate(str(later), beam=1, leaks=True, device='cpu')
    assert 'gone, from which this run went on, may have learned from other data' in capsys.readouterr().err


def test_captions_of_flickr8k_that_stand_in_its_training_split_are_as_many_as_the_notebook_says(flickr8k):
    data, unpacked = flickr8k
    train = list(data.captions('train'))
    assert [seen_before(data.captions(split), train)[0] for split in ('dev', 'test')] == [44, 62]
    some, others = (look_at(item.image for item in unpacked(data[split][:100])) for split in ('test', 'train'))
    assert len(some.paths) == len(others.paths) == 100 and not copies(some, others)


# ---- the same numbers twice, and those that were published

TWICE = '''
import hashlib, json, sys
from pathlib import Path
from multimodal.datasets import load_dataset
from multimodal.metrics import caption_metrics
from multimodal.recipe import RunConfig
from multimodal.runs import train_captions
data = load_dataset(sys.argv[1])
config = RunConfig(weights='none', trainable='all', stage=1, image_size=24, embedding_dim=32, n_layers=1, min_count=1, max_words=30,
                   dropout=.2, word_dropout=.2, label_smoothing=.1, augment=True, views='plain,flip,crop0', captions_per_image=2,
                   ema=.9, batch_size=8, epochs=2, lr=3e-3, seed=int(sys.argv[3]))
run = train_captions(data, Path(sys.argv[2]), config, device='cpu', say=lambda line: None)
rows, means = run.predict(data, 'test')
scores = caption_metrics([r['caption'] for r in rows], [r['references'] for r in rows], 'python', meteor=False)
sums = [hashlib.sha256((run.folder/f).read_bytes()).hexdigest() for f in ('best/model.safetensors', 'last/model.safetensors')]
history = [{k: v for k, v in row.items() if k != 'seconds'} for row in run.history]
print(json.dumps([sums, history, [[r['caption'], r['logprob']] for r in rows], means, scores]))
'''


def test_the_same_seed_gives_the_same_weights_captions_and_scores_to_the_last_bit_in_a_fresh_process(tmp_path, capsys, monkeypatch):
    "Here, after whatever tests have been run, and in a new process that goes through sets of words in another order."
    data = make_shapes(tmp_path/'data', n=40, size=24)
    capsys.readouterr()
    monkeypatch.setattr(sys, 'argv', ['', str(data), str(tmp_path/'here'), '5'])
    exec(TWICE, {})
    here = capsys.readouterr().out.splitlines()[-1]
    env = {**os.environ, 'PYTHONHASHSEED': '7', 'OMP_NUM_THREADS': str(torch.get_num_threads())}
    r = subprocess.run([sys.executable, '-c', TWICE, data, tmp_path/'there', '5'], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr
    assert r.stdout.splitlines()[-1] == here and len(json.loads(here)[2]) == 3


def kept_captions() -> dict:  # name of a photo → caption
    "What the captioner that comes along wrote for the 1,000 photos of Flickr8k's test split"
    lines = (RESULTS/'flickr8k_shipped_captions.txt').read_text(encoding='utf-8').splitlines()
    return dict(line.split('\t') for line in lines)


def test_published_scores_of_the_captioner_that_comes_along_are_those_of_its_kept_captions(flickr8k):
    (data, _), kept, published = flickr8k, kept_captions(), read_json(RESULTS/'flickr8k_shipped.json')['scores']
    assert [item.image.name for item in data['test']] == list(kept)
    scores = caption_metrics(list(kept.values()), [list(item.captions) for item in data['test']], **FAST)
    for name, value in scores.items():
        if name == 'meteor': continue
        low, high = published['intervals'][name]
        assert low < value < high and value == pytest.approx(published[name], abs=1e-9), name


def test_the_captioner_that_comes_along_still_writes_its_kept_captions(flickr8k):
    if not RESNET18: pytest.skip('MULTIMODAL_RESNET18 is not set')
    from multimodal.runs import load_run, shipped_captioner
    (data, unpacked), kept = flickr8k, kept_captions()
    some, captioner = unpacked(data['test'][::125]), load_run(shipped_captioner(), RESNET18, 'cpu')
    rows = captioner.predict(CaptionData('some', {'test': some}, {}))[0]
    same = sum(r['caption'] == kept[Path(r['image']).name] for r in rows)
    assert len(rows) == 8 and same >= 7                           # another processor may round another way, now and then


def test_ablations_add_up_to_what_their_table_says():
    "CIDEr of each photo is kept, in thousandths: its mean is the figure in the table, and an interval of it holds it."
    kept, checked = read_json(RESULTS/'ablation.json'), 0
    for name, row in kept['rows'].items():
        if 'cider' not in row or name not in kept['each']: continue
        each, checked = np.array(kept['each'][name].split(), float)/1000, checked + 1
        assert len(each) == 1000 and each.mean() == pytest.approx(row['cider'], abs=5e-5), name
        error = each.std(ddof=1)/len(each)**.5
        assert kept['ends']['floor: a constant caption']['cider'] < row['cider'] - 2*error, name
    assert checked >= 14


@pytest.mark.parametrize('split', ['test', 'heldout'])
def test_the_painter_that_comes_along_draws_as_often_right_as_published(split):
    "Thirty drawings, against what all but one in ten thousand thirties of the published painter would give."
    from multimodal.judges import judge_drawings
    from multimodal.painter import load_painter, shipped_painter
    from multimodal.scenes import describe_scene, random_scene
    published, n = read_json(RESULTS/f'shapes_paint_{split}.json')['scores']['drawn']['right'], 30
    rng = random.Random(f'published {split}')
    wanted = [random_scene(rng, 1., split == 'heldout') for _ in range(n)]
    drawn = load_painter(shipped_painter(), device='cpu').draw([describe_scene(s, 1, k)[0] for k, s in enumerate(wanted)])
    right = round(n*judge_drawings(drawn, wanted)['right'])
    at_most = sum(math.comb(n, k)*published**k*(1 - published)**(n - k) for k in range(right + 1))
    assert at_most > 1e-4, f'{right} of {n} are right, {published:.1%} were published'


# ---- masks, beams, metrics

@functools.cache
def model_of(fusion):
    torch.manual_seed(0)
    encoder = EncoderConfig(weights='none', stage=1, image_size=12)
    model = Captioner(CaptionerConfig(30, 32, 2, 4, 24, .1, fusion, encoder=encoder)).eval()
    for part in model.text, model.fusion, model.decoder:
        for p in part.parameters():
            if p.dim() > 1: torch.nn.init.normal_(p, std=.3)
    return model


@few
@given(fusion=st.sampled_from(list(FUSIONS)), B=st.integers(1, 3), T=st.integers(2, 12), more=st.integers(1, 6),
       seed=st.integers(0, 9999), data=st.data())
def test_a_later_word_or_padding_never_changes_an_earlier_logit(fusion, B, T, more, seed, data):
    torch.manual_seed(seed)
    model, t = model_of(fusion), data.draw(st.integers(1, T - 1))
    features, tokens = torch.randn(B, 9, 64), torch.randint(4, 30, (B, T))
    with torch.no_grad():
        before = model(features, tokens)
        other = torch.cat([tokens[:, :t], torch.randint(4, 30, (B, T - t))], 1)
        padded = F.pad(tokens[:, :t], (0, more))
        for changed in other, padded:
            torch.testing.assert_close(model(features, changed)[:, :t], before[:, :t], rtol=0, atol=2e-4)
        ends = torch.cat([tokens, tokens.new_full((B, 1), EOS)], 1)
        plain, wide = (caption_loss(model, Batch(features, [x], [torch.arange(B)])) for x in (ends, F.pad(ends, (0, more))))
        assert plain[1] == wide[1] == B*T and plain[0].item() == pytest.approx(wide[0].item(), rel=1e-5)
        assert plain[2]['accuracy'] == wide[2]['accuracy']


def test_a_text_tower_does_not_see_padding():
    from multimodal.retrieval import Retriever, RetrieverConfig
    torch.manual_seed(0)
    model = Retriever(RetrieverConfig(30, 32, n_layers=0, encoder=EncoderConfig(weights='none', stage=1, image_size=12, embedding_dim=32))).eval()
    tokens = torch.randint(4, 30, (3, 6))
    with torch.no_grad(): torch.testing.assert_close(model.caption(tokens), model.caption(F.pad(tokens, (0, 5))))


def test_both_towers_give_vectors_of_length_one():
    from multimodal.retrieval import Retriever, RetrieverConfig, unit
    torch.manual_seed(1)
    model = Retriever(RetrieverConfig(30, 32, encoder=EncoderConfig(weights='none', stage=1, image_size=12, embedding_dim=32))).eval()
    with torch.no_grad(): vectors = [unit(5*torch.randn(4, 7)), model.image(torch.randn(3, 9, 64)), model.caption(torch.randint(4, 30, (3, 6)))]
    for x in vectors: torch.testing.assert_close(x.norm(dim=-1), torch.ones(len(x)))


class Told:
    "Stands for a `Writing`: what comes next depends on all words so far, by a table drawn from a seed"
    device = torch.device('cpu')
    def __init__(self, seed, n_photos, V=7):
        self.n_photos, self.table = n_photos, 2*torch.randn(1009, V, generator=torch.Generator().manual_seed(seed))
        self.state = torch.arange(n_photos)*101

    def step(self, tokens):
        if len(tokens) != len(self.state): self.state = self.state.repeat_interleave(len(tokens)//len(self.state))
        self.state = (self.state*31 + tokens*7 + 1) % 1009
        return self.table[self.state]

    def keep(self, rows, photos=None): self.state = self.state[rows]

    def logprob(self, photo, ids):  # of a whole caption, one word after the other
        state, total = photo*101, 0.
        for read, word in zip([BOS, *ids], [*ids, EOS]):
            state = (state*31 + read*7 + 1) % 1009
            total += self.table[state].log_softmax(-1)[word].item()
        return total


EVERY = [list(c) for n in (1, 2, 3) for c in product((4, 5, 6), repeat=n)]

@few
@given(seed=st.integers(0, 9999), N=st.integers(1, 3), penalty=st.sampled_from([0., .35, .7, 1., 2.]))
def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_by_brute_force(seed, N, penalty):
    config = GenerateConfig(beam=len(EVERY) + 1, max_len=3, length_penalty=penalty)
    for photo, found in enumerate(beam_search(Told(seed, N), config)):
        told = Told(seed, N)
        # at the end of its room a caption must end: that is no choice, and costs what the model says
        score = lambda ids: told.logprob(photo, ids)/(len(ids) + 1)**penalty
        scores = [score(c.ids) for c in found]
        assert scores == sorted(scores, reverse=True) and len({tuple(c.ids) for c in found}) == len(found)
        best = max(map(score, EVERY))
        assert scores[0] == pytest.approx(best, abs=1e-4)
        for c in found: assert c.logprob == pytest.approx(told.logprob(photo, c.ids), abs=1e-4)


@few
@given(seed=st.integers(0, 9999), beam=st.integers(2, 6))
def test_no_narrow_beam_and_no_greedy_caption_scores_above_the_widest_beam(seed, beam):
    wide = beam_search(Told(seed, 2), GenerateConfig(beam=len(EVERY) + 1, max_len=3, length_penalty=0.))
    narrow = beam_search(Told(seed, 2), GenerateConfig(beam=beam, max_len=3, length_penalty=0.))
    greedy = one_by_one(Told(seed, 2), GenerateConfig('greedy', max_len=3))
    for w, n, g in zip(wide, narrow, greedy):
        assert w[0].logprob >= max(n[0].logprob, g.logprob) - 1e-4
        assert len(n) <= beam and [c.logprob for c in n] == sorted((c.logprob for c in n), reverse=True)


WORDS = st.lists(st.sampled_from('a the dog cat runs on grass red'.split()), min_size=4, max_size=9).map(' '.join)
SETS = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=4)), min_size=2, max_size=6)

@pytest.mark.filterwarnings('ignore::UserWarning')     # NLTK says where a BLEU is 0
@few
@given(SETS)
def test_all_four_bleus_are_those_of_nltk(pairs):
    hypotheses, references = [h.split() for h, _ in pairs], [[r.split() for r in rs] for _, rs in pairs]
    ours = caption_metrics(*zip(*pairs), **FAST)
    for n in 1, 2, 3, 4:
        theirs = corpus_bleu(references, hypotheses, weights=[1/n]*n)
        assert ours[f'bleu_{n}'] == pytest.approx(theirs, abs=1e-3 if theirs < 1e-3 else 1e-6), n      # coco-caption never says quite 0


@few
@given(SETS, st.randoms())
def test_scores_of_single_captions_follow_their_images_in_any_order(pairs, rng):
    from multimodal.failures import ciders
    order = rng.sample(range(len(pairs)), len(pairs))
    one = ciders([h for h, _ in pairs], [rs for _, rs in pairs])
    two = ciders([pairs[i][0] for i in order], [rng.sample(pairs[i][1], len(pairs[i][1])) for i in order])
    np.testing.assert_allclose(two, one[order], atol=1e-9)


# ---- what mutants survived before (the loss of metrics, parts of a batch, lengths of vectors), or what was tested only by the way

@few
@given(B=st.integers(1, 4), T=st.integers(1, 6), V=st.integers(2, 9), seed=st.integers(0, 999), smoothing=st.sampled_from([0., .1]))
def test_loss_and_accuracy_of_metrics_leave_padding_out(B, T, V, seed, smoothing):
    torch.manual_seed(seed)
    logits, targets = torch.randn(B, T, V), torch.randint(V, (B, T))
    real = targets != PAD
    wanted = F.cross_entropy(logits[real], targets[real], reduction='sum', label_smoothing=smoothing)
    loss, n = masked_cross_entropy(logits, targets, smoothing)
    assert n == real.sum() and loss.item() == pytest.approx(wanted.item(), abs=1e-4)
    assert token_accuracy(logits, targets) == ((logits.argmax(-1) == targets)[real].sum(), n)


def test_each_step_and_seed_has_a_luck_of_its_own():
    def luck(*which):
        seed_step(*which)
        return torch.rand(1).item(), np.random.rand(), random.random()
    drawn = [luck(seed, step, rank) for seed in (0, 1) for step in (0, 1, 2) for rank in (0, 1)]
    assert len(set(drawn)) == 12 and luck(1, 2, 1) == drawn[-1]


def test_validation_is_without_dropout():
    from multimodal.training import Trainer
    net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(.5), torch.nn.Linear(64, 1))
    batches = [torch.randn(8, 4) for _ in range(3)]
    loss = lambda model, x: (model(x).square().sum(), len(x), {})
    trainer = Trainer(net, loss, batches, batches, TrainConfig(), device='cpu', say=lambda line: None)
    net.train()
    with torch.no_grad(): seen = trainer.evaluate()['loss']
    net.eval()
    with torch.no_grad(): assert seen == pytest.approx(sum(net(x).square().sum().item() for x in batches)/24, rel=1e-5)


def test_the_parts_of_a_batch_give_the_gradient_of_the_mean_over_all_its_items():
    from multimodal.threads import learn_at_once
    torch.manual_seed(0)
    net, x = torch.nn.Linear(4, 1), torch.randn(9, 4)
    weights = list(net.parameters())
    total, n, _ = learn_at_once(lambda part: (net(part).square().sum(), len(part), {}), x.split([5, 1, 3]), weights, 1)
    found = [p.grad.clone() for p in weights]
    wanted = torch.autograd.grad(net(x).square().mean(), weights)
    assert n == 9 and total.item() == pytest.approx(net(x).square().sum().item(), rel=1e-5)
    for a, b in zip(found, wanted): torch.testing.assert_close(a, b)


@few
@given(st.lists(st.sampled_from('abcd'), max_size=20), st.integers(1, 5))
def test_a_word_that_comes_just_often_enough_is_known(words, min_count):
    counts = Counter(words)
    known = set(Vocab.build([' '.join(words)], min_count).words[4:])
    assert known == {w for w, n in counts.items() if n >= min_count}


def test_what_comes_after_the_end_is_not_read():
    vocab = Vocab(['dog', 'cat'])
    assert vocab.decode([BOS, 4, EOS, 5, EOS]) == 'dog' and vocab.decode([EOS, 4]) == '' and vocab.decode([4, 5]) == 'dog cat'


# ---- broken lines

def load_tool():
    spec = importlib.util.spec_from_file_location('mutants', ROOT/'tools'/'mutants.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_each_line_that_mutants_break_is_there_once_and_all_were_killed():
    tool, kept = load_tool(), read_json(RESULTS/'reliability.json')['mutants']
    for m in tool.MUTANTS:
        tool.source(m)
        file, name = m.test.split('::')
        assert f'\ndef {name}(' in (ROOT/'tests'/file).read_text(encoding='utf-8'), f'{m.name}: there is no test {m.test}'
    assert len(tool.MUTANTS) >= 30 and len({m.name for m in tool.MUTANTS}) == len(tool.MUTANTS)
    assert [(r['name'], r['module'], r['old'], r['new'], r['test']) for r in kept['each']] == list(map(tuple, tool.MUTANTS)), \
        'the list has changed: run python tools/mutants.py --out results/reliability.json'
    assert kept['killed'] == kept['of'] == len(tool.MUTANTS) and all(r['outcome'] == 'killed' for r in kept['each'])


def test_two_mutants_of_the_day_are_killed():
    "A breakage really made, in a copy of the package; other ones each day, of those whose tests are quick."
    tool, day = load_tool(), date.today().timetuple().tm_yday
    quick = sorted(read_json(RESULTS/'reliability.json')['mutants']['each'], key=lambda r: r['seconds'])
    today, by_name = (quick[day % 4], quick[4 + day % 8]), {m.name: m for m in tool.MUTANTS}           # the first four need no PyTorch
    with tool.copied() as folder:
        for r in today:
            outcome = tool.try_out(by_name[r['name']], folder)
            assert outcome['outcome'] == 'killed', outcome
