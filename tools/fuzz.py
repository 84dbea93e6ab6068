"""Feeds broken files to whatever reads the files of strangers, and checks what comes out. Full-length runs; their short forms
stand in tests/test_strangers.py.

    python tools/fuzz.py images --n 10000 --seed 0 --out results/reliability.json
    python tools/fuzz.py captions --n 10000 --seed 0 --out …       each reader, files mutated by chance
    python tools/fuzz.py readers --minutes 20 --at-once 2 --out …  the same guided by coverage, a process for each reader in turn
                                                                   (pip install atheris)
    python tools/fuzz.py million --out …                           a caption file of a million lines, and its peak of memory
    python tools/fuzz.py largest --out …                           the largest photo that is let in, and its peak of memory

A reading is right where every pair of photo and caption that comes out stands so in the file that went in, found there by code
that shares nothing with the readers."""
import argparse
import faulthandler
import io
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path

GUIDED = 'guided' in sys.argv[1:2]             # by coverage: atheris must see the modules before anybody imports them
if GUIDED:
    import atheris
    for hook in 'RegEx', 'str': atheris.enabled_hooks.add(hook)
with atheris.instrument_imports(include=['multimodal.captionfiles', 'multimodal.datasets', 'multimodal.core']) if GUIDED else nullcontext():
    from multimodal.captionfiles import coco_rows, flickr30k_row, kaggle_row, karpathy_rows, official_row, read_rows
    from multimodal.core import UserError, load_image
    from multimodal.datasets import load_dataset, read_split_lists

HANG = 10                                      # seconds after which a file hangs us


class Hang(BaseException): "No `except Exception` takes it for something else"


@contextmanager
def patience(seconds=HANG):
    "Raises `Hang` where it takes longer; where no line of Python is reached any more, the process ends and says where"
    def late(*_): raise Hang(f'took more than {seconds} s')
    faulthandler.dump_traceback_later(6*seconds, exit=True)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def one_line(error, path):
    "Is it a message as we want them: one line without control characters that names the file?"
    assert str(path) in str(error) and not re.search('[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]', str(error)), repr(str(error))


TROUBLE = {Hang: 'hangs', AssertionError: 'read_wrong'}                                   # any other error is a crash


def what_came(check, *args):
    "Of a file: 'read' rightly, 'refused' in one line, 'hangs', 'read_wrong' or 'crashes'; the traceback of the last three is shown"
    try:
        with patience(): return 'read' if check(*args) is not None else 'refused'
    except (Hang, Exception) as error:
        traceback.print_exc()
        return TROUBLE.get(type(error), 'crashes')


def peak_mb():
    "The most memory that this process has held, since `peak_anew` where Linux lets us count anew"
    try: return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])//1024
    except (OSError, TypeError): return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)


def peak_anew():
    try: Path('/proc/self/clear_refs').write_text('5')
    except OSError: pass
    return peak_mb()


# --- caption files: what must be true of what comes out

def lines_of(raw): return re.split('\r\n|\r|\n', raw.decode('utf-8-sig'))


def bare(text): return re.sub(r'[\s"|]', '', text)


def says(kind, line, photo, number, caption):
    "Does this line say so? Written down anew, without the reader's regular expressions"
    if kind == 'official': return line == f'{photo}#{number}\t{caption}'
    between = ',' if kind == 'kaggle' else f',{number},' if kind == 'numbered' else f'{number}'
    if kind == 'flickr30k' and not line.strip().startswith(photo + '|') and line.split('|')[0].strip() != photo: return False
    return bare(line) == bare(f'{photo}{between}{caption}')


def of_photo(kind, line, photo, caption):
    "The same for a caption whose number is not known, and that lost the blanks around it"
    if kind == 'official': return line.partition('\t')[0].rpartition('#')[0] == photo and line.partition('\t')[2].strip() == caption
    if kind == 'flickr30k' and line.split('|')[0].strip() != photo: return False
    return bare(line).startswith(bare(photo) + ',' if kind == 'kaggle' else '') and bare(line).endswith(bare(caption))


LINE_READERS = {'official': official_row, 'kaggle': kaggle_row, 'numbered': partial(kaggle_row, numbered=True),
                'flickr30k': flickr30k_row}


