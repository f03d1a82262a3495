"use strict";
// Draws curves with uPlot: the raw line faintly, its smoothed line in front, a tooltip, and a logarithmic axis on demand.

const FONT = "12px system-ui, sans-serif";

function ink(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// The mean of all values with the weights `weight ** distance`, to both sides, so that it does not lag; null stays null.
function smoothed(values, weight) {
  const sums = values.map(() => 0), shares = values.map(() => 0);
  for (const backwards of [false, true]) {
    let sum = 0, share = 0;
    for (let step = 0; step < values.length; step++) {
      const place = backwards ? values.length - 1 - step : step, value = values[place];
      if (value === null) continue;
      [sum, share] = [weight * sum, weight * share];
      sums[place] += sum + (backwards ? 0 : value);
      shares[place] += share + (backwards ? 0 : 1);
      [sum, share] = [sum + value, share + 1];
    }
  }
  return values.map((value, place) => (value === null ? null : sums[place] / shares[place]));
}

function nearest(values, place) {
  for (let away = 0; away < values.length; away++) {
    if (values[place - away] != null) return place - away;
    if (values[place + away] != null) return place + away;
  }
  return null;
}

function short(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(3) : String(Number(value.toPrecision(5)));
}

// Says whether a number has one significant digit, as the lines of a logarithmic axis have.
function isRound(value) {
  return Math.abs(value - Number(value.toPrecision(1))) < 1e-9 * value;
}

function tooltips(curve, hidden) {
  const tip = element("div", {className: "tip", hidden: true});
  function show(plot) {
    const {idx, left, top} = plot.cursor;
    tip.hidden = idx == null || left < 0;
    if (tip.hidden) return;
    tip.replaceChildren(element("div", {textContent: `${curve.x_label} ${curve.x[idx]}`}));
    for (const series of curve.series) {
      const place = hidden.has(series.name) ? null : nearest(series.y, idx);
      if (place === null) continue;
      const at = place === idx ? "" : ` (at ${curve.x[place]})`;
      const sample = element("i", {});
      sample.style.cssText = `display:inline-block;width:.6rem;height:.6rem;margin-right:.3rem;background:${series.colour}`;
      tip.append(element("div", {}, sample, `${series.name} ${short(series.y[place])}${at}`));
    }
    const room = plot.over.clientWidth;
    tip.style.left = `${Math.max(0, left + 12 + tip.offsetWidth > room ? left - 12 - tip.offsetWidth : left + 12)}px`;
    tip.style.top = `${Math.max(0, top - tip.offsetHeight / 2)}px`;
  }
  return {hooks: {init: plot => plot.over.append(tip), setCursor: show}};
}

// What a curve looks like just now, as data and options of uPlot.
function planned(curve, state, width) {
  const data = [curve.x], lines = [{}];
  for (const series of curve.series) {
    const show = !state.hidden.has(series.name);
    const y = state.log ? series.y.map(value => (value > 0 ? value : null)) : series.y;
    const few = y.filter(value => value !== null).length <= 60;
    const common = {show, spanGaps: true, stroke: series.colour, dash: series.dash.map(part => 2 * part)};
    const smooth = series.noisy && state.weight > 0;
    data.push(y);
    lines.push({...common, width: smooth ? 1 : 2, alpha: smooth ? 0.55 : 1, points: {show: few && !series.noisy, size: 7}});
    if (!smooth) continue;
    const logs = () => smoothed(y.map(value => (value === null ? null : Math.log(value))), state.weight);
    data.push(state.log ? logs().map(value => (value === null ? null : Math.exp(value))) : smoothed(y, state.weight));
    lines.push({...common, width: 2, points: {show: false}});
  }
  const axis = {stroke: ink("--soft"), grid: {stroke: ink("--faint"), width: 1}, ticks: {stroke: ink("--faint")}};
  const range = state.log ? {range: (plot, low, high) => [low / 1.1, high * 1.1]}
    : curve.zero ? {range: (plot, low, high) => [0, high > 0 ? 1.05 * high : 1]} : {};
  return [data, {
    width, height: width < 500 ? 230 : 300,
    scales: {x: {time: false}, y: {distr: state.log ? 3 : 1, ...range}},
    axes: [
      {...axis, label: curve.x_label, labelSize: 22, size: 34, labelFont: FONT, font: FONT, values: (plot, ticks) => ticks.map(tick => (Number.isInteger(tick) ? String(tick) : ""))},
      {...axis, size: 62, font: FONT, values: (plot, ticks) => ticks.map(tick => (tick === null || (state.log && !isRound(tick)) ? "" : short(tick)))},
    ],
    series: lines, legend: {show: false}, cursor: {y: false, points: {size: 6}}, plugins: [tooltips(curve, state.hidden)],
  }];
}

// Replaces the drawing in a figure by an interactive one. Returns a function that draws it anew with other data.
function drawCurve(figure, curve, title) {
  const count = Math.max(...curve.series.filter(series => series.noisy).map(series => series.y.length), 0);
  const state = {log: curve.log, weight: count >= 30 ? 0.7 : 0, hidden: new Set()};
  const place = element("div", {className: "plot"}), legend = element("div", {className: "legend"});
  const head = element("div", {className: "curve-head"}, element("strong", {textContent: title}), curve.y_label);
  let plot = null;
  function draw() {
    const [data, options] = planned(curve, state, Math.max(220, figure.clientWidth));
    if (plot) plot.destroy();
    plot = new uPlot(options, data, place);
  }
  function toggle(name, button) {
    if (!state.hidden.delete(name)) state.hidden.add(name);
    button.setAttribute("aria-pressed", String(!state.hidden.has(name)));
    draw();
  }
  function name() {
    legend.hidden = curve.series.length === 1;
    legend.replaceChildren(...curve.series.map(series => {
      const colour = element("i");
      colour.style.background = series.colour;
      const button = element("button", {type: "button"}, colour, series.name);
      button.setAttribute("aria-pressed", String(!state.hidden.has(series.name)));
      button.addEventListener("click", () => toggle(series.name, button));
      return button;
    }));
  }
  const log = element("input", {type: "checkbox", checked: state.log});
  log.addEventListener("change", () => { state.log = log.checked; draw(); });
  if (curve.series.some(series => series.y.some(value => value > 0))) head.append(element("label", {}, log, " log scale"));
  if (curve.series.some(series => series.noisy)) {
    const slider = element("input", {type: "range", min: 0, max: 0.98, step: 0.02, value: state.weight});
    slider.addEventListener("input", () => { state.weight = Number(slider.value); draw(); });
    head.append(element("label", {}, "smoothing ", slider));
  }
  figure.classList.add("drawn");
  figure.prepend(head, place, legend);
  name();
  draw();
  new ResizeObserver(() => { if (plot.width !== Math.max(220, figure.clientWidth)) draw(); }).observe(figure);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  return newer => { curve = newer; name(); draw(); };
}

for (const curve of JSON.parse(document.getElementById("curves")?.textContent ?? "[]")) {
  const figure = document.querySelector(`figure[data-curve="${curve.name}"]`);
  drawCurve(figure, curve, figure.dataset.title);
}
