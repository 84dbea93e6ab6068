"Where a captioner looks, and where it fails."
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from multimodal.captioner import Memory
from multimodal.core import UserError, set_seed
from multimodal.encoder import ImageTransform
from multimodal.explain import (choose, drops, explain, explain_photos, figure_files, glow, look_again, share_on, show_words,
                                shrink, without)
from multimodal.failures import (COLOUR_WORDS, NUMBER_WORDS, OBJECTS, bleu_4, chair, ciders, contest, coverage, gender_of,
                                 genders, grouped, in_turn, knows, names_of, objects_in, people_in, plural, ranks, said_right,
                                 spearman, sureness)
from multimodal.generate import GenerateConfig
from multimodal.metrics import caption_metrics, ceiling, one_fewer
from multimodal.recipe import RunConfig
from multimodal.runs import Run, build_captioner
from multimodal.scenes import Scene, Thing, draw_scene
from multimodal.text import BOS, EOS, Vocab

SMALL = RunConfig(weights='none', trainable='all', stage=1, image_size=32, embedding_dim=32, n_layers=2, n_heads=4,
                  min_count=1, max_words=9, dropout=0.2)
WORDS = 'a big small red blue star circle on the left of and is one two'.split()
WAYS = {'greedy': GenerateConfig('greedy'), 'beam': GenerateConfig(beam=3), 'sample': GenerateConfig('sample', seed=3),
        'flip': GenerateConfig(beam=2, flip=True), 'closer': GenerateConfig(beam=2, flip=True, closer=True)}


def make_run(**changes):
    "A captioner that nobody trained, with weights so large that photos and places matter."
    config, vocab = replace(SMALL, **changes), Vocab(WORDS)
    set_seed(0)
    model = build_captioner(config, len(vocab))
    with torch.no_grad():
        for p in model.parameters(): p.add_(.15*torch.randn_like(p))
    return Run(None, config, model, vocab, [])


@pytest.fixture(scope='module')
def runs(): return {fusion: make_run(fusion=fusion) for fusion in ('cross', 'both', 'fc')}


@pytest.fixture(scope='module')
def photos():
    return [draw_scene(Scene((Thing(size, colour, 'star'),)), 40, seed=i)
            for i, (size, colour) in enumerate([('large', 'red'), ('small', 'blue'), ('large', 'green')])]


@pytest.fixture
def folder(photos, tmp_path):
    "Two photos of one name in two folders, a third, and one that is none."
    for place, photo in zip(('a', 'b'), photos):
        (tmp_path/'photos'/place).mkdir(parents=True)
        photo.save(tmp_path/'photos'/place/'dog.png')
    photos[2].save(tmp_path/'photos'/'cat.png')
    (tmp_path/'photos'/'broken.jpg').write_bytes(b'\xff\xd8 no photo')
    return tmp_path/'photos'


def ids_of(run, told): return torch.tensor(run.vocab.encode(told.caption))


# ---- the maps

@pytest.mark.parametrize('fusion', ['cross', 'both'])
@pytest.mark.parametrize('way', WAYS)
def test_explained_captions_are_those_of_the_run(runs, photos, tmp_path, fusion, way):
    for i, p in enumerate(photos): p.save(tmp_path/f'{i}.png')
    plain = runs[fusion].caption(tmp_path, WAYS[way])
    for told, row in zip(explain(runs[fusion], photos, WAYS[way]), plain, strict=True):
        assert told.caption == row['caption'] == ' '.join(told.words)
        assert told.logprob == pytest.approx(row['logprob'], abs=1e-3)
        assert len(told.words) == len(told.probabilities) == len(told.maps)
        end = told.logprob - sum(map(math.log, told.probabilities))                   # what is left is the end's
        assert end < 1e-3


