"use strict";
// Fills the table of answers: which ones to show, and where each differs from what was expected. Answers are text of a
// model, so they only ever become the text of an element.

function tokensOf(text) {
  return text.match(/\p{Script=Han}|(?:(?!\p{Script=Han})[\p{L}\p{M}])+|\p{N}|\s+|./gsu) ?? [];
}

// Says for each token of `mine` whether a longest common subsequence with `theirs` has it.
function inCommon(mine, theirs) {
  const common = new Array(mine.length).fill(false);
  let start = 0, end = 0;
  while (start < mine.length && start < theirs.length && mine[start] === theirs[start]) common[start++] = true;
  while (end < mine.length - start && end < theirs.length - start && mine.at(-1 - end) === theirs.at(-1 - end)) {
    common[mine.length - 1 - end++] = true;
  }
  const a = mine.slice(start, mine.length - end), b = theirs.slice(start, theirs.length - end);
  if (a.length * b.length > 250000) return common; // too long to compare: the whole middle counts as different
  const length = Array.from({length: a.length + 1}, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      length[i][j] = a[i] === b[j] ? 1 + length[i + 1][j + 1] : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) { common[start + i++] = true; j++; }
    else if (length[i + 1][j] >= length[i][j + 1]) i++;
    else j++;
  }
  return common;
}

// Returns the text as nodes, with a mark around what `other` does not have.
function marked(text, other) {
  if (!other || text === other) return [text];
  const tokens = tokensOf(text), nodes = [];
  const common = inCommon(tokens, tokensOf(other));
  if (3 * common.filter(Boolean).length < tokens.length) common.fill(false); // another text altogether
  for (let from = 0; from < tokens.length;) {
    let to = from;
    while (to < tokens.length && common[to] === common[from]) to++;
    const part = tokens.slice(from, to).join("");
    nodes.push(common[from] ? part : element("mark", {textContent: part}));
    from = to;
  }
  return nodes;
}

const worth = reply => (reply ? reply[2] ?? reply[1] : null);
const isRight = reply => reply?.[1] === 1, isWrong = reply => reply?.[1] === 0;
const PAIR = {
  "all": () => true,
  "better": (before, after) => worth(before) !== null && worth(after) !== null && worth(after) > worth(before),
  "worse": (before, after) => worth(before) !== null && worth(after) !== null && worth(after) < worth(before),
  "wrong both": (before, after) => isWrong(before) && isWrong(after),
  "right both": (before, after) => isRight(before) && isRight(after),
};
const ALONE = {"all": () => true, "right": (before, after) => isRight(after), "wrong": (before, after) => isWrong(after)};
const PAGE = 50;

