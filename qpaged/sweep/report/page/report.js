"use strict";
// Cards beside the dots, sorting, and the choice of curves. All numbers are read off the page itself.

const REACH = 20; // pixels from a dot that count as pointing at it
const table = document.querySelector("#formats table");
const heads = [...table.tHead.rows[0].cells];

function numberOf(cell) {
  return cell.dataset.v === undefined ? cell.textContent.trim() : cell.dataset.v === "" ? NaN : Number(cell.dataset.v);
}

function sortBy(column) {
  const head = heads[column];
  const ascending = head.getAttribute("aria-sort") !== "ascending";
  const order = (a, b) => {
    const [x, y] = [a, b].map((row) => numberOf(row.cells[column]));
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // what is unknown comes last
    return (x < y ? -1 : x > y ? 1 : 0) * (ascending ? 1 : -1);
  };
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
}
heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sortBy(column)));

const figure = document.querySelector("#frontier figure");
const card = figure.querySelector(".card");

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function showCard(dot) {
  figure.querySelectorAll(".dot").forEach((other) => other.classList.toggle("current", other === dot));
  const row = document.getElementById(`format-${dot.dataset.row}`);
  const list = document.createElement("dl");
  heads.forEach((head, column) => {
    if (!("card" in head.dataset)) return;
    list.append(element("dt", head.textContent.trim()), element("dd", row.cells[column].textContent.trim()));
  });
  card.replaceChildren(element("b", dot.getAttribute("aria-label")), list);
  card.hidden = false;
  const [frame, place] = [figure.getBoundingClientRect(), dot.lastElementChild.getBoundingClientRect()];
  const [x, y] = [place.left - frame.left, place.top - frame.top];
  const left = x + 30 + card.offsetWidth > frame.width ? x - card.offsetWidth - 16 : x + 26;
  card.style.left = `${Math.max(0, left)}px`;
  card.style.top = `${Math.min(Math.max(0, y - 40), frame.height - card.offsetHeight)}px`;
}

function hideCard() {
  card.hidden = true;
  figure.querySelectorAll(".current").forEach((dot) => dot.classList.remove("current"));
}

for (const chart of figure.querySelectorAll("svg")) {
  const place = (dot) => ["cx", "cy"].map((name) => Number(dot.lastElementChild.getAttribute(name)));
  const dots = [...chart.querySelectorAll(".dot")].sort((a, b) => place(a)[0] - place(b)[0]);
  const nearest = (event) => {
    const frame = chart.getBoundingClientRect();
    const scale = chart.viewBox.baseVal.width / frame.width;
    const [x, y] = [(event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale];
    const far = (dot) => Math.hypot(place(dot)[0] - x, place(dot)[1] - y);
    const found = dots.reduce((a, b) => (far(b) < far(a) ? b : a));
    return far(found) <= REACH ? found : null;
  };
  const focused = () => dots.find((dot) => dot === document.activeElement);
  const show = (dot) => (dot ? showCard(dot) : hideCard());
  const go = (dot) => {
    dots.forEach((other) => other.setAttribute("tabindex", other === dot ? 0 : -1)); // one stop for Tab
    dot.focus();
  };
  dots.forEach((dot, i) => {
    dot.setAttribute("tabindex", i ? -1 : 0);
    dot.addEventListener("focus", () => showCard(dot));
    dot.addEventListener("blur", hideCard);
    dot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hideCard();
      if (!step) return;
      event.preventDefault();
      go(dots[(i + step + dots.length) % dots.length]);
    });
  });
  chart.addEventListener("pointermove", (event) => show(nearest(event) || focused()));
  chart.addEventListener("pointerleave", () => show(focused()));
  chart.addEventListener("click", (event) => {
    if (event.detail) event.preventDefault(); // Enter follows the link, to the format's row
    const dot = nearest(event);
    if (dot && event.detail) go(dot);
  });
}

for (const box of document.querySelectorAll(".choices input")) {
  const curves = document.querySelectorAll(`[data-choice="${box.value}"]`);
  const show = () => curves.forEach((curve) => curve.classList.toggle("shown", box.checked));
  const light = (lit) => curves.forEach((curve) => curve.classList.toggle("lit", lit));
  box.addEventListener("change", show);
  box.parentElement.addEventListener("pointerenter", () => light(true));
  box.parentElement.addEventListener("pointerleave", () => light(false));
  show(); // a browser may remember what was ticked
}
