"use strict";
// What is chosen, and what the keys and lists do to it.

const by = (id) => document.getElementById(id);
const main = INDEX.runs[0];
const steps = [...new Set(main.problems.map((problem) => problem.step))];
const state = { step: steps[steps.length - 1], entry: null, run: 0, leaf: null, at: null, tab: "text" };
// Of each run: the tree that is drawn, and where.
let drawings = [];
let path = null;
let turn = 0;

const tip = {
  show(lines, event) {
    const box = by("tip");
    box.replaceChildren(...lines.map((line) => element("p", "", line)));
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - width - 8);
    const below = event.clientY + 16;
    box.style.left = `${Math.max(left, 8)}px`;
    box.style.top = `${below + height > innerHeight ? event.clientY - height - 10 : below}px`;
  },
  hide() {
    by("tip").hidden = true;
  },
};

function about(leaf, step, index) {
  const at = segmentAt(leaf, Math.max(step.start, step.own && leaf.parent ? leaf.split : 0));
  const fci = step.fci === null ? "FCI not computed" : `FCI ${number(step.fci)}`;
  const value = at ? `value ${number(at.value, 2)} over ${at.leaves}, advantage ${signed(at.advantage)}` : "";
  return [
    `step ${index + 1}, ${fci}`,
    `${value}; tokens ${step.start}–${step.end}, sampled by θ${step.version}`,
    shortened(step.text, 140),
  ];
}

function listProblems() {
  const entries = main.problems.filter((problem) => problem.step === state.step);
  if (!entries.includes(state.entry)) {
    state.entry = entries.find((entry) => entry.id === state.entry?.id) ?? entries[0];
  }
  by("step").value = state.step;
  by("problem").replaceChildren(...entries.map((entry) => {
    const both = INDEX.runs.length > 1 && INDEX.runs[1].problems.some((other) => other.id === entry.id) ? "in both · " : "";
    const option = element("option", "", `${both}${entry.right}/${entry.leaves} right · ${entry.id} · ${entry.text}`);
    option.value = entry.blob;
    return option;
  }));
  by("problem").value = state.entry.blob;
}

// The same problem in another run: of the training step that is nearest.
function inRun(run) {
  if (run === main) return state.entry;
  const same = run.problems.filter((problem) => problem.id === state.entry.id);
  return d3.least(same, (problem) => Math.abs(problem.step - state.step));
}

// `kept`: what was chosen before, where the same is drawn again.
async function showProblem(kept = null) {
  const mine = ++turn;
  const found = await Promise.all(INDEX.runs.map(async (run) => {
    const entry = inRun(run);
    return { run, entry, tree: entry && (await unpack(entry.blob)) };
  }));
  if (mine !== turn) return;
  tip.hide();
  const tree = found[0].tree;
  const gold = element("span", "gold", `gold: ${tree.problem.answers.join(" or ")}`);
  by("question").replaceChildren(tree.problem.text, gold);
  by("trees").replaceChildren();
  // One scale for all: a colour says the same in every run.
  const highest = Math.max(...found.map((one) => one.tree?.highest ?? 0));
  const longest = Math.max(...found.map((one) => one.tree?.longest ?? 0));
  for (const one of found) if (one.tree) Object.assign(one.tree, { scale: highest, longest });
  drawings = found.map((one, run) => addRun(one, run));
  drawScale(highest, found.some((one) => one.tree?.leaves.some((leaf) => leaf.steps.some((s) => s.fci !== null))));
  state.leaf = null;
  const again = kept && drawings[kept.run]?.tree.order.find((leaf) => leaf.row === kept.row);
  if (!again) return choose(0, tree.order.find((leaf) => leaf.branches?.length) ?? tree.order[0]);
  Object.assign(state, { run: kept.run, leaf: again, at: kept.at });
  showChosen(true);
}

function addRun({ run, entry, tree }, number_) {
  const box = element("div", "run");
  const title = element("h2", "", `${run.name} `);
  box.append(title);
  by("trees").append(box);
  if (!tree) {
    box.append(element("p", "", "has not recorded this problem"));
    return null;
  }
  title.append(element("span", "",
    `${run.method}, step ${entry.step}: value ${number(tree.value, 2)}, ${entry.right} of ${entry.leaves} right`));
  const scroll = element("div", "scroll");
  box.append(scroll);
  const on = {
    choose: (leaf, index) => choose(number_, leaf, index ?? null),
    hover: (leaf, index, event) => {
      const whole = pathOf(leaf), own = whole.length - leaf.steps.length + index;
      tip.show(about(leaf, whole[own], own), event);
    },
    leave: tip.hide,
  };
  return { tree, box: scroll, ...drawTree(scroll, tree, on), on };
}

// `own`: index among the leaf's own steps, as it is drawn.
function choose(run, leaf, own = null) {
  if (state.run === run && state.leaf === leaf && own === null) return;
  const isNew = state.leaf !== leaf;
  Object.assign(state, { run, leaf });
  const whole = pathOf(leaf);
  state.at = own === null ? null : whole.length - leaf.steps.length + own;
  showChosen(isNew);
}

