// The board of runs. Texts from records reach the page by textContent alone, and attributes that hold code are never set.
"use strict";

const read = id => JSON.parse(document.getElementById(id).textContent);
const board = read("board");      // what the table shows: columns by key, of all runs
const details = read("details");  // id of a run -> its curves, answers, rows; the other runs' are in files
const MOST = 8;                   // runs compared at once
const PAGE = 25;                  // rows of the table shown at once
const SMOOTHED = 20;              // points that a curve needs to be smoothed: an evaluation's few points stay as they are
const FIRST_CURVES = ["loss", "eval_loss", "eval_mean_token_accuracy", "eval_implicit_accuracy", "implicit_accuracy",
  "chosen_log_ratio", "grad_norm", "learning_rate"];
const state = {q: "", stage: "", status: "", sort: "-started", page: 0, columns: [...board.shown], runs: [],
  curves: [], smooth: 0, axis: "step", log: false, differ: true, set: ""};

// -- elements

function el(tag, attributes, ...children) {
  const node = tag === "svg" || el.svg.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) node.append(child);
  return node;
}
el.svg = new Set(["path", "line", "text", "g", "circle"]);

const main = document.getElementById("main");
const table = (head, rows, options = {}) => el("div", {class: "wide" + (options.low ? " low" : ""), tabindex: "0", role: "region", "aria-label": options.label || "table"},
  el("table", {class: options.facts ? "facts" : options.sides ? "sides" : undefined}, head.length ? el("thead", {}, el("tr", {}, head)) : null, el("tbody", {}, rows)));
const column = text => el("th", {scope: "col"}, text);

function shown(value) {
  if (value === undefined || value === null) return "";
  if (typeof value === "number") {
    if (Number.isInteger(value)) return Math.abs(value) < 10000 ? String(value) : value.toLocaleString("en");
    return String(+value.toPrecision(Math.abs(value) < 1e4 ? 4 : 7));
  }
  return typeof value === "string" ? value : JSON.stringify(value);
}

function cell(value, options = {}) {
  const number = typeof value === "number", text = shown(value);
  const exact = number ? String(value) : text.length > 90 ? text.slice(0, 2000) : undefined;
  const short = !options.whole && text.length > 90 ? text.slice(0, 55) + " … " + text.slice(-30) : text;
  return el("td", {class: number ? "number" : text.length > 28 ? "text" : "text short", title: exact}, short);
}

const facts = (pairs, label) => table([], pairs.map(([name, value]) => el("tr", {}, el("th", {scope: "row"}, name), cell(value, {whole: true}))), {facts: true, low: pairs.length > 14, label});
const badge = status => el("span", {class: "status " + (board.states.includes(status) ? status : "")}, status || "unknown");
const named = key => key.replace(/^config\./, "");
const section = (title, ...children) => el("section", {}, el("h2", {}, title), children);

// -- values of runs

function value(key, i) {
  const c = board.columns[key];
  return c && c.i[i] >= 0 ? c.v[c.i[i]] : undefined;
}

const keys = Object.keys(board.columns);
function findKey(word) { // the key itself, or the shortest that ends with .word; settings before the last values of metrics
  if (board.columns[word]) return word;
  const ends = keys.filter(k => k.endsWith("." + word)), cost = k => k.length + (k.startsWith("last.") ? 1000 : 0);
  return ends.length ? ends.reduce((a, b) => cost(b) < cost(a) ? b : a) : null;
}
function label(key) { // the shortest end of a key that means this key
  const parts = key.split(".");
  for (let n = parts.length - 1; n > 0; n--) { const end = parts.slice(n).join("."); if (findKey(end) === key) return end; }
  return key;
}

const byPath = new Map();
for (let i = 0; i < board.count; i++) byPath.set(value("path", i), i);
const words = []; // of each run, for the search
for (let i = 0; i < board.count; i++)
  words.push(["path", "stage", "status", "overrides", "summary", "damage"].map(k => shown(value(k, i))).join(" ").toLowerCase());

const COMPARE = {
  "=": (a, b) => a === b, "!=": (a, b) => a !== b, ">": (a, b) => a > b, "<": (a, b) => a < b, ">=": (a, b) => a >= b, "<=": (a, b) => a <= b,
};

