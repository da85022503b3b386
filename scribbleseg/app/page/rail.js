// The list of pictures with their progress, and the checkpoints to choose from.

import { thumbnail } from "./client.js";

const $ = (id) => document.getElementById(id);

export function listPictures({ pictures, folder, unscored }, open, choose) {
  const items = new Map([...$("pictures").children].map((item) => [item.dataset.stem, item]));
  $("pictures").replaceChildren(...pictures.map(({ stem, progress }) => {
    const item = items.get(stem) ?? pictureItem(stem, choose);
    item.dataset.progress = progress;
    item.querySelector("button").ariaCurrent = String(stem === open);
    return item;
  }));
  const count = (wanted) => pictures.filter(({ progress }) => progress === wanted).length;
  $("done").textContent = $("bar").value = count("accepted");
  $("all").textContent = pictures.length;
  $("bar").max = Math.max(1, pictures.length);
  // It is cut off on its left: the mark keeps its slashes in their places.
  $("folder").textContent = `\u200e${($("folder").title = folder)}`;
  $("empty").hidden = pictures.length > 0;
  const untouched = count("untouched");
  $("scored").textContent = untouched
    ? `${untouched - unscored} of ${untouched} untouched looked at`
    : "No picture is untouched";
}

function pictureItem(stem, choose) {
  const item = document.createElement("li"), button = document.createElement("button");
  item.dataset.stem = stem;
  const image = Object.assign(new Image(), { loading: "lazy", alt: "", src: thumbnail(stem) });
  image.addEventListener("error", () => item.classList.add("broken"));
  button.append(image, Object.assign(document.createElement("span"), { textContent: stem }));
  button.addEventListener("click", () => choose(stem));
  item.append(button);
  return item;
}

export function listModels({ models, checkpoints }) {
  for (const place of ["main", "other"]) {
    const chosen = models[place] ?? "";
    const names = new Set([...(place === "other" ? [""] : []), ...checkpoints, chosen]);
    $(place).replaceChildren(
      ...[...names].map((name) => new Option(name || "nothing", name, false, name === chosen)),
    );
  }
  $("second").hidden = models.other === undefined;
  $("caption").textContent = models.other === undefined ? "" : models.main;
  $("otherCaption").textContent = models.other ?? "";
}
