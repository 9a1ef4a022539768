// Search without a server: every word typed must occur; headings count more than text, whole words more than parts.
const box = document.getElementById("search"), found = document.getElementById("found");
const score = (entry, words) => {
  let total = 0;
  for (const word of words) {
    const heading = entry.heading.toLowerCase(), text = entry.text.toLowerCase(), page = entry.page.toLowerCase();
    const points = (heading === word ? 20 : heading.includes(word) ? 8 : 0) + (page.includes(word) ? 3 : 0) +
      Math.min(4, text.split(word).length - 1);
    if (!points) return 0;
    total += points;
  }
  return total;
};
const excerpt = (text, word) => {
  const at = Math.max(0, text.toLowerCase().indexOf(word) - 40);
  return (at ? "…" : "") + text.slice(at, at + 110);
};
box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = words.length ? INDEX.map((entry) => [score(entry, words), entry]).filter(([s]) => s)
    .sort((a, b) => b[0] - a[0]).slice(0, 12) : [];
  found.replaceChildren(...hits.map(([, entry]) => {
    const item = document.createElement("li"), link = document.createElement("a"), small = document.createElement("small");
    link.href = entry.file + (entry.id ? "#" + entry.id : "");
    link.textContent = entry.heading === entry.page ? entry.page : `${entry.page} › ${entry.heading}`;
    small.textContent = excerpt(entry.text, words[0]);
    item.append(link, small);
    return item;
  }));
  if (words.length && !hits.length) found.textContent = "Nothing found.";
  found.hidden = !words.length;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== box) { event.preventDefault(); box.focus(); }
  if (event.key === "Escape") { box.value = ""; found.hidden = true; }
});