def test_probabilities_are_those_of_the_model_word_by_word(runs, photos):
    run = runs['cross']
    told, model = explain(run, photos[:1])[0], run.model.eval()
    tokens = ids_of(run, told)
    for t, p in enumerate(told.probabilities):
        logits = model(ImageTransform(32)(photos[0])[None], tokens[None, :t + 1])[0, -1]
        assert p == pytest.approx(logits.softmax(-1)[tokens[t + 1]].item(), abs=1e-5)
    end = model(ImageTransform(32)(photos[0])[None], tokens[None, :-1])[0, -1].log_softmax(-1)[EOS].item()
    assert told.logprob == pytest.approx(sum(map(math.log, told.probabilities)) + end, abs=1e-3)


@pytest.mark.parametrize('way', ['beam', 'flip', 'closer'])
def test_each_map_is_a_share_of_one(runs, photos, way):
    for told in explain(runs['both'], photos, WAYS[way]):
        assert told.maps.shape == (len(told.words), 8, 8) and (told.maps >= 0).all()
        assert torch.allclose(told.maps.sum((1, 2)), torch.ones(len(told.words)), atol=1e-5)


def test_a_map_belongs_to_its_word(runs, photos):
    "It is the last look of a model that has read the words before it and nothing else."
    run = runs['cross']
    told = explain(run, photos[1:2])[0]
    for t in range(len(told.words)):
        so_far = torch.tensor([[BOS, *(run.vocab.ids[w] for w in told.words[:t])]])
        alone = run.model.eval().attention_maps(ImageTransform(32)(photos[1])[None], so_far)[0, :, :, -1].mean((0, 1))
        assert torch.allclose(told.maps[t].flatten(), alone, atol=1e-5)
    assert (told.maps[0] - told.maps[1]).abs().max() > 1e-3                            # so they are not all the same


def test_blocks_and_heads_can_be_chosen_and_their_mean_is_the_map(runs, photos):
    run = runs['both']
    one = lambda **which: explain(run, photos[:1], WAYS['greedy'], **which)[0].maps
    assert torch.allclose(torch.stack([one(block=b, head=h) for b in range(2) for h in range(4)]).mean(0), one(), atol=1e-6)
    assert torch.allclose(torch.stack([one(head=h) for h in range(4)]).mean(0), one(), atol=1e-6)
    assert (one(block=0) - one(block=1)).abs().max() > 1e-3
    for wrong in dict(block=2), dict(block=-1), dict(head=4):
        with pytest.raises(UserError, match='counted from 0'): one(**wrong)
    with pytest.raises(UserError, match='head 4: this model has 4'): choose(torch.ones(1, 2, 4, 3, 9), head=4)