function readFilter(text) { // words and key=value, key>number, key~text; the test of a run, and what cannot be understood
  const tests = [];
  for (const raw of text.match(/(?:[^\s"]|"[^"]*"?)+/g) || []) {
    const term = raw.replaceAll('"', "");
    const parts = term.match(/^([^=<>!~]+)(>=|<=|!=|=|>|<|~)(.*)$/);
    if (!parts) { tests.push(i => words[i].includes(term.toLowerCase())); continue; }
    const [, word, sign, wanted] = parts, key = findKey(word);
    if (!key) return {error: `No run records ${word}.`};
    if (sign === "~") { tests.push(i => shown(value(key, i)).toLowerCase().includes(wanted.toLowerCase())); continue; }
    const number = wanted.trim() === "" ? NaN : Number(wanted);
    if ("<>".includes(sign[0]) && Number.isNaN(number) && key !== "started") return {error: `${term}: after ${sign} comes a number.`};
    tests.push(i => {
      const here = value(key, i);
      if (typeof here === "number" && !Number.isNaN(number)) return COMPARE[sign](here, number);
      if ("<>".includes(sign[0])) return key === "started" && typeof here === "string" && COMPARE[sign](here, wanted);
      const text = typeof here === "string" ? here : here === undefined ? "" : JSON.stringify(here);
      return COMPARE[sign](text.toLowerCase(), wanted.toLowerCase());
    });
  }
  return {test: i => tests.every(t => t(i))};
}

function foundRuns() { // numbers of the runs that the filter leaves, in order; or an error
  const filter = readFilter(state.q), out = [];
  if (filter.error) return filter;
  for (let i = 0; i < board.count; i++)
    if ((!state.stage || value("stage", i) === state.stage) && (!state.status || value("status", i) === state.status) && filter.test(i)) out.push(i);
  const key = state.sort.replace(/^-/, ""), sign = state.sort.startsWith("-") ? -1 : 1;
  const rank = v => v === undefined || v === null || v === "" ? 2 : typeof v === "number" ? 0 : 1;
  out.sort((a, b) => {
    const x = value(key, a), y = value(key, b), order = rank(x) - rank(y);
    if (order) return order; // runs without the value come last in both orders
    return rank(x) === 2 ? 0 : sign * (rank(x) === 0 ? x - y : shown(x).localeCompare(shown(y), "en", {numeric: true}));
  });
  return {runs: out};
}

// -- where the reader is: in the address, so that it can be kept and sent

function readAddress() {
  const p = new URLSearchParams(location.hash.slice(1));
  for (const k of ["q", "stage", "status", "sort", "axis", "set"]) if (p.has(k)) state[k] = p.get(k);
  if (p.has("columns")) state.columns = p.getAll("columns").filter(k => board.columns[k]);
  if (p.has("curves")) state.curves = p.getAll("curves");
  if (p.has("smooth")) state.smooth = Math.min(.99, Math.max(0, Number(p.get("smooth")) || 0));
  if (p.has("log")) state.log = true;
  state.runs = p.getAll("runs").map(path => byPath.get(path)).filter(i => i !== undefined).slice(0, MOST);
  return p.get("run");
}

let open = null; // path of the run whose page is shown
function address() {
  const p = new URLSearchParams();
  if (open !== null) p.set("run", open);
  for (const k of ["q", "stage", "status", "set"]) if (state[k]) p.set(k, state[k]);
  if (state.sort !== "-started") p.set("sort", state.sort);
  if (state.axis !== "step") p.set("axis", state.axis);
  if (state.smooth) p.set("smooth", state.smooth);
  if (state.log) p.set("log", "1");
  if (state.columns.join() !== board.shown.join()) for (const k of state.columns) p.append("columns", k);
  for (const k of state.curves) p.append("curves", k);
  for (const i of state.runs) p.append("runs", value("path", i));
  return "#" + p;
}

function writeAddress() {
  try { history.replaceState(null, "", address()); } catch { /* a frame without an address of its own */ }
}

function link(i, ...children) { // to the page of a run
  const hash = "#" + new URLSearchParams([["run", value("path", i)], ...state.runs.map(j => ["runs", value("path", j)])]);
  return el("a", {href: hash, click: e => { if (!e.ctrlKey && !e.metaKey) { e.preventDefault(); location.hash = hash; } }}, children);
}

// -- details of a run: in the page, or in a file that is loaded when it is needed

const waiting = {};
window.boardDetails = (id, data) => { details[id] = data; };
function loadDetails(i) {
  const id = board.ids[i];
  if (details[id]) return Promise.resolve(details[id]);
  waiting[id] ||= new Promise(done => {
    const end = () => { delete waiting[id]; done(details[id] || null); };
    document.head.append(el("script", {src: `data/${id}.js`, load: end, error: end}));
  });
  return waiting[id];
}
const NOT_LOADED = "The file with the details of this run could not be loaded: open the folder's index.html itself, or use post-training board --serve.";

// -- the table

function option(name, label, current) { return el("option", {value: name, selected: name === current}, label); }
function choices(key, all) {
  const counts = new Map();
  for (let i = 0; i < board.count; i++) { const v = value(key, i); if (v) counts.set(v, (counts.get(v) || 0) + 1); }
  const select = el("select", {id: key, change: e => { state[key] = e.target.value; state.page = 0; drawTable(); }}, option("", all, state[key]),
    [...counts].sort().map(([v, n]) => option(v, `${v} (${n})`, state[key])));
  return el("label", {}, key, select);
}

let tableArea, compareArea, barArea, message;
function drawBoard() {
  document.title = "Runs";
  let later;
  const search = el("input", {id: "q", type: "search", value: state.q, autocomplete: "off", spellcheck: "false", placeholder: "words, accuracy>0.6, learning_rate=0.001",
    input: e => { clearTimeout(later); later = setTimeout(() => { state.q = e.target.value; state.page = 0; drawTable(); }, 120); }});
  const list = el("datalist", {id: "keys"});
  const add = el("input", {id: "add", list: "keys", autocomplete: "off", placeholder: "any recorded key",
    focus: () => { if (!list.childElementCount) list.append(...keys.filter(k => !state.columns.includes(k)).map(k => el("option", {value: k}))); },
    change: e => {
      const key = findKey(e.target.value.trim());
      if (!key) { message.textContent = e.target.value.trim() ? `No run records ${e.target.value.trim()}.` : ""; return; }
      if (!state.columns.includes(key)) state.columns.unshift(key);
      e.target.value = "";
      drawTable();
    }});
  message = el("p", {class: "error", role: "status"});
  tableArea = el("div");
  barArea = el("div", {class: "below"});
  compareArea = el("div", {id: "compare"});
  main.replaceChildren(
    el("div", {class: "controls", role: "search"}, el("label", {class: "grow"}, "filter", search), choices("stage", "all stages"), choices("status", "all states"),
      el("label", {}, "add a column", add), list),
    el("details", {class: "quiet"}, el("summary", {}, "How to filter"), el("p", {}, "Words occur in the name, the stage, the typed overrides or the summary. " +
      "key=value, key!=value, key>number, key<=number and key~text look at a recorded key; the end of a key is enough: accuracy>0.6, learning_rate=0.001, started>2026-11. " +
      "Parts are joined by spaces, and all of them must hold. Text with spaces stands in quotation marks. A click on the head of a column sorts.")),
    message, tableArea, barArea, compareArea);
  drawTable();
  drawCompare();
}

function drawTable() {
  writeAddress();
  const found = foundRuns();
  message.textContent = found.error || "";
  const runs = found.runs || [], pages = Math.max(1, Math.ceil(runs.length / PAGE));
  state.page = Math.min(state.page, pages - 1);
  const sortKey = state.sort.replace(/^-/, ""), down = state.sort.startsWith("-");
  const head = [el("th", {scope: "col"}, el("span", {class: "quiet"}, "✓")), ...["name", ...state.columns].map(key => {
    const mine = sortKey === key, number = runs.some(i => typeof value(key, i) === "number");
    return el("th", {scope: "col", class: number ? "number" : undefined, "aria-sort": mine ? (down ? "descending" : "ascending") : undefined},
      el("button", {class: "plain", title: `sort by ${key}`, "data-key": key, click: () => {
        state.sort = mine ? (down ? key : "-" + key) : number || key === "started" ? "-" + key : key;
        state.page = 0;
        drawTable();
        tableArea.querySelector(`[data-key="${CSS.escape(key)}"]`).focus();
      }}, label(key) + (mine ? (down ? " ↓" : " ↑") : "")),
      key === "name" || board.shown.includes(key) ? null : el("button", {class: "plain", "aria-label": `remove the column ${key}`, click: () => {
        state.columns = state.columns.filter(k => k !== key);
        drawTable();
      }}, "×"));
  })];
  const rows = runs.slice(state.page * PAGE, (state.page + 1) * PAGE).map(i => {
    const name = value("name", i), chosen = state.runs.includes(i);
    const box = el("input", {type: "checkbox", "aria-label": `choose ${name}`, change: e => choose(i, e.target.checked, e.target)});
    box.checked = chosen;
    return el("tr", {class: chosen ? "chosen" : undefined}, el("td", {class: "pick"}, box), el("td", {class: "name"}, link(i, name)),
      state.columns.map(key => key === "status" ? el("td", {title: shown(value("damage", i)) || undefined}, badge(value(key, i)))
        : cell(key === "started" ? shown(value(key, i)).replace("T", " ") : value(key, i))));
  });
  const turn = (label, by, off) => el("button", {disabled: off, "aria-label": label, click: () => { state.page += by; drawTable(); }}, by < 0 ? "←" : "→");
  tableArea.replaceChildren(rows.length ? table(head, rows, {label: "runs"}) : el("p", {class: "quiet", role: "status"}, board.count ? "No run fits the filter." : `There are no runs in ${board.root}.`),
    el("div", {class: "controls"}, el("span", {class: "quiet", role: "status"}, `${runs.length.toLocaleString("en")} of ${board.count.toLocaleString("en")} runs`),
      pages > 1 ? el("span", {class: "pages"}, turn("previous page", -1, state.page === 0), `page ${state.page + 1} of ${pages}`, turn("next page", 1, state.page === pages - 1)) : null));
  drawBar();
}

function choose(i, on, box) {
  if (on && state.runs.length >= MOST) { box.checked = false; message.textContent = `At most ${MOST} runs are compared at once.`; return; }
  state.runs = on ? [...state.runs, i] : state.runs.filter(j => j !== i);
  if (box) box.closest("tr").classList.toggle("chosen", on);
  writeAddress();
  drawBar();
  drawCompare();
}

const colour = at => `var(--run${at % MOST})`;
function mark(at) { const m = el("span", {class: "mark", "aria-hidden": "true"}); m.style.background = colour(at); return m; }
function drawBar() {
  if (!state.runs.length) { barArea.replaceChildren(el("p", {class: "bar quiet"}, "Choose runs in the table to see their curves, configs and answers side by side.")); return; }
  const n = state.runs.length;
  barArea.replaceChildren(el("div", {class: "bar"}, el("span", {}, `${n} ${n === 1 ? "run" : "runs"} chosen`), el("span", {class: "pages"},
    el("button", {click: () => { compareArea.scrollIntoView(); compareArea.querySelector("h2")?.focus(); }}, "Compare ↓"),
    el("button", {click: () => { state.runs = []; drawTable(); drawCompare(); }}, "Choose none"))));
}

// -- curves

function smoothed(points, weight) { // exponential moving average, divided by the sum of its weights
  let last = 0, sum = 0;
  return points.map(([x, y]) => {
    if (!Number.isFinite(y)) return [x, y];
    last = weight * last + (1 - weight) * y;
    sum = weight * sum + (1 - weight);
    return [x, last / sum];
  });
}

function pointsOf(data, name, axis) { // [[x, y]]: values that are no numbers are gaps
  const series = data && data.curves[name];
  if (!series) return [];
  const [steps, values] = series, other = axis === "step" ? null : data.curves[axis];
  let at = 0;
  return steps.map((step, k) => {
    let x = step;
    if (other) {
      while (at < other[0].length - 1 && other[0][at + 1] <= step) at++;
      x = other[0][at] <= step ? other[1][at] : NaN;
    }
    return [x, typeof values[k] === "number" ? values[k] : NaN];
  }).filter(p => Number.isFinite(p[0]));
}

function ticks(low, high, n) {
  const rough = (high - low) / n || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= rough);
  const out = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) out.push(+v.toPrecision(12));
  return out;
}
const brief = v => Math.abs(v) >= 1e4 ? v.toExponential(0).replace("e+", "e") : Math.abs(v) < 1e-3 && v ? v.toExponential(0) : String(+v.toPrecision(4));

