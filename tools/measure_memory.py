"""Measure the memory of a training step of Stable Diffusion 1.5 under each option, with random weights.

    python tools/measure_memory.py                      # what is missing in the file; on a GPU if there is one
    python tools/measure_memory.py --only checkpointing
    python tools/measure_memory.py --latent 64 --batch 4 --device cuda

Every option runs in a process of its own, and its row is written when it is done, so that the script can be stopped and
started again. The U-Net has its published size, and so have the text encoder and the autoencoder in the two options that keep
them at work. On a CPU the peak is that of the resident memory after loading, with program_mb taken before it; on a GPU it is
that of PyTorch's allocator, and the last step is timed, too.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PLAIN = dict(rank=8, target_modules="cross_attention")
OPTIONS = {  # name -> parameters of the training; number format of the weights; network that works at every step
    "weights only": None,
    "plain": {},
    "gradient_checkpointing": dict(gradient_checkpointing=True),
    "bfloat16 arithmetic": dict(mixed_precision="bfloat16"),
    "bfloat16 weights": dict(dtype="bfloat16"),
    "bfloat16 weights, checkpointing": dict(dtype="bfloat16", gradient_checkpointing=True),
    "texts encoded at every step": dict(keep="text"),
    "pictures encoded at every step": dict(keep="picture"),
    "rank 4": dict(rank=4),
    "rank 32": dict(rank=32),
    "rank 32, all layers": dict(rank=32, target_modules="conv"),
}


def resident(field):
    "Read the resident memory of this process in MB: VmRSS now, VmHWM at its peak; None where Linux is not."
    try:
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
    except (OSError, TypeError):
        return None


def forget_peak(device):
    "Start counting the peak anew."
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak includes the loading


def peak(device):
    from stylelora.core import peak_memory_mb

    return peak_memory_mb(device) if device == "cuda" else resident("VmHWM") or peak_memory_mb()


def fill(nets, g):
    "Fill weights with one repeated block of noise: what they are changes no memory, and drawing them takes a minute."
    import torch

    block = torch.randn(2**20, generator=g)
    for p in (p for net in nets for p in net.parameters()):
        for part in p.data.view(-1).split(len(block)):
            part.copy_(block[: len(part)] * p[0].numel() ** -0.5)


def worker(keep, device, size):
    "Make a network of the published size that works at every step: CLIP's text encoder, or the autoencoder."
    import torch

    if keep == "text":
        from transformers import CLIPTextConfig, CLIPTextModel

        net = (
            CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
            .to(device)
            .eval()
        )
        return net, lambda n: net(torch.zeros(n, 77, dtype=torch.long, device=device))
    if keep == "picture":
        from diffusers import AutoencoderKL

        net = (
            AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            )
            .to(device)
            .eval()
        )
        return net, lambda n: net.encode(torch.zeros(n, 3, size, size, device=device))
    return None, lambda n: None


def measure(option, latent, batch, steps, device):
    "Train a few steps under one option and return its row."
    import torch

    import stylelora.models.tiny as networks
    from stylelora.adapters.lora import count_parameters
    from stylelora.core import generator
    from stylelora.models.base import encode_text, full_base
    from stylelora.train.loop import train
    from stylelora.train.step import TrainConfig

    change = dict(OPTIONS[option] or {})
    dtype, keep = change.pop("dtype", "float32"), change.pop("keep", None)
    before, networks.randomise = resident("VmRSS"), fill
    base = full_base(latent=latent, device=device, dtype=dtype)
    net, work = worker(keep, device, 8 * latent)
    z = torch.randn(batch, *base.latent_shape, generator=generator("z"))
    contexts = encode_text(base, [""] * batch).cpu()
    forget_peak(device)
    row, seconds = dict(option=option, weights=dtype), []
    if OPTIONS[option] is not None:

        def on_step(r):
            with torch.no_grad():
                work(batch)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter())

        config = TrainConfig(
            train_steps=steps, batch_size=batch, val_every=0, save_every=steps, **PLAIN | change
        )
        train(base, z, contexts, config=config, on_step=on_step, progress=False)
        row["trainable"] = count_parameters(base.unet)["trainable"]
        if device == "cuda":
            row["seconds_per_step"] = round(seconds[-1] - seconds[-2], 4)
    return row | dict(
        peak_mb=round(peak(device)), program_mb=round(before) if before and device == "cpu" else None
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--only", choices=OPTIONS, action="append", help="measure this option; may be repeated")
    p.add_argument("--latent", type=int, help="height and width of the latents; 64 on a GPU, 16 on a CPU")
    p.add_argument("--batch", type=int, help="pictures per step; 4 on a GPU, 1 on a CPU")
    p.add_argument("--steps", type=int, default=2, help="steps, at least two; the last one is timed")
    p.add_argument("--seconds", type=float, default=1e9, help="begin no further option after so much time")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--out", type=Path, help="default: reports/results/sd15_memory.json")
    p.add_argument("--child", help=argparse.SUPPRESS)
    a = p.parse_args()
    from stylelora.core import pick_device, read_json, root, write_json

    device = pick_device(a.device).type
    gpu = device == "cuda"
    setting = dict(
        device=device,
        latent=a.latent or (64 if gpu else 16),
        batch=a.batch or (4 if gpu else 1),
        steps=a.steps,
    )
    if a.child:
        print("\n" + json.dumps(measure(a.child, setting["latent"], setting["batch"], a.steps, device)))
        return
    file = a.out or root() / "reports" / "results" / "sd15_memory.json"
    tables = read_json(file) if file.exists() else []  # one table per setting
    table = next((t for t in tables if {k: t[k] for k in setting} == setting), None)
    if table is None:
        tables.append(table := setting | dict(base="sd15", rows=[]))
    began = time.perf_counter()
    for option in a.only or OPTIONS:
        if time.perf_counter() - began > a.seconds:
            print("out of time; call again")
            break
        if option in (r["option"] for r in table["rows"]):
            print("there already:", option)
            continue
        call = [
            sys.executable,
            __file__,
            "--child",
            option,
            "--steps",
            str(a.steps),
            "--device",
            device,
            "--latent",
            str(setting["latent"]),
            "--batch",
            str(setting["batch"]),
        ]
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{option} failed (status {done.returncode}):\n{done.stderr[-2000:]}")
        table["rows"].append(row := json.loads(done.stdout.strip().splitlines()[-1]))
        order = list(OPTIONS)
        table["rows"].sort(key=lambda r: order.index(r["option"]))
        write_json(file, tables)
        print(row, flush=True)


if __name__ == "__main__":
    main()
