"""The image encoder: torchvision's own numbers, what is frozen stays so, and files that are no weights."""
import copy
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import resnet18
from torchvision.transforms import v2

from multimodal.core import UserError
from multimodal.encoder import EncoderConfig, ImageEncoder, ImageTransform, load_trunk, read_weights


def make(**config):
    torch.manual_seed(0)
    return ImageEncoder(EncoderConfig(**{'weights': 'none', 'image_size': 48, 'embedding_dim': 16, **config}))


def theirs(net, x, stages):
    "The outputs of some stages of torchvision's ResNet18"
    out = []
    for name, part in list(net.named_children())[:-2]:
        x = part(x)
        if name in {f'layer{s}' for s in stages}: out.append(x)
    return out


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(1)
    net = resnet18().eval()
    for m in net.modules():                                    # batch norms that do something
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, .1)
            m.running_var.uniform_(.5, 2)
    return net


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('stage', [1, 2, 3, 4])
def test_features_are_torchvisions(net, tmp_path, stage, suffix):
    path = tmp_path/f'w{suffix}'
    if suffix == '.pth': torch.save(net.state_dict(), path)
    else: save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    encoder, x = make(weights=str(path), stage=stage).eval(), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        grid = theirs(net, x, [stage])[0]                                                       # [2, C, h, w]
        assert torch.allclose(encoder.features(x), grid.flatten(2).transpose(1, 2), atol=1e-4)
        pooled = make(weights=str(path), stage=stage, pool='vector').eval().features(x)
    assert torch.allclose(pooled, grid.mean((2, 3))[:, None], atol=1e-4)
    assert encoder.config.n_patches == grid.shape[2]*grid.shape[3] and encoder.config.channels == grid.shape[1]


@pytest.mark.parametrize('stage,below', [(4, 2), (4, 1), (3, 2), (2, 5)])
def test_stages_below_are_averaged_onto_the_grid(net, tmp_path, stage, below):
    torch.save(net.state_dict(), tmp_path/'w.pth')
    encoder = make(weights=str(tmp_path/'w.pth'), stage=stage, below=below, image_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        kept = theirs(net, x, range(max(1, stage - below), stage + 1))
        side = kept[-1].shape[-1]
        means = [k.unflatten(3, (side, -1)).unflatten(2, (side, -1)).mean((3, 5)) for k in kept]  # [2, its C, h, w]
        assert torch.allclose(encoder.features(x), torch.cat(means, 1).flatten(2).transpose(1, 2), atol=1e-4)
    assert encoder(x).shape == (2, side**2, 16)


@pytest.mark.parametrize('trainable,moves', [('none', set()), ('last', {'layer2'}), ('two', {'layer1', 'layer2'}),
                                             ('all', {'conv1', 'bn1', 'layer1', 'layer2'})])
def test_what_is_frozen_stays_and_what_learns_moves(trainable, moves):
    encoder = make(stage=2, below=1, trainable=trainable).train()
    before = copy.deepcopy(encoder.trunk.state_dict())
    learns = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learns, lr=.1)
    for _ in range(2):
        encoder.train()
        encoder(torch.randn(4, 3, 48, 48)).pow(2).sum().backward()
        optimizer.step()
    after = encoder.trunk.state_dict()
    moved = {k.split('.')[0] for k in after if not torch.equal(after[k], before[k])}
    statistics = {k.split('.')[0] for k in after if 'running_mean' in k and not torch.equal(after[k], before[k])}
    assert moved == moves and statistics == {m for m in moves if m != 'conv1'}
    assert encoder.linear.weight.grad.abs().sum() > 0


def test_a_photo_is_squashed_as_torchvision_does():
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (90, 160, 3), dtype=np.uint8)).resize((320, 180))
    ours = ImageTransform(64)(photo)
    other = v2.Compose([v2.Resize((64, 64)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                        v2.Normalize([.485, .456, .406], [.229, .224, .225])])(photo)
    assert torch.allclose(ours, other, atol=1e-5)
    small = v2.functional.pil_to_tensor(photo.resize((64, 64), Image.Resampling.BILINEAR)).float()/255
    assert torch.allclose(ImageTransform(64).undo(ours), small, atol=1e-5)
    assert ImageTransform(32)(photo.convert('L')).shape == (3, 32, 32)


def test_left_and_right_are_told_apart_before_any_training():
    encoder = make(stage=2).eval()
    x = torch.randn(1, 1, 128).expand(1, 36, 128)                                              # the same in every place
    places = encoder.project(x)[0]
    assert torch.pdist(places).min() > .1


@pytest.mark.parametrize('harm', ['missing', 'empty', 'text', 'cut', 'other', 'list', 'folder'])
def test_what_is_no_weights_file_is_one_line_that_says_why_and_three_ways_out(net, tmp_path, harm):
    path = tmp_path/'w.pth'
    if harm == 'empty': path.write_bytes(b'')
    if harm == 'text': path.write_text('<html>')
    if harm == 'cut':
        torch.save(net.state_dict(), path)
        path.write_bytes(path.read_bytes()[:10**6])
    if harm == 'other': torch.save({'conv1.weight': torch.zeros(3)}, path)
    if harm == 'list': torch.save([1, 2], path)
    if harm == 'folder': path.mkdir()
    with pytest.raises(UserError) as e: load_trunk(EncoderConfig(weights=str(path)))
    assert str(path) in str(e.value) and '\n' not in str(e.value)
    if harm in ('other', 'list'): assert "not those of torchvision's resnet18" in str(e.value)
    else:
        why = {'missing': 'no such file', 'folder': 'is a folder'}.get(harm, 'holds no ResNet18 weights of torchvision')
        assert f'{path}: {why}' in str(e.value) and 'network' not in str(e.value)
        assert all(way in str(e.value) for way in ('give the path', "'imagenet'", "'none'"))


def test_no_network_and_no_file_is_one_line_with_three_ways_out(tmp_path, monkeypatch):
    from urllib.error import URLError
    def offline(*args, **kwargs): raise URLError('no route')
    monkeypatch.setattr('torch.hub.download_url_to_file', offline)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(UserError, match='cannot be downloaded.*no route.*connect to the network') as e:
        read_weights('imagenet')
    assert '\n' not in str(e.value) and "weights 'none'" in str(e.value)
    assert 'resnet18-f37072fd.pth' in str(e.value) and '--weights FILE' in str(e.value)


@pytest.mark.parametrize('wrong', [dict(stage=0), dict(stage=5), dict(below=-1), dict(pool='max'),
                                   dict(trainable='some'), dict(image_size=4), dict(dropout=1.)])
def test_impossible_settings_are_refused_at_once(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))): EncoderConfig(**wrong)


