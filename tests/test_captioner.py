"The captioner and its folder: both fusions, shared photos, Hugging Face's GPT-2, and everything wrong with a folder."
import json, math
from dataclasses import replace
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from multimodal.captioner import FUSIONS, Captioner, CaptionerConfig, Writing
from multimodal.core import UserError
from multimodal.encoder import EncoderConfig, resnet_trunk
from multimodal.saving import config_from, load_captioner, load_weights, save_model, save_weights
from multimodal.text import Vocab

fast = settings(max_examples=15, deadline=None)
words = [f'w{i:02}' for i in range(20)]
V = len(Vocab(words))


def config(**kw):
    encoder = EncoderConfig(weights='none', stage=1, image_size=12)
    return CaptionerConfig(**{'vocab_size': V, 'embedding_dim': 32, 'n_layers': 2, 'n_heads': 4, 'max_len': 16,
                              'encoder': encoder, **kw})


def build(seed=0, std=.3, **kw):
    "A captioner with strong opinions: larger weights than at the start of training"
    torch.manual_seed(seed)
    model = Captioner(config(**kw)).eval()
    for part in model.text, model.fusion, model.decoder:
        for p in part.parameters():
            if p.dim() > 1: torch.nn.init.normal_(p, std=std)
    return model


@pytest.fixture(scope='module')
def models(): return {fusion: build(fusion=fusion) for fusion in FUSIONS}


def close(a, b, eps=1e-4): torch.testing.assert_close(a, b, rtol=0, atol=eps)


@pytest.mark.parametrize('fusion', FUSIONS)
@fast
@given(N=st.integers(1, 4), T=st.integers(1, 8), seed=st.integers(0, 99), data=st.data())
def test_captions_of_shared_photos(models, fusion, N, T, seed, data):
    torch.manual_seed(seed)
    model, owners = models[fusion], torch.tensor(data.draw(st.lists(st.integers(0, N-1), min_size=1, max_size=6)))
    features, tokens = torch.randn(N, 9, 64), torch.randint(V, (len(owners), T))
    with torch.no_grad():
        logits = model(features, tokens, owners)
        assert logits.shape == (len(owners), T, V)
        close(logits, model(features[owners], tokens))
        close(logits, model(None, tokens, owners, memory=model.remember(model.encode(features))))
        for i, owner in enumerate(owners.tolist()):
            close(logits[i:i+1], model(features[owner:owner+1], tokens[i:i+1]))


@pytest.mark.parametrize('fusion', FUSIONS)
@fast
@given(N=st.integers(1, 3), K=st.integers(1, 3), T=st.integers(1, 10), seed=st.integers(0, 99))
def test_cached_is_uncached(models, fusion, N, K, T, seed):
    torch.manual_seed(seed)
    model, features, tokens = models[fusion], torch.randn(N, 9, 64), torch.randint(V, (N*K, T))
    with torch.no_grad():
        writing = Writing(model, model.remember(model.encode(features)), T)
        cached = torch.stack([writing.step(tokens[:, t]) for t in range(T)], 1)
        close(cached, model(features.repeat_interleave(K, 0), tokens))


@pytest.mark.parametrize('fusion', FUSIONS)
def test_drafts_that_change_rows_and_photos(models, fusion):
    torch.manual_seed(0)
    model, features, tokens = models[fusion], torch.randn(3, 9, 64), torch.randint(V, (6, 5))
    with torch.no_grad():
        writing = Writing(model, model.remember(model.encode(features)), 6)
        for t in range(4): writing.step(tokens[:, t])
        writing.keep(torch.tensor([5, 4, 0, 0]), torch.tensor([2, 0]))          # two drafts each of photos 2 and 0
        logits = writing.step(tokens[[5, 4, 0, 1], 4])
        drafts = torch.cat([tokens[[5, 4, 0, 0], :4], tokens[[5, 4, 0, 1], 4:]], 1)
        close(logits, model(features[[2, 2, 0, 0]], drafts)[:, -1])


