"""The interop certificate: each layout in each direction, with numbers.

People who train a style want to use it where they draw, and people who collect styles want to use them here. Each row of
the certificate is one way of an adapter: from a writer over a layout to a reader, on one of three models. It says how many
layers arrived of how many, how far the worst update is off, and how far two pictures differ that diffusers' own pipeline
draws from the same noise, one with the adapter as the writer meant it and one as the reader got it.

A row is green if exactly the right layers arrived, no update is off by more than a hundred-thousandth of the largest, and
no pixel differs by more than one step of a byte, while the adapter itself changes the picture by at least ten such steps.
The last condition keeps a reader from passing that loads nothing into a picture that needs nothing.
"""

from importlib.metadata import version
from pathlib import Path

import torch

from stylelora.adapters.files import load_components, read_adapter, save_adapter
from stylelora.adapters.keys import TEXT
from stylelora.core import write_json

from .reference import (
    BASES,
    by_formula,
    clone,
    compare,
    draw,
    our_updates,
    random_adapter,
    read_by_diffusers,
    read_by_peft,
    reference_adapter,
    reference_updates,
    write_converted,
    write_diffusers,
    write_peft,
)

LIMITS = dict(error=1e-5, pixels=1 / 255, change=10 / 255)


def holds(
    row: dict,  # of the certificate
) -> bool:  # whether it is green
    "Judge a row of the certificate."
    arrived = row["layers"] == row["found"] > 0 and row["error"] <= LIMITS["error"]
    drawn = row["pixels"] is None or row["pixels"] <= LIMITS["pixels"] and row["change"] >= LIMITS["change"]
    return bool(arrived and drawn)


def make_row(
    way: tuple,  # base, layout, writer and reader, by name
    numbers: dict,  # of `compare`
    want: torch.Tensor | None = None,  # picture as the writer meant it (h,w,3); None: no picture is drawn
    got: torch.Tensor | None = None,  # picture as the reader got it
    bare: torch.Tensor | None = None,  # picture without an adapter
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


def written_here(
    base: str,  # name of the model
    pipe,  # its pipeline
    peft,  # the module
    folder: str | Path,  # an empty folder for the files
) -> list[dict]:  # rows of the certificate
    "Write an adapter in every layout and let the reference implementations read it."
    rows, bare = [], draw(pipe)
    for layout, reader, read in HERE:
        state = random_adapter(pipe, ("unet", *(TEXT if reader == "diffusers" else ())))
        name = f"{layout}-{reader}" + ".safetensors" * (layout != "peft")
        mine, theirs = (clone(type(pipe), pipe.components) for _ in range(2))
        load_components(mine, state)
        read(theirs, save_adapter(state, Path(folder) / name, layout), peft)
        numbers = compare(our_updates(state), reference_updates(theirs))
        rows.append(make_row((base, layout, "stylelora", reader), numbers, draw(mine), draw(theirs), bare))
    state = random_adapter(pipe)
    found = by_formula(pipe, save_adapter(state, Path(folder) / "formula.safetensors", "kohya", sdxl=False))
    return [*rows, make_row((base, "kohya", "stylelora", "its formula"), compare(our_updates(state), found))]


# layout, writer, alpha at rank 4, whether every kind of layer takes part, and how it is written
THERE = (
    ("diffusers", "diffusers", 6, True, write_diffusers, {}),
    ("diffusers before PEFT", "diffusers", 4, False, write_diffusers, dict(old=True)),
    ("diffusers of 2023", "diffusers", 4, False, write_converted, dict(oldest=True)),
    ("kohya", "diffusers", 4, True, write_converted, {}),
    ("peft", "PEFT", 6, True, write_peft, {}),
)


def written_there(
    base: str,  # name of the model
    pipe,  # its pipeline
    peft,  # the module
    folder: str | Path,  # an empty folder for the files
) -> list[dict]:  # rows of the certificate
    "Let the reference implementations write adapters in every layout and read them."
    rows, bare = [], draw(pipe)
    for i, (layout, writer, alpha, every, write, more) in enumerate(THERE):
        mine, theirs = (clone(type(pipe), pipe.components) for _ in range(2))
        made = reference_adapter(theirs, peft, alpha, every)
        (at := Path(folder) / f"there-{i}").mkdir()
        state = read_adapter(write(theirs, made, at, peft, **more), pipe.unet.config.layers_per_block).state
        load_components(mine, state)
        numbers = compare(reference_updates(theirs), our_updates(state))
        rows.append(make_row((base, layout, writer, "stylelora"), numbers, draw(theirs), draw(mine), bare))
    return rows


def summarise(
    rows: list[dict],  # of the certificate
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
    folder: str | Path,  # an empty folder for the files
    bases: tuple = tuple(BASES),  # which models
    seed: int = 0,  # of the random weights of models and adapters
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
    made: dict,  # by `certify`
    path: str | Path,  # .json file to write
) -> Path:  # the file
    "Write a certificate, if every row is green."
    if red := [r for r in made["rows"] if not r["green"]]:
        raise ValueError(
            f"{len(red)} of {len(made['rows'])} rows are red, such as {red[0]}; {path} is left as it is"
        )
    return write_json(path, made)
