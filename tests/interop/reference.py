"""The reference implementations, diffusers and PEFT, as readers and writers of adapter files.

That a file *loads* says little: a scale that is read as one instead of two, a text encoder that is dropped or a key that
is skipped with a warning still give a picture. To know that an adapter has arrived one has to ask for numbers, and to ask
those who do not share our code. kohya's scripts are no library, so their layout is read by diffusers' kohya reader,
written by diffusers' kohya writer, and checked by its formula.

Here are the pieces: models to try on, an adapter that is hard to read, and one function for each thing that a reference
implementation can read or write. `certificate` puts them together into a table. The package needs no PEFT at run time, so
the module is handed in where it is used.
"""

import json
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from stylelora.adapters.files import read_adapter
from stylelora.adapters.keys import TEXT
from stylelora.adapters.lora import delta_of, find_targets
from stylelora.core import assets, generator
from stylelora.models.tiny import quiet, tiny_tokenizer

# ---------------------------------------------------------------- three pipelines


def clone(
    kind: type,  # class of the pipeline
    components: dict,  # its components: name -> network, tokenizer or scheduler
):  # a pipeline with copies of the networks
    "Copy a pipeline, so that nobody sees what another has put in."
    components = {k: deepcopy(v).eval() if isinstance(v, nn.Module) else v for k, v in components.items()}
    if kind.__name__ == "StableDiffusionPipeline":
        components |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    with quiet():
        pipe = kind(**components)
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
    sdxl: bool,  # the shapes of SDXL instead of Stable Diffusion 1.5
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
    sdxl: bool = False,  # the shapes of SDXL instead of Stable Diffusion 1.5
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
    components = tiny_networks(sdxl) | dict(scheduler=schedule, tokenizer=tiny_tokenizer())
    if sdxl:
        components["tokenizer_2"] = tiny_tokenizer()
    return clone(d.StableDiffusionXLPipeline if sdxl else d.StableDiffusionPipeline, components)


def tiny_xl_pipeline():
    "Build the small random pipeline of the make of SDXL."
    return tiny_pipeline(sdxl=True)


BASES = dict(embedded=embedded_pipeline, sd15=tiny_pipeline, sdxl=tiny_xl_pipeline)  # name -> maker


# ---------------------------------------------------------------- an adapter, a picture


def published(
    component: str,  # 'unet', 'text_encoder' or 'text_encoder_2'
    name: str,  # of a layer in that network
) -> str:  # of the layer in a state
    "Name a layer as published files do, which have text_model in front in text encoders."
    return name if component == "unet" else f"{component}.text_model.{name.removeprefix('text_model.')}"


def components_of(
    pipe,  # diffusers' pipeline
    wanted: tuple = ("unet", *TEXT),  # names of networks
) -> list[str]:  # those that the pipeline has
    "List the networks of a pipeline that an adapter can change."
    return [c for c in wanted if hasattr(pipe, c)]


def random_adapter(
    pipe,  # diffusers' pipeline
    components: tuple = ("unet", *TEXT),  # networks to adapt, where they are there
) -> dict[str, dict]:  # layer name -> {'A','B','alpha'}
    """Make an adapter of all kinds of layers, with ranks and scales that differ.

    A reader that takes rank and scale from the first layer must not pass, so half of the scales are wrong when rank is
    taken for alpha.
    """
    g, state = generator("interop"), {}
    for component in components_of(pipe, components):
        net, text = getattr(pipe, component), r"self_attn\.\w+_proj$|mlp\.fc\d$"
        for i, n in enumerate(find_targets(net, "conv" if component == "unet" else text)):
            W, r = net.get_submodule(n).weight, 1 + i % 3
            A = torch.randn(r, *W.shape[1:], generator=g) * W[0].numel() ** -0.5
            B = torch.randn(len(W), r, *[1] * (W.ndim - 2), generator=g) * 0.6
            state[published(component, n)] = dict(A=A, B=B, alpha=(0.5, 2.0, 3.0, 1.0)[i % 4])
    return state


def draw(
    pipe,  # diffusers' pipeline
    steps: int = 2,  # of its own sampler
) -> torch.Tensor:  # picture (h,w,3) in [0,1]
    "Draw one picture from fixed noise."
    out = pipe(
        "noto red apple",
        num_inference_steps=steps,
        guidance_scale=4.0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    )
    return torch.from_numpy(out.images[0])


# ---------------------------------------------------------------- what arrived


def our_updates(
    state: dict[str, dict],  # layer name -> {'A','B','alpha'}
) -> dict[str, torch.Tensor]:  # layer name -> update of the weight, float32
    "Form the updates that a state means."
    return {n: delta_of(s).float() for n, s in state.items()}


def reference_updates(
    pipe,  # pipeline into which diffusers or PEFT has loaded an adapter
) -> dict[str, torch.Tensor]:  # layer name -> update of the weight
    """Ask the layers of PEFT in a pipeline, which diffusers uses too, what they add.

    Layers are named as their place in the network says, so a layer in the wrong place is a missing one and one too many.
    """
    found = {}
    for component in components_of(pipe):
        for n, m in getattr(pipe, component).named_modules():
            if hasattr(m, "base_layer") and hasattr(m, "get_delta_weight"):
                found[published(component, n)] = m.get_delta_weight(next(iter(m.lora_A)))
    return found