@pytest.mark.parametrize('fusion', FUSIONS)
def test_no_caption_sees_its_future_or_its_neighbours(models, fusion):
    torch.manual_seed(0)
    model, features, tokens = models[fusion], torch.randn(2, 9, 64), torch.randint(V, (3, 9))
    owners = torch.tensor([0, 1, 1])
    with torch.no_grad():
        before = model(features, tokens, owners)
        for t in range(1, 9):
            other = tokens.clone()
            other[1, t:] = (other[1, t:] + 1 + torch.randint(V - 1, (9 - t,))) % V
            after = model(features, other, owners)
            close(after[1, :t], before[1, :t], 1e-6)
            close(after[[0, 2]], before[[0, 2]], 1e-6)
            assert (after[1, t] - before[1, t]).abs().max() > 1e-3


def test_photo_matters_and_places_matter(models):
    features, tokens = torch.randn(1, 9, 64), torch.randint(V, (1, 5))
    with torch.no_grad():
        for fusion, model in models.items():
            model.encoder.position.normal_()
            assert (model(features, tokens) - model(torch.randn(1, 9, 64), tokens)).abs().max() > 1e-2, fusion
            assert (model(features, tokens) - model(features.flip(1), tokens)).abs().max() > 1e-3, fusion


def test_pixels_and_features_agree(models):
    pixels, tokens = torch.randn(2, 3, 12, 12), torch.randint(V, (2, 4))
    for model in models.values():
        with torch.no_grad(): close(model(pixels, tokens), model(model.encoder.features(pixels), tokens))


