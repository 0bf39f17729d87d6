// SPDX-License-Identifier: MIT
/*
 * The playground: a form for POST /v1/samples, filled from GET /v1/capabilities.
 *
 * The page checks nothing itself. It sends what was typed, and the daemon, which refuses everything that is not right and names the
 * field, is the only judge: `error.param` finds the field by its data-param. Knobs that the chosen sampler does not use are hidden and
 * not sent.
 */
"use strict";

const $ = (id) => document.getElementById(id);
const PHASES = [["queue", "Queue", "q"], ["denoise", "Denoise", "d"], ["decode", "Decode", "x"], ["encode", "Encode", "e"]];
const HISTORY = 24;
const FEW_LABELS = 24; // that many are shown as they are; more get a search field
const SHOWN_LABELS = 60;

let caps = null;     // GET /v1/capabilities
let model = null;    // the chosen entry of caps.models
let picked = new Set(); // class ids, null = unconditional
let shown = null;    // the result on the stage: {request, answer}
let past = [];
let running = null;  // AbortController
const touched = {};  // values typed per model and sampler type, so that switching to and fro keeps them

function element(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in e && typeof value !== "string") e[key] = value;
    else e.setAttribute(key, value);
  }
  e.append(...children);
  return e;
}

function options(select, entries) {
  const before = select.value;
  select.replaceChildren(...entries.map(([value, text]) => element("option", { value }, text)));
  if (entries.some(([value]) => value === before)) select.value = before;
}

const label = (id) => (id === null ? "unconditional" : (model.labels[id] && model.labels[id][0]) || `class ${id}`);
const type = () => document.querySelector('input[name="type"]:checked').value;
const choice = () => model.samplers[type()]; // what the chosen model says of the chosen sampler
const slot = () => `${model.name} ${type()}`;
const named = (list) => list.map((name) => [name, name]);

/* ---- the form: what there is ---- */

function fillModel() {
  model = caps.models.find((m) => m.name === $("model").value) || caps.models[0];
  picked = new Set([...picked].filter((id) => (id === null ? model.null_class : id < model.classes)));
  if (picked.size === 0) picked.add(0);
  for (const radio of document.getElementsByName("type")) radio.closest("label").hidden = !model.samplers[radio.value];
  const most = model.max_guidance_channels - (model.family === "dit" ? 0 : 1); // a DiT's go on into its variance, so that the last is not "all"
  const counts = Array.from({ length: most }, (_, i) => [String(i + 1), i === 0 ? "first" : `first ${i + 1}`]);
  options($("channels"), [["", "the model's rule"], ...counts, ["all", "all"]]);
  const list = model.labels.length > 0;
  $("chips").hidden = !list;
  $("filter").hidden = !list || model.labels.length <= FEW_LABELS;
  $("ids").hidden = list;
  $("filter").value = "";
  fillChips();
  about();
  visibility();
}

function fillChips() {
  const want = $("filter").value.trim().toLowerCase();
  const found = (id) => model.labels[id].some((name) => name.toLowerCase().includes(want));
  const ids = model.labels.map((_, id) => id).filter((id) => picked.has(id) || found(id));
  ids.sort((a, b) => picked.has(b) - picked.has(a) || a - b);
  if (model.labels.length <= FEW_LABELS) ids.sort((a, b) => a - b);
  const entries = ids.slice(0, SHOWN_LABELS);
  if (model.null_class) entries.push(null);
  $("chips").replaceChildren(...entries.map((id) => {
    const box = element("input", { type: "checkbox", checked: picked.has(id), value: String(id) });
    box.addEventListener("change", () => {
      if (box.checked) picked.add(id);
      else picked.delete(id);
      changed();
    });
    const names = id === null ? ["no class: what the model makes unasked"] : [`class ${id}`, ...model.labels[id].slice(1)];
    return element("label", { title: names.join(", "), class: id === null ? "none" : "" }, box, element("span", {}, label(id)));
  }));
}

// The fields that the chosen sampler can have at all; used() says which of them it has as it stands.
function samplerKeys() {
  const keys = Object.keys(choice().defaults);
  if (type() === "edm") keys.push("s_max"); // without bound by default, which JSON cannot say
  return keys;
}

function used(key) {
  if (key === "knots") return type() === "sde" && $("w_t").value === "knots";
  if (!samplerKeys().includes(key)) return false;
  const adaptive = type() === "ode" && $("method").value === "dopri5";
  if (["atol", "rtol", "max_evaluations"].includes(key)) return adaptive;
  if (key === "steps") return !adaptive;
  if (key === "denoise") return !["exponential", "dpmpp2m"].includes($("method").value);
  if (key === "last_step_size") return $("last_step").value !== "none";
  return key !== "w_t_eta" || $("w_t").value === "kl-eta";
}