function chart(name, lines) { // lines: {label, at, points}; null where no run logged it
  const W = 460, H = 240, left = 48, right = 12, top = 10, bottom = 26;
  const usable = y => Number.isFinite(y) && (!state.log || y > 0), f = y => state.log ? Math.log10(y) : y;
  const drawn = lines.map(l => ({...l, smooth: state.smooth && l.points.length >= SMOOTHED ? smoothed(l.points, state.smooth) : l.points})).filter(l => l.points.some(p => usable(p[1])));
  if (!drawn.length) return null;
  const every = drawn.flatMap(l => l.points.filter(p => usable(p[1])));
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const [x, y] of every) { x0 = Math.min(x0, x); x1 = Math.max(x1, x); y0 = Math.min(y0, f(y)); y1 = Math.max(y1, f(y)); }
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  const room = (y1 - y0) * .05 || Math.abs(y0) * .1 || 1;
  y0 -= room; y1 += room;
  const X = x => left + (x - x0) / (x1 - x0) * (W - left - right), Y = y => H - bottom - (f(y) - y0) / (y1 - y0) * (H - top - bottom);
  const path = points => {
    let d = "", pen = "M";
    for (const [x, y] of points) if (usable(y)) { d += `${pen}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`; pen = "L"; } else pen = "M";
    return d;
  };
  const yTicks = ticks(y0, y1, 5), xTicks = ticks(x0, x1, 6);
  const cursor = el("line", {class: "cursor", y1: top, y2: H - bottom, visibility: "hidden"});
  const stroke = (at, d, cls) => { const p = el("path", {class: cls, d}); p.style.stroke = colour(at); return p; };
  const single = l => l.points.filter(p => usable(p[1])).length === 1;
  const dots = drawn.filter(single).map(l => {
    const [x, y] = l.points.find(p => usable(p[1])), c = el("circle", {cx: X(x), cy: Y(y), r: 4});
    c.style.fill = colour(l.at);
    return c;
  });
  const lost = drawn.reduce((n, l) => n + l.points.filter(p => !usable(p[1])).length, 0);
  const caption = el("figcaption", {"aria-live": "polite"});
  const last = l => l.smooth.findLast(p => usable(p[1]));
  const tell = x => {
    const parts = drawn.map(l => {
      const near = x === null ? last(l) : l.smooth.reduce((a, b) => usable(b[1]) && (!usable(a[1]) || Math.abs(b[0] - x) < Math.abs(a[0] - x)) ? b : a);
      return [l, near];
    });
    const where = x === null ? "end" : `${state.axis} ${shown(+parts[0][1][0].toPrecision(6))}`;
    caption.replaceChildren(`${where}: `, ...parts.map(([l, p]) => el("span", {class: "value", title: l.label}, mark(l.at), shown(+p[1].toPrecision(6)))),
      lost ? el("span", {}, `${lost} values not shown (not finite${state.log ? " or not positive" : ""})`) : "");
  };
  const xs = [...new Set(drawn.flatMap(l => l.points.map(p => p[0])))].sort((a, b) => a - b);
  let position = null;
  const move = x => {
    position = xs.reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a);
    cursor.setAttribute("x1", X(position)); cursor.setAttribute("x2", X(position)); cursor.setAttribute("visibility", "visible");
    tell(position);
  };
  const leave = () => { position = null; cursor.setAttribute("visibility", "hidden"); tell(null); };
  const summary = drawn.map(l => `${l.label} ends at ${shown(last(l)[1])}`).join("; ");
  const svg = el("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: "0", "aria-label": `${name} over ${state.axis}: ${summary}. The arrow keys read values.`,
    pointermove: e => { const box = svg.getBoundingClientRect(); move(x0 + ((e.clientX - box.left) / box.width * W - left) / (W - left - right) * (x1 - x0)); },
    pointerleave: leave, blur: leave,
    keydown: e => {
      const by = {ArrowLeft: -1, ArrowRight: 1}[e.key];
      if (!by) return;
      e.preventDefault();
      move(xs[Math.max(0, Math.min(xs.length - 1, (position === null ? xs.length - (by < 0 ? 0 : 1) : xs.indexOf(position)) + by))]);
    }},
    yTicks.map(v => [el("line", {class: "grid", x1: left, x2: W - right, y1: H - bottom - (v - y0) / (y1 - y0) * (H - top - bottom), y2: H - bottom - (v - y0) / (y1 - y0) * (H - top - bottom)}),
      el("text", {x: left - 6, y: H - bottom - (v - y0) / (y1 - y0) * (H - top - bottom) + 4, "text-anchor": "end"}, brief(state.log ? 10 ** v : v))]).flat(),
    xTicks.map(v => el("text", {x: X(v), y: H - 8, "text-anchor": "middle"}, brief(v))),
    drawn.filter(l => l.smooth !== l.points).map(l => stroke(l.at, path(l.points), "raw")),
    drawn.map(l => stroke(l.at, path(l.smooth), "curve")), dots, cursor);
  tell(null);
  return el("figure", {"data-curve": name}, el("h3", {}, name), svg, caption);
}

