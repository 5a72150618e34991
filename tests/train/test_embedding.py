"""A training of a word, killed with kill -9 in a process of its own, ends with the same bytes."""

import multiprocessing
import os
import signal

import pytest

from tests.train.test_faults import HEAVY

STEPS = 8


def training(folder, lora, on_step=None):
    "Train a word on six invented pictures, alone or beside a LoRA, with everything switched on."
    import torch

    from stylelora.core import generator
    from stylelora.models.base import tiny_base
    from stylelora.train.embedding import WordConfig, train_embedding
    from stylelora.train.step import make_config

    torch.set_num_threads(1)  # other numbers of threads, other last bits
    z, captions = torch.randn(6, 4, 8, 8, generator=generator("pictures")), [f"<w> {c}" for c in "abcdef"]
    values = dict(train_steps=STEPS, batch_size=2, lr=1e-2, rank=2, ema=0.9, lora_dropout=0.1, val_every=2)
    values |= dict(save_every=3, gradient_accumulation_steps=2, caption_dropout=0.3)
    word = WordConfig(word="<w>", num_vectors=2, initial_word="x", lora=lora, word_lr=0.1, pick="best")
    how = dict(config=make_config(**values), val=(z[:2], captions[:2]), progress=False)
    return train_embedding(tiny_base(), z, captions, word, folder=folder, on_step=on_step, **how)


def child(folder, lora, die_at):
    def on_step(row):
        if row["step"] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    training(folder, lora, on_step)


def run(folder, lora, die_at=0):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    process = context.Process(target=child, args=(str(folder), lora, die_at))
    process.start()
    process.join(900)
    return process.exitcode


def results(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if "training" not in f.name and f.suffix}


@pytest.mark.parametrize("lora", [False, True], ids=["word", "word and LoRA"])
def test_killed_it_ends_with_the_same_bytes(lora, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole, lora) == 0
    for k in (3, 7):
        assert run(cut, lora, k) == -signal.SIGKILL
        assert results(cut) == {}
    assert run(cut, lora) == 0
    names = ["pytorch_lora_weights.safetensors", "pytorch_lora_weights_emb.safetensors"]
    assert sorted(results(whole)) == (names if lora else ["learned_embeds.safetensors"])
    assert results(cut) == results(whole)
