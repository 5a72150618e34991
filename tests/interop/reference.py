"""Small pipelines of diffusers, an adapter of every kind of layer, and what the peers make of our files and we of theirs."""

import json
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from stylelora.adapters.files import read_adapter
from stylelora.adapters.keys import TEXT
from stylelora.adapters.lora import find_targets
from stylelora.core import assets, generator
from stylelora.models.tiny import quiet, tiny_tokenizer


def clone(
    kind,  # class of the pipeline
    parts,  # its components
):  # a pipeline with copies of the networks
    "Copy a pipeline, so that nobody sees what another has put in."
    parts = {k: deepcopy(v).eval() if isinstance(v, nn.Module) else v for k, v in parts.items()}
    if kind.__name__ == "StableDiffusionPipeline":
        parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    with quiet():
        pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embedded_pipeline():
    "Load the model of this package as diffusers' pipeline."
    from diffusers import StableDiffusionPipeline as Pipe

    with quiet():
        pipe = Pipe.from_pretrained(assets() / "base", local_files_only=True, torch_dtype=torch.float32)
    return clone(Pipe, pipe.components)


_CLIP = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=16,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
    projection_dim=32,
)
_SD15 = dict(block_out_channels=(8, 16, 32, 32), attention_head_dim=4, cross_attention_dim=32)
_XL = dict(
    block_out_channels=(16, 32, 32),
    attention_head_dim=(2, 4, 4),
    cross_attention_dim=64,
    transformer_layers_per_block=(1, 2, 3),
    down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=80,
    use_linear_projection=True,
)


def tiny_networks(
    sdxl,  # the shapes of SDXL instead of Stable Diffusion 1.5
) -> dict:  # name of the component -> network
    "Build the networks of a small random model of the same make as Stable Diffusion."
    import diffusers as d
    import transformers as t

    two, config = (8, 8), t.CLIPTextConfig(**_CLIP)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = dict(
            text_encoder=t.CLIPTextModel(config),
            vae=d.AutoencoderTiny(
                encoder_block_out_channels=two,
                decoder_block_out_channels=two,
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
            ),
            unet=d.UNet2DConditionModel(
                sample_size=8, norm_num_groups=8, layers_per_block=2, **(_XL if sdxl else _SD15)
            ),
        )
        if sdxl:
            nets["text_encoder_2"] = t.CLIPTextModelWithProjection(config)
    return nets


def tiny_pipeline(
    sdxl=False,  # the shapes of SDXL instead of Stable Diffusion 1.5
):  # diffusers' pipeline with random weights, pictures of 16 pixels
    "Build a small random pipeline of the same make as Stable Diffusion."
    import diffusers as d

    schedule = d.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = tiny_networks(sdxl) | dict(scheduler=schedule, tokenizer=tiny_tokenizer())
    if sdxl:
        parts["tokenizer_2"] = tiny_tokenizer()
    return clone(d.StableDiffusionXLPipeline if sdxl else d.StableDiffusionPipeline, parts)


BASES = dict(
    embedded=embedded_pipeline, sd15=tiny_pipeline, sdxl=lambda: tiny_pipeline(True)
)  # name -> maker


def published(
    part,  # 'unet', 'text_encoder' or 'text_encoder_2'
    name,  # of a layer in that network
) -> str:  # of the layer in a state
    "Name a layer as published files do, which have text_model in front in text encoders."
    return name if part == "unet" else f"{part}.text_model.{name.removeprefix('text_model.')}"


def random_adapter(
    pipe,  # diffusers' pipeline
    parts=("unet", *TEXT),  # networks to adapt, where they are there
) -> dict:  # layer name -> {'A','B','alpha'}
    "Make an adapter of all kinds of layers, with ranks and scales that differ."
    g, state = generator("interop"), {}
    for part in (p for p in parts if hasattr(pipe, p)):
        net, text = getattr(pipe, part), r"self_attn\.\w+_proj$|mlp\.fc\d$"
        for i, n in enumerate(find_targets(net, "conv" if part == "unet" else text)):
            W, r = net.get_submodule(n).weight, 1 + i % 3
            A = torch.randn(r, *W.shape[1:], generator=g) * W[0].numel() ** -0.5
            B = torch.randn(len(W), r, *[1] * (W.ndim - 2), generator=g) * 0.6
            state[published(part, n)] = dict(A=A, B=B, alpha=(0.5, 2.0, 3.0, 1.0)[i % 4])
    return state


def draw(
    pipe,  # diffusers' pipeline
    steps=2,  # of its own sampler
):  # picture (h,w,3) in [0,1]
    "Draw one picture from fixed noise."
    out = pipe(
        "noto red apple",
        num_inference_steps=steps,
        guidance_scale=4.0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    )
    return torch.from_numpy(out.images[0])


def peer_updates(
    pipe,  # pipeline into which a peer has loaded an adapter
) -> dict:  # layer name -> update of the weight
    "Ask the layers of PEFT in a pipeline what they add."
    found = {}
    for part in (p for p in ("unet", *TEXT) if hasattr(pipe, p)):
        for n, m in getattr(pipe, part).named_modules():
            if hasattr(m, "base_layer") and hasattr(m, "get_delta_weight"):
                found[published(part, n)] = m.get_delta_weight(next(iter(m.lora_A)))
    return found


