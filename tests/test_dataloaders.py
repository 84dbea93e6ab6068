"""Batches: nothing lost, nothing twice, the same for the same (seed, epoch), and true captions for mirrored photos."""
import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from multimodal.augment import augment, flip_caption
from multimodal.core import UserError
from multimodal.dataloaders import CaptionDataset, Sample, collate, make_loader, pad
from multimodal.datasets import Item
from multimodal.encoder import EncoderConfig, ImageEncoder, ImageTransform
from multimodal.features import FeatureCache
from multimodal.scenes import describe_scene, draw_scene, random_scene, same_scene
from multimodal.shapes import parse_caption, read_scene
from multimodal.text import BOS, EOS, PAD, Vocab
from multimodal.views import PixelSource

SIZE, CAPTIONS = 16, ('a dog to the left of a cat', 'a dog', 'a black dog near a cat in the grass', 'dogs',
                      'a cat on the right')
WHO = 'ann ben cid dee eve fay gus hal ida jon kim'.split()       # no numbers: what can be read is not mirrored
TRANSFORM = ImageTransform(SIZE)
VOCAB = Vocab.build([*CAPTIONS, *map(flip_caption, CAPTIONS), *WHO, 'sees'], min_count=1)


@pytest.fixture
def items(tmp_path):
    "Eleven photos of one shade each, so that a tensor tells whose it is; dark on the left, so that a mirror shows"
    out = []
    for i in range(11):
        pixels = np.full((20, 20, 3), 10 + 20*i, np.uint8)
        pixels[:, :6] = 0
        Image.fromarray(pixels).save(tmp_path/f'{i}.png')
        out.append(Item(tmp_path/f'{i}.png', tuple(f'{WHO[i]} sees {c}' for c in CAPTIONS)))
    return out


def number(image):
    "Which photo a tensor shows, and whether mirrored"
    row = TRANSFORM.undo(image)[0, 8]*255
    return round((row[7].item() - 10)/20), row[0] > row[-1]


def pairs(loader, epoch=0):
    loader.dataset.set_epoch(epoch)
    return [(number(batch.images[owner]), VOCAB.decode(row.tolist())) for batch in loader
            for tokens, owners in zip(batch.tokens, batch.owners) for row, owner in zip(tokens, owners)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=9), st.integers(1, 12))
def test_collate_loses_nothing_and_pads_at_the_end_only(lengths, groups):
    mark = iter(range(10, 10**6))
    caption = lambda n: np.array([BOS, *(next(mark) for _ in range(n)), EOS])
    samples = [Sample(torch.full((1, 1, 1), float(i)), list(map(caption, ns))) for i, ns in enumerate(lengths)]
    batch, found = collate(samples, groups), []
    for tokens, owners in zip(batch.tokens, batch.owners):
        assert len(tokens) == len(owners) and (tokens[:, -1] != PAD).any()
        for row, owner in zip(tokens.tolist(), owners.tolist()):
            end = row.index(EOS) + 1
            assert not any(row[end:]) and all(row[:end])
            found.append((owner, tuple(row[:end])))
    assert sorted(found) == sorted((i, tuple(c.tolist())) for i, s in enumerate(samples) for c in s.captions)
    longest = [t.shape[1] for t in batch.tokens]
    assert longest == sorted(longest) and len(batch.tokens) == min(groups, sum(map(len, lengths)))


def test_groups_waste_less_than_one_rectangle_and_than_groups_by_lot():
    rng = np.random.default_rng(0)
    captions = [np.ones(n, int) for n in rng.integers(5, 30, 160)]
    waste = lambda ts: sum((t == PAD).sum().item() for t in ts)
    samples = [Sample(torch.zeros(1), captions[i:i + 5]) for i in range(0, 160, 5)]
    by_length, by_lot = waste(collate(samples, 4).tokens), waste([pad(captions[i::4]) for i in range(4)])
    assert by_length < .5*by_lot <= .5*waste([pad(captions)])


