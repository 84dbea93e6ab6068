"""Sums over images give coco-caption's scores; intervals and tests keep their promises; a mistake is one clear line."""
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from pycocoevalcap.bleu.bleu import Bleu

from multimodal.core import UserError
from multimodal.intervals import image_rows, interval, intervals_table, paired, resampled, scores_of, swapped
from multimodal.metrics import METRICS, caption_metrics, has_java

FAST = dict(tokenizer='python', meteor=False)
SENTENCE = st.lists(st.sampled_from('a the dog dogs cat runs running on grass red .'.split()), min_size=1, max_size=9).map(' '.join)
SENTENCE = SENTENCE.filter(lambda s: s.strip('. '))
SETS = st.lists(st.tuples(st.just('') | SENTENCE, st.lists(SENTENCE, min_size=1, max_size=4)), min_size=1, max_size=6)
java = pytest.mark.skipif(not has_java(), reason='needs Java')


def some_rows(n=150, seed=0, wrong=.3):
    "Captions of invented photos: three words that belong to the photo, some of them changed"
    rng = np.random.default_rng(seed)
    words = np.array('dog cat boy girl man ball car sea snow rock hat bike tree road sand red blue big wet old'.split())
    topics = [np.random.default_rng(i).choice(words, 6, replace=False) for i in range(n)]
    say = lambda t, share: ' '.join(np.where(rng.random(4) < share, rng.choice(words, 4), rng.choice(t, 4)))
    references = [[say(t, 0) for _ in range(3)] for t in topics] if seed == 0 else REFERENCES
    return [say(t, wrong) for t in topics], references


_, REFERENCES = some_rows()
ONE, OTHER = (image_rows(some_rows(seed=k)[0], REFERENCES, **FAST) for k in (1, 2))


def same(scores, theirs, places=1e-9):
    assert scores.keys() == theirs.keys()
    for m, x in theirs.items():
        assert (scores[m] is None) == (x is None), m
        if x is not None: assert scores[m] == pytest.approx(x, abs=places), m


@settings(max_examples=100, deadline=None, database=None)
@given(SETS)
def test_sums_give_what_the_scorer_gives(pairs):
    captions, references = map(list, zip(*pairs))
    rows = image_rows(captions, references, **FAST)
    same(scores_of(rows.sum(0)), caption_metrics(captions, references, **FAST))
    each = Bleu(4).compute_score({i: rs for i, rs in enumerate([[r.replace(' .', '').replace('.', '') for r in rs] for rs in references])},
                                 {i: [c.replace(' .', '').replace('.', '')] for i, c in enumerate(captions)}, verbose=0)[1]
    np.testing.assert_allclose([scores_of(rows)[f'bleu_{n}'] for n in (1, 2, 3, 4)], each, atol=1e-9)


@java
@settings(max_examples=5, deadline=None, database=None)
@given(SETS)
def test_so_do_those_with_meteor(pairs):
    captions, references = map(list, zip(*pairs))
    rows = image_rows(captions, references)
    assert rows.shape[1] == 19
    same(scores_of(rows.sum(0)), caption_metrics(captions, references))


@java
def test_a_resample_has_the_meteor_of_its_captions():
    from multimodal.metrics import meteor_program
    captions, references = some_rows(40, seed=3)[0], REFERENCES[:40]
    captions[0] = references[0][0]                                                 # word for word
    rows, drawn = image_rows(captions, references), np.random.default_rng(5).integers(40, size=(3, 40))
    scores = scores_of(resampled(rows, 3, seed=5))
    for k, which in enumerate(drawn):
        chosen = [captions[i] for i in which], [references[i] for i in which]
        theirs = caption_metrics(*chosen)
        for m in 'bleu_1', 'bleu_4', 'rouge_l', 'meteor': assert scores[m][k] == pytest.approx(theirs[m], abs=1e-9), m
    each = meteor_program().compute_score(dict(enumerate(references)), {i: [c] for i, c in enumerate(captions)})[1]
    np.testing.assert_allclose(scores_of(rows)['meteor'], each, atol=1e-9)


@settings(max_examples=30, deadline=None, database=None)
@given(SETS.filter(lambda pairs: len(pairs) > 1), st.randoms())
def test_the_order_of_images_changes_nothing(pairs, rng):
    other = rng.sample(pairs, len(pairs))
    a, b = (image_rows(*map(list, zip(*p)), **FAST) for p in (pairs, other))
    one, two = interval(a, 50), interval(b, 50)
    for m in one:
        if one[m] is not None: np.testing.assert_allclose(one[m], two[m], atol=1e-12)


def test_an_interval_is_reproduced_by_its_seed_and_holds_the_score():
    a, again, other = interval(ONE, 500), interval(ONE, 500), interval(ONE, 500, seed=1)
    assert a == again and a != other and a['meteor'] is None
    same(scores_of(ONE.sum(0)), {m: x and x.value for m, x in a.items()})
    for m, x in a.items():
        if x:
            assert x.low < x.value < x.high and abs(x.low - other[m].low) < .3*(x.high - x.low)
            wider = interval(ONE, 500, level=.99)[m]
            assert wider.low < x.low and wider.high > x.high
    error = scores_of(ONE)['cider'].std(ddof=1)/len(ONE)**.5                        # CIDEr is a mean: there is a formula
    many = interval(ONE, 10_000)['cider']
    assert many.high - many.low == pytest.approx(2*1.96*error, rel=.05)


def test_equal_captioners_do_not_differ():
    for x in paired(ONE, ONE, 200).values():
        if x: assert x == pytest.approx((0, 0, 0, 1), abs=1e-12)              # sums of the same numbers, in any order


