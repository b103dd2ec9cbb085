// The image to draw over, where an engine takes one: dropped, or chosen.

const element = (id) => document.getElementById(id);
let file = null;
let able = false;

/** The file, or null. */
export const chosen = () => (able ? file : null);

/** edits: whether the engine takes images. What was chosen stays for one that does. */
export function offer(edits) {
  able = edits;
  element("image-field").hidden = !able;
  element("strength-field").hidden = !chosen();
}

/** changed: called whenever another image is chosen, or none. */
export function setUp(changed) {
  const drop = element("drop");
  const choose = (given) => {
    file = given ?? null;
    show();
    changed();
  };
  element("image").addEventListener("change", ({ target }) => choose(target.files[0]));
  element("image-remove").addEventListener("click", () => {
    element("image").value = "";
    choose(null);
    element("image").focus();
  });
  for (const type of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(type, (event) => {
      event.preventDefault(); // the browser would leave the page for the file
      drop.classList.toggle("over", type === "dragover");
    });
  }
  drop.addEventListener("drop", ({ dataTransfer }) => {
    if (dataTransfer.files.length) choose(dataTransfer.files[0]);
  });
}

function show() {
  const shown = element("image-shown");
  if (shown.src) URL.revokeObjectURL(shown.src);
  if (file) shown.src = URL.createObjectURL(file);
  else shown.removeAttribute("src");
  shown.hidden = element("image-remove").hidden = !file;
  element("image-hint").hidden = Boolean(file);
  offer(able);
}
