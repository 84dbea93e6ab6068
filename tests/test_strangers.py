"""Files from strangers must not hurt: no code in them runs, no bomb goes off, no caption gets under another photo, and nothing
in them is obeyed by a browser or a terminal. The short forms of tools/fuzz.py, whose full runs are kept in results/."""
import ast
import functools
import importlib.util
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.request
import warnings
import zipfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, ImageCms

from multimodal.archives import unpack
from multimodal.captionfiles import official_row, read_rows
from multimodal.core import UserError, aside, load_image, read_json, show_images
from multimodal.download import SameKind, download
from multimodal.encoder import EncoderConfig, load_trunk, read_weights, resnet_trunk
from multimodal.recipe import run_config
from multimodal.report import Shot, gallery, html_page, line_chart, save_page, scores_table, tiles
from multimodal.saving import config_from, load_captioner, load_weights, save_model
from multimodal.text import Vocab, tokenize
from test_download import CONTENT, HURRY, MD5, Server, files, pack

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location('fuzz', ROOT/'tools'/'fuzz.py')
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)

SAME_FOLDER = settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HOSTILE = 'a\x1b[2J\x9b31m\u202egpj\x07\x08\r\u2028\x7f'                # clears the screen, turns red, writes backwards, rings
UNSEEN = re.compile('[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]')


def refused(do, *words):
    "It raises `UserError` in one line that has these words"
    with pytest.raises(UserError) as error: do()
    assert '\n' not in str(error.value) and all(w in str(error.value) for w in words), str(error.value)
    return str(error.value)


WORDS = Vocab(['a', 'dog', 'runs'])


@functools.cache
def tiny():
    "A captioner and its settings, untrained"
    from multimodal.recipe import RunConfig
    from multimodal.runs import build_captioner
    config = RunConfig(image_size=32, stage=1, weights='none', embedding_dim=16, n_layers=1, n_heads=1)
    torch.manual_seed(0)
    return config, build_captioner(config, len(WORDS)).eval()


@pytest.fixture
def run(tmp_path):
    "A whole run folder of the tiny captioner, as a stranger may send it: without checksums, or all of them would be its own"
    from multimodal.runs import CAPTIONS
    from multimodal.tasks import write_recipe
    config, model = tiny()
    save_model(model, WORDS, tmp_path/'run'/'best')
    write_recipe(CAPTIONS, tmp_path/'run', config, WORDS)
    (tmp_path/'run'/'SHA256SUMS').unlink()
    (tmp_path/'run'/'history.jsonl').touch()
    return tmp_path/'run'


# --- 1. no pickle is loaded

class Evil:
    "Unpickling it writes a file, as it could do anything else"
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.mkdir, (str(self.mark),)


def evil_files(mark):
    "The same pickle in all the wrappings that libraries unwrap"
    evil, found = Evil(mark), {'pickle': pickle.dumps(Evil(mark))}
    torch.save({'conv1.weight': evil}, zipped := io.BytesIO())
    torch.save({'conv1.weight': evil}, old := io.BytesIO(), _use_new_zipfile_serialization=False)
    objects = np.empty(1, object)
    objects[0] = evil
    np.save(array := io.BytesIO(), objects, allow_pickle=True)
    np.savez(arrays := io.BytesIO(), objects)
    return found | {'torch': zipped.getvalue(), 'torch_old': old.getvalue(), 'npy': array.getvalue(), 'npz': arrays.getvalue()}


KINDS = list(evil_files('nowhere'))


@pytest.mark.parametrize('kind', KINDS)
def test_a_file_that_would_run_code_runs_nothing_wherever_it_is_read(tmp_path, monkeypatch, run, kind):
    from multimodal.checkpoint import load_tensors
    from multimodal.photoindex import read_index
    from multimodal.runs import load_run
    from multimodal.shards import decode_array, decode_captions, decode_photo
    mark, raw = tmp_path/'mark', evil_files(tmp_path/'mark')[kind]
    kept = tmp_path/'hub'/'checkpoints'/'resnet18-f37072fd.pth'
    kept.parent.mkdir(parents=True)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    named = [tmp_path/f'evil.{ending}' for ending in ('pth', 'pt', 'safetensors', 'json', 'jpg', 'zip', 'txt', 'npy')]
    for path in [kept, *named]: path.write_bytes(raw)
    for path in named[:3]:
        refused(lambda: read_weights(str(path)), str(path))
        refused(lambda: load_trunk(EncoderConfig(weights=str(path))), str(path))
        refused(lambda: load_weights(tiny()[1], path), str(path))
        refused(lambda: load_tensors(path), str(path))
    refused(lambda: read_weights('imagenet'))                           # the copy that torchvision has kept
    refused(lambda: read_json(named[3]))
    refused(lambda: load_image(named[4]))
    with pytest.raises(ValueError): read_index(named[2])
    files = {'__key__': 'x', 'json': raw, 'plain.npy': raw, 'jpg': raw}
    for decode in (lambda: decode_array(files, 'plain', (1, 1)), lambda: decode_captions(files), lambda: decode_photo(files, 8)): refused(decode)
    try: unpack(named[5], tmp_path/'out')                               # some are zip archives: unpacked, and no more
    except UserError: pass
    for name in ('config.json', 'vocab.json', 'best/config.json', 'best/vocab.json', 'best/model.safetensors'):
        whole = (run/name).read_bytes()
        (run/name).write_bytes(raw)
        refused(lambda: load_run(run))
        (run/name).write_bytes(whole)
    assert load_run(run, device='cpu').vocab == WORDS and not mark.exists()
    if kind == 'npy': np.load(named[7], allow_pickle=True)
    elif kind == 'npz': np.load(named[7], allow_pickle=True)['arr_0']
    elif kind == 'pickle': pickle.loads(raw)
    else: torch.load(named[0], weights_only=False)
    assert mark.exists()                                                # it would have