def check_lines(path, raw, kind):
    "Each row of `read_rows` must be said by a line, in the order of the lines; all lines are read or counted"
    skipped = Counter()
    try: rows = read_rows(path, LINE_READERS[kind], 'form', skipped)
    except UserError as error: return one_line(error, path)
    lines = lines_of(raw)
    left = iter(lines)
    for photo, number, caption in rows:
        assert any(says(kind, line, photo, number, caption) for line in left), (kind, photo, number, caption)
    missing = len(lines) - (lines[-1] == '') - len(rows) - sum(skipped.values())
    assert 0 <= missing <= 1, (kind, missing)                          # 1: a header
    return rows


class Twice(Exception): pass


def all_pairs(pairs):
    if len(dict(pairs)) < len(pairs): raise Twice
    return dict(pairs)


def same(a, b): return type(a) is type(b) and repr(a) == repr(b)                        # NaN is not equal to itself


def check_karpathy(path, raw):
    try: photos, rows = karpathy_rows(path, Counter())
    except UserError as error: return one_line(error, path)
    found = json.loads(raw, object_pairs_hook=all_pairs)               # a name twice in one object must have been refused
    told = {(i['filename'], s['raw'], i['split']) for i in found['images'] if isinstance(i, dict) and
            isinstance(i.get('filename'), str) and isinstance(i.get('split'), str) and isinstance(i.get('sentences'), list)
            for s in i['sentences'] if isinstance(s, dict) and isinstance(s.get('raw'), str)}
    assert {(p, c) for p, _, c in rows} <= {t[:2] for t in told}, rows
    return rows


def check_coco(path, raw):
    try: names, rows = coco_rows(path, Counter())
    except UserError as error: return one_line(error, path)
    found = json.loads(raw, object_pairs_hook=all_pairs)
    images = [i for i in found['images'] if isinstance(i, dict) and 'id' in i and isinstance(i.get('file_name'), str)]
    for name, number, caption in rows:
        notes = [a for a in found['annotations'] if isinstance(a, dict) and same(a.get('caption'), caption) and
                 same(a.get('id'), number)]
        assert any({i['file_name'] for i in images if same(i['id'], a.get('image_id'))} == {name} for a in notes), (name, caption)
    return rows


def check_lists(root, raws):
    "Photos of split lists; `raws` has the content of each list by split"
    try: split_of = read_split_lists(root)
    except UserError as error: return one_line(error, root)
    for photo, split in split_of.items(): assert is_listed(photo, split, raws), (photo, split)
    return split_of


def is_listed(photo, split, raws):
    names = {'dev': ('dev', 'val', 'validation'), 'train': ('train', 'restval')}.get(split, (split,))
    return any(photo == line.strip() for name in names if name in raws for line in lines_of(raws[name]))


PHOTOS = ('a.jpg', 'b.jpg', 'c d.png', 'ü.jpg')
LAYOUTS = {'Flickr8k.token.txt': 'official', 'captions.txt': 'kaggle', 'results.csv': 'flickr30k',
           'results_20130124.token': 'official', 'dataset.json': 'karpathy', 'annotations/captions_train2014.json': 'coco'}


def make_folder(root):
    "Photos that are never opened, and a folder for the notes"
    for folder in ('photos', 'annotations'): (root/folder).mkdir(parents=True, exist_ok=True)
    for name in PHOTOS: (root/'photos'/name).touch()


def check_folder(root, layout, raw, raws):
    "All of `load_dataset`: a caption of a photo must be said of it, and of a list's photos each is in the split that says so"
    for name in LAYOUTS: (root/name).unlink(missing_ok=True)
    for old in root.glob('Flickr_8k.*'): old.unlink()
    (root/layout).write_bytes(raw)
    for split, content in raws.items(): (root/f'Flickr_8k.{split}Images.txt').write_bytes(content)
    try: data = load_dataset(root)
    except UserError as error: return one_line(error, root)
    items = [(split, item) for split, items in data.splits.items() for item in items]
    assert len({item.image for _, item in items}) == len(items)        # each photo once
    kind = LAYOUTS[layout]
    if kind in ('karpathy', 'coco'):                                   # what the file says was checked there
        told = {(p, c.strip()) for p, _, c in {'karpathy': check_karpathy, 'coco': check_coco}[kind](root/layout, raw)}
    for split, item in items:
        name = item.image.name
        for caption in item.captions:
            if kind in ('karpathy', 'coco'): assert (name, caption) in told, (name, caption)
            else: assert any(of_photo(kind, line, name, caption) for line in lines_of(raw)), (name, caption)
        if layout in ('Flickr8k.token.txt', 'captions.txt') and any(line.strip() for r in raws.values() for line in lines_of(r)):
            assert is_listed(name, split, raws), (name, split)
    return data


