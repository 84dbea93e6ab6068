"""What testers broke and what was mended: spoilt indexes, sheets and folders that cannot be written, limits, downloads that leave nothing."""
import errno
import hashlib
import os
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from multimodal.archives import check_place
from multimodal.core import UserError
from multimodal.download import fetch_flickr8k
from multimodal.encoder import read_weights
from multimodal.generate import GenerateConfig
from multimodal.recipe import PHOTOS as RECIPE, changed, run_config


def files(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*'))


# The search index

@pytest.fixture
def index(tmp_path):
    from multimodal.photoindex import PhotoIndex
    index = PhotoIndex(tmp_path, tmp_path/'kept'/'i.safetensors', 'f'*64, [['a.jpg', 1, 2], ['b.jpg', 3, 4]], torch.ones(2, 8).half(),
                       {'c.jpg': [5, 6, 'why']})
    index.save()
    return index


def test_an_index_of_which_any_one_byte_is_another_is_not_believed(index):
    "Each byte in turn, of header and vectors"
    from multimodal.photoindex import read_index
    whole = index.file.read_bytes()
    about, vectors = read_index(index.file)
    assert (about['stamps'], about['skipped']) == (index.stamps, index.skipped) and torch.equal(vectors, index.vectors)
    for i in range(len(whole)):
        index.file.write_bytes(whole[:i] + bytes([whole[i] ^ 64]) + whole[i + 1:])
        with pytest.raises(ValueError): read_index(index.file)


def test_an_index_without_a_sum_is_not_believed(index, monkeypatch):
    from multimodal import photoindex
    monkeypatch.setattr(photoindex, 'sum_of', lambda about, vectors: None)
    index.save()
    monkeypatch.undo()
    with pytest.raises(ValueError): photoindex.read_index(index.file)


@pytest.mark.parametrize('error', [SafetensorError('I/O error: No space left on device (os error 28)'), OSError(errno.EROFS, 'Read-only file system')])
def test_an_index_that_cannot_be_written_is_one_line_with_a_way_out(index, monkeypatch, error):
    from multimodal import photoindex
    before, index.vectors = index.file.read_bytes(), torch.zeros(2, 8).half()
    def full(*args, **kwargs): raise error
    monkeypatch.setattr(photoindex, 'save_file', full)
    with pytest.raises(UserError, match='i.safetensors: cannot be written.*set MULTIMODAL_HOME to a folder that can be written') as e: index.save()
    assert '\n' not in str(e.value) and index.file.read_bytes() == before and os.listdir(index.file.parent) == ['i.safetensors']


def test_a_photo_in_place_of_a_folder_is_called_a_file(tmp_path):
    from multimodal.photoindex import open_index
    (tmp_path/'a.jpg').write_bytes(b'x')
    with pytest.raises(UserError, match='a.jpg: is a file; name a folder of photos'): open_index(None, tmp_path/'a.jpg', tmp_path/'i')


# Where files will be written

@pytest.mark.parametrize('name,words', [('s', 'should end in'), ('s.xyz', 'should end in'), ('folder.png', 'is a folder'), ('file/s.png', 'file: is a file')])
def test_a_sheet_that_cannot_be_written_is_refused_before_a_photo_is_looked_at(tmp_path, name, words):
    from multimodal.photoindex import check_sheet, contact_sheet
    (tmp_path/'folder.png').mkdir()
    (tmp_path/'file').write_text('')
    before = files(tmp_path)
    for refuse in (lambda: check_sheet(tmp_path/name), lambda: contact_sheet([{'image': 'gone.jpg', 'score': 1.}], tmp_path/name)):
        with pytest.raises(UserError, match=words): refuse()
    assert files(tmp_path) == before


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path, monkeypatch):
    (tmp_path/'old.png').write_text('old')
    for name in ('old.png', 'new.png', 'a/b/c.png'): check_place(tmp_path/name)
    assert files(tmp_path) == ['old.png'] and (tmp_path/'old.png').read_text() == 'old'
    @contextmanager
    def full(dir, prefix):
        def write(data): raise OSError(errno.ENOSPC, 'No space left on device')
        yield SimpleNamespace(write=write)
    monkeypatch.setattr('tempfile.NamedTemporaryFile', full)
    with pytest.raises(UserError, match='c.png: cannot be written .No space left'): check_place(tmp_path/'a/b/c.png')
    assert files(tmp_path) == ['old.png']


@pytest.mark.parametrize('folder', ['file', 'file/deeper'])
def test_explaining_into_a_file_is_refused_before_a_photo_is_read(tmp_path, monkeypatch, folder):
    from multimodal import explain
    for name in 'file', 'a.jpg': (tmp_path/name).write_text('no photo')
    asked = []
    monkeypatch.setattr(explain, 'read_photos', lambda *args: asked.append(args) or [])
    monkeypatch.setattr(explain, 'check_looks', lambda model: None)
    with pytest.raises(UserError, match='file: is a file, where a folder was wanted'):
        explain.explain_photos(SimpleNamespace(model=None), [tmp_path/'a.jpg'], tmp_path/folder)
    assert not asked


# Limits

@pytest.mark.parametrize('name,value', [('beam', 10**6), ('beam', 10**20), ('beam', 0), ('draws', 1001), ('length_penalty', 1e200), ('length_penalty', -11.)])
def test_how_to_write_has_limits_and_says_them(name, value):
    with pytest.raises(UserError, match='must be from') as e: GenerateConfig(**{name: value})
    assert str(e.value).startswith(f'generate: {name} is {value!r}, must be from ')
    GenerateConfig(beam=1000, draws=1000, length_penalty=-10.)


