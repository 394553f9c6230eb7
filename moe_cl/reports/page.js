"use strict";
// The pointer reads the charts; tables sort; the theme can be changed. No library, nothing is fetched.
const data = JSON.parse(document.getElementById("hover").textContent);

for (const svg of document.querySelectorAll("svg.plot")) {
  const spec = data[svg.dataset.figure];
  if (!spec) continue;
  const frame = svg.parentElement;
  const cross = frame.appendChild(Object.assign(document.createElement("div"), { className: "cross" }));
  const tip = frame.appendChild(Object.assign(document.createElement("div"), { className: "tip" }));
  const [left, top, width, height] = spec.box;

  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - left) / width;
    if (share < 0 || share > 1) return hide();
    const x = spec.x[0] + share * (spec.x[1] - spec.x[0]);
    let nearest = null;
    const rows = spec.lines.map((line) => {
      let low = 0, high = line.x.length - 1;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (line.x[middle] < x) low = middle; else high = middle;
      }
      const index = x - line.x[low] < line.x[high] - x ? low : high;
      if (nearest === null || Math.abs(line.x[index] - x) < Math.abs(nearest - x)) nearest = line.x[index];
      return { label: line.label, color: line.color, value: line.y[index] };
    });
    tip.replaceChildren();
    tip.append(`${spec.xlabel || "x"} ${format(nearest)}`);
    for (const row of rows) {
      if (row.value === null) continue;
      const line = tip.appendChild(document.createElement("div"));
      line.appendChild(document.createElement("i")).style.background = row.color;
      line.append(`${rows.length > 1 ? row.label + "  " : ""}${format(row.value)} ${spec.unit}`);
    }
    const at = left + width * (nearest - spec.x[0]) / (spec.x[1] - spec.x[0]);
    Object.assign(cross.style, {
      display: "block", left: `${at * box.width}px`, top: `${top * box.height}px`, height: `${height * box.height}px`,
    });
    tip.style.display = "block";
    const room = at * box.width + 14 + tip.offsetWidth < box.width;
    tip.style.left = `${room ? at * box.width + 12 : Math.max(0, at * box.width - tip.offsetWidth - 12)}px`;
    tip.style.top = `${top * box.height}px`;
  };
  const hide = () => { cross.style.display = tip.style.display = "none"; };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

function format(value) {
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(3);
  return String(Number(value.toPrecision(4)));
}

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const heads = [...table.querySelectorAll("th[data-sort]")];
  heads.forEach((head) => {
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up === 1 ? "ascending" : "descending");
      const value = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        const [n, m] = [parseFloat(x), parseFloat(y)];
        return up * (Number.isNaN(n) || Number.isNaN(m) ? x.localeCompare(y, "en", { numeric: true }) : n - m);
      });
      body.append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = button.previousElementSibling.textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // a page from a file has no clipboard in some browsers
      const area = document.body.appendChild(Object.assign(document.createElement("textarea"), { value: text }));
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
