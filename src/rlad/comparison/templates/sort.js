// Columns sort by their numbers where all that are known are numbers, else by text; what is unknown comes last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      const isNumeric = rows.some((row) => "order" in row.cells[column].dataset);
      const known = (row) => !isNumeric || "order" in row.cells[column].dataset;
      const compare = (a, b) => isNumeric
        ? Number(a.cells[column].dataset.order) - Number(b.cells[column].dataset.order)
        : b.cells[column].textContent.localeCompare(a.cells[column].textContent, undefined, { numeric: true });
      rows.sort((a, b) => known(b) - known(a) || (known(a) ? direction * compare(a, b) : 0));
      table.tBodies[0].append(...rows);
    });
  });
}
