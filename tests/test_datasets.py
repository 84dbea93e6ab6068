"""Broken caption files: one clear line or a count, never a silent mix-up. And the real Flickr8k, where it is at hand."""
import json, os, zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from multimodal.core import UserError
from multimodal.datasets import group_captions, load_dataset, read_coco, read_flickr8k, read_kaggle, read_karpathy

def photos(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names: Image.new('RGB', (4, 4)).save(folder/name, 'jpeg')

@pytest.fixture
def official(tmp_path):
    photos(tmp_path/'Flicker8k_Dataset', 'a.jpg', 'b.jpg', 'c.jpg')
    (tmp_path/'Flickr8k.token.txt').write_text(''.join(f'{n}.jpg#{k}\tA dog {k} .\n' for n in 'abc' for k in range(5)))
    for split, name in (('train', 'a'), ('dev', 'b'), ('test', 'c')):
        (tmp_path/f'Flickr_8k.{split}Images.txt').write_text(f'{name}.jpg\n')
    return tmp_path

@pytest.fixture
def kaggle(tmp_path):
    photos(tmp_path/'Images', 'a.jpg', 'b.jpg')
    (tmp_path/'captions.txt').write_text('image,caption\na.jpg,"A dog , running"\na.jpg,He said hi\nb.jpg,"say ""hi"""\n')
    return tmp_path

def fails(root, *words):
    with pytest.raises(UserError) as error: load_dataset(root)
    message = str(error.value)
    assert '\n' not in message and all(w in message for w in words), message

def test_missing_folder(tmp_path):
    fails(tmp_path/'nowhere', 'no such folder')
    fails(tmp_path, 'not a data set I know')

def test_only_archives(tmp_path):
    (tmp_path/'Flickr8k_text.zip').write_bytes(b'')
    fails(tmp_path, 'unpack')

@pytest.mark.parametrize('content, words', [
    (b'', ['is empty']),
    (b'\n \n', ['is empty']),
    (b'a.jpg,A dog\nb.jpg,A cat\n', ['not of the form']),
    ('a.jpg#0\tEin Mädchen\n'.encode('latin-1'), ['not UTF-8']),
    ('a.jpg#0\tA dog\n'.encode('utf-16'), ['not UTF-8']),
])
def test_broken_token_file(official, content, words):
    (official/'Flickr8k.token.txt').write_bytes(content)
    fails(official, 'Flickr8k.token.txt', *words)

def test_counts(official):
    with open(official/'Flickr8k.token.txt', 'a') as f:
        f.write('\na line of its own\na.jpg#5\t   \na.jpg#0\tAgain .\ngone.jpg.1#0\tA ghost .\n')
    photos(official/'Flicker8k_Dataset', 'd.jpg')
    with open(official/'Flickr_8k.trainImages.txt', 'a') as f: f.write('d.jpg\nlost.jpg\n\n')
    data = load_dataset(official)
    assert data.skipped == {'broken line': 1, 'blank caption': 1, 'duplicate caption id': 1, 'photo missing': 2,
                            'photo without caption': 1}
    assert data['train'][0].captions[0] == 'A dog 0 .' and len(data['train']) == 1
    assert 'broken line' in data.summary()

def test_byte_order_mark_and_windows_lines(official):
    path = official/'Flickr8k.token.txt'
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes().replace(b'\n', b'\r\n'))
    data = load_dataset(official)
    assert not data.skipped and data['train'][0].captions[0] == 'A dog 0 .'

def test_splits_that_share_a_photo(official):
    (official/'Flickr_8k.testImages.txt').write_text('c.jpg\na.jpg\n')
    fails(official, 'a.jpg', 'train', 'test')

def test_photos_gone(official):
    for p in (official/'Flicker8k_Dataset').iterdir(): p.unlink()
    fails(official, 'none of the captions')

def test_opens_no_photo(official):
    (official/'Flicker8k_Dataset'/'a.jpg').write_bytes(b'no photo at all')
    assert len(load_dataset(official)['train']) == 1

def test_kaggle_commas_and_quotes(kaggle):
    captions = {i.image.name: i.captions for items in load_dataset(kaggle).splits.values() for i in items}
    assert captions == {'a.jpg': ('A dog , running', 'He said hi'), 'b.jpg': ('say "hi"',)}

@pytest.mark.parametrize('content, words', [
    ('a.jpg,A dog\n', ['header']),                                     # no header
    ('image;caption\na.jpg;A dog\n', ['header']),                      # wrong delimiter throughout
    ('image,caption\na.jpg\tA dog\nb.jpg\tA cat\n', ['not of the form']),
    ('', ['is empty']),
])
def test_broken_kaggle_file(kaggle, content, words):
    (kaggle/'captions.txt').write_text(content)
    fails(kaggle, 'captions.txt', *words)

