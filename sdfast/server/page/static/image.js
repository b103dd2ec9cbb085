// The image to draw over, where an engine takes one; and how images are dropped, or chosen.

const element = (id) => document.getElementById(id);
let file = null;
let able = false;
let instructed = false;

/** The file, or null. */
export const chosen = () => (able ? file : null);

/** The field that says how much of the image is left. */
export const measure = () => (instructed ? "image_guidance_scale" : "strength");

/** Whether an engine takes images, or edits them as it is told. What was chosen stays for one that does. */
export function offer(engine) {
  able = engine.edits;
  instructed = engine.instructed;
  element("image-field").hidden = !able;
  for (const field of ["strength", "image_guidance_scale"]) {
    element(`${field}-field`).hidden = !chosen() || measure() !== field;
  }
}

/** changed: called whenever another image is chosen, or none. */
export function setUp(changed) {
  const parts = {
    zone: element("drop"),
    input: element("image"),
    shown: element("image-shown"),
    hint: element("image-hint"),
    remove: element("image-remove"),
  };
  receive(parts, (given) => {
    file = given;
    offer({ edits: able, instructed });
    changed();
  });
}

/**
 * Let an image be dropped into a zone or chosen in its input, show it there, and let it be removed.
 * choose: called with the file, or with null.
 */
export function receive({ zone, input, shown, hint, remove }, choose) {
  const take = (given) => {
    if (shown.src) URL.revokeObjectURL(shown.src);
    if (given) shown.src = URL.createObjectURL(given);
    else shown.removeAttribute("src");
    shown.hidden = remove.hidden = !given;
    hint.hidden = Boolean(given);
    choose(given ?? null);
  };
  input.addEventListener("change", () => take(input.files[0]));
  remove.addEventListener("click", () => {
    input.value = "";
    take(null);
    input.focus();
  });
  for (const type of ["dragover", "dragleave", "drop"]) {
    zone.addEventListener(type, (event) => {
      event.preventDefault(); // the browser would leave the page for the file
      zone.classList.toggle("over", type === "dragover");
    });
  }
  zone.addEventListener("drop", ({ dataTransfer }) => {
    if (dataTransfer.files.length) take(dataTransfer.files[0]);
  });
}
