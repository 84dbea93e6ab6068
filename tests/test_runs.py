"""A captioning run as a whole: its recipe, its loss, its folder, and what happens when something in it is wrong."""
import json
import math
import os
import resource
import shutil
import signal
import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import multimodal.tasks
from multimodal.captioner import Captioner
from multimodal.core import UserError, set_seed
from multimodal.dataloaders import Batch, CaptionDataset, make_loader
from multimodal.datasets import CaptionData, load_dataset, read_flickr8k
from multimodal.durable import SUMS
from multimodal.encoder import ImageTransform
from multimodal.generate import GenerateConfig
from multimodal.recipe import RunConfig, caption_loss, hide_words, make_loaders, run_config
from multimodal.runs import load_run, train_captions
from multimodal.shapes import make_shapes
from multimodal.text import UNK, Vocab
from multimodal.training import Interrupted

SMALL = RunConfig(data='shapes', weights='none', trainable='none', stage=2, image_size=32, embedding_dim=32, n_layers=1,
                  n_heads=2, min_count=1, max_words=30, dropout=0.1, epochs=2, lr=2e-3, batch_size=8, ema=0.9,
                  label_smoothing=0.1)                       # 5 steps an epoch


def quiet(line): pass


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return read_flickr8k(make_shapes(tmp_path_factory.mktemp('data')/'shapes', n=48, size=32))


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    "A folder of runs with one finished run in it; tests that change it take a copy."
    folder = tmp_path_factory.mktemp('runs')
    train_captions(data, folder/'run', SMALL, device='cpu', say=quiet)
    return folder/'run'


@pytest.fixture
def sealed(trained, tmp_path): return Path(shutil.copytree(trained, tmp_path/'run'))


@pytest.fixture
def copy(sealed):
    "As from before there were checksums and the state before the last."
    for path in sealed.rglob(SUMS): path.unlink()
    for path in sealed.glob('.*.before'): shutil.rmtree(path)
    (sealed/'last'/'history.jsonl').unlink()
    return sealed


def same_weights(a, b):
    return all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())


@pytest.mark.parametrize('line', [b'\xff\xfe', b'5', b'{}', b'[]', b'{"loss": 1'])
def test_a_broken_history_is_one_clear_line(copy, line):
    "Broken anywhere but at the end, where a copy at a bad moment may have cut it."
    path = copy/'history.jsonl'
    path.write_bytes(line + b'\n' + path.read_bytes())
    with pytest.raises(UserError, match='history.jsonl, line 1'): load_run(copy, device='cpu')


def test_an_optimizer_of_another_model_is_one_clear_line(copy, data, tmp_path):
    train_captions(data, tmp_path/'wide', replace(SMALL, embedding_dim=64), device='cpu', say=quiet)
    shutil.copy(tmp_path/'wide'/'last'/'optimizer.safetensors', copy/'last')
    with pytest.raises(UserError, match='does not belong to this model'):
        train_captions(data, copy, replace(SMALL, epochs=2), resume=True, device='cpu', say=quiet)


# ---- the recipe

plain = {int: st.integers(1, 8), bool: st.just(False), str: st.text('abc/', max_size=5), float: st.floats(0.001, 0.99)}
free = {f.name: plain[type(f.default)] for f in fields(RunConfig)
        if f.name not in ('fusion', 'stage', 'pool', 'trainable', 'views', 'precision', 'optimizer', 'image_size', 'n_heads',
                          'samples')}


