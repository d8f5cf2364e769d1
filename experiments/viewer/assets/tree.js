"use strict";
// The tree of a problem: a strip for each leaf, as long as its tokens, coloured by FCI.

const STRIP = 15, ROW = 27, LABEL = 62, END = 30, LEAST_STEP = 2, LEAST_WIDTH = 300;
const isDark = matchMedia("(prefers-color-scheme: dark)");

// Dark is much on paper, bright is much on a dark screen; both fall evenly in grey.
function colour(fci, highest) {
  const share = highest > 0 ? Math.min(fci / highest, 1) : 0;
  return d3.interpolateViridis(isDark.matches ? share : 1 - share);
}

// Steps narrower than LEAST_STEP pixels are drawn together, by the highest FCI of them.
function bins(steps, first, x) {
  const made = [];
  let open = null;
  steps.forEach((step, index) => {
    const from = Math.max(step.start, first);
    if (step.end <= from) return;
    const fci = step.fci;
    if (!open) open = { from, fci, index, last: index };
    if (fci !== null && (open.fci === null || fci > open.fci)) Object.assign(open, { fci, index });
    Object.assign(open, { to: step.end, last: index });
    if (x(open.to) - x(open.from) >= LEAST_STEP || index === steps.length - 1) {
      made.push(open);
      open = null;
    }
  });
  return made;
}

function drawTree(box, tree, on) {
  const longest = Math.max(1, tree.longest);
  const width = Math.max(box.clientWidth || 800, LEAST_WIDTH);
  const x = d3.scaleLinear([0, longest], [LABEL, width - END]);
  const top = 18;
  let y = top;
  const places = new Map();
  tree.order.forEach((leaf, k) => {
    const isGroup = leaf.branches?.length || tree.order[k - 1]?.parent;
    if (!leaf.parent && k && isGroup) y += 7;
    places.set(leaf, y);
    y += ROW;
  });
  const svg = d3.create("svg").attr("width", width).attr("height", y + 4)
    .attr("role", "listbox").attr("aria-label", "responses");
  svg.append("g").attr("class", "axis").attr("transform", `translate(0,${top - 4})`)
    .call(d3.axisTop(x).ticks(Math.max(2, Math.floor(width / 130)), "~s").tickSize(3))
    .append("text").attr("x", 0).attr("y", -6).attr("text-anchor", "start").text("tokens");
  for (const leaf of tree.order) if (leaf.parent) drawLink(svg, leaf, places, x);
  for (const leaf of tree.order) drawLeaf(svg, leaf, places.get(leaf), x, tree, on);
  svg.append("path").attr("class", "shared").attr("pointer-events", "none");
  svg.append("rect").attr("class", "cursor").attr("height", STRIP + 4).attr("rx", 2).attr("visibility", "hidden");
  box.replaceChildren(svg.node());
  return { svg, places, x };
}

function drawLink(svg, leaf, places, x) {
  const from = places.get(leaf.parent) + STRIP + 5, to = places.get(leaf) + STRIP / 2, at = x(leaf.split);
  svg.append("path").attr("class", "link").attr("d", `M${at} ${from}V${to}h3`);
}

function drawLeaf(svg, leaf, y, x, tree, on) {
  const begin = leaf.parent ? leaf.split : 0;
  const group = svg.append("g").attr("class", "leaf").classed("untrained", !leaf.trained)
    .attr("transform", `translate(0,${y})`).attr("role", "option").attr("tabindex", -1)
    .attr("data-row", leaf.row).attr("aria-selected", false)
    .attr("aria-label", `${nameOf(leaf)}, ${verdict(leaf)}, ${leaf.length} tokens${leaf.trained ? "" : ", not trained on"}`);
  group.append("text").attr("x", leaf.parent ? 26 : 4).attr("y", STRIP - 3)
    .text(leaf.parent ? `↳ ${leaf.name}` : `no. ${leaf.name}`);
  const strip = group.append("g").attr("class", "steps");
  for (const bin of bins(leaf.steps, begin, x)) {
    const wide = x(bin.to) - x(bin.from);
    const drawn = strip.append("rect").attr("x", x(bin.from)).attr("height", STRIP)
      .attr("width", Math.max(wide - (wide > 5 ? 1 : 0), 0.5)).datum(bin);
    if (bin.fci === null) drawn.attr("class", "unknown");
    else drawn.attr("fill", colour(bin.fci, tree.scale));
  }
  strip.selectAll("rect").on("pointermove", (event, bin) => on.hover(leaf, bin.index, event))
    .on("pointerleave", () => on.leave());
  for (const segment of leaf.segments) {
    const from = Math.max(segment.start, begin);
    if (segment.end <= from) continue;
    const kind = segment.advantage > 0 ? "gain" : segment.advantage < 0 ? "loss" : "even";
    group.append("path").attr("class", kind).attr("d", `M${x(from) + 0.5} ${STRIP + 4}H${x(segment.end) - 1.5}`);
  }
  group.append("rect").attr("class", "frame").attr("x", x(begin) - 1.5).attr("y", -1.5).attr("rx", 2)
    .attr("width", Math.max(x(leaf.length) - x(begin) + 2, 4)).attr("height", STRIP + 3);
  for (const split of leaf.branches || []) {
    group.append("use").attr("href", "#mark-branch").attr("class", "branch")
      .attr("x", x(split) - 6).attr("y", STRIP - 2).attr("width", 12).attr("height", 12);
  }
  group.append("use").attr("href", isRight(leaf) ? "#mark-right" : "#mark-wrong")
    .attr("x", x(leaf.length) + 6).attr("y", STRIP / 2 - 7).attr("width", 14).attr("height", 14);
  group.on("click", (event) => {
    const index = d3.select(event.target).datum()?.index;
    on.choose(leaf, index);
    // A finger does not hover.
    if (index !== undefined) on.hover(leaf, index, event);
  })
    .on("focus", () => on.choose(leaf));
}

// Marks the chosen leaf, the part of its root that it shares, and a step of its path.
function markChosen(drawn, leaf, step) {
  const { svg, places, x } = drawn;
  svg.selectAll(".leaf").each(function () {
    const isChosen = leaf && +this.dataset.row === leaf.row;
    d3.select(this).classed("chosen", isChosen).attr("aria-selected", !!isChosen)
      .attr("tabindex", isChosen ? 0 : -1);
  });
  const shared = leaf && leaf.parent
    ? `M${x(0)} ${places.get(leaf.parent) - 4}H${x(leaf.split)}` : null;
  svg.select(".shared").attr("d", shared);
  const cursor = svg.select(".cursor").attr("visibility", step ? "visible" : "hidden");
  if (step) {
    const y = places.get(step.own ? leaf : leaf.parent);
    const from = step.own && leaf.parent ? Math.max(step.start, leaf.split) : step.start;
    cursor.attr("x", x(from) - 2).attr("y", y - 2).attr("width", Math.max(x(step.end) - x(from) + 3, 5));
  }
}

function drawScale(highest, hasAny) {
  const canvas = document.getElementById("scale"), pen = canvas.getContext("2d");
  for (let k = 0; k < canvas.width; k++) {
    pen.fillStyle = colour(k, canvas.width - 1);
    pen.fillRect(k, 0, 1, canvas.height);
  }
  document.getElementById("scale-ends").textContent = hasAny ? `0 to ${number(highest)} and above` : "not computed";
}
