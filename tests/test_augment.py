"""Changed photos whose captions stay true; copies of a data set that are whole or not there."""
import os, random, re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps

import multimodal.augment as aug
from multimodal.augment import AugmentConfig, augment, augment_dataset, augment_sheet, flip_caption, names_colour
from multimodal.core import UserError
from multimodal.datasets import CaptionData, Item, load_dataset
from multimodal.shapes import (describe_scene, draw_scene, make_shapes, parse_caption, random_scene, read_scene,
                               same_scene)

STILL = AugmentConfig(flip=0, rotation=0, crop=1, brightness=0, contrast=0, saturation=0, hue=0)

@pytest.mark.parametrize('text, flipped', [
    ('on the left', 'on the right'), ('on the right in a red shirt', 'on the left in a red shirt'), ('', ''),
    ('a Left-handed batter', 'a Right-handed batter'), ('from left to right', 'from right to left'), ('🙂', '🙂'),
    ('THE LEFT', 'THE RIGHT'),
    ('the dog is left of the cat', 'the dog is right of the cat'), ("the man 's left arm", "the man 's right arm"),
    ('the leftmost boy', 'the rightmost boy'), ('she makes a right turn', 'she makes a left turn'),
    ('a bright light in the loft', 'a bright light in the loft')])
def test_flipped(text, flipped): assert flip_caption(text) == flipped and flip_caption(flipped) == text

@pytest.mark.parametrize('text', [
    'he left', 'a boy has left the house', 'left alone', 'left behind', 'right now', 'right behind him', 'all right',
    'right at the camera', 'the right way', 'the right time', 'all that is left of the cake', "what 's left of it",
    'a sign',
    'it reads stop', 'the number 7', 'a "hat"', 'boats right themselves', 'they run clockwise', 'counterclockwise',
    'looking right', 'the left and he left the house'])
def test_refused(text): assert flip_caption(text) is None

@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from('left right Left RIGHT the his on to of hand way behind leftmost and . , dog'.split()),
                max_size=9))
def test_flipping_twice_is_nothing(words):
    text = ' '.join(words)
    if (once := flip_caption(text)) is not None: assert flip_caption(once) == text

@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9))
def test_mirrored_scenes_keep_true_captions(seed):
    scene = random_scene(random.Random(seed))
    mirrored = read_scene(ImageOps.mirror(draw_scene(scene, seed=seed)))
    for caption in describe_scene(scene, seed=seed): assert same_scene(mirrored, parse_caption(flip_caption(caption)))

def test_scenes_stay_true_at_full_strength():
    "Whatever the settings; light may change so much that the reader sees nothing, but never something else."
    rng, config = random.Random(0), AugmentConfig(rotation=15, crop=.3, hue=.5)
    unclear = 0
    for seed in range(50):
        scene = random_scene(rng)
        image, captions = augment(draw_scene(scene, 48, seed), describe_scene(scene, seed=seed), config, rng)
        seen = read_scene(image)
        unclear += seen is None
        assert seen is None or all(same_scene(seen, parse_caption(c)) for c in captions)
    assert unclear < 20
    for seed in range(40):
        scene = random_scene(rng)
        image, (caption,) = augment(draw_scene(scene, 48, seed), describe_scene(scene, 1, seed),
                                    replace(config, brightness=0, contrast=0), rng)
        assert same_scene(read_scene(image), parse_caption(caption))

def test_colours():
    assert all(map(names_colour, ('A RED hat', 'blond-haired', 'brightly lit', 'reddish', 'a multicolored kite',
                                  'grey', 'gray', 'a blue-eyed girl',
                                  'two browns', 'a colorful hat')))
    assert not any(map(names_colour, ('bored', 'a tank', 'he is tired', 'a lightning bolt', 'greedy', 'silverware',
                                      '')))

