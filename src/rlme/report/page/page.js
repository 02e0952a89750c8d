"use strict";
// Everything shown here came from models or files: text goes in through textContent only, never as markup.
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// ---------------------------------------------------------------- elements and numbers
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key === "class") node.className = value;
    else if (key === "text") node.textContent = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}
function draw(tag, attributes, parent) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (parent) parent.append(node);
  return node;
}
function num(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}
// Characters that would hide or turn text around are shown by name.
const show = text => text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, c => String.fromCodePoint(0x2400 + c.charCodeAt(0)))
  .replace(/[\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff9-\ufffb\u{e0000}-\u{e0fff}]/gu, c => `[U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`);
const probability = p => p > 0.995 && p < 1 ? p.toFixed(4) : num(p);
const colour = index => `var(--c${((index % 8) + 8) % 8})`;

// ---------------------------------------------------------------- theme
const themes = ["system", "light", "dark"];
const dark = matchMedia("(prefers-color-scheme: dark)");
let theme = 0;
function applyTheme() {
  const name = themes[theme] === "system" ? (dark.matches ? "dark" : "light") : themes[theme];
  document.documentElement.dataset.theme = name;
  $("theme").textContent = `Theme: ${themes[theme]}`;
}
$("theme").addEventListener("click", () => { theme = (theme + 1) % 3; applyTheme(); });
dark.addEventListener("change", applyTheme);
applyTheme();

// ---------------------------------------------------------------- overview
$("name").append(data.name, el("small", { text: data.subtitle }));
const tiles = el("div", { class: "tiles" });
for (const tile of data.tiles)
  tiles.append(el("div", { class: "card tile" }, el("div", { class: "label", text: tile.label }),
    el("div", { class: "value", text: tile.value }), el("div", { class: "note", text: tile.note })));
const findings = el("ul", { class: "findings" });
const words = { bad: "Alarm", warn: "Look", good: "Fine", info: "Note" };
for (const finding of data.findings)
  findings.append(el("li", { class: finding.level }, el("b", { text: words[finding.level] }), show(finding.text)));
if (data.tiles.length) $("overview").append(tiles);
if (data.findings.length) $("overview").append(findings);
$("overview").hidden = !$("overview").children.length;