def test_no_module_can_unpickle_or_run_text():
    "Every call is looked at: what reads pickles is told not to, and what runs text is not there"
    for path in sorted((ROOT/'multimodal').glob('*.py')):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import): assert not {'pickle', 'dill', 'joblib', 'shelve', 'marshal', 'cloudpickle'} & {a.name for a in node.names}, path
            if isinstance(node, ast.ImportFrom) and node.module == 'pickle': assert [a.name for a in node.names] == ['UnpicklingError'], path
            if not isinstance(node, ast.Call): continue
            name, where = ast.unparse(node.func), f'{path.name}:{node.lineno}'
            told = {k.arg: getattr(k.value, 'value', None) for k in node.keywords}
            assert name not in ('eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen'), where
            if name in ('torch.load', 'torch.hub.load_state_dict_from_url') or name.endswith('get_state_dict'):
                assert told.get('weights_only') is True, where
            if name in ('np.load', 'numpy.load', 'np.save', 'np.savez'): assert told.get('allow_pickle') is False, where
            if name.startswith('subprocess.'): assert not told.get('shell'), where
            assert not name.endswith(('.load_state', 'read_pickle', '.hub.load', 'from_pretrained')), where


def test_torn_files_of_weights_are_named(tmp_path):
    "PyTorch's own files, mutated; and whole ones that hold something else"
    path, rng, saved = tmp_path/'w.pth', random.Random(0), []
    for how in ({}, {'_use_new_zipfile_serialization': False}):
        torch.save({'a': torch.zeros(3)}, file := io.BytesIO(), **how)
        saved.append(file.getvalue())
    good = resnet_trunk(1).state_dict()
    odd = [[1], {'a': 1}, {1: torch.zeros(2)}, torch.zeros(3), None, {'conv1.weight': 3}, {**good, 'conv1.weight': good['conv1.weight'].to_sparse()},
           {**good, 'conv1.weight': good['conv1.weight'].to('meta')}]
    torn = Counter()
    for i in range(120):
        path.write_bytes(fuzz.mutated(saved[i % 2], rng, most=3))
        try: torn[type(read_weights(str(path)))] += 1
        except UserError as error: fuzz.one_line(error, path)
    assert sum(torn.values()) < 40
    for content in odd:
        torch.save(content, path)
        refused(lambda: load_trunk(EncoderConfig(weights=str(path), stage=1)), str(path))


# --- 2. archives and downloads

@pytest.mark.parametrize('names', [('a.jpg', 'A.JPG'), (unicodedata.normalize('NFC', 'ü.jpg'), unicodedata.normalize('NFD', 'ü.jpg')),
                                   ('Ü.jpg', 'u\u0308.JPG'), ('x/a', 'X/a'), ('straße', 'STRASSE'), ('a/b', 'a//b'), ('a', './a')])
def test_names_that_are_one_on_some_disk_are_refused(tmp_path, names):
    refused(lambda: unpack(pack(tmp_path/'x.zip', [(n, 'x') for n in names]), tmp_path/'out'), 'comes twice')
    assert files(tmp_path) == ['x.zip']


def with_sizes(path, size):
    "An archive of one deflated entry that says that it holds `size` bytes, in both places"
    raw = bytearray(pack(path, [('a', b'0'*10**6)]).read_bytes())
    for start in (0 + 22, raw.index(b'PK\1\2') + 24): raw[start:start + 4] = struct.pack('<I', size)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize('size', [0, 10, 10**6 - 1])
def test_an_entry_that_says_less_than_it_holds_leaves_nothing(tmp_path, size):
    refused(lambda: unpack(with_sizes(tmp_path/'x.zip', size), tmp_path/'out', max_bytes=10**7), 'not a whole zip archive')
    assert files(tmp_path) == ['x.zip']


def test_an_entry_that_says_more_than_it_holds_counts_for_what_it_says(tmp_path):
    "Its checksum is right, so what comes out is; but the limit is on what was said"
    refused(lambda: unpack(with_sizes(tmp_path/'x.zip', 2**31), tmp_path/'out', max_bytes=2**30), 'unpacks to more')
    assert (unpack(tmp_path/'x.zip', tmp_path/'out', max_bytes=2**32)/'a').read_bytes() == b'0'*10**6


