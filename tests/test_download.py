"""Broken lines are resumed, wrong files refused, and archives write nowhere but into their folder, whatever is in them."""
import hashlib, http.server, os, shutil, signal, subprocess, sys, sysconfig, threading, time, warnings, zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from multimodal.archives import unpack
from multimodal.core import UserError
from multimodal.datasets import read_flickr8k
from multimodal.download import Patience, download, fetch_flickr8k

CONTENT = bytes(range(256))*3000
MD5, SHA = hashlib.md5(CONTENT).hexdigest(), hashlib.sha256(CONTENT).hexdigest()
HURRY = Patience(pause=0, timeout=5)


class Server(http.server.ThreadingHTTPServer):
    "Hands out `files`; `misbehave(handler, content, start)` may answer in its place. `asked` has every path and range."
    daemon_threads = True
    def __init__(self):
        self.files, self.asked, self.misbehave = {'/a.bin': CONTENT}, [], None
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
    def handle_error(self, *args): pass


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        wanted = self.headers.get('Range')
        self.server.asked.append((self.path, wanted))
        content, start = self.server.files.get(self.path), int(wanted[6:].split('-')[0]) if wanted else 0
        if content is None: return self.send_error(404)
        if self.server.misbehave and self.server.misbehave(self, content, start): return
        if start >= len(content) > 0: return self.send_error(416)
        self.give(content[start:], start, len(content))
    def give(self, body, start, total, promise=None, status=None):
        self.send_response(status or (206 if start else 200))
        if start: self.send_header('Content-Range', f'bytes {start}-{total - 1}/{total}')
        self.send_header('Content-Length', str(len(body) if promise is None else promise))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def half(handler, content, start):
    "Cut the line half way, the first time"
    if start or len(handler.server.asked) > 1: return False
    handler.give(content[:len(content)//2], 0, len(content), promise=len(content))
    return True


def files(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())


@pytest.mark.parametrize('checksum', [MD5, SHA, SHA.upper(), None])
def test_a_cut_connection_is_resumed_where_it_broke(server, tmp_path, checksum):
    server.misbehave = half
    assert download(f'{server.url}/a.bin', tmp_path/'new'/'a.bin', checksum, HURRY).read_bytes() == CONTENT
    assert server.asked == [('/a.bin', None), ('/a.bin', f'bytes={len(CONTENT)//2}-')]
    assert files(tmp_path) == ['new/a.bin']


def test_the_next_call_goes_on_too_and_a_whole_file_asks_nobody(server, tmp_path):
    server.misbehave = half
    with pytest.raises(UserError, match=f'{len(CONTENT)//2:,} bytes are kept.*broke off'):
        download(f'{server.url}/a.bin', tmp_path/'a.bin', MD5, Patience(tries=0, pause=0))
    assert files(tmp_path) == ['a.bin.part']
    download(f'{server.url}/a.bin', tmp_path/'a.bin', MD5, HURRY)
    download(f'{server.url}/a.bin', tmp_path/'a.bin', MD5, HURRY)
    assert len(server.asked) == 2 and server.asked[1][1]


def test_many_small_steps_are_as_good_as_one(server, tmp_path):
    "More breaks than tries: as long as each brings something, we go on"
    def stingy(handler, content, start):
        handler.give(content[start:start + 60_000], start, len(content), promise=len(content) - start)
        return True
    server.misbehave = stingy
    assert download(f'{server.url}/a.bin', tmp_path/'a.bin', MD5, HURRY).read_bytes() == CONTENT
    assert len(server.asked) == 13


def test_a_server_that_only_ever_gives_half_ends(server, tmp_path):
    "No ranges, and every answer breaks: an end, not a loop"
    def broken(handler, content, start):
        handler.give(content[:len(content)//2], 0, len(content), promise=len(content), status=200)
        return True
    server.misbehave = broken
    with pytest.raises(UserError, match='broke off'): download(f'{server.url}/a.bin', tmp_path/'a.bin', MD5, HURRY)
    assert len(server.asked) == 4


def test_a_server_without_ranges(server, tmp_path):
    (tmp_path/'a.bin.part').write_bytes(CONTENT[:5000])
    server.misbehave = lambda handler, content, start: handler.give(content, 0, len(content), status=200) or True
    assert download(f'{server.url}/a.bin', tmp_path/'a.bin', MD5, HURRY).read_bytes() == CONTENT


def test_a_server_that_sends_another_part_than_asked(server, tmp_path):
    (tmp_path/'a.bin.part').write_bytes(CONTENT[:5000])
    server.misbehave = lambda handler, content, start: handler.give(content[10:], 10, len(content)) or True
    with pytest.raises(UserError, match='another part'): download(f'{server.url}/a.bin', tmp_path/'a.bin', MD5, HURRY)
    assert files(tmp_path) == ['a.bin.part']


def test_a_server_that_falls_silent(server, tmp_path):
    def asleep(handler, content, start):
        handler.give(content[:1000], 0, len(content), promise=len(content))
        time.sleep(1)
        return True
    server.misbehave = asleep
    with pytest.raises(UserError, match='timed out'):
        download(f'{server.url}/a.bin', tmp_path/'a.bin', MD5, Patience(tries=1, pause=0, timeout=.2))


def test_mirrors(server, tmp_path):
    server.files['/wrong'] = b'something else'
    urls = [f'{server.url}/gone', f'{server.url}/wrong', 'http://127.0.0.1:1/off', f'{server.url}/a.bin']
    download(urls, tmp_path/'a.bin', MD5, HURRY)
    assert [path for path, _ in server.asked] == ['/gone', '/wrong', '/a.bin']       # gone and wrong were asked once
    with pytest.raises(UserError) as error: download(urls[:3], tmp_path/'b.bin', MD5, HURRY)
    for words in ('404', 'should be ' + MD5, 'refused'): assert words in str(error.value)
    assert files(tmp_path) == ['a.bin']


@pytest.mark.parametrize('part', [CONTENT, CONTENT + b'more', b'other' + CONTENT[5:9000], b''], ids=['whole', 'longer', 'wrong', 'empty'])
def test_whatever_part_was_left_over(server, tmp_path, part):
    (tmp_path/'a.bin.part').write_bytes(part)
    assert download(f'{server.url}/a.bin', tmp_path/'a.bin', SHA, HURRY).read_bytes() == CONTENT
    assert files(tmp_path) == ['a.bin']


def test_a_part_without_checksum_is_not_trusted(server, tmp_path):
    (tmp_path/'a.bin.part').write_bytes(b'of another file')
    assert download(f'{server.url}/a.bin', tmp_path/'a.bin', patience=HURRY).read_bytes() == CONTENT


def test_a_wrong_file_that_is_there_is_replaced_by_the_right_one_only(server, tmp_path):
    (tmp_path/'a.bin').write_bytes(b'old')
    with pytest.raises(UserError): download(f'{server.url}/gone', tmp_path/'a.bin', MD5, HURRY)
    assert (tmp_path/'a.bin').read_bytes() == b'old'
    assert download(f'{server.url}/a.bin', tmp_path/'a.bin', MD5, HURRY).read_bytes() == CONTENT


def test_files_of_this_machine_and_odd_names(server, tmp_path):
    odd = tmp_path/'a folder, ünd so'
    odd.mkdir()
    (odd/'x y.bin').write_bytes(CONTENT)
    download((odd/'x y.bin').as_uri(), tmp_path/'1', MD5, HURRY)
    download(f'file://{odd}/x y.bin', tmp_path/'2', MD5, HURRY)
    server.files['/%C3%BC%20x'] = CONTENT
    download(f'{server.url}/ü x', tmp_path/'3', MD5, HURRY)
    with pytest.raises(UserError, match='No such file'): download(f'file://{odd}/gone', tmp_path/'4', MD5, HURRY)


@pytest.mark.parametrize('url', ['ftp://x/y', 'data:,x', '/etc/passwd', '', 'http:/x', 'http://[', 'http://127.0.0.1:none/x', 'http://'])
def test_addresses_that_are_none(tmp_path, url):
    with pytest.raises(UserError): download(url, tmp_path/'a', patience=Patience(tries=1, pause=0))
    assert files(tmp_path) == []


@pytest.mark.parametrize('checksum', ['abc', 'g'*32, MD5 + ' ', '٣'*32])
def test_checksums_that_are_none_are_refused_before_the_download(server, tmp_path, checksum):
    with pytest.raises(UserError, match='hexadecimal'): download(f'{server.url}/a.bin', tmp_path/'a', checksum)
    assert not server.asked


def test_our_own_side_fails(server, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'): download(f'{server.url}/a.bin', tmp_path/'file'/'a', MD5, HURRY)
    with pytest.raises(UserError, match='over 1,000'): download(f'{server.url}/a.bin', tmp_path/'a', MD5, Patience(max_bytes=1000))
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9, 999))
    with pytest.raises(UserError, match='999 are free'): download(f'{server.url}/a.bin', tmp_path/'a', MD5, HURRY)
    assert len(server.asked) == 2                                             # not asked again when the fault is ours


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_disk_full_while_writing(server, tmp_path):
    (tmp_path/'a.part').symlink_to('/dev/full')
    with pytest.raises(UserError, match='No space left'): download(f'{server.url}/a.bin', tmp_path/'a', MD5, HURRY)
    assert len(server.asked) == 1


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_killed_half_way_and_begun_again(server, tmp_path, how):
    def slow(handler, content, start):
        if start: return False
        handler.give(content[:500_000], 0, len(content), promise=len(content))
        time.sleep(5)
        return True
    server.misbehave = slow
    code = f'from multimodal.download import download; download({server.url + "/a.bin"!r}, {str(tmp_path/"a.bin")!r}, {MD5!r})'
    process = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL)
    part = tmp_path/'a.bin.part'
    for _ in range(1000):
        if part.exists() and part.stat().st_size > 200_000: break
        time.sleep(.01)
    process.send_signal(how)
    assert process.wait(10) != 0 and files(tmp_path) == ['a.bin.part']
    assert download(f'{server.url}/a.bin', tmp_path/'a.bin', MD5, HURRY).read_bytes() == CONTENT
    assert server.asked[-1][1]


# archives

def pack(path, entries):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, text in entries: archive.writestr(name, text)
    return path


@pytest.mark.parametrize('name', ['../x', '/x', 'a/../../x', 'C:x', 'C:\\x', '..\\x', '\\x', 'a/..', '..', '//x/y'])
def test_names_that_lead_outside_are_refused_with_all_others(tmp_path, name):
    with pytest.raises(UserError, match='outside'): unpack(pack(tmp_path/'x.zip', [('fine', 'x'), (name, 'x')]), tmp_path/'out')
    assert files(tmp_path) == ['x.zip']


PARTS = st.sampled_from(['..', '.', '', 'a', 'b', 'C:', '~', '\\', '..\\x', '⁄', ' ', 'a'*300])
NAMES = st.lists(PARTS | st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=4), min_size=1, max_size=5)

@settings(max_examples=150, deadline=None, database=None)
@given(st.lists(st.tuples(NAMES.map('/'.join).filter(bool), st.binary(max_size=9)), max_size=4))
def test_no_name_leads_outside(tmp_path_factory, entries):
    home = tmp_path_factory.mktemp('zip')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                       # of names that come twice
        pack(home/'x.zip', entries)
    try: unpack(home/'x.zip', home/'in'/'out')
    except UserError: assert files(home) == ['x.zip'] and not (home/'in'/'out').exists()
    else: assert set(files(home)) == {'x.zip', *(f'in/out/{f}' for f in files(home/'in'/'out'))}
    shutil.rmtree(home)


@pytest.mark.parametrize('damage', [0x00, 0xff, 'cut'])
def test_a_damaged_archive_is_whole_or_refused(tmp_path, damage):
    "Each byte in turn, and each length"
    raw, fine = pack(tmp_path/'x.zip', [('a/b.txt', 'hello '*50), ('c.txt', 'x')]).read_bytes(), 0
    for i in range(len(raw)):
        (tmp_path/'x.zip').write_bytes(raw[:i] if damage == 'cut' else raw[:i] + bytes([damage]) + raw[i + 1:])
        try: fine += unpack(tmp_path/'x.zip', tmp_path/'out').is_dir()
        except UserError: assert files(tmp_path) == ['x.zip'], i
        shutil.rmtree(tmp_path/'out', ignore_errors=True)
    assert fine < len(raw)*.8


def test_archives_with_links_passwords_or_too_much(tmp_path):
    link = zipfile.ZipInfo('link')
    link.external_attr = 0o120777 << 16
    with pytest.raises(UserError, match='is a link'): unpack(pack(tmp_path/'x.zip', [(link, '/etc/passwd')]), tmp_path/'out')
    pack(tmp_path/'x.zip', [('a', '0'*10**6)])
    with pytest.raises(UserError, match='unpacks to more'): unpack(tmp_path/'x.zip', tmp_path/'out', max_bytes=10**5)
    secret = bytearray((tmp_path/'x.zip').read_bytes())
    secret[6] |= 1                                                              # says that it is encrypted, in both places
    secret[secret.index(b'PK\1\2') + 8] |= 1
    (tmp_path/'x.zip').write_bytes(secret)
    with pytest.raises(UserError, match='password'): unpack(tmp_path/'x.zip', tmp_path/'out')
    (tmp_path/'taken').write_text('mine')
    with pytest.raises(UserError, match='not empty'): unpack(pack(tmp_path/'y.zip', [('a', 'x')]), tmp_path/'taken')
    with pytest.raises(UserError, match='cannot be written'): unpack(tmp_path/'y.zip', tmp_path/'taken'/'deeper')
    assert files(tmp_path) == ['taken', 'x.zip', 'y.zip']


# Flickr8k

@pytest.fixture
def mirror(server, tmp_path):
    "A tiny Flickr8k on a server that cuts each archive half way, once; gives its sums"
    photos = pack(tmp_path/'p.zip', [(f'Flicker8k_Dataset/{n}.jpg', os.urandom(30_000)) for n in 'abc'] + [('__MACOSX/x', '')])
    text = pack(tmp_path/'t.zip', [('Flickr8k.token.txt', ''.join(f'{n}.jpg#0\tPhoto {n} .\n' for n in 'abc')), ('__MACOSX/x', ''),
                *((f'Flickr_8k.{s}Images.txt', f'{n}.jpg\n') for s, n in zip(('train', 'dev', 'test'), 'abc'))])
    server.files = {'/m/Flickr8k_Dataset.zip': photos.read_bytes(), '/m/Flickr8k_text.zip': text.read_bytes()}
    def cut(handler, content, start):
        if start or [path for path, _ in handler.server.asked].count(handler.path) > 1: return False
        handler.give(content[:len(content)//2], 0, len(content), promise=len(content))
        return True
    server.misbehave = cut
    return ','.join(hashlib.sha256(p.read_bytes()).hexdigest() for p in (photos, text))


def test_flickr8k_over_a_line_that_breaks(server, mirror, tmp_path):
    root, said = tmp_path/'data'/'flickr8k', []
    data = read_flickr8k(fetch_flickr8k(root, server.url + '/m/', mirror, say=said.append))
    assert {split: len(items) for split, items in data.splits.items()} == dict(train=1, dev=1, test=1)
    assert 'research and education only' in said[0] and os.listdir(root.parent) == ['flickr8k']
    assert [bool(wanted) for _, wanted in server.asked] == [False, True, False, True]
    fetch_flickr8k(root, server.url, mirror)
    assert len(server.asked) == 4


def test_flickr8k_refuses_what_is_not_flickr8k(server, mirror, tmp_path):
    root, silent = tmp_path/'data'/'flickr8k', lambda line: None
    with pytest.raises(UserError, match='f18a1e2920de5bd84dae7cf08ec78978'): fetch_flickr8k(root, server.url + '/m', say=silent)
    with pytest.raises(UserError, match='two with a comma'): fetch_flickr8k(root, server.url, MD5)
    with pytest.raises(UserError, match='goes with url'): fetch_flickr8k(root, checksum=mirror)
    assert not root.exists()
    empty = pack(tmp_path/'e.zip', [('readme.txt', 'hello')]).read_bytes()
    server.files = dict.fromkeys(server.files, empty)
    sums = ','.join([hashlib.md5(empty).hexdigest()]*2)
    with pytest.raises(UserError, match='hold no Flickr8k'): fetch_flickr8k(root, server.url + '/m', sums, say=silent)
    assert not root.exists()
    root.mkdir(parents=True)
    (root/'mine.txt').write_text('mine')
    with pytest.raises(UserError, match='not empty'): fetch_flickr8k(root, server.url + '/m', mirror)
    assert files(root) == ['mine.txt']


def test_the_command(server, mirror, tmp_path):
    command = [Path(sysconfig.get_path('scripts'))/'mm_download', 'flickr8k', '--root', tmp_path/'d']
    def run(*args): return subprocess.run([*command, *args], capture_output=True, text=True)
    wrong = run('--url', server.url + '/m')
    assert wrong.returncode == 2 and '--checksum' in wrong.stderr.splitlines()[-1]
    wrong = run('--url', server.url + '/m', '--checksum', f'{MD5},{MD5}')
    assert (wrong.returncode, wrong.stderr.count('\n')) == (2, 1) and 'should be ' + MD5 in wrong.stderr, wrong.stderr
    right = run('--url', server.url + '/m', '--checksum', mirror)
    assert right.returncode == 0 and 'train' in right.stdout and right.stderr == '', right.stderr


def test_the_real_archives(tmp_path):
    root = os.environ.get('MULTIMODAL_FLICKR8K')
    if not root or not Path(root, 'Flickr8k_text.zip').exists(): pytest.skip('MULTIMODAL_FLICKR8K is not set to a folder of archives')
    sums = ','.join(hashlib.md5(Path(root, f'Flickr8k_{n}.zip').read_bytes()).hexdigest() for n in ('Dataset', 'text'))
    data = read_flickr8k(fetch_flickr8k(tmp_path/'flickr8k', root, sums, say=lambda line: None))
    assert [len(data[split]) for split in ('train', 'dev', 'test')] == [6000, 1000, 1000]


def test_an_address_that_has_nothing_leaves_nothing(server, tmp_path):
    with pytest.raises(UserError, match='nothing came'):
        fetch_flickr8k(tmp_path/'flickr8k', f'{server.url}/nowhere', say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_drips_is_left(server, tmp_path):
    "A byte now and then: never silent, and never done."
    def drip(handler, content, start):
        handler.give(b'', start, len(content), promise=len(content) - start)
        try:
            for i in range(start, len(content)): handler.wfile.write(content[i:i + 1]); handler.wfile.flush(); time.sleep(.02)
        except OSError: pass
        return True
    server.misbehave = drip
    began = time.monotonic()
    with pytest.raises(UserError, match=r'no download') as e:
        download(f'{server.url}/a.bin', tmp_path/'a.bin', MD5, Patience(tries=2, pause=0, timeout=.3))
    assert len(server.asked) == 2 and time.monotonic() - began < 5 and 'bytes are kept' in str(e.value)
    assert files(tmp_path) == ['a.bin.part']


def test_an_archive_that_does_not_fit_is_refused_before_it_fills_the_disk(tmp_path, monkeypatch):
    pack(tmp_path/'a.zip', [('a.txt', 'x'*5000)])
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: real._replace(free=4000))
    with pytest.raises(UserError, match='unpacks to 5,000 bytes, 4,000 are free'): unpack(tmp_path/'a.zip', tmp_path/'new')
    assert files(tmp_path) == ['a.zip']
