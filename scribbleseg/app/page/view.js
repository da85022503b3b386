// One canvas: photograph, mask, outline and strokes, seen through a viewport that views share.

import { outline } from "./outline.js";

export const COLOURS = { 1: "#ffb224", 0: "#5b8cff", 255: "#e8eaf0", pale: "#e8eaf0" };
const GROUND = [13, 15, 20];
const MARGIN = 28;
// The label of an eraser that is not lifted yet.
const PALE = "pale";

// Where the picture lies in the canvas, in CSS pixels.
export class Viewport {
  constructor() {
    Object.assign(this, { scale: 1, x: 0, y: 0 });
  }

  fit(width, height, room) {
    const inner = { width: room.width - 2 * MARGIN, height: room.height - 2 * MARGIN - 24 };
    this.scale = Math.max(0.05, Math.min(inner.width / width, inner.height / height, 8));
    this.x = (room.width - width * this.scale) / 2;
    this.y = (room.height - 24 - height * this.scale) / 2;
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

export function drawStroke(context, stroke) {
  context.save();
  context.globalCompositeOperation = stroke.label === 255 ? "destination-out" : "source-over";
  context.strokeStyle = COLOURS[stroke.label];
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = stroke.width;
  context.beginPath();
  const [first, ...others] = stroke.points;
  context.moveTo(...first);
  if (others.length === 0) context.lineTo(...first);
  for (const point of others) context.lineTo(...point);
  context.stroke();
  context.restore();
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

  // `strokes` is a canvas of the picture's size that all views draw from.
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
    context.imageSmoothingQuality = "high";
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
    const image = context.createImageData(width, height), pixels = image.data;
    for (let i = 0; i < values.length; i++) {
      const p = values[i], outside = Math.min(255, Math.max(0, (160 - p) * 4));
      const colour = mode === "probabilities" ? heat(p) : mode === "cutout" ? check(i, width) : GROUND;
      pixels.set(colour, 4 * i);
      pixels[4 * i + 3] = mode === "probabilities" ? 235 : outside;
    }
    context.putImageData(image, 0, 0);
    return (layers[mode] = canvas);
  }

  paintStrokes() {
    const { context, viewport } = this;
    // A dark rim sets strokes off from any photograph.
    context.shadowColor = "rgba(0, 0, 0, .7)";
    context.shadowBlur = 3 * devicePixelRatio;
    context.drawImage(this.strokes, 0, 0);
    if (this.live !== null) drawLive(context, this.live);
    context.shadowColor = "transparent";
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

// An eraser in use is shown as a pale line: what lies under it goes when it is lifted.
function drawLive(context, stroke) {
  context.globalAlpha = stroke.label === 255 ? 0.5 : 1;
  drawStroke(context, stroke.label === 255 ? { ...stroke, label: PALE } : stroke);
  context.globalAlpha = 1;
}

// Dark blue for background, amber for object, as the strokes are.
function heat(p) {
  const t = p / 255;
  const low = [28, 44, 110], middle = [150, 70, 120], high = [255, 190, 60];
  const [from, to, s] = t < 0.5 ? [low, middle, 2 * t] : [middle, high, 2 * t - 1];
  return from.map((value, i) => value + (to[i] - value) * s);
}

function check(i, width) {
  const x = i % width, y = (i / width) | 0;
  return ((x >> 4) + (y >> 4)) & 1 ? [44, 48, 58] : [34, 37, 46];
}