function showAnswers(place, answers) {
  const {models, questions, reasons} = answers;
  // Of one run the base model is compared with the tuned one; of several runs the first tuned model with the last one.
  const tuned = models.flatMap((name, at) => (name.endsWith("tuned") ? [at] : []));
  const after = tuned.at(-1) ?? models.length - 1;
  const before = tuned.length > 1 ? tuned[0] : Math.max(0, models.findIndex(name => name.endsWith("base")));
  const state = {before, after, filter: "all", reason: "", search: "", page: 0};
  const filters = models.length > 1 ? PAIR : ALONE;
  const body = place.querySelector("tbody"), head = place.querySelector("thead tr"), bar = place.querySelector(".filters");
  const said = place.querySelector(".said"), [back, forth] = place.querySelectorAll(".pages button");
  const pair = question => [models.length > 1 ? question.a[state.before] : undefined, question.a[state.after]];
  const asked = question => pair(question).some(Boolean);
  const hasReason = question => state.reason === "" || pair(question).some(reply => reply?.[4] === Number(state.reason));
  function isFound(question) {
    const texts = [question.q, question.e, ...pair(question).map(reply => reply?.[0] ?? "")];
    return texts.some(text => text.toLowerCase().includes(state.search));
  }

  function replyCell(reply, other, name) {
    const cell = element("td", {className: "of"});
    cell.dataset.of = name;
    if (!reply) { cell.append("–"); return cell; }
    const [answer, right, score, reason] = reply;
    const sign = {1: "✓ ", 0: "✗ "}[right] ?? "";
    cell.append(element("span", {className: right === 1 ? "right" : "wrong", textContent: sign}), ...marked(answer, other));
    const partly = score !== null && score !== 0 && score !== 1 ? `score ${short(score)} ` : "";
    if (partly || reason) cell.append(element("small", {textContent: partly + reason}));
    return cell;
  }

  function row(question) {
    const [before, after] = pair(question);
    const kinds = Object.keys(filters).filter(name => name !== "all" && filters[name](before, after));
    const line = element("tr", {}, element("td", {textContent: kinds.join(", ") || "–"}));
    const known = [["prompt", question.q], ...(hasExpected ? [["expected", question.e]] : [])];
    for (const [name, text] of known) {
      const cell = element("td", {className: "of", textContent: text});
      cell.dataset.of = name;
      line.append(cell);
    }
    const other = hasExpected ? [question.e, question.e] : [after?.[0], before?.[0]];
    if (models.length > 1) line.append(replyCell(before, other[0], models[state.before]));
    line.append(replyCell(after, other[1], models[state.after]));
    return line;
  }

  const hasExpected = questions.some(question => question.e !== "");
  function show() {
    const there = questions.filter(question => asked(question) && hasReason(question) && isFound(question));
    for (const button of bar.querySelectorAll("button")) {
      const count = there.filter(question => filters[button.dataset.filter](...pair(question))).length;
      button.textContent = `${button.dataset.filter} ${count}`;
      button.setAttribute("aria-pressed", String(button.dataset.filter === state.filter));
    }
    const shown = there.filter(question => filters[state.filter](...pair(question)));
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    const from = PAGE * state.page;
    body.replaceChildren(...shown.slice(from, from + PAGE).map(row));
    said.textContent = shown.length ? `${from + 1} to ${Math.min(from + PAGE, shown.length)} of ${shown.length}` : "no answer is like that";
    [back.disabled, forth.disabled] = [state.page === 0, state.page === pages - 1];
    const names = [...(models.length > 1 ? [models[state.before]] : []), models[state.after]];
    const titles = ["", "prompt", ...(hasExpected ? ["expected"] : []), ...names];
    head.replaceChildren(...titles.map(textContent => element("th", {textContent, scope: "col"})));
  }

  function change(key, value) {
    state.page = 0;
    state[key] = value;
    show();
  }

  function choice(label, options, value, chosen) {
    const select = element("select", {}, ...options.map(([option, text]) => element("option", {value: option, textContent: text})));
    select.value = value;
    select.setAttribute("aria-label", label);
    select.addEventListener("change", () => chosen(select.value));
    return select;
  }

  for (const filter of Object.keys(filters)) {
    const button = element("button", {type: "button"});
    button.dataset.filter = filter;
    button.addEventListener("click", () => change("filter", filter));
    bar.append(button);
  }
  if (reasons.length) {
    bar.append(choice("reason", [["", "any reason"], ...reasons.map((text, at) => [at, text])], "", value => change("reason", value)));
  }
  if (models.length > 2) {
    const named = models.map((text, at) => [at, text]);
    bar.append(choice("before", named, state.before, value => change("before", Number(value))), "→",
               choice("after", named, state.after, value => change("after", Number(value))));
  }
  const search = element("input", {type: "search", placeholder: "search"});
  search.setAttribute("aria-label", "search");
  search.addEventListener("input", () => change("search", search.value.toLowerCase()));
  bar.append(search);
  back.addEventListener("click", () => { state.page--; show(); });
  forth.addEventListener("click", () => { state.page++; show(); });
  place.hidden = false;
  show();
}

const answersText = document.getElementById("answers-data")?.textContent;
if (answersText) showAnswers(document.getElementById("answers"), JSON.parse(answersText));
