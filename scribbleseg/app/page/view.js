// One canvas: photograph, mask, outline and strokes, seen through a viewport that views share.

import { outline } from "./outline.js";

const COLOURS = { 1: "#ffb224", 0: "#5b8cff", 255: "#e8eaf0" };
const RIM = 0.8; // Pixels of the picture.
const RIM_COLOUR = "rgba(0, 0, 0, .6)";
const GROUND = [13, 15, 20];
const MARGIN = 24;
const FOOT = 34;

// Where the picture lies in the canvas, in CSS pixels.
export class Viewport {
  constructor() {
    Object.assign(this, { scale: 1, x: 0, y: 0 });
  }

  fit(width, height, room) {
    // Below it there is a line of advice.
    const inner = { width: room.width - 2 * MARGIN, height: room.height - 2 * MARGIN - FOOT };
    this.scale = Math.max(0.05, Math.min(inner.width / width, inner.height / height, 8));
    this.x = (room.width - width * this.scale) / 2;
    this.y = (room.height - FOOT - height * this.scale) / 2;
  }

  zoom(factor, x, y) {
    const scale = Math.min(40, Math.max(0.05, this.scale * factor));
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    this.scale = scale;
  }

  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
  }

  toPicture(x, y) {
    return [(x - this.x) / this.scale, (y - this.y) / this.scale];
  }
}

// The strokes of a picture, as views show them: with a dark rim that sets them off.
export class Strokes {
  constructor(width, height) {
    this.canvas = new OffscreenCanvas(width, height);
    this.rim = new OffscreenCanvas(width, height);
  }

  // Begins anew with a picture of strokes.
  replace(picture) {
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, picture.width, picture.height);
    context.drawImage(picture, 0, 0);
    this.edge();
  }

  add(stroke) {
    const context = this.canvas.getContext("2d");
    context.globalCompositeOperation = stroke.label === 255 ? "destination-out" : "source-over";
    drawStroke(context, stroke, COLOURS[stroke.label]);
    this.edge();
  }

  edge() {
    const { rim, canvas } = this, context = rim.getContext("2d");
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, rim.width, rim.height);
    for (let turn = 0; turn < 8; turn++) {
      context.drawImage(canvas, RIM * Math.cos((turn * Math.PI) / 4), RIM * Math.sin((turn * Math.PI) / 4));
    }
    context.globalCompositeOperation = "source-in";
    context.fillStyle = RIM_COLOUR;
    context.fillRect(0, 0, rim.width, rim.height);
  }
}

function drawStroke(context, { width, points }, colour) {
  context.strokeStyle = colour;
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = width;
  context.beginPath();
  context.moveTo(...points[0]);
  // A line to where it begins is a dot.
  for (const point of points.length > 1 ? points.slice(1) : points) context.lineTo(...point);
  context.stroke();
}