# --- caption files, mutated

GOOD = {
    'official': ''.join(f'{n}#{k}\tA dog {k} runs , it is "wet" .\n' for n in PHOTOS for k in range(3)),
    'kaggle': 'image,caption\n' + ''.join(f'{n},"A dog {k} , running"\n{n},He said hi\n{n},"say ""hi"""\n' for n in PHOTOS for k in range(2)),
    'numbered': 'image_name,comment_number,comment\n' + ''.join(f'{n},{k},"A dog , {k}"\n' for n in PHOTOS for k in range(3)),
    'flickr30k': 'image_name| comment_number| comment\n' + ''.join(f'{n}| {k}| A dog | , {k} .\n{n}| {k + 4}   A cat\n' for n in PHOTOS for k in range(3)),
    'lists': ''.join(f'{n}\n' for n in PHOTOS),
    'karpathy': json.dumps({'dataset': 'x', 'images': [
        {'filename': n, 'split': s, 'sentences': [{'raw': f'A dog {k} .', 'sentid': 10*i + k, 'tokens': ['a']} for k in range(2)]}
        for i, (n, s) in enumerate(zip(PHOTOS, ('train', 'val', 'test', 'restval')))]}, indent=1),
    'coco': json.dumps({'info': {}, 'images': [{'id': i, 'file_name': n} for i, n in enumerate(PHOTOS)], 'annotations': [
        {'id': 10*i + k, 'image_id': i, 'caption': f'A dog {k} .'} for i in range(len(PHOTOS)) for k in range(2)]}, indent=1)}
TOKENS = [b'"', b'""', b',', b'|', b'| ', b'#', b'#0\t', b'\t', b'\n', b'\r\n', b'\r', b'\0', b'\xef\xbb\xbf', b'\xff\xfe', b'\xc3', b'{', b'}',
          b'[', b']', b':', b'null', b'true', b'1e400', b'NaN', b'-0', b'1.0', b'"id": 1, ', b'"image_id": 0, ', b'"file_name": "a.jpg", ',
          b'"filename": "b.jpg", ', b'"raw": "A cat"', b'"split": "test", ', b'\\ud800', b'\\u0000', b'a.jpg', b'b.jpg', b'image', '‮'.encode(),
          '\u2028'.encode(), b'\x0b', b'\x1b[2J', b'9'*40, '٣'.encode(), b' ', b'\\']


def mutated(raw, rng, tokens=TOKENS, most=6):
    "A file with a few of the accidents and tricks that happen to files"
    raw = bytearray(raw)
    for _ in range(rng.randint(1, most)):
        a, b = sorted((rng.randint(0, len(raw)), rng.randint(0, len(raw))))
        b = min(b, a + rng.choice((1, 4, 40, 400, len(raw))))
        what = rng.randrange(8)
        if what == 0 and raw: raw[min(a, len(raw) - 1)] ^= 1 << rng.randrange(8)                    # a bit flips
        elif what == 1: raw[a:b] = rng.randbytes(min(b - a, 64))                                    # other bytes
        elif what == 2: del raw[a:b]                                                                # a part is lost
        elif what == 3: raw[a:a] = raw[a:b]                                                         # … or comes twice
        elif what == 4: raw[a:a] = rng.choice(tokens)
        elif what == 5: raw[a:a + 1] = rng.choice(tokens)
        elif what == 6 and b > a: raw[a:b], raw[a:a] = b'', raw[a:b][::-1] if rng.random() < .1 else bytes(raw[a:b])
        elif what == 7:                                                                             # lines change places
            lines = bytes(raw).split(b'\n')
            i, k = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[i], lines[k] = lines[k], lines[i]
            raw = bytearray(b'\n'.join(lines))
    return bytes(raw)


