"""Published scores come out; scores do not depend on order; the two tokenizers agree; bad input is named."""
import random, subprocess, sys, time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from nltk.translate.bleu_score import corpus_bleu

from multimodal.core import UserError
from multimodal.metrics import (caption_metrics, ceiling, constant_caption, floor, has_java, metrics_table, one_fewer, split_java,
                                split_python)

VECTORS = Path(__file__).parent/'vectors'/'nlg_eval'        # by Maluuba/nlg-eval, MIT; see the licence beside them
PUBLISHED = dict(bleu_1=.55, bleu_2=.428174, bleu_3=.284043, bleu_4=.201143, meteor=.295797, rouge_l=.522104, cider=1.242192)
java = pytest.mark.skipif(not has_java(), reason='needs Java')
lines = lambda name: (VECTORS/name).read_text(encoding='utf-8').splitlines()
HYPOTHESES, REFERENCES = lines('hyp.txt'), [list(pair) for pair in zip(lines('ref1.txt'), lines('ref2.txt'))]

@pytest.mark.parametrize('tokenizer', [pytest.param('java', marks=java), 'python'])
def test_published_scores(tokenizer):
    scores = caption_metrics(HYPOTHESES, REFERENCES, tokenizer)
    for name, value in PUBLISHED.items():
        if name == 'meteor' and tokenizer == 'python': assert scores[name] is None
        else: assert scores[name] == pytest.approx(value, abs=1e-4), name

def test_without_java_meteor_is_none(monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert not has_java()
    assert caption_metrics(HYPOTHESES, REFERENCES)['meteor'] is None
    with pytest.raises(UserError, match='needs Java'): caption_metrics(HYPOTHESES, REFERENCES, 'java')

WORDS = st.lists(st.sampled_from('a the dog cat runs on grass red'.split()), min_size=1, max_size=9).map(' '.join)
SETS = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=4)), min_size=2, max_size=6)

@settings(max_examples=30, deadline=None, database=None)
@given(SETS, st.randoms())
def test_order_of_images_and_references_does_not_matter(pairs, rng):
    scores = caption_metrics(*zip(*pairs), tokenizer='python')
    shuffled = [(h, rng.sample(rs, len(rs))) for h, rs in rng.sample(pairs, len(pairs))]
    again = caption_metrics(*zip(*shuffled), tokenizer='python')
    for name in scores:
        if name != 'meteor': assert scores[name] == pytest.approx(again[name], abs=1e-9), name

@settings(max_examples=50, deadline=None, database=None)
@given(SETS)
def test_bleu_equals_nltk(pairs):
    hypotheses, references = [h.split() for h, _ in pairs], [[r.split() for r in rs] for _, rs in pairs]
    ours = caption_metrics(*zip(*pairs), tokenizer='python')['bleu_1']
    assert ours == pytest.approx(corpus_bleu(references, hypotheses, weights=[1.]), abs=1e-6)

def test_perfect_and_empty_captions():
    references = [['a dog runs over the grass', 'the dog is running'], ['two girls jump into a pool', 'girls jump']]
    perfect = caption_metrics([rs[0] for rs in references], references, 'python')
    assert perfect['bleu_4'] == pytest.approx(1, abs=1e-6) and perfect['rouge_l'] == pytest.approx(1)
    assert caption_metrics(['', ''], references, 'python')['bleu_1'] < 1e-6

@java
def test_tokenizers_agree_on_odd_captions():
    captions = ['', '...', 'A\u2028dog\nruns\r\nhere', 'Two girls , one in pink .', "It isn't a dog's ball", '  spaces  ', 'end']
    assert split_java(captions) == split_python(captions)

