// Requests to the server. What it refuses becomes an Error with its own line and status.

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Saved strokes are safe; start it again, then reload.", 0);
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Refused(told.error ?? `The server answered ${answer.status}.`, answer.status);
}

const json = async (path, options) => (await ask(path, options)).json();
const post = (path, tree) => json(path, { method: "POST", body: JSON.stringify(tree) });
const at = (stem) => `/api/pictures/${encodeURIComponent(stem)}`;

export const state = () => json("/api/state");
export const next = (after) => json(`/api/next${after === null ? "" : `?after=${encodeURIComponent(after)}`}`);
export const open = (stem) => json(at(stem));
export const draw = (stem, revision, stroke) => post(`${at(stem)}/strokes`, { revision, stroke });
export const restore = (stem, revision, earlier) => post(`${at(stem)}/strokes`, { revision, restore: earlier });
export const loadModel = (place, checkpoint) => post("/api/models", { place, checkpoint });
export const finetune = () => post("/api/finetune", {});
export const thumbnail = (stem) => `${at(stem)}/thumbnail`;

const MAX_BYTES = 64e6;

export async function add(file) {
  if (file.size > MAX_BYTES) throw new Refused(`${file.name}: larger than 64 MB; make it smaller`, 413);
  return json(`/api/pictures?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
}

async function picture(path, options) {
  const answer = await ask(path, options);
  return [await createImageBitmap(await answer.blob()), answer.headers];
}

export const photo = async (stem) => (await picture(`${at(stem)}/photo`))[0];
export const strokes = async (stem) => (await picture(`${at(stem)}/strokes`))[0];

// 255 x the probability of object, one byte per pixel of the picture that is shown.
async function greys(path, options) {
  const [image, headers] = await picture(path, options);
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height).data;
  const values = new Uint8ClampedArray(image.width * image.height);
  for (let i = 0; i < values.length; i++) values[i] = pixels[4 * i];
  const [seconds, kept] = [Number(headers.get("x-seconds")), headers.get("x-kept") === "1"];
  return { values, width: image.width, height: image.height, seconds, kept };
}

export const mask = (stem, revision, place, signal, carefully = false) =>
  greys(`${at(stem)}/mask?place=${place}&revision=${revision}&carefully=${carefully}`, { signal });
export const savedMask = (stem, signal) => greys(`${at(stem)}/mask?place=saved`, { signal });
export const accept = (stem, revision) =>
  greys(`${at(stem)}/mask`, { method: "POST", body: JSON.stringify({ revision }) });
