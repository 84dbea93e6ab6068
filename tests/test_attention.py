"Attention and the Transformer: against the formula, against PyTorch, with and without a cache."
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from multimodal.attention import (KVCache, MultiHeadAttention, attention, causal_mask, fused_attention, merge_heads,
                                  padding_mask, split_heads)
from multimodal.captioner import FUSIONS, Captioner, CaptionerConfig
from multimodal.core import UserError
from multimodal.encoder import EncoderConfig
from multimodal.transformer import Block, OutputDecoder, TextEncoder, init_weights

fast = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 6)


def close(a, b, eps=1e-5): torch.testing.assert_close(a, b, rtol=0, atol=eps)


@fast
@given(B=st.integers(1, 3), h=st.integers(1, 3), T=sizes, P=sizes, causal=st.booleans(), seed=st.integers(0, 99))
def test_fused_is_the_formula(B, h, T, P, causal, seed):
    torch.manual_seed(seed)
    P = max(T, P)
    q, k, v = torch.randn(B, h, T, 8), torch.randn(B, h, P, 8), torch.randn(B, h, P, 8)
    mask = causal_mask(T, P) if causal else None
    close(fused_attention(q, k, v, causal), attention(q, k, v, mask)[0])


@fast
@given(T=sizes, P=sizes)
def test_causal_mask_row_by_row(T, P):
    total = max(T, P)
    mask = causal_mask(T, total)
    for t in range(T): assert mask[t].tolist() == [p <= total - T + t for p in range(total)]


def test_masks_hide_and_weights_add_up():
    tokens = torch.tensor([[1, 5, 2, 0], [1, 5, 6, 2]])
    x = torch.randn(2, 1, 4, 8)
    answers, weights = attention(x, x, x, padding_mask(tokens) & causal_mask(4))
    close(weights.sum(-1), torch.ones(2, 1, 4))
    assert (weights[0, 0, :, 3] == 0).all() and (weights[1, 0].triu(1) == 0).all()


@fast
@given(B=st.integers(1, 3), T=sizes, h=st.integers(1, 4), d=sizes)
def test_heads_there_and_back(B, T, h, d):
    x = torch.randn(B, T, h*d)
    heads = split_heads(x, h)
    assert heads.shape == (B, h, T, d) and torch.equal(merge_heads(heads), x)
    assert torch.equal(heads[0, -1, -1], x[0, -1, -d:])      # the last head holds the last numbers of each word


def twins(dim=24, h=3, seed=0):
    torch.manual_seed(seed)
    ours, theirs = MultiHeadAttention(dim, h), nn.MultiheadAttention(dim, h, batch_first=True)
    theirs.load_state_dict({'in_proj_weight': ours.qkv.weight, 'in_proj_bias': ours.qkv.bias,
                            'out_proj.weight': ours.out.weight, 'out_proj.bias': ours.out.bias})
    return ours, theirs


def test_layer_and_its_gradients_are_pytorchs():
    ours, theirs = twins()
    for memory in None, torch.randn(2, 7, 24):
        a, b = torch.randn(2, 5, 24).requires_grad_(), None
        b = a.detach().clone().requires_grad_()
        if memory is None: x, y = ours(a, causal=True), theirs(b, b, b, attn_mask=~causal_mask(5))[0]
        else: x, y = ours(a, memory), theirs(b, memory, memory)[0]
        close(x, y)
        x.square().sum().backward()
        y.square().sum().backward()
        close(a.grad, b.grad, 1e-4)
    close(ours.qkv.weight.grad, theirs.in_proj_weight.grad, 1e-4)