@java
@pytest.mark.parametrize('end', ['', 'os.kill(os.getpid(), 9)'])
def test_nothing_is_printed_and_no_java_is_left(end):
    "METEOR's program is started once, for all that a process asks, and ends with it, however that ends."
    code = f"""
from multimodal.metrics import caption_metrics, meteor_program; import subprocess, os
for _ in range(2): caption_metrics({HYPOTHESES!r}, {REFERENCES!r})
print(subprocess.run(['pgrep', '-P', str(os.getpid()), 'java'], capture_output=True, text=True).stdout, end='', flush=True)
{end}"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-9 if end else 0, '')
    state = lambda: subprocess.run(['ps', '-o', 'stat=', '-p', done.stdout.strip()], capture_output=True, text=True).stdout.strip()
    until = time.monotonic() + 20
    while (left := state()) not in ('', 'Z') and time.monotonic() < until: time.sleep(.1)
    assert left in ('', 'Z')                                                     # Z: it has ended, and nobody has asked how

def test_bad_input():
    for hypotheses, references in (([], []), (['a'], []), (['a'], ['a dog']), (['a'], [[]])):
        with pytest.raises(UserError): caption_metrics(hypotheses, references)
    with pytest.raises(UserError): caption_metrics(['a'], [['a']], 'perl')
    with pytest.raises(UserError): ceiling([['a']])
    with pytest.raises(UserError): floor([[]], [['a']])

def test_the_same_captions_against_one_reference_fewer():
    "What `ceiling` leaves out is left out here, image by image; a person against the others is the ceiling itself."
    said, people = ['a dog', 'a cat', 'a bird'], [['a dog', 'dogs run', 'the dog'], ['a cat'], ['birds', 'a bird here']]
    for which in range(3):
        rest = [[r for i, r in enumerate(rs) if i != which % len(rs)] for rs in (people[0], people[2])]
        assert one_fewer(said, people, which, meteor=False) == caption_metrics(['a dog', 'a bird'], rest, meteor=False)
        person = [rs[which % len(rs)] for rs in people]
        assert one_fewer(person, people, which, meteor=False) == ceiling(people, which, meteor=False)
    with pytest.raises(UserError): one_fewer(['a'], [['a']])

def test_constant_caption_is_common():
    rng = random.Random(0)
    seen = [[f'a dog runs on the {rng.choice(["grass", "sand"])}', f'zebra {i} in orbit'] for i in range(50)]
    assert constant_caption(seen).startswith('a dog runs on the')

def test_table_says_times_100():
    table = metrics_table({'x': {'bleu_1': .5, 'meteor': None}})
    assert '× 100' in table and '50.0' in table and '–' in table
    assert '50.0 ± 1.2 | –' in metrics_table({'x': {'bleu_1': .5, 'meteor': None}}, {'x': {'bleu_1': .0123, 'meteor': None}})

@pytest.fixture(scope='module')
def flickr():
    import os
    root = os.environ.get('MULTIMODAL_FLICKR8K')
    if not root: pytest.skip('MULTIMODAL_FLICKR8K is not set')
    import zipfile
    captions = {}
    archive = Path(root)/'Flickr8k_text.zip'
    read = (lambda name: zipfile.ZipFile(archive).read(name).decode()) if archive.exists() else lambda name: (Path(root)/name).read_text()
    for line in read('Flickr8k.token.txt').splitlines():
        name, caption = line.split('\t')
        captions.setdefault(name.split('#')[0], []).append(caption)
    return [captions[name] for name in read('Flickr_8k.testImages.txt').split()]

def test_anchors_on_flickr8k(flickr):
    "The person and the constant caption of the literature, and Java's tokenizer against the Python one"
    constant = ['a man in a red shirt is standing in the grass']*len(flickr)
    person, lazy = ceiling(flickr, meteor=False), caption_metrics(constant, flickr, meteor=False)
    assert [round(100*person[f'bleu_{n}'], 1) for n in (1, 2, 3, 4)] == pytest.approx([63.6, 44.6, 30.5, 20.9], abs=.11)
    assert (100*person['cider'], 100*person['rouge_l']) == (pytest.approx(78.9, abs=.2), pytest.approx(48.8, abs=.1))
    assert (100*lazy['bleu_1'], 100*lazy['cider']) == (pytest.approx(48.0, abs=.1), pytest.approx(9.4, abs=.1))
    if has_java():
        for ours, theirs in ((ceiling(flickr, tokenizer='python'), person),
                             (caption_metrics(constant, flickr, 'python'), lazy)):
            for name in theirs:
                if name != 'meteor': assert ours[name] == pytest.approx(theirs[name], rel=.005), name


@java
def test_ctrl_c_while_meteor_counts_ends_at_once():
    "Stopped while its lock is held, the scorer must not wait for that lock as it is thrown away."
    code = '''
import sys
from pycocoevalcap.meteor.meteor import Meteor
from multimodal.metrics import meteor_score
def stopped(self, theirs, mine):
    self.lock.acquire()
    raise KeyboardInterrupt
Meteor.compute_score = stopped
try: meteor_score({0: ['a dog']}, {0: ['a dog']})
except KeyboardInterrupt: sys.exit(130)
'''
    assert subprocess.run([sys.executable, '-c', code], timeout=60, capture_output=True).returncode == 130
