"use strict";
// Sorting and filtering of every table with class "sortable", by mouse and by keyboard, on pages that work without it.
// A cell sorts by its data-sort attribute, else by its text; as numbers where every cell of the column begins with one that
// stands alone or before its interval or range: 1,024; 12 of 20; 0.37 (0.32 to 0.42).
// data-bar="none": sorting only. A heading with data-facet gets a choice of its column's values. Rows that change later: send the table "rows".
(() => {
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell === undefined ? "" : (cell.dataset.sort ?? cell.textContent.trim());
  };
  const number = (text) => {
    const found = /^([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)(?=$| \(| of | to )/i.exec(text);
    return found ? Number(found[1].replaceAll(",", "")) : NaN;
  };

  function compare(rows, column) {
    const keys = rows.map((row) => key(row, column)).filter((text) => text !== "");
    if (keys.length > 0 && keys.every((text) => Number.isFinite(number(text)))) {
      const value = (text) => (text === "" ? -Infinity : number(text));
      return (a, b) => value(key(a, column)) - value(key(b, column));
    }
    return (a, b) => key(a, column).localeCompare(key(b, column), "en", { numeric: true });
  }

  function enhance(table) {
    const head = table.tHead.rows[0];
    const body = table.tBodies[0];
    const state = { column: -1, descending: false };
    const bar = document.createElement("div");
    bar.className = "bar";
    const search = document.createElement("input");
    search.type = "search";
    search.setAttribute("aria-label", `Filter ${table.dataset.name ?? "the table"}`);
    search.placeholder = "filter: words, all of them";
    const count = document.createElement("output");
    const facets = [];
    bar.append(search);

    function refreshFacet(facet) {
      const values = new Set(Array.from(body.rows, (row) => row.cells[facet.column]?.textContent.trim() ?? ""));
      const chosen = facet.select.value;
      const options = [["", `${facet.name}: all`]];
      for (const value of [...values].sort()) if (value !== "") options.push([value, value]);
      facet.select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
      facet.select.value = values.has(chosen) ? chosen : "";
    }

    function filter() {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of body.rows) {
        const text = row.textContent.toLowerCase();
        const fits = words.every((word) => text.includes(word)) &&
          facets.every((f) => f.select.value === "" || row.cells[f.column]?.textContent.trim() === f.select.value);
        row.hidden = !fits;
        shown += fits ? 1 : 0;
      }
      count.value = `${shown} of ${body.rows.length}`;
    }

    function sort() {
      if (state.column < 0) return;
      const rows = Array.from(body.rows);
      const order = compare(rows, state.column);
      rows.sort((a, b) => (state.descending ? order(b, a) : order(a, b)));
      body.append(...rows);
      Array.from(head.cells, (cell, column) => {
        const says = state.descending ? "descending" : "ascending";
        cell.setAttribute("aria-sort", column === state.column ? says : "none");
      });
    }

    Array.from(head.cells, (cell, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...cell.childNodes);
      button.addEventListener("click", () => {
        state.descending = state.column === column && !state.descending;
        state.column = column;
        sort();
      });
      cell.append(button);
      cell.setAttribute("aria-sort", "none");
      if ("facet" in cell.dataset) {
        const select = document.createElement("select");
        const name = button.textContent.trim();
        select.setAttribute("aria-label", `Only rows with this ${name}`);
        select.addEventListener("change", filter);
        facets.push({ column, select, name });
        bar.append(select);
      }
    });
    bar.append(count);
    search.addEventListener("input", filter);
    const update = () => { facets.forEach(refreshFacet); sort(); filter(); };
    table.addEventListener("rows", update);
    if (table.dataset.bar !== "none") (table.closest(".scroll") ?? table).before(bar);
    update();
  }

  document.querySelectorAll("table.sortable").forEach(enhance);
})();