def mutated_json(text, rng):
    "JSON with records that lost or changed a field, changed places, came twice, or have values of another kind"
    whole = json.loads(text)
    for _ in range(rng.randint(1, 4)):
        places, inside = [], [whole]
        while inside:
            here = inside.pop()
            for k, v in list(here.items() if isinstance(here, dict) else enumerate(here)):
                places.append((here, k))
                if isinstance(v, (dict, list)): inside.append(v)
        if not places: break
        (here, k), (there, j) = rng.choice(places), rng.choice(places)
        what = rng.randrange(5)
        if what == 0: del here[k]
        elif what == 1: here[k] = rng.choice((None, True, 1, 1.0, '1', -1, 2**70, '', ' ', [], {}, 'a.jpg', 'ü.jpg', '\ud800', '\0', [[]]))
        elif what == 2 and not isinstance(here[k], (dict, list)) and not isinstance(there[j], (dict, list)): here[k], there[j] = there[j], here[k]
        elif what == 3 and isinstance(here, list): here.insert(rng.randint(0, len(here)), json.loads(json.dumps(here[k])))
        elif isinstance(here, list): rng.shuffle(here)
    text = json.dumps(whole, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < .5)
    if rng.random() < .1: text = text.replace('"id": ', '"id": 7, "id": ', 1)
    return text.encode('utf-8', 'surrogatepass')


def broken(kind, rng):
    "A good file of a kind, mutated"
    if kind in ('karpathy', 'coco') and rng.random() < .7: return mutated_json(GOOD[kind], rng)
    return mutated(GOOD[kind].encode(), rng, most=3)


def caption_round(root, rng):
    "One mutated file for each reader, and a folder with mutated lists; gives what came of each"
    path, seen = root/'notes.txt', {}
    for kind in (*LINE_READERS, 'karpathy', 'coco'):
        raw = broken(kind, rng)
        path.write_bytes(raw)
        check = {'karpathy': check_karpathy, 'coco': check_coco}.get(kind) or partial(check_lines, kind=kind)
        seen[kind] = what_came(check, path, raw)
    raws = {s: mutated(GOOD['lists'].encode()[:20*i], rng) for i, s in enumerate(('train', 'dev', 'test')) if rng.random() < .8}
    lists = root/'lists'
    lists.mkdir(exist_ok=True)
    for old in lists.iterdir(): old.unlink()
    for split, content in raws.items(): (lists/f'Flickr_8k.{split}Images.txt').write_bytes(content)
    seen['lists'] = what_came(check_lists, lists, raws)
    layout = rng.choice(list(LAYOUTS))
    raw = broken(rng.choice((LAYOUTS[layout],)*20 + tuple(GOOD)), rng)
    seen['folder'] = what_came(check_folder, root/'data', layout, raw, raws if rng.random() < .5 else {})
    return seen


def captions(n, seed):
    rng, root, read, start = random.Random(seed), Path(tempfile.mkdtemp(dir=fast_folder())), Counter(), time.time()
    make_folder(root/'data')
    try:
        for _ in range(n): read.update(caption_round(root, rng).items())
    finally: shutil.rmtree(root)
    of = lambda what: {k: read[k, what] for k in READERS}
    return {'files_for_each_reader': n, 'seed': seed, 'read_rightly': of('read'), 'refused_in_one_line': of('refused'),
            **{what: of(what) for what in ('crashes', 'hangs', 'read_wrong')}, 'peak_mb': peak_mb(), 'seconds': round(time.time() - start)}


def many_lines(n):
    "Memory of a process of its own that reads Flickr8k's kind of file with `n` captions, and gathers them by photo"
    root = Path(tempfile.mkdtemp(dir=fast_folder()))
    try:
        with open(root/'a.txt', 'w') as f:
            for i in range(n): f.write(f'{i//5:012d}_photo.jpg#{i % 5}\tA dog number {i} runs over the green grass beside a river .\n')
        r = subprocess.run([sys.executable, '-c', WEIGH, root/'a.txt'], capture_output=True, text=True, check=True)
        size = (root/'a.txt').stat().st_size/2**20
    finally: shutil.rmtree(root)
    before, read, gathered, captions, seconds = map(float, r.stdout.split())
    return {'lines': n, 'captions': int(captions), 'file_mb': round(size, 1), 'grown_mb': round(gathered - before, 1),
            'grown_per_byte': round((gathered - before)/size, 2), 'peak_mb': round(gathered), 'seconds': round(seconds, 1)}


