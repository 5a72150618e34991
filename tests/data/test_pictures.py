"""Pictures and captions as people bring them, through the command: nothing vanishes, and what is wrong is one line."""

import ast
import json
import os
import re
import signal
import struct
import time
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from stylelora.apps.cli import main
from stylelora.data.folder import hold_out, read_folder
from stylelora.models.base import decode, to_uint8
from stylelora.models.load import load_base
from stylelora.pictures import open_image, open_picture
from stylelora.train import from_folder

ROOT = Path(__file__).resolve().parents[2]


def drawing(seed, size=20):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def fill(folder, names, caption="emoji of square {}"):
    "Write small pictures with captions."
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        drawing(i).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption.format(i))
    return folder


def check(capsys, folder, *words):  # exit code, what was printed, what was complained
    code = main(["train", str(folder), "--check", "--base", "tiny", *map(str, words)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err and said.err.count("\n") == (code != 0), said.err
    return code, said.out, said.err


# ---------------------------------------------------------------------------------- the door


def test_there_is_one_door():
    opened = set()
    for path in [*(ROOT / "stylelora").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("Image.open", "PIL.Image.open"):
                opened.add(path.relative_to(ROOT).as_posix())
    assert opened == {"stylelora/pictures.py"}


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    started = []

    def ghostscript(*words, **more):
        started.append(words)
        return Image.new("RGB", (9, 9)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    file = tmp_path / "drawing.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="drawing.png cannot be opened .damaged, or none of PNG"):
        open_image(file)
    assert not started
    Image.open(file).convert("RGB")
    assert started  # as it would have been


@pytest.mark.parametrize("side", [13_000, 30_000])  # Pillow only warns of the first, and stops the second
def test_too_many_pixels_stop_before_they_are_decoded(side, tmp_path, recwarn):
    Image.new("1", (min(side, 13_000), 13_000)).save(tmp_path / "bomb.png")
    if side > 13_000:
        raw = bytearray((tmp_path / "bomb.png").read_bytes())
        raw[16:20] = struct.pack(">I", side)
        raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
        (tmp_path / "bomb.png").write_bytes(raw)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"bomb.png cannot be opened \("):
        open_image(tmp_path / "bomb.png")
    assert time.process_time() - began < 0.5  # seconds; decoding takes thirty
    assert not [w for w in recwarn if "Decompression" in w.category.__name__]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    signal.alarm(20)
    try:
        with pytest.raises(ValueError, match="a pipe"):
            open_picture(tmp_path / "pipe.png")
        assert "a pipe" in " ".join(read_folder(tmp_path, 16).problems.problem)
    finally:
        signal.alarm(0)


def test_damaged_exif_is_a_note_and_no_error(tmp_path, recwarn):
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    drawing(0).save(tmp_path / "a.jpg", exif=exif)
    image, notes = open_image(tmp_path / "a.jpg")
    assert image.size == (20, 20) and notes[0].startswith("Pillow warns: Corrupt EXIF data")
    assert not list(recwarn)


# ---------------------------------------------------------------------------------- folders


def test_underscores_links_and_odd_things(tmp_path, capsys):
    folder = fill(tmp_path / "mine", ["a.png", "_DSC0001.JPG", "_MG_0003.JPG"])
    fill(folder / "_sub", ["b.png"])
    fill(tmp_path / "disk", ["c.png"])
    (folder / "disk").symlink_to(tmp_path / "disk")
    (folder / "circle").symlink_to(folder)
    (folder / "gone").symlink_to("nowhere")
    (folder / "__MACOSX").mkdir()
    drawing(9).save(folder / "__MACOSX" / "a.png")
    (folder / "Thumbs.db").touch()
    code, said, _ = check(capsys, folder)
    assert code == 0 and "5 pictures" in said
    assert "warning: gone: a link to something that is not there" in said
    assert "warning: circle: link to a folder above, not followed" in said
    assert "MACOSX" not in said and "Thumbs" not in said
    (folder / "lost.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.jpg")
    code, said, complaint = check(capsys, folder, "--template", "{name}")
    assert (
        code == 1 and "lost.png: cannot be opened (a link to" in said and "pipe.jpg: cannot be" in complaint
    )


def test_a_folder_that_may_not_be_read_is_named(tmp_path, capsys, monkeypatch):
    folder = fill(tmp_path / "mine", ["a.png"])
    (folder / "secret").mkdir()
    really = os.scandir

    def scandir(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return really(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "secret cannot be read (Permission denied)" in check(capsys, folder)[2]


def test_picture_and_caption_in_two_normal_forms(tmp_path, capsys):
    nfc, nfd = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    drawing(0).save(tmp_path / f"{nfd}.png")
    (tmp_path / f"{nfc}.txt").write_text("emoji of x")
    drawing(1).save(tmp_path / f"{nfc} 2.png")
    (tmp_path / f"{nfd} 2.txt").write_text("emoji of y")
    found = read_folder(tmp_path, 16)
    assert sorted(found.captions) == ["emoji of x", "emoji of y"]
    assert not (found.problems.level == "error").any()
    assert read_folder(tmp_path, 16, "{name}").captions == ["été", "été 2"]  # whole, in both forms


def test_a_name_that_is_no_text(tmp_path, capsys):
    fill(tmp_path, ["a.png"])
    drawing(1).save(tmp_path / os.fsdecode(b"caf\xe9.png"))
    code, said, _ = check(capsys, tmp_path, "--template", "{name}")
    assert code == 0 and "caf?.png: odd characters" in said and "2 pictures" in said


# ---------------------------------------------------------------------------------- tables

CSV = {
    "comma": (
        "file_name,text\n0.png,a red fox, sitting, in snow\n1.png,a dog\n",
        "metadata.csv line 2: 4 value",
    ),
    "comma before an empty cell": (
        "file_name,text,by\n0.png,a fox, sitting,\n",
        "metadata.csv line 2: 4 value",
    ),
    "short": ("file_name,text\n0.png\n1.png,a dog\n", "metadata.csv line 2: 1 value"),
    "no name": ("text\na fox\na dog\n", "it needs 'file_name'"),
    "empty name": ("file_name,text\n0.png,a fox\n,a dog\n", "metadata.csv line 3: no file_name"),
    "semicolons": ("file_name;text\n0.png;a fox\n", "separate columns by commas"),
    "open quote": ('file_name,text\n0.png,"a fox\n1.png,a dog\n', "metadata.csv line 2: unexpected end"),
    "odd quote": ('file_name,text\n0.png,"a "red" fox"\n', "metadata.csv line 2: "),
    "endless": ("file_name,text\n0.png," + "x" * 140_000 + "\n", "metadata.csv line 2: field larger"),
    "two": ("file_name,text\n0.png,a\n0.png,b\n", "line 3: 0.png has another caption in line 2"),
}
JSONL = {
    "no name": (
        '{"text": "a fox"}\n{"file_name": "1.png", "text": "a"}\n',
        "metadata.jsonl line 1: no file_name",
    ),
    "list": (
        '{"file_name": "0.png", "text": ["a", "fox"]}\n',
        "metadata.jsonl line 1: text=['a', 'fox'] is no",
    ),
    "number": ('{"file_name": "0.png", "text": 7}\n', "metadata.jsonl line 1: text=7 is no text"),
    "name is a number": ('{"file_name": 0, "text": "a"}\n', "metadata.jsonl line 1: file_name=0 is no text"),
    "no text": (
        '{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png"}\n',
        "metadata.jsonl line 2: no text",
    ),
    "array": ('["0.png", "a"]\n', "metadata.jsonl line 1: not one JSON object a line"),
    "pretty": ('{\n"file_name": "0.png"\n}\n', "metadata.jsonl line 1: not one JSON object a line"),
    "half": ('{"file_name": "0.png", "text": "\\ud83d"}\n', "metadata.jsonl line 1: text holds half"),
}


@pytest.mark.parametrize("kind", [*(("csv", k) for k in CSV), *(("jsonl", k) for k in JSONL)], ids=" ".join)
def test_each_row_of_a_table_is_validated(kind, tmp_path, capsys):
    for i in range(2):
        drawing(i).save(tmp_path / f"{i}.png")
    text, part = dict(csv=CSV, jsonl=JSONL)[kind[0]][kind[1]]
    (tmp_path / f"metadata.{kind[0]}").write_text(text)
    code, _, complaint = check(capsys, tmp_path)
    assert code == 1 and part in complaint, complaint


def test_good_tables_are_read_whole(tmp_path):
    for i in range(4):
        drawing(i).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text(
        '\ufefffile_name, text\r\n0.png, "a red fox, sitting"\r\n\r\n1.png,"two\nlines"\r\n', encoding="utf-8"
    )
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps(dict(file_name="./2.png", text="x", year=3))
        + "\n\n"
        + '{"file_name": "3.png", "text": null}'
    )
    found = read_folder(tmp_path, 16)
    assert found.captions == ["a red fox, sitting", "two lines", "x"]
    assert found.problems.file.tolist()[0] == "3.png"  # no caption, as the table says


# ---------------------------------------------------------------------------------- mirror images


def training_of(folder, monkeypatch, **how):
    "Give what a training would have got: latents, mirrored latents, held-out latents."
    got = {}

    def train(base, latents, contexts, objective, config, val, **more):
        got.update(latents=latents, mirrored=more["mirrored"], val=val)
        raise InterruptedError

    monkeypatch.setattr(from_folder, "train", train)
    with pytest.raises(InterruptedError):
        from_folder.train_folder(load_base("tiny"), folder, folder.parent / "a.safetensors", **how)
    return got


def test_no_mirror_image_of_a_held_out_picture_is_trained_on(tmp_path, monkeypatch):
    folder, base = fill(tmp_path / "eight", [f"{i}.png" for i in range(8)]), load_base("tiny")
    got = training_of(folder, monkeypatch, flip=True, n_val=4)
    images = read_folder(folder, 16).images
    used, held = hold_out(8, 4)
    cache = from_folder.LatentCache(base)
    assert (len(got["latents"]), len(got["mirrored"]), len(got["val"][0])) == (4, 4, 4)
    assert got["latents"].equal(cache.latents(images[used])) and got["val"][0].equal(
        cache.latents(images[held])
    )
    assert got["mirrored"].equal(cache.latents(images[used][:, :, ::-1]))
    trained = {x.numpy().tobytes() for x in (*got["latents"], *got["mirrored"])}
    secret = {
        x.numpy().tobytes() for x in (*cache.latents(images[held]), *cache.latents(images[held][:, :, ::-1]))
    }
    assert not trained & secret
    assert to_uint8(decode(base, got["mirrored"])).shape == (4, 16, 16, 3)


def test_captions_with_sides_are_not_mirrored(tmp_path, monkeypatch, capsys):
    folder = fill(tmp_path / "two", ["0.png", "1.png"])
    (folder / "1.txt").write_text("hand to the left")
    got = training_of(folder, monkeypatch, flip=True)
    same = [a.equal(b) for a, b in zip(got["latents"], got["mirrored"])]
    assert same == [False, True]
    assert (
        "note: the folder: 1 pictures are never mirrored, such as 'hand to the left'"
        in check(capsys, folder, "--flip")[1]
    )


def test_without_flip_a_training_is_what_it_was(tmp_path, monkeypatch):
    got = training_of(fill(tmp_path / "eight", [f"{i}.png" for i in range(8)]), monkeypatch, n_val=2)
    assert got["mirrored"] is None and len(got["latents"]) == 6


def test_check_knows_what_cannot_be_held_out(tmp_path, capsys):
    folder = fill(tmp_path / "two", ["0.png", "1.png"])
    assert "hold out fewer than all" in check(capsys, folder, "--val", 2)[2]


@pytest.mark.parametrize("template", ["{caption!r}", "{caption:>9}", "{0.x}", "{caption", "{title}"])
def test_templates_are_refused_in_one_line(template, tmp_path, capsys):
    complaint = check(capsys, fill(tmp_path / "two", ["0.png"]), "--template", template)[2]
    assert re.search(re.escape(f"template={template!r}"), complaint)
