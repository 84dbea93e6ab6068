"""Photos that went through anything, files that are whole or not at all, and errors of one line."""
import io
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from safetensors import SafetensorError

from multimodal.core import (UserError, as_array, atomic_write, get_device, list_images, load_image, read_json,
                             set_seed, show_images, write_json)

ROOT = Path(__file__).resolve().parent.parent
SAME_FOLDER = settings(max_examples=50, deadline=None, database=None,
                       suppress_health_check=[HealthCheck.function_scoped_fixture])


def one_line(error, *words):
    message = str(error.value)
    assert '\n' not in message and all(word in message for word in words), message


@pytest.fixture
def corner():
    "A picture whose four corners differ, so that no turn or flip of it looks like another."
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24], pixels[:16, 24:], pixels[16:, :24], pixels[16:, 24:] = (250, 0, 0), (0, 250, 0), (0, 0, 250), 250
    return Image.fromarray(pixels)


# --- photos

@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp'])
def test_every_orientation_comes_out_upright(tmp_path, corner, orientation, ending):
    T = Image.Transpose
    undo = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90,
            7: T.TRANSVERSE, 8: T.ROTATE_270}      # what a camera held like this has stored
    stored = corner.transpose(undo[orientation]) if orientation > 1 else corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path/f'a.{ending}', exif=exif)
    photo = load_image(tmp_path/f'a.{ending}')
    assert photo.size == corner.size
    assert np.abs(np.asarray(photo, float) - np.asarray(corner, float)).mean() < 6


@pytest.mark.parametrize('notes', [b'garbage garbage', b'II*\0\xff\xff\xff\xff', b'MM\0*\0\0\0\x08\0\x05\x01\x12',
                                   b'II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x01\0\0\0abcd\0\0\0\0'])
def test_a_good_photo_with_broken_notes_is_read_without_a_word(tmp_path, corner, notes, recwarn):
    corner.save(tmp_path/'a.jpg', exif=b'Exif\0\0' + notes)
    assert load_image(tmp_path/'a.jpg').size == corner.size
    assert not recwarn.list


@pytest.mark.parametrize('mode, save', [
    ('1', 'png'), ('L', 'jpg'), ('LA', 'png'), ('P', 'gif'), ('P', 'png'), ('RGBA', 'png'), ('RGBA', 'webp'),
    ('CMYK', 'jpg'), ('CMYK', 'tif'), ('YCbCr', 'jpg'), ('LAB', 'tif'), ('I', 'tif'), ('I;16', 'png'), ('I;16', 'tif'), ('F', 'tif'),
    ('RGB', 'bmp'), ('RGB', 'ppm'), ('L', 'pgm')])
def test_every_mode_gives_the_same_picture(tmp_path, corner, mode, save):
    path, want = tmp_path/f'a.{save}', corner
    grey = np.asarray(corner.convert('L'))
    if mode == 'I;16': Image.fromarray(grey.astype(np.uint16)*257).save(path)
    elif mode in ('I', 'F'): Image.fromarray(grey.astype({'I': np.int32, 'F': np.float32}[mode])).save(path)
    elif mode == 'LAB':
        from PIL import ImageCms
        profiles = ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB')
        ImageCms.profileToProfile(corner, *profiles, outputMode='LAB').save(path)
    else: corner.convert(mode).save(path)
    if mode in ('L', 'LA', 'I', 'I;16', 'F'): want = corner.convert('L').convert('RGB')
    if mode == '1': want = corner.convert('1').convert('RGB')
    photo = load_image(path)
    assert (photo.mode, photo.size) == ('RGB', corner.size)
    if mode != 'LAB': assert np.abs(np.asarray(photo, float) - np.asarray(want, float)).mean() < 8