function curvesSection(runs, loaded) { // runs: numbers; loaded: their details
  const names = [...new Set(loaded.flatMap(d => d ? Object.keys(d.curves) : []))].sort();
  if (!names.length) return section("Curves", el("p", {class: "quiet"}, "These runs have logged no metrics."));
  const first = FIRST_CURVES.filter(n => names.includes(n)).slice(0, 4);
  const wanted = () => { const kept = state.curves.filter(n => names.includes(n)); return kept.length ? kept : first.length ? first : names.slice(0, 4); };
  const area = el("div", {class: "charts"});
  const draw = () => {
    writeAddress();
    area.replaceChildren(...wanted().map(name => chart(name, runs.map((i, at) => ({label: value("name", i), at, points: pointsOf(loaded[at], name, state.axis)}))))
      .filter(Boolean));
    if (!area.childElementCount) area.append(el("p", {class: "quiet"}, "No run has logged a value that can be drawn."));
  };
  const axes = ["step", "epoch", "total_trained_tokens", "total_pairs", "total_rows"].filter(a => a === "step" || names.includes(a));
  if (!axes.includes(state.axis)) state.axis = "step";
  const out = el("output", {}, state.smooth.toFixed(2));
  const list = el("datalist", {id: "metrics"}, names.map(n => el("option", {value: n})));
  const boxes = el("div", {class: "chips", role: "group", "aria-label": "curves shown"});
  const drawBoxes = () => boxes.replaceChildren(...wanted().map(name => el("button", {"aria-label": `remove the curve ${name}`, click: () => {
    state.curves = wanted().filter(n => n !== name);
    drawBoxes(); draw();
  }}, `${name} ×`)));
  drawBoxes(); draw();
  return section("Curves", el("div", {class: "controls"},
    el("label", {}, el("span", {}, "smoothing ", out), el("input", {id: "smooth", type: "range", min: 0, max: .99, step: .01, value: state.smooth, input: e => { state.smooth = +e.target.value; out.value = state.smooth.toFixed(2); draw(); }})),
    el("label", {}, "over", el("select", {id: "axis", change: e => { state.axis = e.target.value; draw(); }}, axes.map(a => option(a, a.replaceAll("_", " "), state.axis)))),
    el("label", {class: "check"}, el("input", {type: "checkbox", checked: state.log, change: e => { state.log = e.target.checked; draw(); }}), "logarithmic"),
    el("label", {}, `add a curve (of ${names.length})`, el("input", {id: "curve", list: "metrics", autocomplete: "off", change: e => {
      const name = e.target.value.trim();
      if (!names.includes(name)) return;
      state.curves = [...new Set([...wanted(), name])];
      e.target.value = "";
      drawBoxes(); draw();
    }})), list), boxes, area);
}