@given(st.fixed_dictionaries({}, optional=free))
@settings(max_examples=50)
def test_a_recipe_comes_back_from_json_as_it_was(values):
    config = RunConfig(**{**values, 'n_heads': 1})
    assert run_config(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize('values,message', [
    ({'learning_rate': 1}, "no setting 'learning_rate'"), ({'epoch': 3}, "did you mean 'epochs'"),
    ([1], 'does not hold the settings'), ({'lr': 'high'}, 'lr must be of type float'), ({'epochs': 2.0}, 'epochs must be of type int'),
    ({'epochs': True}, 'epochs must be of type int'), ({'augment': 0}, 'augment must be of type bool'),
    ({'weights': None}, 'weights must be of type str'), ({'stage': 9}, 'stage'), ({'fusion': 'magic'}, 'fusion'),
    ({'views': 'plain,up'}, 'up'), ({'batch_size': 0}, 'batch_size'), ({'lr': -1.0}, 'lr'), ({'n_layers': 0}, 'n_layers'),
    ({'label_smoothing': 1.0}, 'label_smoothing'), ({'augment': True}, 'augment')])
def test_a_wrong_setting_is_named(values, message):
    with pytest.raises(UserError, match=message) as e: run_config(values, 'RUN/config.json')
    assert '\n' not in str(e.value)


# ---- the loss

def shake(model):
    "Large random weights, or the photos would hardly matter."
    set_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(0.2 * torch.randn_like(p))


def some_batch(data, config=SMALL, groups=4):
    vocab = Vocab.build([c for i in data['train'] for c in i.captions], 1)
    set_seed(0)
    model = Captioner(config.captioner(len(vocab)))
    shake(model)
    dataset = CaptionDataset(data['train'], vocab, ImageTransform(32), config.max_words)
    return model, next(iter(make_loader(dataset, 8, groups)))


def test_the_loss_is_cross_entropy_without_padding(data):
    model, batch = some_batch(data)
    model.eval()
    wanted, n = 0.0, 0
    for tokens, owners in zip(batch.tokens, batch.owners):
        for row, owner in zip(tokens, owners):               # caption by caption: no padding at all
            row = row[row != 0]
            logits = model(batch.images[owner][None], row[None, :-1])
            wanted, n = wanted + F.cross_entropy(logits[0], row[1:], reduction='sum').item(), n + len(row) - 1
    total, count, shown = caption_loss(model, batch)
    assert count == n and total.item() == pytest.approx(wanted, rel=1e-4)
    assert shown['loss'].item() == pytest.approx(wanted, rel=1e-4) and 0 <= shown['accuracy'] <= n
    wide = Batch(batch.images, [F.pad(t, (0, 3)) for t in batch.tokens], batch.owners)
    assert caption_loss(model, wide)[0].item() == pytest.approx(wanted, rel=1e-4)
    _, one_group = some_batch(data, groups=1)
    assert caption_loss(model, one_group)[0].item() == pytest.approx(wanted, rel=1e-4)


def test_label_smoothing_is_torchs_and_for_training_only(data):
    model, batch = some_batch(data, replace(SMALL, dropout=0.0, trainable='none'))
    wanted = 0.0
    for tokens, owners in zip(batch.tokens, batch.owners):
        logits = model(batch.images, tokens[:, :-1], owners).transpose(1, 2)
        wanted += F.cross_entropy(logits, tokens[:, 1:], ignore_index=0, reduction='sum', label_smoothing=0.2).item()
    total, n, shown = caption_loss(model.train(), batch, smoothing=0.2)
    assert total.item() == pytest.approx(wanted, rel=1e-4) and abs(total.item() - shown['loss'].item()) > 1e-3
    total, n, shown = caption_loss(model.eval(), batch, smoothing=0.2)
    assert total.item() == shown['loss'].item()


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_word_dropout_hides_that_share_of_the_words_and_nothing_else(share):
    set_seed(0)
    tokens = torch.randint(0, 9, (200, 20))
    hidden = hide_words(tokens, share)
    assert torch.equal(hidden[tokens <= UNK], tokens[tokens <= UNK])
    words = tokens > UNK
    changed = hidden[words] != tokens[words]
    assert changed.float().mean().item() == pytest.approx(share, abs=0.03) and (hidden[words][changed] == UNK).all()


def test_word_dropout_is_for_training_only_and_for_inputs_only(data):
    model, batch = some_batch(data, replace(SMALL, dropout=0.0, trainable='none'))
    shake(model)
    plain = caption_loss(model.eval(), batch)[0].item()
    assert caption_loss(model, batch, word_dropout=0.9)[0].item() == plain
    total, n, _ = caption_loss(model.train(), batch, word_dropout=0.9)
    assert abs(total.item() - plain) > 1e-3 and n == caption_loss(model, batch)[1]


def test_no_gradient_reaches_a_frozen_trunk_and_all_else_learns(data):
    model, batch = some_batch(data)
    caption_loss(model.train(), batch)[0].backward()
    for name, p in model.named_parameters(): assert (p.grad is None) == name.startswith('encoder.trunk'), name


def test_cached_features_and_pixels_give_the_same_loss(data, tmp_path):
    vocab = Vocab.build([c for i in data['train'] for c in i.captions], 1)
    set_seed(0)
    model = Captioner(SMALL.captioner(len(vocab))).eval()
    cached = make_loaders(data, SMALL, vocab, model.encoder, tmp_path)[1]
    pixels = make_loader(CaptionDataset(data['dev'], vocab, ImageTransform(32), 30), 8)
    for a, b in zip(cached, pixels):
        assert a.images.dim() == 3 and b.images.dim() == 4
        assert caption_loss(model, a)[0].item() == pytest.approx(caption_loss(model, b)[0].item(), rel=1e-3)
    train, dev = make_loaders(data, replace(SMALL, views='flip,crop0'), vocab, model.encoder, tmp_path)
    assert set(train.dataset.view) <= {'flip', 'crop0'} and set(dev.dataset.view) == {'plain'}


# ---- the run

def test_the_run_folder_holds_what_it_promises_and_no_pickles(trained, data):
    files = {str(p.relative_to(trained)) for p in trained.rglob('*') if p.is_file()}
    best = {'model.safetensors', 'config.json', 'vocab.json', SUMS}
    last = {'model.safetensors', 'optimizer.safetensors', 'ema.safetensors', 'history.jsonl', 'state.json', SUMS}
    before = {p for p in files if p.startswith(('.best.before/', '.last.before/'))}
    assert files - before == {'config.json', 'vocab.json', SUMS, 'history.jsonl', '.lock', *(f'best/{p}' for p in best),
                              *(f'last/{p}' for p in last)}
    assert {p for p in before if '.last' in p} == {f'.last.before/{p}' for p in last}
    kept = json.loads((trained/'config.json').read_text())
    assert kept.pop('task') == 'caption' and run_config(kept) == SMALL
    run = load_run(trained, device='cpu')
    best = min(r['dev_loss'] for r in run.history)
    assert run.predict(data, 'dev')[1]['loss'] == pytest.approx(best, rel=2e-3)       # bf16 products and fp16 features


@pytest.mark.parametrize('call', [3, 5, 8])                  # in the first epoch, at its end, in the second
def test_stopped_and_resumed_equals_never_stopped(data, trained, tmp_path, monkeypatch, call):
    calls = []
    def loss(model, batch, **settings):
        calls.append(model.training)
        if sum(calls) == call and model.training: signal.raise_signal(signal.SIGINT)
        return caption_loss(model, batch, **settings)
    monkeypatch.setattr(multimodal.runs, 'caption_loss', loss)
    with pytest.raises(Interrupted, match=r'mm_train shapes .*run --resume'):
        train_captions(data, tmp_path/'run', SMALL, device='cpu', say=quiet)
    monkeypatch.undo()
    if call == 3:
        with pytest.raises(UserError, match='no best/ yet'): load_run(tmp_path/'run')
    said = []
    resumed = train_captions(data, tmp_path/'run', resume=True, device='cpu', say=said.append)
    assert sum(line.startswith(f'going on after step {call} of ') for line in said) == 1
    straight = load_run(trained, device='cpu')
    assert same_weights(resumed, straight)
    assert [r['dev_loss'] for r in resumed.history] == [r['dev_loss'] for r in straight.history]
    assert resumed.caption(data['test'][0].image) == straight.caption(data['test'][0].image)


@pytest.mark.parametrize('change', [dict(trainable='all', captions_per_image=1), dict(trainable='last', augment=True), dict(fusion='fc', pool='vector'),
                                    dict(views='plain,flip,crop0')])
def test_other_recipes_train_resume_and_load(data, tmp_path, change):
    config = replace(SMALL, **change)
    def stop(line):
        if line.startswith('epoch'): signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted): train_captions(data, tmp_path/'a', config, device='cpu', say=stop)
    a = train_captions(data, tmp_path/'a', resume=True, device='cpu', say=quiet)
    b = train_captions(data, tmp_path/'b', config, device='cpu', say=quiet)
    assert same_weights(a, b) and len(a.history) == 2
    assert same_weights(load_run(tmp_path/'a', device='cpu'), b)