@pytest.mark.parametrize('batch_size', [1, 4, 11, 50])
def test_every_caption_once_in_an_epoch_with_its_own_photo(items, batch_size):
    loader = make_loader(CaptionDataset(items, VOCAB, TRANSFORM), batch_size, shuffle=True)
    found = pairs(loader)
    assert len(loader) == -(-11//batch_size)
    assert sorted(c for _, c in found) == sorted(c for item in items for c in item.captions)
    assert all(c.startswith(f'{WHO[n]} ') and not mirrored for (n, mirrored), c in found)


def test_some_captions_an_epoch_and_in_time_all(items):
    loader = make_loader(CaptionDataset(items, VOCAB, TRANSFORM, captions_per_image=2), 4, shuffle=True)
    seen = Counter()
    for epoch in range(60):
        found = [c for _, c in pairs(loader, epoch)]
        assert len(found) == len(set(found)) == 22
        seen.update(found)
    assert len(seen) == 55 and 8 < min(seen.values()) and max(seen.values()) < 42              # 24 expected


def test_seed_and_epoch_decide_everything(items):
    def epoch_of(seed, epoch, workers=0):
        dataset = CaptionDataset(items, VOCAB, TRANSFORM, captions_per_image=2, seed=seed,
                                 views=('plain', 'flip', 'crop0'), flip_caption=flip_caption)
        dataset.set_epoch(epoch)
        return list(make_loader(dataset, 4, shuffle=True, seed=seed, workers=workers))

    def same(a, b):
        return all(torch.equal(x.images, y.images) and all(map(torch.equal, x.owners, y.owners)) and
                   len(x.tokens) == len(y.tokens) and all(s.shape == t.shape and torch.equal(s, t) for s, t in
                                                          zip(x.tokens, y.tokens)) for x, y in zip(a, b))
    first = epoch_of(0, 3)
    assert same(first, epoch_of(0, 3)) and same(first, epoch_of(0, 3, workers=2))
    assert not same(first, epoch_of(0, 4)) and not same(first, epoch_of(1, 3))


def test_the_order_is_that_of_the_files_where_nothing_is_shuffled(items):
    dataset = CaptionDataset(items, VOCAB, TRANSFORM)
    shown = [number(x)[0] for batch in make_loader(dataset, 4) for x in batch.images]
    assert shown == list(range(11))


def test_mirrored_photos_have_mirrored_captions(items):
    dataset = CaptionDataset(items, VOCAB, TRANSFORM, views=('plain', 'flip'), flip_caption=flip_caption)
    seen = set()
    for epoch in range(6):
        for (n, mirrored), caption in pairs(make_loader(dataset, 4, shuffle=True), epoch):
            own = items[n].captions
            assert caption in (tuple(map(flip_caption, own)) if mirrored else own)
            seen.add((n, bool(mirrored)))
    assert len(seen) == 22                                                                     # each photo both ways


def test_what_cannot_be_mirrored_never_is(items):
    stubborn = lambda c: None if c.startswith(('dee sees dogs', 'hal ')) else flip_caption(c)
    every = ('plain', 'flip', 'crop0', 'crop1_flip')
    dataset = CaptionDataset(items, VOCAB, TRANSFORM, views=every, flip_caption=stubborn)
    views = {i: set() for i in range(11)}
    for epoch in range(40):
        dataset.set_epoch(epoch)
        for i, view in enumerate(dataset.view): views[i].add(view)
    assert views[3] == views[7] == {'plain', 'crop0'} and views[2] == set(every)
    only = CaptionDataset(items, VOCAB, TRANSFORM, views=('flip',), flip_caption=lambda c: None)
    assert set(only.view) == {'plain'}
    with pytest.raises(UserError, match='flipped views need flip_caption'):
        CaptionDataset(items, VOCAB, TRANSFORM, views=('flip',))


def test_augmentation_is_drawn_anew_in_each_epoch(items):
    change = lambda image, captions, rng: augment(image, captions, rng=random.Random(int(rng.integers(2**32))))
    dataset = CaptionDataset(items, VOCAB, TRANSFORM, augment=change)
    first = dataset[2].image
    assert torch.equal(dataset[2].image, first)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[2].image, first)


def test_broken_photos_are_left_out_at_the_start_and_on_the_way(items):
    items[0].image.write_text('<html>')
    items[1].image.write_bytes(items[1].image.read_bytes()[:60])
    source = PixelSource([i.image for i in items], TRANSFORM, keep_bytes=0)
    dataset = CaptionDataset(items, VOCAB, source)
    assert len(dataset) == 9 and sorted(source.skipped) == [str(items[0].image), str(items[1].image)]
    items[2].image.unlink()
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter('always')
        assert sum(len(b.images) for b in make_loader(dataset, 4)) == 8
    assert len(notes) == 1 and '2.png' in str(notes[0].message)
    for item in items: item.image.unlink(missing_ok=True)
    with pytest.raises(UserError, match='none of 11 images can be used'): CaptionDataset(items, VOCAB, TRANSFORM)


def test_captions_longer_than_allowed_are_cut_and_finished(items):
    dataset = CaptionDataset(items, VOCAB, TRANSFORM, max_len=3)
    for ids in dataset[0].captions: assert ids[0] == BOS and ids[-1] == EOS and len(ids) <= 5


def cache_of(items, folder, views):
    torch.manual_seed(0)
    encoder = ImageEncoder(EncoderConfig(weights='none', stage=1, image_size=SIZE, embedding_dim=8))
    return FeatureCache.build(encoder, [i.image for i in items], TRANSFORM, folder, views, progress=False)


