"use strict";

// A symbol of the glossary that is pointed at, focused or tapped lights up wherever it stands, and a
// card says what it is. The card's words are the glossary's own row.
(() => {
  const card = document.getElementById("card");
  let lit = ""; // name of the symbol that is lit
  let at = null; // the element that the card stands beside
  let held = null; // the element that was clicked or focused: it stays lit until another is chosen

  const all = (name) => document.querySelectorAll(`[data-s="${name}"]`);
  const symbolAt = (target) => target.closest && target.closest("[data-s]");

  function place(element) {
    if (matchMedia("(max-width: 47.99rem)").matches) return card.removeAttribute("style"); // a sheet
    const box = element.getBoundingClientRect();
    const legend = element.closest(".equation, .legend"); // neither is covered
    const end = legend ? (legend.matches(".legend") ? legend : legend.nextElementSibling) : element;
    const bottom = end.getBoundingClientRect().bottom;
    const room = document.documentElement.clientWidth - card.offsetWidth - 12;
    const below = bottom + 12 + card.offsetHeight < innerHeight;
    card.style.left = `${Math.max(12, Math.min(box.left - 20, room))}px`;
    card.style.top = `${below ? bottom + 10 : box.top - card.offsetHeight - 10}px`;
  }

  function describe(name) {
    const row = document.querySelector(`tr:has(button[data-s="${name}"])`);
    const [code, what, shape, unit, section] = Array.from(row.cells).slice(1);
    const symbol = row.querySelector("button").cloneNode(true);
    const line = (term, cell) => {
      const [dt, dd] = ["dt", "dd"].map((tag) => document.createElement(tag));
      dt.textContent = term;
      dd.append(...Array.from(cell.childNodes, (node) => node.cloneNode(true)));
      return [dt, dd];
    };
    const title = document.createElement("p");
    const sign = document.createElement("span");
    sign.append(...symbol.childNodes);
    title.append(sign, " ", what.textContent);
    const list = document.createElement("dl");
    const rows = { shape, unit, code, section };
    list.append(...Object.entries(rows).flatMap(([term, cell]) => line(term, cell)));
    card.replaceChildren(title, list);
  }

  function light(element) {
    const name = element ? element.dataset.s : "";
    if (name !== lit) {
      for (const other of lit ? all(lit) : []) other.classList.remove("lit");
      lit = name;
      for (const other of lit ? all(lit) : []) other.classList.add("lit");
      if (lit) describe(lit);
    }
    at = element;
    card.hidden = !lit;
    if (lit) place(element);
  }

  document.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch") return;
    const symbol = symbolAt(event.target);
    if (symbol || !card.contains(event.target)) light(symbol || held);
  });
  document.addEventListener("click", (event) => {
    held = symbolAt(event.target);
    light(held);
  });
  document.addEventListener("focusin", (event) => {
    held = symbolAt(event.target);
    light(held);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    held = null;
    light(null);
  });
  addEventListener("scroll", () => at && place(at), { passive: true });

  // In text and code the first of each symbol in a row can be reached by the Tab key.
  for (const row of document.querySelectorAll(".left, .right, .figure2, .trio, .idea")) {
    const seen = new Set();
    for (const symbol of row.querySelectorAll("span.sym, tspan.sym")) {
      if (seen.has(symbol.dataset.s) || symbol.closest("details details")) continue;
      seen.add(symbol.dataset.s);
      symbol.setAttribute("tabindex", "0");
      symbol.setAttribute("role", "button");
    }
  }

  // The bar at the top says which section is being read.
  const links = Array.from(document.querySelectorAll("nav a"));
  const sections = links.map((link) => document.querySelector(link.getAttribute("href")));
  function follow() {
    const passed = sections.filter((section) => section.getBoundingClientRect().top < 140);
    links.forEach((link, i) => {
      if (i === passed.length - 1) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    });
  }
  addEventListener("scroll", follow, { passive: true });
  follow();

  // A link to what is folded unfolds it.
  function unfold() {
    const id = decodeURIComponent(location.hash.slice(1));
    const target = id && document.getElementById(id);
    for (let up = target; up; up = up.parentElement) if (up.tagName === "DETAILS") up.open = true;
    if (target) target.scrollIntoView();
  }
  addEventListener("hashchange", unfold);
  if (location.hash) unfold();
})();