@fast
@given(portions=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_cache_in_any_portions(portions, seed):
    layer, T = twins(seed=seed)[0], sum(portions)
    x, cache = torch.randn(2, T, 24), KVCache(T)
    pieces = [layer(part, causal=True, cache=cache) for part in x.split(portions, 1)]
    close(torch.cat(pieces, 1), layer(x, causal=True))


@fast
@given(rows=st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_reordered_cache_goes_on_as_its_rows(rows):
    layer, _ = twins()
    x, last, cache = torch.randn(3, 4, 24), torch.randn(len(rows), 1, 24), KVCache(6)
    with torch.no_grad():
        layer(x, causal=True, cache=cache)
        cache.reorder(torch.tensor(rows))
        y = layer(last, causal=True, cache=cache)
        close(y, layer(torch.cat([x[rows], last], 1), causal=True)[:, -1:])


@fast
@given(N=st.integers(1, 3), K=st.integers(1, 4), T=st.integers(1, 3))
def test_drafts_share_a_memory(N, K, T):
    layer, _ = twins()
    x, memory = torch.randn(N*K, T, 24), torch.randn(N, 5, 24)
    close(layer(x, memory), layer(x, memory.repeat_interleave(K, 0)))
    close(layer(x, layer.keys_values(memory)), layer(x, memory))


def test_heads_must_divide():
    with pytest.raises(UserError, match='choose a divisor'): MultiHeadAttention(10, 3)


def test_dropout_only_in_training():
    layer = MultiHeadAttention(24, 3, dropout=.5)
    x = torch.randn(1, 6, 24)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def to_torch(decoder, dim, h, cross=True):
    "PyTorch's own stack with the weights of ours"
    make, stack = ((nn.TransformerDecoderLayer, nn.TransformerDecoder) if cross else
                   (nn.TransformerEncoderLayer, nn.TransformerEncoder))
    layer = make(dim, h, 4*dim, 0., 'gelu', batch_first=True, norm_first=True)
    extra = {} if cross else {'enable_nested_tensor': False}
    theirs = stack(layer, len(decoder.blocks), nn.LayerNorm(dim), **extra)
    names = {'self_attn.in_proj_': 'attend_self.qkv.', 'self_attn.out_proj.': 'attend_self.out.',
             'norm1.': 'norm_self.', 'linear1.': 'ff.0.', 'linear2.': 'ff.2.'}
    names |= ({'multihead_attn.in_proj_': 'attend_cross.qkv.', 'multihead_attn.out_proj.': 'attend_cross.out.',
               'norm2.': 'norm_cross.', 'norm3.': 'norm_ff.'} if cross else {'norm2.': 'norm_ff.'})
    ours, state = decoder.state_dict(), {f'norm.{k}': getattr(decoder.norm, k) for k in ('weight', 'bias')}
    for i in range(len(decoder.blocks)):
        for a, b in names.items():
            for kind in 'weight', 'bias': state[f'layers.{i}.{a}{kind}'] = ours[f'blocks.{i}.{b}{kind}']
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize('cross', [True, False])
@pytest.mark.parametrize('dim,h,L', [(16, 1, 1), (32, 4, 3), (48, 6, 2)])
def test_decoder_is_pytorchs(cross, dim, h, L):
    torch.manual_seed(dim)
    decoder = OutputDecoder(L, dim, h, cross=cross).eval()
    for p in decoder.parameters(): nn.init.normal_(p, std=.3)                  # norms and biases too
    theirs = to_torch(decoder, dim, h, cross).eval()
    x, photos, hidden = torch.randn(3, 6, dim), torch.randn(3, 5, dim) if cross else None, ~causal_mask(6)
    reference = theirs(x, photos, tgt_mask=hidden) if cross else theirs(x, mask=hidden)
    close(decoder(x, photos), reference, 1e-4)


@pytest.mark.parametrize('fusion', list(FUSIONS))
def test_logits_of_a_captioner_are_those_of_pytorchs_decoder(fusion):
    "From words and photos to logits, with PyTorch's stack and the tied table of words in place of ours."
    torch.manual_seed(4)
    encoder = EncoderConfig(stage=2, embedding_dim=32, weights='none', image_size=24)
    model = Captioner(CaptionerConfig(vocab_size=30, embedding_dim=32, n_layers=2, n_heads=4, fusion=fusion, encoder=encoder)).eval()
    for p in [*model.decoder.parameters(), *model.fusion.parameters()]: nn.init.normal_(p, std=.3)
    features, tokens = torch.randn(3, 9, encoder.channels), torch.randint(4, 30, (3, 7))
    cross, hidden = model.fusion.looks, ~causal_mask(7)
    theirs, photos = to_torch(model.decoder, 32, 4, cross).eval(), model.encode(features)
    x = model.fusion(model.text(tokens), photos)
    out = theirs(x, photos, tgt_mask=hidden) if cross else theirs(x, mask=hidden)
    close(model(features, tokens), out @ model.text.words.weight.T, 1e-3)

def test_changing_later_words_changes_nothing_before():
    torch.manual_seed(0)
    text, decoder = TextEncoder(20, 32, 12), OutputDecoder(2, 32, 4).eval()
    tokens, photos = torch.randint(20, (2, 12)), torch.randn(2, 5, 32)
    with torch.no_grad():
        before = decoder(text(tokens), photos)
        for t in range(1, 12):
            other = tokens.clone()
            other[:, t:] = (other[:, t:] + torch.randint(1, 20, other[:, t:].shape)) % 20
            after = decoder(text(other), photos)
            close(after[:, :t], before[:, :t], 1e-6)
            assert (after[:, t] - before[:, t]).abs().max() > 1e-3             # the word itself does change something


def test_text_encoder_positions():
    text = TextEncoder(10, 8, 6)
    tokens = torch.randint(10, (2, 6))
    assert torch.equal(text(tokens)[:, 4:], text(tokens[:, 4:], start=4))
    with pytest.raises(UserError, match='only 6 positions'): text(tokens, start=1)


def test_initial_weights():
    torch.manual_seed(0)
    decoder = OutputDecoder(8, 128, 4)
    init_weights(decoder, 8)
    block = decoder.blocks[3]
    assert abs(block.ff[0].weight.std()*128**.5 - 1) < .02 and abs(block.ff[2].weight.std()*512**.5 - 1/4) < .005
    assert abs(block.attend_cross.out.weight.std()*128**.5 - 1/4) < .005
    assert all((p == 0).all() for name, p in decoder.named_parameters() if name.endswith('bias'))
    assert all((p == 1).all() for name, p in decoder.named_parameters() if 'norm' in name and name.endswith('weight'))


def test_block_without_photo_ignores_cross_attention():
    block, x = Block(16, 2).eval(), torch.randn(1, 4, 16)
    before = block(x)
    for p in block.attend_cross.parameters(): nn.init.normal_(p)
    assert torch.equal(block(x), before)
