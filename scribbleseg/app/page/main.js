// What the page does: opens pictures, sends strokes, shows masks.

import * as client from "./client.js";
import { bind } from "./commands.js";
import { dropped, isPicture } from "./drop.js";
import { Past } from "./past.js";
import { listen } from "./pointer.js";
import * as rail from "./rail.js";
import { Strokes, View, Viewport } from "./view.js";

const $ = (id) => document.getElementById(id);
const viewport = new Viewport();
const look = { mode: "mask", opacity: 0.7, strokes: true, cursor: null };
const views = { main: new View($("view"), viewport, look), other: new View($("otherView"), viewport, look) };
const LABELS = { object: 1, background: 0, eraser: 255 };
const BLANK = "blank";
const REST = 1200; // Milliseconds without a stroke after which the network looks carefully.

let server = { pictures: [], models: {}, checkpoints: [] };
let current = null; // The open picture: what the server told of it, its past and its strokes.
let opening = null; // The picture that was chosen last.
let tool = "object";
let brush = 8; // In pixels of the picture that is shown.
let stroke = null;
let spaceHeld = false;
let asking = null; // Aborts the request for a mask that newer strokes have made pointless.
let saving = Promise.resolve();

// --- Messages -----------------------------------------------------------------------------------

function tell(message, kind = "trouble") {
  $("message").hidden = message === null;
  $("message").dataset.kind = kind;
  $("message").firstElementChild.textContent = message ?? "";
}

// Runs what may be refused, and says so.
const tried = (action) => async (...given) => {
  try {
    await action(...given);
  } catch (error) {
    if (error.name === "AbortError" || error.status === 410) return;
    tell(error.message);
  }
};

function hint() {
  const blank = current?.past.revision === BLANK;
  $("hint").hidden = current === null;
  $("hint").textContent = blank
    ? "Draw one stroke on the object (left button), then one beside it (right button)."
    : "Add strokes where the mask is wrong; press Enter when it is right, then N for the next picture.";
}

async function refresh() {
  server = await client.state();
  list();
  rail.listModels(server);
}

const list = () => rail.listPictures(server, current?.stem, openPicture);

// --- One picture --------------------------------------------------------------------------------

const openPicture = tried(async (stem) => {
  tell(null);
  const mine = (opening = stem);
  await saving;
  const told = await client.open(stem);
  const [photo, drawn] = await Promise.all([client.photo(stem), client.strokes(stem)]);
  // Another one was chosen while this one came in.
  if (mine !== opening) return;
  // A stroke that is not finished stays with the picture that it was begun on: nowhere.
  cancel();
  const strokes = new Strokes(photo.width, photo.height);
  strokes.replace(drawn);
  current = { ...told, photo, strokes, past: new Past(stem, told.revision) };
  for (const view of Object.values(views)) view.show(photo, strokes);
  history.replaceState(null, "", `#${encodeURIComponent(stem)}`);
  fit();
  // Before anything is waited for: a stroke may be drawn from here on, and says its own.
  showProgress(told.progress);
  $("took").textContent = "";
  await refresh();
  document.querySelector(`[aria-current=true]`)?.scrollIntoView({ block: "nearest" });
  await showMasks(performance.now());
});

function showProgress(progress) {
  current.progress = progress;
  const words = { untouched: "untouched", drawn: "strokes saved", changed: "strokes changed since accepted", accepted: "mask accepted" };
  $("name").textContent = `${current.stem}  ·  ${current.width} × ${current.height}`;
  $("badge").textContent = words[progress];
  $("badge").dataset.progress = progress;
  const item = document.querySelector(`li[data-stem="${CSS.escape(current.stem)}"]`);
  if (item) item.dataset.progress = progress;
  const listed = server.pictures.find(({ stem }) => stem === current.stem);
  if (listed) listed.progress = progress;
  $("undo").disabled = current.past.undo.length === 0;
  $("redo").disabled = current.past.redo.length === 0;
  $("clear").disabled = current.past.revision === BLANK;
  list();
  hint();
}

