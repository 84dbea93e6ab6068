"12c_ensemble: captioners that write together"
from pathlib import Path

import pytest
import torch

from multimodal.captioner import Captioner, CaptionerConfig, Writing
from multimodal.core import UserError
from multimodal.encoder import EncoderConfig
from multimodal.ensemble import Ensemble, together
from multimodal.generate import GenerateConfig, Together, beam_search, generate
from multimodal.recipe import RunConfig, caption_loss
from multimodal.dataloaders import Batch
from multimodal.runs import Run
from multimodal.text import Vocab

V = 30


def captioner(seed, dim=32, layers=2, trunk=None, **kw):
    torch.manual_seed(seed)
    encoder = EncoderConfig(embedding_dim=dim, stage=1, weights='none', image_size=32, trainable='none')
    model = Captioner(CaptionerConfig(V, dim, layers, 2, 24, 0., encoder=encoder, **kw)).eval()
    if trunk: model.encoder.trunk.load_state_dict(trunk.encoder.trunk.state_dict())
    return model


@pytest.fixture(scope='module')
def members():
    "Unlike in trunk, width, depth and fusion"
    return [captioner(0), captioner(1, dim=16, layers=1, fusion='fc'), captioner(2, layers=3, fusion='both')]


@pytest.fixture(scope='module')
def images(): return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def test_logits_are_averaged(members, images):
    group, tokens = Ensemble(members).eval(), torch.randint(4, V, (5, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = torch.stack([m(images, tokens) for m in members]).mean(0)
        torch.testing.assert_close(group(images, tokens), mean)
        torch.testing.assert_close(group(group.encoder.features(images), tokens), mean)


def test_word_by_word_is_the_same_as_at_once(members, images):
    group, config = Ensemble(members).eval(), GenerateConfig(max_len=12)
    with torch.inference_mode():
        parts = [Writing(m, m.remember(m.encode(images)), 13) for m in members]
        expected = [captions[0] for captions in beam_search(Together(parts), config)]
    for given in (images, group.encoder.features(images)):
        found = generate(group, given, config)
        assert [c.ids for c in found] == [c.ids for c in expected]
        assert [c.logprob for c in found] == pytest.approx([c.logprob for c in expected], abs=1e-4)


def test_the_loss_is_at_most_the_average_of_the_members(members, images):
    tokens = torch.randint(4, V, (10, 7), generator=torch.Generator().manual_seed(1))
    batch = Batch(images, [tokens[:5], tokens[5:]], [torch.arange(5)]*2)
    with torch.no_grad():
        own = [caption_loss(m, batch)[0] for m in members]
        group, n, shown = caption_loss(Ensemble(members).eval(), batch)
    assert n == 60 and group < sum(own)/3 - .01
    twins = Ensemble([members[0], members[0]]).eval()
    with torch.no_grad(): assert caption_loss(twins, batch)[0].item() == pytest.approx(own[0].item(), rel=1e-5)


def test_one_look_is_enough_for_trunks_that_are_the_same(images):
    first = captioner(0)
    alike, unlike = [first, captioner(1, trunk=first), captioner(2, trunk=first)], [first, captioner(1)]
    looks = []
    def count(group):
        looks.clear()
        hooks = [m.encoder.trunk.conv1.register_forward_hook(lambda *a: looks.append(1)) for m in group.models]
        with torch.no_grad(): group.encode(images)
        for hook in hooks: hook.remove()
        return len(looks)
    assert (count(Ensemble(alike)), count(Ensemble(unlike))) == (1, 2)
    assert Ensemble(alike).encoder.channels == 64 and Ensemble(unlike).encoder.channels == 128


def run(seed, words=('a dog runs on grass and sand',), stage=1, size=32):
    config = RunConfig(weights='none', image_size=size, stage=stage, embedding_dim=16, n_layers=1, seed=seed)
    vocab = Vocab.build(words, 1)
    torch.manual_seed(seed)
    return Run(Path(f'runs/{seed}'), config, Captioner(config.captioner(len(vocab))), vocab, [])


def test_runs_together():
    runs = [run(0), run(1), run(2)]
    group = together(runs)
    assert group.others == tuple(runs[1:]) and group.folder == runs[0].folder and runs[0].others == ()
    assert not group.model.training
    for wrong, said in (([runs[0], run(0)], 'named twice'), ([runs[0], run(3, ('a cat',))], 'runs/3 knows other words'),
                        ([runs[0], run(4, stage=2)], 'another way'), ([runs[0], run(5, size=64)], 'another way')):
        with pytest.raises(UserError, match=said): together(wrong)


def test_the_first_one_is_asked_for_its_neighbours(images):
    runs, seen = [run(0), run(1)], []
    runs[0].choose = lambda look, found, config: (seen.append(look), [captions[-1] for captions in found])[1]
    group = together(runs)
    last = generate(group.model, images, GenerateConfig(max_len=5), group.choose)
    with torch.no_grad(): features = group.model.encoder.features(images)
    assert generate(group.model, features, GenerateConfig(max_len=5), group.choose) == last
    assert last != generate(group.model, images, GenerateConfig(max_len=5))
    assert seen[0].shape == images.shape
    with torch.no_grad(): torch.testing.assert_close(seen[1], runs[0].model.encoder.features(images))