@pytest.mark.parametrize('fusion', FUSIONS)
def test_first_loss_is_as_predicted_and_everything_learns(fusion):
    torch.manual_seed(0)
    model = Captioner(config(fusion=fusion, dropout=0.))
    tokens = torch.randint(V, (64, 9))
    loss = F.cross_entropy(model(torch.randn(64, 9, 64), tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(V) - .5) < .25
    loss.backward()
    for name, p in model.named_parameters():
        if name.startswith('encoder.trunk'): assert p.grad is None
        else: assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_attention_maps(models):
    features, tokens = torch.randn(2, 9, 64), torch.randint(V, (2, 5))
    maps = models['cross'].attention_maps(features, tokens)
    assert maps.shape == (2, 2, 4, 5, 9)
    close(maps.sum(-1), torch.ones(2, 2, 4, 5))
    assert not any(block.attend_cross._forward_pre_hooks for block in models['cross'].decoder.blocks)
    with pytest.raises(UserError, match='does not look'): models['fc'].attention_maps(features, tokens)


@pytest.mark.parametrize('fusion', ['cross', 'both'])
def test_logits_of_gpt2(fusion):
    pytest.importorskip('transformers')
    from multimodal.peers import gpt2_of
    model = build(vocab_size=30, fusion=fusion, std=.4)
    features, tokens = torch.randn(4, 9, 64), torch.randint(30, (4, 11))
    with torch.no_grad():
        memory = model.encode(features)
        theirs = gpt2_of(model)(input_ids=tokens, encoder_hidden_states=memory, photo=memory.mean(1))
        close(model(features, tokens), theirs.logits)


@pytest.mark.parametrize('bad', [dict(fusion='glue'), dict(vocab_size=0), dict(n_layers=0), dict(dropout=1.), dict(max_len=0),
                                 dict(n_heads=0), dict(ff_mult=0), dict(embedding_dim=-1)])
def test_bad_configs(bad):
    with pytest.raises(UserError, match=f'captioner: {next(iter(bad))}'): config(**bad)


def test_encoder_takes_over_the_dimension():
    assert config(embedding_dim=48).encoder.embedding_dim == 48
    assert replace(config(), embedding_dim=64).encoder.embedding_dim == 64


def test_too_long_a_caption(models):
    with pytest.raises(UserError, match='only 16 positions'):
        models['cross'](torch.randn(1, 9, 64), torch.zeros(1, 17, dtype=torch.long))


# ---- the folder

def same(a, b):
    pixels, tokens = torch.randn(2, 3, 12, 12), torch.randint(V, (2, 6))
    with torch.no_grad(): return torch.equal(a(pixels, tokens), b(pixels, tokens))


@pytest.fixture
def trunk(tmp_path):
    torch.manual_seed(5)
    torch.save(resnet_trunk(1).state_dict(), tmp_path/'trunk.pth')
    return tmp_path/'trunk.pth'


@pytest.mark.parametrize('fusion', FUSIONS)
@pytest.mark.parametrize('weights,trainable,stored', [('none', 'none', True), ('none', 'all', True), ('file', 'none', False),
                                                      ('file', 'last', True), ('file', 'all', True)])
def test_there_and_back(tmp_path, trunk, fusion, weights, trainable, stored):
    encoder = EncoderConfig(weights=str(trunk) if weights == 'file' else 'none', stage=1, image_size=12, trainable=trainable)
    model, vocab = build(fusion=fusion, encoder=encoder), Vocab(words)
    if trainable != 'none': model.encoder.trunk.conv1.weight.data.add_(.1)      # it has learned something
    save_model(model, vocab, tmp_path/'run', extra={'note': 'kept'})
    again, its_vocab = load_captioner(tmp_path/'run')
    assert same(model, again) and again.config == model.config and not again.training
    assert its_vocab.fingerprint() == vocab.fingerprint()
    saved = json.loads((tmp_path/'run'/'config.json').read_text())
    assert saved['note'] == 'kept' and (saved['trunk'] is None) == stored
    from safetensors.torch import load_file
    assert any(name.startswith('encoder.trunk') for name in load_file(tmp_path/'run'/'model.safetensors')) == stored
    save_model(again, its_vocab, tmp_path/'twice')                          # a copy of the copy
    assert same(model, load_captioner(tmp_path/'twice')[0])


def test_trunk_elsewhere_or_another(tmp_path, trunk):
    model = build(encoder=EncoderConfig(weights=str(trunk), stage=1, image_size=12))
    save_model(model, Vocab(words), tmp_path/'run')
    moved = trunk.rename(tmp_path/'moved.pth')
    with pytest.raises(UserError, match='trunk.pth'): load_captioner(tmp_path/'run')
    assert same(model, load_captioner(tmp_path/'run', weights=str(moved))[0])
    torch.save(resnet_trunk(1).state_dict(), trunk)
    with pytest.raises(UserError, match='trained on another ResNet18'): load_captioner(tmp_path/'run')


@pytest.fixture
def run(tmp_path):
    save_model(build(), Vocab(words), tmp_path/'run')
    return tmp_path/'run'


def test_vocabulary_of_another_size(run):
    Vocab(words[:-1]).save(run/'vocab.json')
    with pytest.raises(UserError, match='do not belong together'): load_captioner(run)


def test_vocabulary_of_the_same_size(run):
    Vocab([f'x{i:02}' for i in range(20)]).save(run/'vocab.json')
    with pytest.raises(UserError, match='does not hold the words'): load_captioner(run)


def test_saving_with_a_wrong_vocabulary_writes_nothing(tmp_path):
    with pytest.raises(UserError, match='do not belong together'): save_model(build(), Vocab(['one']), tmp_path/'run')
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('name', ['config.json', 'vocab.json', 'model.safetensors'])
def test_missing_or_half_a_file(run, name):
    whole = (run/name).read_bytes()
    for rest in whole[:len(whole)//2], whole[:3], b'':
        (run/name).write_bytes(rest)
        with pytest.raises(UserError, match=name): load_captioner(run)
    (run/name).unlink()
    with pytest.raises(UserError, match=name): load_captioner(run)


@pytest.mark.parametrize('text', ['[]', '{}', '"x"', 'null', '{"captioner": {"n_layers": 3}}',
                                  '{"captioner": {"vocab_size": "x", "encoder": {}}}',
                                  '{"captioner": {"colour": 1, "encoder": {}}}'])
def test_config_of_something_else(run, text):
    (run/'config.json').write_text(text)
    with pytest.raises(UserError, match='config.json'): load_captioner(run)


def test_weights_of_another_model(run, tmp_path):
    save_weights(build(embedding_dim=64), tmp_path/'wide.safetensors')
    (tmp_path/'wide.safetensors').replace(run/'model.safetensors')
    with pytest.raises(UserError, match='tensors do not fit'): load_captioner(run)
    model = build()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(UserError, match='tensors do not fit'): load_weights(model, run/'model.safetensors')
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_full_disk_leaves_the_old_weights(run, monkeypatch):
    import safetensors.torch
    def full(tensors, path, **kw):
        open(path, 'wb').write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises((OSError, UserError)): save_model(build(seed=1), Vocab(words), run)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_config_from_plain_values():
    from dataclasses import asdict
    c = config(fusion='fc', n_layers=5)
    assert config_from(json.loads(json.dumps(asdict(c)))) == c