WEIGH = """
import resource, sys, time
from collections import Counter
from pathlib import Path
from multimodal.captionfiles import official_row, read_rows
from multimodal.datasets import gather_captions
mb = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
before, start = mb(), time.time()
rows = read_rows(Path(sys.argv[1]), official_row, 'form', Counter())
read, captions = mb(), gather_captions(rows, Counter())
print(before, read, mb(), sum(map(len, captions.values())), time.time() - start)
"""


def largest_photo():
    "Time and memory of a process of its own that loads a see-through PNG with as many pixels as are let in"
    from PIL import Image
    side, root = math.isqrt(Image.MAX_IMAGE_PIXELS), Path(tempfile.mkdtemp(dir=fast_folder()))
    try:
        Image.new('RGBA', (side, side), (200, 100, 50, 90)).save(root/'a.png')
        size = (root/'a.png').stat().st_size
        r = subprocess.run([sys.executable, '-c', WEIGH_PHOTO, root/'a.png'], capture_output=True, text=True, check=True)
    finally: shutil.rmtree(root)
    peak, seconds = map(float, r.stdout.split())
    return {'side': side, 'file_kb': round(size/1000), 'peak_mb': round(peak), 'seconds': round(seconds, 1)}


WEIGH_PHOTO = """
import resource, sys, time
from multimodal.core import load_image
start = time.time()
load_image(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024, time.time() - start)
"""


def fast_folder(): return '/dev/shm' if os.access('/dev/shm', os.W_OK) else None


# --- guided by coverage

def grown_json(p, depth=0):
    "JSON in the shape of a caption file, as far as the bytes go"
    kind = p.ConsumeIntInRange(0, 9)
    if kind < 3 and depth < 5:
        keys = ['images', 'annotations', 'id', 'image_id', 'file_name', 'filename', 'caption', 'raw', 'split', 'sentences', 'sentid']
        return '{' + ','.join(f'{json.dumps(p.PickValueInList(keys))}:{grown_json(p, depth + 1)}' for _ in range(p.ConsumeIntInRange(0, 5))) + '}'
    if kind < 5 and depth < 5: return '[' + ','.join(grown_json(p, depth + 1) for _ in range(p.ConsumeIntInRange(0, 4))) + ']'
    if kind == 5: return p.PickValueInList(['0', '1', '1.0', 'true', 'null', 'NaN', '1e400', '-0', '"0"', '"1"'])
    if kind == 6: return json.dumps(p.PickValueInList(list(PHOTOS)))
    if kind == 7: return json.dumps(p.PickValueInList(['train', 'val', 'test', 'restval', 'dev']))
    if kind == 8: return json.dumps(p.ConsumeUnicode(8))
    return json.dumps(p.PickValueInList(['A dog .', 'A cat .', '', ' ']))


def records(p):
    "A whole caption file of this shape: lists of records, each with what belongs there or something else"
    one = lambda right: grown_json(p, 3) if p.ConsumeIntInRange(0, 7) == 0 else right()
    number, name = lambda: str(p.ConsumeIntInRange(0, 3)), lambda: json.dumps(p.PickValueInList(list(PHOTOS)))
    text = lambda: json.dumps(p.ConsumeUnicode(6))
    fields = {'images': {'id': number, 'file_name': name}, 'annotations': {'id': number, 'image_id': number, 'caption': text},
              'sentences': {'raw': text, 'sentid': number}}
    record = lambda kind: '{' + ','.join(f'"{k}":{one(v)}' for k, v in fields[kind].items() if p.ConsumeIntInRange(0, 15)) + '}'
    many = lambda make: '[' + ','.join(make() for _ in range(p.ConsumeIntInRange(0, 5))) + ']'
    if p.ConsumeBool(): return f'{{"images":{many(lambda: record("images"))},"annotations":{many(lambda: record("annotations"))}}}'
    split = lambda: json.dumps(p.PickValueInList(['train', 'val', 'test', 'restval', 'dev', '', 'x']))
    return '{"images":' + many(lambda: f'{{"filename":{one(name)},"split":{one(split)},"sentences":'
                                       f'{one(lambda: many(lambda: record("sentences")))}}}') + '}'


def any_json(p):
    way = p.ConsumeIntInRange(0, 2)
    if way == 2: return p.ConsumeBytes(p.remaining_bytes())
    return (records(p) if way else grown_json(p)).encode('utf-8', 'surrogatepass')


