// What the pages do by themselves: theme, the sheet of a picture, choosing a point on the plane, the wipe, keys.
// The server's pages and a bundle on disk load the same file; nothing here is needed to read a page.
"use strict";
(() => {
  const root = document.documentElement;
  const kept = (value) => {
    try {
      if (value === undefined) return localStorage.getItem("theme");
      localStorage.setItem("theme", value);
    } catch { /* a page from disk may keep nothing */ }
    return null;
  };
  const theme = kept();
  if (theme) root.dataset.theme = theme;

  const at = (selector, within = document) => within.querySelector(selector);

  function toggleTheme() {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    kept((root.dataset.theme = dark ? "light" : "dark"));
  }

  // A click on the plane sets the form's numbers, and the numbers move the cross.
  function pick(svg, event) {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const form = svg.closest("form");
    for (const [name, value] of [["valence", point.x], ["arousal", -point.y]]) {
      form.elements[name].value = Math.max(-3, Math.min(3, Math.round(value * 10) / 10));
    }
    aim(form);
  }
  function aim(form) {
    const mark = at("[data-aim]", form);
    const [x, y] = ["valence", "arousal"].map((name) => Number(form.elements[name]?.value || 0));
    mark?.setAttribute("d", `M${x - 0.16} ${-y}h.32M${x} ${-y - 0.16}v.32`);
  }

  function pair() {
    const chosen = document.querySelectorAll("#pair input:checked").length;
    const button = at("#compare");
    if (button) button.disabled = chosen !== 2;
  }

  function follow(rel) {
    const link = at(`[data-shot] a[rel=${rel}]`) ?? at(`nav.pages a[rel=${rel}]`);
    link?.click();
  }
  function step(by) {
    const links = [...document.querySelectorAll("#run a.shot, table.runs .what a")];
    const next = links[links.indexOf(document.activeElement) + by] ?? links[by > 0 ? 0 : links.length - 1];
    next?.focus();
  }
  const keys = {
    j: () => step(1),
    k: () => step(-1),
    "/": () => at("[type=search]")?.focus(),
    n: () => { const panel = at("#new"); if (panel) { panel.open = true; at("[name=prompt]", panel).focus(); } },
    f: () => at("[data-shot] [name=favourite]")?.click(),
    ArrowLeft: () => follow("prev"),
    ArrowRight: () => follow("next"),
    ...Object.fromEntries([1, 2, 3, 4, 5].map((n) => [n, () => {
      const radio = at(`[data-shot] [name=rating][value="${n}"]`);
      if (radio) { radio.checked = true; radio.form.requestSubmit(); }
    }])),
  };

  document.addEventListener("DOMContentLoaded", () => {
    at("#theme")?.addEventListener("click", toggleTheme);
    document.querySelectorAll("[data-pick]").forEach((svg) => aim(svg.closest("form")));
    const sheet = at("#sheet");
    sheet?.addEventListener("click", (event) => {
      if (event.target === sheet || event.target.closest("[data-close]")) sheet.close();
    });
    pair();
  });
  document.addEventListener("click", (event) => {
    const svg = event.target.closest?.("[data-pick]");
    if (svg) pick(svg, event);
  });
  document.addEventListener("input", (event) => {
    const field = event.target;
    if (field.matches("[data-wipe]")) field.parentElement.style.setProperty("--seen", `${field.value}%`);
    if (field.name === "valence" || field.name === "arousal") aim(field.form);
    if (field.name === "run") pair();
    const shown = field.form && at(`output[for="${field.id}"]`, field.form);
    if (shown) shown.textContent = field.value;
  });
  document.addEventListener("htmx:after:swap", () => {
    // Any part of the page may have been swapped: a live run changes while a picture's sheet is on its way.
    const sheet = at("#sheet"), body = at("#sheet-body");
    if (body?.dataset.wanted && at("[data-shot]", body)) {
      delete body.dataset.wanted;
      if (!sheet.open) sheet.showModal();
    }
    pair();
  });
  document.addEventListener("htmx:before:request", (event) => {
    if (!event.target.closest?.("a.shot")) return;
    const body = at("#sheet-body");
    body.replaceChildren();
    body.dataset.wanted = "1";
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches?.("input:not([type=radio]):not([type=checkbox]), textarea, select");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
})();
