"use strict";
// Attention between the steps of a response: two maps, and FCI below.

function showAttention(box, leaf, tree, tip) {
  box.replaceChildren();
  const found = tree.attention[leaf.row];
  if (!found) {
    const others = tree.order.filter((one) => tree.attention[one.row]).map((one) => one.name);
    const where = others.length
      ? `Attention of this problem is there for response ${others.join(" and ")}.`
      : "Attention of this problem was not computed: --attention=N of experiments.view does it for the newest N steps.";
    box.append(element("p", "", where));
    return;
  }
  box.append(element("p", "",
    `By the parameters after step ${found.parameters}. A row looks back at the columns left of it; 0 is the prompt. ` +
    `The prompt's column and the diagonal are left out of the scale.`));
  drawMap(box, found, "mean", "averaged over layers and heads", leaf, tip);
  drawMap(box, found, "strongest", "of the layer and head that give each step's FCI", leaf, tip);
  box.append(element("h3", "", `FCI of each step, Δ = ${found.delta}`));
  const steps = found.fci.length, highest = Math.max(...found.fci.slice(1), 1e-9);
  const svg = d3.create("svg").attr("viewBox", `0 0 ${steps} 1`).attr("preserveAspectRatio", "none").attr("role", "img")
    .attr("aria-label", "FCI of each step");
  found.fci.forEach((fci, k) => {
    if (k > 0) svg.append("rect").attr("class", "bars").attr("x", k + 0.08).attr("width", 0.84)
      .attr("y", 1 - fci / highest).attr("height", fci / highest);
  });
  box.append(svg.node());
}

function drawMap(box, found, name, title, leaf, tip) {
  const values = found[name], size = values.length;
  box.append(element("h3", "", title));
  const canvas = element("canvas");
  canvas.width = canvas.height = size;
  canvas.dataset.map = name;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `attention between ${size - 1} steps, ${title}`);
  let highest = 0;
  for (let j = 0; j < size; j++) for (let k = 1; k < j; k++) highest = Math.max(highest, values[j][k]);
  const pen = canvas.getContext("2d"), image = pen.createImageData(size, size);
  for (let j = 0; j < size; j++) {
    for (let k = 0; k <= j; k++) {
      const { r, g, b } = d3.rgb(colour(values[j][k], highest));
      image.data.set([r, g, b, 255], 4 * (j * size + k));
    }
  }
  pen.putImageData(image, 0, 0);
  const words = (k) => (k === 0 ? "the prompt" : `${k}: ${shortened(leaf.steps[k - 1]?.text ?? "")}`);
  canvas.addEventListener("pointermove", (event) => {
    const place = canvas.getBoundingClientRect();
    const k = Math.floor((event.clientX - place.left) / place.width * size);
    const j = Math.floor((event.clientY - place.top) / place.height * size);
    if (j < 0 || k < 0 || k > j || j >= size) return tip.hide();
    const head = name === "strongest" ? ` (layer ${found.heads[k][0]}, head ${found.heads[k][1]})` : "";
    tip.show([`${values[j][k].toPrecision(3)}${head}`, `from step ${words(j)}`, `to ${k ? "step " : ""}${words(k)}`], event);
  });
  canvas.addEventListener("pointerleave", () => tip.hide());
  box.append(canvas);
}

function shortened(text, longest = 90) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > longest ? `${line.slice(0, longest)}…` : line;
}