def guided(which, arguments):
    root = Path(tempfile.mkdtemp(dir=fast_folder()))
    make_folder(root/'data')
    path = root/'notes.txt'

    def lines(data):
        path.write_bytes(data)
        check_lines(path, data, which)

    def notes(data):
        raw = any_json(atheris.FuzzedDataProvider(data))
        path.write_bytes(raw)
        {'karpathy': check_karpathy, 'coco': check_coco}[which](path, raw)

    def lists(data):
        raws = dict(zip(('train', 'dev', 'test', 'val'), data.split(b'\xff')))      # a byte that UTF-8 does not have
        for old in (root/'data').glob('Flickr_8k.*'): old.unlink()
        for split, content in raws.items(): (root/'data'/f'Flickr_8k.{split}Images.txt').write_bytes(content)
        check_lists(root/'data', raws)

    def folder(data):
        p = atheris.FuzzedDataProvider(data)
        layout = p.PickValueInList(list(LAYOUTS))
        raws = {s: p.ConsumeBytes(p.ConsumeIntInRange(0, 40)) for s in ('train', 'dev', 'test', 'val') if p.ConsumeBool()}
        raw = any_json(p) if layout.endswith('json') and p.ConsumeBool() else p.ConsumeBytes(p.remaining_bytes())
        check_folder(root/'data', layout, raw, raws)

    targets = {**dict.fromkeys(LINE_READERS, lines), 'karpathy': notes, 'coco': notes, 'lists': lists, 'folder': folder}
    atheris.Setup([sys.argv[0], *arguments], targets[which])
    atheris.Fuzz()


READERS = (*LINE_READERS, 'karpathy', 'coco', 'lists', 'folder')


def begin_with(which):
    "Good files, as the target of a reader takes them: what `FuzzedDataProvider` decides is read from the end"
    if which in ('karpathy', 'coco'): return [GOOD[which].encode() + b'\2']
    if which == 'lists': return [GOOD['lists'].encode(), b'a.jpg\xffb.jpg\xffc d.png\n\xff' + PHOTOS[3].encode()]
    if which == 'folder': return [GOOD[k].encode() + bytes([0]*(4 + name.endswith('json')) + [i]) for i, (name, k) in enumerate(LAYOUTS.items())]
    return [GOOD[which].encode()]


def reader(which, minutes):
    "Run `guided` in a process of its own, with good files to begin with; gives what libFuzzer counted. It stops at the first it finds"
    home = Path(tempfile.mkdtemp(prefix=which))
    (home/'corpus').mkdir()
    for i, raw in enumerate(begin_with(which)): (home/'corpus'/f'good_{i}').write_bytes(raw)
    (home/'dict').write_text(''.join('"' + ''.join(f'\\x{b:02x}' for b in token) + '"\n' for token in TOKENS))
    arguments = [f'-max_total_time={round(60*minutes)}', '-max_len=2000', f'-timeout={HANG}', '-rss_limit_mb=2048', '-print_final_stats=1',
                 f'-dict={home}/dict', f'-artifact_prefix={home}/found_', str(home/'corpus')]
    start = time.time()
    r = subprocess.run([sys.executable, __file__, 'guided', which, *arguments], capture_output=True, text=True, errors='replace')
    said = r.stderr + r.stdout
    if r.returncode: print(f'{which}: {said[-6000:]}', file=sys.stderr)
    stat = lambda name: int(re.search(rf'stat::{name}:\s+(\d+)', said)[1])
    ways, at_start, bad = re.findall(r'cov: (\d+)', said), re.search(r'INITED cov: (\d+)', said), len(list(home.glob('found_*')))
    if not bad: shutil.rmtree(home)
    return {'minutes': round((time.time() - start)/60, 1), 'files': stat('number_of_executed_units'), 'edges_at_start': int(at_start[1]),
            'edges': int(ways[-1]), 'peak_mb': stat('peak_rss_mb'), 'bad_files': max(bad, r.returncode != 0),
            'with': f'atheris {version("atheris")}, libFuzzer'}


def readers(which, minutes, at_once):
    "Each of these readers by itself; yields (its name, what was counted) as they come to an end"
    with ThreadPoolExecutor(at_once) as pool:
        for name, found in zip(which, pool.map(partial(reader, minutes=minutes), which)): yield name, found


# --- photos