def test_grey_keeps_its_brightness(tmp_path):
    dark = np.full((4, 4), 200, np.uint16)                                   # nearly black in 16 bits
    Image.fromarray(dark).save(tmp_path/'dark.png')
    assert np.asarray(load_image(tmp_path/'dark.png')).max() <= 1
    Image.fromarray(np.full((4, 4), .5, np.float32)).save(tmp_path/'half.tif')
    assert abs(int(np.asarray(load_image(tmp_path/'half.tif'))[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize('mode, nothing', [('RGBA', (0, 0, 0, 0)), ('LA', (0, 0))])
def test_see_through_is_white(tmp_path, mode, nothing):
    Image.new(mode, (4, 4), nothing).save(tmp_path/'a.png')
    assert np.asarray(load_image(tmp_path/'a.png')).min() == 255


def test_see_through_palette_is_white(tmp_path):
    picture = Image.new('P', (4, 4), 0)
    picture.putpalette([0, 0, 0, 250, 0, 0])
    picture.putpixel((0, 0), 1)
    for name in ('a.gif', 'a.png'):
        picture.save(tmp_path/name, transparency=0)
        photo = load_image(tmp_path/name)
        assert photo.getpixel((0, 0)) == (250, 0, 0) and photo.getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize('ending', ['gif', 'webp', 'png', 'tif'])
def test_the_first_frame_of_a_moving_picture(tmp_path, ending):
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
    frames[0].save(tmp_path/f'a.{ending}', save_all=True, append_images=frames[1:])
    red, green, blue = load_image(tmp_path/f'a.{ending}').getpixel((4, 4))
    assert red > 200 and blue < 50


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'TIFF'])
def test_cut_off_photos_are_named(tmp_path, kind):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    path = tmp_path/'cut.jpg'
    for share in (.1, .3, .5, .7):
        path.write_bytes(file.getvalue()[:int(len(file.getvalue())*share)])
        with pytest.raises(UserError) as error: load_image(path)
        one_line(error, str(path))


@pytest.mark.parametrize('content', [b'', b'\0'*100, b'<html>Not found</html>', b'\xff\xd8\xff\xe0',
                                     b'\x89PNG\r\n\x1a\n', b'GIF89a', 'ｐｈｏｔｏ'.encode(), b'%PDF-1.4', b'PK\3\4'])
def test_fakes_are_named(tmp_path, content):
    (tmp_path/'fake.jpg').write_bytes(content)
    with pytest.raises(UserError) as error: load_image(tmp_path/'fake.jpg')
    one_line(error, 'fake.jpg')


@SAME_FOLDER
@given(st.sampled_from(['JPEG', 'PNG', 'GIF', 'WEBP']),
       st.lists(st.tuples(st.floats(0, .999), st.binary(min_size=1, max_size=6)), min_size=1, max_size=5))
def test_damage_gives_a_photo_or_a_user_error(tmp_path, kind, damage):
    file = io.BytesIO()
    Image.linear_gradient('L').resize((24, 24)).convert('RGB').save(file, kind)
    content = bytearray(file.getvalue())
    for where, junk in damage:
        start = int(where*len(content))
        content[start:start + len(junk)] = junk
    (tmp_path/'a.jpg').write_bytes(content)
    try: assert load_image(tmp_path/'a.jpg').mode == 'RGB'
    except UserError as error: assert 'a.jpg' in str(error)


@pytest.mark.parametrize('side', [10_000, 60_000])                           # Pillow only warns of the first
def test_a_bomb_is_refused(tmp_path, side):
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0))
    body = chunk(b'IDAT', zlib.compress(b'\0'*1000)) + chunk(b'IEND', b'')
    (tmp_path/'bomb.png').write_bytes(b'\x89PNG\r\n\x1a\n' + header + body)
    with pytest.raises(UserError) as error: load_image(tmp_path/'bomb.png')
    one_line(error, 'bomb.png', 'pixels')


def test_what_is_no_file(tmp_path):
    for path, word in ((tmp_path/'nowhere.jpg', 'no such file'), (tmp_path, 'is a folder')):
        with pytest.raises(UserError) as error: load_image(path)
        one_line(error, str(path), word)


