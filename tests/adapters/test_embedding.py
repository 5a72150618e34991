"""Words in files and in models, held against diffusers: what we write it reads to the same text, and the other way."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from stylelora.adapters.embedding import add_words, load_embedding, remove_words, save_embedding, worn_words
from stylelora.adapters.files import load_adapter, read_adapter
from stylelora.adapters.merge import merge_files
from stylelora.core import generator
from stylelora.models.base import encode_text, tiny_base

PROMPTS = ["<ink> a cup", "a <Ink>, b", "a cup"]


def vectors(base, n=3):
    g, nets = generator("vectors"), ("text_encoder", "text_encoder_2")
    found = {c: getattr(base, c) for c in nets if getattr(base, c) is not None}
    return {c: torch.randn(n, net.config.hidden_size, generator=g) for c, net in found.items()}


def pipeline_of(base):
    "Make a pipeline of diffusers with the networks and tokenizers of a base."
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    parts = dict(vae=base.vae, unet=base.unet, text_encoder=base.text_encoder, tokenizer=base.tokenizer)
    if base.text_encoder_2 is not None:
        two = dict(text_encoder_2=base.text_encoder_2, tokenizer_2=base.tokenizer_2)
        return StableDiffusionXLPipeline(**parts, **two, scheduler=DDIMScheduler())
    rest = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline(**parts, scheduler=DDIMScheduler(), **rest)


def text_of(pipe, prompts):
    return pipe.encode_prompt(
        prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )


@pytest.mark.parametrize(
    "layout, told", [("diffusers", {}), ("kohya", dict(token="<ink>")), ("a1111", dict(token="<ink>"))]
)
@pytest.mark.parametrize("n", [1, 3])
def test_diffusers_reads_what_we_write(layout, told, n, tmp_path):
    base, pipe = tiny_base(), pipeline_of(tiny_base())
    file = save_embedding("<ink>", vectors(base, n), tmp_path / "x.safetensors", layout)
    pipe.load_textual_inversion(str(file), **told)
    load_embedding(base, file)
    for prompt in (PROMPTS[0], PROMPTS[2]):  # diffusers expands no other case
        assert torch.equal(encode_text(base, prompt), text_of(pipe, prompt)[0])
    bare = tiny_base()
    assert not torch.equal(encode_text(base, PROMPTS[0]), encode_text(bare, PROMPTS[0]))
    assert torch.equal(encode_text(base, PROMPTS[2]), encode_text(bare, PROMPTS[2]))


def test_we_read_what_diffusers_writes(tmp_path):
    "Its training script saves the rows of its longer table under the first token."
    base, pipe = tiny_base(), pipeline_of(tiny_base())
    pipe.load_textual_inversion(vectors(base)["text_encoder"], token="<ink>")
    ids = pipe.tokenizer.convert_tokens_to_ids(["<ink>", "<ink>_1", "<ink>_2"])
    rows = pipe.text_encoder.get_input_embeddings().weight[ids].detach().clone()
    save_file({"<ink>": rows}, tmp_path / "learned_embeds.safetensors", dict(format="pt"))
    assert load_embedding(base, tmp_path).word == "<ink>"
    assert torch.equal(encode_text(base, PROMPTS[0]), text_of(pipe, PROMPTS[0])[0])


def test_sdxl_has_rows_in_both_text_encoders(tmp_path):
    base, pipe = tiny_base(kind="sdxl"), pipeline_of(tiny_base(kind="sdxl"))
    file = save_embedding("<ink>", vectors(base), tmp_path / "x.safetensors", "kohya")
    tensors = load_file(file)
    assert sorted(tensors) == ["clip_g", "clip_l"]
    for key, i in (("clip_l", ""), ("clip_g", "_2")):
        parts = dict(text_encoder=getattr(pipe, f"text_encoder{i}"), tokenizer=getattr(pipe, f"tokenizer{i}"))
        pipe.load_textual_inversion(tensors[key], token="<ink>", **parts)
    load_embedding(base, file)
    ours, theirs = encode_text(base, PROMPTS[0]), text_of(pipe, PROMPTS[0])
    assert torch.equal(ours[:, :-1], theirs[0])
    assert torch.equal(ours[:, -1, : theirs[2].shape[-1]], theirs[2])


def test_the_pooled_text_is_that_of_the_end_mark_also_where_the_largest_token_was_taken_for_it():
    base, other = tiny_base(kind="sdxl"), tiny_base(kind="sdxl")
    for m in other.text_encoder_2.modules():  # as the published encoders say
        if hasattr(m, "eos_token_id"):
            m.config.eos_token_id = m.eos_token_id = 2
    for b in (base, other):
        add_words(b, {"<ink>": vectors(b)})
    assert torch.equal(encode_text(base, PROMPTS[:2]), encode_text(other, PROMPTS[:2]))
    remove_words(other)
    assert {m.eos_token_id for m in other.text_encoder_2.modules() if hasattr(m, "eos_token_id")} == {2}


def test_a_base_in_half_precision_keeps_its_number_format():
    base = tiny_base(dtype="bfloat16")
    add_words(base, {"<ink>": vectors(base)})
    assert base.text_encoder.dtype == encode_text(base, PROMPTS[:1]).dtype == torch.bfloat16
    assert worn_words(base)["<ink>"]["text_encoder"].dtype == torch.float32


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "a1111"])
def test_commands_for_adapters_refuse_an_embedding_by_name(layout, tmp_path):
    base = tiny_base()
    file = save_embedding("<ink>", vectors(base), tmp_path / "x.safetensors", layout)
    for call in (
        lambda: read_adapter(file),
        lambda: load_adapter(base, file),
        lambda: merge_files([file], [1.0], tmp_path / "merged.safetensors"),
    ):
        with pytest.raises(ValueError, match="x.safetensors: this is an embedding of .*changes no weight"):
            call()
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]
