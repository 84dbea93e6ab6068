"""Captions to words to ids and back, for any text that Unicode has; vocabularies that are broken or not their model's own."""
import json, subprocess, sys, unicodedata

import pytest
from hypothesis import given, settings, strategies as st

from multimodal.core import UserError
from multimodal.text import BOS, EOS, PAD, UNK, Vocab, detokenize, tokenize

SETTINGS = settings(max_examples=150, deadline=None, database=None)
ODD = ['', ' ', '...', '\n\t', "'", "''", "don't", "'tis", "dogs'", "rock 'n' roll", "a'b'c", "’", '_', 'a_b', '__', '١٢٣', '½', '²', 'e\u0301', '\u0301',
       'İ', 'ß', 'ẞ', 'ΑΣ', 'ﬁ', 'Ǆ', '👨\u200d👩\u200d👧', '👍🏽', '1️⃣', '🇩🇪', '❤️', 'हिन्दी', 'ภาษาไทย', '한국어', '\u202eabc', '\0', '\ud800', '\U0010ffff',
       'a\u00a0b', 'a\u200bb', '<pad>', '<eos>', 'x'*20_000, '🙂'*2000, 'a dog '*2000]
TEXTS = st.text() | st.sampled_from(ODD) | st.lists(st.sampled_from(ODD), max_size=4).map(' '.join)


@SETTINGS
@given(TEXTS)
def test_words_are_words(text):
    words = tokenize(text)
    assert tokenize(detokenize(words)) == words
    assert all(w and w == w.lower() and not any(c.isspace() for c in w) for w in words)
    assert not set(words) & {'<pad>', '<bos>', '<eos>', '<unk>'}


@SETTINGS
@given(TEXTS)
def test_how_letters_are_stored_does_not_matter(text):
    assert tokenize(unicodedata.normalize('NFD', text)) == tokenize(unicodedata.normalize('NFC', text)) == tokenize(text)


def test_every_character_there_is():
    "One by one, at a word's begin and in it: stable, and letters are never lost"
    for code in range(0x20000):
        for text in (chr(code), f'a{chr(code)}b'):
            words = tokenize(text)
            assert tokenize(detokenize(words)) == words, hex(code)
        if unicodedata.category(chr(code))[0] in 'LN': assert tokenize(chr(code)), hex(code)


@pytest.mark.parametrize('text, words', [
    ('A dog.', ['a', 'dog']), ('', []), ('!?', []), ("The dog's ball isn't red", ['the', "dog's", 'ball', "isn't", 'red']), ("'quoted'", ['quoted']),
    ('It’s', ["it's"]), ('T-shirt, 3 dogs & 1.5 m', ['t', 'shirt', '3', 'dogs', '1', '5', 'm']), ('Straße ÄÖÜ', ['straße', 'äöü']), ('हिन्दी में', ['हिन्दी', 'में']),
    ('woof🙂🙂', ['woof', '🙂', '🙂']), ('Å', ['å']), ('a_b', ['a', 'b']), ('x\u0301y', ['x\u0301y'])])
def test_examples(text, words): assert tokenize(text) == words


@SETTINGS
@given(st.lists(TEXTS, max_size=5), st.integers(1, 3))
def test_round_trip(texts, min_count):
    vocab = Vocab.build(texts, min_count)
    counts = [w for t in texts for w in tokenize(t)]
    assert set(vocab.words[4:]) == {w for w in counts if counts.count(w) >= min_count} if len(counts) < 300 else True
    for text in texts:
        ids, words = vocab.encode(text), tokenize(text)
        assert ids[0] == BOS and ids[-1] == EOS and len(ids) == len(words) + 2 and PAD not in ids
        assert vocab.decode(ids) == detokenize([w for w in words if w in vocab.ids])
        assert ids.count(UNK) == sum(w not in vocab.ids for w in words)
        assert vocab.encode(vocab.decode(ids)) == [i for i in ids if i != UNK]
        assert vocab.decode([*ids, *ids]) == vocab.decode([*ids, PAD, PAD]) == vocab.decode(ids)
        assert vocab.encode(text, max_len=2) == [*ids[:-1][:3], EOS]


@SETTINGS
@given(st.lists(st.text(), unique=True))
def test_saved_and_loaded(tmp_path_factory, texts):
    path, vocab = tmp_path_factory.mktemp('v')/'vocab.json', Vocab.build(texts, 1)
    vocab.save(path)
    assert Vocab.load(path) == vocab and Vocab.load(path).fingerprint() == vocab.fingerprint()


def test_the_same_ids_on_every_machine():
    "Neither the order of captions nor Python's hash seed changes an id"
    captions = ['a dog runs', 'two dogs run', 'a cat and a dog', 'zebra', 'Äpfel']
    code = f'from multimodal.text import Vocab; print(Vocab.build({captions!r}, 1).fingerprint())'
    seen = {subprocess.run([sys.executable, '-c', code], env={'PYTHONHASHSEED': seed, 'PYTHONPATH': ':'.join(sys.path)}, capture_output=True, text=True).stdout.strip()
            for seed in '12'}
    assert seen == {Vocab.build(captions[::-1], 1).fingerprint()}


def test_fingerprint_tells_vocabularies_apart():
    prints = [Vocab(words).fingerprint() for words in ([], ['a'], ['a', 'b'], ['b', 'a'], ['ab'], ['A'])]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize('content', ['', '{', '{"a": 1}', '["a", 1]', '["a", ""]', '["a", "a"]', '["<pad>"]', 'null', b'\xff\xfe', '['*100_000])
def test_broken_files(tmp_path, content):
    path = tmp_path/'vocab.json'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match='vocab.json') as error: Vocab.load(path)
    assert '\n' not in str(error.value)


def test_files_that_are_not_there_or_cannot_be(tmp_path):
    with pytest.raises(UserError, match='no such file'): Vocab.load(tmp_path/'none.json')
    with pytest.raises(UserError): Vocab.load(tmp_path)
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError): Vocab(['a']).save(tmp_path/'file'/'vocab.json')
    Vocab(['a']).save(tmp_path/'vocab.json')
    assert json.loads((tmp_path/'vocab.json').read_text()) == ['a'] and sorted(p.name for p in tmp_path.iterdir()) == ['file', 'vocab.json']


def test_bad_ids_and_bad_calls():
    vocab = Vocab(['a'])
    for ids in ([5], [-1], [10**9]):
        with pytest.raises(UserError, match='has only 5 words'): vocab.decode(ids)
    assert vocab.decode([]) == vocab.decode([PAD, BOS, UNK]) == ''
    with pytest.raises(UserError, match='list of captions'): Vocab.build('a dog')
    assert len(Vocab.build([])) == 4