def test_who_is_called_first_decides_the_sign_only():
    ab, ba = paired(ONE, OTHER, 4000), paired(OTHER, ONE, 4000)
    for m, x in ab.items():
        if x:
            assert x.value == pytest.approx(-ba[m].value) and x.low < x.value < x.high
            assert x.low == pytest.approx(-ba[m].high, abs=.15*(x.high - x.low)) and abs(x.p - ba[m].p) < .05
    value = scores_of(OTHER.sum(0))['cider'] - scores_of(ONE.sum(0))['cider']
    assert ab['cider'].value == pytest.approx(value)


def test_swapping_keeps_what_both_have_together():
    a, b = swapped(ONE, OTHER, 7)
    np.testing.assert_allclose(a + b, np.tile(ONE.sum(0) + OTHER.sum(0), (7, 1)))
    assert a.shape == (7, 13) and len(np.unique(a[:, 0])) > 1


def test_swaps_are_the_exact_test_where_all_can_be_tried():
    "CIDEr on eight images: 256 ways to swap them"
    from itertools import product
    few, more = ONE[:8], OTHER[:8]
    apart = (more - few)[:, 12]
    ways = np.array(list(product([-1, 1], repeat=8))) @ apart
    exact = np.mean(np.abs(ways) >= abs(apart.sum()) - 1e-12)
    assert paired(few, more, 20_000)['cider'].p == pytest.approx(exact, abs=.015)


def test_pairing_finds_what_two_intervals_overlap_on():
    captions, references = some_rows(seed=1)
    worse = [c if i % 8 else 'old wet' for i, c in enumerate(captions)]
    two = image_rows(worse, references, **FAST)
    a, b, d = interval(ONE, 1000)['cider'], interval(two, 1000)['cider'], paired(ONE, two, 1000)['cider']
    assert b.high > a.low and d.high < 0 and d.p < .02


def test_for_people():
    table = intervals_table({'x': interval(ONE, 50), 'x − y': paired(ONE, OTHER, 50), 'none': {}})
    assert '× 100' in table and 'METEOR' not in table and table.count('\n') == 4 and table.splitlines()[-1].count('–') == 6
    x = interval(ONE, 50)['bleu_1']
    assert str(x) == f'{100*x.value:.1f} [{100*x.low:.1f}, {100*x.high:.1f}]' and str(x) in table
    assert 'p = 1.000' in str(paired(ONE, ONE, 50)['cider']) and '+0.0' in str(paired(ONE, ONE, 50)['cider'])
    assert list(METRICS)[0] in interval(ONE, 50)


def test_mistakes_are_named():
    with pytest.raises(UserError, match='belong together'): image_rows(['a'], [])
    with pytest.raises(UserError, match='no captions'): image_rows([], [])
    with pytest.raises(UserError, match='at least one reference'): image_rows(['a'], [[]])
    with pytest.raises(UserError, match='no reference has a word'): image_rows(['a'], [['.']], **FAST)
    with pytest.raises(UserError, match='choose auto'): image_rows(['a'], [['a']], tokenizer='perl')
    with pytest.raises(UserError, match='at least 2'): interval(ONE[:1])
    with pytest.raises(UserError, match='n=0'): interval(ONE, 0)
    with pytest.raises(UserError, match='level=95'): interval(ONE, level=95)
    with pytest.raises(UserError, match='150 and 149 images'): paired(ONE, OTHER[1:])
    with pytest.raises(UserError, match='METEOR'): paired(ONE, np.zeros((len(ONE), 19)))
    with pytest.raises(UserError, match='at least 2'): paired(ONE[:1], OTHER[:1])


@java
def test_where_meteor_fails_the_other_metrics_are_there(monkeypatch):
    from multimodal import intervals
    class Broken:
        def _stat(self, *_): return ''
        meteor_p = type('', (), {'poll': lambda self: None})()
    monkeypatch.setattr(intervals, 'meteor_program', lambda: Broken())
    rows = image_rows(['a dog', 'a cat'], [['a dog'], ['the cat']])
    assert rows.shape == (2, 13) and scores_of(rows.sum(0))['meteor'] is None


def test_metrics_agree_with_experts_as_published():
    "Kendall's tau-c on Flickr8k-Expert, as in Hessel et al. 2021 (arXiv 2104.08718): ROUGE-L 32.3, CIDEr 43.9"
    root = os.environ.get('MULTIMODAL_FLICKR8K')
    if not root: pytest.skip('MULTIMODAL_FLICKR8K is not set')
    import zipfile
    from scipy.stats import kendalltau
    archive = Path(root)/'Flickr8k_text.zip'
    read = (lambda name: zipfile.ZipFile(archive).read(name).decode()) if archive.exists() else lambda name: (Path(root)/name).read_text()
    captions = {}
    for line in read('Flickr8k.token.txt').splitlines():
        name, caption = line.split('\t')
        captions[name] = caption
    of_photo = lambda photo: [captions[f'{photo}#{k}'] for k in range(5)]
    judged = [line.split('\t') for line in read('ExpertAnnotations.txt').splitlines()]
    judged = [j for j in judged if not j[1].startswith(j[0])]
    assert len(judged) == 5664
    scores = scores_of(image_rows([captions[j[1]] for j in judged], [of_photo(j[0]) for j in judged], **FAST))
    ratings = [int(x) for j in judged for x in j[2:]]
    for m, published in ('rouge_l', 32.3), ('cider', 43.9):
        assert 100*kendalltau(np.repeat(scores[m], 3), ratings, variant='c').statistic == pytest.approx(published, abs=.2)
