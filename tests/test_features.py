"Views and the feature cache: what it stores, when it is used again, and what becomes of broken photos and full disks."
import errno, io, math, os, pickle, shutil, threading
from collections import namedtuple
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
import multimodal.features as features_module
from multimodal.core import UserError, load_image
from multimodal.encoder import EncoderConfig, ImageEncoder, ImageTransform
from multimodal.features import FeatureCache
from multimodal.views import (PixelSource, check_view, crop_box, is_flipped, left_out_line, read_ahead, read_view,
                              view_image)

SIZE, N = 16, 11
transform = ImageTransform(SIZE)


def encoder_of(seed=0, **kw):
    torch.manual_seed(seed)
    return ImageEncoder(EncoderConfig(**{'weights': 'none', 'stage': 1, 'image_size': SIZE, 'embedding_dim': 8, **kw}))


def noise(seed, side=24):
    "A photo like no other: blocks of colour"
    blocks = np.random.default_rng(seed).integers(0, 255, (side//4, side//4, 3), np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST)


def make_photos(folder, n=N):
    folder.mkdir(exist_ok=True)
    paths = [folder/f'{i:02}.jpg' for i in range(n)]
    for i, path in enumerate(paths): noise(i).save(path, quality=95)
    return paths


@pytest.fixture
def paths(tmp_path): return make_photos(tmp_path/'photos')


@pytest.fixture
def encoder(): return encoder_of()


def count_batches(encoder):
    "A list that grows with each batch that the trunk has seen (without a hook, which would have it see in another way)"
    seen, features = [], type(encoder).features
    def counted(images):
        y = features(encoder, images)
        seen.append(len(images))
        return y
    encoder.features = counted
    return seen


def build(encoder, paths, folder, **kw):
    return FeatureCache.build(encoder, paths, kw.pop('transform', transform), folder,
                              **{'batch_size': 4, 'progress': False, **kw})


def bytes_of(cache, view='plain'): return (cache.folder/f'{view}.npy').read_bytes()


def one_line(raised, *words):
    "A message for people: one line that says all these words"
    message = str(raised.value)
    assert '\n' not in message, message
    for word in words: assert word in message, message


# Views

@given(st.integers(0, 50), st.text(min_size=1, max_size=20), st.booleans())
@settings(max_examples=200, deadline=None)
def test_crops_lie_in_the_photo_and_keep_most_of_it(i, name, flipped):
    left, top, right, bottom = crop_box(f'crop{i}' + '_flip'*flipped, name)
    assert 0 <= left < right <= 1 + 1e-12 and 0 <= top < bottom <= 1 + 1e-12
    width, height = right - left, bottom - top
    assert width*height >= .6 - 1e-9 or width == 1 or height == 1
    assert .6 <= width/height <= 1/.6
    assert crop_box(f'crop{i}_flip', name) == crop_box(f'crop{i}', name)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(['plain', 'flip', 'crop0', 'crop3_flip']))
@settings(max_examples=60, deadline=None)
def test_a_view_of_any_photo(width, height, view):
    photo = noise(width*41 + height, 40).resize((width, height))
    seen = view_image(photo, view, 'a.jpg')
    assert 1 <= seen.width <= width and 1 <= seen.height <= height
    if not view.startswith('crop'): assert seen.size == photo.size
    mirror = view_image(photo, view.removesuffix('_flip') if view != 'flip' else 'plain', 'a.jpg')
    if is_flipped(view): assert (np.array(seen)[:, ::-1] == np.array(mirror)).all()


def test_a_crop_shows_the_part_that_its_box_names():
    y, x = np.mgrid[:200, :250].astype(np.uint8)
    photo = Image.fromarray(np.stack([x, y, 0*x], -1))                # each pixel says where it lies
    for view in 'crop0', 'crop1', 'crop2_flip':
        left, top, right, bottom = crop_box(view, 'a.jpg')
        pixels = np.array(view_image(photo, view, 'a.jpg'))[..., :2]
        if is_flipped(view): pixels = pixels[:, ::-1]
        assert abs(pixels[0, 0] - [left*250, top*200]).max() <= 1
        assert abs(pixels[-1, -1] + 1. - [right*250, bottom*200]).max() <= 1


def test_two_photos_and_two_numbers_give_other_crops():
    boxes = {crop_box(f'crop{i}', name) for i in range(5) for name in ('a.jpg', 'b.jpg', 'c.jpg')}
    assert len(boxes) == 15


@pytest.mark.parametrize('view', ['', 'flop', 'crop', 'cropx', 'plain_flip', 'flip_crop0', 'crop0_', 'crop-1', '../x'])
def test_no_such_view(view, encoder, paths, tmp_path):
    for attempt in (check_view, is_flipped, lambda v: view_image(noise(0), v, 'a'),
                    lambda v: build(encoder, paths, tmp_path/'c', views=(v,))):
        with pytest.raises(UserError) as raised: attempt(view)
        one_line(raised, repr(view), 'crop0_flip')


def test_many_reasons_in_one_line():
    line = left_out_line({f'{i}.jpg': 'gone' for i in range(12)}, 3000)
    assert line.startswith('left out 12 of 3,000 photos: 0.jpg: gone') and line.endswith('and 9 more')
    assert 'more' not in left_out_line({'a.jpg': 'a.jpg: empty'}, 1) and '\n' not in line


# What is stored

@pytest.mark.parametrize('kw', [{}, {'pool': 'vector'}, {'stage': 2, 'below': 1}])
def test_the_cache_says_what_the_encoder_says(kw, paths, tmp_path):
    encoder = encoder_of(**kw)
    views = ('plain', 'flip', 'crop0', 'crop1_flip')
    cache = build(encoder, paths, tmp_path/'c', views=views, batch_size=len(paths))
    assert len(cache) == N and list(cache.rows.values()) == list(range(N))
    for view in views:
        with torch.inference_mode():
            photos = [transform(view_image(load_image(p), view, p.name)) for p in paths]
            truth = encoder.features(torch.stack(photos)).half().numpy()                 # [n, P, C]
        stored = cache.get(slice(None), view)
        assert stored.dtype == np.float16 and stored.shape == (N, encoder.n_patches, encoder.channels)
        np.testing.assert_allclose(stored, truth, rtol=2e-3, atol=2e-3)
        assert (cache.get([7, 2], view) == stored[[7, 2]]).all() and (cache.get(3, view) == stored[3]).all()
        assert (np.load(cache.folder/f'{view}.npy') == stored).all()
    assert (cache[4] == cache.get(4, 'plain')).all()
    assert abs(cache.get(0, 'flip').astype(float) - cache.get(0)).max() > .01


def test_rows_are_the_readers_own_and_no_numbers_travel(encoder, paths, tmp_path):
    cache = build(encoder, paths, tmp_path/'c')
    mine = cache[0]
    mine += 1
    assert (cache[0] != mine).any()
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 10_000 and (copy[3] == cache[3]).all()
    assert cache.get([]).shape == (0, *cache.shape) and (cache[np.int64(2)] == cache[2]).all() and (cache[::-2] == cache[:][::-2]).all()
    for wrong in len(cache), -len(cache) - 1:
        with pytest.raises(IndexError): cache[wrong]


def test_a_view_that_was_not_built(encoder, paths, tmp_path):
    cache = build(encoder, paths, tmp_path/'c')
    with pytest.raises(UserError) as raised: cache.get(0, 'flip')
    one_line(raised, "'flip'", 'build')


@given(st.integers(0, 30), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_read_ahead_keeps_the_order(n, size):
    batches = list(read_ahead(lambda x: x*x, list(range(n)), size))
    assert [x for batch in batches for x in batch] == [x*x for x in range(n)]
    assert all(len(batch) == size for batch in batches[:-1])


def test_the_bar_is_there_and_can_be_left_out(encoder, paths, tmp_path, capsys):
    build(encoder, paths, tmp_path/'c')
    assert capsys.readouterr().err == ''
    build(encoder, paths, tmp_path/'c', progress=True, views=('flip',))
    assert '11/11' in capsys.readouterr().err


# Broken photos

def break_some(paths):
    "Five kinds of files that are no photos; → their rows"
    paths[1].write_bytes(paths[1].read_bytes()[:300])                 # half a download
    paths[3].write_text('<html>Not found</html>')                     # a web page under a photo's name
    paths[4].write_bytes(b'')
    paths[8].unlink()
    paths[10].unlink()
    paths[10].mkdir()                                                 # a folder under a photo's name
    return [1, 3, 4, 8, 10]


def test_broken_photos_are_counted_and_left_out(encoder, paths, tmp_path):
    whole = build(encoder, paths, tmp_path/'whole')
    bad = break_some(paths)
    Image.new('L', (1, 1), 7).save(paths[5])                          # strange, but a photo
    Image.new('CMYK', (9, 300)).save(paths[6])
    cache = build(encoder, paths, tmp_path/'c', views=('plain', 'crop0'))
    assert list(cache.skipped) == [str(paths[i]) for i in bad]
    assert all(os.path.basename(path) in why and '\n' not in why for path, why in cache.skipped.items())
    assert list(cache.rows) == [str(p) for i, p in enumerate(paths) if i not in bad]
    for i in 0, 2, 7, 9: np.testing.assert_allclose(cache[cache.rows[str(paths[i])]], whole[i], rtol=2e-3, atol=2e-3)
    for view in 'plain', 'crop0': assert not cache.get(bad, view).any()
    assert np.abs(cache[[5, 6]].astype(float)).sum((1, 2)).min() > 0

    seen = count_batches(encoder)
    again = build(encoder, paths, tmp_path/'c', views=('plain', 'crop0'))
    assert not seen and again.skipped == cache.skipped and again.rows == cache.rows


def test_broken_photos_are_known_after_an_interruption(encoder, paths, tmp_path):
    bad = break_some(paths)
    stop_after(encoder, 2)
    with pytest.raises(KeyboardInterrupt): build(encoder, paths, tmp_path/'c')
    del encoder.features
    cache = build(encoder, paths, tmp_path/'c')
    assert list(cache.skipped) == [str(paths[i]) for i in bad]


def test_a_photo_that_was_mended_is_no_longer_left_out(encoder, paths, tmp_path):
    break_some(paths)
    assert len(build(encoder, paths, tmp_path/'c').skipped) == 5
    noise(3).save(paths[3])
    cache = build(encoder, paths, tmp_path/'c')
    assert len(cache.skipped) == 4 and cache[3].any()


def test_nothing_but_broken_photos(encoder, paths, tmp_path):
    for path in paths: path.write_text('not a photo')
    with pytest.raises(UserError) as raised: build(encoder, paths, tmp_path/'c')
    one_line(raised, 'left out 11 of 11', '00.jpg', '8 more')
    with pytest.raises(UserError) as raised: build(encoder, [], tmp_path/'c')
    one_line(raised, 'no photos')


# Interrupted

def stop_after(encoder, n):
    "Ctrl-C when the trunk has seen n batches"
    seen, features = [], type(encoder).features
    def stop(images):
        if len(seen) == n: raise KeyboardInterrupt
        seen.append(len(images))
        return features(encoder, images)
    encoder.features = stop


@pytest.mark.parametrize('n', [0, 1, 2])
def test_interrupted_and_resumed_the_bytes_are_the_same(n, encoder, paths, tmp_path):
    whole = build(encoder, paths, tmp_path/'whole')
    stop_after(encoder, n)
    with pytest.raises(KeyboardInterrupt): build(encoder, paths, tmp_path/'c')
    folder, = (tmp_path/'c').iterdir()
    assert (folder/'plain.part').exists() and not (folder/'plain.npy').exists()
    del encoder.features
    seen = count_batches(encoder)
    resumed = build(encoder, paths, tmp_path/'c')
    assert len(seen) == 3 - n and bytes_of(resumed) == bytes_of(whole)
    assert not (folder/'plain.part').exists()


@pytest.mark.parametrize('rows', [-1, -.01, 0, .5, 1, 3.7, 4, 6, 10, 10.99, 11])
def test_a_part_cut_anywhere_is_completed(rows, encoder, paths, tmp_path):
    whole = build(encoder, paths, tmp_path/'c')
    good = bytes_of(whole)
    cut = max(0, int(len(whole.header) + rows*whole.row_bytes)) if rows >= 0 else int(-rows*len(whole.header)/2)
    (whole.folder/'plain.part').write_bytes(good[:cut])
    (whole.folder/'plain.npy').unlink()
    assert bytes_of(build(encoder, paths, tmp_path/'c')) == good


def test_a_short_array_is_never_taken_for_a_whole_one(encoder, paths, tmp_path):
    cache = build(encoder, paths, tmp_path/'c')
    good = bytes_of(cache)
    (cache.folder/'plain.npy').write_bytes(good[:-1])
    fresh = FeatureCache(cache.folder, paths, cache.shape)
    with pytest.raises(UserError): fresh[0]
    assert bytes_of(build(encoder, paths, tmp_path/'c')) == good


def test_two_at_the_same_time_compute_once(encoder, paths, tmp_path):
    seen, done = count_batches(encoder), []
    work = [threading.Thread(target=lambda: done.append(build(encoder, paths, tmp_path/'c'))) for _ in range(3)]
    for w in work: w.start()
    for w in work: w.join()
    assert len(seen) == 3 and len(done) == 3 and len({bytes_of(cache) for cache in done}) == 1


# Stale

def moved(encoder):
    "The same weights, but another remembered mean in one batch norm"
    encoder.trunk.bn1.running_mean += 1
    return encoder


def rewrite(path):
    "Another photo with the same name and as many bytes"
    before = path.stat()
    noise(77).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:before.st_size].ljust(before.st_size, b'\0'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


def append(path):
    "One byte more, and the clock put back"
    before = path.stat()
    path.write_bytes(path.read_bytes() + b'\0')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = dict(weights=lambda s: setattr(s, 'encoder', encoder_of(1)),
               batch_norm=lambda s: setattr(s, 'encoder', moved(encoder_of())),
               stage=lambda s: setattr(s, 'encoder', encoder_of(stage=2)),
               pool=lambda s: setattr(s, 'encoder', encoder_of(pool='vector')),
               transform=lambda s: setattr(s, 'transform', Brighter(SIZE)),
               one_less=lambda s: s.paths.pop(),
               order=lambda s: s.paths.reverse(),
               other_photo=lambda s: rewrite(s.paths[2]),
               gone=lambda s: s.paths[2].unlink(),
               appended=lambda s: append(s.paths[2]))


class Brighter(ImageTransform):
    def __call__(self, image): return super().__call__(image) + .5
    def fingerprint(self): return super().fingerprint() + ' brighter'


@pytest.mark.parametrize('change', CHANGES)
def test_after_a_change_the_old_cache_is_not_used(change, paths, tmp_path):
    s = SimpleNamespace(encoder=encoder_of(), paths=list(paths), transform=transform)
    old = build(s.encoder, s.paths, tmp_path/'c')
    before = bytes_of(old)
    CHANGES[change](s)
    seen = count_batches(s.encoder)
    new = build(s.encoder, s.paths, tmp_path/'c', transform=s.transform)
    fresh = build(s.encoder, s.paths, tmp_path/'fresh', transform=s.transform)
    assert sum(seen) == 2*len(new.rows) and new.folder != old.folder
    assert bytes_of(new) == bytes_of(fresh) and bytes_of(old) == before


def test_the_same_weights_told_otherwise_have_another_cache(paths, tmp_path):
    caches = [build(encoder_of(**kw), paths, tmp_path/'c') for kw in (dict(stage=2), dict(stage=2, below=1))]
    assert caches[0].folder != caches[1].folder and [cache.shape for cache in caches] == [(4, 128), (4, 192)]


def test_without_a_change_nothing_is_computed(paths, tmp_path):
    first = build(encoder_of(), paths, tmp_path/'c')
    twin = encoder_of()                                               # another object with the same weights
    twin.trunk.bn1.num_batches_tracked += 5                           # a counter, no feature depends on it
    with torch.no_grad(): twin.linear.weight += 1                     # after the trunk: it may learn
    seen = count_batches(twin)
    second = build(twin, [str(p) for p in paths], tmp_path/'c', batch_size=2)
    assert not seen and second.folder == first.folder
    build(twin, paths, tmp_path/'c', views=('plain', 'flip'))
    assert sum(seen) == N                                             # only the view that was not there


def test_the_same_file_by_another_route_has_the_same_key(encoder, paths, tmp_path, monkeypatch):
    first = build(encoder, paths, tmp_path/'c')
    monkeypatch.chdir(paths[0].parent)
    assert build(encoder, [p.relative_to(paths[0].parent) for p in paths], tmp_path/'c').folder == first.folder


@pytest.mark.parametrize('trainable', ['last', 'two', 'all'])
def test_a_trunk_that_learns_has_no_cache(trainable, paths, tmp_path):
    with pytest.raises(UserError) as raised: build(encoder_of(trainable=trainable), paths, tmp_path/'c')
    one_line(raised, 'learns')
    assert not (tmp_path/'c').exists()


# A full disk

def free_bytes(monkeypatch, n):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(n, 0, n))


def test_no_room_is_seen_before_the_first_byte(encoder, paths, tmp_path, monkeypatch):
    need = 2*build(encoder, paths, tmp_path/'known').size
    seen = count_batches(encoder)
    free_bytes(monkeypatch, need - 1)
    with pytest.raises(UserError) as raised: build(encoder, paths, tmp_path/'c', views=('plain', 'flip'))
    one_line(raised, str(tmp_path/'c'), 'GB', 'fewer views')
    folder, = (tmp_path/'c').iterdir()
    assert not seen and not [*folder.glob('*.part'), *folder.glob('*.npy')]
    free_bytes(monkeypatch, need)
    build(encoder, paths, tmp_path/'c', views=('plain', 'flip'))


def test_what_is_there_already_needs_no_room(encoder, paths, tmp_path, monkeypatch):
    cache = build(encoder, paths, tmp_path/'c')
    half = bytes_of(cache)[:cache.size//2]
    (cache.folder/'flip.part').write_bytes(half)
    free_bytes(monkeypatch, cache.size - len(half))
    build(encoder, paths, tmp_path/'c', views=('plain', 'flip'))


class FullDisk(io.FileIO):
    "A file on a disk that has room for some bytes more"
    room = 0

    def write(self, data):
        data = bytes(data)
        super().write(data[:FullDisk.room])
        if len(data) > FullDisk.room:
            FullDisk.room = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.room -= len(data)
        return len(data)


@pytest.mark.parametrize('rows', [0, 2, 4, 9.5])
def test_a_disk_that_fills_half_way(rows, encoder, paths, tmp_path, monkeypatch):
    whole = build(encoder, paths, tmp_path/'whole', views=('plain', 'flip'))
    build(encoder, paths, tmp_path/'c')
    part = lambda name, mode: FullDisk(name, mode.replace('b', '')) if str(name).endswith('.part') else open(name, mode)
    monkeypatch.setattr(features_module, 'open', part, raising=False)
    FullDisk.room = len(whole.header) + int(rows*whole.row_bytes)
    with pytest.raises(UserError) as raised: build(encoder, paths, tmp_path/'c', views=('plain', 'flip'))
    one_line(raised, 'flip.part', 'No space left', 'free some space', 'goes on')
    monkeypatch.undo()
    folder, = (tmp_path/'c').iterdir()
    assert not (folder/'flip.npy').exists() and (folder/'plain.npy').read_bytes() == bytes_of(whole)
    assert (folder/'flip.part').stat().st_size == len(whole.header) + int(rows*whole.row_bytes)
    seen = count_batches(encoder)
    again = build(encoder, paths, tmp_path/'c', views=('plain', 'flip'))
    assert bytes_of(again, 'flip') == bytes_of(whole, 'flip')
    assert len(seen) == math.ceil((N - int(rows)//4*4)/4)             # saved whole batches are kept


def test_a_folder_that_cannot_be_written(encoder, paths, tmp_path):
    (tmp_path/'c').write_text('a file where the folder should be')
    with pytest.raises(UserError) as raised: build(encoder, paths, tmp_path/'c')
    one_line(raised, str(tmp_path/'c'))


# Pixels

def test_pixels_of_broken_photos(paths):
    bad = break_some(paths)
    for keep in 2e9, 0:
        source = PixelSource(paths, transform, keep_bytes=keep)
        assert list(source.skipped) == [str(paths[i]) for i in bad] and len(source) == N
        assert list(source.rows.values()) == [i for i in range(N) if i not in bad]
        assert len(source.kept) == (N - 5 if keep else 0)
        assert torch.equal(source.get(0), transform(load_image(paths[0])))
        torch.testing.assert_close(source.get(0, 'flip'), source.get(0).flip(-1))
        for row in bad:
            with pytest.raises(UserError) as raised: source.get(row)
            one_line(raised, paths[row].name)


def test_read_view_gives_the_reason(paths):
    paths[0].write_text('hello')
    assert '00.jpg' in read_view(paths[0], 'plain', transform)
    assert torch.equal(read_view(paths[1], 'plain', transform), transform(load_image(paths[1])))
