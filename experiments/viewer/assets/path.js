"use strict";
// The text of a path, step by step, each with its FCI as a bar.

const LINES_AT_ONCE = 200;

// FCI of the whole path under its text: a bar for each step; steps of which it is not known are flat.
function drawInfluence(steps, isBranch, tree, onStep) {
  const svg = d3.select("#influence").attr("viewBox", `0 0 ${Math.max(steps.length, 1)} 1`);
  const height = (step) => (step.fci === null || !tree.scale ? 0.04 : Math.min(Math.max(step.fci / tree.scale, 0.01), 1));
  svg.selectAll("rect").data(steps).join("rect")
    .attr("x", (step, k) => k + 0.08).attr("width", 0.84)
    .attr("y", (step) => 1 - height(step)).attr("height", height)
    .classed("none", (step) => step.fci === null)
    .classed("branch", isBranch)
    .on("click", (event, step) => onStep(steps.indexOf(step)));
  return (index) => svg.selectAll("rect").classed("now", (step, k) => k === index);
}

function showPath(box, leaf, tree, chosenStep, onStep) {
  const steps = pathOf(leaf);
  const lines = new Map();
  // A branch may lie inside a step: entropy branches at any token.
  const splits = leaf.parent ? [leaf.split] : leaf.branches;
  const isBranch = (step) => splits.some((split) => step.start <= split && split < step.end);
  const markInfluence = drawInfluence(steps, isBranch, tree, onStep);
  let shown = 0;
  let part = null;
  box.replaceChildren();
  const more = element("div", "more", "…");

  function addLine(index) {
    const step = steps[index];
    const at = segmentAt(leaf, Math.max(step.start, step.own && leaf.parent ? leaf.split : 0));
    if (at && at !== part) {
      part = at;
      const of = at.leaves === 1 ? "1 leaf" : `${at.leaves} leaves`;
      more.before(element("div", "part",
        `tokens ${at.start}–${at.end}: value ${number(at.value, 2)} over ${of}, advantage ${signed(at.advantage)}`));
    }
    const line = element("div", "line");
    line.append(element("span", "number", String(index + 1)));
    const meter = element("span", "meter", step.fci === null ? "" : number(step.fci));
    if (step.fci !== null && tree.scale > 0) {
      const bar = element("i");
      bar.style.width = `${Math.min(Math.round(100 * step.fci / tree.scale), 100)}%`;
      meter.prepend(bar);
    }
    line.append(meter, element("span", "words", step.text));
    line.classList.toggle("branch", isBranch(step));
    line.addEventListener("click", () => onStep(index));
    lines.set(index, line);
    more.before(line);
  }

  function addMore(upTo) {
    for (; shown < Math.min(Math.max(upTo, 0), steps.length); shown++) addLine(shown);
    more.hidden = shown === steps.length;
  }

  box.append(more);
  // Only what is near the window: a path of single tokens has thousands of lines.
  const watcher = new IntersectionObserver((seen) => {
    if (seen.some((entry) => entry.isIntersecting)) addMore(shown + LINES_AT_ONCE);
  }, { root: box });
  addMore(LINES_AT_ONCE);
  watcher.observe(more);

  function mark(index) {
    box.querySelector(".line.now")?.classList.remove("now");
    markInfluence(index);
    if (index === null) return;
    addMore(index + 1);
    const line = lines.get(index);
    line.classList.add("now");
    const inside = line.offsetTop - box.offsetTop;
    if (inside < box.scrollTop || inside + line.offsetHeight > box.scrollTop + box.clientHeight) {
      box.scrollTop = inside - box.clientHeight / 3;
    }
  }

  mark(chosenStep);
  return { steps, mark, close: () => watcher.disconnect() };
}