def test_list_images(tmp_path):
    for name in ('b.JPG', 'a.png', 'notes.txt', '.hidden.jpg', 'deep/er/c.webp', 'folder.jpg/d.gif'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    assert [p.name for p in list_images(tmp_path)] == ['a.png', 'b.JPG', 'c.webp', 'd.gif']
    (tmp_path/'lost.jpg').symlink_to(tmp_path/'gone.jpg')
    os.mkfifo(tmp_path/'pipe.jpg')
    assert [p.name for p in list_images(tmp_path)][-2:] == ['lost.jpg', 'pipe.jpg']             # to be named, and not passed over
    for name in 'lost.jpg', 'pipe.jpg': (tmp_path/name).unlink()
    assert list_images([tmp_path/'notes.txt']*2) == [tmp_path/'notes.txt']      # asked for by name; given once
    assert list_images(str(tmp_path/'a.png')) == [tmp_path/'a.png']
    for wrong in ([], tmp_path/'nowhere', [tmp_path/'a.png', tmp_path/'nowhere']):
        with pytest.raises(UserError): list_images(wrong)


def test_a_folder_gives_every_kind_of_photo_that_pillow_writes_and_reads(tmp_path):
    Image.init()
    made = set()
    for ending, kind in sorted(Image.registered_extensions().items()):
        if kind not in Image.OPEN or kind in ('EPS', 'ICNS', 'PDF'): continue          # drawings, symbols, pages
        try: Image.new('RGB', (32, 32), 'red').save(tmp_path/f'a{ending}', kind)
        except (OSError, ValueError, KeyError): (tmp_path/f'a{ending}').unlink(missing_ok=True)
        else: made.add(f'a{ending}')
    assert {'a.jpg', 'a.tga', 'a.tiff', 'a.webp'} <= made and made == {p.name for p in list_images(tmp_path)}
    for path in list_images(tmp_path): assert load_image(path).size == (32, 32), path


def test_a_picture_is_written_whole_or_one_line_says_why(tmp_path, corner):
    (tmp_path/'file').touch()
    with pytest.raises(UserError, match='a.png'): show_images([corner], path=tmp_path/'file'/'a.png')
    show_images([corner], path=tmp_path/'new'/'a.png')
    assert [p.name for p in (tmp_path/'new').iterdir()] == ['a.png']


def test_show_images_takes_all_kinds_and_saves(tmp_path, corner):
    pictures = [corner, np.asarray(corner), torch.rand(3, 8, 8), torch.rand(1, 8, 8), np.zeros((4, 4))]
    show_images(pictures, [str(i) for i in range(5)], n_cols=3, path=tmp_path/'sheet.png')
    assert load_image(tmp_path/'sheet.png').width > 100
    assert as_array(torch.full((3, 2, 2), 1.5)).max() == 1


# --- files

def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path/'a.json'
    write_json(path, 1)
    for error in (KeyboardInterrupt, RuntimeError, SystemExit):
        with pytest.raises(error):
            with atomic_write(path) as beside:
                beside.write_text('half')
                raise error
    with pytest.raises(TypeError): write_json(path, {'a set': {1}})
    assert read_json(path) == 1 and os.listdir(tmp_path) == ['a.json']


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path):
    code = '''
import resource, signal, sys
from multimodal.core import UserError, write_json
write_json(sys.argv[1], 'old')
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try: write_json(sys.argv[1], 'x'*5000)
except UserError as error: print(error)
'''
    path = tmp_path/'a.json'
    r = subprocess.run([sys.executable, '-c', code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(path) in r.stdout and 'cannot be written' in r.stdout and r.stdout.count('\n') == 1
    assert read_json(path) == 'old' and os.listdir(tmp_path) == ['a.json']


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    code = '''
import sys, time
from multimodal.core import atomic_write
with atomic_write(sys.argv[1]) as beside:
    beside.write_text('half')
    print('writing', flush=True)
    time.sleep(60)
'''
    path = tmp_path/'a.txt'
    path.write_text('old')
    with subprocess.Popen([sys.executable, '-c', code, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
    assert path.read_text() == 'old'


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, stop = tmp_path/'a.json', threading.Event()
    values = ['a'*20_000, 'b'*40_000]
    write_json(path, values[0])

    def write():
        while not stop.is_set():
            for value in values: write_json(path, value)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end: assert read_json(path) in values
    finally:
        stop.set()
        writer.join()


def test_rights_are_those_of_any_new_file(tmp_path):
    write_json(tmp_path/'a.json', 1)
    (tmp_path/'b').write_text('')
    assert stat.S_IMODE((tmp_path/'a.json').stat().st_mode) == stat.S_IMODE((tmp_path/'b').stat().st_mode)


def test_what_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    for path in (tmp_path/'file'/'a.json', tmp_path):
        with pytest.raises(UserError) as error: write_json(path, 1)
        one_line(error, str(path), 'cannot be written')


TEXT = st.text(st.characters(exclude_categories=['Cs']))
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
                      lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXT, v, max_size=4))


@SAME_FOLDER
@given(VALUES)
def test_json_round_trip(tmp_path, value):
    write_json(tmp_path/'deep'/'a.json', value)
    assert read_json(tmp_path/'deep'/'a.json') == value


@pytest.mark.parametrize('content, word', [(b'', 'line 1'), (b'{"a": 1,\n}', 'line 2'), (b'\xff\xfe', 'UTF-8'),
                                           (b'['*100_000, 'JSON')])
def test_broken_json_is_named(tmp_path, content, word):
    (tmp_path/'a.json').write_bytes(content)
    with pytest.raises(UserError) as error: read_json(tmp_path/'a.json')
    one_line(error, 'a.json', word)


def test_missing_json_is_named(tmp_path):
    for path in (tmp_path/'nowhere.json', tmp_path):
        with pytest.raises(UserError) as error: read_json(path)
        one_line(error, str(path))


# --- chance and devices

@settings(max_examples=20, deadline=None, database=None)
@given(st.integers(0, 2**32 - 1))
def test_a_seed_repeats_all_three_generators(seed):
    import random
    def draw(): return random.random(), np.random.rand(), torch.rand(1).item()
    set_seed(seed); first = draw()
    draw()
    set_seed(seed); assert draw() == first


def test_seeds_and_devices_that_are_none():
    for seed in (-1, 2**32):
        with pytest.raises(UserError): set_seed(seed)
    for name in ('abacus', 'cuda:x', 'cpu:cpu', 'cuda:99', ''):
        with pytest.raises(UserError) as error: get_device(name)
        one_line(error)
    assert get_device('cpu').type == 'cpu'


def test_only_the_graphics_cards_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert get_device('cuda:1') == torch.device('cuda', 1)
    with pytest.raises(UserError, match="'cuda:2' is not to be had"): get_device('cuda:2')


def test_core_alone_imports_nothing_heavy():
    code = '''
import json, sys
import multimodal.core
print(json.dumps([m for m in ('torch', 'numpy', 'matplotlib', 'PIL') if m in sys.modules]))
'''
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(r.stdout) == []


def test_a_disk_that_is_full_for_safetensors_is_one_line_too(tmp_path):
    with pytest.raises(UserError, match='a.safetensors: cannot be written'):
        with atomic_write(tmp_path/'a.safetensors'): raise SafetensorError('Error while serializing: I/O error: No space left')
    assert not list(tmp_path.iterdir())
