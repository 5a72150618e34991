"""Data of real studies, on stand-ins: ArtBench-10 in every published layout, its download, and users' folders."""

import http.server
import io
import json
import re
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from stylelora.data.artbench import (
    COLUMNS,
    STYLES,
    choose,
    fetch,
    find_form,
    list_artbench,
    read_batch,
    read_index,
    unpack,
    write_artbench,
)
from stylelora.data.folder import hold_out, load_images
from stylelora.data.prepare import load_kohya, survey, write_captions

NAMES = dict(impressionism="claude-monet_water-lilies-{}.png", ukiyo_e="utagawa-kunisada-ii_scene-{}.png")


@pytest.fixture
def art(tmp_path):
    "Make the same twelve pictures in all layouts, with their table."
    lines, data = [",".join(COLUMNS)], dict(data_batch_1=b"", data_batch_2=b"", test_batch=b"")
    for k, label in enumerate(NAMES):
        for i in range(6):
            split, batch = ("test", "test_batch") if i == 5 else ("train", f"data_batch_{1 + k}")
            x = np.random.default_rng([k, i]).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            name = NAMES[label].format(1850 + i)
            for home in (f"artbench-10-imagefolder-split/{split}", "artbench-10-imagefolder"):
                (tmp_path / home / label).mkdir(parents=True, exist_ok=True)
                Image.fromarray(x).save(tmp_path / home / label / name)
            index = i if split == "train" else 0
            lines.append(
                f"{name},{name.split('_')[0]},u{i},{i % 2 == 0},40,30,{label},{split},"
                f"{5 * k + index if split == 'train' else k}"
            )
            data[batch] += bytes([list(STYLES).index(label)]) + x.transpose(2, 0, 1).tobytes()
    (tmp_path / "artbench-10-binary/artbench-10-batches-bin").mkdir(parents=True)
    for batch in data:
        (tmp_path / f"artbench-10-binary/artbench-10-batches-bin/{batch}.bin").write_bytes(data[batch])
    (tmp_path / "ArtBench-10.csv").write_text("\n".join(lines))
    return tmp_path


def test_all_layouts_give_the_same_pictures_and_captions(art):
    sets = {}
    for form in ("split", "plain", "binary"):
        table = list_artbench(art, ["Ukiyo-e", "Impressionism"], form=form)
        assert len(table) == 10 and set(table.split) == {"train"}
        sets[form] = load_images(
            write_artbench(choose(table, 3, seed=7), art / f"out-{form}", "{title} by {artist}, {year}"), 32
        )
    for s in sets.values():
        assert s.captions == sets["split"].captions and s.files == sets["split"].files
        assert (s.images == sets["split"].images).all()
    assert re.fullmatch(r"Water lilies by Claude Monet, 185\d", sets["split"].captions[0])
    assert re.fullmatch(r"Scene by Utagawa Kunisada II, 185\d", sets["split"].captions[-1])
    said = [json.loads(line) for line in (art / "out-binary/metadata.jsonl").read_text().splitlines()]
    assert {r["url"] for r in said} <= {f"u{i}" for i in range(5)}
    assert all(r["public_domain"] == (int(r["url"][1]) % 2 == 0) for r in said)


def test_splits_public_domain_and_choice(art):
    assert list_artbench(art, "Ukiyo-e", "test").name.tolist() == [NAMES["ukiyo_e"].format(1855)]
    assert len(list_artbench(art, "Ukiyo-e", "all", "binary")) == 6
    table = list_artbench(art, "Ukiyo-e")
    assert table[table.public_domain].name.tolist() == [NAMES["ukiyo_e"].format(1850 + i) for i in (0, 2, 4)]
    assert {choose(table, 2, seed).name[0] for seed in range(20)} > {
        NAMES["ukiyo_e"].format(1850)
    }  # seeds differ
    assert (
        choose(table[table.name != choose(table, 3).name[1]], 2).name.tolist()
        == choose(table, 3).name[[0, 2]].tolist()
    )


def test_without_the_table(art):
    (art / "ArtBench-10.csv").unlink()
    assert list_artbench(art, "Ukiyo-e").artist.unique().tolist() == ["Utagawa Kunisada II"]
    with pytest.raises(FileNotFoundError, match="knows the split"):
        list_artbench(art, "Ukiyo-e", form="plain")
    assert len(list_artbench(art, "Ukiyo-e", "all", form="plain")) == 6
    written = load_images(write_artbench(list_artbench(art, "Ukiyo-e", form="binary"), art / "out"), 32)
    assert set(written.captions) == {"Untitled, a painting in the style of Ukiyo-e"}


