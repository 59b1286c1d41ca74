"use strict";
const content = JSON.parse(document.getElementById("content").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function element(kind, attributes, ...children) {
  const made = document.createElement(kind);
  Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
  made.append(...children);
  return made;
}

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  const panel = style.getPropertyValue("--panel").trim();
  const themed = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12 },
    margin: { l: 60, r: 20, t: 40, b: 60, ...layout.margin }, legend: { font: { size: 11 }, ...layout.legend },
    hoverlabel: { bgcolor: panel, bordercolor: line, font: { color: ink }, align: "left" } };
  const axes = new Set(["xaxis", "yaxis", ...Object.keys(layout).filter((key) => /^[xy]axis/.test(key))]);
  axes.forEach((axis) => { themed[axis] = { automargin: true, gridcolor: line, zerolinecolor: line, linecolor: line, ...layout[axis] }; });
  return themed;
}

function card(item, images, more) {
  const shown = images[item.image] ? [element("img", { src: images[item.image], alt: "test image " + item.image })] : [];
  const made = element("div", { class: "card" }, ...shown, element("div", {}, item.label));
  if (!item.right) made.append(element("div", { class: "wrong" }, "answer " + item.answer));
  if (item.exit === undefined) {
    const bars = [...item.ran].map((kept) => element("i", kept === "1" ? { class: "ran" } : {}));
    const kept = [...item.ran].filter((kept) => kept === "1").length;
    made.append(element("div", { class: "blocks", title: item.ran }, ...bars), `${kept} of ${item.ran.length} blocks`);
  } else made.append(`exit ${item.exit} of 0–${item.ran.length - 1}`);
  made.append(element("div", { class: "faint" }, `${(100 * item.share).toFixed(0)} % of full MACs`));
  return made;
}

function showGallery(group, run) {
  const place = document.getElementById(group.id + "-gallery");
  const parts = group.galleries[run] || [];
  place.replaceChildren(element("h4", {}, "Run " + run));
  if (!parts.length) place.append(group.no_gallery || "No example images: the run's folder holds no decisions for single images.");
  parts.forEach((part) => place.append(element("h4", { class: "faint" }, part.title),
    element("div", { class: "cards" }, ...part.items.map((item) => card(item, content.images[group.images], item)))));
  place.dataset.run = run;
}

function draw(group) {
  group.figures.forEach((figure) => {
    const place = document.getElementById(figure.id);
    if (place.data === undefined && figure.choices) {
      const options = figure.choices.map((choice, n) => element("option", n === figure.chosen ? { value: n, selected: "" } : { value: n }, choice.name));
      const select = element("select", { "aria-label": "measure" }, ...options);
      select.addEventListener("change", () => { figure.data[0].z = figure.choices[Number(select.value)].z; draw(group); });
      place.before(select);
    }
    const first = place.data === undefined;
    Plotly.react(place, figure.data, themed(figure.layout), { responsive: true, displaylogo: false });
    if (first) place.on("plotly_click", (event) => {
      const run = event.points[0].customdata;
      if (run !== undefined) showGallery(group, run);
    });
  });
}

function sortable(table) {
  table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const rows = [...table.tBodies[0].rows], number = (row) => parseFloat(row.cells[column].textContent.replace("−", "-"));
    const down = head.dataset.down !== "yes";
    head.dataset.down = down ? "yes" : "no";
    rows.sort((a, b) => {
      const [x, y] = [number(a), number(b)];
      const order = column && !(isNaN(x) || isNaN(y)) ? y - x : b.cells[column].textContent.localeCompare(a.cells[column].textContent);
      return down ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }));
}

document.querySelectorAll("table").forEach(sortable);
content.groups.forEach((group) => { draw(group); if (group.first) showGallery(group, group.first); });
dark.addEventListener("change", () => content.groups.forEach(draw));
document.body.dataset.drawn = "yes";