function fit() {
  if (current === null) return;
  const { clientWidth: width, clientHeight: height } = $("view");
  viewport.fit(current.photo.width, current.photo.height, { width, height });
  repaint();
}

const repaint = () => Object.values(views).forEach((view) => view.refresh());

// --- Strokes ------------------------------------------------------------------------------------

function begin(label, x, y) {
  asking?.abort();
  stroke = { label, width: brush, points: [[x, y]] };
  views.main.live = views.other.live = stroke;
  repaint();
}

function move(points) {
  if (stroke === null) return;
  stroke.points.push(...points);
  repaint();
}

function cancel() {
  stroke = views.main.live = views.other.live = null;
  repaint();
}

function end() {
  if (stroke === null) return;
  const since = performance.now(), drawn = stroke, picture = current;
  picture.strokes.add(drawn);
  cancel();
  const factor = picture.width / picture.photo.width;
  const sent = {
    label: drawn.label,
    width: Math.max(1, drawn.width * factor),
    points: thin(drawn.points).map((point) => point.map((x) => Math.round(100 * x * factor) / 100)),
  };
  change(since, (past) => client.draw(picture.stem, past.revision, sent), (past, told) => past.step(told.revision));
}

// A hand that rests sends the same place again and again, a slow one places that are nearly the same.
function thin(points) {
  const kept = [points[0]];
  for (const [x, y] of points) {
    const [lastX, lastY] = kept.at(-1);
    if (Math.hypot(x - lastX, y - lastY) > 0.3) kept.push([x, y]);
  }
  return kept;
}

// Sends one change after the other; whatever is not saved is taken off the picture again.
function change(since, send, done) {
  const picture = current;
  asking?.abort();
  $("took").textContent = "…";
  saving = saving.then(tried(async () => {
    try {
      const told = await send(picture.past);
      if (told === null) return;
      done(picture.past, told);
      if (picture !== current) return;
      tell(null);
      showProgress(told.progress);
      showMasks(since);
    } catch (error) {
      if (picture === current) await redraw(picture);
      $("took").textContent = "";
      throw error.status === 410 ? Object.assign(error, { status: 0 }) : error;
    }
  }));
  return saving;
}

async function redraw(picture) {
  const strokes = await client.strokes(picture.stem).catch(() => null);
  if (strokes === null) return;
  picture.strokes.replace(strokes);
  repaint();
}

function travel(from, to) {
  if (current === null || current.past[from].length === 0) return;
  const picture = current;
  change(
    performance.now(),
    async (past) => {
      // A key that is held asks for more steps than there are, before the first of them is made.
      if (past[from].length === 0) return null;
      const told = await client.restore(picture.stem, past.revision, past[from].at(-1)).catch((error) => {
        if (error.status === 410) past.forget();
        throw error;
      });
      await redraw(picture);
      return told;
    },
    (past, told) => past.went(from, to, told.revision),
  );
}

function clear() {
  if (current === null || current.past.revision === BLANK) return;
  const picture = current;
  change(
    performance.now(),
    async (past) => {
      const told = await client.restore(picture.stem, past.revision, BLANK);
      await redraw(picture);
      return told;
    },
    (past, told) => past.step(told.revision),
  );
}

// --- Masks --------------------------------------------------------------------------------------

const showMasks = tried(async (since) => {
  const picture = current, { past } = picture;
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  if (picture.progress === "accepted") {
    const mask = await client.savedMask(picture.stem, signal);
    if (picture === current) views.main.setMask(mask);
    $("took").textContent = "";
  } else if (past.revision === BLANK) {
    for (const view of Object.values(views)) view.setMask(null);
    $("took").textContent = "";
    return;
  } else {
    await showMask(picture, "main", signal);
    await painted();
    if (signal.aborted) return;
    $("took").textContent = `mask in ${Math.round(performance.now() - since)} ms`;
    $("took").dataset.revision = past.revision;
  }
  if (server.models.other !== undefined && past.revision !== BLANK) await showMask(picture, "other", signal);
  if (picture.progress !== "accepted") await lookCarefully(picture, signal);
});

