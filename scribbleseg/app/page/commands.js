// Buttons and keys. A control names its command and its keys in the page itself, beside its label.

export function bind(commands, pan) {
  const keys = new Map();
  for (const control of document.querySelectorAll("[data-command]")) {
    const command = commands[control.dataset.command];
    for (const key of control.dataset.keys?.split(" ") ?? []) keys.set(key, command);
    if (control.tagName === "BUTTON") {
      control.id ||= control.dataset.command;
      // What a key repeats must not be clicked again by Enter or Space on the button itself.
      control.addEventListener("click", () => {
        control.blur();
        command();
      });
    }
  }
  const arrows = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
  addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, dialog") || event.altKey) return;
    if (event.target.closest("button") && (event.key === "Enter" || event.key === " ")) return;
    if (event.key in arrows) {
      pan(...arrows[event.key]);
      event.preventDefault();
      return;
    }
    const command = keys.get(named(event));
    if (command === undefined) return;
    event.preventDefault();
    command();
  });
}

// "z", "shift+z", "ctrl+z"; signs are what they are on whatever keyboard.
function named(event) {
  const key = event.key.toLowerCase();
  const shift = event.shiftKey && /^[a-z]$/.test(key) ? "shift+" : "";
  return `${event.ctrlKey || event.metaKey ? "ctrl+" : ""}${shift}${key}`;
}
