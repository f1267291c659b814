"use strict";
// Follows /events and keeps the table in step. Text from runs is only ever set as text.
(() => {
  const SILENT_MS = 10 * 60 * 1000; // a run without an end that has said nothing for so long
  const runs = new Map();
  const table = document.getElementById("runs");
  const body = table.tBodies[0];
  const state = document.getElementById("state");
  let total = 0;

  const text = (value) => (value === null ? "" : String(value));
  const number = (value, digits) => (value === null ? "" : value.toFixed(digits));

  function status(row) {
    if (row.status !== "open") return row.status;
    return row.last !== null && Date.now() - Date.parse(row.last) > SILENT_MS ? "silent" : "open";
  }

  function cell(content, { numeric = false, sort = null, chip = false, tip = "" } = {}) {
    const td = document.createElement("td");
    if (numeric) td.className = "n";
    if (sort !== null) td.dataset.sort = sort;
    if (tip) td.title = tip;
    if (chip) {
      const span = document.createElement("span");
      span.className = `chip ${content}`;
      span.textContent = content;
      td.append(span);
    } else {
      td.textContent = content;
    }
    return td;
  }

  function ago(time) {
    if (time === null) return "";
    const seconds = Math.max(0, Math.round((Date.now() - Date.parse(time)) / 1000));
    if (seconds < 120) return `${seconds} s ago`;
    return seconds < 7200 ? `${Math.round(seconds / 60)} min ago` : `${Math.round(seconds / 3600)} h ago`;
  }

  function draw(row) {
    const tr = document.createElement("tr");
    tr.dataset.run = row.run;
    tr.append(
      cell(row.run),
      cell(status(row), { chip: true, tip: row.reason }),
      cell(ago(row.last), { sort: row.last === null ? "" : String(Date.parse(row.last)) }),
      cell(text(row.step), { numeric: true }),
      cell(number(row.loss, 4), { numeric: true }),
      cell(number(row.bpb, 4), { numeric: true }),
      cell(number(row.tokens_per_s, 0), { numeric: true }),
      cell(row.active.join(", ")),
      cell(row.refused.join(", "), { tip: row.why.join("\n") }),
      cell(row.changed.join("; ")),
      cell(String(row.n_anomalies), { numeric: true, tip: row.anomalies.join("\n") }),
      cell(row.chain, { chip: true, tip: text(row.problem) }),
    );
    return tr;
  }

  function summarise() {
    const counts = new Map();
    const alerts = [];
    for (const row of runs.values()) {
      const now = status(row);
      counts.set(now, (counts.get(now) ?? 0) + 1);
      if (row.problem !== null) alerts.push([row.last, `${row.run}: ${row.problem}`]);
      for (const line of row.why) alerts.push([row.last, `${row.run}: refused: ${line}`]);
      for (const line of row.anomalies) alerts.push([row.last, `${row.run}: ${line}`]);
    }
    const tiles = [["runs in the folder", total], ...[...counts].sort()].map(([label, count]) => {
      const tile = document.createElement("div");
      tile.className = "tile";
      const name = document.createElement("span");
      name.textContent = label;
      const value = document.createElement("b");
      value.textContent = String(count);
      tile.append(name, value);
      return tile;
    });
    document.getElementById("tiles").replaceChildren(...tiles);
    alerts.sort((a, b) => text(b[0]).localeCompare(text(a[0])));
    const items = alerts.slice(0, 20).map(([, line]) => {
      const item = document.createElement("li");
      item.textContent = line;
      return item;
    });
    document.getElementById("alerts").replaceChildren(...items);
    document.getElementById("quiet").hidden = items.length > 0;
  }

  function take(news) {
    total = news.total;
    const drawn = new Map(Array.from(body.rows, (tr) => [tr.dataset.run, tr]));
    for (const name of news.removed) {
      runs.delete(name);
      drawn.get(name)?.remove();
    }
    for (const row of news.rows) {
      const tr = draw(row);
      if (drawn.has(row.run)) {
        tr.className = "fresh";
        drawn.get(row.run).replaceWith(tr);
      } else {
        body.append(tr);
      }
      runs.set(row.run, row);
    }
    summarise();
    table.dispatchEvent(new Event("rows"));
    state.className = "";
    state.textContent = `live; last news ${new Date().toLocaleTimeString()}`;
  }

  const source = new EventSource("events");
  source.addEventListener("runs", (event) => take(JSON.parse(event.data)));
  source.addEventListener("error", () => {
    state.className = "lost";
    state.textContent = "connection lost: what is shown may be old; trying again";
    // The next connection sends everything again, so what has gone meanwhile must go here too.
    runs.clear();
    body.replaceChildren();
  });
  setInterval(() => {
    for (const tr of body.rows) {
      const row = runs.get(tr.dataset.run);
      tr.cells[2].textContent = ago(row.last);
    }
  }, 5000);
})();
