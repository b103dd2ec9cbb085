// The call that the form makes, as a shell command and as a Python program. Both are to be run as they are.

const OPENAI = ["model", "prompt", "n", "size"]; // the SDK's own arguments; others go into extra_body
const UNSEEN = /[\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

/** JSON, whose numbers and strings are Python's too. What cannot be seen is written as an escape. */
function literal(value) {
  return JSON.stringify(value).replace(UNSEEN, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

const pythons = (value) => (typeof value === "boolean" ? (value ? "True" : "False") : literal(value));

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

const STEMS = { control_image: "control", ip_adapter_image: "like" }; // of the files' names

/** Of each field of which some file is chosen, the files' names, null for one that is not: [field, names]. */
function filesOf(files) {
  const named = (field, several) => several.map((file, i) => (file ? `${STEMS[field]}-${i + 1}.png` : null));
  const chosen = Object.entries(files).filter(([, several]) => several.some(Boolean));
  return chosen.map(([field, several]) => [field, named(field, several)]);
}

/** Each of them by itself: [field, name]. */
const apart = (files) => files.flatMap(([field, names]) => names.map((name) => [field, name]));

/** A list of one for each, or what there is for the only one. */
const oneOrEach = (images) => (images.length > 1 ? `[${images.join(", ")}]` : images[0]);

/** A value as a form has it. */
const text = (value) => (Object(value) === value ? JSON.stringify(value) : String(value));

/**
 * server: its address, with a slash at its end. key: whether it asks for one. image: whether one is drawn over.
 * files: of each field, such as control_image, the files, or null.
 */
export function curl(body, { server, key, image, files: chosen }) {
  const files = filesOf(chosen);
  const lines = [`curl ${quoted(`${server}v1/images/${image ? "edits" : "generations"}`)}`];
  if (key) lines.push('-H "Authorization: Bearer $SDFAST_API_KEY"');
  if (image) {
    lines.push("-F 'image=@image.png'", ...apart(files).map(([field, file]) => `-F '${field}=@${file ?? "/dev/null"}'`));
    for (const [name, value] of Object.entries(body)) lines.push(`--form-string ${quoted(`${name}=${text(value)}`)}`);
  } else {
    const fields = Object.entries(body).map(([name, value]) => `  "${name}": ${literal(value)}`);
    lines.push("-H 'Content-Type: application/json'");
    if (files.length) return `${printed(fields, files)} | ${[...lines, "-d @-", "-o answer.json"].join(" \\\n  ")}`;
    lines.push(`-d ${quoted(`{\n${fields.join(",\n")}\n}`)}`);
  }
  return [...lines, "-o answer.json"].join(" \\\n  ");
}

/** What prints the JSON of fields and of files as base64: too much for an argument. NUL, which no JSON holds, parts them. */
function printed(fields, files) {
  const images = files.map(([field, names]) => {
    return `  "${field}": ${oneOrEach(names.map((name) => (name ? `"\0${name}\0"` : "null")))}`;
  });
  const pieces = `{\n${[...fields, ...images].join(",\n")}\n}`.split("\0");
  const commands = pieces.map((piece, i) => (i % 2 ? `base64 < ${piece} | tr -d '\\n'` : `printf %s ${quoted(piece)}`));
  return `{ ${commands.join("\n")}\n}`;
}

export function python(body, { server, key, image, files: chosen }) {
  const files = filesOf(chosen);
  const address = `${server}v1`;
  if (image && files.length) return pythonForm(body, { address, key, files });
  const [own, extra] = [true, false].map((wanted) =>
    Object.entries(body).filter(([name]) => OPENAI.includes(name) === wanted),
  );
  const read = (name) => (name ? `base64.b64encode(Path("${name}").read_bytes()).decode()` : "None");
  return [
    "import base64",
    ...(key ? ["import os"] : []),
    "from pathlib import Path",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(address)}, api_key=${key ? 'os.environ["SDFAST_API_KEY"]' : '"none"'})`,
    `answer = client.images.${image ? "edit" : "generate"}(`,
    ...(image ? ['    image=Path("image.png"),'] : []),
    ...own.map(([name, value]) => `    ${name}=${pythons(value)},`),
    "    extra_body={",
    ...extra.map(([name, value]) => `        "${name}": ${pythons(value)},`),
    ...files.map(([field, names]) => `        "${field}": ${oneOrEach(names.map(read))},`),
    "    },",
    ")",
    "for i, picture in enumerate(answer.data):",
    '    Path(f"picture-{i}.png").write_bytes(base64.b64decode(picture.b64_json))',
  ].join("\n");
}

/** By httpx, on which the SDK is built: that sends no other files than those of its own arguments. */
function pythonForm(body, { address, key, files }) {
  const parts = apart(files).map(([field, file]) => `("${field}", ${file ? `open("${file}", "rb")` : '("none", b"")'})`);
  return [
    "import base64",
    ...(key ? ["import os"] : []),
    "from pathlib import Path",
    "",
    "import httpx",
    "",
    "answer = httpx.post(",
    `    ${literal(`${address}/images/edits`)},`,
    ...(key ? ['    headers={"Authorization": "Bearer " + os.environ["SDFAST_API_KEY"]},'] : []),
    "    files=[",
    '        ("image", open("image.png", "rb")),',
    ...parts.map((part) => `        ${part},`),
    "    ],",
    "    data={",
    ...Object.entries(body).map(([name, value]) => `        "${name}": ${literal(text(value))},`),
    "    },",
    "    timeout=None,",
    ")",
    'for i, picture in enumerate(answer.raise_for_status().json()["data"]):',
    '    Path(f"picture-{i}.png").write_bytes(base64.b64decode(picture["b64_json"]))',
  ].join("\n");
}
