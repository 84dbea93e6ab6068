"""Caption files and data sets, whole and broken: one clear line or a count, no silent loss; and the real Flickr8k."""
import csv
import json
import os
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from multimodal.captionfiles import (coco_rows, find_file, flickr30k_row, kaggle_row, karpathy_rows, official_row,
                                     photos_below, read_lines, read_rows)
from multimodal.core import UserError, load_image
from multimodal.datasets import (CaptionData, gather_captions, load_dataset, read_coco, read_flickr8k, read_flickr30k,
                                 read_kaggle, read_karpathy, split_by_name)

SAME_FOLDER = settings(max_examples=80, deadline=None, database=None,
                       suppress_health_check=[HealthCheck.function_scoped_fixture])


def photos(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names: Image.new('RGB', (4, 4)).save(folder/name, 'jpeg')


def captions(data): return {item.image.name: item.captions for items in data.splits.values() for item in items}


def sizes(data): return {split: len(items) for split, items in data.splits.items()}


def fails(root, *words, read=load_dataset):
    with pytest.raises(UserError) as error: read(root)
    message = str(error.value)
    assert '\n' not in message and all(word in message for word in words), message


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
    (tmp_path/'captions.txt').write_text('image,caption\na.jpg,"A dog , running"\na.jpg,He said hi\n'
                                         'b.jpg,"say ""hi"""\n')
    return tmp_path


@pytest.fixture
def flickr30k(tmp_path):
    photos(tmp_path/'flickr30k_images'/'flickr30k_images', '2199200615.jpg', 'x.jpg')
    (tmp_path/'flickr30k_images'/'results.csv').write_text(
        'image_name| comment_number| comment\n2199200615.jpg| 3| A "dog , it | is\n'
        '2199200615.jpg| 4   A dog runs across the grass .\nx.jpg| 0| Two girls .\n')
    return tmp_path


@pytest.fixture
def karpathy(tmp_path):
    photos(tmp_path/'Images', 'a.jpg', 'b.jpg')
    images = [{'filename': name, 'split': split, 'sentences': [{'raw': 'A dog .', 'sentid': i}, {'raw': 'A cat .'}]}
              for i, (name, split) in enumerate((('a.jpg', 'train'), ('b.jpg', 'test')))]
    (tmp_path/'dataset_flickr8k.json').write_text(json.dumps({'images': images, 'dataset': 'flickr8k'}))
    return tmp_path


@pytest.fixture
def coco(tmp_path):
    (tmp_path/'annotations').mkdir()
    for i, (split, name) in enumerate((('train2014', 'a.jpg'), ('val2014', 'b.jpg'))):
        photos(tmp_path/split, name)
        content = {'images': [{'id': i, 'file_name': name}],
                   'annotations': [{'id': 5*i + k, 'image_id': i, 'caption': f'A dog {k}.'} for k in range(5)]}
        (tmp_path/'annotations'/f'captions_{split}.json').write_text(json.dumps(content))
    return tmp_path


def change(path, edit):
    "Edit what a JSON file holds"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# --- every layout, whole

def test_official(official):
    data = load_dataset(official)
    assert sizes(data) == {'train': 1, 'dev': 1, 'test': 1} and not data.skipped and not data.note
    assert data['train'][0].image == official/'Flicker8k_Dataset'/'a.jpg'
    assert data['train'][0].captions == tuple(f'A dog {k} .' for k in range(5))


@pytest.mark.parametrize('folder', ['Flicker8k_Dataset', 'Flickr8k_Dataset/Flicker8k_Dataset', 'Images', '.'])
def test_official_archives_unpacked_in_two_folders(official, folder):
    text, images = official/'set'/'Flickr8k_text', official/'set'/folder
    text.mkdir(parents=True); images.mkdir(parents=True, exist_ok=True)
    for path in official.glob('*.txt'): path.rename(text/path.name)
    for path in (official/'Flicker8k_Dataset').iterdir(): path.rename(images/path.name)
    assert sizes(load_dataset(official/'set')) == {'train': 1, 'dev': 1, 'test': 1}


def test_any_split_list_makes_a_split(official):
    (official/'Flickr_8k.testImages.txt').rename(official/'Flickr_8k.heldoutImages.txt')
    assert sizes(load_dataset(official)) == {'train': 1, 'dev': 1, 'heldout': 1}


def test_kaggle(kaggle):
    data = load_dataset(kaggle)
    assert captions(data) == {'a.jpg': ('A dog , running', 'He said hi'), 'b.jpg': ('say "hi"',)}
    assert not data.skipped and 'hash' in data.summary()


def test_kaggle_with_numbers_between(kaggle):
    (kaggle/'captions.txt').write_text('image_name,comment_number,comment\n'
                                       'a.jpg,0,"Dogs , two"\na.jpg,1,Cats\na.jpg,1,Mice\n')
    data = read_kaggle(kaggle)
    assert captions(data) == {'a.jpg': ('Dogs , two', 'Cats')}
    assert data.skipped == {'duplicate caption id': 1, 'no caption': 1}


def test_kaggle_with_official_lists(kaggle):
    (kaggle/'Flickr_8k.trainImages.txt').write_text('b.jpg\n')
    (kaggle/'Flickr_8k.testImages.txt').write_text('a.jpg\n')
    data = load_dataset(kaggle)
    assert data['test'][0].image.name == 'a.jpg' and not data.note


def test_flickr30k_and_its_broken_row(flickr30k):
    data = load_dataset(flickr30k)
    assert captions(data)['2199200615.jpg'] == ('A "dog , it | is', 'A dog runs across the grass .')
    assert not data.skipped


def test_flickr30k_of_its_authors(tmp_path):
    photos(tmp_path/'flickr30k-images', 'a.jpg')
    (tmp_path/'results_20130124.token').write_text('a.jpg#0\tA dog .\n')
    assert captions(load_dataset(tmp_path)) == {'a.jpg': ('A dog .',)}


@pytest.mark.parametrize('theirs, ours', [('train', 'train'), ('restval', 'train'), ('val', 'dev'), ('test', 'test')])
def test_karpathy_splits(karpathy, theirs, ours):
    change(karpathy/'dataset_flickr8k.json', lambda content: content['images'][0].update(split=theirs))
    for data in (load_dataset(karpathy), load_dataset(karpathy/'dataset_flickr8k.json'),
                 read_karpathy(karpathy/'dataset_flickr8k.json', karpathy/'Images')):
        assert 'a.jpg' in [item.image.name for item in data[ours]]
        assert captions(data) == dict.fromkeys(('a.jpg', 'b.jpg'), ('A dog .', 'A cat .'))


def test_karpathy_wins_over_kaggle(karpathy):
    (karpathy/'captions.txt').write_text('image,caption\na.jpg,From Kaggle\n')
    assert captions(load_dataset(karpathy))['a.jpg'] == ('A dog .', 'A cat .')


@pytest.mark.parametrize('place', ['.', 'images'])
def test_coco(coco, place):
    if place != '.': (coco/place).mkdir()
    for split in ('train2014', 'val2014'): (coco/split).rename(coco/place/split)
    photos(coco/place/'test2014', 'c.jpg')                        # their captions are a secret, so nothing is missing
    data = load_dataset(coco)
    assert sizes(data) == {'train': 1, 'dev': 1} and not data.skipped
    assert data['dev'][0].captions == tuple(f'A dog {k}.' for k in range(5))


def test_coco_of_one_split(coco):
    for path in (coco/'train2014').iterdir(): path.unlink()
    (coco/'train2014').rmdir()
    data = load_dataset(coco)
    assert sizes(data) == {'dev': 1} and data.skipped == {'photo missing': 1}
    with pytest.raises(UserError, match="no split 'train', only dev"): data['train']


# --- what is missing or double is counted

def test_all_counts(official):
    with open(official/'Flickr8k.token.txt', 'a') as f:
        f.write('\n  \na line of its own\na.jpg#5\t   \na.jpg#0\tAgain .\n'
                '2258277193_586949ec62.jpg.1#0\tA ghost .\nd.jpg#0\tD .\n')
    photos(official/'Flicker8k_Dataset', 'd.jpg', 'e.jpg')
    with open(official/'Flickr_8k.trainImages.txt', 'a') as f: f.write('e.jpg\nlost.jpg\n\n')
    data = load_dataset(official)
    assert data.skipped == {'blank line': 2, 'broken line': 1, 'blank caption': 1, 'duplicate caption id': 1,
                            'photo missing': 2, 'in no split': 1, 'no caption': 1}
    assert data['train'][0].captions[0] == 'A dog 0 .' and len(data['train']) == 1
    for reason, n in data.skipped.items(): assert f'left out {n}: {reason}' in data.summary()


def test_photos_without_a_caption_are_counted_in_every_layout(kaggle):
    photos(kaggle/'Images', 'z.jpg')
    assert load_dataset(kaggle).skipped == {'no caption': 1}


def test_what_is_no_photo_is_not_counted(official):
    (official/'Flicker8k_Dataset'/'.DS_Store').write_text('')
    (official/'Flicker8k_Dataset'/'._a.jpg').write_text('')
    (official/'Flicker8k_Dataset'/'Thumbs.db').write_text('')
    photos(official/'__MACOSX'/'Flicker8k_Dataset', 'z.jpg')
    assert not load_dataset(official).skipped


@pytest.mark.parametrize('record', [
    None, 1, [], {}, {'filename': 'z.jpg'}, {'filename': 1, 'split': 'train', 'sentences': []},
    {'filename': 'z.jpg', 'split': None, 'sentences': []},
    {'filename': 'z.jpg', 'split': 'train', 'sentences': [{'raw': None}]},
    {'filename': 'z.jpg', 'split': 'train', 'sentences': ['A dog .']}])
def test_broken_records_of_karpathy_are_counted(karpathy, record):
    change(karpathy/'dataset_flickr8k.json', lambda content: content['images'].append(record))
    data = load_dataset(karpathy)
    assert data.skipped == {'broken record': 1} and len(captions(data)) == 2


def test_duplicates_of_karpathy_are_counted(karpathy):
    change(karpathy/'dataset_flickr8k.json', lambda content: content['images'].append(content['images'][0]))
    assert load_dataset(karpathy).skipped == {'duplicate caption id': 1}


@pytest.mark.parametrize('note', [None, 'x', {}, {'image_id': 99, 'id': 1, 'caption': 'Of what ?'},
                                  {'image_id': 0, 'id': 1, 'caption': 7},
                                  {'image_id': [], 'id': 1, 'caption': 'A dog'}])
def test_broken_records_of_coco_are_counted(coco, note):
    change(coco/'annotations'/'captions_train2014.json', lambda content: content['annotations'].append(note))
    data = load_dataset(coco)
    assert data.skipped == {'broken record': 1} and len(data['train'][0].captions) == 5


def test_duplicates_of_coco_are_counted(coco):
    change(coco/'annotations'/'captions_train2014.json',
           lambda content: content['annotations'].append(content['annotations'][0]))
    assert load_dataset(coco).skipped == {'duplicate caption id': 1}


@pytest.mark.parametrize('within', ['b/Images', 'more/flickr', 'annotations'])
def test_a_folder_itself_comes_before_folders_within(kaggle, within):
    "Another data set in a folder below does not hide the one that was asked for, and is no second one either."
    other = kaggle/within
    photos(other/'Flicker8k_Dataset', 'z.jpg')
    (other/'Flickr8k.token.txt').write_text('z.jpg#0\tA boat .\n')
    assert set(captions(load_dataset(kaggle))) == {'a.jpg', 'b.jpg'}


def test_one_of_cocos_files_stands_for_all(coco):
    assert captions(load_dataset(coco/'annotations'/'captions_train2014.json')) == captions(load_dataset(coco))


def test_what_was_left_out_is_counted_with_an_example(official):
    (official/'Flicker8k_Dataset'/'a.jpg').unlink()
    photos(official/'Flicker8k_Dataset', 'new.jpg')
    data = load_dataset(official)
    assert data.skipped == {'photo missing': 1, 'no caption': 1}
    assert 'left out 1: photo missing, such as a.jpg' in data.summary() and 'no caption, such as new.jpg' in data.summary()


# --- one clear line

def test_missing_folder(tmp_path):
    fails(tmp_path/'nowhere', 'nowhere', 'no such folder')
    fails(tmp_path, 'no data set known', 'Flickr8k', 'Kaggle', 'Flickr30k', 'Karpathy', 'COCO')
    (tmp_path/'file').write_text('')
    fails(tmp_path/'file', 'is not a folder')
    for read in (read_flickr8k, read_kaggle, read_flickr30k, read_coco):
        fails(tmp_path, str(tmp_path), 'no ', read=read)


def test_missing_folder_of_photos(karpathy):
    with pytest.raises(UserError, match='no such folder of photos'):
        read_karpathy(karpathy/'dataset_flickr8k.json', karpathy/'nowhere')


def test_only_archives(tmp_path):
    for name in ('Flickr8k_Dataset.zip', 'Flickr8k_text.zip'): (tmp_path/name).write_bytes(b'')
    fails(tmp_path, 'unpack the archives first', "python -m zipfile -e '", 'Flickr8k_text.zip')
    fails(tmp_path, 'unpack the archives first', read=read_flickr8k)


def test_the_advice_about_archives_helps(official):
    "The command in the message, run as it stands, makes the data set readable."
    import re, subprocess, sys
    with zipfile.ZipFile(official/'photos.zip', 'w') as archive:
        for path in sorted((official/'Flicker8k_Dataset').iterdir()):
            archive.write(path, f'Flicker8k_Dataset/{path.name}')
            path.unlink()
    with pytest.raises(UserError) as error: load_dataset(official)
    command = re.search(r'first: python (.*)', str(error.value))[1]
    subprocess.run(f'"{sys.executable}" {command}', shell=True, check=True)
    assert sizes(load_dataset(official)) == {'train': 1, 'dev': 1, 'test': 1}


@pytest.mark.parametrize('content, words', [
    (b'', ['is empty']),
    (b'\n \n', ['is empty']),
    (b'a.jpg,A dog\nb.jpg,A cat\n', ['no line there reads', 'TAB', 'b.jpg,A cat']),
    (b'a.jpg#0  A dog\n', ['no line there reads', 'TAB']),
    ('a.jpg#0\tA dog\nb.jpg#0\tEin Mädchen\n'.encode('latin-1'), ['line 2', 'UTF-8']),
    ('a.jpg#0\tA dog\n'.encode('utf-16'), ['line 1', 'UTF-8']),
    ('a.jpg#0\tA dog\n'.encode('utf-16-be'), ['line 1', 'UTF-8']),
    (b'\x89PNG\r\n\x1a\n', ['UTF-8']),
])
def test_broken_token_file(official, content, words):
    (official/'Flickr8k.token.txt').write_bytes(content)
    fails(official, 'Flickr8k.token.txt', *words)


@pytest.mark.parametrize('content, words', [
    ('', ['is empty']),
    ('image,caption\n', ['no line there reads']),
    ('image;caption\na.jpg;A dog\n', ['no line there reads', 'a.jpg;A dog']),
    ('image,caption\na.jpg\tA dog\nb.jpg\tA cat\n', ['no line there reads']),
])
def test_broken_kaggle_file(kaggle, content, words):
    (kaggle/'captions.txt').write_text(content)
    fails(kaggle, 'captions.txt', *words)


def test_broken_flickr30k_file(flickr30k):
    (flickr30k/'flickr30k_images'/'results.csv').write_text('image_name,comment_number,comment\nx.jpg,0,A dog\n')
    fails(flickr30k, 'results.csv', 'no line there reads')


def test_kaggle_without_a_header_loses_nothing(kaggle):
    text = (kaggle/'captions.txt').read_text()
    whole = load_dataset(kaggle)
    (kaggle/'captions.txt').write_text(text.split('\n', 1)[1])
    assert load_dataset(kaggle) == whole


@pytest.mark.parametrize('content, words', [
    ('{"images": [', ['not JSON', 'line 1']), ('[]', ["no list 'images'"]), ('', ['not JSON']),
    ('{"images": {}}', ["no list 'images'"]), ('{"images": [{}]}', ["no list 'images'"])])
def test_broken_karpathy_file(karpathy, content, words):
    (karpathy/'dataset_flickr8k.json').write_text(content)
    fails(karpathy, 'dataset_flickr8k.json', *words)


@pytest.mark.parametrize('content, words', [
    ('{', ['not JSON']), ('[]', ["no list 'images'"]), ('{"images": []}', ['annotations'])])
def test_broken_coco_file(coco, content, words):
    (coco/'annotations'/'captions_train2014.json').write_text(content)
    fails(coco, 'captions_train2014.json', *words)


def test_two_years_of_coco_would_share_photos(coco):
    (coco/'annotations'/'captions_val2017.json').write_text('{}')
    fails(coco, '2014 and 2017')


def test_splits_that_share_a_photo(official):
    (official/'Flickr_8k.testImages.txt').write_text('c.jpg\na.jpg\n')
    fails(official, 'a.jpg', 'train', 'test', 'one split only')


def test_splits_of_json_that_share_a_photo(karpathy, coco):
    change(karpathy/'dataset_flickr8k.json',
           lambda content: content['images'].append({**content['images'][0], 'split': 'val'}))
    fails(karpathy/'dataset_flickr8k.json', 'a.jpg', 'train', 'dev')
    change(coco/'annotations'/'captions_val2014.json', lambda content: content['images'][0].update(file_name='a.jpg'))
    fails(coco, 'a.jpg', 'train', 'dev', read=read_coco)


def test_photos_gone(official):
    for path in (official/'Flicker8k_Dataset').iterdir(): path.unlink()
    fails(official, 'no photo with a caption', 'photo missing 3')


def test_two_data_sets_in_one_folder(tmp_path):
    for name in 'ab':
        photos(tmp_path/name/'Images', 'a.jpg')
        (tmp_path/name/'captions.txt').write_text('image,caption\na.jpg,A dog\n')
    fails(tmp_path, 'a/captions.txt', 'b/captions.txt', 'which of the two')


# --- photos are opened when they are wanted

def test_reading_opens_no_photo_and_opening_names_a_bad_one(official):
    folder = official/'Flicker8k_Dataset'
    (folder/'a.jpg').write_bytes(b'no photo at all')
    (folder/'b.jpg').write_bytes((folder/'b.jpg').read_bytes()[:200])
    (folder/'c.jpg').unlink()
    (folder/'c.jpg').symlink_to(official/'nowhere.jpg')
    data = load_dataset(official)
    assert sizes(data) == {'train': 1, 'dev': 1, 'test': 1}
    for split in data.splits:
        with pytest.raises(UserError, match=data[split][0].image.name): load_image(data[split][0].image)


def test_links_that_lead_back_are_walked_once(official):
    (official/'Flicker8k_Dataset'/'back').symlink_to(official)
    (official/'again').symlink_to(official/'Flicker8k_Dataset')
    assert sorted(photos_below(official)) == ['a.jpg', 'b.jpg', 'c.jpg']


# --- lines

def test_byte_order_mark_and_windows_lines(official):
    path = official/'Flickr8k.token.txt'
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes().replace(b'\n', b'\r\n'))
    data = load_dataset(official)
    assert not data.skipped and data['train'][0].captions[0] == 'A dog 0 .'