def test_pictures_and_features_of_another_shape_are_refused():
    encoder = make(stage=2)
    with pytest.raises(UserError, match=r'pictures are \[3, 32, 32\]'): encoder(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match=r'features are \[9, 128\]'): encoder.project(torch.zeros(1, 9, 128))


def test_the_fingerprint_is_of_the_weights_and_nothing_else():
    a, b = make(stage=2), make(stage=2)
    assert a.weights_fingerprint() == b.weights_fingerprint()
    b.linear.weight.data.zero_()
    assert a.weights_fingerprint() == b.weights_fingerprint()
    b.trunk.layer2[1].bn2.running_var[3] += 1e-3
    assert a.weights_fingerprint() != b.weights_fingerprint()


@pytest.mark.parametrize('trainable', ['none', 'last', 'all'])
def test_frozen_parts_stay_so_inside_a_larger_model(trainable):
    "A trainer calls train() and eval() on the whole model and knows nothing of trunks"
    encoder = make(stage=2, trainable=trainable)
    model = torch.nn.Sequential(encoder, torch.nn.Dropout(.5))
    norms = {name: m for name, m in encoder.trunk.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    learns = {name for name in norms if trainable == 'all' or trainable == 'last' and name.startswith('layer2')}
    for mode in True, False, True:
        model.train(mode)
        assert {name for name, m in norms.items() if m.training} == (learns if mode else set())
    assert {name for name, m in norms.items() if m.weight.requires_grad} == learns


def test_pooled_is_the_mean_of_the_grid():
    grid, pooled = make(stage=3, below=1).eval(), make(stage=3, below=1, pool='vector').eval()
    x = torch.randn(2, 3, 48, 48)
    pooled.trunk.load_state_dict(grid.trunk.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(pooled.features(x), grid.features(x).mean(1, keepdim=True))
        assert pooled(x).shape == (2, 1, 16) and not hasattr(pooled, 'position')


def test_positions_know_neighbours():
    "Places that lie side by side have vectors that are more alike than places far apart"
    position = make(stage=2).position.detach().view(6, 6, 16)                                  # [rows, columns, D]
    middle = position[2, 2]
    far = lambda *place: (position[place] - middle).norm().item()
    assert 0 < far(2, 3) < far(2, 4) < far(2, 5) and 0 < far(3, 2) < far(4, 2) < far(5, 2)


def test_order_of_patches_matters_only_through_positions():
    encoder, features = make(stage=2).eval(), torch.randn(1, 36, 128)
    shuffled = features[:, torch.randperm(36)]
    with torch.no_grad():
        assert (encoder.project(features).mean(1) - encoder.project(shuffled).mean(1)).abs().max() > 1e-3
        encoder.position.zero_()
        torch.testing.assert_close(encoder.project(features).mean(1), encoder.project(shuffled).mean(1))


class Trap:
    "A pickle that would run a command when it is opened"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_a_weights_file_runs_no_code(tmp_path):
    (tmp_path/'w.pth').write_bytes(pickle.dumps(Trap(tmp_path/'sprung'), protocol=2))
    torch.save({'conv1.weight': Trap(tmp_path/'sprung')}, tmp_path/'v.pth')
    for name in 'w.pth', 'v.pth':
        with pytest.raises(UserError, match='holds no ResNet18 weights'): read_weights(str(tmp_path/name))
    assert not (tmp_path/'sprung').exists()


REAL = os.environ.get('MULTIMODAL_RESNET18')

@pytest.mark.skipif(not REAL, reason='MULTIMODAL_RESNET18 names no file of ImageNet weights')
def test_real_weights_know_a_military_uniform():
    "The trunk's pooled features, through the file's own last layer, are ImageNet's answer to a photo"
    from matplotlib.cbook import get_sample_data
    photo = Image.open(get_sample_data('grace_hopper.jpg', asfileobj=False))
    encoder, given = ImageEncoder(EncoderConfig(weights=REAL, pool='vector')).eval(), read_weights(REAL)
    with torch.no_grad(): seen = encoder.features(ImageTransform()(photo)[None])[0, 0]         # [C]
    scores = given['fc.weight'] @ seen + given['fc.bias']
    assert scores.argmax() == 652                                                              # 'military uniform'
