"""Each layout in each direction: layers that arrived, error of the updates, and the difference of two pictures from the same noise."""

from importlib.metadata import version
from pathlib import Path

import torch

from stylelora.adapters.files import load_parts, read_adapter, save_adapter
from stylelora.adapters.keys import TEXT
from stylelora.adapters.merge import delta_of
from stylelora.core import write_json

from .reference import (
    BASES,
    by_formula,
    clone,
    compare,
    draw,
    peer_adapter,
    peer_updates,
    random_adapter,
    read_by_diffusers,
    read_by_peft,
    write_converted,
    write_diffusers,
    write_peft,
)

LIMITS = dict(error=1e-5, pixels=1 / 255, change=10 / 255)


def holds(
    row,  # of the certificate
) -> bool:  # whether it is green
    "Judge a row of the certificate."
    arrived = row["layers"] == row["found"] > 0 and row["error"] <= LIMITS["error"]
    drawn = row["pixels"] is None or row["pixels"] <= LIMITS["pixels"] and row["change"] >= LIMITS["change"]
    return bool(arrived and drawn)


def make_row(
    way,  # base, layout, writer and reader, by name
    numbers,  # of `compare`
    want=None,  # picture as the writer meant it (h,w,3); None: no picture is drawn
    got=None,  # picture as the reader got it
    bare=None,  # picture without an adapter
) -> dict:  # the row, with its judgement
    "Put a row of the certificate together."

    def off(a, b):
        return None if a is None else float(f"{(a - b).abs().max().item():.3g}")

    row = dict(zip(("base", "layout", "writer", "reader"), way)) | numbers
    row |= dict(error=float(f"{numbers['error']:.3g}"), pixels=off(want, got), change=off(want, bare))
    return row | dict(green=holds(row))


HERE = (
    ("diffusers", "diffusers", read_by_diffusers),
    ("kohya", "diffusers", read_by_diffusers),
    ("diffusers", "PEFT", read_by_peft),
    ("peft", "PEFT", read_by_peft),
)  # layout, reader, how it reads


def _updates(state):
    return {n: delta_of(s).float() for n, s in state.items()}


def written_here(
    base,  # name of the model
    pipe,  # its pipeline
    peft,  # the module
    folder,  # an empty folder for the files
) -> list:  # rows of the certificate
    "Write an adapter in every layout and let the peers read it."
    rows, bare = [], draw(pipe)
    for layout, reader, read in HERE:
        state = random_adapter(pipe, ("unet", *(TEXT if reader == "diffusers" else ())))
        name = f"{layout}-{reader}" + ".safetensors" * (layout != "peft")
        mine, theirs = (clone(type(pipe), pipe.components) for _ in range(2))
        load_parts(mine, state)
        read(theirs, save_adapter(state, Path(folder) / name, layout), peft)
        numbers = compare(_updates(state), peer_updates(theirs))
        rows.append(make_row((base, layout, "stylelora", reader), numbers, draw(mine), draw(theirs), bare))
    state = random_adapter(pipe)
    found = by_formula(pipe, save_adapter(state, Path(folder) / "formula.safetensors", "kohya", sdxl=False))
    return [*rows, make_row((base, "kohya", "stylelora", "its formula"), compare(_updates(state), found))]


# layout, writer, alpha at rank 4, whether every kind of layer takes part, and how it is written
THERE = (
    ("diffusers", "diffusers", 6, True, write_diffusers, {}),
    ("diffusers before PEFT", "diffusers", 4, False, write_diffusers, dict(old=True)),
    ("diffusers of 2023", "diffusers", 4, False, write_converted, dict(oldest=True)),
    ("kohya", "diffusers", 4, True, write_converted, {}),
    ("peft", "PEFT", 6, True, write_peft, {}),
)


def written_there(
    base,  # name of the model
    pipe,  # its pipeline
    peft,  # the module
    folder,  # an empty folder for the files
) -> list:  # rows of the certificate
    "Let the peers write adapters in every layout and read them."
    rows, bare = [], draw(pipe)
    for i, (layout, writer, alpha, every, write, more) in enumerate(THERE):
        mine, theirs = (clone(type(pipe), pipe.components) for _ in range(2))
        made = peer_adapter(theirs, peft, alpha, every)
        (at := Path(folder) / f"there-{i}").mkdir()
        state = read_adapter(write(theirs, made, at, peft, **more), pipe.unet.config.layers_per_block).state
        load_parts(mine, state)
        numbers = compare(peer_updates(theirs), _updates(state))
        rows.append(make_row((base, layout, writer, "stylelora"), numbers, draw(theirs), draw(mine), bare))
    return rows


def summarise(
    rows,  # of the certificate
) -> dict:  # numbers of rows, green rows and layers; worst error and pixel; smallest change of a picture
    "Sum up a certificate."
    drawn = [r for r in rows if r["pixels"] is not None]
    return dict(
        rows=len(rows),
        green=sum(r["green"] for r in rows),
        layers=sum(r["found"] for r in rows),
        error=max(r["error"] for r in rows),
        pixels=max(r["pixels"] for r in drawn),
        change=min(r["change"] for r in drawn),
    )


def certify(
    peft,  # the module
    folder,  # an empty folder for the files
    bases=tuple(BASES),  # which models
    seed=0,  # of the random weights of models and adapters
) -> dict:  # versions, limits, summary and rows
    "Make the interop certificate."
    if odd := set(bases) - set(BASES):
        raise ValueError(f"{odd.pop()!r} is none of {', '.join(BASES)}")
    rows = []
    for base in bases:
        (at := Path(folder) / base).mkdir(parents=True)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pipe = BASES[base]()
            rows += written_here(base, pipe, peft, at) + written_there(base, pipe, peft, at)
    versions = {k: version(k) for k in ("diffusers", "peft", "transformers", "safetensors", "torch")}
    return dict(versions=versions, limits=LIMITS, summary=summarise(rows), rows=rows)


def write_certificate(
    made,  # by `certify`
    path,  # .json file to write
) -> Path:  # the file
    "Write a certificate, if every row is green."
    if red := [r for r in made["rows"] if not r["green"]]:
        raise ValueError(
            f"{len(red)} of {len(made['rows'])} rows are red, such as {red[0]}; {path} is left as it is"
        )
    return write_json(path, made)
