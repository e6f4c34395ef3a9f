const LEVELS = [-0.1, -0.7, -1.6, -3, -5, -8];  // nats; the legend names them
const LEAST = 6;  // least likely tokens listed beside a text
const data = JSON.parse(document.getElementById("data").textContent);

let language = "en";
function translate(root) {  // every element that carries its Chinese; its English is kept beside it
  for (const one of root.querySelectorAll("[data-zh]")) {
    one.dataset.en ??= one.textContent;
    one.textContent = one.dataset[language];  // never innerHTML: what a pair says is text
  }
  for (const one of root.querySelectorAll("[data-zh-label]")) {
    one.dataset.enLabel ??= one.getAttribute("aria-label");
    one.setAttribute("aria-label", one.dataset[`${language}Label`]);
  }
}
function words(template, value) {  // one of the templates that the page brings, in the language shown
  return (language === "zh" ? data.chinese[template] : template).replace("{value}", () => value);
}
function add(parent, tag, kind, text) {
  const element = parent.appendChild(document.createElement(tag));
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;  // never innerHTML: what a pair says is text
  return element;
}
const inside = (piece) => piece.special ?? piece;
function drawWords(parent, pieces) {  // text that does not count; [text, logprob?] that does; {special: either}; a number of tokens left out
  const line = add(parent, "p", "words");
  line.dir = "auto";
  for (const piece of pieces) {
    if (typeof piece === "number") add(line, "span", "gap", words(" … {value} tokens left out … ", piece.toLocaleString("en")));
    else {
      const special = piece.special !== undefined, [text, logp] = [inside(piece)].flat();
      const level = LEVELS.filter((bound) => logp < bound).length;
      const kind = typeof inside(piece) === "string" ? "plain" : logp === undefined ? "tok" : `tok s${level}`;
      const token = add(line, "span", special ? `${kind} special` : kind, text);
      const about = [...(special ? [words("special token")] : []), ...(logp !== undefined ? [words("{value} nats", logp.toFixed(2))] : [])];
      if (about.length) token.title = about.join(", ");
    }
  }
}
function drawLeast(parent, pieces) {  // what the shading shows, in words
  const known = pieces.map(inside).filter((piece) => Array.isArray(piece) && piece.length > 1);
  const least = known.sort((one, other) => one[1] - other[1]).slice(0, LEAST);
  if (least.length) add(parent, "p", "dim", words("Least likely: {value}", least.map(([text, logp]) => `“${text.trim() || "␣"}” ${logp.toFixed(2)}`).join(", ")));
}
function fill(details) {
  const parts = details.querySelectorAll(".part");
  if (details.dataset.filled === language || !parts.length) return;
  details.dataset.filled = language;
  data.pairs[details.dataset.pair].forEach((pieces, number) => {
    if (!pieces.length) { parts[number].hidden = true; return; }
    parts[number].replaceChildren(parts[number].firstElementChild);  // its heading
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
startLanguage((shown) => {
  language = shown;
  translate(document);
  for (const details of document.querySelectorAll("details[data-pair][open]")) fill(details);
});
openTarget();
