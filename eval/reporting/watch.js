"use strict";
// Asks the server every two seconds for the lines that metrics.jsonl has got, and shows them.

const told = {generation: null, lines: [], draw: null};
const BLUE = "#0072B2", VERMILION = "#D55E00"; // as in the report

function lossOf(lines) {
  const series = [["training", "train/loss", BLUE, true], ["validation", "val/loss", VERMILION, false]];
  return {
    name: "loss", x_label: "optimizer step", y_label: "nats a label token", zero: false, log: false,
    x: lines.map(line => line.step),
    series: series.map(([name, key, colour, noisy]) => ({name, colour, noisy, dash: [], y: lines.map(line => line[key] ?? null)})),
  };
}

function show(facts) {
  document.getElementById("facts").replaceChildren(...Object.entries(facts).map(([name, text]) => (
    element("article", {className: "card"}, element("h2", {textContent: name}), element("p", {textContent: text}))
  )));
}

async function ask() {
  const status = document.getElementById("status");
  try {
    const query = new URLSearchParams({since: told.lines.length, generation: told.generation ?? -1});
    const answer = await (await fetch(`/metrics?${query}`)).json();
    if (answer.since === 0) told.lines = [];
    told.generation = answer.generation;
    told.lines.push(...answer.lines);
    status.textContent = answer.status;
    show(answer.facts);
    if (answer.lines.length) {
      if (told.draw) told.draw(lossOf(told.lines));
      else told.draw = drawCurve(document.getElementById("loss"), lossOf(told.lines), "Loss");
    }
  } catch {
    status.textContent = "the server does not answer; python -m eval.report RUN --watch starts it again";
  }
  setTimeout(ask, 2000);
}

ask();