// -- runs side by side

const OWN = /^(config\.(run_dir|resuming_dir|resuming_hash|resuming)(\.|$)|path$|name$|hash$|started$|minutes$|overrides$|summary$|damage$|id$|checkpoints_dir$|estimate\.assumed$|job\.line$|config\.wandb\.)/;
const heads = runs => runs.map((i, at) => el("th", {scope: "col", title: value("path", i)}, mark(at), " ", value("name", i)));

function differences(runs, test) { // rows of the keys whose values differ
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
  return keys.filter(k => test(k) && !OWN.test(k) && runs.some(i => !same(value(k, i), value(k, runs[0])))).sort();
}

const twice = k => k.startsWith("last.") && board.columns["final.metrics." + k.slice(5)]; // the same number under two keys
const SMALL_IS_BETTER = /loss|perplexity|nats|seconds|minutes|gib/, LARGE_IS_BETTER = /accuracy|tokens_per_second/;
function valueRow(key, runs, mayRank) {
  const all = runs.map(i => value(key, i)), numbers = all.filter(v => typeof v === "number");
  const better = LARGE_IS_BETTER.test(key) ? Math.max : SMALL_IS_BETTER.test(key) ? Math.min : null;
  const best = mayRank && better && numbers.length > 1 && new Set(numbers).size > 1 ? better(...numbers) : null;
  return el("tr", {}, el("th", {scope: "row"}, named(key)), all.map(v => {
    const c = v === undefined ? el("td", {class: "quiet"}, "not set") : cell(v);
    if (best !== null && v === best) { c.classList.add("best"); c.append(" ★"); c.title = `best: ${c.title}`; }
    return c;
  }));
}

