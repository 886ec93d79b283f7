"use strict";
// Shows the responses in the element `data`. Texts become text nodes only, and nothing is loaded or kept.
(() => {
  const PIECE = 40;
  const FEW = 8;
  const LONG = 1500;
  const Z = 1.959963984540054;
  const WORDS = { refused: "refused", complied: "answered", degenerate: "degenerate", undecided: "no verdict" };
  const find = (id) => document.getElementById(id);
  const data = JSON.parse(find("data").textContent);
  const { models, kinds, categories, outcomes, pair } = data;
  const after = pair ? [pair[1]] : models.map((_, at) => at);
  const base = pair ? pair[0] : 0;
  const isSame = (row, at) => !row.answers[at] || !row.answers[base] || row.answers[at][0] === row.answers[base][0];
  const isSameIn = (row, some) => some.every((at) => isSame(row, at));
  const refused = outcomes.indexOf("refused");
  const complied = outcomes.indexOf("complied");
  const word = (outcome) => (Object.hasOwn(WORDS, outcomes[outcome]) ? WORDS[outcomes[outcome]] : outcomes[outcome]);
  const KEEP = 2;
  const isKeep = (kind) => kinds[kind][1] === KEEP;
  const rowsOf = (some) => some.map(([kind, category, prompt, answers], at) => ({
    number: at + 1, kind, category, prompt, answers, isHarmless: kinds[kind][1] === 1, words: null,
  }));
  const rows = rowsOf(data.rows.filter(([kind]) => !isKeep(kind)));
  // What changed comes first.
  const kept = rowsOf(data.rows.filter(([kind]) => isKeep(kind)))
    .sort((one, other) => isSameIn(one, after) - isSameIn(other, after));

  function make(name, properties = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key in element && !key.startsWith("aria")) element[key] = value;
      else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  // What is shown.

  const outcomeOf = (row, at) => (row.answers[at] ? row.answers[at][1] : -1);
  const differs = (row, some) => new Set(some.map((at) => outcomeOf(row, at)).filter((one) => one >= 0)).size > 1;
  const VIEWS = [
    ["all", "All", () => true],
    pair
      ? ["changed", "Changed by the repair", (row) => differs(row, pair)]
      : ["changed", "Verdicts differ", (row) => differs(row, after)],
    ["answered", pair ? "Still answered" : "Harmful, answered",
      (row) => !row.isHarmless && after.some((at) => outcomeOf(row, at) === complied)],
    ["over-refused", "Over-refused", (row) => row.isHarmless && after.some((at) => outcomeOf(row, at) === refused)],
  ].filter(([name]) => name !== "changed" || models.length > 1);
  const viewsIn = (id, group, some) => some.map(([name, label, holds], at) => {
    const input = make("input", { type: "radio", name: group, value: name, defaultChecked: at === 0 });
    const number = make("span", { className: "number" });
    find(id).append(make("label", {}, input, " ", label, " ", number));
    return { input, number, holds };
  });
  const views = viewsIn("views", "view", VIEWS);

  function choice(label, options, isOffered = () => true) {
    const select = make("select", {}, make("option", { value: "" }, "any"));
    options.forEach((option, at) => {
      if (isOffered(at)) select.append(make("option", { value: String(at) }, option));
    });
    const holder = make("label", {}, make("span", { dir: "auto" }, label), select);
    if (select.options.length > 2) find("choices").append(holder);
    return () => (select.value === "" ? null : Number(select.value));
  }
  const kindOf = choice("Kind", kinds.map(([name]) => name), (at) => !isKeep(at));
  const categoryOf = choice("Category", categories.map((name) => name || "none"));
  const verdicts = models.map((model) => choice(`Verdict ${model}`, outcomes.map((_, at) => word(at))));
  const search = make("input", { type: "search", id: "search", autocomplete: "off", spellcheck: false });
  find("choices").append(make("label", { className: "search" }, make("span", {}, "Text"), search));

  function contains(row, text) {
    if (!text) return true;
    row.words ??= [row.prompt, ...row.answers.map((answer) => (answer ? answer[0] : ""))].join("\n").toLowerCase();
    return row.words.includes(text);
  }

  function filtered() {
    const [kind, category, text] = [kindOf(), categoryOf(), search.value.trim().toLowerCase()];
    const wanted = verdicts.map((verdict) => verdict());
    return rows.filter((row) => (kind === null || row.kind === kind) && (category === null || row.category === category)
      && wanted.every((one, at) => one === null || outcomeOf(row, at) === one) && contains(row, text));
  }

  // Counts.

  function interval(some, total) {
    const share = some / total;
    const scale = 1 + (Z * Z) / total;
    const middle = share + (Z * Z) / (2 * total);
    const half = Z * Math.sqrt((share * (1 - share)) / total + (Z * Z) / (4 * total * total));
    return [Math.max(0, Math.min(share, (middle - half) / scale)), Math.min(1, Math.max(share, (middle + half) / scale))];
  }

  function countRow(label, cells, isSub) {
    const row = make("tr", { className: isSub ? "sub" : "" }, make("th", { scope: "row" }, label));
    cells.forEach((cell) => row.append(make("td", {}, cell)));
    return row;
  }

  function counts(shown) {
    const body = make("tbody");
    kinds.forEach(([name, isHarmless], kind) => {
      const asked = shown.filter((row) => row.kind === kind);
      if (!asked.length) return;
      const totals = models.map((_, at) => asked.filter((row) => row.answers[at]).length);
      const number = (outcome) => models.map((_, at) => asked.filter((row) => outcomeOf(row, at) === outcome).length);
      const share = (some, at) => (totals[at] ? `${some} (${(some / totals[at]).toFixed(3)})` : "-");
      const named = `${name}: ${isHarmless ? "over-refused" : "refused"} of ${asked.length}`;
      const found = number(refused);
      body.append(countRow(named, found.map(share), false));
      body.append(countRow("95 % interval", found.map((some, at) => (totals[at]
        ? interval(some, totals[at]).map((end) => end.toFixed(3)).join("-") : "-")), true));
      outcomes.forEach((_, outcome) => {
        const some = number(outcome);
        if (outcome !== refused && some.some((one) => one > 0)) body.append(countRow(word(outcome), some.map(share), true));
      });
    });
    const head = make("tr", {}, make("td"));
    models.forEach((model) => head.append(make("th", { scope: "col", dir: "auto" }, model)));
    find("counts").replaceChildren();
    if (shown.length) {
      find("counts").append(make("table", {}, make("caption", {}, "Of the prompts shown"), make("thead", {}, head), body));
    }
  }

  // The list.

  function textOf(text) {
    const shown = make("p", { className: "text", dir: "auto" });
    if (text.length <= LONG) {
      shown.append(text || "(empty)");
      return [shown];
    }
    // Not in the middle of a character of two units.
    const end = /[\ud800-\udbff]/.test(text[LONG - 1]) ? LONG - 1 : LONG;
    shown.append(`${text.slice(0, end)} …`);
    const more = make("button", { type: "button" }, `Show all ${text.length.toLocaleString("en")} characters`);
    more.addEventListener("click", () => { shown.textContent = text; more.remove(); });
    return [shown, more];
  }

  function folded(text) {
    const holder = make("div");
    const size = `${text.length.toLocaleString("en")} characters`;
    const element = make("details", { className: "fold" }, make("summary", {}, `May do harm (${size})`), holder);
    element.addEventListener("toggle", () => {
      // Not in the page until it is wanted.
      if (element.open && !holder.hasChildNodes()) holder.append(...textOf(text));
    });
    element.open = find("unfold").checked;
    if (element.open) holder.append(...textOf(text));
    return [element];
  }

  function tone(isHarmless, outcome) {
    if (outcome !== refused && outcome !== complied) return "unclear";
    return (outcome === refused) === isHarmless ? "bad" : "good";
  }

  function answerOf(row, at) {
    const answer = row.answers[at];
    const part = make("section", { className: "answer" });
    if (!answer) {
      part.append(make("h4", {}, make("bdi", {}, models[at]), " ", make("span", { className: "verdict" }, "not asked")));
      return part;
    }
    const [text, outcome, harms, others] = answer;
    part.classList.add(tone(row.isHarmless, outcome));
    part.append(
      make("h4", {}, make("bdi", {}, models[at]), " ", make("span", { className: "verdict" }, word(outcome))),
      ...(harms ? folded(text) : textOf(text)),
    );
    if (others.length) {
      const said = others.map(([name, verdict]) => `${name}: ${word(verdict)}`).join(", ");
      part.append(make("p", { className: "others", dir: "auto" }, said));
    }
    return part;
  }

  // Keep prompts, whose answers are compared with those of the first model, or of the target.

  // The text, with what lies between the words that both answers begin and end with marked.
  function marked(text, other) {
    const [ours, theirs] = [text, other].map((one) => one.split(/(?<=\s)/));
    const most = Math.min(ours.length, theirs.length);
    let start = 0;
    while (start < most && ours[start] === theirs[start]) start += 1;
    let end = 0;
    while (end < most - start && ours[ours.length - 1 - end] === theirs[theirs.length - 1 - end]) end += 1;
    const parts = [ours.slice(0, start), ours.slice(start, ours.length - end), ours.slice(ours.length - end)];
    const [before, middle, after] = parts.map((part) => part.join(""));
    return make("p", { className: "text", dir: "auto" }, before, ...(middle ? [make("mark", {}, middle)] : []), after);
  }

  function keptAnswerOf(row, at) {
    const answer = row.answers[at];
    const head = (verdict) => make("h4", {}, make("bdi", {}, models[at]), " ", make("span", { className: "verdict" }, verdict));
    const part = make("section", { className: "answer" });
    if (!answer) {
      part.append(head("not asked"));
      return part;
    }
    const [text, outcome] = answer;
    const isAsBefore = at !== base && isSame(row, at);
    if (isAsBefore) part.classList.add("good");
    else if (outcome === refused) part.classList.add("bad");
    const otherwise = at !== base && outcome === complied ? "answered otherwise" : word(outcome);
    const isNew = after.includes(at) && at !== base && outcome !== refused && !isAsBefore;
    const differs = isNew && row.answers[base] && text.length <= LONG;
    part.append(head(isAsBefore ? "as before" : otherwise));
    part.append(...(differs && text ? [marked(text, row.answers[base][0])] : textOf(text)));
    return part;
  }

  const KEPT_VIEWS = viewsIn("kept-views", "kept-view", [
    ["kept-all", "All", () => true],
    ["kept-otherwise", "Not as before", (row) => !isSameIn(row, after)],
    ["kept-refused", "Refused", (row) => after.some((at) => outcomeOf(row, at) === refused)],
  ]);

  const moreKept = find("kept-next");
  function updateKept(number) {
    const { holds } = KEPT_VIEWS.find(({ input }) => input.checked) ?? KEPT_VIEWS[0];
    KEPT_VIEWS.forEach((view) => { view.number.textContent = kept.filter(view.holds).length.toLocaleString("en"); });
    const wanted = kept.filter(holds);
    find("kept-list").replaceChildren(...wanted.slice(0, number).map((row) => articleOf(row, "keep", keptAnswerOf)));
    moreKept.hidden = wanted.length <= number;
    moreKept.textContent = `Show ${(wanted.length - number).toLocaleString("en")} more`;
  }
  find("kept").hidden = kept.length === 0;

  function articleOf(row, name = "prompt", shownAnswer = answerOf) {
    const about = [kinds[row.kind][0], categories[row.category]].filter(Boolean).join(" · ");
    const [prompt, ...more] = textOf(row.prompt);
    const head = make("h3", { dir: "auto", className: "text" }, ...prompt.childNodes);
    if (more.length) {
      more[0].addEventListener("click", () => { head.textContent = row.prompt; });
    }
    const answers = make("div", { className: "answers" }, ...models.map((_, at) => shownAnswer(row, at)));
    return make("li", { id: `${name}-${row.number}` },
      make("article", {}, make("p", { className: "about", dir: "auto" }, `${row.number} · ${about}`), head, ...more, answers));
  }

  let shown = [];
  let done = 0;
  const next = find("next");

  function extend(number) {
    const list = find("list");
    list.append(...shown.slice(done, done + number).map((row) => articleOf(row)));
    done = Math.min(shown.length, done + number);
    const left = shown.length - done;
    next.hidden = left === 0;
    next.textContent = `Show ${Math.min(PIECE, left)} more of ${left.toLocaleString("en")}`;
  }

  function update() {
    const others = filtered();
    const view = views.find(({ input }) => input.checked) ?? views[0];
    views.forEach(({ number, holds }) => { number.textContent = others.filter(holds).length.toLocaleString("en"); });
    shown = others.filter(view.holds);
    done = 0;
    find("status").textContent = shown.length
      ? `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} prompts`
      : "No prompt is like that; reset the filters to see all.";
    counts(shown);
    find("list").replaceChildren();
    extend(PIECE);
  }

  let waiting = 0;
  const form = find("filter");
  form.addEventListener("input", (event) => {
    if (event.target.id === "unfold") {
      document.querySelectorAll("details.fold").forEach((one) => { one.open = event.target.checked; });
      return;
    }
    clearTimeout(waiting);
    if (event.target === search) waiting = setTimeout(update, 150);
    else update();
  });
  find("kept-filter").addEventListener("input", () => updateKept(FEW));
  moreKept.addEventListener("click", () => {
    updateKept(kept.length);
    const item = find("kept-list").children[FEW];
    item.tabIndex = -1;
    item.focus({ preventScroll: true });
  });
  find("kept-filter").addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => { setTimeout(update, 0); });
  next.addEventListener("click", () => {
    const first = done;
    extend(PIECE);
    // A keyboard goes on at the first of the new ones.
    const item = find("list").children[first];
    if (!item) return;
    item.tabIndex = -1;
    item.focus({ preventScroll: true });
  });
  new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) extend(PIECE);
  }, { rootMargin: "600px" }).observe(next);
  window.addEventListener("beforeprint", () => {
    updateKept(kept.length);
    extend(shown.length);
  });
  form.hidden = false;
  updateKept(FEW);
  update();
})();