const fieldValue = (key) => ($(key).type === "checkbox" ? $(key).checked : $(key).value);

function setField(key, value) {
  if ($(key).type === "checkbox") $(key).checked = value === true;
  else $(key).value = value === undefined ? "" : value;
}

function fillSampler() {
  const c = choice();
  options($("method"), named(c.methods || []));
  options($("w_t"), [...named(c.w_t || []), ["knots", "knots"]]);
  options($("last_step"), named(c.last_step || []));
  options($("spacing"), named(c.spacing || []));
  const others = c.interpolants.filter((path) => path !== model.path);
  options($("interpolant"), [["", `${model.path} (the model's)`], ...others.map((path) => [path, `${path} (converted)`])]);
  const values = { ...c.defaults, ...touched[slot()] };
  for (const key of samplerKeys()) setField(key, values[key]);
  for (const [key, value] of Object.entries(c.defaults)) $(key).placeholder = value;
  visibility();
}

function rememberSampler() {
  const keep = (touched[slot()] = {});
  for (const key of samplerKeys()) keep[key] = fieldValue(key);
}

function setType(name) { document.querySelector(`input[name="type"][value="${name}"]`).checked = true; }

// Another model: its own sampler, where that is another one or it does not run the present one.
function modelChanged() {
  const before = model && model.sampler;
  fillModel();
  if (model.sampler !== before || !choice()) setType(model.sampler);
  fillSampler();
}

function visibility() {
  if (!choice()) return; // between two models
  const guided = Number($("scale").value) !== 1, channels = guided && model.max_guidance_channels > 1;
  const when = { path: choice().interpolants.length > 1, null: model.null_class, guided, channels };
  for (const e of document.querySelectorAll("[data-when]")) e.hidden = !when[e.dataset.when];
  for (const e of document.querySelectorAll("[data-use]")) e.hidden = !used(e.dataset.use);
}

function about() {
  const size = `${model.image_size}×${model.image_size}`;
  $("about").textContent = [caps.version, caps.device, `${model.name}, step ${model.version}, ${size}, ${model.path} ${model.prediction}`].join(" · ");
  document.title = `${model.name} · sitd playground`;
}

/* ---- the form: what was asked ---- */

// A number as JSON has it; text that is none goes out as it is, for the daemon to name the field.
function number(id) {
  const text = $(id).value.trim();
  if (text === "") return undefined;
  return Number.isFinite(Number(text)) ? Number(text) : text;
}

function seedValue() {
  const text = $("seed").value.trim();
  if (text === "") return undefined;
  return /^(0|[1-9][0-9]*)$/.test(text) && Number.isSafeInteger(Number(text)) ? Number(text) : text;
}

function classIds() {
  if (model.labels.length) return [...picked].sort((a, b) => (a === null) - (b === null) || a - b);
  return $("ids").value.split(",").map((s) => s.trim()).filter(Boolean).map((s) => (/^\d+$/.test(s) ? Number(s) : s));
}

function put(object, key, value, unless) {
  if (value !== undefined && value !== unless) object[key] = value;
}

// "0 1, 0.5 0.8" -> [[0, 1], [0.5, 0.8]]; what is no number goes out as text, for the daemon to refuse.
function knotsValue() {
  const value = (text) => (Number.isFinite(Number(text)) ? Number(text) : text);
  return $("knots").value.split(",").map((pair) => pair.trim().split(/\s+/).filter(Boolean).map(value));
}

function samplerPart() {
  const s = { type: type() };
  for (const key of samplerKeys().filter(used)) put(s, key, $(key).type === "number" ? number(key) : fieldValue(key));
  if (s.w_t === "knots") s.w_t = knotsValue();
  return s;
}

function guidancePart() {
  const g = {};
  put(g, "scale", number("scale"));
  if (!model.null_class || g.scale === 1 || g.scale === undefined) return undefined;
  const from = number("from"), to = number("to");
  if (from !== 0 || to !== 1) g.interval = [from === undefined ? 0 : from, to === undefined ? 1 : to];
  const channels = $("channels").value;
  if (channels && model.max_guidance_channels > 1) g.channels = channels === "all" ? "all" : Number(channels);
  return g;
}

