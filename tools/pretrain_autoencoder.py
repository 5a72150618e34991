"""Train the autoencoder of the second base:  python tools/pretrain_autoencoder.py STORE FOLDER seconds=5400 [name=value …]

Kill it and start it again at will; it goes on from its last checkpoint. The learning rate follows the time spent, so the
run always lands after `seconds` of training; cpu_clock=true makes them seconds of the processor. The network is written to FOLDER/vae at the end and to FOLDER/vae-now at
each checkpoint, the log to FOLDER/log.jsonl, the decibels to FOLDER/eval-*.json.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from diffusers import AutoencoderTiny

from stylelora.pretrain.autoencoder import autoencoder_loss, new_autoencoder, patches
from stylelora.pretrain.filters import coverage
from stylelora.pretrain.loop import Budget, fit, swap_weights
from stylelora.pretrain.treatments import TREATMENTS
from stylelora.study.params import Loader

GIVEN = dict(
    seconds=5400.0,
    batch=32,
    side=64,
    whole=0.8,
    lr=1e-3,
    hold=0.35,
    channels=64,
    latent_channels=4,
    ema=0.998,
    edge=0.5,
    square=3.0,
    flat=1.0,
    plain=0.5,
    start="",
    threads=2,
    muon=False,
    cpu_clock=False,
    save_every=240.0,
    warmup=200,
    decoder_only=False,
)


def held_treatments(x):
    "Put plain drawings under each held-out treatment: {word: (n,h,w,3) uint8}."
    out = {}
    for t in (t for t in TREATMENTS.values() if t.held):
        ys = []
        for k, p in enumerate(x):
            big = np.repeat(np.repeat(p.astype(np.float32) / 255, 2, 0), 2, 1)
            y = t.fn(big, coverage(big), 0.5, np.random.default_rng(k))[0]
            ys.append(
                (y.reshape(len(p), 2, len(p), 2, 3).mean((1, 3)).clip(0, 1) * 255).round().astype(np.uint8)
            )
        out[t.word] = np.stack(ys)
    return out


def tests(x, done, plan, n):
    "Pick the pictures that measure: left-out cells plain and treated, held-out makers, held-out treatments."
    ok = done == 1
    left = plan[(plan.role == "left_out") & ok]
    plain, treated = left[left.treatment == ""].index[:n], left[left.treatment != ""].index[:n]
    out = dict(left_out=x[plain], left_out_treated=x[treated])
    for v, g in plan[(plan.role == "probe") & ok].groupby("maker"):
        out[v] = x[g.index[: n // 2]]
    return out | held_treatments(x[plain[: n // 4]])


@torch.no_grad()
def widen(net, old):
    "Take over an autoencoder with as many latent channels or fewer; the decoder ignores new ones at first."
    for (name, p), q in zip(net.named_parameters(), old.parameters()):
        if p.shape == q.shape:
            p.copy_(q)
        elif name.startswith("encoder"):
            p[: len(q)] = q
        else:
            p.zero_()
            p[:, : q.shape[1]] = q


@torch.no_grad()
def decibels(net, x):
    out = []
    for k in range(0, len(x), 16):
        a = torch.from_numpy(x[k : k + 16]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            y = net.decoder(net.encoder(a)).float().clamp(-1, 1)
        out.append(-10 * ((a - y) / 2).pow(2).mean((1, 2, 3)).clamp(min=1e-6).log10())
    return round(torch.cat(out).mean().item(), 2)


def main(store, folder, **given):
    o = GIVEN | given
    store, folder = Path(store), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan, x = (
        pd.read_parquet(store / "plan.parquet"),
        np.load(next(store.glob("pictures-*.npy")), mmap_mode="r"),
    )
    done = np.load(next(store.glob("done-*.npy")))
    seen = (plan.role == "seen").to_numpy() & (done == 1)
    rows = [
        np.flatnonzero(seen & k)
        for k in ((plan.treatment == "").to_numpy(), (plan.treatment != "").to_numpy())
    ]
    test = tests(x, done, plan, 48)
    print(
        {k: len(r) for k, r in zip(("plain", "treated"), rows)},
        {k: len(v) for k, v in test.items()},
        flush=True,
    )
    net = new_autoencoder(o["channels"], o["latent_channels"], factor=8).to(memory_format=torch.channels_last)
    if o["start"]:
        widen(net, AutoencoderTiny.from_pretrained(o["start"]))
    net.encoder.requires_grad_(not o["decoder_only"])
    budget = Budget(
        batch=o["batch"],
        **{
            k: o[k]
            for k in ("seconds", "lr", "hold", "ema", "threads", "muon", "save_every", "warmup", "cpu_clock")
        },
        weight_decay=0.01,
        images=10**9,
    )
    clock = {}

    def batch(k, gen):
        late = clock["share"]() > o["whole"]
        n, side = (o["batch"] // 4, x.shape[1]) if late else (o["batch"], o["side"])
        return patches(x, rows, gen, n, side, o["plain"])

    def loss(a):
        shape = (len(a), o["latent_channels"], a.shape[-1] // 8, a.shape[-1] // 8)
        return autoencoder_loss(
            net, a, torch.randn(shape), edge=o["edge"], square=o["square"], flat=o["flat"]
        )

    def report(k):
        got = {v: decibels(net, p) for v, p in test.items()}
        net.save_pretrained(folder / "vae-now")
        print(k, round(clock["share"](), 3), got, flush=True)
        return got | dict(share=clock["share"]())

    ema = fit(
        [net],
        batch,
        loss,
        budget,
        folder,
        on_eval=report,
        progress=False,
        on_start=lambda run: clock.update(share=lambda: run.spent / budget.seconds),
    )
    swap_weights([p for p in net.parameters() if p.requires_grad], ema)
    net.save_pretrained(folder / "vae")
    print("finished:", {v: decibels(net, p) for v, p in test.items()})


if __name__ == "__main__":
    args = [a for a in sys.argv[1:] if "=" not in a]
    pairs = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    if len(args) == 2:
        main(*args, **{k: yaml.load(v, Loader) for k, v in pairs.items()})
    else:
        print(__doc__)
