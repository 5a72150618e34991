// What a page does beside its renderer: keyboard, folds, paper, and a search that works from a file.
(() => {
  const all = (css) => [...document.querySelectorAll(css)];

  // chapters of the sidebar open with the keyboard too, and the open page is in sight
  for (const e of all("#quarto-sidebar [data-bs-toggle=collapse]:not([href])")) {
    e.setAttribute("role", "button");
    e.tabIndex = 0;
    e.addEventListener("keydown", (k) => { if (k.key === "Enter" || k.key === " ") { k.preventDefault(); e.click(); } });
  }
  const here = document.querySelector("#quarto-sidebar .sidebar-link.active"), bar = document.getElementById("quarto-sidebar");
  if (here && bar) bar.scrollTop = here.getBoundingClientRect().top - bar.getBoundingClientRect().top - bar.clientHeight / 3;
  for (const e of all(".quarto-color-scheme-toggle")) e.setAttribute("aria-label", "Light or dark");

  // only what really scrolls is a stop of the tab key
  const stops = () => { for (const e of all("main [role=region]")) e.tabIndex = e.scrollWidth > e.clientWidth + 1 ? 0 : -1; };
  addEventListener("load", stops);
  addEventListener("resize", stops);
  for (const d of all("details")) d.addEventListener("toggle", stops);

  // a link into a fold opens it; on paper all folds are open, and the page is light
  const open = () => {
    const id = decodeURIComponent(location.hash.slice(1)), target = id && document.getElementById(id);
    for (let e = target; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true;
    if (target) target.scrollIntoView();
  };
  addEventListener("hashchange", open);
  if (location.hash) open();
  let closed = [], dark = false;
  addEventListener("beforeprint", () => {
    closed = all("main details.fold:not([open])");
    for (const d of closed) d.open = true;
    dark = document.documentElement.dataset.scheme === "alternate" && window.smalldocsToggleScheme;
    if (dark) window.smalldocsToggleScheme();
    for (const i of document.images) i.loading = "eager";
    for (const t of all("main .region table")) { // 7.5 pt on the 660 pixels of a sheet; wider ones are made smaller
      const wide = t.scrollWidth * 10 / parseFloat(getComputedStyle(t).fontSize);
      if (wide > 660) t.style.zoom = 660 / wide;
    }
  });
  addEventListener("afterprint", () => {
    for (const d of closed) d.open = false;
    for (const t of all("main .region table")) t.style.zoom = "";
    if (dark) window.smalldocsToggleScheme();
  });

  // a page that was opened as a file may not read the index of the search, but it may run it as a script
  if (location.protocol === "file:") {
    const read = window.fetch, me = document.currentScript.src;
    window.fetch = (what, ...more) => !/search\.json$/.test(String(what)) ? read(what, ...more) : new Promise((done, fail) => {
      const give = () => done({ ok: true, status: 200, json: async () => window.searchIndex });
      if (window.searchIndex) return give();
      const s = document.createElement("script");
      Object.assign(s, { src: new URL("../search.js", me), onload: give, onerror: fail });
      document.head.append(s);
    });
  }
})();