let drawing = 0;
async function drawCompare() {
  const runs = [...state.runs], mine = ++drawing;
  if (!runs.length) { compareArea.replaceChildren(); return; }
  const loaded = await Promise.all(runs.map(loadDetails));
  if (mine !== drawing || !compareArea.isConnected) return;
  const lost = runs.filter((_, at) => !loaded[at]);
  const legend = el("ul", {class: "chips"}, runs.map((i, at) => el("li", {}, mark(at), link(i, value("name", i)), badge(value("status", i)),
    el("button", {class: "plain", "aria-label": `leave out ${value("name", i)}`, click: () => { choose(i, false); drawTable(); }}, "×"))));
  const alike = new Set(runs.map(i => value("stage", i))).size === 1; // a loss of another stage is another quantity
  const configs = differences(runs, k => k.startsWith("config.")), results = differences(runs, k => !k.startsWith("config.") && !twice(k));
  const title = el("h2", {tabindex: "-1"}, runs.length === 1 ? "The chosen run" : `${runs.length} runs side by side`);
  compareArea.replaceChildren(title, legend, lost.length ? el("p", {class: "notice"}, NOT_LOADED) : "", curvesSection(runs, loaded),
    runs.length < 2 ? "" : section("Differences of the configs", configs.length ? table([column("key"), ...heads(runs)], configs.map(k => valueRow(k, runs, false)), {low: true, sides: true, label: "differences of the configs"})
      : el("p", {class: "quiet"}, "The configs are equal.")),
    runs.length < 2 ? "" : section("Differences of the results", results.length ? table([column("recorded"), ...heads(runs)], results.map(k => valueRow(k, runs, alike)), {low: true, sides: true, label: "differences of the results"})
      : el("p", {class: "quiet"}, "The recorded numbers are equal.")),
    samplesSection(runs, loaded));
}