def test_kaggle_with_official_lists(kaggle):
    (kaggle/'Flickr_8k.trainImages.txt').write_text('b.jpg\n')
    (kaggle/'Flickr_8k.testImages.txt').write_text('a.jpg\n')
    assert load_dataset(kaggle)['test'][0].image.name == 'a.jpg'

def test_kaggle_splits_are_by_photo(kaggle):
    photos(kaggle/'Images', *(f'{k}.jpg' for k in range(50)))
    (kaggle/'captions.txt').write_text('image,caption\n' + ''.join(f'{k}.jpg,A dog {j}\n' for j in range(5) for k in range(50)))
    items = [i for split in read_kaggle(kaggle).splits.values() for i in split]
    assert len(items) == 50 and all(len(i.captions) == 5 for i in items)

def test_flickr30k_glued_row(tmp_path):
    photos(tmp_path/'flickr30k_images', '2199200615.jpg')
    (tmp_path/'results.csv').write_text('image_name| comment_number| comment\n2199200615.jpg| 3| A "dog , it is\n'
                                        '2199200615.jpg| 4   A dog runs across the grass .\n')
    items = [i for split in load_dataset(tmp_path).splits.values() for i in split]
    assert items[0].captions == ('A "dog , it is', 'A dog runs across the grass .')

def karpathy(root, split='train', **more):
    image = {'filename': 'a.jpg', 'split': split, 'sentences': [{'raw': 'A dog .'}, {'raw': 'A cat .'}], **more}
    (root/'dataset_flickr8k.json').write_text(json.dumps({'images': [image]}))

@pytest.mark.parametrize('theirs, ours', [('train', 'train'), ('restval', 'train'), ('val', 'dev'), ('test', 'test')])
def test_karpathy_splits(tmp_path, theirs, ours):
    photos(tmp_path/'Flicker8k_Dataset', 'a.jpg')
    karpathy(tmp_path, theirs)
    assert load_dataset(tmp_path)[ours][0].captions == ('A dog .', 'A cat .')

def test_karpathy_broken(tmp_path):
    photos(tmp_path/'Flicker8k_Dataset', 'a.jpg')
    karpathy(tmp_path, 'holiday')
    fails(tmp_path, "Karpathy's splits", 'holiday')
    (tmp_path/'dataset_flickr8k.json').write_text('{"images": [')
    fails(tmp_path, 'not JSON')
    with pytest.raises(UserError, match='no such folder'): read_karpathy(tmp_path/'dataset_flickr8k.json', tmp_path/'nowhere')

def test_coco_broken(tmp_path):
    photos(tmp_path/'train2014', 'a.jpg')
    (tmp_path/'annotations').mkdir()
    note = {'images': [{'id': 1, 'file_name': 'a.jpg'}], 'annotations': [{'id': 7, 'image_id': 2, 'caption': 'A dog .'}]}
    (tmp_path/'annotations/captions_train2014.json').write_text(json.dumps(note))
    fails(tmp_path, 'not a file of COCO captions')
    note['annotations'][0]['image_id'] = 1
    (tmp_path/'annotations/captions_train2014.json').write_text(json.dumps(note))
    assert read_coco(tmp_path)['train'][0].captions == ('A dog .',)

ROWS = st.lists(st.tuples(st.sampled_from(['a.jpg', 'b.jpg']), st.integers(0, 9), st.text(max_size=20)), max_size=20)

@settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS)
def test_every_row_is_used_or_counted(rows):
    from collections import Counter
    skipped = Counter()
    captions = group_captions(rows, skipped)
    assert sum(map(len, captions.values())) + sum(skipped.values()) == len(rows)

@pytest.fixture(scope='session')
def flickr8k(tmp_path_factory):
    given = os.environ.get('MULTIMODAL_FLICKR8K')
    if not given: pytest.skip('MULTIMODAL_FLICKR8K is not set')
    given = Path(given)
    if not (given/'Flickr8k_text.zip').exists(): return given
    root = tmp_path_factory.mktemp('flickr8k')
    with zipfile.ZipFile(given/'Flickr8k_text.zip') as archive: archive.extractall(root)
    with zipfile.ZipFile(given/'Flickr8k_Dataset.zip') as archive:      # names are enough: reading opens no photo
        for name in archive.namelist():
            path = root/name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not name.endswith('/'): path.touch()
    return root

def test_real_flickr8k(flickr8k):
    data = read_flickr8k(flickr8k)
    assert {split: len(items) for split, items in data.splits.items()} == {'train': 6000, 'dev': 1000, 'test': 1000}
    assert sum(len(i.captions) for items in data.splits.values() for i in items) == 40_000
    assert data.skipped == {'photo missing': 92}
    assert data['train'][0].image.suffix == '.jpg'
