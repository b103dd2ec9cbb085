// The pictures of this session: small ones to walk through, and one of them large with its parameters.

import { address, infotext } from "./picture.js";

const element = (id) => document.getElementById(id);
const NAMES = {
  prompt: "Prompt",
  negative_prompt: "Negative prompt",
  size: "Size",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  pag_scale: "PAG scale",
  scheduler: "Scheduler",
  long_prompts: "Long prompts",
  emphasis: "Emphasis",
  prompt_editing: "Prompt editing",
  cache_interval: "Whole steps, one in",
  strength: "Strength",
  image_guidance_scale: "Image guidance",
  controlnet_conditioning_scale: "ControlNet scale",
  control_mode: "ControlNet mode",
  loras: "LoRAs",
  ip_adapter_scale: "IP-Adapter scale",
  seed: "Seed",
  variation_strength: "Variation",
  variation_seed: "Variation seed",
  model: "Engine",
};
/** A value for people: of LoRAs each with its scale. */
const said = (value) => (Object(value) === value && !Array.isArray(value) ? Object.entries(value).map((pair) => pair.join(" ")).join(", ") : String(value));
const STRIDES = { ArrowLeft: -1, ArrowRight: 1 };
const pictures = []; // the newest last; each with its button
let shown = -1; // the index of the one that is large

/** body: what draws this very picture again. Returns what `showLarge` takes. */
export function add(bytes, body, warnings) {
  const picture = { url: address(bytes), text: infotext(bytes), body, warnings, button: thumbnail(body) };
  const index = pictures.push(picture) - 1;
  picture.button.firstChild.src = picture.url;
  picture.button.addEventListener("click", () => showLarge(index));
  const item = document.createElement("li");
  item.append(picture.button);
  element("gallery").prepend(item);
  element("session").hidden = false;
  rove(index);
  return { index, url: picture.url };
}

export function showLarge(index) {
  shown = index;
  const { url, body, warnings } = pictures[index];
  element("large-title").textContent = `Picture ${index + 1} of ${pictures.length}`;
  element("large-picture").src = url;
  element("large-picture").alt = body.prompt || "A picture without a prompt";
  element("parameters").replaceChildren(...Object.keys(NAMES).filter((name) => name in body).flatMap(
    (name) => [made("dt", NAMES[name]), made("dd", said(body[name]))],
  ));
  element("warnings").replaceChildren(...warnings.map((warning) => made("li", warning)));
  element("download").href = url;
  const seeds = [body.seed, body.variation_seed].filter((seed) => seed !== undefined);
  element("download").download = `sdfast-${seeds.join("-")}.png`;
  element("before").disabled = index === 0;
  element("after").disabled = index === pictures.length - 1;
  if (!element("large").open) element("large").showModal();
}

/** reuse: called with the body of the picture that is large. copy: called with its text and the button. */
export function setUp(reuse, copy) {
  const step = (stride) => {
    if (shown + stride in pictures) showLarge(shown + stride);
  };
  element("before").addEventListener("click", () => step(-1));
  element("after").addEventListener("click", () => step(1));
  element("close").addEventListener("click", () => element("large").close());
  element("large").addEventListener("keydown", ({ key }) => {
    if (key in STRIDES) step(STRIDES[key]);
  });
  element("large").addEventListener("click", ({ target }) => {
    if (target === element("large")) target.close(); // beside it
  });
  element("large").addEventListener("close", () => {
    rove(shown);
    pictures[shown].button.focus();
  });
  element("reuse").addEventListener("click", () => {
    element("large").close();
    reuse(pictures[shown].body);
  });
  element("copy-parameters").addEventListener("click", ({ target }) => copy(pictures[shown].text, target));
  element("gallery").addEventListener("keydown", walk);
}

/** Arrow keys, Home and End go through the small pictures, which Tab reaches as one. */
function walk(event) {
  const buttons = [...element("gallery").querySelectorAll("button")];
  const columns = buttons.filter(({ offsetTop }) => offsetTop === buttons[0].offsetTop).length;
  const strides = { ...STRIDES, ArrowUp: -columns, ArrowDown: columns, Home: -Infinity, End: Infinity };
  if (!(event.key in strides)) return;
  event.preventDefault();
  const to = buttons.indexOf(document.activeElement) + strides[event.key];
  const next = buttons[Math.max(0, Math.min(buttons.length - 1, to))];
  rove(pictures.findIndex(({ button }) => button === next));
  next.focus();
}

function rove(index) {
  pictures.forEach(({ button }, i) => {
    button.tabIndex = i === index ? 0 : -1;
  });
}

function thumbnail(body) {
  const button = document.createElement("button");
  button.type = "button";
  const seeds = [`seed ${body.seed}`];
  if ("variation_seed" in body) seeds.push(`variation seed ${body.variation_seed}`);
  const told = [`${body.num_inference_steps} steps`, ...seeds].join(", ");
  button.setAttribute("aria-label", `Show large: ${body.prompt || "no prompt"}, ${told}`);
  const image = document.createElement("img");
  image.alt = "";
  const small = seeds.map((text) => made("span", text));
  for (const line of small) line.className = "hint";
  button.append(image, made("span", body.prompt || "no prompt"), ...small);
  return button;
}

/** An element that holds text, and nothing but text. */
function made(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}
