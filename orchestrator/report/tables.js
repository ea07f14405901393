/* Sorts and filters the rows of every table of class "sortable".

A heading with a button sorts by its column; data-numeric: by numbers, data-first="descending": that way first. A cell's
data-value is what it is sorted by, "" (not measured) being last either way. Controls name their table in data-table:
an input (words that a row must hold), selects with data-key (a row must have that value in its data-KEY), a select with
data-sort (values COLUMN:DIRECTION), an output (how many rows are shown). A figure's points whose id ends in the id of a
row are hidden with it, and lead to it. Controls that need this script may lie in an element that is hidden. */
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const find = (selector) => [...document.querySelectorAll(`${selector}[data-table="${table.id}"]`)];
  const [search] = find("input"), [order] = find("select[data-sort]"), facets = find("select[data-key]");
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const points = new Map(rows.filter((row) => row.id).map(
    (row) => [row, [...document.querySelectorAll(`svg [id$="-${row.id}"]`)]]));

  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();

  function sort(column, direction) {
    const numeric = "numeric" in heads[column].dataset, sign = direction === "descending" ? -1 : 1;
    rows.sort((a, b) => {
      const x = value(a, column), y = value(b, column);
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (numeric ? x - y : x.localeCompare(y, "en", { numeric: true }));
    });
    body.append(...rows);
    for (const head of heads) head.removeAttribute("aria-sort");
    heads[column].setAttribute("aria-sort", direction);
    if (order) order.value = `${column}:${direction}`;
  }

  function filter() {
    const words = (search?.value ?? "").toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !words.every((word) => texts.get(row).includes(word)) ||
        facets.some((facet) => facet.value && facet.value !== row.dataset[facet.dataset.key]);
      shown += !row.hidden;
      for (const point of points.get(row) ?? []) point.style.display = row.hidden ? "none" : "";
    }
    for (const output of find("output")) output.value = `${shown} of ${rows.length}`;
  }

  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const first = head.dataset.first ?? "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    sort(column, head.getAttribute("aria-sort") === first ? other : first);
  }));
  order?.addEventListener("change", () => sort(Number(order.value.split(":")[0]), order.value.split(":")[1]));
  search?.addEventListener("input", filter);
  for (const facet of facets) facet.addEventListener("change", filter);
  for (const [row, dots] of points) {
    for (const dot of dots) {
      const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
      title.textContent = row.cells[0].dataset.value ?? row.cells[0].textContent.trim();
      dot.append(title);
      dot.addEventListener("click", () => { location.hash = row.id; });
    }
  }
  for (const control of [...find("input"), ...find("select")]) control.closest("[hidden]")?.removeAttribute("hidden");
  filter();
}
