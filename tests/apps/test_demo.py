"""The demo: its notebook without a browser, and in JupyterLab with a real mouse in a headless Chromium."""

import base64
import io
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stylelora.adapters.files import save_lora
from stylelora.adapters.lora import inject, lora_layers, remove
from stylelora.apps.demo import DemoSettings, draw, fit_image
from stylelora.apps.panel import HELP
from stylelora.core import generator
from stylelora.models.base import tiny_base
from stylelora.models.defaults import SMALL
from stylelora.models.load import load_base
from stylelora.sample.samplers import SAMPLERS
from tests.fixtures import chromium

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "nbs" / "demo" / "demo.ipynb"
SHOTS = os.environ.get("DEMO_SHOTS")  # a folder for screenshots, or nothing
WAIT = 120  # seconds for anything in the browser; on two free cores everything takes a few


def make_adapter(base, folder, style, std):
    "Write an adapter of random numbers: no style, but another picture."
    inject(base.unet, "attention", rank=2)
    for m in lora_layers(base.unet).values():
        torch.nn.init.normal_(m.lora_B, std=std, generator=generator(style))
    file = save_lora(
        base.unet, folder / f"{style}.safetensors", dict(style=style, label="random", base_hash=base.hash)
    )
    remove(base.unet)
    return file


def notebook(**values):
    "Read the demo notebook with other parameters in it."
    nb = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    (cell,) = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    cell["source"] = "\n".join(f"{k} = {v!r}" for k, v in values.items())
    return nb


def code(nb):
    return ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]


# ---------------------------------------------------------------------------------- without a browser


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    "Run the cells of the notebook on the tiny base, and return the panel."
    pytest.importorskip("ipywidgets")
    folder, base, names = tmp_path_factory.mktemp("adapters"), tiny_base(), {}
    for style in ("ink", "openmoji"):
        make_adapter(base, folder, style, 1.0)
    for cell in code(notebook(base="tiny", folder=str(folder))):
        exec(cell, names)
    return names["panel"]


def press(panel, **values):
    "Set controls, press Draw, wait for the end, and return what the panel says."
    for k, v in values.items():
        panel.controls[k].value = v
    panel.controls["draw"].click()
    panel.thread.join(WAIT)
    assert not panel.busy
    return panel.status.value


def test_the_parameters_are_those_that_the_notebook_uses():
    (cell,) = [
        c
        for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        if "parameters" in c["metadata"].get("tags", [])
    ]
    names = {}
    exec("".join(cell["source"]), names)
    assert (names["base"], names["folder"]) == ("embedded", "")


def test_the_text_names_only_controls_that_exist():
    text = "\n".join(
        "".join(c["source"])
        for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "markdown"
    )
    named = set(re.findall(r"\*\*(.+?)\*\*", text))
    labels = {label for label, _ in HELP.values()}
    assert named <= labels, named - labels
    assert labels - named <= {"Preview", "Without it"}, "the text leaves out a control"


def test_draw_draws_what_the_controls_say(panel):
    assert 'role="status"' in press(panel, num_inference_steps=4, thing="clown face")
    how = SMALL.sample | dict(num_inference_steps=4)
    want = DemoSettings("noto emoji of clown face", blend=0.5, **how)
    assert panel.drawn[0].settings == want
    assert (
        panel.drawn[0].image == draw(tiny_base(), want).image
    ).all()  # a base of its own gives the same bytes
    first = panel.drawn[0].image
    press(panel)
    assert (panel.drawn[0].image == first).all() and len(panel.drawn) == 2


def test_every_control_changes_the_picture(panel):
    files = list(panel.found)
    press(panel, num_inference_steps=4, sampler="euler_ancestral", first=files[0], second=files[1])
    seen = [panel.drawn[0].image.tobytes()]
    for k, v in dict(
        lora_scale=0.5,
        blend=0.9,
        guidance_scale=2.0,
        num_inference_steps=5,
        sampler="ddim",
        seed=5,
        negative_prompt="red",
        thing="taxi",
        first="",
    ).items():
        assert 'role="status"' in press(panel, **{k: v}), (k, panel.status.value)
        assert panel.drawn[0].image.tobytes() not in seen, k
        seen.append(panel.drawn[0].image.tobytes())
    press(panel, negative_prompt="", second="")


