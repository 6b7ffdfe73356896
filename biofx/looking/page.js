"use strict";
const main = document.querySelector("main"), canvas = document.getElementById("edges");
const edges = JSON.parse(document.getElementById("edge-list").textContent);
const box = (id) => document.getElementById(id);
let selected = null;

// The box that is visible for a box: the outermost closed module around it, or the box.
function visible(id) {
  let shown = box(id);
  for (let outer = around(shown); outer; outer = around(outer)) if (!outer.open) shown = outer;
  return shown;
}

const around = (element) => element.parentElement.closest("details.box");

// The steps of an edge: out of the modules around its source, past their neighbours, into those around its target.
function route(a, b) {
  const above = [a], out = [], into = [];
  while (around(above[above.length - 1])) above.push(around(above[above.length - 1]));
  let end = b;
  while (!above.includes(around(end))) {
    into.unshift(`${around(end).id}> ${end.id}`);
    end = around(end);
  }
  const start = above.indexOf(around(end)) - 1;
  for (let i = 0; i < start; i++) out.push(`${above[i].id} ${above[i + 1].id}<`);
  return [...out, `${above[start].id} ${end.id}`, ...into];
}

function drawEdges() {
  const origin = main.getBoundingClientRect(), seen = new Set(), labelled = new Set(), parts = [];
  const ways = {};
  for (const way of main.querySelectorAll(".way")) {
    const at = way.getBoundingClientRect();
    if (at.height) (ways[way.dataset.way] ||= []).push(at);
  }
  for (const [source, target, label] of edges) {
    const a = visible(source), b = visible(target), key = a.id + " " + b.id;
    if (a === b || a.contains(b) || b.contains(a) || seen.has(key)) continue;
    seen.add(key);
    const from = a.getBoundingClientRect(), to = b.getBoundingClientRect();
    const points = [[from.left + from.width / 2, from.bottom]];
    for (const step of route(a, b))
      for (const at of ways[step] || []) points.push([at.left + 2, at.top], [at.left + 2, at.bottom]);
    points.push([to.left + to.width / 2, to.top]);
    const moved = points.map(([x, y]) => [x - origin.left, y - origin.top]);
    let line = "M" + moved[0];
    for (let i = 1; i < moved.length; i++) {
      const [x0, y0] = moved[i - 1], [x1, y1] = moved[i], bend = (y1 - y0) / 2;
      line += `C${x0},${y0 + bend} ${x1},${y1 - bend} ${x1},${y1}`;
    }
    const active = selected && (selected === a || selected === b) ? ' class="active"' : "";
    parts.push(`<path d="${line}" marker-end="url(#arrow)"${active}></path>`);
    if (label && !labelled.has(a)) {
      labelled.add(a);
      const [x, y] = moved[0];
      parts.push(`<text x="${x + 4}" y="${y + 11}">${label.replace(/[&<>]/g, "")}</text>`);
    }
  }
  canvas.setAttribute("width", main.scrollWidth);
  canvas.setAttribute("height", main.scrollHeight);
  canvas.innerHTML = '<defs><marker id="arrow" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="7" markerHeight="7" ' +
    'orient="auto"><path d="M0,0L6,3L0,6z" style="fill:var(--line);stroke:none"></path></marker></defs>' + parts.join("");
}

function show(element) {
  selected = element;
  const facts = box("facts");
  facts.replaceChildren();
  const line = (text) => { const p = document.createElement("p"); p.textContent = text; facts.append(p); };
  line(element.getAttribute("aria-label") || element.querySelector("summary").textContent.trim());
  for (const [key, value] of Object.entries(JSON.parse(element.dataset.facts))) line(`${key}: ${value}`);
  drawEdges();
}

function search(text) {
  for (const old of main.querySelectorAll(".match")) old.classList.remove("match");
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) { box("found").textContent = ""; return drawEdges(); }
  const found = [...main.querySelectorAll(".box")].filter((b) => words.every((w) => b.dataset.name.toLowerCase().includes(w)));
  const innermost = found.filter((b) => !found.some((other) => other !== b && b.contains(other)));
  for (const match of innermost.slice(0, 50)) {
    match.classList.add("match");
    for (let at = around(match); at; at = around(at)) at.open = true;
  }
  box("found").textContent = `${innermost.length} found`;
  if (innermost.length) innermost[0].scrollIntoView({ block: "center", inline: "center" });
  drawEdges();
}

main.addEventListener("toggle", drawEdges, true);
main.addEventListener("click", (event) => {
  const clicked = event.target.closest("button.box, details.box");
  if (clicked) show(clicked);
});
box("search").addEventListener("change", (event) => search(event.target.value));
for (const [id, open] of [["open", true], ["close", false]])
  box(id).addEventListener("click", () => {
    const all = [...main.querySelectorAll("details.box")];
    for (const details of open ? all : all.slice(1)) details.open = open;
  });
box("units").addEventListener("change", (event) => {
  document.body.classList.toggle("show-units", event.target.checked);
  drawEdges();
});
window.addEventListener("resize", drawEdges);
drawEdges();
