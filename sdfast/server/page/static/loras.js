// How much is added of each LoRA that an engine has for requests.

import { ApiError } from "./api.js";

const element = (id) => document.getElementById(id);
let loras = []; // of each its name, and the field of its scale

/** The scales by their names, of those that are added. Throws an `ApiError` of a field that holds no number. */
export function scales() {
  const all = loras.map(({ name, field }) => {
    if (Number.isNaN(field.valueAsNumber)) throw new ApiError(`${name}: give a number.`, { param: "loras" });
    return [name, field.valueAsNumber];
  });
  return Object.fromEntries(all.filter(([, scale]) => scale !== 0));
}

/** Scales of the engine's LoRAs; those that are not named are not added. */
export function put(given) {
  for (const { name, field } of loras) {
    if (typeof (given[name] ?? 0) === "number") field.value = given[name] ?? 0;
  }
}

/** Have a field for each of these. What was chosen stays for an engine with the same ones. */
export function offer(names) {
  element("loras-field").hidden = names.length === 0;
  if (names.join("\n") === loras.map(({ name }) => name).join("\n")) return;
  loras = names.map((name) => ({ name, field: null }));
  element("loras").replaceChildren(...loras.map(sliding));
}

/** The first one's id is the API's name, by which errors find their place. */
function sliding(lora, i) {
  const title = document.createElement("span");
  title.textContent = lora.name;
  const [slider, field] = [document.createElement("input"), document.createElement("input")];
  Object.assign(slider, { type: "range", min: -2, max: 2, step: 0.05, value: 0, ariaLabel: `${lora.name}, slider` });
  Object.assign(field, { type: "number", min: -100, max: 100, step: "any", value: 0, ariaLabel: lora.name });
  slider.dataset.for = field.id = `lora-${i + 1}`;
  slider.addEventListener("input", () => (field.value = slider.value));
  lora.field = field;
  const row = document.createElement("div");
  row.className = "sliding named";
  row.append(title, slider, field);
  return row;
}
