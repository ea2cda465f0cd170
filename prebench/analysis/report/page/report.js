"use strict";
(() => {
  const root = document.documentElement;
  const by = (id) => document.getElementById(id);
  root.classList.add("js");

  // Colours: the system's, unless the reader chooses.
  by("scheme").addEventListener("change", (event) => {
    if (event.target.value) root.dataset.scheme = event.target.value;
    else delete root.dataset.scheme;
  });

  // Legends: the same box in all of them.
  document.addEventListener("change", (event) => {
    const index = event.target.dataset && event.target.dataset.hides;
    if (index === undefined) return;
    const shown = event.target.checked;
    for (const box of document.querySelectorAll(`[data-hides="${index}"]`)) box.checked = shown;
    for (const group of document.querySelectorAll(`.chart [data-v="${index}"]`)) group.classList.toggle("off", !shown);
  });

  // Where a number comes from: what hovering shows, for fingers too.
  const bar = by("source");
  document.addEventListener("click", (event) => {
    if (bar.contains(event.target)) return;
    const cell = event.target.closest("td[title]");
    const mark = event.target.closest(".mark, .decided, .undecided");
    const title = mark && mark.querySelector("title");
    const text = cell ? cell.title : title ? title.textContent : "";
    bar.hidden = !text;
    bar.querySelector("p").textContent = text;
  });
  bar.querySelector("button").addEventListener("click", () => { bar.hidden = true; });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") bar.hidden = true; });

  // A link into a folded part opens it.
  const unfold = () => {
    const target = location.hash && by(decodeURIComponent(location.hash.slice(1)));
    const part = target && target.closest("details");
    if (part) { part.open = true; target.scrollIntoView(); }
  };
  window.addEventListener("hashchange", unfold);
  unfold();

  window.addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });

  // Samples.
  const form = by("browser");
  if (!form) return;
  const PAGE = 12;
  const data = JSON.parse(by("data").textContent);
  const cards = by("cards");
  const field = form.elements;
  let page = 0;

  const add = (parent, tag, text, name) => {
    const child = document.createElement(tag);
    if (text !== undefined) child.textContent = text;
    if (name) child.className = name;
    parent.append(child);
    return child;
  };
  const fill = (select, options, chosen) => {
    select.replaceChildren();
    for (const [value, text] of options) {
      const option = add(select, "option", text);
      option.value = value;
    }
    if (options.some(([value]) => String(value) === String(chosen))) select.value = chosen;
  };
  const unique = (values) => [...new Set(values)];
  const same = (values) => values.map((value) => [value, value]);
  const place = (variant) =>
    data.runs.findIndex((run) => run.variant === variant && String(run.seed) === field.seed.value);
  const state = (answer) => (!answer ? "absent" : answer[2] ? "failed" : answer[1] >= 0.5 ? "right" : "wrong");
  const outcomes = {
    all: () => true,
    flipped: (a, b) => (a === "right" && b === "wrong") || (a === "wrong" && b === "right"),
    lost: (a, b) => a === "right" && b === "wrong",
    won: (a, b) => a === "wrong" && b === "right",
    wrong: (a, b) => a === "wrong" && b === "wrong",
    right: (a, b) => a === "right" && b === "right",
    failed: (a, b) => a === "failed" || b === "failed",
  };

  const fillKinds = () => {
    const task = field.task.value;
    const mine = data.docs.filter((doc) => task === "" || String(doc.task) === task);
    const kinds = unique(mine.map((doc) => data.texts[doc.kind])).filter((kind) => kind).sort();
    fill(field.kind, [["", "all"], ...same(kinds)], field.kind.value);
  };

  const answerText = (answer) => {
    if (!answer) return "no answer to this prompt and picture";
    if (answer[2]) return `failed: ${data.texts[answer[0]]}`;
    const score = answer[1] === 0 || answer[1] === 1 ? "" : `, scores ${answer[1]}`;
    return `${data.texts[answer[0]] || "(empty)"} (${state(answer)}${score})`;
  };

  const draw = (doc, runs) => {
    const card = add(cards, "article", undefined, "card");
    const kind = data.texts[doc.kind];
    add(card, "h3", [data.tasks[doc.task].label, kind, `document ${doc.doc}`].filter((part) => part).join(" · "));
    if (data.images[doc.image]) {
      const image = add(card, "img");
      image.alt = `picture ${doc.image} of document ${doc.doc}`;
      image.src = data.images[doc.image];
    } else {
      add(card, "p", doc.image ? "picture missing" : "no picture", "none");
    }
    const words = add(card, "div");
    add(words, "p", data.texts[doc.question], "question");
    const list = add(words, "dl");
    add(list, "dt", "target");
    add(list, "dd", data.texts[doc.target]);
    for (const run of runs) {
      const answer = run < 0 ? null : doc.answers[run];
      add(list, "dt", run < 0 ? "not run" : data.runs[run].name);
      add(list, "dd", answerText(answer), state(answer));
    }
    const names = runs.filter((run) => run >= 0).map((run) => data.runs[run].name).join(", ");
    const file = `runs/{${names}}/eval/${data.tasks[doc.task].id}.samples.jsonl`;
    add(card, "p", `${file}; picture ${doc.image || "none"}, prompt ${doc.prompt}`, "ids");
  };

  // The page holds a choice; what all documents say belongs beside it.
  const totals = (run) => {
    if (run < 0 || field.a.value !== data.baseline || field.a.value === field.b.value) return "";
    const tasks = data.tasks.filter((task, i) => field.task.value === "" || field.task.value === String(i));
    const known = tasks.filter((task) => task.turned[data.runs[run].name]);
    if (!known.length) return "";
    const sum = (pick) => known.reduce((total, task) => total + pick(task), 0);
    const [lost, won] = [0, 1].map((i) => sum((task) => task.turned[data.runs[run].name][i]));
    return ` Of all ${sum((task) => task.total)} documents, ${lost} went from right to wrong and ${won} from wrong to right.`;
  };

  const show = () => {
    const runs = [place(field.a.value), place(field.b.value)];
    const wanted = outcomes[field.outcome.value];
    const found = data.docs.filter((doc) => {
      if (field.task.value !== "" && String(doc.task) !== field.task.value) return false;
      if (field.kind.value !== "" && data.texts[doc.kind] !== field.kind.value) return false;
      const [a, b] = runs.map((run) => state(run < 0 ? null : doc.answers[run]));
      return wanted(a, b);
    });
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(page, pages - 1);
    cards.replaceChildren();
    for (const doc of found.slice(page * PAGE, (page + 1) * PAGE)) draw(doc, runs);
    const where = pages > 1 ? `; page ${page + 1} of ${pages}` : "";
    by("found").textContent = `${found.length} of the ${data.docs.length} documents on this page match${where}.${totals(runs[1])}`;
    by("pages").hidden = pages < 2;
    by("back").disabled = page === 0;
    by("next").disabled = page === pages - 1;
  };

  const variants = unique(data.runs.map((run) => run.variant));
  const seeds = unique(data.runs.map((run) => run.seed)).sort((a, b) => a - b);
  fill(field.a, same(variants), data.choice.a);
  fill(field.b, same(variants), data.choice.b);
  fill(field.seed, same(seeds), data.choice.seed);
  fill(field.task, [["", "all"], ...data.tasks.map((task, i) => [i, task.label])], "");
  fillKinds();
  const turn = (by_) => { page += by_; show(); cards.scrollIntoView({ block: "start" }); };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => {
    if (event.target.name === "task") fillKinds();
    page = 0;
    show();
  });
  by("back").addEventListener("click", () => turn(-1));
  by("next").addEventListener("click", () => turn(1));
  form.hidden = false;
  show();
})();