def test_a_mistake_is_a_sentence(panel):
    said = press(panel, negative_prompt="red", guidance_scale=1.0)
    assert 'role="alert"' in said and "has no effect" in said and "Traceback" not in said
    assert 'role="status"' in press(panel, negative_prompt="", guidance_scale=4.0)
    file = Path(next(iter(panel.found)))
    raw = file.read_bytes()
    file.write_bytes(raw[:500])
    try:
        said = press(panel, first=str(file))
    finally:
        file.write_bytes(raw)
    assert 'role="alert"' in said and "damaged" in said and not lora_layers(panel.base.unet)
    assert 'role="status"' in press(panel)
    press(panel, first="")


def test_a_text_cannot_become_part_of_the_page(panel):
    press(panel, prompt='<script>alert(1)</script>" onload="x')
    for shown in (panel.live, panel.gallery, panel.status):
        assert "<script>" not in shown.value and '" onload="x' not in shown.value
    assert "&lt;script&gt;" in panel.live.value


# ---------------------------------------------------------------------------------- in JupyterLab


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    "Give the embedded base and a folder with the notebook and two adapters of it."
    work = tmp_path_factory.mktemp("work")
    base = load_base("embedded", "cpu")
    for style in ("ink", "openmoji"):
        make_adapter(base, work / "adapters", style, 0.05)
    (work / "demo.ipynb").write_text(json.dumps(notebook(base="embedded", folder="adapters")))
    Image.linear_gradient("L").resize((300, 200)).convert("RGB").save(work / "photo.jpg")
    return base, work


