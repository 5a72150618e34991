"""The site is built into a temporary folder, and every page of it is opened in a real browser."""

import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from stylelora.core import root
from stylelora.report.site import RAW, build_site, check_site, read_config
from tests.fixtures import chromium

LOOK = """(async () => {
  const images = [...document.images];
  for (const i of images) i.loading = 'eager';
  await Promise.all(images.map(i => i.complete ? 0 : new Promise(done => { i.onload = i.onerror = done })));
  const prose = document.querySelector('main').cloneNode(true);
  prose.querySelectorAll('pre, code, script, style').forEach(e => e.remove());
  return {
    title: document.title, heading: (document.querySelector('h1') || {}).innerText || '', words: prose.textContent,
    images: images.map(i => [i.src.slice(0, 200), i.naturalWidth, i.alt]),
    links: [...document.querySelectorAll('a[href]')].map(a => a.href).filter(h => !h.startsWith('javascript:')),
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    formulas: [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().width),
    errors: document.querySelectorAll('.cell-output-error, .cell-output-stderr').length,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
})()"""

RENDERERS = ["smalldocs", *(["quarto"] if shutil.which("quarto") else [])]


@pytest.fixture(scope="module", params=RENDERERS)
def site(request, tmp_path_factory):  # the folder of a freshly built site
    return build_site(tmp_path_factory.mktemp("site") / "_site", request.param)


@pytest.fixture(scope="module")
def seen(site):  # page -> what a browser sees there, with the requests that it made
    if not chromium.find():
        pytest.skip("no Chromium here (make test installs Debian's where it may): pages are not opened")
    server, address = chromium.serve(site)
    browser, out = chromium.Browser(), {}
    try:
        for page in sorted(
            p.relative_to(site).as_posix() for p in site.rglob("*.html") if "site_libs" not in p.parts
        ):
            events = browser.visit(address + page)
            got = browser.run(LOOK) | dict(address=address, failed=[], outside=[])
            for e in events + browser.events:
                kind, p = e.get("method"), e.get("params", {})
                if kind == "Network.responseReceived" and p["response"]["status"] >= 400:
                    got["failed"].append(p["response"]["url"])
                if kind == "Network.requestWillBeSent" and not p["request"]["url"].startswith(
                    (address, "data:", "blob:")
                ):
                    got["outside"].append(p["request"]["url"])
                if kind == "Runtime.exceptionThrown":
                    got["failed"].append(str(p["exceptionDetails"])[:300])
            out[page] = got
    finally:
        browser.close(), server.shutdown()
    return out


def test_every_page_is_built(site):
    want = {str(Path(p).with_suffix(".html")) for p in read_config(root())["project"]["render"]}
    have = {p.relative_to(site).as_posix() for p in site.rglob("*.html") if "site_libs" not in p.parts}
    assert want <= have
    assert "index.html" in have and any(p.startswith("nbs/") for p in have)


def test_every_library_notebook_is_in_the_sidebar(site):
    text = (site / "index.html").read_text()
    for nb in sorted((root() / "nbs").glob("[0-9]*/*.ipynb")):
        assert f"nbs/{nb.parent.name}/{nb.stem}.html" in text, nb.name


def test_the_recipe_of_an_executed_notebook_is_named_once(site):
    text = (site / "index.html").read_text()  # the sidebar has the titles of all pages
    recipes = {p.stem.partition("-")[2] for p in (root() / "reports" / "runs").glob("[!_]*/*-*.ipynb")}
    assert recipes and not [a for a in recipes if f"({a})" not in text]
    assert re.findall(r"\(([^()]+)\)\s*\(\1\)", text) == []


def test_links_and_marks_without_a_browser(site):
    assert check_site(site) == []


def test_all_images_load(seen):
    assert sum(len(v["images"]) for v in seen.values()) > 10
    assert [(p, src) for p, v in seen.items() for src, width, _ in v["images"] if not width] == []


def test_every_image_has_a_text(seen):
    assert [(p, src[:80]) for p, v in seen.items() for src, _, alt in v["images"] if not alt.strip()] == []


def test_no_broken_internal_link(seen):
    broken = []
    for page, v in seen.items():
        for link in v["links"]:
            if not link.startswith(v["address"]):
                continue
            path, anchor = urldefrag(link[len(v["address"]) :])
            path = unquote(path) or "index.html"
            if path not in seen:
                broken.append((page, link))
            elif anchor and unquote(anchor) not in seen[path]["ids"]:
                broken.append((page, link))
    assert broken == []


def test_no_mark_of_a_tool_is_left(seen):
    assert [(p, m) for p, v in seen.items() for m in (*RAW, "{{references") if m in v["words"]] == []
    assert [p for p, v in seen.items() if v["errors"]] == []


def test_pages_say_what_they_are(seen):
    headings = [v["heading"] for v in seen.values()]
    assert all(headings) and len(set(headings)) == len(headings)
    assert min(len(v["words"].split()) for v in seen.values()) > 30


def test_formulas_are_set_without_a_script(seen):
    widths = [w for v in seen.values() for w in v["formulas"]]
    assert len(widths) > 50 and min(widths) > 0


def test_nothing_fails_and_nothing_is_fetched_from_elsewhere(seen):
    assert [(p, v["failed"]) for p, v in seen.items() if v["failed"]] == []
    if all("cdn" not in u for v in seen.values() for u in v["outside"]):  # Quarto's pages may ask for MathJax
        assert [(p, v["outside"]) for p, v in seen.items() if v["outside"]] == []


def test_pages_are_not_wider_than_the_window(seen):
    assert [(p, v["wide"]) for p, v in seen.items() if v["wide"] > 2] == []