// ---------------------------------------------------------------- charts
const charts = [];
let smoothing = false;
// Mean over nearby steps, weights falling to both sides: no lag, so it lies over the held-out marks.
function smoothed(values) {
  const half = Math.max(2, Math.round(values.length / 40));
  return values.map((_, i) => {
    let sum = 0, weight = 0;
    for (let k = Math.max(0, i - half); k <= Math.min(values.length - 1, i + half); k++) { const w = half + 1 - Math.abs(k - i); sum += w * values[k]; weight += w; }
    return sum / weight;
  });
}
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 2.5, 5, 10].find(u => u * power >= rough) * power;
  const result = [];
  for (let t = Math.ceil(low / unit - 1e-9) * unit; t <= high + unit * 1e-6; t += unit) result.push(Math.abs(t) < unit * 1e-6 ? 0 : t);
  return result;
}
// All digits that tell a tick from its neighbour: 39.25, where three significant ones would say 39.3.
function tickLabel(t, all) {
  const unit = all.length > 1 ? all[1] - all[0] : Math.abs(t);
  let digits = 0;
  while (digits < 5 && Math.abs(unit * 10 ** digits - Math.round(unit * 10 ** digits)) > 1e-6) digits++;
  return digits > 4 || Math.abs(t) >= 1000 ? num(t) : String(Number(t.toFixed(digits)));
}
function makeChart(spec) {
  const svg = draw("svg", { tabindex: "0", role: "img" });
  const legend = el("div", { class: "legend" });
  const root = el("figure", { class: "card chart", style: null }, el("h3", { text: spec.title }), el("p", { class: "note", text: show(spec.note) }), svg, legend);
  root.style.margin = "0";
  const hidden = new Set();
  const chart = { root, svg, at: null };
  const visible = () => spec.series.filter((_, i) => !hidden.has(i));
  spec.series.forEach((line, i) => {
    const swatch = draw("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" });
    draw("line", { x1: 0, x2: 22, y1: 5, y2: 5, "stroke-width": 2.5, stroke: colour(line.group ?? i), "stroke-dasharray": line.dashed ? "5 3" : "none" }, swatch);
    if (line.points) draw("circle", { cx: 11, cy: 5, r: 4, fill: colour(line.group ?? i) }, swatch);
    const button = el("button", { type: "button", "aria-pressed": "true", onclick: () => {
      hidden.has(i) ? hidden.delete(i) : hidden.add(i);
      button.setAttribute("aria-pressed", String(!hidden.has(i)));
      chart.paint();
    } }, swatch, line.name, el("span", { class: "now", text: num(line.values.at(-1)) }));
    legend.append(button);
  });
  const last = spec.series.map(s => `${s.name} ${num(s.values[0])} to ${num(s.values.at(-1))}`).join("; ");
  svg.setAttribute("aria-label", `${spec.title}: ${last}`);
  const allSteps = [...new Set(spec.series.flatMap(s => s.steps))].sort((a, b) => a - b);

  chart.paint = () => {
    const width = Math.max(260, svg.clientWidth || root.clientWidth - 30 || 380), height = 178;
    const left = 46, right = 12, top = 18, bottom = 22;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    const lines = visible();
    const values = lines.flatMap(s => s.band ? [...s.band[0], ...s.band[1]] : s.values);
    let low = Infinity, high = -Infinity;
    for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
    if (!values.length) { low = 0; high = 1; }
    if (spec.share) { low = Math.min(0, low); high = high > 0.62 ? Math.max(1, high) : Math.max(0.1, high * 1.15); }
    else { const pad = (high - low) * 0.07 || Math.abs(high) * 0.1 || 1; low -= pad; high += pad; }
    const first = data.first_step ?? allSteps[0] ?? 0, end = Math.max(data.last_step ?? 0, allSteps.at(-1) ?? 0, first + 1);
    const x = step => left + (step - first) / (end - first) * (width - left - right);
    const y = value => height - bottom - (value - low) / (high - low) * (height - top - bottom);
    const levels = ticks(low, high, 4);
    for (const t of levels) {
      draw("line", { class: "grid", x1: left, x2: width - right, y1: y(t), y2: y(t) }, svg);
      draw("text", { class: "axis", x: left - 6, y: y(t) + 4, "text-anchor": "end" }, svg).textContent = tickLabel(t, levels);
    }
    for (const t of ticks(first, end, Math.max(2, Math.min(6, width / 90)))) if (Number.isInteger(t))
      draw("text", { class: "axis", x: x(t), y: height - 6, "text-anchor": t === end ? "end" : "middle" }, svg).textContent = t;
    for (const mark of data.marks) {
      if (mark.step < first) continue;
      draw("line", { class: `${mark.kind}-line`, x1: x(mark.step), x2: x(mark.step), y1: mark.kind === "alarm" ? 3 : top, y2: height - bottom }, svg);
      const leftward = x(mark.step) > width - 90;
      draw("text", { class: `${mark.kind}-text`, x: x(mark.step) + (leftward ? -4 : 4), y: mark.kind === "alarm" ? 11 : height - bottom - 4, "text-anchor": leftward ? "end" : "start" }, svg).textContent = mark.label;
    }
    const path = (steps, ys) => steps.map((s, i) => `${i ? "L" : "M"}${x(s).toFixed(1)} ${y(ys[i]).toFixed(1)}`).join("");
    spec.series.forEach((line, i) => {
      if (hidden.has(i)) return;
      const stroke = colour(line.group ?? i), smooth = smoothing && !line.points && line.values.length > 5;
      const even = values => smooth ? smoothed(values) : values;
      if (line.band) draw("path", { class: "band", fill: stroke, d: path(line.steps, even(line.band[1])) + path([...line.steps].reverse(), [...even(line.band[0])].reverse()).replace("M", "L") + "Z" }, svg);
      if (smooth && !line.band) draw("path", { class: "raw", stroke, d: path(line.steps, line.values) }, svg);
      draw("path", { class: "smooth", stroke, "stroke-dasharray": line.dashed ? "5 3" : "none", "stroke-width": line.points ? 1.5 : 2, d: path(line.steps, even(line.values)) }, svg);
      if (line.points || line.values.length === 1) for (let k = 0; k < line.values.length; k++)
        draw("circle", { cx: x(line.steps[k]), cy: y(line.values[k]), r: line.values.length > 60 ? 2 : 3.4, fill: stroke, stroke: "var(--card)", "stroke-width": 1.2 }, svg);
    });
    chart.cross = draw("line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" }, svg);
    chart.x = x;
    chart.stepAt = px => { const want = first + (px / svg.clientWidth * width - left) / (width - left - right) * (end - first);
      return allSteps.reduce((a, b) => Math.abs(b - want) < Math.abs(a - want) ? b : a, allSteps[0]); };
  };
  chart.mark = step => {
    if (!chart.cross) return;
    chart.cross.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) { chart.cross.setAttribute("x1", chart.x(step)); chart.cross.setAttribute("x2", chart.x(step)); }
  };
  chart.tip = step => {
    const tip = $("tip");
    tip.replaceChildren(el("b", { text: `step ${step}` }));
    spec.series.forEach((line, i) => {
      const k = line.steps.indexOf(step);
      if (k < 0 || hidden.has(i)) return;
      const dot = el("span", { class: "dot" }); dot.style.background = colour(line.group ?? i);
      tip.append(el("div", {}, dot, line.name, el("span", { class: "v", text: num(line.values[k]) })));
    });
    const box = svg.getBoundingClientRect(), px = box.left + chart.x(step) / svg.viewBox.baseVal.width * box.width;
    tip.style.display = "block";
    const flip = px + tip.offsetWidth + 24 > innerWidth;
    tip.style.left = `${Math.max(4, scrollX + (flip ? px - tip.offsetWidth - 12 : px + 12))}px`;
    tip.style.top = `${scrollY + box.top + 10}px`;
  };
  const point = step => { chart.at = step; for (const other of charts) other.mark(step); chart.tip(step); };
  const leave = () => { for (const other of charts) other.mark(null); $("tip").style.display = "none"; };
  svg.addEventListener("pointermove", event => point(chart.stepAt(event.clientX - svg.getBoundingClientRect().left)));
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("click", event => {  // a tap comes without a move before it
    const step = chart.stepAt(event.clientX - svg.getBoundingClientRect().left);
    point(step);
    openStep(step);
  });
  svg.addEventListener("keydown", event => {
    const k = allSteps.indexOf(chart.at ?? allSteps.at(-1));
    const to = { ArrowLeft: k - 1, ArrowRight: k + 1, Home: 0, End: allSteps.length - 1 }[event.key];
    if (to !== undefined) { event.preventDefault(); event.stopPropagation(); point(allSteps[Math.max(0, Math.min(allSteps.length - 1, to))]); }
    else if (event.key === "Enter" && chart.at !== null) { event.preventDefault(); openStep(chart.at); }
  });
  return chart;
}
function paintAll() { for (const chart of charts) if (chart.root.offsetParent !== null) chart.paint(); }
for (const spec of data.charts) {
  const chart = makeChart(spec);
  charts.push(chart);
  (spec.minor ? $("minor-charts") : $("charts")).append(chart.root);
}
$("curves").hidden = !data.charts.length;
$("hint-click").hidden = !data.groups.length;
$("minor").hidden = !data.charts.some(c => c.minor);
$("minor").addEventListener("toggle", paintAll);
smoothing = data.smooth;
$("smooth").checked = smoothing;
$("smooth").addEventListener("change", () => { smoothing = $("smooth").checked; paintAll(); });
let lastWidth = 0;
new ResizeObserver(() => { const w = document.documentElement.clientWidth; if (w !== lastWidth) { lastWidth = w; paintAll(); } }).observe(document.body);
addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("#minor, #settings details")) d.open = true; });