async function showMask(picture, place, signal, carefully = false) {
  const mask = await client.mask(picture.stem, picture.past.revision, place, signal, carefully);
  if (picture === current && !signal.aborted) views[place].setMask(mask);
}

// Once the hand rests, the mask is shown that would be saved.
async function lookCarefully(picture, signal) {
  await new Promise((done) => setTimeout(done, REST));
  if (signal.aborted || picture !== current) return;
  for (const place of Object.keys(server.models)) await showMask(picture, place, signal, true);
  if (picture === current && !signal.aborted) $("took").textContent += ", refined";
}

const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));

const accept = tried(async () => {
  // A key that is held comes in again and again.
  if (current === null || $("accept").disabled) return;
  const picture = current;
  $("accept").disabled = true;
  await saving;
  asking?.abort();
  $("took").textContent = "looking carefully…";
  try {
    const mask = await client.accept(picture.stem, picture.past.revision);
    if (mask.kept) tell(`${picture.stem}: the mask that was there before is kept in ground_truth/replaced.`, "news");
    if (picture !== current) return;
    views.main.setMask(mask);
    showProgress("accepted");
    $("took").textContent = `saved, ${mask.seconds.toFixed(1)} s`;
  } catch (error) {
    $("took").textContent = "";
    throw error;
  } finally {
    $("accept").disabled = false;
  }
});

// --- Pictures come in, and follow one another ---------------------------------------------------

const add = tried(async (files) => {
  const failures = [];
  let last = null;
  for (const file of files) {
    $("took").textContent = `adding ${file.name}`;
    try {
      last = (await client.add(file)).stem;
    } catch (error) {
      failures.push(error.message);
    }
  }
  $("took").textContent = "";
  await refresh();
  if (last !== null) await openPicture(last);
  if (failures.length) tell(failures.length === 1 ? failures[0] : `${failures.length} files were not added. ${failures[0]}`);
});

const proposeNext = tried(async () => {
  const { stem } = await client.next(current?.stem ?? null);
  if (stem === null) tell("No other picture waits for a mask. Add photographs, or train on what is saved (F).", "news");
  else await openPicture(stem);
});

function step(by) {
  const stems = server.pictures.map(({ stem }) => stem);
  const there = stems[stems.indexOf(current?.stem) + by];
  if (there !== undefined) openPicture(there);
}

// --- Checkpoints and training -------------------------------------------------------------------

const choose = tried(async (place) => {
  const wanted = $(place).value || null;
  $(place).disabled = true;
  try {
    server = await client.loadModel(place, wanted);
    tell(null);
  } finally {
    $(place).disabled = false;
    rail.listModels(server);
    list();
  }
  if (current === null) return;
  if (place === "main" && current.progress === "accepted") current.progress = "changed";
  await showMasks(performance.now());
});

const openTraining = tried(async () => {
  const { command, samples } = await client.finetune();
  $("samples").textContent = `${samples} accepted ${samples === 1 ? "mask is" : "masks are"} ready.`;
  $("command").textContent = command;
  $("training").showModal();
});

// --- Controls -----------------------------------------------------------------------------------

function setTool(name) {
  tool = name;
  mark(["object", "background", "eraser"], name);
}

function setMode(name) {
  look.mode = name;
  mark(["mask", "cutout", "probabilities"], name);
  repaint();
}

function mark(names, chosen) {
  for (const name of names) {
    document.querySelector(`[data-command=${name}]`).ariaChecked = String(name === chosen);
  }
}

function setBrush(size) {
  brush = Math.min(60, Math.max(2, size));
  $("brush").value = $("brushSize").textContent = brush;
  if (look.cursor !== null) look.cursor.width = brush;
  repaint();
}

function setOpacity(percent) {
  look.opacity = Math.min(100, Math.max(0, percent)) / 100;
  $("opacity").value = Math.round(look.opacity * 100);
  $("opacityValue").textContent = `${$("opacity").value} %`;
  repaint();
}