def test_counts_sizes_and_unusual_ways_of_packing_are_refused(tmp_path):
    pack(tmp_path/'many.zip', [(f'{i}', '') for i in range(200)])
    refused(lambda: unpack(tmp_path/'many.zip', tmp_path/'out', max_files=199), '200 files')
    raw = bytearray(pack(tmp_path/'sum.zip', [('a', 'x'), ('b', 'wrong')]).read_bytes())
    raw[14:18] = raw[(at := raw.index(b'PK\1\2') + 16):at + 4] = b'\0\1\2\3'                  # a checksum that is not the entry's
    (tmp_path/'sum.zip').write_bytes(raw)
    refused(lambda: unpack(tmp_path/'sum.zip', tmp_path/'out'), 'not a whole zip archive')
    for way in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path/'odd.zip', 'w', way) as archive: archive.writestr('a', 'x')
        refused(lambda: unpack(tmp_path/'odd.zip', tmp_path/'out'), 'unusual way')
    assert not (tmp_path/'out').exists()


def test_mutated_archives_are_whole_or_refused(tmp_path):
    rng, good, whole = random.Random(0), pack(tmp_path/'x.zip', [('a/b.txt', 'hello '*50), ('c.txt', 'x')]).read_bytes(), 0
    for _ in range(200):
        (tmp_path/'x.zip').write_bytes(fuzz.mutated(good, rng, [b'PK\1\2', b'PK\3\4', b'PK\5\6', b'../', b'\xff\xff', b'\0\0\0\0'], most=3))
        try: unpack(tmp_path/'x.zip', tmp_path/'in'/'out')
        except UserError: assert files(tmp_path) == ['x.zip']
        else: whole += 1
        assert all(f == 'x.zip' or f.startswith('in/out/') for f in files(tmp_path))
        shutil.rmtree(tmp_path/'in', ignore_errors=True)
    assert whole < 100


@pytest.fixture
def lying():
    "A server to which a test tells what to say"
    server = Server()
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def says(server, body, status=200, **headers):
    "Every answer is this one"
    def answer(handler, content, start):
        handler.send_response(status)
        for k, v in headers.items(): handler.send_header(k.replace('_', '-'), v)
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True
        return True
    server.misbehave = answer


@pytest.mark.parametrize('url', ['ftp://127.0.0.1:1/a.bin', 'file:///etc/passwd', 'data:,x', 'http://[', 'http://127.0.0.1:none/', '//[::1', 'http://\xe9..x/'])
def test_a_server_that_leads_elsewhere_is_not_followed(lying, tmp_path, url):
    says(lying, b'', 302, Location=url)
    refused(lambda: download(f'{lying.url}/a.bin', tmp_path/'a', MD5, HURRY), 'another kind' if url.startswith('ftp') else '')
    assert files(tmp_path) == []


def test_no_way_leads_from_https_to_anything_weaker():
    request, ask = urllib.request.Request('https://x.org/a'), SameKind().redirect_request
    for url in ('http://x.org/a', 'ftp://x.org/a', 'file:///a'): refused(lambda: ask(request, None, 302, '', {}, url), 'another kind')
    assert ask(request, None, 302, '', {}, 'https://y.org/b').full_url == 'https://y.org/b'
    assert ask(urllib.request.Request('http://x.org/a'), None, 302, '', {}, 'https://y.org/b').full_url == 'https://y.org/b'


@pytest.mark.parametrize('length', ['-5', 'many', '1e3', '9'*400, '5', '0', str(len(CONTENT) + 7)])
def test_a_size_that_is_a_lie_gives_the_right_file_or_none(lying, tmp_path, length):
    says(lying, CONTENT, Content_Length=length)
    try: download(f'{lying.url}/a.bin', tmp_path/'a', MD5, HURRY)
    except UserError: assert not (tmp_path/'a').exists()
    else: assert (tmp_path/'a').read_bytes() == CONTENT


@pytest.mark.parametrize('body', [CONTENT + b'more', CONTENT[:-1], b'<html>Log in</html>', bytes(len(CONTENT))], ids=['longer', 'shorter', 'page', 'other'])
def test_what_is_not_the_right_file_never_gets_its_name(lying, tmp_path, body):
    says(lying, body)
    refused(lambda: download(f'{lying.url}/a.bin', tmp_path/'a', MD5, HURRY), 'should be ' + MD5)
    assert files(tmp_path) == []
    says(lying, body, 206, Content_Range='bytes 5-9/10')                # a part that nobody asked for
    refused(lambda: download(f'{lying.url}/a.bin', tmp_path/'a', MD5, HURRY))
    assert not (tmp_path/'a').exists()


# --- 3. photos