function build() {
  const r = { model: model.name }, ids = classIds(), n = number("n");
  const each = Number.isInteger(n) && n >= 1 && n <= caps.limits.max_images ? n : 1;
  if (ids.length === 1 || n !== each) {
    put(r, "class", ids.length ? ids[0] : undefined); // a count that is wrong goes out in the short form, where it has a name
    put(r, "n", n, 1);
  } else r.classes = ids.flatMap((id) => Array(each).fill(id));
  r.seed = seedValue(); // undefined keeps its place for the seed that the daemon draws
  put(r, "seed_index", number("seed_index"), 0);
  put(r, "rng", $("rng").value, "native");
  if (choice().interpolants.length > 1) put(r, "interpolant", $("interpolant").value, "");
  r.sampler = samplerPart();
  put(r, "guidance", guidancePart());
  const compression = number("compression");
  if (compression !== undefined && compression !== 1) r.output = { format: "png", compression };
  put(r, "timeout_ms", number("timeout_ms"));
  put(r, "priority", number("priority"), 0);
  return r;
}

// Puts a request back into the form.
function restore(r) {
  $("model").value = r.model;
  picked = new Set(r.classes || [r.class === undefined ? 0 : r.class]);
  fillModel();
  $("ids").value = [...picked].join(", ");
  $("n").value = r.classes ? r.classes.length / picked.size : r.n || 1;
  $("seed").value = r.seed === undefined ? "" : r.seed;
  $("seed_index").value = r.seed_index || 0;
  $("rng").value = r.rng || "native";
  setType(r.sampler.type);
  const { type: _, ...rest } = r.sampler;
  if (Array.isArray(rest.w_t)) {
    $("knots").value = rest.w_t.map((pair) => pair.join(" ")).join(", ");
    rest.w_t = "knots";
  }
  touched[slot()] = rest;
  fillSampler();
  $("interpolant").value = r.interpolant || "";
  const g = r.guidance || { scale: 1 };
  $("scale").value = $("scale-slider").value = g.scale;
  [$("from").value, $("to").value] = g.interval || [0, 1];
  $("channels").value = g.channels === undefined ? "" : String(g.channels);
  $("compression").value = r.output ? r.output.compression : 1;
  $("timeout_ms").value = r.timeout_ms === undefined ? "" : r.timeout_ms;
  $("priority").value = r.priority || 0;
  visibility();
}

/* ---- errors ---- */

function clearErrors() {
  for (const e of document.querySelectorAll(".error")) e.remove();
  for (const e of document.querySelectorAll("[aria-invalid]")) {
    e.removeAttribute("aria-invalid");
    e.removeAttribute("aria-describedby");
  }
  $("problem").hidden = true;
}

function fieldOf(param) {
  const name = (param || "").replace(/\[\d+\]$/, "");
  return document.querySelector(`[data-param="${CSS.escape(name === "class" ? "classes" : name)}"]`);
}

function showError(error, retry) {
  const field = fieldOf(error.param), text = error.message + (retry ? ` Try again in ${retry} s.` : "");
  const row = field && field.closest(".row");
  if (!row || row.closest("[hidden]")) {
    $("problem").textContent = text;
    $("problem").hidden = false;
    return;
  }
  const details = field.closest("details");
  if (details) details.open = true;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", "field-error");
  row.append(element("p", { class: "error", id: "field-error", role: "alert" }, text));
  const inner = field.matches("input, select") ? field : field.querySelector("input:not([hidden])");
  (inner || field).focus();
}

/* ---- asking ---- */

function busy(on) {
  $("go").disabled = on;
  $("stop").hidden = !on;
  $("stage").classList.toggle("busy", on);
  $("stage").setAttribute("aria-busy", String(on));
}

async function ask(request) {
  const headers = { "Content-Type": "application/json", Accept: "application/json" };
  const response = await fetch("v1/samples", { method: "POST", headers, body: JSON.stringify(request), signal: running.signal });
  const text = await response.text();
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    throw { message: `The daemon answered ${response.status} with something that is not JSON.` };
  }
  const error = body.error || { message: `The daemon answered ${response.status}.` };
  if (!response.ok) throw { ...error, retry: response.headers.get("Retry-After") };
  return body;
}