def test_hue_stays_where_a_colour_is_named():
    image, strong = Image.new('RGB', (20, 20), (220, 20, 30)), replace(STILL, hue=.5)
    for seed in range(5):
        kept, _ = augment(image, ['a wall', 'a red wall'], strong, random.Random(seed))
        assert np.array_equal(np.asarray(kept), np.asarray(image))
    assert any(not np.array_equal(np.asarray(augment(image, ['a wall'], strong, random.Random(s))[0]),
                                  np.asarray(image)) for s in range(5))

def test_one_refused_caption_keeps_the_photo_unmirrored():
    image = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    always = replace(STILL, flip=1)
    for captions in (['a dog', 'a sign'], ['on the left', 'he left']):
        same, said = augment(image, captions, always)
        assert np.array_equal(np.asarray(same), np.asarray(image)) and said == captions
    mirrored, said = augment(image, ['a dog', 'on the left'], always)
    assert np.array_equal(np.asarray(mirrored), np.asarray(image)[:, ::-1]) and said == ['a dog', 'on the right']

@pytest.mark.parametrize('mode, size', [('L', (40, 30)), ('RGBA', (30, 40)), ('P', (16, 16)), ('RGB', (1, 1)),
                                        ('RGB', (300, 2)), ('CMYK', (20, 20))])
def test_any_photo_keeps_its_size(mode, size):
    for seed in range(3):
        image, captions = augment(Image.new(mode, size), ('a dog',), AugmentConfig(), random.Random(seed))
        assert image.mode == 'RGB' and image.size == size and captions == ['a dog']

def test_chance_is_ours_alone():
    import torch
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    a, b, c = (np.asarray(augment(image, ['a dog'], AugmentConfig(), random.Random(seed))[0]) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(1), expected) and np.array_equal(a, b) and not np.array_equal(a, c)

@pytest.mark.parametrize('wrong', [dict(flip=2), dict(flip=-.1), dict(rotation=90), dict(crop=0), dict(hue=.6),
                                   dict(brightness=float('nan')),
                                   dict(contrast='high'), dict(saturation=None)])
def test_impossible_settings(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))) as error: AugmentConfig(**wrong)
    assert '\n' not in str(error.value)

# Copies on disk

@pytest.fixture
def drawn(tmp_path): return load_dataset(make_shapes(tmp_path/'shapes', n=24))

def test_copies(drawn, tmp_path):
    more = load_dataset(augment_dataset(drawn, tmp_path/'more', copies=2, seed=1))
    assert {k: len(v) for k, v in more.splits.items()} == dict(train=54, dev=2, test=2,
                                                               heldout=2) and not any(more.skipped.values())
    said = {item.image.name: item.captions for items in more.splits.values() for item in items}
    for items in drawn.splits.values():
        for item in items: assert said[item.image.name] == item.captions  # photos keep names and captions
    for item in more['train']:
        seen = read_scene(Image.open(item.image))
        assert seen is None or all(same_scene(seen, parse_caption(c)) for c in item.captions)
    again = load_dataset(augment_dataset(drawn, tmp_path/'again', copies=2, seed=1))
    assert [i.image.read_bytes() for i in again['train']] == [i.image.read_bytes() for i in more['train']]
    other = load_dataset(augment_dataset(drawn, tmp_path/'other', copies=2, seed=2))
    assert [i.image.read_bytes() for i in other['train']] != [i.image.read_bytes() for i in more['train']]

def test_broken_photos_are_counted_and_change_nothing_else(drawn, tmp_path, capsys):
    whole = load_dataset(augment_dataset(drawn, tmp_path/'whole'))
    assert capsys.readouterr().out == ''
    broken = drawn['train'][3].image
    broken.write_bytes(broken.read_bytes()[:300])
    rest = load_dataset(augment_dataset(drawn, tmp_path/'rest'))
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('left out 1 photo, the first: ') and str(broken) in err
    kept = {i.image.name: i.image.read_bytes() for i in rest['train']}
    assert kept == {i.image.name: i.image.read_bytes()
                    for i in whole['train'] if not i.image.name.startswith(broken.stem)}
    assert augment_sheet(drawn, seed=0, path=tmp_path/'sheet.png', n=6) and (tmp_path/'sheet.png').stat().st_size > 1000

