// Mouse, pen and touch on a canvas: strokes, panning and pinching.

// `on` has: label(event) of the stroke that begins, begin(label, x, y), move(points), end(),
// cancel(), hover(x, y | null), viewport, moved() once the viewport changed, panning() (a key).
export function listen(canvas, on) {
  const fingers = new Map();
  let drawing = null;
  let panning = null;

  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const picture = (event) => on.viewport.toPicture(...place(event));

  canvas.addEventListener("contextmenu", (event) => event.preventDefault());

  canvas.addEventListener("pointerdown", (event) => {
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    event.preventDefault();
    if (event.pointerType === "touch") fingers.set(event.pointerId, place(event));
    if (fingers.size === 2) {
      // The first finger had begun a stroke, which the second one takes back.
      if (drawing !== null) on.cancel();
      drawing = null;
      return;
    }
    if (fingers.size > 2 || drawing !== null) return;
    // Left and right draw, the middle one pans, and 5 is a pen's eraser; those at the side do nothing.
    if (event.button > 2 && event.button !== 5) return;
    if (event.button === 1 || on.panning()) {
      panning = { id: event.pointerId, at: place(event) };
      return;
    }
    drawing = event.pointerId;
    on.begin(on.label(event), ...picture(event));
  });

  canvas.addEventListener("pointermove", (event) => {
    const now = place(event);
    if (fingers.size === 2 && fingers.has(event.pointerId)) {
      const [other] = [...fingers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
      const before = fingers.get(event.pointerId);
      const factor = distance(now, other) / Math.max(1, distance(before, other));
      on.viewport.pan((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
      on.viewport.zoom(factor, (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
      fingers.set(event.pointerId, now);
      on.moved();
    } else if (panning?.id === event.pointerId) {
      on.viewport.pan(now[0] - panning.at[0], now[1] - panning.at[1]);
      panning.at = now;
      on.moved();
    } else if (drawing === event.pointerId) {
      // A browser bundles the points of a fast stroke: all of them are taken.
      const points = event.getCoalescedEvents?.() ?? [];
      on.move((points.length ? points : [event]).map(picture));
    }
    on.hover(...picture(event));
  });

  const lifted = (event) => {
    fingers.delete(event.pointerId);
    if (panning?.id === event.pointerId) panning = null;
    if (drawing !== event.pointerId) return;
    drawing = null;
    if (event.type === "pointercancel") on.cancel();
    else on.end();
  };
  canvas.addEventListener("pointerup", lifted);
  canvas.addEventListener("pointercancel", lifted);
  canvas.addEventListener("pointerleave", () => on.hover(null, null));

  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const step = event.deltaY * (event.deltaMode === 1 ? 16 : 1);
    on.viewport.zoom(Math.exp(-step / 400), ...place(event));
    on.moved();
    on.hover(...picture(event));
  }, { passive: false });
}

const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