def flag(size=(30, 20)):
    "A picture whose corners tell how it was turned"
    photo = Image.new('RGB', size, (200, 60, 40))
    photo.paste((40, 60, 200), (0, 0, max(1, size[0]//3), max(1, size[1]//3)))
    return photo


def odd_photos(folder):
    "Photos of every kind that is rare; gives their names, and what is right of each: its size, or None for one that cannot be read"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    long, frames = Image.new('RGB', (20_000, 1), 'red'), [flag(), flag().rotate(180)]
    deep = Image.fromarray((np.arange(600, dtype=np.uint16)*109).reshape(20, 30))
    ways = {'tiny.png': (flag((1, 1)), {}), 'long.png': (long, {}), 'long.jpg': (long, {}), 'tall.png': (long.rotate(90, expand=True), {}),
            'inks.jpg': (flag().convert('CMYK'), {}), 'inks.tif': (flag().convert('CMYK'), {}), 'deep.png': (deep, {}), 'deep.tif': (deep, {}),
            'moving.gif': (frames[0], dict(save_all=True, append_images=frames[1:])), 'moving.webp': (frames[0], dict(save_all=True, append_images=frames[1:])),
            'moving.png': (frames[0], dict(save_all=True, append_images=frames[1:])), 'turned.jpg': (flag(), dict(exif=exif)), 'turned.png': (flag(), dict(exif=exif)),
            'wide.jpg': (flag(), dict(icc_profile=fuzz.ADOBE)), 'wide.png': (flag(), dict(icc_profile=fuzz.ADOBE)), 'torn profile.png': (flag(), dict(icc_profile=fuzz.ADOBE[:200])),
            'no profile.jpg': (flag(), dict(icc_profile=b'x'*50)), 'one bit.png': (flag().convert('1'), {}), 'see-through.png': (flag().convert('RGBA'), {})}
    for name, (photo, how) in ways.items(): photo.save(folder/name, **how)
    right = {name: photo.size[::-1] if name.startswith('turned') else photo.size for name, (photo, _) in ways.items()}
    (folder/'liar.png').write_bytes((folder/'inks.jpg').read_bytes())                       # the ending is wrong, the photo right
    (folder/'page.jpg').write_text('<html>Not found</html>')
    (folder/'empty.jpg').touch()
    flag().save(folder/'drawing.eps')
    (folder/'drawing.eps').rename(folder/'drawing.jpg')                                     # PostScript is a program
    bomb = bytearray((folder/'wide.png').read_bytes())
    bomb[16:24] = struct.pack('>II', 50_000, 50_000)
    (folder/'bomb.png').write_bytes(bomb)
    return {**right, 'liar.png': (30, 20), **dict.fromkeys(('page.jpg', 'empty.jpg', 'drawing.jpg', 'bomb.png'))}


def test_every_odd_photo_is_captioned_or_counted_and_named(tmp_path, run, capsys):
    from multimodal.cli import mm_caption
    right = odd_photos(tmp_path/'photos')
    for name, size in right.items():
        if size: assert load_image(tmp_path/'photos'/name).size == size, name
    refused(lambda: load_image(tmp_path/'photos'/'drawing.jpg'), 'PostScript')              # and not that Ghostscript is missing
    mm_caption([str(tmp_path/'photos')], run=str(run), json=True, device='cpu')
    out, err = capsys.readouterr()
    assert sorted(Path(r['image']).name for r in json.loads(out)) == sorted(n for n, size in right.items() if size)
    for name, size in right.items(): assert (name in err) == (size is None), err
    assert f'4 of {len(right)} files could not be read' in err and not UNSEEN.search(err)


def test_a_photo_cut_at_any_tenth_is_named(tmp_path):
    for kind in ('JPEG', 'PNG', 'GIF', 'WEBP', 'TIFF', 'BMP'):
        flag((64, 48)).resize((320, 240)).save(file := io.BytesIO(), kind)
        for tenth in range(10):
            (tmp_path/'cut').write_bytes(file.getvalue()[:len(file.getvalue())*tenth//10])
            refused(lambda: load_image(tmp_path/'cut'), str(tmp_path/'cut'))


def test_a_wide_gamut_comes_out_in_srgb(tmp_path):
    "Adobe RGB's numbers for a colour are not those of sRGB; the right ones are known by calculation"
    from multimodal.shards import decode_photo
    def linear_adobe(v): return v**2.19921875
    def srgb(v): return 12.92*v if v <= .0031308 else 1.055*v**(1/2.4) - .055
    to_srgb = np.array([[1.39836, -.39836, 0], [0, 1, 0], [0, -.04293, 1.04293]])     # both have the primaries of Rec. 709 but for green
    for colour in ((150, 90, 60), (60, 150, 90), (128, 128, 128), (255, 255, 255), (90, 100, 180)):
        want = [255*srgb(max(0, v)) for v in to_srgb @ linear_adobe(np.array(colour)/255)]
        for ending, mode in (('png', 'RGB'), ('png', 'RGBA'), ('png', 'P'), ('tif', 'RGB'), ('jpg', 'RGB')):
            photo = Image.new('RGB', (16, 16), colour)
            photo = photo.quantize(4) if mode == 'P' else photo.convert(mode)
            photo.save(tmp_path/f'a.{ending}', icc_profile=fuzz.ADOBE, **({'quality': 100} if ending == 'jpg' else {}))
            got, raw = load_image(tmp_path/f'a.{ending}').getpixel((8, 8)), (tmp_path/f'a.{ending}').read_bytes()
            if ending != 'tif': assert decode_photo({'__key__': 'a', ending: raw}, 16).getpixel((8, 8)) == got       # in shards as well
            assert max(abs(a - b) for a, b in zip(got, want)) < 3, (colour, got, want)
    assert max(abs(a - b) for a, b in zip(got, colour)) > 5                               # and it is not the same
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    for profile in (srgb, fuzz.ADOBE[:150], b'', b'\0'*200, ImageCms.ImageCmsProfile(ImageCms.createProfile('LAB')).tobytes()):
        flag().save(tmp_path/'b.png', icc_profile=profile)
        assert np.array_equal(load_image(tmp_path/'b.png'), flag())
    flag().convert('L').save(tmp_path/'c.png', icc_profile=fuzz.ADOBE)                    # a profile for colours, on grey
    assert np.array_equal(load_image(tmp_path/'c.png'), flag().convert('L').convert('RGB'))


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(tmp_path):
    flag((320, 240)).save(file := io.BytesIO(), 'JPEG', progressive=True)
    raw = file.getvalue()
    at = raw.rindex(b'\xff\xda')
    (tmp_path/'a.jpg').write_bytes(raw[:at] + raw[at:-2]*3000 + raw[-2:])
    start = time.monotonic()
    refused(lambda: load_image(tmp_path/'a.jpg'), 'scans')
    assert time.monotonic() - start < 1
    (tmp_path/'a.jpg').write_bytes(raw)
    assert load_image(tmp_path/'a.jpg').size == (320, 240)


def test_mutated_photos_crash_and_hang_nothing():
    "By tools/fuzz.py, which took 10,000; here 240"
    found = fuzz.images(240, 1)
    assert found['slowest_seconds'] < 10 and found['peak_mb'] - found['peak_mb_before'] < 2000
    for seen in found['by_kind'].values():
        assert min(seen['read'], seen['refused']) > 10 and seen['crashes'] == seen['hangs'] == seen['read_wrong'] == 0


# --- 4. caption files

def test_mutated_caption_files_are_read_rightly_or_refused():
    found = fuzz.captions(150, 1)
    assert min(found['read_rightly'].values()) > 15 and min(found['refused_in_one_line'].values()) > 15
    assert not any(n for what in ('crashes', 'hangs', 'read_wrong') for n in found[what].values())


def test_the_judge_of_caption_files_sees_a_mix_up(tmp_path, monkeypatch):
    "A reader that puts captions under the photo of the line before is found out"
    def shifted(path, parse, form, skipped):
        rows = read_rows(path, parse, form, skipped)
        return [(a[0], *b[1:]) for a, b in zip(rows, rows[1:] + rows[:1])]
    monkeypatch.setattr(fuzz, 'read_rows', shifted)
    (tmp_path/'a').write_text(fuzz.GOOD['kaggle'])
    with pytest.raises(AssertionError): fuzz.check_lines(tmp_path/'a', fuzz.GOOD['kaggle'].encode(), 'kaggle')
    assert fuzz.captions(5, 1)['read_wrong']['kaggle']


TEXT = st.text(max_size=20) | st.sampled_from(['a.jpg', 'b.jpg', '#0', '\t', ',', '"', '| 0| ', '\n', '\r\n', '\u2028', 'image', '٣', '\ufeff'])


@SAME_FOLDER
@given(st.lists(TEXT, max_size=12).map(''.join).map(lambda t: t.encode('utf-8', 'replace')) | st.binary(max_size=60))
def test_any_text_is_read_rightly_or_refused(tmp_path, raw):
    (tmp_path/'a.txt').write_bytes(raw)
    for kind in fuzz.LINE_READERS: fuzz.check_lines(tmp_path/'a.txt', raw, kind)


PLAIN = st.none() | st.booleans() | st.integers(-1, 3) | st.floats(0, 3) | st.sampled_from(['a.jpg', 'b.jpg', 'A dog', 'train', 'test', ''])
RECORD = st.dictionaries(st.sampled_from(['id', 'image_id', 'file_name', 'caption', 'filename', 'split', 'sentences', 'raw']), PLAIN | st.lists(
    st.dictionaries(st.sampled_from(['raw', 'sentid']), PLAIN), max_size=2), max_size=6)


@SAME_FOLDER
@given(st.fixed_dictionaries({'images': st.lists(RECORD, max_size=4), 'annotations': st.lists(RECORD, max_size=4)}))
def test_any_json_is_read_rightly_or_refused(tmp_path, content):
    (tmp_path/'a.json').write_text(json.dumps(content))
    for check in (fuzz.check_karpathy, fuzz.check_coco): check(tmp_path/'a.json', json.dumps(content).encode())


def test_one_number_for_two_photos_is_refused(tmp_path):
    images = [{'id': 1, 'file_name': 'dog.jpg'}, {'id': 1, 'file_name': 'cat.jpg'}]
    (tmp_path/'a.json').write_text(json.dumps({'images': images, 'annotations': [{'image_id': 1, 'id': 1, 'caption': 'A dog'}]}))
    refused(lambda: fuzz.coco_rows(tmp_path/'a.json', Counter()), 'a.json', 'dog.jpg', 'cat.jpg')
    for broken in ('\0.jpg', None, 3):                                   # a name that is none lays claim to the number all the same
        images[0]['file_name'] = broken
        (tmp_path/'a.json').write_text(json.dumps({'images': images, 'annotations': [{'image_id': 1, 'id': 1, 'caption': 'A dog'}]}))
        refused(lambda: fuzz.coco_rows(tmp_path/'a.json', Counter()), 'a.json', 'cat.jpg')
    images[0]['file_name'] = 'dog.jpg'
    for other in (True, 1.0, '1'):                                      # Python takes two of these for 1
        images[1] = {'id': other, 'file_name': 'cat.jpg'}
        (tmp_path/'a.json').write_text(json.dumps({'images': images, 'annotations': [{'image_id': other, 'id': 1, 'caption': 'A cat'}]}))
        _, rows = fuzz.coco_rows(tmp_path/'a.json', Counter())
        assert [r[0] for r in rows] == (['cat.jpg'] if other == '1' else [])


def test_captions_of_any_kind_can_be_written_down_again(tmp_path):
    "Line ends, half characters and zeros in JSON's captions: what is read is written as one line each, or was counted"
    from multimodal.augment import augment_dataset
    from multimodal.datasets import load_dataset
    for n in 'ab': flag().save(tmp_path/f'{n}.jpg')
    good = ['A dog\nb.jpg#0\tA cat', HOSTILE, 'a'*5000, '<b>', '#0\tx']
    images = [{'filename': f'{n}.jpg', 'split': 'train', 'sentences': [{'raw': c} for c in texts]} for n, texts in zip('abcd', (good, good, ['x \ud800 y'], ['x\0y']))]
    (tmp_path/'dataset.json').write_text(json.dumps({'images': images}))
    data = load_dataset(tmp_path)
    assert data.skipped['broken record'] == 2 and len(data['train']) == 2
    again = load_dataset(augment_dataset(data, tmp_path/'out'))
    for item in again['train']: assert len(item.captions) == len(good) and all(c.split() for c in item.captions)
    assert {' '.join(c.split()) for c in good} <= set(again['train'][0].captions)
    vocab = Vocab.build(data.captions('train'), 1)
    vocab.save(tmp_path/'vocab.json')
    assert Vocab.load(tmp_path/'vocab.json') == vocab


def test_a_hundred_thousand_lines_take_memory_in_proportion(tmp_path):
    "As tools/fuzz.py measures with a million: less than six bytes for each byte of the file"
    found = fuzz.many_lines(100_000)
    assert found['lines'] == found['captions'] == 100_000
    assert found['grown_mb'] < 6*found['file_mb'] + 20


# --- 5. text

NASTY = ['"><script>document.title="ran"</script>', "'><img src=x onerror=document.title='ran'>", '</title></style></textarea><script>document.title="ran"</script>',
         '<svg/onload=document.title="ran">', 'javascript:document.title="ran"', '&lt;script&gt;&#60;script&#62;document.title="ran"</script>', '{{7*7}}${7*7}<%= 7 %>',
         ']]><script>document.title="ran"</script><!--', '--><script>document.title="ran"</script>', '\0<script>document.title="ran"</script>',
         '<iframe srcdoc="<script>parent.document.title=\'ran\'</script>">', '<base href="http://127.0.0.1:1/">', '<meta http-equiv=refresh content="0;url=data:text/html,x">',
         '<style>*{display:none}</style>', '" onmouseover="document.title=1" style="position:fixed', 'שלום \u202e abc \u2066', '\u200b\u200d\ufeff', 'x\ud800y', 'a'*100_000, HOSTILE]


def nasty_page(texts=NASTY):
    picture = flag()
    shots = [Shot(picture, t, ok, t) for t, ok in zip(texts, [True, False, None]*9)]
    charts = [line_chart({t: [(0, 1), (1, 2)] for t in texts[:4]}, texts[0], texts[1])]
    return html_page(texts[0], texts[1], [(t, t, gallery([s])) for t, s in zip(texts, shots)] + [(texts[2], texts[3], gallery([], texts[3]))] +
                     [(texts[0], '', tiles({t: t for t in texts[:9]}) + scores_table({t: {'bleu_4': .5} for t in texts[:9]}, {'bleu_4': texts[1]}) + charts[0])], texts[2])


class Parts(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.names, self.addresses = Counter(), set(), []
    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.names |= {f'{tag} {k}' for k, _ in attrs}
        self.addresses += [v for k, v in attrs if k in ('src', 'href', 'srcdoc', 'action', 'data')]


def parts(html):
    p = Parts()
    p.feed(html)
    p.close()
    return p


def test_a_page_has_no_element_or_attribute_that_came_from_a_caption(tmp_path):
    "The same page with plain words has just as many elements of each kind, and no other attributes"
    saved = save_page(nasty_page(), tmp_path/'a.html').read_text(encoding='utf-8')
    plain = parts(nasty_page([f'text {i}' for i in range(len(NASTY))]))
    nasty = parts(saved)
    assert (nasty.tags, nasty.names) == (plain.tags, plain.names) and all(a.startswith('data:image/') for a in nasty.addresses)
    assert not UNSEEN.search(saved) and '\\u202e' in saved and '\\ud800' in saved
    assert {'script', 'iframe', 'base', 'link'}.isdisjoint(nasty.tags)


CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.mark.skipif(not CHROMIUM, reason='no chromium here to open the page in')
def test_no_script_runs_in_a_real_browser(tmp_path):
    "Even where the page's own lock is taken off; and a page that does run one shows that the browser would"
    lock = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')
    bare = lock.sub('', nasty_page())
    assert bare != nasty_page()
    pages, asked, titles = {'escaped': bare, 'locked': nasty_page() + NASTY[0][2:], 'open': bare + NASTY[0][2:]}, {}, {}
    for name, html in pages.items():
        save_page(html, tmp_path/f'{name}.html')
        asked[name] = subprocess.Popen([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
                                        '--disable-component-update', '--disable-sync', f'--user-data-dir={tmp_path}/{name}', '--dump-dom',
                                        f'file://{tmp_path}/{name}.html'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for name, process in asked.items():
        page = process.communicate(timeout=90)[0]
        assert '</html>' in page, name
        titles[name] = re.search('<title>(.*?)</title>', page, re.S)[1]
    assert titles.pop('open') == 'ran' and titles['escaped'] == titles['locked'] and titles['escaped'].endswith('&lt;/script&gt;'), titles


def test_figures_take_any_title(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                 # of letters that the font lacks
        figure = show_images([flag()]*3, ['$\\frac{$', 'a'*100_000, HOSTILE + '</text><script>x</script>--><script>'], path=tmp_path/'a.svg')
    import matplotlib.pyplot as plt
    plt.close(figure)
    assert max(figure.get_size_inches()) < 20
    assert 'script' not in parts((tmp_path/'a.svg').read_text(encoding='utf-8')).tags


def test_words_of_any_length_and_script_are_read_quickly():
    start = time.monotonic()
    for text in ('a'*100_000, 'a '*50_000, "a'"*50_000, 'e\u0301'*50_000, '\u0301'*100_000, '\u200d'*100_000, HOSTILE*5000, '👩‍🚀'*20_000, '<b>'*30_000, 'שלום '*20_000):
        assert all(w for w in tokenize(text))
        assert official_row(f'a.jpg#0\t{text}')[2] == text
    assert time.monotonic() - start < 5


def test_nothing_that_a_command_prints_is_obeyed_by_a_terminal(tmp_path, run, capsys):
    "Names of files and captions, in results, remarks, mistakes and JSON"
    from multimodal.cli import mm_caption, mm_score, mm_validate
    folder, name = tmp_path/'photos', HOSTILE.replace('\r', '') + '\n'
    folder.mkdir()
    flag().save(folder/f'{name}good.jpg')
    (folder/f'{name}bad.jpg').touch()
    mm_caption([str(folder)], run=str(run), device='cpu')
    out, err = capsys.readouterr()
    assert not UNSEEN.search(out + err) and out.count('\n') == 1 and 'bad.jpg' in err and '\\u001b[2J' in out
    mm_caption([str(folder)], run=str(run), device='cpu', json=True)
    out, err = capsys.readouterr()
    assert not UNSEEN.search(out) and json.loads(out)[0]['image'] == str(folder/f'{name}good.jpg')        # the same for who reads JSON
    (tmp_path/'data').mkdir()
    (tmp_path/'data'/'captions.txt').write_text(f'{HOSTILE.splitlines()[0]}.jpg,A dog\n')
    for command, args in ((mm_score, (str(tmp_path/name), [str(tmp_path/name)])), (mm_caption, ([str(tmp_path/name)],)), (mm_validate, (str(run), str(tmp_path/'data')))):
        with pytest.raises(SystemExit) as e: command(*args)
        out, err = capsys.readouterr()
        assert e.value.code == 2 and not UNSEEN.search(out + err) and err.count('\n') == 1
    with redirect_stderr(io.StringIO()) as said, redirect_stdout(io.StringIO()): aside('a\nb' + HOSTILE)
    assert not UNSEEN.search(said.getvalue()) and said.getvalue().count('\n') == 1


# --- 6. JSON

def test_objects_with_a_name_twice_deep_ones_and_endless_numbers_are_named(tmp_path):
    path = tmp_path/'a.json'
    for content, words in (('{"a": 1, "a": 1}', "'a' comes twice"), ('[{"b": {"c": 0, "d": 1, "c": 2}}]', "'c' comes twice"), ('[' * 100_000, 'JSON'),
                           ('{"a":' * 100_000, 'JSON'), ('[' * 100_000 + ']' * 100_000, 'deeply'), ('9'*10_000, 'digits'), ('{"a": -' + '9'*5000 + '}', 'digits')):
        path.write_text(content)
        refused(lambda: read_json(path), str(path), words)


WRONG = [('n_layers', '3'), ('n_layers', 2.0), ('n_layers', True), ('n_layers', None), ('n_layers', [[]]), ('n_layers', {}), ('n_layers', 10**400), ('n_layers', -10**400),
         ('n_layers', 10**9), ('embedding_dim', 2**40), ('dropout', float('nan')), ('dropout', float('inf')), ('dropout', 10**400), ('dropout', '0.1'), ('fusion', 3), ('fusion', 'x'*10**5),
         ('max_len', 0), ('n_layer', 2), ('\x1b[2J', 2), ('', 2)]


@pytest.mark.parametrize('key,value', WRONG, ids=[f'{ascii(k)[:20]}-{type(v).__name__}{i}' for i, (k, v) in enumerate(WRONG)])
def test_a_wrong_value_is_named_in_every_configuration(run, tmp_path, key, value):
    from multimodal.runs import load_run
    config, model = tiny()
    line = refused(lambda: config_from({**asdict(model.config), key: value}, 'x/config.json'), 'x/config.json', ascii(key)[1:-1])
    assert line.isprintable() and len(line) < 300
    for where in (run/'config.json', run/'best'/'config.json'):
        whole, name = json.loads(where.read_text()), 'max_words' if key == 'max_len' and where.parent == run else key
        of_model = {'captioner': {**whole['captioner'], name: value}} if 'captioner' in whole else {name: value}
        where.write_text(json.dumps({**whole, **of_model}))
        line = refused(lambda: load_run(run), str(where), ascii(name)[1:-1])
        assert line.isprintable() and len(line) < 300 + len(str(run))
        where.write_text(json.dumps(whole))


@pytest.mark.parametrize('pair,words', [('lr=1e400', 'lr must be'), ('lr=NaN', 'lr must be'), (f'epochs={10**400}', 'epochs must be'), ('epochs=' + '9'*9000, 'epochs must be'),
                                        ('epochs=' + '['*100_000, 'epochs must be'), ('epochs=' + '['*100_000 + ']'*100_000, 'epochs must be'), ('lr="1"', 'lr must be'),
                                        ('lrr=1', "did you mean 'lr'"), ('epochs={"a": 1}', 'epochs must be'), ('seed=-1', 'seed'), (f'seed={2**40}', 'seed must be')])
def test_a_wrong_setting_on_the_command_line_is_named(tmp_path, pair, words, capsys):
    from multimodal.cli import mm_train
    with pytest.raises(SystemExit) as e: mm_train('shapes:60', str(tmp_path/'run'), device='cpu', set=[pair])
    out, err = capsys.readouterr()
    assert e.value.code == 2 and err.count('\n') == 1 and words in err and len(err) < 300 and not (tmp_path/'run').exists(), err[:500]


def test_a_setting_given_twice_is_named():
    from multimodal.terminal import settings as read_settings
    refused(lambda: read_settings(['lr=1', 'lr=2']), 'lr', 'twice')
    assert read_settings(['lr=1', 'fusion=fc']) == {'lr': 1, 'fusion': 'fc'}


def test_a_description_that_asks_for_more_than_its_weights_hold_takes_no_memory(run):
    "200,000 numbers for each word would be terabytes; the file of weights says that it is not so"
    path, before = run/'best'/'config.json', fuzz.peak_anew()
    whole = json.loads(path.read_text())
    for key, value in (('embedding_dim', 200_000), ('n_layers', 900), ('max_len', 900_000), ('ff_mult', 900_000)):
        path.write_text(json.dumps({**whole, 'captioner': {**whole['captioner'], key: value}}))
        refused(lambda: load_captioner(run/'best'), 'model.safetensors')
    whole['captioner']['encoder']['image_size'] = 9000
    path.write_text(json.dumps(whole))
    refused(lambda: load_captioner(run/'best'), 'model.safetensors')
    assert fuzz.peak_mb() - before < 500


def test_mutated_descriptions_load_or_are_named(run):
    rng, path, loaded = random.Random(0), run/'best'/'config.json', 0
    good = path.read_text()
    for i in range(40):
        path.write_bytes(fuzz.mutated_json(good, rng) if i % 2 else fuzz.mutated(good.encode(), rng, most=2))
        try: loaded += load_captioner(run/'best')[0] is not None
        except UserError as error: assert str(run) in str(error) and '\n' not in str(error), error
    assert 3 < loaded < 36


@pytest.mark.parametrize('line', ['[' * 100_000, '9'*9000, '{"epoch": 1}\n{"a":' * 9, '[1]\n{}', '\0', '\x1b[2J\n1', 'NaN\nNaN'])
def test_a_history_of_anything_is_read_or_named(run, line):
    from multimodal.runs import load_run
    (run/'history.jsonl').write_text(line)
    try: load_run(run)
    except UserError as error: fuzz.one_line(error, run/'history.jsonl')


def test_captions_to_be_scored_that_no_text_can_hold_are_named(tmp_path):
    from multimodal.scoring import pair_coco
    for name in 'ab': (tmp_path/name).write_text(json.dumps([{'image_id': 1, 'caption': 'a dog'}, {'image_id': 2, 'caption': 'a \ud800 cat'}]))
    refused(lambda: pair_coco(str(tmp_path/'a'), str(tmp_path/'b')), 'entry 2')


def test_the_recipe_of_a_run_survives_what_json_does_to_it():
    config, _ = tiny()
    assert run_config(json.loads(json.dumps(asdict(config)))) == config
    assert sys.getrecursionlimit() >= 1000                              # the deep ones above were not let through by a higher limit