def test_faults_are_named(art):
    first = art / "artbench-10-imagefolder-split/train/ukiyo_e" / NAMES["ukiyo_e"].format(1850)
    with pytest.raises(ValueError, match="did you mean 'Ukiyo-e'"):
        list_artbench(art, "ukioe")
    first.rename(art / "kept")
    with pytest.warns(
        UserWarning, match="1 pictures of the table are not there, such as utagawa-kunisada-ii_scene-1850.png"
    ):
        list_artbench(art, "Ukiyo-e")
    first.write_bytes(b"broken")
    with pytest.raises(ValueError, match="scene-1850.png cannot be opened"):
        write_artbench(list_artbench(art, "Ukiyo-e"), art / "o")
    with pytest.raises(FileExistsError, match="not empty"):
        write_artbench(list_artbench(art, "Ukiyo-e"), art)
    batch = art / "artbench-10-binary/artbench-10-batches-bin/data_batch_1.bin"
    raw = batch.read_bytes()
    batch.write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="4 records of 3073 bytes and 3072 bytes"):
        list_artbench(art, "Ukiyo-e", form="binary")
    batch.write_bytes(bytes([1]) + raw[1:])
    with pytest.raises(ValueError, match="differ in 1 styles"):
        list_artbench(art, "Ukiyo-e", form="binary")
    batch.write_bytes(bytes([10]) + raw[1:])
    with pytest.raises(ValueError, match="no batch"):
        read_batch(batch)
    table = art / "ArtBench-10.csv"
    table.write_text(table.read_text().replace("train,3", "train,three", 1))
    with pytest.raises(ValueError, match=r"line 5: cifar_index='three'"):
        read_index(table)
    (art / "p/artbench-10-batches-py").mkdir(parents=True)
    (art / "p/artbench-10-batches-py/data_batch_1").touch()
    with pytest.raises(FileNotFoundError, match="the pickle: it is not read"):
        find_form(art / "p")


@pytest.fixture
def server(monkeypatch):
    "Serve bytes, cutting each answer short; remember what was asked."
    monkeypatch.setenv("no_proxy", "*")
    state = SimpleNamespace(raw=bytes(range(256)) * 40, most=4000, ranges=True, asked=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            state.asked.append(asked)
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and state.ranges else 0
            self.send_response(416 if start >= len(state.raw) else 206 if start else 200)
            self.send_header("Content-Range", f"bytes */{len(state.raw)}")
            self.send_header("Content-Length", str(len(state.raw) - start))
            self.end_headers()
            self.wfile.write(state.raw[start : start + state.most])

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{httpd.server_port}/file"
    yield state
    httpd.shutdown()
    httpd.server_close()


def test_a_download_continues_where_it_was_cut(server, tmp_path):
    assert fetch("plain", tmp_path, server.url).read_bytes() == server.raw
    assert server.asked == [None, "bytes=4000-", "bytes=8000-"]
    part = tmp_path / "artbench-10-binary.tar.gz.part"
    part.write_bytes(server.raw)  # complete, but not yet renamed
    assert fetch("binary", tmp_path, server.url).read_bytes() == server.raw
    server.ranges = False
    part.write_bytes(server.raw[:5000])
    (tmp_path / "artbench-10-binary.tar.gz").unlink()
    with pytest.raises(ConnectionError, match="cut off after 4000 of 10240"):
        fetch("binary", tmp_path, server.url)
    server.most = 10**6  # it starts again from the first byte
    assert fetch("binary", tmp_path, server.url).read_bytes() == server.raw


def test_an_archive_is_unpacked_without_twins_and_tricks(art, tmp_path):
    box = tmp_path / "box"
    box.mkdir()
    file = box / "a.tar"
    with tarfile.open(file, "w") as tar:
        tar.add(art / "artbench-10-imagefolder-split", "artbench-10-imagefolder-split")
        tar.addfile(tarfile.TarInfo("artbench-10-imagefolder-split/train/ukiyo_e/._x.png"), io.BytesIO())
    assert sorted(f.name for f in unpack(file, ["Ukiyo-e"]).rglob("*.png")) == [
        NAMES["ukiyo_e"].format(1850 + i) for i in range(6)
    ]
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="damaged or cut short"):
        unpack(file)
    with tarfile.open(file, "w") as tar:
        tar.addfile(tarfile.TarInfo("../outside"), io.BytesIO())
    with pytest.raises(ValueError, match="outside"):
        unpack(file)
    assert not (tmp_path / "outside").exists()


def test_users_folders(art, tmp_path):
    source = art / "artbench-10-imagefolder/ukiyo_e"
    (source / "metadata.csv").write_text(
        "file_name,text\n"
        + "\n".join(f'{f.name},"a scene, {f.name[-8:-4]}"' for f in sorted(source.glob("*.png")))
    )
    assert load_images(source, 32).captions[0] == "a scene, 1850"
    kohya = tmp_path / "kohya"
    kohya.mkdir()
    source.rename(kohya / "3_woodblock print")
    (art / "artbench-10-imagefolder/impressionism").rename(kohya / "6_oil")
    write_captions({kohya / "6_oil" / NAMES["impressionism"].format(1850): "lilies on a pond"})
    pictures, repeats = load_kohya(kohya, 32)
    assert pictures.captions[0] == "a scene, 1850" and pictures.captions[6:8] == ["lilies on a pond", "oil"]
    used, held = hold_out(len(repeats), 3)
    again = np.repeat(used, repeats[used])
    assert set(again).isdisjoint(held) and repeats.tolist() == [1] * 6 + [2] * 6
    assert (
        survey(kohya, 32).problems.tolist() == [""] * 6 + [""] + ["no caption"] * 5
    )  # the words of a folder are no caption yet