def test_evaluate_tells_teacher_forced_from_generated(data, trained):
    run = load_run(trained, device='cpu')
    shake(run.model)
    rows, forced = run.predict(data, 'test', GenerateConfig(beam=2))
    swapped = CaptionData('swapped', {'test': tuple(replace(i, captions=('a photo of something else',)) for i in data['test'])}, {})
    other_rows, other_forced = run.predict(swapped, 'test', GenerateConfig(beam=2))
    assert [r['caption'] for r in rows] == [r['caption'] for r in other_rows]         # references are never looked at
    assert forced['loss'] != other_forced['loss'] and all(r['caption'] for r in rows)
    assert [r['image'] for r in rows] == [str(i.image) for i in data['test']]
    alone = [run.caption(i.image, GenerateConfig(beam=2))[0] for i in data['test']]   # each with its own photo
    assert [r['caption'] for r in rows] == [r['caption'] for r in alone]
    assert [r['logprob'] for r in rows] == pytest.approx([r['logprob'] for r in alone], abs=1e-2)
    assert len({round(r['logprob'], 3) for r in rows}) == len(rows)
    scores = run.evaluate(data, 'test', GenerateConfig(beam=2))
    assert scores['perplexity'] == pytest.approx(math.exp(scores['loss'])) and scores['n_images'] == 4
    assert {'loss', 'perplexity', 'accuracy', 'bleu_1', 'bleu_4', 'rouge_l', 'meteor', 'cider'} <= scores.keys()
    json.dumps(scores)
    with pytest.raises(UserError, match='no train2 split; it has'): run.evaluate(data, 'train2')


