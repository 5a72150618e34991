"""Hold stylelora against the installed diffusers and peft on the same base, work and number format:  make bench

    python tools/bench.py [--rounds 7] [--base embedded] [--only sample,train] [--threads 2] [--out reports/results/bench.json]

Each round does the same work with both, in turns, in one process, and counts seconds of the processor; so what else runs on the
machine hurts both alike. A ratio above 1 says that stylelora is faster. The median over the rounds is the result, the smallest and
largest are its spread. The first round warms up and does not count.
"""

import argparse
import importlib.metadata
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stylelora.core import assets, generator, pick_dtype, root, write_json
from stylelora.models.base import encode_text, tiny_base
from stylelora.models.load import load_base, save_base
from stylelora.sample.generate import generate
from stylelora.train.checkpoint import start
from stylelora.train.loop import advance, plain_objective
from stylelora.train.step import TrainConfig

SCHEDULERS = dict(ddim="DDIMScheduler", dpmpp_2m="DPMSolverMultistepScheduler")
ROWS = [  # sampler, steps, pictures at a time, number format
    ("ddim", 25, 1, "bfloat16"),
    ("dpmpp_2m", 20, 1, "bfloat16"),
    ("ddim", 25, 1, "float32"),
    ("dpmpp_2m", 20, 1, "float32"),
    ("ddim", 3, 32, "bfloat16"),
]
STEPS, BATCH, RANK = 4, 8, 8  # of the training row


@dataclass
class Row:
    "One line of the table: the same work in two libraries."

    what: str
    ours: object  # function without arguments
    theirs: object
    settings: dict


def pipeline(folder, sampler, dtype):
    "Open the base in diffusers as its users do."
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=pick_dtype(dtype), safety_checker=None, requires_safety_checker=False
    )
    pipe.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampling_row(folder, sampler, steps, n, dtype):
    "Prepare the drawing of n pictures with guidance."
    base, pipe = load_base(folder, "cpu", dtype), pipeline(folder, sampler, dtype)
    prompt = "noto emoji of taxi"

    def ours():
        return generate(base, prompt, range(n), sampler, steps, 4.0, batch=n, progress=False).images

    def theirs():
        seeds = [torch.Generator().manual_seed(i) for i in range(n)]
        how = dict(num_inference_steps=steps, guidance_scale=4.0, generator=seeds, output_type="np")
        return pipe([prompt] * n, **how).images

    told = dict(sampler=sampler, steps=steps, pictures=n, dtype=dtype, guidance_scale=4.0)
    return Row(f"{sampler} {steps}, batch {n}, {dtype}", ours, theirs, told)


def peft_trainer(folder, latents, contexts):
    "Make the training step that users write with diffusers and peft: bfloat16 base, adapter in float32, autocast."
    import peft

    pipe = pipeline(folder, "ddim", "bfloat16")
    unet, scheduler, g = pipe.unet.requires_grad_(False).train(), pipe.scheduler, generator("bench")
    layers = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
    unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers))
    params = [p for p in unet.parameters() if p.requires_grad]
    for p in params:
        p.data = p.data.float()
    optimizer, half = torch.optim.AdamW(params, lr=5e-4, weight_decay=0.01), torch.bfloat16

    def step():
        index = torch.randint(len(latents), (BATCH,), generator=g)
        z, noise = latents[index], torch.randn(BATCH, *latents.shape[1:], generator=g)
        t = torch.randint(len(scheduler.alphas_cumprod), (BATCH,), generator=g)
        noisy = scheduler.add_noise(z, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            out = unet(noisy.to(half), t, encoder_hidden_states=contexts[index].to(half)).sample
        F.mse_loss(out.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in params)


def training_row(folder):
    "Prepare steps of a LoRA training, with latents and text embeddings computed beforehand."
    base, g = load_base(folder, "cpu", "bfloat16"), generator("bench data")
    latents = torch.randn(32, *base.latent_shape, generator=g)
    contexts = encode_text(base, ["noto emoji of taxi"] * 32).float()
    config = TrainConfig(
        rank=RANK, target_modules="attention_ff", batch_size=BATCH, mixed_precision="bfloat16"
    )
    run, empty, objective = start(base, config), encode_text(base, "").float(), plain_objective(base)
    step, n = peft_trainer(folder, latents, contexts)
    own = sum(p.numel() for p in run.params.values())
    assert own == n, f"{own} parameters here, {n} there: not the same work"

    def ours():
        for _ in range(STEPS):
            advance(run, latents, contexts, empty, objective)

    def theirs():
        for _ in range(STEPS):
            step()

    told = dict(rank=RANK, batch_size=BATCH, steps=STEPS, dtype="bfloat16", parameters=n)
    return Row(f"training step, rank {RANK}, batch {BATCH}, bfloat16", ours, theirs, told)


def measure(row, rounds):
    "Time both libraries in turns; seconds of the processor for each round."
    seen = []
    for i in tqdm(range(rounds + 1), desc=row.what):
        spent = {}
        for name in ("ours", "theirs") if i % 2 else ("theirs", "ours"):
            began = time.process_time()
            getattr(row, name)()
            spent[name] = time.process_time() - began
        seen.append(spent)
    ratios = sorted(s["theirs"] / s["ours"] for s in seen[1:])
    middle = {name: round(statistics.median(s[name] for s in seen[1:]), 4) for name in spent}
    return dict(
        what=row.what,
        ratio=round(statistics.median(ratios), 3),
        low=round(ratios[0], 3),
        high=round(ratios[-1], 3),
        rounds=rounds,
        **middle,
        **row.settings,
    )


def rows_of(folder, only):
    "Prepare one row after the other."
    if "sample" in only:
        yield from (sampling_row(folder, *how) for how in ROWS)
    if "train" in only:
        yield training_row(folder)


def bench(folder, rounds=7, only=("sample", "train")):
    "Measure all rows; a list of dicts."
    about = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft")}
    about["threads"] = torch.get_num_threads()
    return [measure(row, rounds) | about for row in rows_of(folder, only)]


def main(argv=None):
    "Measure, print and store."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--base", default="embedded", help="embedded, tiny, or a diffusers folder")
    parser.add_argument("--only", default="sample,train")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=root() / "reports" / "results" / "bench.json")
    a = parser.parse_args(argv)
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as room:
        folder = assets() / "base" if a.base == "embedded" else Path(a.base)
        if a.base == "tiny":
            folder = save_base(tiny_base(), Path(room) / "tiny")
        found = bench(folder, a.rounds, a.only.split(","))
    for r in found:
        print(f"{r['what']:45} {r['ratio']:.2f} [{r['low']:.2f}..{r['high']:.2f}]")
    print(write_json(a.out, found))


if __name__ == "__main__":
    main()