def test_no_photo_left(tmp_path):
    (tmp_path/'a.jpg').write_bytes(b'')
    data = CaptionData('bad', dict(train=(Item(tmp_path/'a.jpg', ('a dog',)),)), {})
    with pytest.raises(UserError, match='no photo that can be read'): augment_dataset(data, tmp_path/'out')
    with pytest.raises(UserError, match='no photo that can be read'): augment_sheet(data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.jpg']

def test_strange_names_and_captions(tmp_path):
    Image.new('RGB', (20, 20), 'red').save(tmp_path/'my dog #1.png')
    data = CaptionData('mine', dict(train=(Item(tmp_path/'my dog #1.png', ('a\tdog\non grass', 'ein Hund – 🙂')),)), {})
    item = load_dataset(augment_dataset(data, tmp_path/'out'))['train'][0]
    assert item.image.name == 'my_dog_1.jpg' and item.captions == ('a dog on grass', 'ein Hund – 🙂')

def test_two_photos_of_one_name(tmp_path):
    for folder in 'ab':
        (tmp_path/folder).mkdir()
        Image.new('RGB', (20, 20)).save(tmp_path/folder/'1.jpg')
    data = CaptionData('mine', dict(train=tuple(Item(tmp_path/f/'1.jpg', ('a dog',)) for f in 'ab')), {})
    with pytest.raises(UserError, match='would be named 1.jpg'): augment_dataset(data, tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_bad_requests(drawn, tmp_path):
    for copies in (0, -1, 1.5, '2'):
        with pytest.raises(UserError, match='copies'): augment_dataset(drawn, tmp_path/'out', copies=copies)
    with pytest.raises(UserError, match='already'): augment_dataset(drawn, tmp_path/'shapes')
    rest = CaptionData('x', dict(test=drawn['test']), {})
    with pytest.raises(UserError, match='no training photos'): augment_dataset(rest, tmp_path/'out')
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'): augment_dataset(drawn, tmp_path/'file'/'out')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'shapes']

@pytest.mark.parametrize('stop', [KeyboardInterrupt, OSError(28, 'No space left on device')])
def test_stopped_half_way_leaves_nothing(drawn, tmp_path, monkeypatch, stop):
    calls, work = [], aug.augment
    def failing(*args):
        calls.append(1)
        if len(calls) == 5: raise stop
        return work(*args)
    monkeypatch.setattr(aug, 'augment', failing)
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else UserError): augment_dataset(drawn,
                                                                                                       tmp_path/'out')
    assert len(calls) == 5 and [p.name for p in tmp_path.iterdir()] == ['shapes']

# The real captions

@pytest.mark.skipif('MULTIMODAL_FLICKR8K' not in os.environ,
                    reason='MULTIMODAL_FLICKR8K is not set: no real captions to look at')
def test_real_captions():
    root = next((p for p in Path(os.environ['MULTIMODAL_FLICKR8K']).rglob('*token.txt') if 'lemma' not in p.name), None)
    if root is None: # the archives, not unpacked
        import zipfile
        with zipfile.ZipFile(next(Path(os.environ['MULTIMODAL_FLICKR8K']).rglob('Flickr8k_text.zip'))) as archive:
            text = archive.read(next(n for n in archive.namelist() if n.endswith('Flickr8k.token.txt'))).decode()
    else: text = root.read_text(encoding='utf-8')
    captions = [line.split('\t', 1)[1] for line in text.splitlines() if '\t' in line]
    sides = [c for c in captions if re.search(r'\b(?:left|right)', c, re.I)]
    flipped = [c for c in sides if flip_caption(c)]
    assert len(captions) > 40_000 and .75 < len(flipped)/len(sides) < .9
    assert all(flip_caption(flip_caption(c)) == c for c in captions if flip_caption(c) is not None)
    assert .37 < sum(map(names_colour, captions))/len(captions) < .39
    assert .01 < sum(flip_caption(c) is None for c in captions)/len(captions) < .025
