// The images that an engine takes beside the form, each with its scale: of its ControlNets, which have modes, and of
// its IP-Adapters.

import { ApiError } from "./api.js";
import { receive } from "./image.js";

const element = (id) => document.getElementById(id);
const MODES = {
  "": "Default",
  balanced: "Balanced",
  prompt: "Prompt counts for more",
  control: "ControlNet counts for more",
  guess: "Guess (diffusers)",
};

/**
 * box: the id of what is hidden where there are none, list: of what their fields are put in. image, scale: the API's
 * names of the two. mode: that of a choice of `MODES`, where there is one. what: what such an image is called.
 * needed: whether there is no picture without.
 */
function beside({ box, list, image, scale, mode = null, what, needed }) {
  let several = []; // of each ControlNet or IP-Adapter: its name, its file or null, the fields of its scale and mode
  let changed = () => {};

  /** The files, one for each; null for one that is to add nothing. */
  const chosen = () => several.map(({ file }) => file);

  /** A field of what is offered. The ids of the first are the API's names, by which errors find their place. */
  function block(one, i) {
    const own = (id) => (i === 0 ? id : `${id}-${i + 1}`);
    const title = made("span", { className: "label", id: own(`${image}-label`), textContent: `${what}: ${one.name}` });
    const shown = made("img", { alt: `The ${what.toLowerCase()} of ${one.name}`, hidden: true });
    const hint = made("label", { id: own(`${image}-hint`), textContent: `Drop a ${what.toLowerCase()}, or choose one` });
    const input = made("input", { type: "file", id: own(image), accept: "image/png,image/jpeg,image/webp" });
    const remove = made("button", { type: "button", className: "quiet", hidden: true, textContent: "Remove the image" });
    const zone = made("div", { className: "drop" }, shown, hint, input, remove);
    hint.htmlFor = input.id;
    input.setAttribute("aria-labelledby", `${title.id} ${hint.id}`);
    receive({ zone, input, shown, hint, remove }, (file) => {
      one.file = file;
      changed();
    });
    const modes = mode === null ? [] : [choosing(one, own(mode))];
    return made("div", { className: "field" }, title, zone, sliding(one, own(scale)), ...modes);
  }

  return {
    image,
    scale,
    chosen,

    /** A number, of several a list; null where nothing is to be said. Throws an `ApiError` of a field without one. */
    scales() {
      if (!needed && !chosen().some(Boolean)) return null;
      const numbers = several.map(({ name, field }) => {
        if (Number.isNaN(field.valueAsNumber)) throw new ApiError(`Scale of ${name}: give a number.`, { param: field.id });
        return field.valueAsNumber;
      });
      return numbers.length > 1 ? numbers : (numbers[0] ?? null);
    },

    putScales(given) {
      const numbers = [given].flat();
      if (numbers.length === several.length) several.forEach(({ field }, i) => (field.value = numbers[i]));
    },

    /** A mode, of several a list; null where nothing is to be said. Where one says something, the others are balanced. */
    modes() {
      const given = several.map(({ choice }) => choice.value);
      if (!given.some(Boolean)) return null;
      return given.length > 1 ? given.map((mode) => mode || "balanced") : given[0];
    },

    /** Modes; null for nothing said. */
    putModes(given) {
      const modes = given === null ? several.map(() => "") : [given].flat();
      if (modes.length === several.length) several.forEach(({ choice }, i) => (choice.value = modes[i]));
    },

    /** then: called whenever another image or scale is chosen. */
    setUp(then) {
      changed = then;
    },

    /** Have a field for each of these names. What was chosen stays for an engine with the same ones. */
    offer(names) {
      element(box).hidden = names.length === 0;
      if (names.join("\n") === several.map(({ name }) => name).join("\n")) return;
      several = names.map((name) => ({ name, file: null, field: null, choice: null }));
      element(list).replaceChildren(...several.map(block));
    },
  };
}

function sliding(one, id) {
  const label = `Scale of ${one.name}`;
  const slider = made("input", { type: "range", min: 0, max: 2, step: 0.05, ariaLabel: `${label}, slider` });
  one.field = made("input", { type: "number", min: 0, max: 10, step: "any", id, ariaLabel: label });
  slider.value = one.field.value = 1;
  slider.dataset.for = id;
  slider.addEventListener("input", () => (one.field.value = slider.value));
  return made("div", { className: "sliding" }, slider, one.field);
}

function choosing(one, id) {
  const options = Object.entries(MODES).map(([mode, text]) => new Option(text, mode));
  one.choice = made("select", { id, ariaLabel: `Mode of ${one.name}` }, ...options);
  return made("div", { className: "choosing" }, made("label", { htmlFor: id, textContent: "Mode" }), one.choice);
}

function made(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export const controlnets = beside({
  box: "controls",
  list: "controlnets",
  image: "control_image",
  scale: "controlnet_conditioning_scale",
  mode: "control_mode",
  what: "Control image",
  needed: true,
});
export const adapters = beside({
  box: "adapters",
  list: "ip_adapters",
  image: "ip_adapter_image",
  scale: "ip_adapter_scale",
  what: "Picture to be like",
  needed: false,
});
export const every = [controlnets, adapters];

/** The files of all, by the API's names. */
export const files = () => Object.fromEntries(every.map(({ image, chosen }) => [image, chosen()]));
