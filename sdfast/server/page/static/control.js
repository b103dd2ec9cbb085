// The control images of an engine's ControlNets, each with its scale.

import { ApiError } from "./api.js";
import { receive } from "./image.js";

const element = (id) => document.getElementById(id);
const IMAGE = "control_image";
const SCALE = "controlnet_conditioning_scale";
let controls = []; // of each ControlNet: its name, its file or null, and the field of its scale
let changed = () => {};

/** The files, one for each ControlNet of the engine; null for one that is to add nothing. */
export const chosen = () => controls.map(({ file }) => file);

/** A number, of several ControlNets a list; null without any. Throws an `ApiError` of a field that holds no number. */
export function scale() {
  const numbers = controls.map(({ name, field }) => {
    if (Number.isNaN(field.valueAsNumber)) throw new ApiError(`Scale of ${name}: give a number.`, { param: field.id });
    return field.valueAsNumber;
  });
  return numbers.length > 1 ? numbers : (numbers[0] ?? null);
}

export function putScale(given) {
  const numbers = [given].flat();
  if (numbers.length === controls.length) controls.forEach(({ field }, i) => (field.value = numbers[i]));
}

/** then: called whenever another image or scale is chosen. */
export function setUp(then) {
  changed = then;
}

/** Have a field for each of these ControlNets. What was chosen stays for an engine with the same ones. */
export function offer(names) {
  element("controls").hidden = names.length === 0;
  if (names.join("\n") === controls.map(({ name }) => name).join("\n")) return;
  controls = names.map((name) => ({ name, file: null, field: null }));
  element("controlnets").replaceChildren(...controls.map(block));
}

/** The field of a ControlNet. The ids of the first are the API's names, by which errors find their place. */
function block(control, i) {
  const own = (id) => (i === 0 ? id : `${id}-${i + 1}`);
  const title = made("span", { className: "label", id: own("control-label"), textContent: `Control image: ${control.name}` });
  const shown = made("img", { alt: `The control image of ${control.name}`, hidden: true });
  const hint = made("label", { id: own("control-hint"), textContent: "Drop a control image, or choose one" });
  const input = made("input", { type: "file", id: own(IMAGE), accept: "image/png,image/jpeg,image/webp" });
  const remove = made("button", { type: "button", className: "quiet", hidden: true, textContent: "Remove the image" });
  const zone = made("div", { className: "drop" }, shown, hint, input, remove);
  hint.htmlFor = input.id;
  input.setAttribute("aria-labelledby", `${title.id} ${hint.id}`);
  receive({ zone, input, shown, hint, remove }, (file) => {
    control.file = file;
    changed();
  });
  return made("div", { className: "field" }, title, zone, sliding(control, own(SCALE)));
}

function sliding(control, id) {
  const label = `Scale of ${control.name}`;
  const slider = made("input", { type: "range", min: 0, max: 2, step: 0.05, ariaLabel: `${label}, slider` });
  control.field = made("input", { type: "number", min: 0, max: 10, step: "any", id, ariaLabel: label });
  slider.value = control.field.value = 1;
  slider.dataset.for = id;
  slider.addEventListener("input", () => (control.field.value = slider.value));
  return made("div", { className: "sliding" }, slider, control.field);
}

function made(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
