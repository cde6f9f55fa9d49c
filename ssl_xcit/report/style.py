"""The style sheet and the script of a report, see `ssl_xcit.report.page`.

System fonts, light or dark as the reader's system is, from phones to wide screens and print. The
script shows the values under the pointer; the page is complete without it.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: light-dark(#fff, #151618); --ink: light-dark(#1c1d1f, #e9e9e7);
  --soft: light-dark(#5b5e64, #a4a7ad); --rule: light-dark(#dddee0, #34373c);
  --wash: light-dark(#f4f4f2, #1e2023);
  --s0: light-dark(#1a5fb4, #82b4ff); --s1: light-dark(#b8500f, #f2a56b);
  --good: light-dark(#17703c, #74d19b); --bad: light-dark(#b3261e, #ff9188);
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 78rem; padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 3rem);
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
h1, h2, h3, h4, p, dl, dd, figure { margin: 0; }
h1, h2 { font-size: 1.375rem; font-weight: 650; line-height: 1.25; }
h2 { margin-bottom: .35rem; }
h3 { font-size: 1rem; font-weight: 650; margin: 1.75rem 0 .75rem; }
h4 { font-size: .9375rem; font-weight: 600; }
code, pre { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: .875em; }
.soft, .note, .lead, .facts, dt, figcaption, footer { color: var(--soft); }
.lead { max-width: 44rem; margin-bottom: 1.25rem; }
section { margin-top: clamp(2.25rem, 5vw, 3.5rem); padding-top: 1.25rem;
  border-top: 1px solid var(--rule); }
.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; margin-top: .35rem; }

.verdict { border-top: 0; padding-top: 0; margin-top: clamp(1.75rem, 4vw, 2.75rem); }
.verdict .name { font-size: clamp(2.25rem, 7vw, 3.75rem); font-weight: 680; line-height: 1.08;
  letter-spacing: -.022em; }
.verdict .sentence { font-size: 1.1875rem; line-height: 1.45; max-width: 46rem;
  margin-top: .75rem; }
.good .name { color: var(--good); } .bad .name { color: var(--bad); }
.verdict dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1rem;
  max-width: 46rem; margin-top: 1.25rem; }

.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 8.5rem), 1fr));
  gap: 1.25rem 1.5rem; margin-top: clamp(1.75rem, 4vw, 2.5rem); }
.numbers div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.numbers dt { font-size: .875rem; line-height: 1.35; }
.numbers dd { font-size: 1.625rem; font-weight: 600; line-height: 1.25; letter-spacing: -.01em; }

.charts { display: grid; gap: 2rem 2.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20.5rem), 1fr)); }
.chart figcaption { display: flex; flex-wrap: wrap; justify-content: space-between;
  align-items: baseline; gap: 0 1rem; }
h4 { color: var(--ink); }
.readout { display: flex; flex-wrap: wrap; gap: 0 .85rem; font-size: .8125rem; }
.readout b { color: var(--ink); font-weight: 600; }
.readout i { display: inline-block; width: .75rem; height: .1875rem; margin-right: .3rem;
  vertical-align: .22rem; background: currentColor; }
.readout .s0 i { color: var(--s0); } .readout .s1 i { color: var(--s1); }
.chart svg { display: block; width: 100%; height: auto; margin: .35rem 0 .25rem;
  touch-action: pan-y; overflow: visible; }
.note { font-size: .8125rem; line-height: 1.4; }
svg text { font-size: 11px; fill: var(--soft); }
svg text.y { text-anchor: end; }
svg text.level { text-anchor: end; paint-order: stroke; stroke: var(--paper);
  stroke-width: 4px; stroke-linejoin: round; }
svg .frame { fill: none; }
svg .grid { stroke: var(--rule); }
svg .floor { stroke: var(--soft); }
svg line.level { stroke: var(--soft); stroke-dasharray: 3 3; }
svg .line { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
svg .line.s0 { stroke: var(--s0); } svg .line.s1 { stroke: var(--s1); }
svg .band { opacity: .18; }
svg .band.s0, svg .dot.s0 { fill: var(--s0); } svg .band.s1, svg .dot.s1 { fill: var(--s1); }
svg .at { stroke: var(--soft); }

img { display: block; width: 100%; height: auto; background: var(--wash); }
img.pixels { image-rendering: pixelated; }
.gallery { display: grid; gap: 2rem 2.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 31rem), 1fr)); }
.gallery.wide { grid-template-columns: 1fr; }
.gallery figcaption { font-size: .8125rem; line-height: 1.3; margin: .25rem 0; }
.row { display: grid; gap: .6rem .5rem; align-items: start;
  grid-template-columns: repeat(var(--across), minmax(0, 1fr)); }
.row :first-child figcaption { color: var(--ink); font-weight: 600; }
.square img { aspect-ratio: 1; object-fit: cover; }
.other img { outline: 2px solid var(--bad); outline-offset: -2px; }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-end; }
.strip figure { flex: none; max-width: 100%; width: calc(6.5rem * var(--width)); }

table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th { text-align: left; font-weight: 600; }
th, td { padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: baseline; }
.figure { text-align: right; padding-right: 0; padding-left: 1rem; white-space: nowrap; }
td.best { font-weight: 600; }

.settings { columns: 21rem; column-gap: 2.25rem; font-size: .875rem; }
.settings div { break-inside: avoid; margin-bottom: 1.25rem; }
.settings h3 { margin: 0 0 .25rem; font-size: .875rem; }
.settings dl { display: grid; grid-template-columns: minmax(0, 11rem) minmax(0, 1fr);
  gap: 0 .75rem; }
.places { display: grid; gap: .75rem 1.5rem; font-size: .875rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 11rem), 1fr)); }
pre { margin: 0 0 1.25rem; white-space: pre-wrap; overflow-wrap: anywhere; }
pre span { white-space: nowrap; }
.settings .own { font-weight: 650; }
footer { margin-top: 3rem; font-size: .875rem; }

@media (max-width: 34rem) {
  .row { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  th, td { padding-right: .5rem; }
  .figure { padding-left: .25rem; padding-right: 0; }
  .where { display: none; }
  .verdict dl { grid-template-columns: 1fr; gap: 0; }
  .verdict dt { margin-top: .75rem; }
}
@media print {
  :root { color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt;
    -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  figure, .row, .strip, tr, .settings div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .charts { grid-template-columns: repeat(2, 1fr); }
}
"""