def profile_of(red, green, blue, gamma):
    "A profile (ICC, version 2) of a screen with these primaries, as X, Y and Z under D50 each"
    s15 = lambda v: struct.pack('>i', round(v*65536))
    xyz = lambda v: b'XYZ \0\0\0\0' + b''.join(map(s15, v))
    name = b'Wide\0'
    tags = {b'desc': b'desc\0\0\0\0' + struct.pack('>I', len(name)) + name + bytes(78), b'cprt': b'text\0\0\0\0none\0',
            b'wtpt': xyz((.9642, 1, .8249)), b'rXYZ': xyz(red), b'gXYZ': xyz(green), b'bXYZ': xyz(blue),
            **{k: b'curv\0\0\0\0' + struct.pack('>IH', 1, round(gamma*256)) for k in (b'rTRC', b'gTRC', b'bTRC')}}
    table, body, start = struct.pack('>I', len(tags)), b'', 132 + 12*len(tags)
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack('>II', start + len(body), len(data))
        body += data
    head = struct.pack('>I4sI4s4s4s', start + len(body), b'none', 0x02100000, b'mntr', b'RGB ', b'XYZ ') + bytes(12) + b'acsp'
    return (head + bytes(28) + struct.pack('>iii', 63190, 65536, 54061)).ljust(128, b'\0') + table + body


ADOBE = profile_of((.60974, .31111, .01947), (.20528, .62567, .06087), (.14919, .06322, .74457), 2.19921875)


def seeds():
    "Small photos of all kinds of JPEG and PNG, with notes and profiles"
    from PIL import Image
    wave = Image.radial_gradient('L').resize((48, 40))
    rgb = Image.merge('RGB', (wave, wave.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.linear_gradient('L').resize((48, 40))))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010e] = 'a note'
    ways = [('JPEG', rgb, {}), ('JPEG', rgb, dict(progressive=True, quality=90)), ('JPEG', wave, dict(optimize=True)),
            ('JPEG', rgb.convert('CMYK'), {}), ('JPEG', rgb, dict(exif=exif, icc_profile=ADOBE, subsampling=0)),
            ('PNG', rgb, {}), ('PNG', rgb.convert('P'), dict(transparency=3)), ('PNG', rgb.convert('RGBA'), {}), ('PNG', wave.convert('1'), {}),
            ('PNG', wave.convert('I').point(lambda v: v*257 + 0).convert('I;16'), {}),
            ('PNG', rgb, dict(icc_profile=ADOBE, exif=exif)),
            ('PNG', rgb, dict(save_all=True, append_images=[rgb.rotate(90)]))]
    found = []
    for kind, image, how in ways:
        image.save(file := io.BytesIO(), kind, **how)
        found.append((kind, file.getvalue()))
    return found


def parts_of(kind, raw):
    "Where each segment of a JPEG, or each chunk of a PNG, begins and ends"
    found, at = [], 2 if kind == 'JPEG' else 8
    while at + 4 <= len(raw):
        if kind == 'PNG': end = at + 12 + int.from_bytes(raw[at:at + 4], 'big')
        elif raw[at + 1] == 0xda:                                          # a scan goes on to the next marker
            end = at + 2
            while end + 1 < len(raw) and not (raw[end] == 0xff and raw[end + 1] not in (0, *range(0xd0, 0xd8))): end += 1
        else: end = at + 2 + int.from_bytes(raw[at + 2:at + 4], 'big')
        found.append((at, min(end, len(raw))))
        at = end
    return found


