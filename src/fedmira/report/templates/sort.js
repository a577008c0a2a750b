"use strict";
// Sorts a table by the column whose heading is clicked; a second click turns the order round; empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      const numeric = heading.classList.contains("number");
      const keyed = [...body.rows].map((row) => [row.cells[column].dataset.key, row]);
      keyed.sort(([first], [second]) => {
        if (first === "" || second === "") return (first === "") - (second === "");
        const order = numeric ? Number(first) - Number(second) : first.localeCompare(second, "en", { numeric: true });
        return descending ? -order : order;
      });
      headings.forEach((other) => other.querySelector("button") && other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      body.append(...keyed.map(([, row]) => row));
    });
  });
}