// -- answers and rows

function verdict(sample) {
  const r = sample.right, word = r === true || r === 1 ? "right" : r === false || r === 0 ? "wrong" : typeof r === "number" ? `${shown(r)} right` : "not checked";
  return [el("span", {class: "status " + (word === "right" || word === "wrong" ? word : "")}, word), sample.finish_reason === "length" ? el("span", {class: "quiet"}, " cut") : null];
}

function samplesSection(runs, loaded) {
  const sets = [...new Set(loaded.flatMap(d => d ? Object.keys(d.samples) : []))];
  if (!sets.length) return section("Answers", el("p", {class: "quiet"}, "No answers of an evaluation are kept here."));
  if (!sets.includes(state.set)) state.set = sets.includes("after") ? "after" : sets[0];
  const area = el("div");
  const draw = () => {
    writeAddress();
    const columns = []; // one per run that has the chosen set; a run that has only others shows its first
    loaded.forEach((d, at) => {
      const own = d ? Object.keys(d.samples) : [];
      const set = own.includes(state.set) ? state.set : own.at(-1);
      if (set !== undefined) columns.push({at, set, by: new Map(d.samples[set].map(s => [shown(s.prompt), s]))});
    });
    const prompts = new Map(columns.flatMap(c => [...c.by].map(([p, s]) => [p, s])));
    let rows = [...prompts];
    const differ = ([p]) => new Set(columns.map(c => shown(c.by.get(p)?.got))).size > 1;
    if (state.differ && columns.length > 1) rows = rows.filter(differ);
    area.replaceChildren(rows.length ? table([column("prompt"), column("expected"), ...columns.map(c => el("th", {scope: "col"}, mark(c.at), " ", value("name", runs[c.at]), el("span", {class: "quiet"}, ` ${c.set}`)))],
      rows.slice(0, 200).map(([p, s]) => el("tr", {}, el("td", {class: "said", title: p.slice(0, 2000)}, shown(s.asked || p)), el("td", {class: "text"}, shown(s.expected)), columns.map(c => {
        const own = c.by.get(p);
        return own ? el("td", {class: "said"}, verdict(own), "\n", shown(own.got) || el("span", {class: "quiet"}, "(an empty answer)")) : el("td", {class: "quiet"}, "not among its kept answers");
      }))), {low: true, label: "answers"}) : el("p", {class: "quiet"}, "All answers are equal."));
  };
  draw();
  return section("Answers", el("div", {class: "controls"}, el("label", {}, "evaluation", el("select", {change: e => { state.set = e.target.value; draw(); }}, sets.map(s => option(s, s, state.set)))),
    runs.length > 1 ? el("label", {class: "check"}, el("input", {type: "checkbox", checked: state.differ, change: e => { state.differ = e.target.checked; draw(); }}), "only prompts whose answers differ") : null), area);
}

const rowsTable = (rows, label) => { // of dicts that may have different keys
  const names = [...new Set(rows.flatMap(r => Object.keys(r)))];
  return table(names.map(column), rows.map(r => el("tr", {}, names.map(n => cell(r[n], {whole: true})))), {low: true, label});
};

