// The server's API: what it is asked, the events it answers with, and its errors.

/** Where the server is, without what an address may hold besides. */
export const server = new URL(location.origin + location.pathname.replace(/[^/]*$/, "")).href;

/** An error in the API's own words. retryAfter: seconds, or null where to try again may not help. */
export class ApiError extends Error {
  constructor(message, { param = null, retryAfter = null } = {}) {
    super(message);
    this.param = param;
    this.retryAfter = retryAfter;
  }
}

export async function getJson(path) {
  return (await ask(path, {})).json();
}

/**
 * Draw. Yields the events of the answer, each an object with its `type`.
 * image: a file to draw over, or null. files: of each field, such as control_image, the files, or null.
 */
export async function* draw(body, { image, files }, signal) {
  const asked = { ...body, stream: true, partial_images: 3, progress: true };
  const request = image ? multipart(asked, image, files) : json(await withFiles(asked, files));
  const answer = await ask(image ? "v1/images/edits" : "v1/images/generations", { method: "POST", signal, ...request });
  for await (const data of messages(answer)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, event.error);
    yield event;
  }
  throw lost();
}

function json(body) {
  return { headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
}

/** An image that is not there is an empty file, where others of its field are. */
function multipart(body, image, files) {
  const form = new FormData();
  form.set("image", image, image.name);
  for (const [field, several] of Object.entries(files)) {
    if (several.some(Boolean)) for (const file of several) form.append(field, file ?? new Blob([]), "image");
  }
  for (const [name, value] of Object.entries(body)) form.set(name, Object(value) === value ? JSON.stringify(value) : String(value));
  return { body: form };
}

async function withFiles(body, files) {
  const given = { ...body };
  for (const [field, several] of Object.entries(files)) {
    if (!several.some(Boolean)) continue;
    const images = await Promise.all(several.map((file) => file && base64(file, field)));
    given[field] = images.length > 1 ? images : images[0];
  }
  return given;
}

function base64(file, field) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new ApiError("The image cannot be read.", { param: field }));
    reader.readAsDataURL(file);
  });
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(server + path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : lost();
  }
  if (!answer.ok) throw await refused(answer);
  return answer;
}

async function refused(answer) {
  const later = answer.status === 429 || answer.status === 503;
  const retryAfter = later ? Number(answer.headers.get("retry-after") ?? 0) : null;
  try {
    const { message, param } = (await answer.json()).error;
    return new ApiError(message, { param, retryAfter });
  } catch {
    return new ApiError(`The server answered ${answer.status}.`, { retryAfter });
  }
}

function lost() {
  return new ApiError("The connection to the server was lost.", { retryAfter: 0 });
}

/** The data of server-sent events, as they come. */
async function* messages(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").find((line) => line.startsWith("data: "));
        if (data) yield data.slice("data: ".length);
      }
    }
  } catch (error) {
    throw error.name === "AbortError" || error instanceof ApiError ? error : lost();
  }
}
