// The call that the form makes, as a shell command and as a Python program. Both are to be run as they are.

const OPENAI = ["model", "prompt", "n", "size"]; // the SDK's own arguments; others go into extra_body
const UNSEEN = /[\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

/** JSON, whose numbers and strings are Python's too. What cannot be seen is written as an escape. */
function literal(value) {
  return JSON.stringify(value).replace(UNSEEN, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

const pythons = (value) => (typeof value === "boolean" ? (value ? "True" : "False") : literal(value));

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** server: its address, with a slash at its end. key: whether it asks for one. image: whether one is drawn over. */
export function curl(body, { server, key, image }) {
  const lines = [`curl ${quoted(`${server}v1/images/${image ? "edits" : "generations"}`)}`];
  if (key) lines.push('-H "Authorization: Bearer $SDFAST_API_KEY"');
  if (image) {
    lines.push("-F 'image=@image.png'");
    for (const [name, value] of Object.entries(body)) lines.push(`--form-string ${quoted(`${name}=${value}`)}`);
  } else {
    const fields = Object.entries(body).map(([name, value]) => `  "${name}": ${literal(value)}`);
    lines.push("-H 'Content-Type: application/json'", `-d ${quoted(`{\n${fields.join(",\n")}\n}`)}`);
  }
  return [...lines, "-o answer.json"].join(" \\\n  ");
}

export function python(body, { server, key, image }) {
  const [own, extra] = [true, false].map((wanted) =>
    Object.entries(body).filter(([name]) => OPENAI.includes(name) === wanted),
  );
  return [
    "import base64",
    ...(key ? ["import os"] : []),
    "from pathlib import Path",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${server}v1`)}, api_key=${key ? 'os.environ["SDFAST_API_KEY"]' : '"none"'})`,
    `answer = client.images.${image ? "edit" : "generate"}(`,
    ...(image ? ['    image=Path("image.png"),'] : []),
    ...own.map(([name, value]) => `    ${name}=${pythons(value)},`),
    "    extra_body={",
    ...extra.map(([name, value]) => `        "${name}": ${pythons(value)},`),
    "    },",
    ")",
    "for i, picture in enumerate(answer.data):",
    '    Path(f"picture-{i}.png").write_bytes(base64.b64decode(picture.b64_json))',
  ].join("\n");
}