def test_a_stray_quotation_mark_swallows_nothing(kaggle):
    photos(kaggle/'Images', *(f'{k}.jpg' for k in range(20)))
    lines = ['image,caption', '0.jpg,"Stop ! he says'] + [f'{k}.jpg,A dog {k}' for k in range(1, 20)]
    (kaggle/'captions.txt').write_text('\n'.join(lines))
    assert len(captions(load_dataset(kaggle))) == 20


LINE = st.text(st.characters(exclude_categories=['Cs', 'Cc']), min_size=1, max_size=40)
NAME = st.from_regex(r'[a-z0-9_#]{1,12}\.(jpg|jpeg|PNG)', fullmatch=True)


@settings(max_examples=200, deadline=None, database=None)
@given(NAME, st.integers(0, 9), LINE)
def test_every_kind_of_line_gives_its_caption_back(name, number, caption):
    import io
    assert official_row(f'{name}#{number}\t{caption}') == (name, str(number), caption)
    assert flickr30k_row(f'{name}| {number}| {caption}') == (name, str(number), caption.strip())
    out = io.StringIO()
    csv.writer(out).writerow([name, caption])
    assert kaggle_row(out.getvalue().removesuffix('\r\n')) == (name, None, caption)
    if '"' not in caption: assert kaggle_row(f'{name},{caption}') == (name, None, caption)     # written without rules
    assert kaggle_row(f'{name},"{caption.replace(chr(34), chr(39))}')[2][0] == '"'              # one that never closes