SCRIPT = """
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector("svg"), lines = JSON.parse(svg.dataset.lines);
  const values = [...chart.querySelectorAll(".readout b")], at = chart.querySelector(".at");
  const last = [...values, at].map(element => element.textContent);
  svg.insertAdjacentHTML("beforeend", "<g></g>");
  const marks = svg.lastElementChild, frame = svg.querySelector(".frame").getBBox();
  const read = event => {
    const size = svg.getBoundingClientRect();
    const x = (event.clientX - size.left) / size.width * svg.viewBox.baseVal.width;
    let drawn = "";
    lines.forEach((line, k) => {
      if (!line.x.length) return;
      const i = line.x.reduce((best, place, j) =>
        Math.abs(place - x) < Math.abs(line.x[best] - x) ? j : best, 0);
      values[k].textContent = line.text[i];
      at.textContent = "step " + line.step[i].toLocaleString("en");
      drawn += `<line class="at" x1="${line.x[i]}" x2="${line.x[i]}" y1="${frame.y}"
        y2="${frame.y + frame.height}"/><circle class="dot s${k}" r="3.5" cx="${line.x[i]}"
        cy="${line.y[i]}"/>`;
    });
    marks.innerHTML = drawn;
  };
  svg.addEventListener("pointermove", read);
  svg.addEventListener("pointerdown", read);
  svg.addEventListener("pointerleave", () => {
    marks.innerHTML = "";
    [...values, at].forEach((element, i) => { element.textContent = last[i]; });
  });
}
"""
