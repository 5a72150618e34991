"""A base from a single checkpoint file in the layout of Stable Diffusion 1.x, as they are passed around on the web.

No such file can be downloaded here, so one is made: the tensors of a tiny base under the names of the original code.
"""
import re
import pytest, torch
from safetensors.torch import save_file
from stylelora.core import generator
from stylelora.models import decode, denoiser, encode_image, encode_text, load_base, make_base, save_base, tiny_base

RESNET = {'norm1': 'in_layers.0', 'conv1': 'in_layers.2', 'time_emb_proj': 'emb_layers.1', 'norm2': 'out_layers.0',
          'conv2': 'out_layers.3', 'conv_shortcut': 'skip_connection'}
OUTSIDE = {'time_embedding.linear_1': 'time_embed.0', 'time_embedding.linear_2': 'time_embed.2', 'conv_in': 'input_blocks.0.0',
           'conv_norm_out': 'out.0', 'conv_out': 'out.2'}
VAE = [(r'(down_blocks|up_blocks)\.(\d+)\.(?:resnets\.(\d+)|(?:down|up)samplers\.0)', None), (r'mid_block\.resnets\.0', 'mid.block_1'),
       (r'mid_block\.resnets\.1', 'mid.block_2'), (r'mid_block\.attentions\.0', 'mid.attn_1'), ('group_norm', 'norm'),
       ('to_out.0', 'proj_out'), (r'to_([qkv])', r'\1'), ('conv_norm_out', 'norm_out'), ('conv_shortcut', 'nin_shortcut')]


def unet_name(key, layers):
    "Name a U-Net tensor as the original code does."
    head, _, last = key.rpartition('.')
    if head in OUTSIDE: return f'{OUTSIDE[head]}.{last}'
    m = re.match(r'(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)', key)
    if not m:
        kind, i, rest = re.match(r'mid_block\.(resnets|attentions)\.(\d)\.(.*)', key).groups()
        return f'middle_block.{1 if kind == "attentions" else 2*int(i)}.{resnet(rest) if kind == "resnets" else rest}'
    side, block, kind, i, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
    if kind == 'downsamplers': return f'input_blocks.{(block + 1)*(layers + 1)}.0.op.{last}'
    if kind == 'upsamplers': return f'output_blocks.{(block + 1)*(layers + 1) - 1}.1.conv.{last}'
    place = f'input_blocks.{1 + block*(layers + 1) + i}' if side == 'down_blocks' else f'output_blocks.{block*(layers + 1) + i}'
    return f'{place}.0.{resnet(rest)}' if kind == 'resnets' else f'{place}.1.{rest}'


def resnet(rest): return re.sub(r'^\w+', lambda m: RESNET[m[0]], rest)


def vae_name(key, blocks):
    "Name a tensor of the autoencoder as the original code does."
    def block(m):
        i = int(m[2]) if m[1] == 'down_blocks' else blocks - 1 - int(m[2])
        kind = 'down' if m[1] == 'down_blocks' else 'up'
        return f'{kind}.{i}.block.{m[3]}' if m[3] else f'{kind}.{i}.{kind}sample'
    for pattern, name in VAE: key = re.sub(pattern, name or block, key)
    return key


def single_file(base, path):
    "Write a base to one file in the original layout."
    unet = {f'model.diffusion_model.{unet_name(k, 1)}': v for k, v in base.unet.state_dict().items()}
    vae = {f'first_stage_model.{vae_name(k, 2)}': v for k, v in base.vae.state_dict().items()}
    vae = {k: v[..., None, None] if re.search(r'attn_1\.(q|k|v|proj_out)\.weight', k) else v for k, v in vae.items()}
    text = {f'cond_stage_model.transformer.text_model.{k.removeprefix("text_model.")}': v
            for k, v in base.text_encoder.state_dict().items()}
    save_file({k: v.contiguous() for k, v in (unet | vae | text).items()}, path, metadata={'format': 'pt'})


@pytest.fixture
def base():
    "Make a tiny base with the autoencoder class of Stable Diffusion."
    from diffusers import AutoencoderKL
    b = tiny_base()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kl = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1,
                           down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2)
    return make_base('kl', b.unet, kl, b.text_encoder, b.tokenizer, b.schedule)


def test_a_single_file_gives_the_same_model_as_its_folder(base, tmp_path):
    single_file(base, tmp_path/'model.safetensors')
    folder = save_base(base, tmp_path/'folder', 'float32')
    one, two = load_base(tmp_path/'model.safetensors', 'cpu', config=folder, offline=True), load_base(folder, 'cpu')
    for part in ('unet', 'vae', 'text_encoder'):
        a, b = getattr(one, part).state_dict(), getattr(two, part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part
    x, cond = torch.randn(2, 4, 8, 8, generator=generator('x')), encode_text(one, ['a cat', 'a dog'])
    assert torch.equal(cond, encode_text(two, ['a cat', 'a dog'])) and torch.equal(decode(one, x), decode(two, x))
    picture = torch.rand(1, 3, 16, 16, generator=generator('p'))*2 - 1
    assert torch.equal(encode_image(one, picture), encode_image(two, picture))
    assert torch.equal(denoiser(one, cond)(x, 1.), denoiser(two, cond)(x, 1.))
    assert (one.latent_shape, one.size, one.prediction_type) == (two.latent_shape, two.size, two.prediction_type)
    assert len(one.hash) == 64 and one.hash != two.hash


def test_a_file_that_lacks_tensors_is_refused(base, tmp_path):
    from safetensors.torch import load_file
    single_file(base, tmp_path/'model.safetensors')
    folder, whole = save_base(base, tmp_path/'folder'), load_file(tmp_path/'model.safetensors')
    for part in ('model.diffusion_model', 'first_stage_model', 'cond_stage_model'):
        save_file({k: v for k, v in whole.items() if not k.startswith(part)}, tmp_path/'partial.safetensors')
        with pytest.raises(ValueError, match='could not be read as a Stable Diffusion checkpoint'):
            load_base(tmp_path/'partial.safetensors', 'cpu', config=folder, offline=True)
    one = next(k for k in whole if 'attn2.to_k' in k)
    save_file({k: v for k, v in whole.items() if k != one}, tmp_path/'hole.safetensors')
    with pytest.raises(ValueError, match='could not be read as a Stable Diffusion checkpoint'):
        load_base(tmp_path/'hole.safetensors', 'cpu', config=folder, offline=True)
