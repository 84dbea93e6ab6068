"A GPT-2 of Hugging Face's with the weights of a captioner with cross-attention."


def to_gpt2(model, transformers):
    c = model.config
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.max_len, n_embd=c.embedding_dim, n_layer=c.n_layers, n_head=c.n_heads,
        n_inner=c.ff_mult*c.embedding_dim, activation_function='gelu', add_cross_attention=True, layer_norm_epsilon=1e-5,
        resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    body, D = gpt2.transformer, c.embedding_dim

    def copy(theirs, weight, bias):                 # GPT-2 keeps its matrices transposed
        theirs.weight.data.copy_(weight.T)
        theirs.bias.data.copy_(bias)

    body.wte.weight.data.copy_(model.text.words.weight)
    body.wpe.weight.data.copy_(model.text.positions.weight)
    for ours, theirs in zip(model.decoder.blocks, body.h):
        words, photo = ours.attend_self, ours.attend_cross
        copy(theirs.attn.c_attn, words.qkv.weight, words.qkv.bias)
        copy(theirs.attn.c_proj, words.out.weight, words.out.bias)
        copy(theirs.crossattention.q_attn, photo.qkv.weight[:D], photo.qkv.bias[:D])
        copy(theirs.crossattention.c_attn, photo.qkv.weight[D:], photo.qkv.bias[D:])
        copy(theirs.crossattention.c_proj, photo.out.weight, photo.out.bias)
        copy(theirs.mlp.c_fc, ours.ff[0].weight, ours.ff[0].bias)
        copy(theirs.mlp.c_proj, ours.ff[2].weight, ours.ff[2].bias)
        for a, b in (ours.norm_self, theirs.ln_1), (ours.norm_cross, theirs.ln_cross_attn), (ours.norm_ff, theirs.ln_2):
            b.load_state_dict(a.state_dict())
    body.ln_f.load_state_dict(model.decoder.norm.state_dict())
    return gpt2
