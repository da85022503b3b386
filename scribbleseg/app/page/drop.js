// All files of what was dropped, folders included.
export async function dropped(items) {
  const files = [];
  const walk = async (entry) => {
    if (entry.isFile) files.push(await new Promise((good, bad) => entry.file(good, bad)));
    const reader = entry.isDirectory ? entry.createReader() : null;
    for (let batch = [1]; reader !== null && batch.length > 0;) {
      batch = await new Promise((good, bad) => reader.readEntries(good, bad));
      for (const inner of batch) await walk(inner);
    }
  };
  // Both are gone once this function has waited for anything.
  const entries = [...items].map((item) => item.webkitGetAsEntry?.() ?? null);
  const plain = [...items].map((item) => item.getAsFile());
  const folders = entries.filter((entry) => entry?.isDirectory);
  for (const entry of folders) await walk(entry);
  const alone = plain.filter((file, i) => file !== null && !entries[i]?.isDirectory);
  // Of a folder, only pictures are meant; of a file, whoever dropped it is told if it is none.
  return [...alone, ...files.filter(isPicture)];
}

export const isPicture = (file) => /\.(jpe?g|png|webp)$/i.test(file.name);