@pytest.mark.parametrize('way', ['flip', 'closer'])
def test_with_two_looks_a_mirrored_photo_has_mirrored_maps(runs, photos, way):
    mirrored = photos[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    a, b = explain(runs['cross'], [photos[0], mirrored], WAYS[way])
    assert a.words == b.words and torch.allclose(a.maps, b.maps.flip(-1), atol=1e-4)
    assert (a.maps - b.maps).abs().max() > 1e-4


def test_a_model_in_training_is_explained_without_dropout_and_stays_in_training(runs, photos):
    run = runs['cross']
    run.model.train()
    once, again = (explain(run, photos[:1])[0] for _ in range(2))
    assert run.model.training and torch.equal(once.maps, again.maps) and once.probabilities == again.probabilities
    run.model.eval()
    assert torch.allclose(explain(run, photos[:1])[0].maps, once.maps) and not run.model.training
    assert explain(run, []) == []


def test_padding_of_shorter_captions_changes_nothing(runs, photos):
    model = runs['cross'].model.eval()
    with torch.no_grad(): features = model.encoder.features(torch.stack([ImageTransform(32)(p) for p in photos[:2]]))
    tokens = torch.tensor([[BOS, 5, 6, EOS, 0, 0], [BOS, 5, 7, 8, 9, EOS]])
    logprobs, maps = look_again(model, [features], tokens)
    short = look_again(model, [features[:1]], tokens[:1, :4])
    assert torch.allclose(logprobs[0, :3], short[0][0], atol=1e-5) and torch.allclose(maps[0, :3], short[1][0], atol=1e-6)


@pytest.mark.parametrize('changes,word', [({'fusion': 'fc'}, "'fc'"), ({'fusion': 'cross', 'pool': 'vector'}, "'vector'")])
def test_a_model_that_cannot_look_says_so_in_one_line(photos, folder, tmp_path, changes, word):
    run = make_run(**changes)
    with pytest.raises(UserError, match=word) as e: explain(run, photos)
    assert '\n' not in str(e.value)
    with pytest.raises(UserError, match=word): explain_photos(run, folder/'broken.jpg', tmp_path/'out')   # said first
    assert not (tmp_path/'out').exists()


# ---- pictures

def test_glow_lies_where_the_heat_is():
    grey, heat = Image.new('RGB', (60, 30), (128, 128, 128)), torch.zeros(2, 2)
    heat[0, 1] = 1
    lit = np.asarray(glow(grey, heat)).astype(int).sum(-1)                             # [30, 60]
    assert lit.shape == (30, 60)
    assert lit[:5, -5:].mean() > 1.5*max(lit[-5:, -5:].mean(), lit[:5, :5].mean(), lit[-5:, :5].mean())


@pytest.mark.parametrize('size,wanted', [((400, 200), (200, 100)), ((4000, 3), (200, 1)), ((10, 20), (100, 200)), ((1, 1), (200, 200))])
def test_photos_of_any_form_are_shrunk(size, wanted):
    assert shrink(Image.new('RGB', size)).size == wanted


def test_a_figure_has_the_photo_and_a_picture_for_each_word(runs, photos):
    import matplotlib.pyplot as plt
    told = explain(runs['cross'], photos[:1])[0]
    figure = show_words(photos[0], told)
    titles = [ax.get_title() for ax in figure.axes if ax.images]
    plt.close(figure)
    assert titles == ['', *(f'{w} {p:.0%}' for w, p in zip(told.words, told.probabilities))]


def test_share_on_a_region():
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0], maps[1] = 1, 1/16
    left = np.zeros((12, 12), bool)
    left[:, :6] = True
    corner = np.zeros((12, 12), bool)
    corner[0, 0] = True                                                                # a ninth of the first place
    assert share_on(maps, left).tolist() == pytest.approx([1, .5])
    assert share_on(maps, corner).tolist() == pytest.approx([1/9, 1/144])
    assert share_on(maps, ~left).tolist() == pytest.approx([0, .5])


# ---- photos from a disk

def test_explained_photos_are_captioned_ones_with_words_and_figures(runs, folder, tmp_path):
    import matplotlib.pyplot as plt
    before, broken, out = plt.get_fignums(), [], tmp_path/'out'
    rows = explain_photos(runs['cross'], folder, out, WAYS['beam'], batch_size=2, say=broken.append)
    plain = runs['cross'].caption(folder, WAYS['beam'], say=lambda line: None)
    assert [(r['image'], r['caption']) for r in rows] == [(r['image'], r['caption']) for r in plain]
    assert [r['logprob'] for r in rows] == pytest.approx([r['logprob'] for r in plain], abs=1e-3)
    for r in rows:
        assert ' '.join(w['word'] for w in r['words']) == r['caption'] and all(0 < w['probability'] <= 1 for w in r['words'])
        with Image.open(r['figure']) as figure: assert figure.format == 'PNG' and min(figure.size) > 100
    assert len(broken) == 1 and 'broken.jpg' in broken[0]
    assert sorted(p.name for p in out.iterdir()) == ['cat_words.png', 'dog_words-2.png', 'dog_words.png']    # no leftovers
    assert plt.get_fignums() == before
    assert json.loads(json.dumps(rows)) == rows


def test_a_second_time_gives_the_same_files_and_figures_are_no_photos(runs, folder):
    quiet = dict(say=lambda line: None)
    first = explain_photos(runs['cross'], folder, folder, **quiet)                     # figures among the photos
    there = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    assert explain_photos(runs['cross'], folder, folder, **quiet) == first
    assert {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}.keys() == there.keys()
    assert all(p.read_bytes() == there[p] for p in (folder/'a'/'dog.png', folder/'cat.png'))
    with pytest.raises(UserError, match='no photos'): explain_photos(runs['cross'], [first[0]['figure']], folder)


