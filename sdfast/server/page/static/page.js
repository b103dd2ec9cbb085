// The page: `fields.js` is its form, `api.js` the server, `gallery.js` what was drawn, `snippets.js` the same in code.

import * as api from "./api.js";
import * as beside from "./beside.js";
import * as fields from "./fields.js";
import * as gallery from "./gallery.js";
import * as image from "./image.js";
import { remember } from "./memory.js";
import { address, decoded } from "./picture.js";
import { curl, python } from "./snippets.js";

const element = (id) => document.getElementById(id);
const THEMES = { system: "light", light: "dark", dark: "system" }; // each with the one that follows
let known = null; // what the server tells; null until it does
let engines = [];
let drawing = null; // the AbortController of the picture that is under way
let countdown = null; // of the seconds that the server wants to be left alone
let lastSeed = null;
const resets = new WeakMap(); // of a button that tells of a copy: the timer of its own text

async function start() {
  hideNotice();
  try {
    const [models, told] = await Promise.all([api.getJson("v1/models"), api.getJson("page/known")]);
    [engines, known] = [models.data, told];
  } catch (error) {
    showNotice(error, start);
    return;
  }
  fields.setUp(engines, known);
  element("form").addEventListener("input", showCode);
  showCode();
}

async function draw() {
  if (!known || drawing || countdown) return;
  fields.clearErrors();
  hideNotice();
  drawing = new AbortController();
  work(true);
  try {
    await follow(fields.read(), drawing.signal);
  } catch (error) {
    explain(error);
  } finally {
    drawing = null;
    work(false);
  }
}

async function follow(body, signal) {
  const begun = performance.now();
  let count = 0;
  say("Waiting for the server.");
  for await (const event of api.draw(body, { image: image.chosen(), files: beside.files() }, signal)) {
    if (event.type.endsWith(".progress")) showProgress(event);
    else if (event.type.endsWith(".partial_image")) showPicture(address(decoded(event.b64_json)), "A preview of the picture");
    else if (event.type.endsWith(".completed")) finish(event, body, count++);
  }
  const seconds = ((performance.now() - begun) / 1000).toFixed(1);
  say(`${count === 1 ? "One picture" : `${count} pictures`} drawn in ${seconds} s.`);
}

/** One of the pictures is done: it goes into the gallery, the first of them onto the canvas. */
function finish(event, body, i) {
  const own = { ...body, n: 1, seed: event.seed };
  if ("variation_seed" in event) own.variation_seed = event.variation_seed;
  const { index, url } = gallery.add(decoded(event.b64_json), own, event.warnings);
  lastSeed = event.seed;
  element("reuse-seed").disabled = false;
  if (i > 0) return;
  showPicture(url, body.prompt || "A picture without a prompt");
  element("shown").dataset.index = index;
}

function showPicture(url, alt) {
  const shown = element("shown");
  if (shown.dataset.index === undefined && shown.src) URL.revokeObjectURL(shown.src); // a preview
  delete shown.dataset.index;
  shown.src = url;
  shown.alt = alt;
  shown.hidden = false;
  element("empty").hidden = true;
}

function showProgress({ position, step, steps }) {
  const bar = element("progress");
  if (position !== null) {
    bar.removeAttribute("value");
    const ahead = position === 1 ? "one job is" : `${position} jobs are`;
    say(position ? `Waiting: ${ahead} before this one.` : "Waiting: this one is next.");
    return;
  }
  bar.max = steps || 1;
  bar.value = step;
  element("counted").textContent = steps ? `step ${step} of ${steps}` : "";
  say("Drawing.");
}

/** Show whether a picture is under way. The button that draws stays where it is: it may have the focus. */
function work(busy) {
  const bar = element("progress");
  bar.removeAttribute("value");
  element("counted").textContent = "";
  if (!busy && document.activeElement === element("cancel")) element("draw").focus();
  element("working").hidden = !busy;
  if (busy) element("stage").scrollIntoView({ block: "nearest" });
  element("stage").setAttribute("aria-busy", busy);
  markDraw();
}

function explain(error) {
  if (error.name === "AbortError") {
    say("Cancelled.");
    return;
  }
  say("");
  if (!(error instanceof api.ApiError)) throw error;
  if (!fields.tell(error)) showNotice(error, draw);
}

/** Changes are read aloud; the same again is not. */
function say(text) {
  if (element("status").textContent !== text) element("status").textContent = text;
}

/** Tell what went wrong. Where to try again may help, a button does, once the server's seconds are over. */
function showNotice(error, again) {
  element("notice-text").textContent = error.message;
  element("notice").hidden = false;
  const button = element("again");
  button.hidden = error.retryAfter === null;
  button.onclick = again;
  countDown(error.retryAfter ?? 0);
}

function countDown(seconds) {
  clearInterval(countdown);
  const until = performance.now() + seconds * 1000;
  const tick = () => {
    const left = Math.ceil((until - performance.now()) / 1000);
    const button = element("again");
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left > 0) return;
    clearInterval(countdown);
    countdown = null;
    markDraw();
  };
  countdown = seconds > 0 ? setInterval(tick, 200) : null;
  tick();
}

function markDraw() {
  element("draw").setAttribute("aria-disabled", Boolean(drawing || countdown));
}

function hideNotice() {
  element("notice").hidden = true;
}

function showCode() {
  let body;
  try {
    body = fields.read();
  } catch (error) {
    element("curl").textContent = element("python").textContent = error.message;
    return;
  }
  const call = { server: api.server, key: known.key, image: Boolean(image.chosen()), files: beside.files() };
  element("curl").textContent = curl(body, call);
  element("python").textContent = python(body, call);
}

/** The button tells what became of it, and has its own text again after a while. */
async function copy(text, button) {
  button.dataset.label ??= button.textContent;
  button.textContent = (await copied(text)) ? "Copied" : "Could not copy";
  clearTimeout(resets.get(button));
  const own = () => {
    button.textContent = button.dataset.label;
  };
  resets.set(button, setTimeout(own, 1500));
}

/** Put text into the clipboard, on plain HTTP as well, where browsers have the old way only. */
async function copied(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  const area = document.createElement("textarea");
  area.value = text;
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "system";
  element("theme").textContent = `Theme: ${theme}`;
  return theme;
}

function changeTheme() {
  const next = THEMES[showTheme()];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  remember("theme", next);
  showTheme();
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
document.addEventListener("keydown", (event) => {
  if (element("large").open) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    draw();
  } else if (event.key === "Escape") {
    drawing?.abort();
  }
});
element("cancel").addEventListener("click", () => drawing?.abort());
element("shown").addEventListener("click", ({ target }) => {
  if (target.dataset.index !== undefined) gallery.showLarge(Number(target.dataset.index));
});
element("reuse-seed").addEventListener("click", () => fields.reuseSeed(lastSeed));
element("copy-curl").addEventListener("click", ({ target }) => copy(element("curl").textContent, target));
element("copy-python").addEventListener("click", ({ target }) => copy(element("python").textContent, target));
element("theme").addEventListener("click", changeTheme);
gallery.setUp(fields.reuse, copy);
showTheme();
start();