def test_a_run_writes_with_its_own_length_penalty(data, trained):
    run = load_run(trained, device='cpu')
    captions = lambda run, **how: [r['caption'] for r in run.predict(data, 'dev', **how)[0]]
    short, long = (replace(run, config=replace(run.config, length_penalty=p)) for p in (-9., 9.))
    assert captions(short) == captions(run, config=GenerateConfig(length_penalty=-9.)) != captions(long)
    assert captions(long) == captions(short, config=long.how()) and short.how(length_penalty=1.).length_penalty == 1.
    words = lambda run: sum(len(c.split()) for c in captions(run))
    assert words(short) < words(long)


def test_captions_of_many_photos_are_those_of_each(data, trained, tmp_path):
    run = load_run(trained, device='cpu')
    photos = [i.image for i in data['train'][:7]]
    rows = run.caption(photos, batch_size=3)
    assert rows == [r | {'logprob': pytest.approx(r['logprob'], abs=1e-3)} for p in photos for r in run.caption(p)]
    for p in photos[:2]: shutil.copy(p, tmp_path)
    (tmp_path/'fake.jpg').write_bytes(b'GIF89a')
    said = []
    assert len(run.caption(tmp_path, say=said.append)) == 2 and 'fake.jpg' in said[0]
    with pytest.raises(UserError, match='fake.jpg'): run.caption(tmp_path/'fake.jpg')
    (tmp_path/'also.jpg').write_bytes(b'')
    with pytest.raises(UserError, match='none of 2 photos'): run.caption([tmp_path/'fake.jpg', tmp_path/'also.jpg'])
    with pytest.raises(UserError, match='nowhere'): run.caption(tmp_path/'nowhere.jpg')


def test_a_run_starts_from_another(data, trained, tmp_path):
    words = CaptionData('other words', {s: tuple(replace(i, captions=('a zebra',)) for i in data[s]) for s in ('train', 'dev')}, {})
    def stop(line):
        if line.startswith('epoch'): signal.raise_signal(signal.SIGINT)
    config = replace(SMALL, lr=1e-12, ema=0.0)
    with pytest.raises(Interrupted): train_captions(words, tmp_path/'b', config, device='cpu', say=stop, init=trained)
    run = train_captions(words, tmp_path/'b', resume=True, device='cpu', say=quiet)
    old = load_run(trained, device='cpu')
    assert run.vocab.words == old.vocab.words and run.config.init == str(trained)
    for k, v in run.model.state_dict().items(): assert torch.allclose(v, old.model.state_dict()[k], atol=1e-6), k
    with pytest.raises(UserError, match='another shape'):
        train_captions(data, tmp_path/'c', replace(SMALL, embedding_dim=64), device='cpu', init=trained)
    with pytest.raises(UserError, match='no run folder'): train_captions(data, tmp_path/'c', SMALL, init=tmp_path/'gone')
    assert not (tmp_path/'c').exists()