async function generate() {
  if (running || !model) return;
  clearErrors();
  const request = build(), start = performance.now();
  running = new AbortController();
  busy(true);
  const clock = setInterval(() => {
    $("status").textContent = `${((performance.now() - start) / 1000).toFixed(1)} s`;
  }, 100);
  try {
    const answer = await ask(request);
    const entry = { request: { ...request, seed: answer.seed }, answer, total: performance.now() - start, model };
    past = [entry, ...past].slice(0, HISTORY);
    show(entry);
    if ($("stage").getBoundingClientRect().top > innerHeight * 0.6) $("status").scrollIntoView({ block: "start" });
    $("status").textContent = `${answer.data.length} ${answer.data.length === 1 ? "picture" : "pictures"} in ${duration(entry.total)}`;
  } catch (e) {
    $("status").textContent = e.name === "AbortError" ? "Cancelled" : "";
    if (e.name !== "AbortError") showError(e instanceof TypeError ? { message: "The daemon cannot be reached." } : e, e.retry);
  } finally {
    clearInterval(clock);
    running = null;
    busy(false);
  }
}

/* ---- showing ---- */

const duration = (ms) => (ms >= 1000 ? `${(ms / 1000).toFixed(ms >= 10000 ? 1 : 2)} s` : `${ms.toFixed(ms >= 100 ? 0 : ms >= 1 ? 1 : 2)} ms`);
const source = (image) => `data:image/png;base64,${image.b64_json}`;
const caption = (image) => (image.label !== null ? image.label : image.class === null ? "unconditional" : `class ${image.class}`);

// Columns: one row a class where that fits, else something near a square. Tiles: whole multiples of the picture's own pixels, so that all of
// them are equally large.
function layout(entry) {
  const data = entry.answer.data, n = data.length, first = data.findIndex((image) => image.class !== data[0].class);
  const each = first > 0 && n % first === 0 ? first : n;
  const columns = each > 1 && each <= 8 && each < n ? each : n <= 1 ? 1 : n <= 4 ? 2 : n <= 9 ? 3 : n <= 16 ? 4 : n <= 36 ? 6 : 8;
  const size = entry.model.image_size, wish = columns === 1 ? 480 : columns === 2 ? 288 : 640 / columns;
  const style = $("pictures").style;
  style.setProperty("--columns", columns);
  style.setProperty("--few", columns <= 4 ? columns : columns % 4 === 0 ? 4 : 3); // on a phone
  style.setProperty("--tile", `${size * Math.max(1, Math.floor(wish / size))}px`);
  $("pictures").classList.toggle("many", columns > 4);
}

function figure(entry, image) {
  const a = entry.answer, text = caption(image), size = entry.model.image_size;
  const alt = `${text}, seed ${a.seed}, index ${image.seed_index}`;
  const download = `${a.model}-${text.replace(/\W+/g, "-")}-${a.seed}-${image.seed_index}.png`;
  const img = element("img", { src: source(image), alt, width: size, height: size });
  const save = element("a", { href: source(image), download, title: `Save as PNG. Pixels ${image.pixels_sha256}` }, img);
  return element("figure", {}, save, element("figcaption", {}, element("span", {}, text), element("span", {}, `#${image.seed_index}`)));
}

function definition(list, term, value, cls = "") {
  list.append(element("div", { class: cls }, element("dt", {}, term), element("dd", {}, value)));
}

function showFacts(entry) {
  const a = entry.answer, t = a.timings_ms, sum = PHASES.reduce((s, [key]) => s + t[key], 0) || 1;
  $("bar").replaceChildren(...PHASES.map(([key, , cls]) => {
    const part = element("i", { class: cls });
    part.style.flexGrow = t[key] / sum;
    return part;
  }));
  $("phases").replaceChildren();
  for (const [key, text, cls] of PHASES) definition($("phases"), text, duration(t[key]), `p${cls}`);
  definition($("phases"), "Round trip", duration(entry.total), "pt");
  $("numbers").replaceChildren();
  definition($("numbers"), "Seed", String(a.seed));
  definition($("numbers"), "Evaluations", String(a.evaluations));
  definition($("numbers"), "Model", `${a.model}@${a.version}`);
  definition($("numbers"), "Digest", a.digest.slice(0, 12));
  $("notes").replaceChildren(...a.notes.map((note) => element("li", {}, note)));
  $("facts").hidden = false;
}

function show(entry) {
  shown = entry;
  const data = entry.answer.data;
  $("empty").hidden = true;
  $("pictures").hidden = false;
  layout(entry);
  $("pictures").replaceChildren(...data.map((image) => figure(entry, image)));
  $("keep").disabled = false;
  showFacts(entry);
  showCurl();
  showHistory();
}