export class View {
  // `look` holds what views share: mode, opacity, whether strokes show, the cursor.
  constructor(canvas, viewport, look) {
    Object.assign(this, { canvas, viewport, look });
    this.context = canvas.getContext("2d");
    this.photo = this.strokes = this.mask = this.live = null;
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  resize() {
    const ratio = devicePixelRatio;
    this.canvas.width = Math.round(this.canvas.clientWidth * ratio);
    this.canvas.height = Math.round(this.canvas.clientHeight * ratio);
    this.onresize?.();
    this.refresh();
  }

  // `strokes` are shared by all views.
  show(photo, strokes) {
    Object.assign(this, { photo, strokes, mask: null });
    this.refresh();
  }

  setMask(greys) {
    this.mask = greys === null ? null : { greys, outline: outline(greys), layers: {} };
    this.refresh();
  }

  refresh() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.paint();
    });
  }

  paint() {
    const { context, viewport, look } = this, ratio = devicePixelRatio;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (this.photo === null) return;
    context.translate(viewport.x, viewport.y);
    context.scale(viewport.scale, viewport.scale);
    // Enlarged a lot, pixels are shown as what they are.
    context.imageSmoothingEnabled = viewport.scale < 6;
    context.imageSmoothingQuality = viewport.scale < 1 ? "high" : "low";
    context.drawImage(this.photo, 0, 0);
    if (this.mask !== null) this.paintMask();
    if (look.strokes) this.paintStrokes();
    if (look.cursor !== null) this.paintCursor();
  }

  paintMask() {
    const { context, look, viewport } = this;
    context.globalAlpha = look.mode === "cutout" ? 1 : look.opacity;
    context.drawImage(this.layer(look.mode), 0, 0);
    context.globalAlpha = 1;
    if (look.mode === "cutout") return;
    context.lineJoin = "round";
    for (const [width, colour] of [[4, "rgba(0, 0, 0, .45)"], [1.8, "#fff"]]) {
      context.lineWidth = width / viewport.scale;
      context.strokeStyle = colour;
      context.stroke(this.mask.outline);
    }
  }

  // The mask as a picture to lay over the photograph, made once for each mode.
  layer(mode) {
    const { greys: { values, width, height }, layers } = this.mask;
    if (layers[mode]) return layers[mode];
    const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer), colours = TABLES[mode];
    for (let i = 0; i < values.length; i++) pixels[i] = colours[values[i]];
    context.putImageData(image, 0, 0);
    if (mode === "cutout") {
      // What shows in place of the background.
      context.globalCompositeOperation = "source-in";
      context.fillStyle = context.createPattern(checks(), "repeat");
      context.fillRect(0, 0, width, height);
    }
    return (layers[mode] = canvas);
  }

  paintStrokes() {
    const { context } = this;
    context.drawImage(this.strokes.rim, 0, 0);
    context.drawImage(this.strokes.canvas, 0, 0);
    if (this.live === null) return;
    const { label, width } = this.live;
    if (label === 255) {
      // What lies under an eraser goes when it is lifted: until then it is a pale line.
      context.globalAlpha = 0.5;
      drawStroke(context, this.live, COLOURS[255]);
      context.globalAlpha = 1;
    } else {
      drawStroke(context, { ...this.live, width: width + 2 * RIM }, RIM_COLOUR);
      drawStroke(context, this.live, COLOURS[label]);
    }
  }

  paintCursor() {
    const { context, viewport, look } = this;
    const { x, y, width, label } = look.cursor;
    context.beginPath();
    context.arc(x, y, width / 2, 0, 2 * Math.PI);
    for (const [line, colour] of [[3, "rgba(0, 0, 0, .5)"], [1.5, COLOURS[label]]]) {
      context.lineWidth = line / viewport.scale;
      context.strokeStyle = colour;
      context.stroke();
    }
  }
}

// Colours by grey value, as 32 bits: opacity, blue, green, red (the machine's order is assumed to be
// little-endian, as that of all browsers is).
const packed = ([red, green, blue], alpha) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
const table = (colour) => Uint32Array.from({ length: 256 }, (_, p) => colour(p));
// Opaque outside the mask, with a soft edge around it.
const outside = (p) => Math.min(255, Math.max(0, (160 - p) * 4));
const TABLES = {
  mask: table((p) => packed(GROUND, outside(p))),
  cutout: table((p) => packed(GROUND, outside(p))),
  probabilities: table((p) => packed(heat(p), 235)),
};

// Dark blue for background, amber for object, as the strokes are.
function heat(p) {
  const t = p / 255;
  const low = [28, 44, 110], middle = [150, 70, 120], high = [255, 190, 60];
  const [from, to, s] = t < 0.5 ? [low, middle, 2 * t] : [middle, high, 2 * t - 1];
  return from.map((value, i) => Math.round(value + (to[i] - value) * s));
}

function checks() {
  const canvas = new OffscreenCanvas(24, 24), context = canvas.getContext("2d");
  for (const [colour, ...box] of [["#22252e", 0, 0, 24, 24], ["#2c303a", 0, 0, 12, 12], ["#2c303a", 12, 12, 12, 12]]) {
    context.fillStyle = colour;
    context.fillRect(...box);
  }
  return canvas;
}
