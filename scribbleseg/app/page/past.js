// What undo and redo go through: revisions of a picture's strokes. The server keeps the strokes.
// A reloaded page finds its past again as long as the strokes are those it left.

const key = (stem) => `past:${stem}`;

export class Past {
  constructor(stem, revision) {
    this.stem = stem;
    const kept = JSON.parse(sessionStorage.getItem(key(stem)) ?? "null");
    const fits = kept !== null && kept.revision === revision;
    Object.assign(this, fits ? kept : { revision, undo: [], redo: [] });
  }

  // A change was made, which ends in `revision`.
  step(revision) {
    if (revision === this.revision) return;
    this.undo.push(this.revision);
    this.redo = [];
    this.reach(revision);
  }

  // `revision` was gone back (or forth) to.
  went(from, to, revision) {
    this[from].pop();
    this[to].push(this.revision);
    this.reach(revision);
  }

  forget() {
    this.undo = [];
    this.redo = [];
    this.reach(this.revision);
  }

  reach(revision) {
    this.revision = revision;
    const { undo, redo } = this;
    try {
      sessionStorage.setItem(key(this.stem), JSON.stringify({ revision, undo, redo }));
    } catch {
      // Without room for it, a reloaded page begins a new past.
    }
  }
}