def mutated_photo(kind, raw, rng):
    "Bits, bytes, segments, lengths and sizes go wrong; half of the PNGs get checksums that are right again"
    raw, parts = bytearray(raw), parts_of(kind, raw)
    for _ in range(rng.randint(1, 4)):
        what, (a, b) = rng.randrange(8), rng.choice(parts)
        at = rng.randrange(len(raw))
        if what == 0: raw[at] ^= 1 << rng.randrange(8)
        elif what == 1: raw[at:at + rng.randint(1, 8)] = rng.randbytes(rng.randint(1, 8))
        elif what == 2: del raw[a:b]
        elif what == 3: raw[b:b] = raw[a:b]*rng.choice((1, 1, 1, 20, 200))
        elif what == 4: raw[a + 2*(kind == 'JPEG'):a + 4] = rng.randbytes(2 if kind == 'JPEG' else 4)
        elif what == 5: raw[a + 4:b] = rng.randbytes(max(0, min(b - a - 4, 400)))
        elif what == 6: del raw[at:]
        elif what == 7:                                                    # the size that it claims
            mark = raw.find(b'\xff\xc0') if kind == 'JPEG' else raw.find(b'IHDR') - 1
            if mark >= 0: raw[mark + 5:mark + (9 if kind == 'JPEG' else 13)] = b''.join(
                rng.choice((0, 1, 48, 3000, 9000, 30_000, 65_535)).to_bytes(2 if kind == 'JPEG' else 4, 'big') for _ in range(2))
        if len(raw) < 20: break
    if kind == 'PNG' and rng.random() < .5:
        at = 8
        while at + 12 <= len(raw):
            n = int.from_bytes(raw[at:at + 4], 'big')
            if at + 12 + n > len(raw): break
            raw[at + 8 + n:at + 12 + n] = zlib.crc32(raw[at + 4:at + 8 + n]).to_bytes(4, 'big')
            at += 12 + n
    return bytes(raw)


def check_photo(path):
    "A photo in RGB, or one line that names the file; gives which"
    try: photo = load_image(path)
    except UserError as error: return one_line(error, path)
    assert photo.mode == 'RGB' and photo.width*photo.height > 0
    photo.tobytes()
    return photo


def images(n, seed, seeds=seeds):
    rng, root, read, start, slowest, good = random.Random(seed), Path(tempfile.mkdtemp(dir=fast_folder())), Counter(), time.time(), 0, seeds()
    before = peak_anew()
    try:
        for i in range(n):
            kind, raw = good[i % len(good)]
            (root/'a.jpg').write_bytes(mutated_photo(kind, raw, rng))
            began = time.time()
            read[kind, what_came(check_photo, root/'a.jpg')] += 1
            slowest = max(slowest, time.time() - began)
    finally: shutil.rmtree(root)
    kinds = {kind: {what: read[kind, what] for what in ('read', 'refused', 'crashes', 'hangs', 'read_wrong')} for kind in ('JPEG', 'PNG')}
    return {'files': n, 'seed': seed, 'by_kind': kinds, 'slowest_seconds': round(slowest, 2), 'peak_mb': peak_mb(), 'peak_mb_before': before,
            'seconds': round(time.time() - start)}


# --- the command line

TROUBLES, STATUS = ('crashes', 'hangs', 'read_wrong', 'bad_files'), []


def keep(out, name, found):
    about = f'Python {platform.python_version()}, {os.cpu_count()} cores, one used'
    print(json.dumps({name: found}, indent=1, ensure_ascii=False))
    if in_trouble(found): STATUS.append(name)
    if not out: return
    kept = json.loads(Path(out).read_text()) if Path(out).exists() else {}
    new = {name: {'command': 'python tools/fuzz.py ' + ' '.join(sys.argv[1:]), 'on': about, **found}}
    kept['strangers'] = {**kept.get('strangers', {}), **new}
    Path(out).write_text(json.dumps(kept, indent=1, ensure_ascii=False) + '\n')


def in_trouble(found, counts=False):
    "Is anything counted, in any of these dictionaries, that must not be?"
    bad = lambda k: counts or k in TROUBLES
    return any(in_trouble(v, bad(k)) if isinstance(v, dict) else bad(k) and v for k, v in found.items())


def main():
    if GUIDED: return guided(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('what', choices=['images', 'captions', 'readers', 'million', 'largest'])
    parser.add_argument('--n', type=int, default=10_000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--which', nargs='+', choices=READERS, default=READERS)
    parser.add_argument('--minutes', type=float, default=20)
    parser.add_argument('--at-once', type=int, default=1)
    parser.add_argument('--out')
    a = parser.parse_args()
    if a.what == 'captions': keep(a.out, 'captions', captions(a.n, a.seed))
    if a.what == 'images': keep(a.out, 'images', images(a.n, a.seed))
    if a.what == 'million': keep(a.out, 'a_million_lines', many_lines(1_000_000))
    if a.what == 'largest': keep(a.out, 'the_largest_photo', largest_photo())
    for name, found in readers(a.which, a.minutes, a.at_once) if a.what == 'readers' else (): keep(a.out, f'guided_{name}', found)
    if STATUS: sys.exit(f'not as it should be: {", ".join(STATUS)}')


if __name__ == '__main__': main()
