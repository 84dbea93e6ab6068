"""CIDEr on ids is coco-caption's, whatever the captions; and what cannot be scored is named."""
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from pycocoevalcap.cider.cider import Cider

from multimodal.cider import Idf, cider, runs
from multimodal.core import UserError


def table(rows: list) -> np.ndarray:
    "Lists of ids → one array, padded"
    ids = np.zeros((len(rows), max(1, *map(len, rows))), np.int64)
    for i, row in enumerate(rows): ids[i, :len(row)] = row
    return ids


def ours(captions, references):
    owners = np.repeat(np.arange(len(references)), [len(rs) for rs in references])
    flat = table([r for rs in references for r in rs])
    return cider(table(captions), np.arange(len(captions)), flat, owners, Idf(flat, owners))


def coco(captions, references):
    say = lambda ids: ' '.join(map(str, ids))
    mine = {i: [say(c)] for i, c in enumerate(captions)}
    return Cider().compute_score({i: [say(r) for r in rs] for i, rs in enumerate(references)}, mine)[1]


IDS = st.lists(st.integers(1, 7) | st.just(32767), min_size=1, max_size=9)
SETS = st.lists(st.tuples(st.lists(st.integers(1, 9), max_size=9), st.lists(IDS, min_size=1, max_size=5)), min_size=2, max_size=6)


@settings(max_examples=150, deadline=None, database=None)
@given(SETS)
def test_equal_to_coco_caption(pairs):
    captions, references = zip(*pairs)
    np.testing.assert_allclose(ours(captions, references), coco(captions, references), atol=1e-9)


@settings(max_examples=50, deadline=None, database=None)
@given(SETS, st.randoms())
def test_each_caption_is_scored_on_its_own(pairs, rng):
    captions, references = zip(*pairs)
    owners = np.repeat(np.arange(len(references)), [len(rs) for rs in references])
    flat = table([r for rs in references for r in rs])
    which = np.array([rng.randrange(len(pairs)) for _ in range(9)])              # in any order, some twice, some never
    some = cider(table(captions)[which], which, flat, owners, Idf(flat, owners))
    np.testing.assert_allclose(some, ours(captions, references)[which], atol=1e-12)


def test_on_flickr8k():
    root = os.environ.get('MULTIMODAL_FLICKR8K')
    if not root: pytest.skip('MULTIMODAL_FLICKR8K is not set')
    import zipfile
    from multimodal.text import tokenize
    photos, rng, ids = {}, random.Random(0), {}
    for line in zipfile.ZipFile(f'{root}/Flickr8k_text.zip').read('Flickr8k.token.txt').decode().splitlines():
        name, caption = line.split('\t')
        photos.setdefault(name.split('#')[0], []).append([ids.setdefault(w, len(ids) + 1) for w in tokenize(caption)])
    references = [rs[1:] for rs in photos.values()][:2000]
    captions = [rs[0][:rng.randint(3, 12)] + rng.choice(rng.choice(references))[:rng.randint(0, 4)] for rs in photos.values()][:2000]
    theirs = coco(captions, references)
    assert np.abs(ours(captions, references) - theirs).max() < 1e-9 and theirs.mean() > .4


def test_what_cannot_be_scored():
    flat, owners = table([[1, 2], [3]]), np.array([0, 0])
    with pytest.raises(UserError, match='photo 1 has no reference'): cider(flat, np.array([0, 1]), flat, owners, Idf(flat, owners))
    with pytest.raises(UserError, match='below 32768'): runs(table([[1 << 15]]))