// -- the page of a run

async function drawRun(path) {
  const i = byPath.get(path);
  const back = el("p", {}, el("a", {href: "#", click: e => { e.preventDefault(); goBack(); }}, "← all runs"));
  if (i === undefined) { main.replaceChildren(back, el("p", {class: "notice"}, `There is no run ${path} on this board.`)); return; }
  document.title = value("name", i);
  main.replaceChildren(back, el("p", {class: "quiet"}, "Loading …"));
  const d = await loadDetails(i);
  if (open !== path) return;
  const parts = [back, el("h1", {}, value("name", i), " ", badge(value("status", i))), el("p", {class: "quiet"}, path)];
  if (value("summary", i)) parts.push(el("p", {}, value("summary", i)));
  if (value("damage", i)) parts.push(el("p", {class: "notice"}, value("damage", i)));
  if (!d) parts.push(el("p", {class: "notice"}, NOT_LOADED));
  else {
    const links = board.live ? (d.links["executed notebook"] ? {"executed notebook": `notebook/${board.ids[i]}`} : {}) : d.links;
    for (const problem of d.problems) parts.push(el("p", {class: "notice"}, problem));
    parts.push(el("p", {class: "chips"}, Object.entries(links).map(([name, address]) => el("a", {href: address, target: "_blank", rel: "noopener"}, name)),
      el("button", {click: () => { if (!state.runs.includes(i)) state.runs = [...state.runs, i].slice(-MOST); goBack(); }}, "Compare with others")));
    parts.push(section("Results", facts(d.headline.map(r => [r.what, r.value]), "results")));
    const job = keys.filter(k => k.startsWith("job.") && value(k, i) !== undefined);
    if (job.length || d.history.length) parts.push(section("Jobs", job.length ? facts(job.map(k => [k.slice(4), value(k, i)]), "the newest job") : "",
      d.history.length ? el("pre", {tabindex: "0"}, d.history.join("\n")) : ""));
    if (Object.keys(d.curves).length) parts.push(curvesSection([i], [d]));
    if (Object.keys(d.samples).length) parts.push(samplesSection([i], [d]));
    if (d.examples.length) parts.push(section("Rows as the model sees them", el("p", {class: "quiet"}, el("span", {class: "row-text legend"}, el("span", {}, "prompt "), el("span", {class: "completion"}, "trained"), " ", el("span", {class: "control"}, "control token"))),
      d.examples.map(row => el("div", {}, el("p", {class: "quiet"}, [row.row_id, row.source].filter(Boolean).join(", ")), el("div", {class: "row-text"}, row.runs.map(([kind, control, text]) =>
        el("span", {class: (kind === "prompt" ? "" : "completion") + (control ? " control" : "")}, text)))))));
    for (const [title, rows] of Object.entries(d.tables)) parts.push(section(title, rowsTable(rows, title)));
    for (const [name, lines] of Object.entries(d.logs)) parts.push(section(`The end of ${name}`, el("pre", {tabindex: "0"}, lines.join("\n"))));
  }
  const own = keys.filter(k => value(k, i) !== undefined).sort(), list = el("div");
  const draw = word => list.replaceChildren(facts(own.filter(k => k.toLowerCase().includes(word.toLowerCase())).slice(0, 400).map(k => [k, value(k, i)]), "everything recorded"));
  draw("");
  parts.push(section("Config and everything recorded", el("div", {class: "controls"}, el("label", {class: "grow"}, "keys that contain", el("input", {type: "search", input: e => draw(e.target.value)}))), list));
  main.replaceChildren(...parts);
  window.scrollTo(0, 0);
}

function goBack() {
  open = null;
  const before = location.hash;
  location.hash = address() === "#" ? "#board" : address();
  if (location.hash === before) draw();
}

function draw() {
  open = readAddress();
  return open === null ? drawBoard() : drawRun(open);
}

document.getElementById("written").textContent = `${board.count.toLocaleString("en")} runs of ${board.root}, ${board.live ? "read" : "written"} ${board.written}` +
  (board.live ? "; reload the page to read them again" : "");
if (board.notice) document.getElementById("written").after(el("details", {class: "quiet"}, el("summary", {}, "The scheduler could not be asked"), board.notice));
document.getElementById("home").addEventListener("click", e => { e.preventDefault(); goBack(); });
document.getElementById("skip").addEventListener("click", e => { e.preventDefault(); main.focus(); });
window.addEventListener("hashchange", draw);
draw();