function zoom(factor) {
  viewport.zoom(factor, $("view").clientWidth / 2, $("view").clientHeight / 2);
  repaint();
}

bind({
  object: () => setTool("object"),
  background: () => setTool("background"),
  eraser: () => setTool("eraser"),
  thinner: () => setBrush(brush - 2),
  thicker: () => setBrush(brush + 2),
  undo: () => travel("undo", "redo"),
  redo: () => travel("redo", "undo"),
  clear,
  mask: () => setMode("mask"),
  cutout: () => setMode("cutout"),
  probabilities: () => setMode("probabilities"),
  fainter: () => setOpacity($("opacity").valueAsNumber - 10),
  stronger: () => setOpacity($("opacity").valueAsNumber + 10),
  zoomIn: () => zoom(1.25),
  zoomOut: () => zoom(0.8),
  fit,
  strokes: () => {
    look.strokes = !look.strokes;
    document.querySelector("[data-command=strokes]").ariaPressed = String(look.strokes);
    repaint();
  },
  accept,
  next: proposeNext,
  previous: () => step(-1),
  following: () => step(1),
  add: () => $("files").click(),
  addFolder: () => $("files-folder").click(),
  pickMain: () => $("main").focus(),
  pickOther: () => $("other").focus(),
  finetune: openTraining,
  copy: tried(() => navigator.clipboard.writeText($("command").textContent)),
  close: () => $("training").close(),
  reload: () => location.reload(),
  dismiss: () => tell(null),
}, (x, y) => {
  viewport.pan(x, y);
  repaint();
});

for (const view of Object.values(views)) {
  view.onresize = fit;
  listen(view.canvas, {
    viewport,
    // The right button, a pen's barrel button and its other end have meanings of their own.
    label: (event) => (event.buttons & 32 ? 255 : event.button === 2 ? 0 : LABELS[tool]),
    panning: () => spaceHeld || current === null,
    begin, move, end, cancel,
    moved: repaint,
    hover: (x, y) => {
      const label = stroke?.label ?? LABELS[tool];
      look.cursor = x === null || current === null ? null : { x, y, width: brush, label };
      repaint();
    },
  });
}

addEventListener("keydown", (event) => {
  if (event.code !== "Space" || event.target.closest("button, select, input")) return;
  spaceHeld = true;
  event.preventDefault();
});
addEventListener("keyup", (event) => {
  if (event.code === "Space") spaceHeld = false;
});
addEventListener("blur", () => (spaceHeld = false));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", async (event) => {
  event.preventDefault();
  add(await dropped(event.dataTransfer.items));
});
for (const id of ["files", "files-folder"]) {
  $(id).addEventListener("change", () => {
    const files = [...$(id).files];
    $(id).value = "";
    add(id === "files" ? files : files.filter(isPicture));
  });
}
$("brush").addEventListener("input", () => setBrush($("brush").valueAsNumber));
$("opacity").addEventListener("input", () => setOpacity($("opacity").valueAsNumber));
for (const place of ["main", "other"]) $(place).addEventListener("change", () => choose(place));

setTool("object");
setMode("mask");
setBrush(8);
setOpacity(70);
tried(async () => {
  await refresh();
  const wanted = decodeURIComponent(location.hash.slice(1));
  const stems = server.pictures.map(({ stem }) => stem);
  if (stems.includes(wanted)) await openPicture(wanted);
  else if (stems.length) await openPicture((await client.next(null)).stem ?? stems[0]);
})();
// Pictures are looked at in the background, other tabs accept masks, and trainings end.
const lookAgain = (told) => {
  const chosen = ({ models, checkpoints }) => JSON.stringify([models, checkpoints]);
  // A list that somebody has open is not made anew without need.
  if (chosen(told) !== chosen(server)) rail.listModels(told);
  server = told;
  list();
};
setInterval(() => document.hidden || client.state().then(lookAgain, () => {}), 5000);
