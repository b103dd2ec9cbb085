// The form. What it holds is read as a body of the API, and a body can be put back into it.

import { ApiError } from "./api.js";
import * as beside from "./beside.js";
import * as image from "./image.js";
import * as loras from "./loras.js";
import { recall, remember } from "./memory.js";

const element = (id) => document.getElementById(id);
const OTHER = "other";
const READING = ["long_prompts", "emphasis"];
const PLAIN = [
  "prompt", "negative_prompt", ...READING, "prompt_editing", "cache_interval", "scheduler", "n",
  "num_inference_steps", "guidance_scale", "pag_scale", "strength", "image_guidance_scale", "variation_strength",
  "variation_seed",
];
/** What the form holds where a body says nothing. */
const UNSAID = {
  negative_prompt: "",
  long_prompts: "truncate",
  emphasis: "",
  prompt_editing: "",
  cache_interval: 1,
  control_mode: null,
  loras: {},
  variation_strength: 0,
  variation_seed: "",
};
const NUMBERS = {
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  pag_scale: "PAG scale",
  n: "Pictures",
  strength: "Strength",
  image_guidance_scale: "Image guidance",
  variation_strength: "Variation",
};

/** Fill the choices, recall what was chosen last, and keep what is chosen from now on. */
export function setUp(engines, known) {
  element("model").replaceChildren(...engines.map(({ id }) => new Option(id, id)));
  element("model-field").hidden = engines.length < 2;
  element("scheduler").replaceChildren(...known.samplers.map(group));
  element("num_inference_steps").value = known.steps;
  element("guidance_scale").value = known.guidance;
  element("scheduler").value = known.scheduler;

  const update = () => {
    follow();
    element("advice").textContent = advice(known);
  };
  const fit = () => {
    const engine = engines.find(({ id }) => id === element("model").value);
    offerSizes(engine);
    image.offer(engine);
    beside.controlnets.offer(engine.controlnets);
    beside.adapters.offer(engine.ip_adapters);
    loras.offer(engine.loras);
    element("cache_interval-field").hidden = !engine.step_cache;
    element("pag_scale-field").hidden = !engine.pag;
  };
  element("model").addEventListener("change", fit);
  image.setUp(() => element("form").dispatchEvent(new Event("input")));
  for (const one of beside.every) one.setUp(() => element("form").dispatchEvent(new Event("input")));
  element("form").addEventListener("input", () => {
    update();
    remember("settings", snapshot());
  });
  for (const slider of document.querySelectorAll("input[type=range]")) {
    slider.addEventListener("input", () => {
      element(slider.dataset.for).value = slider.value;
    });
  }
  fit();
  putBack(recall("settings") ?? {});
  update();
}

/** The body that the form asks for. Throws an `ApiError` of the field that holds no number. */
export function read() {
  const body = { model: element("model").value, prompt: element("prompt").value };
  const negative = element("negative_prompt").value;
  if (negative) body.negative_prompt = negative;
  for (const name of READING) if (element(name).value) body[name] = element(name).value;
  if (element("prompt_editing").value) body.prompt_editing = true;
  const interval = Number(element("cache_interval").value);
  if (interval > 1 && !element("cache_interval-field").hidden) body.cache_interval = interval;
  body.n = number("n");
  body.size = size();
  for (const name of ["num_inference_steps", "guidance_scale"]) body[name] = number(name);
  if (!element("pag_scale-field").hidden) body.pag_scale = number("pag_scale");
  body.scheduler = element("scheduler").value;
  if (image.chosen()) body[image.measure()] = number(image.measure());
  for (const one of beside.every) {
    const scales = one.scales();
    if (scales !== null) body[one.scale] = scales;
  }
  const modes = beside.controlnets.modes();
  if (modes !== null) body.control_mode = modes;
  const scales = loras.scales();
  if (Object.keys(scales).length) body.loras = scales;
  if (seeding() === "fixed") body.seed = seed("seed", "Seed");
  const strength = number("variation_strength");
  if (strength > 0) {
    body.variation_strength = strength;
    const field = element("variation_seed");
    if (field.value || field.validity.badInput) body.variation_seed = seed("variation_seed", "Variation seed");
  }
  return body;
}

