"""The site is built into a temporary folder, and every page of it is opened in a real browser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from PIL import Image

from stylelora.core import root
from stylelora.report.finish import CARD, CARD_SIZE
from stylelora.report.site import RAW, build_site, check_site, read_config, stage
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

# texts whose contrast with what is under them is below 4.5 (WCAG 2.2, 1.4.3; drawn widgets that are out of use are exempt)
PALE = """(async () => {
  const still = document.createElement("style");
  still.textContent = "* { transition: none !important; }";
  document.head.append(still);
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
  await new Promise((done) => setTimeout(done, 150));
  const parse = (c) => { const n = (c.match(/-?[\\d.]+(e-?\\d+)?/g) || []).map(Number), k = c.startsWith("color(") ? 255 : 1;
    return [n[0] * k, n[1] * k, n[2] * k, n.length > 3 ? n[3] : 1]; };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const light = (c) => { const [r, g, b] = c.map((v) => v <= 10.02 ? v / 3294.6 : ((v / 255 + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const page = parse(getComputedStyle(document.body).backgroundColor).slice(0, 3), bad = new Map(), done = new Set();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), known = new Map();
  const ground = (e) => {  // colour under the text of an element, and how faded it is
    if (!e || e === document.documentElement) return [page, 1];
    if (!known.has(e)) { const [under, fade] = ground(e.parentElement), s = getComputedStyle(e);
      known.set(e, [over(parse(s.backgroundColor), under), fade * s.opacity]); }
    return known.get(e);
  };
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || done.has(e) || e.closest("svg, script, style, .skip-link, [style*=opacity]")) continue;
    done.add(e);
    if (!e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const [under, fade] = ground(e), c = parse(getComputedStyle(e).color);
    const a = light(over([...c.slice(0, 3), c[3] * fade], under)), b = light(under);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.set(e.tagName + "." + e.className, [ratio.toFixed(2), e.textContent.trim().slice(0, 30)]);
  }
  return [getComputedStyle(document.body).backgroundColor, [...bad].slice(0, 5)];
})()"""
# what a finger or the tab key meets on a phone: the page's own width, and boxes that scroll without a name or a stop
PHONE = """(async () => {
  window.dispatchEvent(new Event("resize"));
  await new Promise((done) => setTimeout(done, 100));
  const scrolls = [...document.querySelectorAll("main *")].filter((e) =>
    e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && /auto|scroll/.test(getComputedStyle(e).overflowX));
  return { wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    scrolls: scrolls.length, unnamed: scrolls.filter((e) => e.getAttribute("role") !== "region" || e.tabIndex !== 0 ||
      !e.getAttribute("aria-label")).map((e) => e.outerHTML.slice(0, 80)) };
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
            for scheme in ("light", "dark"):
                chosen = [dict(name="prefers-color-scheme", value=scheme)]
                browser.call("Emulation.setEmulatedMedia", features=chosen)
                got[scheme] = browser.run(PALE)
            browser.call("Emulation.setEmulatedMedia", features=[])
            phone = dict(width=390, height=844, deviceScaleFactor=1, mobile=False)
            browser.call("Emulation.setDeviceMetricsOverride", **phone)
            got["phone"] = browser.run(PHONE)
            browser.call("Emulation.clearDeviceMetricsOverride")
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


def html_of(site):  # page -> its HTML
    return {
        p.relative_to(site).as_posix(): p.read_text(encoding="utf-8")
        for p in sorted(site.rglob("*.html"))
        if "site_libs" not in p.parts
    }


def test_only_the_chapter_of_a_page_is_open_and_the_page_is_marked(site):
    texts = html_of(site)
    for page, text in texts.items():
        here = re.findall(r'<a[^>]*class="sidebar-item-text sidebar-link active"', text)
        opened = re.findall(r'class="collapse list-unstyled sidebar-section depth1 show"', text)
        in_chapter = page not in ("index.html", "nbs/00_start_here.html", "404.html")
        assert (len(here), len(opened)) == (page != "404.html", in_chapter), page
    assert len(texts) > 100


def test_every_page_can_be_skipped_cited_and_traced(site):
    sources = {str(Path(p).with_suffix("")): p for p in read_config(root())["project"]["render"]}
    for page, text in html_of(site).items():
        assert re.search(r'<body[^>]*>\s*<a class="skip-link" href="#quarto-document-content">', text), page
        assert re.search(r'<main[^>]*id="quarto-document-content"', text), page
        source = sources[page.removesuffix(".html")]
        link = re.search(rf'<a href="([^"]*)">{re.escape(source)}</a>', text)[1]
        assert (site / page).parent.joinpath(link).read_bytes() == (root() / source).read_bytes(), page
        assert "@software{stylelora" in text, page
        picture = re.search(r'<meta property="og:image" content="([^"]*)"', text)[1]
        assert (site / page).parent.joinpath(picture).resolve() == (site / CARD).resolve(), page
    assert Image.open(site / CARD).size == CARD_SIZE


def test_figures_are_numbered_and_say_what_is_seen(site):
    for page, text in html_of(site).items():
        caps = re.findall(r"<figcaption[^>]*>(.*?)</figcaption>", text, re.S)
        numbers = [int(re.match(r"\s*<b>Figure (\d+)\.</b> ", c)[1]) for c in caps]
        assert numbers == list(range(1, len(caps) + 1)), page
        assert not [c for c in caps if re.search(r"</b> Figure [\w-]+$", c)], (
            page
        )  # a file name is no caption


def test_what_scrolls_is_a_named_region(site):
    count = 0
    for page, text in html_of(site).items():
        main = re.search(r"<main.*</main>", text, re.S)[0]
        bare = re.findall(r'(?<!tabindex="0">)<table', main)
        pre = [
            t
            for t in re.findall(r"<pre[^>]*>", main)
            if not re.search("sourceCode|code-overflow-wrap|region", t)
        ]
        assert (bare, pre) == ([], []), page
        count += main.count('role="region"')
    assert count > 500


def test_words_of_the_glossary_are_linked_once_a_page(site):
    for page, text in html_of(site).items():
        links = re.findall(r'href="[^"]*00_start_here\.html#([\w-]+)"[^>]*class="term"', text)
        assert len(links) == len(set(links)), page
        if page == "reports/E1.html":
            assert {"l1", "l2", "l7", "skill", "style-margin", "style-score", "content-at-1"} <= set(links)
    assert 'class="term"' not in (site / "nbs" / "00_start_here.html").read_text(encoding="utf-8")


def test_the_first_table_of_e1_has_the_verdict_second_and_the_rest_is_folded(site):
    text = (site / "reports" / "E1.html").read_text(encoding="utf-8")
    first = re.search(r"<table.*?</table>", text, re.S)[0]
    assert re.findall(r"<th[^>]*>(.*?)</th>", first)[:2] == ["Recipe", "Verdict"]
    open_part = re.sub(r"<details class=\"fold\">.*?</details>", "", text, flags=re.S)
    assert text.count("<table") > 8 and open_part.count("<table") <= 2 and open_part.count("<figure") <= 2


def test_the_index_of_the_search_can_be_run_as_a_script(site):
    script = (site / "search.js").read_text(encoding="utf-8").removeprefix("window.searchIndex=")
    assert json.loads(script) == json.loads((site / "search.json").read_text(encoding="utf-8")) != []


def test_the_search_works_from_a_file(site):
    if not chromium.find():
        pytest.skip("no Chromium here (make test installs Debian's where it may): the search is not tried")
    browser = chromium.Browser()
    ask = """(async () => {
      const box = document.querySelector("#quarto-search input");
      box.value = "guidance"; box.dispatchEvent(new Event("input"));
      for (let i = 0; i < 100 && !document.querySelector("a.search-result"); i++) await new Promise((d) => setTimeout(d, 100));
      return [...document.querySelectorAll("a.search-result")].map((a) => a.href);
    })()"""
    try:
        browser.visit((site / "reports" / "E2.html").as_uri())
        found = browser.run(ask)
    finally:
        browser.close()
    assert found and all(Path(unquote(urldefrag(f)[0]).removeprefix("file://")).is_file() for f in found)


def test_a_wrong_address_finds_its_way_home(site):
    text = (site / "404.html").read_text(encoding="utf-8")
    assert "<base href" in text.split("<link")[0]  # before anything that is relative to it
    rule = re.search(r"pathname\.replace\(/(.*?)/,''\)", text)[1].replace(r"\/", "/")
    for address in ("/a/b/reports/runs/no.html", "/a/b/nbs/x/y.html", "/a/b/no.html"):
        assert re.sub(rule, "", address, count=1) == "/a/b/"


def test_quarto_in_the_repository_says_what_to_run():
    hint = read_config.__globals__["load_yaml"](root() / "_quarto.yml")["project"]["pre-render"]
    done = subprocess.run([sys.executable, hint], cwd=root(), capture_output=True, text=True)
    assert done.returncode and "make report" in done.stderr
    assert "pre-render" not in read_config(root())["project"]


def test_pandoc_reads_every_staged_page_as_the_renderer_does(site, tmp_path):
    if not shutil.which("pandoc"):
        pytest.skip(
            "no pandoc here (make test installs Debian's where it may): staged pages are not checked by it"
        )
    counts = {}
    for page in stage(root(), tmp_path):
        text = (tmp_path / page).read_text(encoding="utf-8")
        if notebook := page.endswith(".ipynb"):
            prose = [c["source"] for c in json.loads(text)["cells"] if c["cell_type"] == "markdown"]
            text = "\n\n".join(prose)
        command = ["pandoc", "-f", "markdown", "-t", "html", "--fail-if-warnings", "--mathml"]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        assert done.returncode == 0, (page, done.stderr[-500:])
        if not notebook:
            built = (site / page).with_suffix(".html").read_text(encoding="utf-8")
            main = re.search(r"</header>(.*?)<section class=\"page-end", built[built.index("<main") :], re.S)[
                1
            ]
            main = re.sub(r"<nav.*?</nav>", "", main, flags=re.S)
            tags = ("<h2", "<h3", "<table", "<tr", "<img", "<li", "<pre", "<details", "<math", "<blockquote")
            ours, theirs = ({t: len(re.findall(rf"{t}\b", x)) for t in tags} for x in (main, done.stdout))
            counts[page] = {t: (ours[t], theirs[t]) for t in tags if ours[t] != theirs[t]}
    assert len(counts) > 15 and not any(counts.values()), {p: c for p, c in counts.items() if c}


def test_links_and_marks_without_a_browser(site):
    assert check_site(site) == []


def test_all_images_load(seen):
    assert sum(len(v["images"]) for v in seen.values()) > 10
    assert [(p, src) for p, v in seen.items() for src, width, _ in v["images"] if not width] == []


def test_every_image_has_a_text(seen):
    assert [(p, src[:80]) for p, v in seen.items() for src, _, alt in v["images"] if not alt.strip()] == []


def test_no_broken_internal_link(site, seen):
    broken = []
    for page, v in seen.items():
        for link in v["links"]:
            if not link.startswith(v["address"]):
                continue
            path, anchor = urldefrag(link[len(v["address"]) :])
            path = unquote(path) or "index.html"
            if path not in seen and not (path.startswith("source/") and (site / path).is_file()):
                broken.append((page, link))
            elif path not in seen:
                continue
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


def test_every_text_stands_out_from_its_ground_by_day_and_by_night(seen):
    for scheme in ("light", "dark"):
        assert {p: v[scheme][1] for p, v in seen.items() if v[scheme][1]} == {}, scheme
    grounds = {tuple(v[scheme][0] for scheme in ("light", "dark")) for v in seen.values()}
    assert grounds == {("rgb(255, 255, 255)", "rgb(34, 34, 34)")}  # and the two are two


def test_a_phone_scrolls_tables_and_not_pages(seen):
    assert {p: v["phone"]["wide"] for p, v in seen.items() if v["phone"]["wide"] > 0} == {}
    assert {p: v["phone"]["unnamed"] for p, v in seen.items() if v["phone"]["unnamed"]} == {}
    assert sum(v["phone"]["scrolls"] for v in seen.values()) > 100