@SAME_FOLDER
@given(st.lists(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0\r\n')), max_size=8))
def test_lines_round_trip(tmp_path, lines):
    (tmp_path/'a.txt').write_bytes(b'\xef\xbb\xbf' + '\n'.join(lines + ['']).encode())
    assert read_lines(tmp_path/'a.txt') == lines


@SAME_FOLDER
@given(st.binary(max_size=200) | st.lists(st.sampled_from(
    [b'a.jpg#0\tA dog', b'a.jpg,"A', b'"', b'\n', b',', b'| 1', b'\xff'])).map(b''.join))
def test_any_bytes_give_rows_or_a_user_error(tmp_path, content):
    path = tmp_path/'a.txt'
    path.write_bytes(content)
    for parse in (official_row, kaggle_row, flickr30k_row):
        skipped = Counter()
        try: rows = read_rows(path, parse, 'form', skipped)
        except UserError as error: assert str(path) in str(error) and '\n' not in str(error)
        else: assert 0 <= len(read_lines(path)) - len(rows) - sum(skipped.values()) <= 1       # 1: a header


KEYS = st.sampled_from(['id', 'image_id', 'file_name', 'caption', 'filename', 'split', 'sentences', 'raw', 'sentid'])
JSON = st.recursive(st.none() | st.integers() | st.text(max_size=3),
                    lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=4))


@SAME_FOLDER
@given(st.dictionaries(st.sampled_from(['images', 'annotations']), JSON))
def test_any_json_gives_rows_or_a_user_error(tmp_path, content):
    path = tmp_path/'a.json'
    path.write_text(json.dumps(content))
    for read in (karpathy_rows, coco_rows):
        try: read(path, Counter())
        except UserError as error: assert str(path) in str(error)


NUMBERS = st.none() | st.integers(0, 9)
ROWS = st.lists(st.tuples(st.sampled_from(['a.jpg', 'b.jpg']), NUMBERS, st.text(max_size=20)), max_size=20)


@settings(max_examples=100, deadline=None, database=None)
@given(ROWS)
def test_every_row_is_used_or_counted(rows):
    skipped = Counter()
    kept = gather_captions(rows, skipped)
    assert sum(map(len, kept.values())) + sum(skipped.values()) == len(rows)
    assert all(text.strip() == text != '' for texts in kept.values() for text in texts)


# --- splits

def test_splits_are_by_photo(kaggle):
    photos(kaggle/'Images', *(f'{k}.jpg' for k in range(50)))
    lines = [f'{k}.jpg,A dog {j}\n' for j in range(5) for k in range(50)]
    (kaggle/'captions.txt').write_text('image,caption\n' + ''.join(lines))
    items = [item for split in read_kaggle(kaggle).splits.values() for item in split]
    assert len(items) == len({item.image for item in items}) == 50 and all(len(item.captions) == 5 for item in items)


def test_split_by_name_is_80_10_10_for_ever():
    counts = Counter(split_by_name(f'{k}.jpg') for k in range(10_000))
    assert abs(counts['train'] - 8000) < 150 and abs(counts['dev'] - 1000) < 110 and abs(counts['test'] - 1000) < 110
    assert [split_by_name(f'{k}.jpg') for k in (0, 1, 9)] == ['train', 'test', 'dev']
    assert split_by_name('é\ud800.jpg') in counts                          # a name that is not quite Unicode


def test_a_caption_data_says_what_it_lacks():
    with pytest.raises(UserError, match="has no split 'train', only none at all"): CaptionData('empty', {}, {})['train']


def test_find_file_prefers_the_folder_itself(tmp_path):
    (tmp_path/'deep').mkdir()
    for path in (tmp_path/'captions.txt', tmp_path/'deep'/'captions.txt'): path.write_text('')
    assert find_file(tmp_path, 'captions.txt') == tmp_path/'captions.txt'


# --- the real one

@pytest.fixture(scope='session')
def flickr8k(tmp_path_factory):
    given_folder = os.environ.get('MULTIMODAL_FLICKR8K')
    if not given_folder: pytest.skip('MULTIMODAL_FLICKR8K is not set: a folder with Flickr8k, packed or unpacked')
    given_folder = Path(given_folder)
    if not (given_folder/'Flickr8k_text.zip').exists(): return given_folder
    root = tmp_path_factory.mktemp('flickr8k')
    with zipfile.ZipFile(given_folder/'Flickr8k_text.zip') as archive: archive.extractall(root)
    with zipfile.ZipFile(given_folder/'Flickr8k_Dataset.zip') as archive:
        names = [name for name in archive.namelist() if not name.endswith('/')]
        archive.extractall(root, names[:20])
        for name in names[20:]:                                # reading opens no photo, so names are enough
            (root/name).parent.mkdir(parents=True, exist_ok=True)
            (root/name).touch()
    return root


def test_real_flickr8k(flickr8k):
    data = load_dataset(flickr8k)
    assert sizes(data) == {'train': 6000, 'dev': 1000, 'test': 1000}
    assert sum(map(len, captions(data).values())) == 40_000 and {len(texts) for texts in captions(data).values()} == {5}
    assert data.skipped == {'photo missing': 92}
    item = next(item for item in data['train'] if item.image.stat().st_size)
    assert min(load_image(item.image).size) > 100


def test_real_names_without_a_photo_stand_in_no_split(flickr8k):
    names = {official_row(line)[0] for line in read_lines(find_file(flickr8k, 'Flickr8k.token.txt'))}
    missing = names - photos_below(flickr8k).keys()
    assert len(names) == 8092 and len(missing) == 92 and '2258277193_586949ec62.jpg.1' in missing


def test_real_archives_say_that_they_are_packed():
    folder = os.environ.get('MULTIMODAL_FLICKR8K')
    if not folder or not (Path(folder)/'Flickr8k_text.zip').exists(): pytest.skip('MULTIMODAL_FLICKR8K has no archives')
    if find_file(Path(folder), 'Flickr8k.token.txt'): pytest.skip('the archives are unpacked as well')
    fails(folder, 'unpack the archives first', 'Flickr8k_Dataset.zip', 'Flickr8k_text.zip')
