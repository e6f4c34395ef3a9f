"use strict";
const LEVELS = [-0.1, -0.7, -1.6, -3, -5, -8];  // nats; the legend names them
const LEAST = 6;  // least likely tokens listed beside a text
const data = JSON.parse(document.getElementById("data").textContent);

function add(parent, tag, kind, text) {
  const element = parent.appendChild(document.createElement(tag));
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;  // never innerHTML: what a pair says is text
  return element;
}
const inside = (piece) => piece.special ?? piece;
function drawWords(parent, pieces) {  // text that does not count; [text, logprob?] that does; {special: either}; a number of tokens left out
  const words = add(parent, "p", "words");
  words.dir = "auto";
  for (const piece of pieces) {
    if (typeof piece === "number") add(words, "span", "gap", ` … ${piece.toLocaleString("en")} tokens left out … `);
    else {
      const special = piece.special !== undefined, [text, logp] = [inside(piece)].flat();
      const level = LEVELS.filter((bound) => logp < bound).length;
      const kind = typeof inside(piece) === "string" ? "plain" : logp === undefined ? "tok" : `tok s${level}`;
      const token = add(words, "span", special ? `${kind} special` : kind, text);
      const about = [...(special ? ["special token"] : []), ...(logp !== undefined ? [`${logp.toFixed(2)} nats`] : [])];
      if (about.length) token.title = about.join(", ");
    }
  }
}
function drawLeast(parent, pieces) {  // what the shading shows, in words
  const known = pieces.map(inside).filter((piece) => Array.isArray(piece) && piece.length > 1);
  const least = known.sort((one, other) => one[1] - other[1]).slice(0, LEAST);
  if (least.length) add(parent, "p", "dim", "Least likely: " + least.map(([text, logp]) => `“${text.trim() || "␣"}” ${logp.toFixed(2)}`).join(", "));
}
function fill(details) {
  const parts = details.querySelectorAll(".part");
  if (details.dataset.filled || !parts.length) return;
  details.dataset.filled = "yes";
  data.pairs[details.dataset.pair].forEach((pieces, number) => {
    if (!pieces.length) { parts[number].hidden = true; return; }
    drawWords(parts[number], pieces);
    if (number) drawLeast(parts[number], pieces);
  });
}
function openTarget() {  // a link to a text opens it
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target || !target.dataset.pair) return;
  target.open = true;
  fill(target);
  target.scrollIntoView();
  target.querySelector("summary").focus({ preventScroll: true });
}
for (const details of document.querySelectorAll("details[data-pair]")) {
  details.addEventListener("toggle", () => { if (details.open) fill(details); });
}
addEventListener("hashchange", openTarget);
openTarget();