/** Put a body, or what was kept of one, into the form. What is not on offer stays as it is. */
export function putBack(body) {
  if (has("model", body.model)) {
    element("model").value = body.model;
    element("model").dispatchEvent(new Event("change"));
  }
  for (const name of PLAIN) {
    const choice = element(name) instanceof HTMLSelectElement;
    if (name in body && (!choice || has(name, body[name]))) element(name).value = body[name];
  }
  for (const { scale, putScales } of beside.every) if (scale in body) putScales(body[scale]);
  if ("control_mode" in body) beside.controlnets.putModes(body.control_mode);
  if ("loras" in body) loras.put(body.loras);
  if (body.size) putSize(String(body.size));
  if ("seed" in body) element("seed").value = body.seed;
  element("form").elements.seeding.value = body.seeding ?? ("seed" in body ? "fixed" : "random");
  follow();
}

/** Reuse a picture's parameters: as if they had been typed. */
export function reuse(body) {
  putBack({ ...UNSAID, ...body });
  element("form").dispatchEvent(new Event("input"));
}

export function reuseSeed(seed) {
  putBack({ seed });
  element("form").dispatchEvent(new Event("input"));
}

/** Show an error next to the field that it is about; false when no such field is there to be seen. */
export function tell(error) {
  const [field, place] = [element(error.param), element(`${error.param}-error`)];
  if (!place || !field.checkVisibility()) return false;
  place.textContent = error.message;
  place.hidden = false;
  field.setAttribute("aria-invalid", "true");
  const described = field.getAttribute("aria-describedby");
  field.setAttribute("aria-describedby", [place.id, described].filter(Boolean).join(" "));
  field.focus();
  return true;
}

export function clearErrors() {
  for (const place of document.querySelectorAll("form .error:not([hidden])")) {
    place.hidden = true;
    const field = element(place.id.replace("-error", ""));
    field.removeAttribute("aria-invalid");
    const others = field.getAttribute("aria-describedby").split(" ").filter((id) => id !== place.id);
    if (others.length) field.setAttribute("aria-describedby", others.join(" "));
    else field.removeAttribute("aria-describedby");
  }
}

const has = (id, value) => [...element(id).options].some((option) => option.value === String(value));
const seeding = () => element("form").elements.seeding.value;

function number(name) {
  const value = element(name).valueAsNumber;
  if (Number.isNaN(value)) throw new ApiError(`${NUMBERS[name]}: give a number.`, { param: name });
  return value;
}

function seed(name, label) {
  const value = element(name).valueAsNumber;
  if (Number.isSafeInteger(value)) return value;
  throw new ApiError(`${label}: give a whole number from 0 to ${Number.MAX_SAFE_INTEGER}.`, { param: name });
}

function size() {
  const chosen = element("size").value;
  return chosen === OTHER ? `${element("width").value}x${element("height").value}` : chosen;
}

function putSize(size) {
  if (has("size", size)) {
    element("size").value = size;
  } else if (has("size", OTHER)) {
    element("size").value = OTHER;
    [element("width").value, element("height").value] = size.split("x");
  }
}

/** What is kept between visits: unlike a body, also what could not be drawn. */
function snapshot() {
  const kept = Object.fromEntries(PLAIN.map((name) => [name, element(name).value]));
  return { ...kept, model: element("model").value, size: size(), seed: element("seed").value, seeding: seeding() };
}

function offerSizes({ sizes, default_size }) {
  const ranges = sizes.filter((size) => size.includes(".."));
  const fixed = sizes.filter((size) => !size.includes(".."));
  const options = [...new Set([default_size, ...fixed])].map((size) => new Option(size.replace("x", " × "), size));
  if (ranges.length) options.push(new Option(`Another, ${ranges[0].replace("x", " × ").replaceAll("..", "–")}`, OTHER));
  const before = element("size").value;
  element("size").replaceChildren(...options);
  [element("width").value, element("height").value] = default_size.split("x");
  if (before && before !== OTHER && has("size", before)) element("size").value = before;
}

/** Bring what depends on other fields in line with them. */
function follow() {
  for (const slider of document.querySelectorAll("input[type=range]")) {
    slider.value = element(slider.dataset.for).value;
  }
  element("sides").hidden = element("size").value !== OTHER;
  element("seed").disabled = seeding() !== "fixed";
  element("variation_seed-field").hidden = !(element("variation_strength").valueAsNumber > 0);
}

function group({ group, samplers }) {
  const made = document.createElement("optgroup");
  made.label = group;
  made.append(...samplers.map(({ name }) => new Option(name, name)));
  return made;
}

function advice({ samplers }) {
  const all = samplers.flatMap(({ samplers }) => samplers);
  const { advice, evaluations } = all.find(({ name }) => name === element("scheduler").value);
  return evaluations > 1 ? `${advice} (${evaluations} evaluations a step)` : advice;
}