def compare(
    want: dict[str, torch.Tensor],  # layer name -> update, as the writer meant it
    got: dict[str, torch.Tensor],  # layer name -> update, as the reader has it
) -> dict:  # layers expected and found; largest difference, relative to the largest update
    """Compare updates layer by layer; a layer that is absent has no update.

    The error is relative because an adapter has no scale of its own: ten times the style at a tenth of the strength is
    the same thing.
    """
    none, top = torch.zeros(()), max(w.abs().max().item() for w in want.values())

    def off(n):
        return (want.get(n, none) - got.get(n, none)).abs().max().item()

    return dict(layers=len(want), found=len(got), error=max(map(off, {**want, **got})) / top)


# ---------------------------------------------------------------- reading


def read_by_diffusers(
    pipe,  # a fresh pipeline
    file: str | Path,  # in diffusers' or kohya's layout
    peft,  # the module, not needed here
):
    "Let diffusers load a file."
    with quiet():
        pipe.load_lora_weights(str(file))


def read_by_peft(
    pipe,  # a fresh pipeline
    file: str | Path,  # in diffusers' layout, or a folder of PEFT
    peft,  # the module
):
    """Let PEFT load a file into the U-Net.

    A file of diffusers comes with the configuration of its header, because that is how programs without a pipeline use it.
    """
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
    file: str | Path,  # in kohya's layout, with diffusers' names of blocks
) -> dict[str, torch.Tensor]:  # layer name -> update of the weight
    """Compute the updates of a kohya file from its tensors: alpha/rank * up @ down.

    The modules of the networks give the names; the code for names and files of this library is not involved.
    """
    from safetensors.torch import load_file

    raw, found = load_file(file), {}
    heads = dict(unet="lora_unet_", text_encoder="lora_te_text_model_", text_encoder_2="lora_te2_")
    for component in components_of(pipe):
        for n in dict(getattr(pipe, component).named_modules()):
            k = heads[component] + n.replace(".", "_")
            if (down := raw.get(f"{k}.lora_down.weight")) is None:
                continue
            delta = raw[f"{k}.lora_up.weight"].flatten(1) @ down.flatten(1) * raw[f"{k}.alpha"] / len(down)
            found[published(component, n)] = delta.view(-1, *down.shape[1:])
    return found


# ---------------------------------------------------------------- writing


def reference_adapter(
    pipe,  # a fresh pipeline, which gets the adapter
    peft,  # the module
    alpha: float,  # lora_alpha, at rank 4; another value than 4 brings patterns of ranks and alphas too
    every: bool,  # True: all kinds of layers; False: attention only
) -> dict:  # component -> PEFT's wrapper
    "Let PEFT put a random adapter into the networks of a pipeline."
    wide = ["proj_in", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj"] * every
    image = dict(target_modules=["to_q", "to_k", "to_v", "to_out.0", *wide])
    if alpha != 4:
        image |= dict(rank_pattern={"to_k": 2}, alpha_pattern={"attn1.to_q": 3})
    text, made, g = dict(target_modules=["q_proj", "out_proj", *["fc1"] * every]), {}, generator("peer")
    for component in components_of(pipe):
        config = peft.LoraConfig(r=4, lora_alpha=alpha, **(image if component == "unet" else text))
        with quiet():
            made[component] = peft.get_peft_model(getattr(pipe, component), config)
        for k, p in made[component].named_parameters():
            if "lora_B" in k:
                p.data.copy_(torch.randn(p.shape, generator=g) * 0.6)
    return made


def tensors_of(
    made: dict,  # component -> PEFT's wrapper
    peft,  # the module
) -> dict[str, dict]:  # component -> key -> tensor
    "Take the adapters out of PEFT's wrappers, with the keys that diffusers' scripts pass on."
    tensors = {}
    for component, wrapper in made.items():
        with quiet():
            found = peft.get_peft_model_state_dict(wrapper)
        tensors[component] = {k.removeprefix("base_model.model."): v.contiguous() for k, v in found.items()}
    return tensors


def write_diffusers(
    pipe,  # the pipeline
    made: dict,  # component -> PEFT's wrapper
    folder: Path,  # where to write
    peft,  # the module
    old: bool = False,  # the keys of diffusers' scripts before PEFT, without a header
) -> Path:  # the folder
    "Let diffusers save an adapter."
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers

    renamed = convert_state_dict_to_diffusers if old else dict
    layers = {f"{c}_lora_layers": renamed(s) for c, s in tensors_of(made, peft).items()}
    texts = {} if old else _collate_lora_metadata(made)
    with quiet():
        pipe.save_lora_weights(str(folder), **layers, **texts)
    return folder


def write_converted(
    pipe,  # not needed
    made: dict,  # component -> PEFT's wrapper
    folder: Path,  # where to write
    peft,  # the module
    oldest: bool = False,  # on to the first key format of diffusers
) -> Path:  # the file
    """Let diffusers' converters name the tensors as kohya does, or as its own oldest files did.

    These formats have no place for a scale, or always write alpha = rank.
    """
    from diffusers.loaders import lora_conversion_utils as converters
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    both = {f"{c}.{k}": v for c, s in tensors_of(made, peft).items() for k, v in s.items()}
    tensors = convert_state_dict_to_kohya(both)
    if oldest:
        tensors, _ = converters._convert_non_diffusers_lora_to_diffusers(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file := Path(folder) / "converted.safetensors")
    return file


def write_peft(
    pipe,  # not needed
    made: dict,  # component -> PEFT's wrapper
    folder: Path,  # where to write
    peft,  # not needed
) -> Path:  # the folder
    "Let PEFT save an adapter, a folder per network."
    with quiet():
        for component, wrapper in made.items():
            wrapper.save_pretrained(str(Path(folder) / component))
    return folder