function showChosen(isNew) {
  const { leaf, at } = state, drawing = drawings[state.run];
  if (isNew || !path) {
    path?.close();
    path = showPath(by("text"), leaf, drawing.tree, at, (index) => moveTo(index));
    showAttention(by("attention"), leaf, drawing.tree, tip);
    const run = INDEX.runs.length > 1 ? `${INDEX.runs[state.run].name}: ` : "";
    by("chosen").textContent = `${run}${nameOf(leaf)}, ${verdict(leaf)}`;
  } else {
    path.mark(at);
  }
  drawings.forEach((other, run) => {
    if (other) markChosen(other, run === state.run ? leaf : null, run === state.run && at !== null ? path.steps[at] : null);
  });
}

function moveTo(index) {
  state.at = Math.max(0, Math.min(index, path.steps.length - 1));
  showChosen(false);
  const cursor = drawings[state.run].svg.select(".cursor").node().getBoundingClientRect();
  tip.show(about(state.leaf, path.steps[state.at], state.at), { clientX: cursor.right, clientY: cursor.bottom });
}

function moveLeaf(by_) {
  const all = drawings.flatMap((drawing, run) => (drawing ? drawing.tree.order.map((leaf) => ({ run, leaf })) : []));
  const now = all.findIndex((one) => one.run === state.run && one.leaf === state.leaf);
  const next = all[Math.max(0, Math.min(now + by_, all.length - 1))];
  tip.hide();
  choose(next.run, next.leaf);
  drawings[next.run].svg.select(".leaf.chosen").node().focus({ preventScroll: false });
}

function moveProblem(by_) {
  const entries = main.problems.filter((problem) => problem.step === state.step);
  const next = entries[(entries.indexOf(state.entry) + by_ + entries.length) % entries.length];
  state.entry = next;
  listProblems();
  showProblem();
}

function moveStep(by_) {
  const next = steps[steps.indexOf(state.step) + by_];
  if (next === undefined) return;
  state.step = next;
  listProblems();
  showProblem();
}

function showTab(name) {
  state.tab = name;
  for (const one of ["text", "attention"]) {
    by(one).hidden = one !== name;
    by("influence").style.display = name === "text" ? "" : "none";
    by(`tab-${one}`).setAttribute("aria-selected", one === name);
  }
}

const KEYS = {
  ArrowDown: () => moveLeaf(1), j: () => moveLeaf(1),
  ArrowUp: () => moveLeaf(-1), k: () => moveLeaf(-1),
  ArrowRight: () => moveTo(state.at === null ? 0 : state.at + 1), l: () => moveTo((state.at ?? -1) + 1),
  ArrowLeft: () => moveTo(state.at === null ? 0 : state.at - 1), h: () => moveTo((state.at ?? 1) - 1),
  n: () => moveProblem(1), p: () => moveProblem(-1),
  "]": () => moveStep(1), "[": () => moveStep(-1),
  t: () => showTab(state.tab === "text" ? "attention" : "text"),
  Escape: () => tip.hide(),
};

function drawCurve() {
  const points = main.accuracies;
  if (!points.length) return by("curve").remove();
  const last = points[points.length - 1];
  const x = d3.scaleLinear([0, Math.max(last[0], 1)], [2, 184]), y = d3.scaleLinear([0, 1], [42, 4]);
  const svg = d3.select("#curve");
  svg.append("path").attr("class", "link").attr("d", `M2 42H184`);
  svg.append("path").attr("d", d3.line((d) => x(d[0]), (d) => y(d[1]))(points)).attr("class", "gain");
  svg.append("text").attr("x", 189).attr("y", y(last[1]) + 4).text(number(last[1], 2));
}

function describe() {
  const points = main.accuracies, parts = [`method ${main.method}`];
  if (points.length) {
    parts.push(`held-out accuracy ${number(points[0][1])} → ${number(points[points.length - 1][1])} ` +
      `after ${points[points.length - 1][0]} steps`);
  }
  if (INDEX.runs.length > 1) parts.push(`compared with ${INDEX.runs[1].name}`);
  by("about").textContent = parts.join(", ");
  const hidden = INDEX.recorded - INDEX.shown;
  by("left-out").textContent = hidden > 0 ? `${hidden} of ${INDEX.recorded} recorded steps are left out` : "";
}

by("step").append(...steps.map((step) => element("option", "", String(step))));
by("step").addEventListener("change", (event) => moveStep(steps.indexOf(+event.target.value) - steps.indexOf(state.step)));
by("problem").addEventListener("change", (event) => {
  state.entry = main.problems.find((problem) => problem.blob === +event.target.value);
  showProblem();
});
by("previous").addEventListener("click", () => moveProblem(-1));
by("next").addEventListener("click", () => moveProblem(1));
by("tab-text").addEventListener("click", () => showTab("text"));
by("tab-attention").addEventListener("click", () => showTab("attention"));
document.addEventListener("keydown", (event) => {
  if (event.target.closest("select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = KEYS[event.key];
  if (act && drawings.length) {
    event.preventDefault();
    act();
  }
});
let resized = 0;
function redraw() {
  clearTimeout(resized);
  resized = setTimeout(() => showProblem(state.leaf && { run: state.run, row: state.leaf.row, at: state.at }), 150);
}
// A phone's bars come and go while it is scrolled: only the width matters to what is drawn.
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  redraw();
});
isDark.addEventListener("change", redraw);
// Of two runs a problem that both have is shown first, the newest.
state.entry = d3.greatest(main.problems.filter((problem) => INDEX.runs.slice(1).some(
  (run) => run.problems.some((other) => other.id === problem.id))), (problem) => problem.step) ?? null;
state.step = state.entry?.step ?? state.step;
describe();
drawCurve();
listProblems();
showProblem();