@pytest.fixture(scope="module")
def lab(adapted, tmp_path_factory):
    "Serve the folder with JupyterLab, apart from the user's own settings, and return the address of the notebook."
    if not chromium.find():
        pytest.skip("no Chromium here (make test installs Debian's where it may): the panel is not driven")
    pytest.importorskip("jupyterlab")
    home, token = tmp_path_factory.mktemp("home"), secrets.token_hex(16)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = dict(
        HOME=home,
        IPYTHONDIR=home / "ipython",
        JUPYTER_CONFIG_DIR=home / "config",
        JUPYTER_DATA_DIR=home / "data",
        JUPYTER_RUNTIME_DIR=home / "runtime",
        JUPYTERLAB_SETTINGS_DIR=home / "settings",
        JUPYTERLAB_WORKSPACES_DIR=home / "spaces",
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON"))} | {
        k: str(v) for k, v in own.items()
    }
    env |= dict(
        JUPYTER_PREFER_ENV_PATH="1", PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
    )
    quiet = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True), quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={adapted[1]}",
        "--expose-app-in-browser",
        "--LabApp.extension_manager=readonly",
    ]
    with open(home / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=adapted[1],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until, address = time.time() + WAIT, f"http://127.0.0.1:{port}"
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None and time.time() < until, (home / "log").read_text()[-3000:]
                time.sleep(0.2)
        yield f"{address}/lab/tree/demo.ipynb?token={token}&reset"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(20)


LOOK = """(() => {
  const all = s => [...document.querySelectorAll('.jp-OutputArea-output ' + s)], images = all('.jupyter-widgets img');
  const live = images.find(i => i.width > 200 && !i.alt.startsWith('The true')), truth = images.find(i => i.alt.startsWith('The true'));
  const text = s => all(s).map(e => e.textContent).join(' ');
  return {busy: all('button').find(b => b.textContent.trim() == 'Draw')?.disabled ?? null, live: live?.src ?? null, caption: live?.alt || '',
    truth: truth?.src ?? null, said: text('[role=status]'), alert: text('[role=alert]'), code: all('textarea')[0]?.value || '',
    gallery: images.filter(i => i.width == 120).length, given: images.filter(i => i.alt == 'photo.jpg').length,
    prompt: all('input[type=text]').map(i => i.value), wide: all('.jupyter-widgets').some(e => e.scrollWidth > e.clientWidth + 40),
    wrong: document.querySelectorAll('.jp-OutputArea-output [data-mime-type*=error], .jp-OutputArea-output [data-mime-type*=stderr]').length
      + all('').filter(e => /Traceback|Error displaying widget|Loading widget/.test(e.textContent)).length};
})()"""

FIND = """(function(kind, label) {
  const all = s => [...document.querySelectorAll('.jp-OutputArea-output ' + s)];
  if (kind == 'button') return all('button').find(b => b.textContent.trim().startsWith(label));
  return all('.jupyter-widgets').find(e => e.querySelector(':scope > .widget-label')?.textContent.trim() == label).querySelector(kind);
})"""


class Page:
    "The panel as a person sees it: look, click, choose, wait."

    def __init__(self, browser):
        self.browser = browser

    def look(self):
        return self.browser.run(LOOK)

    def shot(self, name):
        "Keep a picture of the page for who wants to look at it."
        if SHOTS:
            self.browser.screenshot(Path(SHOTS) / f"{name}.png")

    def wait(self, check, what, seconds=WAIT):
        "Look until the check holds, and return what is seen then."
        until = time.time() + seconds
        while not check(seen := self.look()):
            assert time.time() < until, (
                f"{what} did not happen; the page shows {dict(seen, live=None, truth=None)}"
            )
            time.sleep(0.1)
        return seen

    def click(self, kind, label, at=0.5):
        "Click on a part of the control with this label, at a share of its width."
        where = f"{FIND}({json.dumps(kind)}, {json.dumps(label)})"
        x, y = self.browser.run(
            f"(() => {{ const e = {where}; e.scrollIntoView({{block: 'center'}}); "
            f"const r = e.getBoundingClientRect(); return [r.x + {at}*r.width, r.y + r.height/2] }})()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.browser.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=y,
                button="none" if kind == "mouseMoved" else "left",
                clickCount=1,
            )

    def choose(self, label, index):
        "Choose an entry of a list."
        self.browser.run(
            f"(() => {{ const e = {FIND}('select', {json.dumps(label)}); e.selectedIndex = {index}; "
            "e.dispatchEvent(new Event('change', {bubbles: true})) })()"
        )

    def draw(self):
        "Press Draw and wait for a finished picture."
        before = self.look()
        self.click("button", "Draw")
        return self.wait(
            lambda s: (
                s["busy"] is False
                and s["said"]
                and s["gallery"]
                and (s["gallery"] > before["gallery"] or s["said"] != before["said"])
                and not s["caption"].startswith("Preview")
            ),
            "a finished picture",
        )


def pixels(src, size):
    "Decode a picture of the page."
    image = Image.open(io.BytesIO(base64.b64decode(src.split("base64,")[1])))
    assert image.size == (size, size)
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def page(lab):
    "Open the notebook in JupyterLab and run all its cells."
    browser = chromium.Browser(1400, 1500)
    try:
        browser.visit(lab, WAIT)
        until = time.time() + WAIT
        while not browser.run("!!window.jupyterapp?.shell?.currentWidget?.context?.isReady"):
            assert time.time() < until, "JupyterLab has not opened the notebook"
            time.sleep(0.1)
        browser.run("window.jupyterapp.shell.currentWidget.sessionContext.ready.then(() => 1)")
        browser.run("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page = Page(browser)
        page.wait(lambda s: s["busy"] is False and s["truth"], "the panel")
        browser.run(
            "(() => { document.querySelector('.jp-OutputArea-output .widget-hbox').scrollIntoView() })()"
        )
        yield page
        page.shot("end")
    finally:
        browser.close()


def test_the_panel_opens_in_jupyterlab(page):
    seen = page.look()
    assert not seen["wrong"] and not seen["alert"] and not seen["live"] and not seen["gallery"]
    assert "noto emoji of taxi" in seen["prompt"] and not seen["wide"]
    page.shot("opened")


def test_draw_shows_the_picture_that_the_library_draws(page, adapted):
    seen = page.draw()
    want = draw(adapted[0], DemoSettings("noto emoji of taxi", **SMALL.sample)).image
    assert (
        np.abs(pixels(seen["live"], adapted[0].size) - want).max() <= 2
    )  # another process, perhaps other threads
    assert (
        seen["gallery"] == 1
        and "network evaluations" in seen["said"]
        and "'noto emoji of taxi', 0, 'euler_ancestral', 50" in seen["code"]
    )
    page.shot("drawn")


def test_an_adapter_and_a_slider_change_the_picture(page, adapted):
    before = page.look()
    page.choose("Adapter", 1)
    page.wait(lambda s: "<s2> emoji of taxi" in s["prompt"], "the word of the style")
    styled = page.draw()
    assert (
        styled["live"] != before["live"]
        and "ink, random × 1" in styled["caption"]
        and styled["truth"] != before["truth"]
    )
    page.click(".noUi-base", "Scale", 0.9)
    moved = page.draw()
    assert moved["live"] != styled["live"] and re.search(r"ink, random × 1\.[789]", moved["caption"]), moved[
        "caption"
    ]
    page.choose("and", 2)
    page.click(".noUi-base", "Blend", 0.25)
    mixed = page.draw()
    assert mixed["live"] != moved["live"] and "openmoji, random" in mixed["caption"] and mixed["gallery"] == 4
    page.shot("blended")


def test_stop_stops_and_the_kernel_lives(page):
    page.click(".noUi-base", "Steps", 0.99)
    page.choose("Sampler", list(SAMPLERS).index("heun"))  # two evaluations a step: time to press
    page.click("button", "Draw")
    page.wait(lambda s: s["caption"].startswith("Preview"), "a preview")
    page.click("button", "Stop")
    seen = page.wait(lambda s: s["busy"] is False, "the end of the drawing")
    assert (
        seen["said"].startswith("Stopped at step")
        and seen["caption"].startswith("Preview")
        and seen["gallery"] == 4
    )
    page.click(".noUi-base", "Steps", 0.05)
    page.choose("Sampler", 0)
    assert page.draw()["gallery"] == 5


def test_a_picture_can_be_given(page, adapted):
    browser, file = page.browser, adapted[1] / "photo.jpg"
    browser.call("DOM.enable"), browser.call("Page.setInterceptFileChooserDialog", enabled=True)
    browser.events.clear()
    page.click("button", "Your picture")
    until, asked = time.time() + WAIT, []
    while not asked and time.time() < until:
        browser.run("1")
        asked = [e["params"] for e in browser.events if e.get("method") == "Page.fileChooserOpened"]
    browser.call("DOM.setFileInputFiles", files=[str(file)], backendNodeId=asked[0]["backendNodeId"])
    page.wait(lambda s: s["given"] == 1, "the small picture of the upload")
    seen = page.draw()
    assert "from photo.jpg, strength 0.6" in seen["caption"] and "fit_image('photo.jpg'" in seen["code"]
    assert fit_image(file, adapted[0].size)[0].min() == 255  # wider than high: white above


def test_a_mistake_in_the_browser_is_a_sentence(page):
    page.click("input", "Prompt")
    page.browser.run(f"(() => {{ const e = {FIND}('input', 'Prompt'); e.select() }})()")
    page.browser.call("Input.insertText", text="  ")
    page.click("button", "Draw")
    seen = page.wait(lambda s: s["alert"], "the complaint")
    assert "the prompt is empty; write what to draw" in seen["alert"] and not seen["wrong"]
    page.shot("mistake")
    page.choose("and", 0)
    page.browser.run(f"(() => {{ const e = {FIND}('input', 'Prompt'); e.select() }})()")
    page.browser.call("Input.insertText", text="noto emoji of clown face")
    seen = page.draw()
    assert not seen["alert"] and not seen["wrong"] and "clown face" in seen["caption"]
