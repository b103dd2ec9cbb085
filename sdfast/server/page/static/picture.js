// A finished picture: its file, and the parameters that are written inside.

const SIGNATURE = 8; // bytes of a PNG file before its first chunk

/** The bytes of base64 text. */
export const decoded = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

export const address = (bytes) => URL.createObjectURL(new Blob([bytes], { type: "image/png" }));

/** The text under "parameters" in a PNG file, as AUTOMATIC1111 reads it; "" where there is none. */
export function infotext(png) {
  const view = new DataView(png.buffer);
  for (let at = SIGNATURE; at + SIGNATURE <= png.length; ) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...png.subarray(at + 4, at + 8));
    const data = png.subarray(at + 8, at + 8 + length);
    const end = data.indexOf(0);
    if ((type === "tEXt" || type === "iTXt") && latin(data.subarray(0, end)) === "parameters") {
      return type === "tEXt" ? latin(data.subarray(end + 1)) : international(data, end);
    }
    at += length + 12;
  }
  return "";
}

const latin = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");

/** iTXt, not compressed: after the keyword two bytes, a language and a translated keyword, then UTF-8. */
function international(data, end) {
  const translated = data.indexOf(0, end + 3) + 1;
  return new TextDecoder().decode(data.subarray(data.indexOf(0, translated) + 1));
}