def test_nothing_readable_is_an_error_and_leaves_no_folder(runs, folder, tmp_path):
    for paths, match in (([folder/'broken.jpg'], 'broken.jpg'), (tmp_path/'none', 'no such file'),
                         ([folder/'broken.jpg', folder/'a'/'..'/'broken.jpg'], 'none of 2')):
        with pytest.raises(UserError, match=match): explain_photos(runs['cross'], paths, tmp_path/'out')
    with pytest.raises(UserError, match='batch_size 0'): explain_photos(runs['cross'], folder, tmp_path/'out', batch_size=0)
    assert not (tmp_path/'out').exists()


def test_a_full_disk_leaves_nothing_half_written(runs, folder, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    whole, written = Figure.savefig, []
    def savefig(self, path, **how):
        whole(self, path, **how)
        written.append(path)
        if len(written) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Figure, 'savefig', savefig)
    with pytest.raises(UserError, match='No space left'): explain_photos(runs['cross'], folder, tmp_path/'out', say=print)
    left = list((tmp_path/'out').iterdir())
    assert len(left) == 1
    with Image.open(left[0]) as figure: figure.load()                                  # the first one is whole
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='file: is a file, where a folder'):
        explain_photos(runs['cross'], folder/'cat.png', tmp_path/'file')


def test_no_two_figures_share_a_file_and_none_is_written_over_a_photo(tmp_path):
    names = ['x/dog.jpg', 'y/dog.jpg', 'y/dog.png', 'y/DOG.JPG', 'out/dog_words.png', 'out/dog_words-2.png', 'z/dog_words.jpg',
             'é'*200 + '.jpg', 'é'*200 + '.png', 'y/.jpg']
    photos = [tmp_path/n for n in names]
    files = figure_files(photos, tmp_path/'out')
    assert len({str(f).lower() for f in files}) == len(names)
    assert not {str(f).lower() for f in files} & {str(p).lower() for p in photos}
    assert all(f.parent == tmp_path/'out' and len(f.name.encode()) < 200 for f in files)
    assert figure_files(photos[:1], tmp_path/'out') == [tmp_path/'out'/'dog_words.png']


# ---- places taken away

@pytest.fixture(scope='module')
def seen(runs, photos):
    "For each fusion that looks: model, the grid of a photo, its caption as ids, and what was told of it."
    found = {}
    for fusion in 'cross', 'both':
        run = runs[fusion]
        told = explain(run, photos[:1], WAYS['greedy'])[0]
        with torch.no_grad(): vectors = run.model.eval().encode(ImageTransform(32)(photos[0])[None])[0]
        found[fusion] = run.model, vectors, ids_of(run, told), told
    return found


@pytest.mark.parametrize('fusion', ['cross', 'both'])
def test_without_nothing_taken_away_words_are_as_likely_as_before(seen, fusion):
    model, vectors, tokens, told = seen[fusion]
    T = len(told.words)
    logp = without(model, vectors, tokens, torch.arange(T), torch.zeros(T, 0, dtype=torch.long))
    assert logp.exp().tolist() == pytest.approx(told.probabilities, abs=1e-4)


@pytest.mark.parametrize('fusion', ['cross', 'both'])
def test_what_is_left_is_all_that_is_seen(seen, fusion):
    "With all places but some gone, a word is as likely as with a photo of these places alone."
    model, vectors, tokens, told = seen[fusion]
    for left in [3], [0, 63], [5, 1, 40]:
        gone = torch.tensor([p for p in range(64) if p not in left])
        for t in 0, len(told.words) - 1:
            logp = without(model, vectors, tokens, torch.tensor([t]), gone[torch.randperm(len(gone))][None])
            with torch.no_grad():
                memory = model.remember(vectors[sorted(left)][None])
                alone = model.head(model.hidden(tokens[None, :t + 1], memory))[0, -1].log_softmax(-1)[tokens[t + 1]]
            assert logp.item() == pytest.approx(alone.item(), abs=1e-4)
    with pytest.raises(UserError, match='64 of 64'):
        without(model, vectors, tokens, torch.tensor([0]), torch.arange(64)[None])