// ---------------------------------------------------------------- tables, time and tokens, settings
function table(spec) {
  const numeric = spec.numeric ?? [];
  const parts = text => show(text).split(/(?<=[.=_,/])(?!\d)/).flatMap((part, i) => i ? [el("wbr"), part] : [part]);  // where long names may break
  const head = el("tr", {}, ...spec.head.map((h, i) => el("th", { class: `${numeric.includes(i) ? "n" : ""}${h.length > 12 ? " long" : ""}`, scope: "col" }, ...parts(h))));
  const body = spec.rows.map(row => el("tr", {}, ...row.map((c, i) => numeric.includes(i) ? el("td", { class: "n", text: show(c) }) : el("td", { class: c.length > 60 ? "long" : "" }, ...parts(c)))));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)));
}
for (const spec of data.tables)
  $("tables").append(el("h2", { text: spec.title }), el("p", { class: "note", text: spec.note }), el("div", { class: "card" }, table(spec)));
for (const spend of data.spending) {
  const bar = el("div", { class: "stack", role: "img", "aria-label": spend.rows.map(r => `${r[0]} ${r[1]}`).join(", ") });
  const rows = el("tbody");
  spend.rows.forEach(([name, value, share, note], i) => {
    if (share !== null) { const part = el("div", { title: `${name}: ${value}` }); part.style.width = `${share * 100}%`; part.style.background = colour(i); bar.append(part); }
    const dot = share === null ? null : el("span", { class: "dot" });
    if (dot) dot.style.background = colour(i);
    rows.append(el("tr", {}, el("td", {}, dot, name), el("td", { class: "n", text: value }), el("td", { class: "n", text: share === null ? "" : `${(share * 100).toFixed(1)} %` }), el("td", { class: "n", text: note })));
  });
  $("spending-cards").append(el("div", { class: "card" }, el("h3", { text: spend.title }), bar.children.length ? bar : null, el("div", { class: "scroll" }, el("table", {}, rows))));
  $("spending").hidden = false;
}
for (const setting of data.settings) {
  $("settings-cards").append(el("div", { class: "card" }, el("h3", { text: setting.title }),
    setting.text !== undefined ? el("pre", { text: show(setting.text) }) : table({ head: ["", ""], rows: setting.rows })));
  $("settings").hidden = false;
}
$("foot").textContent = data.footer;