def test_a_picture_takes_at_most_a_thousand_steps():
    from multimodal.painter import PaintConfig
    with pytest.raises(UserError, match='steps must be 1 to 1,000, not 1000000000'): PaintConfig(steps=10**9)
    PaintConfig(steps=1000)


@pytest.mark.parametrize('stage,below', [(4, 9), (4, 4), (1, 1)])
def test_no_more_stages_are_told_than_there_are_below(stage, below):
    with pytest.raises(UserError, match=f'below must be less than stage, {stage}, not {below}'): changed(RECIPE, dict(stage=stage, below=below))
    old = replace(RECIPE, stage=stage, below=below)                         # as in a run from before: it stays what it was
    assert run_config(asdict(old)) == old and old.encoder().stages == range(1, stage + 1)


# Weights

def test_what_is_wrong_with_a_weights_file_is_said_and_nothing_of_networks(tmp_path):
    (tmp_path/'passwd').write_text('root:x:0:0:root:/root:/bin/bash\n'*20)
    for name, why in ('imagnet', 'no such file'), ('', 'is a folder'), ('passwd', 'holds no ResNet18 weights of torchvision'):
        with pytest.raises(UserError, match=why) as e: read_weights(str(tmp_path/name))
        assert 'network' not in str(e.value) and 'index out of range' not in str(e.value) and "'imagenet'" in str(e.value)


# Downloads

@pytest.fixture(autouse=True)
def hurry(monkeypatch): monkeypatch.setattr('multimodal.download.time.sleep', lambda seconds: None)


def mirror(folder, **contents):
    "Two zip archives of files; gives their sums"
    folder.mkdir(exist_ok=True)
    names = {'photos': 'Flickr8k_Dataset.zip', 'text': 'Flickr8k_text.zip'}
    for kind, entries in contents.items():
        with zipfile.ZipFile(folder/names[kind], 'w') as archive:
            for name, text in entries.items(): archive.writestr(name, text)
    return ','.join(hashlib.sha256((folder/n).read_bytes()).hexdigest() for n in names.values())


PHOTOS, TEXT = {'Flicker8k_Dataset/a.jpg': 'a'}, {'Flickr8k.token.txt': 'a.jpg#0\tA dog .\n'}

@pytest.mark.parametrize('photos,text,why', [(PHOTOS, {'x': 'x'}, 'hold no Flickr8k'), (PHOTOS, {'../x': 'x'}, 'points outside')])
def test_archives_that_are_refused_are_not_kept_in_a_hidden_folder(tmp_path, photos, text, why):
    sums = mirror(tmp_path/'m', photos=photos, text=text)
    with pytest.raises(UserError, match=f'{why}.*what was fetched is removed again'):
        fetch_flickr8k(tmp_path/'new'/'f', str(tmp_path/'m'), sums, say=lambda line: None)
    assert files(tmp_path) == ['m', 'm/Flickr8k_Dataset.zip', 'm/Flickr8k_text.zip']


def test_archives_that_the_disk_has_no_room_for_are_kept_and_the_message_says_where(tmp_path, monkeypatch):
    sums = mirror(tmp_path/'m', photos=PHOTOS, text=TEXT)
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(zipfile.ZipFile, 'extractall', full)
    with pytest.raises(UserError, match='No space left.*the archives are kept in .*/new/.f.part'):
        fetch_flickr8k(tmp_path/'new'/'f', str(tmp_path/'m'), sums, say=lambda line: None)
    assert files(tmp_path/'new') == ['.f.part', '.f.part/Flickr8k_Dataset.zip', '.f.part/Flickr8k_text.zip']
    monkeypatch.undo()
    (tmp_path/'m').rename(tmp_path/'away')                                        # what came is enough
    (tmp_path/'m').mkdir()
    fetch_flickr8k(tmp_path/'new'/'f', str(tmp_path/'m'), sums, say=lambda line: None)
    assert os.listdir(tmp_path/'new') == ['f']


def test_one_archive_that_came_is_named_when_the_other_does_not(tmp_path):
    sums = mirror(tmp_path/'m', photos=PHOTOS, text=TEXT)
    (tmp_path/'m'/'Flickr8k_text.zip').unlink()
    with pytest.raises(UserError, match='Flickr8k_text.zip not fetched.*; Flickr8k_Dataset.zip came before and is kept in .*/.f.part'):
        fetch_flickr8k(tmp_path/'f', str(tmp_path/'m'), sums, say=lambda line: None)


@pytest.mark.parametrize('url,sums,words', [('ftp://x', None, 'should begin with'), ('file:///x', 'abc,abc', 'hexadecimal'), ('file:///x', 'abc', 'two with a comma')])
def test_slips_are_found_before_anything_is_said_or_made(tmp_path, url, sums, words):
    said = []
    with pytest.raises(UserError, match=words): fetch_flickr8k(tmp_path/'o'/'f', url, sums, say=said.append)
    assert not said and files(tmp_path) == []


def test_other_sums_are_suggested_after_a_wrong_sum_only_and_no_folder_stays(tmp_path):
    silent = lambda line: None
    with pytest.raises(UserError, match='not fetched') as e: fetch_flickr8k(tmp_path/'o'/'f', 'file:///nowhere', say=silent)
    assert '--checksum' not in str(e.value) and not (tmp_path/'o').exists()
    mirror(tmp_path/'m', photos=PHOTOS, text=TEXT)
    with pytest.raises(UserError, match='should be.*--checksum'): fetch_flickr8k(tmp_path/'o'/'f', str(tmp_path/'m'), say=silent)
    assert not (tmp_path/'o').exists()
