"use strict";
// Problems lie compressed in the page; each is unpacked when it is looked at, the last few stay.

const INDEX = JSON.parse(document.getElementById("index").textContent);
const MOST_UNPACKED = 12;
const unpacked = new Map();

async function unpack(blob) {
  if (!unpacked.has(blob)) {
    const packed = atob(document.getElementById(`blob-${blob}`).textContent);
    const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(blob, prepare(JSON.parse(await new Response(stream).text())));
    if (unpacked.size > MOST_UNPACKED) unpacked.delete(unpacked.keys().next().value);
  }
  return unpacked.get(blob);
}

// Leaves in the order in which they are drawn: every initial response, then what branches off it.
function prepare(tree) {
  const byRow = new Map(tree.leaves.map((leaf) => [leaf.row, leaf]));
  tree.order = [];
  for (const root of tree.leaves.filter((leaf) => leaf.row === leaf.root)) {
    const children = tree.leaves.filter((leaf) => leaf.root === root.row && leaf !== root);
    children.sort((a, b) => a.split - b.split || a.row - b.row);
    root.branches = [...new Set(children.map((child) => child.split))];
    root.name = String(tree.leaves.filter((leaf) => leaf.row === leaf.root).indexOf(root) + 1);
    children.forEach((child, k) => { child.name = `${root.name}.${k + 1}`; });
    tree.order.push(root, ...children);
  }
  tree.order.forEach((leaf) => {
    leaf.parent = leaf.row === leaf.root ? null : byRow.get(leaf.root);
  });
  // Of the steps that may branch: the first never does, and has most of all attention.
  const known = tree.leaves.flatMap((leaf) => (leaf.parent ? [] : leaf.steps.slice(1).map((step) => step.fci ?? 0)));
  tree.highest = known.reduce((a, b) => Math.max(a, b), 0);
  tree.longest = Math.max(...tree.order.map((leaf) => leaf.length));
  return tree;
}

// Steps of the whole path of a leaf; `own` tells those that it does not share with its root.
function pathOf(leaf) {
  const own = leaf.steps.map((step) => ({ ...step, own: true }));
  if (!leaf.parent) return own;
  const begin = own.length ? own[0].start : leaf.split;
  const shared = leaf.parent.steps.filter((step) => step.end <= begin);
  return [...shared.map((step) => ({ ...step, own: false })), ...own];
}

function segmentAt(leaf, token) {
  return leaf.segments.find((segment) => segment.start <= token && token < segment.end);
}

function isRight(leaf) {
  return leaf.reward >= 0.5;
}

function number(value, digits = 3) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

function signed(value) {
  return value === null || value === undefined ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
}

function verdict(leaf) {
  const cut = leaf.ended ? "" : ", cut at its budget";
  const partly = leaf.reward > 0 && leaf.reward < 1 ? `, reward ${number(leaf.reward, 2)}` : "";
  return (isRight(leaf) ? "right" : "wrong") + partly + cut;
}

function nameOf(leaf) {
  return leaf.parent ? `branch ${leaf.name}` : `response ${leaf.name}`;
}

// Text of models goes into the page as text, whatever it is.
function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