def test_from_a_cache_each_photo_has_its_own_row_and_view(items, tmp_path):
    items[4].image.write_text('not a photo')
    views = ('plain', 'flip', 'crop0')
    cache = cache_of(items, tmp_path/'c', views)
    dataset = CaptionDataset(items[::-1], VOCAB, cache, views=views, flip_caption=flip_caption)       # another order
    assert len(dataset) == 10 and cache.skipped
    seen = set()
    for epoch in range(8):
        for n, _, view, sample in epoch_of(dataset, epoch):
            assert np.array_equal(sample.image.numpy(), cache.get(n, view).astype(np.float32))
            mirror = flip_caption if view == 'flip' else str
            assert [VOCAB.decode(c.tolist()) for c in sample.captions] == [mirror(c) for c in items[n].captions]
            seen.add((n, view))
    assert len(seen) == 30


def epoch_of(dataset, epoch):
    "Number of the photo, place in the data set, view and sample of an epoch"
    dataset.set_epoch(epoch)
    return [(int(item.image.stem), i, dataset.view[i], dataset[i]) for i, item in enumerate(dataset.items)]


def test_what_a_source_cannot_give_is_told_at_the_start(items, tmp_path):
    cache = cache_of(items, tmp_path/'c', ('plain',))
    for views in ('plain', 'crop0'), ('crop3',):
        with pytest.raises(UserError, match='no features of view .crop'):
            CaptionDataset(items, VOCAB, cache, views=views)
    with pytest.raises(UserError, match='there are plain'): CaptionDataset(items, VOCAB, TRANSFORM, views=('upside',))
    with pytest.raises(UserError, match='augment'): CaptionDataset(items, VOCAB, cache, augment=augment)


def test_a_run_that_stopped_goes_on_with_the_same_batches(items):
    def loader():
        dataset = CaptionDataset(items, VOCAB, TRANSFORM, captions_per_image=3, seed=5, views=('plain', 'flip'),
                                 flip_caption=flip_caption)
        return make_loader(dataset, 4, shuffle=True, seed=5)
    straight, epochs = loader(), []
    for epoch in range(4): epochs.append(pairs(straight, epoch))
    assert len({tuple(map(str, e)) for e in epochs}) == 4
    assert pairs(loader(), 3) == epochs[3]                                                     # without the first three


def test_drop_last_leaves_out_only_the_smaller_batch(items):
    sizes = [len(b.images) for b in make_loader(CaptionDataset(items, VOCAB, TRANSFORM), 4, drop_last=True)]
    assert sizes == [4, 4]


def test_a_batch_of_nothing_but_broken_photos_is_an_error(items):
    dataset = CaptionDataset(items, VOCAB, PixelSource([i.image for i in items], TRANSFORM, keep_bytes=0))
    for item in items[4:8]: item.image.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(UserError, match='no photo of a whole batch'): list(make_loader(dataset, 4))


def test_mirrored_drawings_show_what_their_captions_say(tmp_path):
    "The one test that asks the pixels: a drawn scene, seen in a mirror, is what the mirrored caption says"
    scenes, rng = [], random.Random(0)
    while len(scenes) < 24:
        scene = random_scene(rng)
        if scene.relation: scenes.append(scene)
    drawings = []
    for i, scene in enumerate(scenes):
        draw_scene(scene, size=64, seed=i).save(tmp_path/f'{i}.png')
        drawings.append(Item(tmp_path/f'{i}.png', tuple(describe_scene(scene, n=3, seed=i))))
    vocab = Vocab.build([f for d in drawings for c in d.captions for f in (c, flip_caption(c))], min_count=1)
    look = ImageTransform(64)
    dataset = CaptionDataset(drawings, vocab, look, views=('plain', 'flip'), flip_caption=flip_caption)
    turned = 0
    for _, i, view, sample in epoch_of(dataset, 0):
        pixels = (look.undo(sample.image)*255).round().byte().permute(1, 2, 0).numpy()
        shown = read_scene(Image.fromarray(pixels))
        for ids in sample.captions: assert same_scene(parse_caption(vocab.decode(ids.tolist())), shown)
        turned += not same_scene(shown, scenes[i])
    assert turned > 3


def test_the_order_is_another_in_each_epoch_and_for_each_seed(items):
    "Only the order: no views and no choice of captions that could differ too"
    dataset = CaptionDataset(items, VOCAB, TRANSFORM)

    def order(seed, epoch):
        dataset.set_epoch(epoch)
        return [number(x)[0] for batch in make_loader(dataset, 4, shuffle=True, seed=seed) for x in batch.images]
    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(map(tuple, orders))) == 6 and all(sorted(o) == list(range(11)) for o in orders)
    assert order(0, 1) == orders[1]


@pytest.mark.parametrize('groups', [1, 3, 4])
def test_a_loader_makes_as_many_groups_as_it_is_told(items, groups):
    batch = next(iter(make_loader(CaptionDataset(items, VOCAB, TRANSFORM), 4, groups=groups)))
    assert len(batch.tokens) == len(batch.owners) == groups