def test_the_average_can_be_kept_whole_where_there_is_one(seen):
    word, gone = torch.tensor([0, 1]), torch.arange(60).expand(2, -1)
    lost, kept = (without(*seen['cross'][:3], word, gone, whole) for whole in (False, True))
    assert torch.allclose(lost, kept)                                                  # cross has no average
    model, vectors, tokens, _ = seen['both']
    lost, kept = (without(model, vectors, tokens, word, gone, whole) for whole in (False, True))
    assert (lost - kept).abs().max() > 1e-3
    with torch.no_grad():
        memory = Memory(vectors[None], model.remember(vectors[None, 60:]).keys_values)
        by_hand = model.head(model.hidden(tokens[None, :-1], memory))[0].log_softmax(-1)
    assert kept.tolist() == pytest.approx([by_hand[t, tokens[t + 1]].item() for t in (0, 1)], abs=1e-4)


def test_drops_take_from_each_word_what_it_looked_at(seen):
    model, vectors, tokens, told = seen['cross']
    T, k = len(told.words), 7
    lost = drops(model, vectors, tokens, told.maps, k)
    full = torch.tensor(told.probabilities).log()
    by_hand = lambda maps: full - without(model, vectors, tokens, torch.arange(T), maps.flatten(1).topk(k).indices)
    assert torch.allclose(lost['most'], by_hand(told.maps), atol=1e-4)
    assert torch.allclose(lost['least'], by_hand(-told.maps), atol=1e-4)
    assert torch.allclose(lost["another word's"], by_hand(told.maps.roll(max(1, T//2), 0)), atol=1e-4)
    assert all(x.shape == (T,) for x in lost.values())
    assert torch.equal(lost['random'], drops(model, vectors, tokens, told.maps, k)['random'])      # the same seed
    assert not torch.equal(lost['random'], drops(model, vectors, tokens, told.maps, k, seed=1)['random'])
    with pytest.raises(UserError, match='of 64'): drops(model, vectors, tokens, told.maps, 65)
    one = drops(model, vectors, tokens[[0, 1, -1]], told.maps[:1], k)                              # one word, no other
    assert torch.allclose(one['most'], lost['most'][:1], atol=1e-4)


# ---- captions one by one, and in groups

DOGS = [{'caption': 'a dog runs on grass', 'references': ['a dog runs on the grass', 'a brown dog runs', 'the puppy plays']},
        {'caption': 'a man in a red shirt', 'references': ['a woman in red', 'a lady stands', 'two women']},
        {'caption': 'people', 'references': ['a boy swims', 'a child in a pool', 'a kid in the water']}]


def test_scores_of_single_captions_are_those_of_coco_caption():
    from pycocoevalcap.cider.cider import Cider
    captions, references = [r['caption'] for r in DOGS] + [''], [r['references'] for r in DOGS] + [['a cat']]
    theirs = Cider().compute_score(dict(enumerate(references)), {i: [c] for i, c in enumerate(captions)})[1]
    assert ciders(captions, references).tolist() == pytest.approx(theirs.tolist(), abs=1e-9)
    assert ciders(['A dog.'], [['a dog'] * 2]).shape == (1,)
    for wrong in (['a'], []), ([], []), (['a', 'b'], [['a'], []]):
        with pytest.raises(UserError): ciders(*wrong)


def test_everybody_is_held_against_the_same_references():
    turns = contest(DOGS, 'a dog')
    assert len(turns) == 3
    for j, (said, rest) in enumerate(turns):
        assert said['model'] == [r['caption'] for r in DOGS] and said['constant'] == ['a dog'] * 3
        assert said['another photo'] == [DOGS[1]['caption'], DOGS[2]['caption'], DOGS[0]['caption']]
        for k, r in enumerate(DOGS): assert sorted([said['person'][k], *rest[k]]) == sorted(r['references'])
    first, people = turns[:1], [r['references'] for r in DOGS]
    how = dict(tokenizer='python', meteor=False)
    assert in_turn(first, ciders)['person'].mean() == pytest.approx(ceiling(people, **how)['cider'])
    wanted = one_fewer([r['caption'] for r in DOGS], people, **how)
    assert in_turn(first, ciders)['model'].mean() == pytest.approx(wanted['cider'])
    assert in_turn(first, bleu_4)['model'] == pytest.approx(wanted['bleu_4'])
    for rows in [], [{'caption': 'a', 'references': ['b']}]:
        with pytest.raises(UserError, match='two references'): contest(rows, 'a')


def test_groups_are_parts_of_the_whole():
    turns = contest(DOGS, 'a dog')
    table, all_of_it = grouped(turns, ['b', 'a', 'b']), grouped(turns, [0, 0, 0])
    assert list(table.index) == ['a', 'b'] and table['photos'].tolist() == [1, 2] and all_of_it['photos'].tolist() == [3]
    scores = in_turn(turns, ciders)
    for who in 'constant', 'model', 'person':
        column = table[f'CIDEr {who}']
        assert (column * table['photos']).sum()/3 == pytest.approx(all_of_it[f'CIDEr {who}'].item())
        assert column['a'] == pytest.approx(100*scores[who][1])
    assert list(grouped(turns, ['b', 'a', 'b'], groups=['b', 'a']).index) == ['b', 'a']
    captions, references = [r['caption'] for r in DOGS], [r['references'] for r in DOGS]
    assert bleu_4(captions, references) == pytest.approx(caption_metrics(captions, references, 'python', False)['bleu_4'])


# ---- things

@pytest.mark.parametrize('caption,wanted', [
    ('Two puppies chase a dog.', {'dog'}), ('the women, the child and a policeman', {'person'}),
    ('a girl in a bathing suit eats a hot dog', {'person', 'swimsuit', 'hot_dog'}), ('a suit', {'suit'}),
    ('a surfer', {'person', 'surfboard', 'water'}), ('cyclists in a field', {'person', 'bike', 'grass'}),
    ('a boy with sunglasses and a baseball cap', {'person', 'glasses', 'hat'}), ('a baseball', {'ball'}),
    ('an animal looks at the camera', set()), ('', set()), ('a man wearing tank tops', {'person', 'shirt'}),
    ('leaves and benches', {'leaf', 'bench'}), ('a dogged doggy catwalk', set())])
def test_objects_that_a_caption_names(caption, wanted): assert objects_in(caption) == wanted


def test_the_table_of_objects_is_sound():
    groups = set().union(*OBJECTS.values())
    assert 100 < len(groups) < 200 and all(g in OBJECTS[g] for g in groups)
    assert all(name == name.lower() and name.replace('_', '').isalpha() for name in OBJECTS)
    assert names_of('dog puppy; cat kitty;') == {w: {'dog'} for w in ('dog', 'dogs', 'puppy', 'puppies')} | {
        w: {'cat'} for w in ('cat', 'cats', 'kitty', 'kitties')}
    assert [plural(w) for w in ('bus', 'box', 'bush', 'fly', 'toy', 'fireman', 'person')] == [
        'buses', 'boxes', 'bushes', 'flies', 'toys', 'firemen', 'people']


def test_invented_things_by_hand():
    references = [['a puppy in a meadow', 'a brown dog'], ['a woman', 'someone with a hat']]
    said = ['dogs on the grass', 'a man in a cap and jacket rides a motorcycle']       # jacket and motorcycle are not there
    assert chair(said, references).tolist() == pytest.approx([2/6, 1/2, 3])
    assert chair(['nothing to see'], [['a dog']]).tolist() == [0, 0, 0]
    assert chair(said, [r + ['a biker in a coat'] for r in references])[0] == 0
    some = in_turn(contest([{'caption': s, 'references': r} for s, r in zip(said, references)], 'a cat'), chair)
    assert some['constant'].tolist() == [1, 1, 1] and some['model'][0] > 2/6            # fewer witnesses, more invented


# ---- colours, numbers, people

def test_colours_and_numbers_by_hand():
    references = [['a red dog', 'a red and gray dog', 'a dog'], ['two men', 'two men', '2 people in blue']]
    said = ['a grey dog and a green ball', 'two men in blue']
    assert said_right(said, references, COLOUR_WORDS).tolist() == pytest.approx([2/3, 0, 3/2])     # of red, nothing
    assert said_right(said, references, NUMBER_WORDS).tolist() == pytest.approx([1, 1, 1/2])
    assert said_right(['a dog'], [['a dog']], NUMBER_WORDS).tolist() == [0, 0, 0]


@pytest.mark.parametrize('captions,gender', [
    (['a man'], 'male'), (['a person', 'a girl'], 'female'), (['a man', 'a woman'], 'both'), (['a child', 'a player'], 'unnamed'),
    (['a dog', 'grass'], 'nobody'), (['a person and his bike'], 'male'), (['ladies'], 'female'), (['a female swimmer'], 'female'),
    (['the bride and groom'], 'both'), (['a snowboarder'], 'unnamed'), (['a woman with human hair'], 'female')])
def test_gender_that_captions_name(captions, gender): assert gender_of(captions) == gender


@pytest.mark.parametrize('caption,n', [('a man', 1), ('a man and a woman', 2), ('two young boys', 2), ('three men', 3), ('men', 3),
                                       ('a crowd', 3), ('a dog', 0), ('a boy with another boy and a girl', 3),
                                       ('a cyclist and his dog', 1), ('both women', 2)])
def test_people_that_a_caption_counts(caption, n): assert people_in(caption) == n


def test_genders_by_hand():
    rows = [{'caption': 'a man', 'references': ['a person', 'a biker', 'someone']},
            {'caption': 'a woman', 'references': ['a man', 'a woman', 'a boy']},
            {'caption': 'a man', 'references': ['two men', 'a man and a woman', 'people']}]        # more than one: not asked
    turns = contest(rows, 'a dog')
    assert genders(turns, 'model') == pytest.approx({('unnamed', 'male'): 1, ('both', 'female'): 2/3, ('male', 'female'): 1/3})
    assert genders(turns, 'person') == pytest.approx(
        {('unnamed', 'unnamed'): 1, ('both', 'male'): 2/3, ('male', 'female'): 1/3})
    assert genders(turns, 'constant') == pytest.approx({('unnamed', 'nobody'): 1, ('both', 'nobody'): 2/3, ('male', 'nobody'): 1/3})


# ---- how sure it is

def test_sureness_counts_the_end_as_a_word():
    rows = [{'caption': 'a dog .', 'logprob': -3.}, {'caption': '', 'logprob': -.5}]
    assert sureness(rows).tolist() == [-1, -.5] and sureness(rows, per_word=False).tolist() == [-3, -.5]


numbers = st.lists(st.integers(0, 9).map(float), min_size=2, max_size=40)

@given(numbers, st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_a_coverage_curve_ends_at_the_mean_and_nothing_is_above_the_oracle(scores, luck):
    scores, order = np.array(scores), np.array([luck.random() for _ in scores])
    curve, best, worst = (coverage(scores, o) for o in (order, scores, -scores))
    assert curve[0] == scores[order.argmax()] and curve[-1] == pytest.approx(scores.mean())
    assert best[0] == scores.max() and (best >= curve - 1e-9).all() and (worst <= curve + 1e-9).all()
    assert knows(scores, order) <= 1 + 1e-9
    assert knows(scores, scores) == pytest.approx(1 if scores.std() else 0)


@given(numbers, numbers)
@settings(max_examples=100)
def test_rank_correlation_is_that_of_pandas(a, b):
    import pandas as pd
    n = min(len(a), len(b))
    a, b = np.array(a[:n]), np.array(b[:n])
    assert ranks(a).tolist() == (pd.Series(a).rank() - 1).tolist()
    if a.std() and b.std(): assert spearman(a, b) == pytest.approx(pd.DataFrame({'a': a, 'b': b}).corr('spearman').iloc[0, 1])


def test_coverage_by_hand_and_its_errors():
    assert coverage(np.array([1., 3., 2.]), np.array([.1, .9, .5])).tolist() == [3, 2.5, 2]
    for wrong in ([], []), ([1.], [1., 2.]):
        with pytest.raises(UserError, match='coverage'): coverage(np.array(wrong[0]), np.array(wrong[1]))

