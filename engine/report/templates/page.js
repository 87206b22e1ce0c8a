"use strict";
// Sorts and filters the cards, moves the threshold, shows and hides what lies over the pictures, enlarges a picture.
const data = JSON.parse(document.getElementById("data").textContent);
const STEPS = 1000, [LOW, HIGH] = data.range;
const byId = id => document.getElementById(id);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const number = value => value.toFixed(data.digits);
const place = value => (value - LOW) / (HIGH - LOW || 1);
const origin = byId("origin").textContent;

// An item is an image, or a volume with the highest score of its slices.
const items = [...byId("cards").children].map(element => {
  const cards = element.matches(".card") ? [element] : all(".card", element);
  const scores = cards.map(card => Number(card.dataset.score));
  const score = Math.max(...scores), label = element.dataset.label;
  if (cards.length > 1 || cards[0] !== element) cards[scores.indexOf(score)].classList.add("top");
  return {element, cards, score, label: label === undefined ? null : Number(label), name: element.dataset.name};
});
let threshold = data.threshold, shown = [];

// tp, fp, ... with a label; p or n without; "" where there is no threshold.
function kind(score, label) {
  if (threshold === null) return "";
  const positive = score >= threshold;
  return (label === null ? "" : positive === Boolean(label) ? "t" : "f") + (positive ? "p" : "n");
}
const of = item => kind(item.score, item.label);
// How far on the wrong side of the threshold.
const wrong = ({label, score}) => (label ? 1 : -1) * ((threshold ?? 0) - score);

const VERDICTS = {tp: "abnormal, found", tn: "normal, right", fp: "false alarm", fn: "missed", p: "abnormal", n: "normal", "": ""};
const FILTERS = data.labelled ? {
  all: ["All", () => true],
  fn: ["Missed", item => of(item) === "fn"],
  fp: ["False alarms", item => of(item) === "fp"],
  abnormal: ["Abnormal", item => item.label === 1],
  normal: ["Normal", item => item.label === 0],
} : {
  all: ["All", () => true],
  p: ["Abnormal", item => of(item) === "p"],
  n: ["Normal", item => of(item) === "n"],
};
const byName = (a, b) => a.name < b.name ? -1 : a.name > b.name ? 1 : 0;
const ORDERS = {
  worst: (a, b) => wrong(b) - wrong(a) || byName(a, b),
  score: (a, b) => b.score - a.score || byName(a, b),
  low: (a, b) => a.score - b.score || byName(a, b),
  file: byName,
};

function judge(element, verdict) {
  element.querySelector(".verdict").textContent = VERDICTS[verdict];
  element.classList.toggle("wrong", verdict[0] === "f");
  element.classList.toggle("positive", verdict === "p");
}

// What depends on the threshold; the order stays while it is being moved.
function update() {
  for (const item of items) {
    if (item.label === null) for (const card of item.cards) judge(card, kind(Number(card.dataset.score), null));
    judge(item.element, of(item));
  }
  const count = scores => scores.filter(score => threshold !== null && score >= threshold).length;
  const [negatives, positives] = data.scores, called = data.scores.map(count);
  const counts = {fp: called[0], tn: negatives.length - called[0], tp: called[1], fn: positives.length - called[1], p: called[0] + called[1]};
  for (const cell of all("[data-count]")) cell.textContent = counts[cell.dataset.count].toLocaleString("en");
  const moved = threshold !== data.threshold;
  byId("at").textContent = threshold === null ? "none" : number(threshold);
  byId("origin").textContent = moved ? "Set by hand." : origin;
  byId("reset").hidden = !moved;
  byId("threshold").value = Math.round(STEPS * place(threshold ?? HIGH));
  document.body.classList.toggle("no-threshold", threshold === null);
  document.body.style.setProperty("--threshold", place(threshold ?? LOW));
  for (const button of byId("filters").children) {
    const [words, test] = FILTERS[button.value];
    button.textContent = `${words} (${items.filter(test).length})`;
  }
}

// The address holds the view, as in #filter=fn&sort=score&threshold=1.5, so that a link leads to it.
function state() {
  const given = new URLSearchParams(location.hash.slice(1));
  const known = (table, key, other) => Object.hasOwn(table, given.get(key)) ? given.get(key) : other;
  const value = given.get("threshold") ? Number(given.get("threshold")) : NaN;
  return {filter: known(FILTERS, "filter", "all"), sort: known(ORDERS, "sort", data.labelled ? "worst" : "score"),
    threshold: Number.isFinite(value) ? value : null};
}

function refresh() {
  const {filter, sort, threshold: given} = state();
  threshold = given ?? data.threshold;
  for (const button of byId("filters").children) button.setAttribute("aria-pressed", button.value === filter);
  byId("sort").value = sort;
  shown = items.filter(FILTERS[filter][1]).sort(ORDERS[sort]);
  byId("cards").replaceChildren(...shown.map(item => item.element));
  byId("status").textContent = shown.length ? "" : "There are none at this threshold.";
  for (const strip of all(".strip")) {  // to the slice that decides
    const top = strip.querySelector(".top");
    strip.scrollLeft = top.offsetLeft - strip.offsetLeft - (strip.clientWidth - top.clientWidth) / 2;
  }
  update();
}

function go(change) {
  const next = Object.entries({...state(), ...change}).filter(([, value]) => value !== null);
  history.replaceState(null, "", "#" + new URLSearchParams(next));
  refresh();
}

// The picture alone beside the one with heat map and outline.
let enlarged = null;
function enlarge(card) {
  enlarged = card;
  const viewer = byId("viewer"), tile = card.querySelector(".tile");
  const layers = tile.querySelectorAll(".heat, .outline").length;
  const copies = Array.from({length: layers ? 2 : 1}, () => tile.cloneNode(true));
  if (layers) for (const layer of all(".heat, .outline", copies[0])) layer.remove();
  for (const copy of copies) copy.disabled = true;
  viewer.querySelector(".both").replaceChildren(...copies);
  for (const name of ["name", "verdict", "score"])
    viewer.querySelector("." + name).textContent = card.querySelector("." + name).textContent;
  if (!viewer.open) viewer.showModal();
}
function step(by) {
  const cards = shown.flatMap(item => item.cards);
  enlarge(cards[(cards.indexOf(enlarged) + by + cards.length) % cards.length]);
}

for (const name of Object.keys(FILTERS)) {
  const button = document.createElement("button");
  button.type = "button";
  button.value = name;
  button.onclick = () => go({filter: name});
  byId("filters").append(button);
}
byId("sort").onchange = event => go({sort: event.target.value});
byId("threshold").oninput = event => {
  threshold = LOW + event.target.value / STEPS * (HIGH - LOW);
  update();
};
byId("threshold").onchange = () => go({threshold});
byId("reset").onclick = () => go({threshold: null});
for (const name of ["heat", "outline"])
  byId(name)?.addEventListener("change", event => document.body.classList.toggle("no-" + name, !event.target.checked));
byId("strength")?.addEventListener("input", event => document.body.style.setProperty("--heat", event.target.value / 100));
byId("cards").onclick = event => {
  const tile = event.target.closest(".tile");
  if (tile) enlarge(tile.closest(".card"));
};
byId("previous").onclick = () => step(-1);
byId("next").onclick = () => step(1);
byId("close").onclick = () => byId("viewer").close();
byId("viewer").onkeydown = event => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
};
addEventListener("hashchange", () => {
  refresh();
  byId("images").scrollIntoView();
});
refresh();
