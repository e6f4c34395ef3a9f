// --- counting: no page needed ---
function tally(sides, votes) {  // sides: "ab…", where the policy stands; votes: {number: "a" | "b" | "tie"}
  const sum = { wins: 0, ties: 0, losses: 0, chose_a: 0 };
  [...sides].forEach((side, number) => {
    const vote = votes[number];
    if (!vote) return;
    if (vote === "tie") sum.ties += 1; else if (vote === side) sum.wins += 1; else sum.losses += 1;
    if (vote === "a") sum.chose_a += 1;
  });
  const decided = sum.wins + sum.losses;
  const [low, high] = wilson(sum.wins, decided);
  return { ...sum, voted: decided + sum.ties, win_rate: decided ? sum.wins / decided : null, low, high };
}
function judgeTally(judge) {  // the same sums of what a judge says
  const sum = { wins: 0, ties: 0, losses: 0, unreadable: 0 };
  for (const { outcome } of judge.prompts) sum[PLURAL[outcome]] += 1;
  return sum;
}
const PLURAL = { win: "wins", tie: "ties", loss: "losses", unreadable: "unreadable" };
function score(sum) {  // a tie as half a win, so that votes and verdicts can be compared
  const judged = sum.wins + sum.ties + sum.losses, points = sum.wins + sum.ties / 2;
  const [low, high] = wilson(points, judged);
  return { judged, rate: judged ? points / judged : null, low, high };
}
function agreement(sides, votes, judge) {  // over the items with a vote and a readable verdict; kappa: Cohen 1960
  const kinds = ["win", "tie", "loss"], seen = kinds.map(() => [0, 0, 0]);
  [...sides].forEach((side, number) => {
    const vote = votes[number], said = kinds.indexOf(judge.prompts[number].outcome);
    if (vote && said >= 0) seen[kinds.indexOf(vote === "tie" ? "tie" : vote === side ? "win" : "loss")][said] += 1;
  });
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0), both = sum(seen.map(sum));
  const same = sum(kinds.map((_, i) => seen[i][i]));
  const chance = sum(kinds.map((_, i) => sum(seen[i]) * sum(seen.map((row) => row[i])))) / (both * both);
  return { both, same, share: both ? same / both : null, kappa: both && chance < 1 ? (same / both - chance) / (1 - chance) : null };
}
function wilson(wins, total) {  // 95% interval of a share: Wilson 1927
  if (!total) return [null, null];
  const z = 1.959964, share = wins / total, spread = 1 + z * z / total;
  const middle = (share + z * z / (2 * total)) / spread;
  const half = z * Math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / spread;
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}
function unseal(key) {
  return JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(key), (sign) => sign.charCodeAt(0))));
}
function ballot(data, key, state, date) {  // what "export votes" writes
  const judge = data.judge ? unseal(data.judge) : null;
  const who = (number, letter) => (key.sides[number] === letter ? "policy" : "reference");
  const votes = data.items.map((item, number) => {
    const vote = state.votes[number] || null;
    const winner = vote && (vote === "tie" ? "tie" : who(number, vote));
    const said = judge ? { judge: judge.prompts[number].outcome } : {};
    return { number, prompt: item.prompt, a: who(number, "a"), b: who(number, "b"), vote, winner, ...said };
  });
  const { sides, ...models } = key, sum = judge && judgeTally(judge);
  const said = judge ? { judge: { model: judge.model, ...sum, ...score(sum), agreement: agreement(sides, state.votes, judge) } } : {};
  return { digest: data.digest, exported: date, models, settings: data.settings, revealed: state.revealed,
           summary: tally(sides, state.votes), ...said, votes };
}
// --- words ---
const WORDS = {
  en: {
    title: "Which answer is better?", count: (n, all, voted) => `${n} of ${all}, ${voted} voted`, a: "A", b: "B",
    better: (x) => `${x} is better`, tie: "Tie", previous: "← Back", next: "Next →", reveal: "Reveal", again: "Start over",
    export: "Export votes", cut: "(cut off at the longest length allowed)", empty: "(no answer)",
    confirm: (left) => `${left} not voted on yet. After revealing, no more votes count. Reveal now?`, confirmAgain: "Delete all votes and start over?",
    policy: "policy", reference: "reference", rate: (rate, low, high) => `Policy wins ${rate} (95% interval ${low} to ${high})`,
    none: "No decided vote yet", sums: (w, t, l) => `Policy: wins ${w}, ties ${t}, losses ${l}. Ties are left out of the rate; the interval is Wilson's.`,
    sideA: (a, n) => `A was preferred in ${a} of ${n} decided votes.`, ready: "All voted: press Reveal for the result.",
    unsaved: "This browser cannot store votes: export them before you close the page.",
    head: ["", "wins", "ties", "losses", "win rate, a tie as half"], you: "Votes", judge: (name) => `Judge ${name}`,
    interval: (rate, low, high) => `${rate} (${low} to ${high})`, unreadable: (n) => `Prompts without a readable verdict: ${n}.`,
    agree: (same, both, share) => `Votes and judge agree on ${same} of ${both} prompts with both (${share}).`,
    kappa: (kappa) => ` Cohen's kappa ${kappa}: 1 is always, 0 as chance would.`, never: "No prompt has both a vote and a verdict.",
    said: { win: "policy is better", loss: "reference is better", tie: "tie", unreadable: "no readable verdict" },
    alike: "the same answer twice: a tie, not asked", orders: ["asked with the policy as B, it said", "asked with the policy as A, it said"],
    roles: { user: "User", assistant: "Assistant", system: "System", tool: "Tool" },
  },
  zh: {
    title: "哪个回答更好？", count: (n, all, voted) => `第 ${n} / ${all} 题，已投 ${voted} 票`, a: "A", b: "B",
    better: (x) => `${x} 更好`, tie: "平局", previous: "← 上一题", next: "下一题 →", reveal: "揭晓", again: "重新开始",
    export: "导出投票", cut: "（达到长度上限，被截断）", empty: "（无回答）",
    confirm: (left) => `还有 ${left} 题未投。揭晓后不能再投票。现在揭晓？`, confirmAgain: "删除所有投票并重新开始？",
    policy: "策略模型", reference: "参考模型", rate: (rate, low, high) => `策略模型胜率 ${rate}（95% 区间 ${low} 至 ${high}）`,
    none: "还没有分出胜负的投票", sums: (w, t, l) => `策略模型 ${w} 胜 ${t} 平 ${l} 负。胜率不计平局，区间为 Wilson 区间。`,
    sideA: (a, n) => `${n} 次分出胜负的投票中，A 被选 ${a} 次。`, ready: "已全部投完：点“揭晓”查看结果。",
    unsaved: "此浏览器无法保存投票：关闭页面前请先导出。",
    head: ["", "胜", "平", "负", "胜率（平局计半）"], you: "投票", judge: (name) => `评审模型 ${name}`,
    interval: (rate, low, high) => `${rate}（${low} 至 ${high}）`, unreadable: (n) => `有 ${n} 题的评审回复无法识别。`,
    agree: (same, both, share) => `在 ${both} 道两者都有结论的题中，投票与评审有 ${same} 道一致（${share}）。`,
    kappa: (kappa) => `Cohen's kappa 为 ${kappa}：1 为完全一致，0 相当于随机。`, never: "没有同时有投票和评审结论的题。",
    said: { win: "策略模型更好", loss: "参考模型更好", tie: "平局", unreadable: "无法识别的结论" },
    alike: "两个回答相同：记为平局，未询问", orders: ["策略模型为 B 时的回复", "策略模型为 A 时的回复"],
    roles: { user: "用户", assistant: "助手", system: "系统", tool: "工具" },
  },
};
// --- the page ---
function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  let words = WORDS.en;
  const place = `minidpo-compare-${data.digest}`, all = data.items.length;
  const get = (id) => document.getElementById(id);
  const judge = data.judge ? unseal(data.judge) : null;
  const state = { votes: {}, at: 0, revealed: false };
  load();

  function load() {
    try { Object.assign(state, JSON.parse(localStorage.getItem(place) || "{}")); } catch { warn(); }
  }
  function keep() {
    try { localStorage.setItem(place, JSON.stringify(state)); } catch { warn(); }
  }
  function warn() { get("warning").hidden = false; get("warning").textContent = words.unsaved; }
  function add(parent, tag, text, kind) {
    const element = parent.appendChild(document.createElement(tag));
    element.textContent = text;  // never innerHTML: what a model says is text
    if (kind) element.className = kind;
    return element;
  }
  function go(to) {
    state.at = Math.min(all - 1, Math.max(0, to));
    keep(); draw(); scrollTo(0, 0);
  }
  function vote(choice) {
    if (state.revealed) return;
    state.votes[state.at] = choice;
    go(state.at + 1);
  }
  function reveal() {
    if (state.revealed) {
      if (!confirm(words.confirmAgain)) return;
      Object.assign(state, { votes: {}, at: 0, revealed: false });
    } else {
      const left = all - Object.keys(state.votes).length;
      if (left && !confirm(words.confirm(left))) return;
      state.revealed = true;
    }
    keep(); draw(); scrollTo(0, 0);
  }
  function download() {
    const text = JSON.stringify(ballot(data, unseal(data.key), state, new Date().toISOString()), null, 2) + "\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = `votes-${data.digest.slice(0, 8)}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  function drawCard(letter, key) {
    const item = data.items[state.at], card = get(`card-${letter}`), [head, text, cut] = card.children;
    const side = key && words[key.sides[state.at] === letter ? "policy" : "reference"];
    head.textContent = letter.toUpperCase() + (side ? ` · ${side}` : "");
    text.textContent = item[letter] || words.empty;
    cut.textContent = item[`${letter}_cut`] ? words.cut : "";
    card.classList.toggle("picked", state.votes[state.at] === letter);
  }
  function drawResult(key) {
    const box = get("result"), sum = key && tally(key.sides, state.votes), percent = (share) => `${(100 * share).toFixed(0)}%`;
    box.hidden = !key;
    box.replaceChildren();
    if (!key) return;
    add(box, "p", sum.win_rate === null ? words.none : words.rate(percent(sum.win_rate), percent(sum.low), percent(sum.high)), "rate");
    const bar = add(box, "div", "", "bar");
    if (sum.voted) add(bar, "div", "", "win").style.width = percent(sum.wins / sum.voted);
    if (sum.voted) add(bar, "div", "", "tie").style.width = percent(sum.ties / sum.voted);
    add(box, "p", words.sums(sum.wins, sum.ties, sum.losses));
    add(box, "p", words.sideA(sum.chose_a, sum.wins + sum.losses), "role");
    for (const side of ["policy", "reference"]) add(box, "p", `${words[side]}: ${key[side]}`, "role text");
    if (judge) drawRates(box, key, sum, percent);
    const row = add(box, "div", "", "row");
    add(row, "button", words.again).onclick = reveal;
  }
  function drawRates(box, key, votes, percent) {
    const table = add(add(box, "div", "", "table"), "table", ""), head = add(add(table, "thead", ""), "tr", ""), body = add(table, "tbody", "");
    const said = judgeTally(judge), { both, same, share, kappa } = agreement(key.sides, state.votes, judge);
    for (const heading of words.head) add(head, "th", heading).scope = "col";
    for (const [name, sum] of [[words.you, votes], [words.judge(judge.model), said]]) {
      const row = add(body, "tr", ""), { rate, low, high } = score(sum);
      add(row, "th", name).scope = "row";
      for (const count of [sum.wins, sum.ties, sum.losses]) add(row, "td", count);
      add(row, "td", rate === null ? "–" : words.interval(...[rate, low, high].map(percent)));
    }
    if (said.unreadable) add(box, "p", words.unreadable(said.unreadable), "role");
    add(box, "p", both ? words.agree(same, both, percent(share)) + (kappa === null ? "" : words.kappa(kappa.toFixed(2))) : words.never);
  }
  function drawJudged(key) {  // only once revealed: a verdict would sway the vote
    const box = get("judged"), one = key && judge && judge.prompts[state.at];
    box.hidden = !one;
    box.replaceChildren();
    if (!one) return;
    add(box, "p", `${words.judge(judge.model)}: ${one.replies.length ? words.said[one.outcome] : words.alike}`);
    one.replies.forEach((text, order) => add(box, "p", `${words.orders[order]}: ${text || words.empty}`, "role text").dir = "auto");
  }
  function draw() {
    const voted = Object.keys(state.votes).length, key = state.revealed ? unseal(data.key) : null;
    get("title").textContent = words.title;
    get("count").textContent = words.count(state.at + 1, all, voted) + (voted === all && !key ? ` · ${words.ready}` : "");
    get("done").style.width = `${100 * voted / all}%`;
    get("prompt").replaceChildren();
    for (const turn of data.items[state.at].prompt) {
      const box = add(get("prompt"), "div", "", "turn");
      if (turn.role) add(box, "div", words.roles[turn.role] || turn.role, "role");
      add(box, "div", turn.content, "text").dir = "auto";
    }
    drawResult(key);
    drawJudged(key);
    for (const letter of ["a", "b"]) drawCard(letter, key);
    for (const choice of ["a", "b", "tie"]) {
      get(`vote-${choice}`).setAttribute("aria-pressed", String(state.votes[state.at] === choice));
      get(`vote-${choice}`).disabled = state.revealed;
    }
    get("previous").disabled = state.at === 0;
    get("next").disabled = state.at === all - 1;
    get("reveal").hidden = state.revealed;
  }
  const keys = { 1: () => vote("a"), 2: () => vote("b"), 0: () => vote("tie"), ArrowLeft: () => go(state.at - 1), ArrowRight: () => go(state.at + 1) };
  const labels = () => ({ "vote-a": [words.better("A"), "1"], "vote-b": [words.better("B"), "2"], "vote-tie": [words.tie, "0"],
                          previous: [words.previous], next: [words.next], reveal: [words.reveal], export: [words.export] });
  const actions = { "vote-a": keys[1], "vote-b": keys[2], "vote-tie": keys[0], previous: keys.ArrowLeft, next: keys.ArrowRight, reveal, export: download };
  for (const [id, action] of Object.entries(actions)) get(id).onclick = action;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    if (event.repeat && event.key.length === 1) return;  // a key held down is one vote
    event.preventDefault();
    keys[event.key]();
  });
  startLanguage((language) => {
    words = WORDS[language];
    document.title = words.title;
    for (const [id, [label, shortcut]] of Object.entries(labels())) {
      get(id).textContent = label;
      if (shortcut) add(get(id), "kbd", shortcut);
    }
    if (!get("warning").hidden) warn();
    draw();
  });
}
if (typeof document !== "undefined") start();