# ---- what can be wrong

@pytest.mark.parametrize('name', ['config.json', 'vocab.json', 'best/config.json', 'best/vocab.json', 'best/model.safetensors',
                                  'best'])
@pytest.mark.parametrize('harm', ['gone', 'cut', 'other'])
def test_a_half_written_run_is_one_clear_line(copy, name, harm):
    path = copy/name
    if path.is_dir():
        if harm == 'gone': shutil.rmtree(path)
        else: shutil.rmtree(path); path.mkdir()
    elif harm == 'gone': path.unlink()
    else: path.write_bytes(path.read_bytes()[:30] if harm == 'cut' else b'[1, 2]')
    with pytest.raises(UserError) as e: load_run(copy)
    assert '\n' not in str(e.value) and str(copy) in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize('name', ['config.json', 'vocab.json', 'best/config.json', 'best/vocab.json', 'best/model.safetensors',
                                  'best/SHA256SUMS', 'SHA256SUMS'])
@pytest.mark.parametrize('harm', ['flip', 'cut', 'gone'])
def test_a_spoilt_run_is_noticed_and_the_best_before_is_taken(sealed, capsys, name, harm):
    if harm == 'gone' and name.endswith(SUMS): pytest.skip('such a run is from before there were checksums')
    path, before = sealed/name, {k: v.clone() for k, v in load_run(sealed).model.state_dict().items()}
    data = path.read_bytes()
    if harm == 'gone': path.unlink()
    else: path.write_bytes(data[:-1] if harm == 'cut' else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    if not name.startswith('best'):
        with pytest.raises(UserError) as e: load_run(sealed)
        assert '\n' not in str(e.value) and str(path.parent) in str(e.value)
        return
    run = load_run(sealed)
    assert f'{path} ' in (said := capsys.readouterr().err) and 'taking the state before it' in said
    assert any(not torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    shutil.rmtree(sealed/'.best.before')
    with pytest.raises(UserError, match='no state before it is whole'): load_run(sealed)


def test_a_vocabulary_that_does_not_fit_is_refused(copy, data):
    vocab = Vocab.load(copy/'vocab.json')
    words = [w for w in vocab.words if not w.startswith('<')]
    shuffled = Vocab.build([' '.join(reversed(words))] * 2, 1)
    if shuffled.fingerprint() == vocab.fingerprint(): shuffled = Vocab.build([' '.join(words[1:] + ['zebra'])], 1)
    shuffled.save(copy/'vocab.json')
    with pytest.raises(UserError, match='vocab'): load_run(copy)
    vocab.save(copy/'vocab.json')
    shuffled.save(copy/'best'/'vocab.json')
    with pytest.raises(UserError, match='vocab'): load_run(copy)


def test_weights_of_another_model_are_refused(copy, data, tmp_path):
    train_captions(data, tmp_path/'wide', replace(SMALL, embedding_dim=48, epochs=1), device='cpu', say=quiet)
    shutil.copy(tmp_path/'wide'/'best'/'model.safetensors', copy/'best')
    with pytest.raises(UserError, match='model.safetensors'): load_run(copy)


def test_mistakes_are_refused_before_anything_is_changed(copy, data, tmp_path):
    before = {p: p.read_bytes() for p in copy.rglob('*') if p.is_file()}
    other = read_flickr8k(make_shapes(tmp_path/'other', n=24, size=32, p_two=0.0))
    no_dev = CaptionData('halves', {'train': data['train'], 'dev': ()}, {})
    for call, message in [
            (lambda: train_captions(data, copy, replace(SMALL, lr=0.5)), 'holds a run already'),
            (lambda: train_captions(other, copy, resume=True), 'other captions'),
            (lambda: train_captions(data, copy, replace(SMALL, lr=0.5), resume=True), 'lr=0.002, not 0.5'),
            (lambda: train_captions(data, copy, replace(SMALL, embedding_dim=64), resume=True), 'embedding_dim'),
            (lambda: train_captions(no_dev, copy, SMALL), 'halves has no dev split'),
            (lambda: train_captions(data, tmp_path/'new', resume=True), 'no run folder'),
            (lambda: train_captions(data, tmp_path/'w', replace(SMALL, weights=str(tmp_path/'none.pth'))), 'none.pth')]:
        with pytest.raises(UserError, match=message): call()
    assert not (tmp_path/'new').exists() and not (tmp_path/'w').exists()
    assert {p: p.read_bytes() for p in copy.rglob('*') if p.is_file()} == before


def test_what_can_be_refused_is_refused_before_features_are_computed(copy, data, tmp_path, monkeypatch):
    def never(*args): raise AssertionError('features were computed first')
    monkeypatch.setattr(multimodal.tasks, 'make_loaders', never)
    for run, config, resume, message in [(copy, replace(SMALL, lr=0.5), True, 'lr=0.002, not 0.5'),
                                         (tmp_path/'new', replace(SMALL, slow='decoderr'), False, 'decoderr')]:
        with pytest.raises(UserError, match=message): train_captions(data, run, config, resume, device='cpu', say=quiet)
    shutil.rmtree(copy/'last')
    with pytest.raises(UserError, match='nothing to resume'): train_captions(data, copy, resume=True, device='cpu', say=quiet)


def test_disk_full_while_training_keeps_the_best_so_far(data, trained, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    def full(line):
        if line.startswith('epoch'): resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(UserError, match='what was saved before is still whole'):
            train_captions(data, tmp_path/'run', SMALL, device='cpu', say=full)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_run(tmp_path/'run', device='cpu').caption(data['test'][0].image)
    resumed = train_captions(data, tmp_path/'run', resume=True, device='cpu', say=quiet)
    assert same_weights(resumed, load_run(trained, device='cpu'))


# ---- real photos

@pytest.mark.skipif(not (os.environ.get('MULTIMODAL_FLICKR8K') and os.environ.get('MULTIMODAL_RESNET18')),
                    reason='MULTIMODAL_FLICKR8K and MULTIMODAL_RESNET18 are not set')
def test_a_run_on_real_photos(tmp_path):
    root = Path(os.environ['MULTIMODAL_FLICKR8K'])
    if (root/'Flickr8k_text.zip').exists():
        with zipfile.ZipFile(root/'Flickr8k_text.zip') as text: text.extractall(tmp_path/'flickr8k')
        names = [(tmp_path/'flickr8k'/f'Flickr_8k.{s}Images.txt').read_text().split()[:n]
                 for s, n in (('train', 48), ('dev', 8), ('test', 8))]
        with zipfile.ZipFile(root/'Flickr8k_Dataset.zip') as photos:
            for name in sum(names, []): photos.extract(f'Flicker8k_Dataset/{name}', tmp_path/'flickr8k')
        root = tmp_path/'flickr8k'
    full = load_dataset(root)
    data = CaptionData('flickr8k', {s: full[s][:n] for s, n in (('train', 48), ('dev', 8), ('test', 8))}, {})
    config = RunConfig(weights=os.environ['MULTIMODAL_RESNET18'], embedding_dim=64, n_layers=1, min_count=2, epochs=3,
                       lr=3e-3, batch_size=8)
    run = train_captions(data, tmp_path/'run', config, device='cpu', say=quiet)
    assert run.history[-1]['dev_loss'] < run.history[0]['dev_loss'] < math.log(len(run.vocab))
    assert (tmp_path/'run'/'best'/'model.safetensors').stat().st_size < 2e6          # the ResNet18 is not stored again
    assert len(run.predict(data, 'test')[0]) == 8
    with pytest.raises(UserError, match='another ResNet18'):
        other = tmp_path/'other.pth'
        torch.save({k: v * 1.01 for k, v in torch.load(config.weights, weights_only=True).items()}, other)
        load_run(tmp_path/'run', weights=str(other))