// ---------------------------------------------------------------- samples
const groups = data.groups;
const state = { heldout: false, step: null, index: null, filter: "", text: "", limit: 25 };
const inSet = () => groups.filter(g => g.heldout === state.heldout);
const stepsOf = () => [...new Set(inSet().map(g => g.step))];
const promptsOf = step => inSet().filter(g => g.step === step).map(g => g.index);
const longest = groups.reduce((m, g) => g.rows.reduce((n, r) => Math.max(n, r.chars), m), 1);

function options(select, values, label, current) {
  select.replaceChildren(...values.map(v => { const o = el("option", { value: v, text: label(v) }); o.selected = String(v) === String(current); return o; }));
}
function nearest(values, want) { return values.reduce((a, b) => Math.abs(b - want) < Math.abs(a - want) ? b : a, values[0]); }
function openStep(step) {
  if (!groups.length) return;
  Object.assign(state, { filter: "", text: "", step: nearest(stepsOf(), step), index: null });
  $("search").value = "";
  render();
  $("samples").scrollIntoView();
}
function judgedTable(row) {
  const body = row.judged.map(([evaluator, question, p, score, mass, failure, detail, , weight, bounded]) => {
    const name = weight === 0 ? `${evaluator} (weight 0)` : evaluator;
    if (failure !== null || p === null)
      return el("tr", {}, el("td", { text: name }), el("td", { text: question }), el("td", { class: "failed", colspan: "3", text: show(`failed: ${failure ?? "no number"}${detail ? " – " + detail : ""}`) }));
    const bar = el("div"); bar.style.width = `${p * 100}%`; if (weight !== 0) bar.style.background = "var(--c0)";
    return el("tr", {}, el("td", { text: name }), el("td", { text: question }), el("td", {}, el("div", { class: "p" }, el("span", bounded ? { text: `${probability(p)} *`, title: "the server did not return a label: an upper bound stands in for it" } : { text: probability(p) }), el("div", { class: "meter" }, bar))),
      el("td", { class: "n", text: num(score) }), el("td", { class: "n", text: mass === null ? "" : num(mass) }));
  });
  if (!body.length) return null;
  return el("table", { class: "judged" }, el("thead", {}, el("tr", {}, ...["evaluator", "question", "p(target)", "score", "mass"].map((h, i) => el("th", { class: i > 2 ? "n" : "", scope: "col", text: h })))), el("tbody", {}, ...body));
}
function marked(text, needle) {  // the text with what was searched for marked, as text nodes
  const pre = el("pre", { tabindex: "0" }), shown = show(text);
  if (!needle) { pre.textContent = shown; return pre; }
  const low = shown.toLowerCase();
  let from = 0;
  for (let at = low.indexOf(needle); at >= 0; at = low.indexOf(needle, from)) {
    pre.append(shown.slice(from, at), el("mark", { text: shown.slice(at, at + needle.length) }));
    from = at + needle.length;
  }
  pre.append(shown.slice(from));
  return pre;
}
function card(group, row, place, mean) {
  const side = el("div", { class: "side" });
  side.append(el("div", {}, el("div", { class: "reward", text: row.reward === null ? "no reward" : num(row.reward) }),
    row.advantage === null ? null : el("div", { class: "note", text: `advantage ${row.advantage > 0 ? "+" : ""}${num(row.advantage)}` })));
  const chips = el("div", { class: "chips" });
  if (row.correct === true) chips.append(el("span", { class: "chip right", text: show(`✓ right: ${row.answer ?? ""}`) }));
  if (row.correct === false) chips.append(el("span", { class: "chip wrong", text: show(`✗ wrong: ${row.answer ?? "no answer"}`) }), el("span", { class: "chip", text: show(`gold: ${row.gold ?? ""}`) }));
  if (row.anchored) chips.append(el("span", { class: "chip", text: "anchored" }));
  for (const key of row.marks) chips.append(el("span", { class: "chip mark", text: data.mark_names[key] }));
  const meter = el("div", { class: "meter" }), bar = el("div");
  bar.style.width = `${row.chars / longest * 100}%`;
  meter.append(bar);
  const difference = Math.round(row.chars - mean), single = group.rows.length < 2;
  side.append(chips, el("div", {}, el("div", { class: "note", text: `${row.chars.toLocaleString("en")} characters${single ? "" : ` (${difference >= 0 ? "+" : "−"}${Math.abs(difference).toLocaleString("en")} to the group's mean)`}, ${row.tokens ?? "?"} tokens` }), meter));
  const text = el("div", { class: "text" }, marked(row.text, state.text));
  const body = el("div", {}, text, judgedTable(row));
  for (const [evaluator, question, , , , , , critique] of row.judged)
    if (critique) body.append(el("details", { class: "critique" }, el("summary", { text: `critique by ${evaluator} on ${question}` }), el("pre", { text: show(critique) })));
  const node = el("article", { class: `card sample${place === 0 && row.reward !== null && group.rows.length > 1 ? " best" : ""}`, "aria-label": `answer ${place + 1} of ${group.rows.length}, step ${group.step}, prompt ${group.index}` }, side, body);
  return { node, fit: () => { const pre = text.firstChild; if (pre.scrollHeight > pre.clientHeight + 4) text.append(el("button", { type: "button", class: "no-print", text: "Show all of it", onclick: e => { text.classList.add("whole"); e.target.remove(); } })); } };
}
const meanChars = group => group.rows.reduce((sum, r) => sum + r.chars, 0) / group.rows.length;
function promptCard(group, open) {
  return el("details", { class: "card prompt", open }, el("summary", { text: `Prompt ${group.index}, step ${group.step}${group.heldout ? ", held out" : ""}` }), marked(group.prompt, state.text));
}
function matches(group, row) {
  return (!state.filter || row.marks.includes(state.filter)) && (!state.text || row.text.toLowerCase().includes(state.text)
    || (row.answer ?? "").toLowerCase().includes(state.text) || group.prompt.toLowerCase().includes(state.text));
}
function render() {
  const steps = stepsOf();
  if (!steps.includes(state.step)) state.step = nearest(steps, state.step ?? Infinity) ?? steps.at(-1);
  const prompts = promptsOf(state.step);
  if (!prompts.includes(state.index)) state.index = prompts[0];
  options($("set"), [...new Set(groups.map(g => String(g.heldout)))], v => v === "true" ? "held-out prompts" : "training", state.heldout);
  options($("step"), steps, v => v, state.step);
  options($("prompt"), prompts, v => v, state.index);
  options($("filter"), ["", ...Object.keys(data.mark_names)], v => v ? data.mark_names[v] : "all answers to a prompt", state.filter);
  const list = Boolean(state.filter || state.text);
  for (const id of ["step-back", "step-on", "prompt-back", "prompt-on", "step", "prompt"]) $(id).disabled = list;
  const box = $("browser"), cards = [];
  box.replaceChildren();
  if (!list) {
    const at = steps.indexOf(state.step), p = prompts.indexOf(state.index);
    $("step-back").disabled = at <= 0; $("step-on").disabled = at >= steps.length - 1;
    $("prompt-back").disabled = p <= 0; $("prompt-on").disabled = p >= prompts.length - 1;
    const group = inSet().find(g => g.step === state.step && g.index === state.index);
    const known = group.rows.filter(r => r.reward !== null), right = group.rows.filter(r => r.correct === true).length;
    const gold = group.rows.some(r => r.correct !== null) ? `, ${right} right` : "";
    const spread = known.length > 1 ? `, rewards from ${num(known.at(-1).reward)} to ${num(known[0].reward)}` : "";
    $("found").textContent = `${group.rows.length} answer${group.rows.length === 1 ? "" : "s"}, the best-rewarded first${gold}${spread}.`;
    box.append(promptCard(group, true));
    group.rows.forEach((row, i) => cards.push(card(group, row, i, meanChars(group))));
    box.append(...cards.map(c => c.node));
  } else {
    const hits = inSet().flatMap(g => g.rows.map((r, i) => [g, r, i])).filter(([g, r]) => matches(g, r));
    $("found").textContent = hits.length ? `${hits.length.toLocaleString("en")} answers found, from all steps shown here.` : "Nothing found.";
    for (const [group, row, i] of hits.slice(0, state.limit)) {
      const c = card(group, row, i, meanChars(group));
      cards.push(c);
      const to = el("button", { type: "button", class: "no-print", text: `Its whole group (step ${group.step}, prompt ${group.index})`, onclick: () => {
        Object.assign(state, { filter: "", text: "", step: group.step, index: group.index }); $("search").value = ""; render(); $("samples").scrollIntoView(); } });
      box.append(promptCard(group, false), c.node, el("div", {}, to));
    }
    if (hits.length > state.limit) box.append(el("button", { type: "button", text: `Show more (${hits.length - state.limit} left)`, onclick: () => { state.limit += 25; render(); } }));
  }
  for (const c of cards) c.fit();
}
function move(kind, by) {
  if (state.filter || state.text) return;
  const values = kind === "step" ? stepsOf() : promptsOf(state.step), key = kind === "step" ? "step" : "index";
  const to = values[values.indexOf(state[key]) + by];
  if (to !== undefined) { const place = promptsOf(state.step).indexOf(state.index); state[key] = to; if (kind === "step") state.index = promptsOf(to)[Math.min(place, promptsOf(to).length - 1)]; render(); }
}
if (groups.length) {
  $("samples").hidden = false;
  $("rule").textContent = data.rule;
  state.heldout = groups.every(g => g.heldout);
  const alarm = data.marks.find(m => m.kind === "alarm");
  state.step = nearest(stepsOf(), alarm ? alarm.step : Infinity) ?? null;
  if (!alarm) state.step = stepsOf().at(-1);
  $("set").addEventListener("change", e => { state.heldout = e.target.value === "true"; state.limit = 25; render(); });
  $("step").addEventListener("change", e => { state.step = Number(e.target.value); render(); });
  $("prompt").addEventListener("change", e => { state.index = Number(e.target.value); render(); });
  $("filter").addEventListener("change", e => { state.filter = e.target.value; state.limit = 25; render(); });
  let waiting = 0;
  $("search").addEventListener("input", e => { clearTimeout(waiting); waiting = setTimeout(() => { state.text = e.target.value.trim().toLowerCase(); state.limit = 25; render(); }, 120); });
  for (const [id, kind, by] of [["step-back", "step", -1], ["step-on", "step", 1], ["prompt-back", "prompt", -1], ["prompt-on", "prompt", 1]]) $(id).addEventListener("click", () => move(kind, by));
  $("keys").addEventListener("click", () => $("help").showModal());
  $("help-close").addEventListener("click", () => $("help").close());
  addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) && event.target.type !== "checkbox";
    if (event.key === "Escape") { Object.assign(state, { filter: "", text: "" }); $("search").value = ""; event.target.blur?.(); render(); return; }
    if (typing) return;
    const filters = ["", ...Object.keys(data.mark_names)];
    const act = { ArrowLeft: () => move("step", -1), ArrowRight: () => move("step", 1), k: () => move("prompt", -1), j: () => move("prompt", 1), "/": () => $("search").focus(), "?": () => $("help").showModal(),
      f: () => { state.filter = filters[(filters.indexOf(state.filter) + 1) % filters.length]; state.limit = 25; render(); } }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  render();
}
for (const section of document.querySelectorAll("main > section")) {
  const title = section.querySelector("h2");
  if (!section.hidden && title) document.querySelector("nav").append(el("a", { href: `#${section.id}`, text: title.textContent }));
}
})();