def compare(
    want,  # layer name -> update, as the writer meant it
    got,  # layer name -> update, as the reader has it
) -> dict:  # layers expected and found; largest difference, relative to the largest update
    "Compare updates layer by layer; a layer that is absent has no update."
    none, top = torch.zeros(()), max(w.abs().max().item() for w in want.values())

    def off(n):
        return (want.get(n, none) - got.get(n, none)).abs().max().item()

    return dict(layers=len(want), found=len(got), error=max(map(off, {**want, **got})) / top)


def read_by_diffusers(
    pipe,  # a fresh pipeline
    file,  # in diffusers' or kohya's layout
    peft,  # the module, not needed here
):
    "Let diffusers load a file."
    with quiet():
        pipe.load_lora_weights(str(file))


def read_by_peft(
    pipe,  # a fresh pipeline
    file,  # in diffusers' layout, or a folder of PEFT
    peft,  # the module
):
    "Let PEFT load a file into the U-Net."
    from safetensors.torch import load_file

    if Path(file).is_dir():
        with quiet():
            peft.PeftModel.from_pretrained(pipe.unet, str(file))
        return
    fields = json.loads(read_adapter(file).metadata["lora_adapter_metadata"])
    config = peft.LoraConfig(**{k.removeprefix("unet."): v for k, v in fields.items()})
    peft.inject_adapter_in_model(config, pipe.unet)
    tensors = {k.removeprefix("unet."): v for k, v in load_file(file).items()}
    with quiet():
        peft.set_peft_model_state_dict(pipe.unet, tensors)


def by_formula(
    pipe,  # names of its modules are used
    file,  # in kohya's layout, with diffusers' names of blocks
) -> dict:  # layer name -> update of the weight
    "Compute the updates of a kohya file from its tensors: alpha/rank * up @ down."
    from safetensors.torch import load_file

    raw, found = load_file(file), {}
    heads = dict(unet="lora_unet_", text_encoder="lora_te_text_model_", text_encoder_2="lora_te2_")
    for part in (p for p in heads if hasattr(pipe, p)):
        for n in dict(getattr(pipe, part).named_modules()):
            k = heads[part] + n.replace(".", "_")
            if (down := raw.get(f"{k}.lora_down.weight")) is None:
                continue
            delta = raw[f"{k}.lora_up.weight"].flatten(1) @ down.flatten(1) * raw[f"{k}.alpha"] / len(down)
            found[published(part, n)] = delta.view(-1, *down.shape[1:])
    return found


def peer_adapter(
    pipe,  # a fresh pipeline, which gets the adapter
    peft,  # the module
    alpha,  # lora_alpha, at rank 4
    every,  # True: all kinds of layers; False: attention only
) -> dict:  # part -> PEFT's wrapper
    "Let PEFT put a random adapter into the networks of a pipeline."
    wide = ["proj_in", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj"] * every
    image = dict(target_modules=["to_q", "to_k", "to_v", "to_out.0", *wide])
    if alpha != 4:
        image |= dict(rank_pattern={"to_k": 2}, alpha_pattern={"attn1.to_q": 3})
    text, made, g = dict(target_modules=["q_proj", "out_proj", *["fc1"] * every]), {}, generator("peer")
    for part in (p for p in ("unet", *TEXT) if hasattr(pipe, p)):
        config = peft.LoraConfig(r=4, lora_alpha=alpha, **(image if part == "unet" else text))
        with quiet():
            made[part] = peft.get_peft_model(getattr(pipe, part), config)
        for k, p in made[part].named_parameters():
            if "lora_B" in k:
                p.data.copy_(torch.randn(p.shape, generator=g) * 0.6)
    return made


def tensors_of(
    made,  # part -> PEFT's wrapper
    peft,  # the module
) -> dict:  # part -> key -> tensor
    "Take the adapters out of PEFT's wrappers, with the keys that diffusers' scripts pass on."
    with quiet():
        states = {p: peft.get_peft_model_state_dict(m) for p, m in made.items()}
    return {
        p: {k.removeprefix("base_model.model."): v.contiguous() for k, v in s.items()}
        for p, s in states.items()
    }


def write_diffusers(
    pipe,
    made,
    folder,
    peft,  # the pipeline; PEFT's wrappers; where to write; the module
    old=False,  # the spelling of diffusers' scripts before PEFT, without a header
) -> Path:  # the folder
    "Let diffusers save an adapter."
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers

    spell = convert_state_dict_to_diffusers if old else dict
    layers = {f"{p}_lora_layers": spell(s) for p, s in tensors_of(made, peft).items()}
    texts = {} if old else _collate_lora_metadata(made)
    with quiet():
        pipe.save_lora_weights(str(folder), **layers, **texts)
    return folder


def write_converted(
    pipe,
    made,
    folder,
    peft,  # the pipeline, not needed; PEFT's wrappers; where to write; the module
    oldest=False,  # on to the first spelling of diffusers
) -> Path:  # the file
    "Let diffusers' converters spell an adapter as kohya does, or as its own oldest files."
    from diffusers.loaders import lora_conversion_utils as converters
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    both = {f"{p}.{k}": v for p, s in tensors_of(made, peft).items() for k, v in s.items()}
    tensors = convert_state_dict_to_kohya(both)
    if oldest:
        tensors, _ = converters._convert_non_diffusers_lora_to_diffusers(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file := Path(folder) / "converted.safetensors")
    return file


def write_peft(
    pipe,
    made,
    folder,
    peft,  # PEFT's wrappers, and where to write; pipeline and module are not needed
) -> Path:  # the folder
    "Let PEFT save an adapter, a folder per network."
    with quiet():
        for part, wrapper in made.items():
            wrapper.save_pretrained(str(Path(folder) / part))
    return folder
