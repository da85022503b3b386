// The line along which a grid of values crosses one half: marching squares, smooth at any zoom.

const LEVEL = 127.5;

// Corners of a cell: bit 1 upper left, 2 upper right, 4 lower right, 8 lower left.
// Pairs of sides to join: 0 top, 1 right, 2 bottom, 3 left.
const JOINS = [
  [], [3, 0], [0, 1], [3, 1], [1, 2], [3, 0, 1, 2], [0, 2], [3, 2],
  [2, 3], [2, 0], [0, 1, 2, 3], [2, 1], [1, 3], [1, 0], [0, 3], [],
];

// Returns a Path2D in pixels of the picture; values lie at the pixels' centres.
export function outline({ values, width, height }) {
  const path = new Path2D();
  // One ring of background around it closes the line at the border.
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : values[y * width + x]);
  for (let y = -1; y < height; y++) {
    for (let x = -1; x < width; x++) {
      const a = at(x, y), b = at(x + 1, y), c = at(x + 1, y + 1), d = at(x, y + 1);
      const kind = (a > LEVEL) | ((b > LEVEL) << 1) | ((c > LEVEL) << 2) | ((d > LEVEL) << 3);
      if (kind === 0 || kind === 15) continue;
      const joins = JOINS[kind];
      for (let i = 0; i < joins.length; i += 2) {
        for (let end = 0; end < 2; end++) {
          let px = x + 0.5, py = y + 0.5;
          switch (joins[i + end]) {
            case 0: px += (LEVEL - a) / (b - a); break;
            case 1: px += 1; py += (LEVEL - b) / (c - b); break;
            case 2: px += (LEVEL - d) / (c - d); py += 1; break;
            case 3: py += (LEVEL - a) / (d - a); break;
          }
          if (end === 0) path.moveTo(px, py);
          else path.lineTo(px, py);
        }
      }
    }
  }
  return path;
}
