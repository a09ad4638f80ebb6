"use strict";
const collator = new Intl.Collator("en", { numeric: true });

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const news = document.getElementById(table.dataset.news);

  heads.forEach((head, column) => {
    const title = head.textContent;
    const isNumber = head.classList.contains("number");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = title;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      // Numbers begin with the largest, names with the first.
      const now = head.getAttribute("aria-sort") ?? (isNumber ? "ascending" : "descending");
      const up = now === "descending";
      const cell = (row) => row.cells[column];
      const compare = isNumber
        ? (a, b) => Number(cell(a).dataset.value) - Number(cell(b).dataset.value)
        : (a, b) => collator.compare(cell(a).textContent, cell(b).textContent);
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...[...rows].sort((a, b) => (up ? compare(a, b) : compare(b, a))));
      news.textContent = `Sorted by ${title}, ${up ? "ascending" : "descending"}`;
    });
  });

  const input = document.getElementById(table.dataset.search);
  if (input === null) continue;
  const texts = rows.map((row) => row.textContent.toLowerCase());
  input.parentElement.hidden = false;
  input.addEventListener("input", () => {
    const text = input.value.trim().toLowerCase();
    let shown = 0;
    rows.forEach((row, at) => {
      row.hidden = !texts[at].includes(text);
      shown += row.hidden ? 0 : 1;
    });
    news.textContent = text ? `${shown} of ${rows.length} destinations` : `All ${rows.length} destinations`;
  });
}

// A link to a rule in a fold opens the fold.
const unfold = () => {
  const to = document.getElementById(location.hash.slice(1));
  if (to === null) return;
  for (let fold = to.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  to.scrollIntoView({ block: "nearest" });
};
addEventListener("hashchange", unfold);
unfold();

// Paper does not unfold.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((fold) => { fold.open = true; });
});
addEventListener("afterprint", () => opened.forEach((fold) => { fold.open = false; }));
