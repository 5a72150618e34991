"""Which rate for a word of textual inversion? On validation concepts:  python tools/word_rate.py

Trains words on fifty OpenMoji drawings of the embedded base, one seed, and writes reports/results/word_rate.csv: Style@1, Content@1 and skill
on 48 validation concepts. `stylelora.models.defaults` takes its rate from there. A quarter of an hour on one core.
"""

import pandas as pd

from stylelora.adapters.embedding import remove_words
from stylelora.core import root, write_atomic
from stylelora.data.folder import LatentCache
from stylelora.data.grid import grid_images, load_grid, make_caption
from stylelora.measure.evaluate import judge_for, score
from stylelora.models.load import load_base
from stylelora.sample.generate import generate
from stylelora.train.embedding import WordConfig, train_embedding
from stylelora.train.step import TrainConfig

STYLE, STEPS, WORD = "openmoji", 150, "<mine>"
grid, base, judge = load_grid(), load_base("embedded", "cpu"), judge_for(STYLE, split="val")
pool, asked = grid.concepts("pool", STYLE)[:50], grid.concepts("val", STYLE)[:48]
latents = LatentCache(base).latents(grid_images(grid, pool, STYLE))
table = []


def measure(word, **how):
    "Draw the validation concepts with a word, and score them."
    prompts, at = [make_caption(c, word) for c in asked], [judge.concepts.index(c) for c in asked]
    made = generate(base, prompts, 0, "euler_ancestral", 25, 3.0, batch=48, mixed_precision="bfloat16")
    means = score(judge, made.images, at)[["style_at_1", "content_at_1", "gt_skill"]].mean().round(3)
    table.append(how | means.to_dict())
    print(table[-1], flush=True)


measure("noto", initial_word="noto", num_vectors=0, word_lr=0.0, train_steps=0)
for n in (4, 1):
    for lr in (2e-2, 5e-3, 1e-3):
        word = WordConfig(word=WORD, num_vectors=n, initial_word="noto", word_lr=lr, lora=False)
        config = TrainConfig(train_steps=STEPS, batch_size=8, lr=lr, val_every=0)
        captions = [make_caption(c, WORD) for c in pool]
        train_embedding(base, latents, captions, word, config=config, progress=False)
        measure(WORD, initial_word="noto", num_vectors=n, word_lr=lr, train_steps=STEPS)
        remove_words(base)
write_atomic(root() / "reports" / "results" / "word_rate.csv", pd.DataFrame(table).to_csv(index=False))