function showHistory() {
  $("past").hidden = past.length < 2;
  $("history").replaceChildren(...past.map((entry) => {
    const data = entry.answer.data;
    const what = `${caption(data[0])}, seed ${entry.answer.seed}, ${entry.request.sampler.type} ${entry.request.sampler.method}`;
    const button = element("button", { type: "button", title: what, "aria-label": `Show again: ${what}`, "aria-current": String(entry === shown) },
      element("img", { src: source(data[0]), alt: "" }));
    if (data.length > 1) button.append(element("small", {}, String(data.length)));
    button.addEventListener("click", () => {
      clearErrors();
      restore(entry.request);
      show(entry);
      $("status").textContent = "Shown again, with its settings";
    });
    return button;
  }));
}

// One field of the request a line.
function pretty(request) {
  const fields = Object.entries(request).filter(([, value]) => value !== undefined);
  const value = (v) => JSON.stringify(v, null, 1).replace(/\s*\n\s*/g, " ").replace(/([[{]) | ([\]}])/g, "$1$2");
  return `{\n${fields.map(([key, v]) => `    "${key}": ${typeof v === "string" ? JSON.stringify(v) : value(v)}`).join(",\n")}\n  }`;
}

const quote = (text) => `'${text.replace(/'/g, `'\\''`)}'`;

// The request on the stage, with the seed that it was given; before the first, the form's.
function curl() {
  const request = shown ? shown.request : build();
  const one = (request.classes ? request.classes.length : request.n || 1) === 1;
  const lines = [`curl ${quote(`${location.origin}/v1/samples`)}`, "-H 'Content-Type: application/json'"];
  if (one) lines.push("-H 'Accept: image/png' -o picture.png");
  lines.push(`-d ${quote(pretty(request))}`);
  return lines.join(" \\\n  ");
}

function showCurl() { $("curl").textContent = curl(); }

async function copy() {
  let done = true;
  try {
    await navigator.clipboard.writeText($("curl").textContent);
  } catch { // no clipboard outside secure origins: select the text instead
    getSelection().selectAllChildren($("curl"));
    done = document.execCommand("copy");
  }
  $("copy").textContent = done ? "Copied" : "Selected";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
}

/* ---- wiring ---- */

function changed() {
  const n = classIds().length;
  $("chosen").textContent = n > 1 ? `${n} chosen` : "";
  visibility();
  if (!shown) showCurl();
}

function theme(next) {
  const order = ["auto", "light", "dark"];
  const now = next ? order[(order.indexOf(localStorage.getItem("theme") || "auto") + 1) % 3] : localStorage.getItem("theme") || "auto";
  localStorage.setItem("theme", now);
  if (now === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = now;
  $("theme").textContent = `Theme: ${now}`;
}

async function start() {
  theme(false);
  try {
    const response = await fetch("v1/capabilities");
    const body = await response.json();
    if (!response.ok) throw body.error || { message: `The daemon answered ${response.status}.` };
    if (!body.models.length) throw { message: "No model is ready yet." };
    caps = body;
  } catch (e) {
    showError(e.message && !(e instanceof TypeError) ? e : { message: "The daemon cannot be reached." });
    $("about").textContent = "waiting for the daemon";
    setTimeout(start, 3000);
    return;
  }
  clearErrors();
  options($("rng"), named(caps.rng));
  options($("model"), caps.models.map((m) => [m.name, m.name]));
  $("model").value = (caps.models.find((m) => m.default) || caps.models[0]).name;
  $("n").max = caps.limits.max_images;
  $("steps").max = caps.limits.max_steps;
  $("max_evaluations").max = caps.limits.max_evaluations;
  $("timeout_ms").max = caps.limits.max_timeout_ms;
  modelChanged();
  changed();
  $("go").disabled = false;
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
$("form").addEventListener("input", () => { if (caps) changed(); });
$("model").addEventListener("change", modelChanged);
$("filter").addEventListener("input", fillChips);
$("scale").addEventListener("input", () => { $("scale-slider").value = $("scale").value; });
$("scale-slider").addEventListener("input", () => { $("scale").value = $("scale-slider").value; });
$("type").addEventListener("change", fillSampler);
$("form").addEventListener("change", (event) => {
  if (!caps) return;
  if (event.target.name !== "type") rememberSampler();
  changed();
});
$("keep").addEventListener("click", () => { $("seed").value = shown.answer.seed; changed(); });
$("stop").addEventListener("click", () => running && running.abort());
$("copy").addEventListener("click", copy);
$("theme").addEventListener("click", () => theme(true));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  if (event.key === "Escape" && running) running.abort();
});
start();
