"use strict";
/* What moves on the page. Text from the data only ever becomes text nodes. */
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const data = read("document"), { config, specs } = read("specs");
  const views = (window.taskvecReport = { data, live: {} }); // for tests and the console

  /* An element with attributes and children; strings become text. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value != null) element.setAttribute(name, value);
    }
    element.append(...children.map((c) => (c instanceof Node ? c : String(c))));
    return element;
  }
  const labelled = (text, control) => make("label", {}, make("span", {}, text), control);
  const select = (options, value, onchange) => {
    const box = make("select", { onchange: () => onchange(box.value) });
    for (const [key, text] of options)
      box.append(make("option", { value: key, selected: key === value }, text));
    return box;
  };
  const digits = (x, n = 4) =>
    x == null || Number.isNaN(x) ? "–" : !Number.isFinite(x) ? "∞" : Number(x.toPrecision(n)).toString();
  const percent = (x) => (Number.isFinite(x) ? `${(100 * x).toFixed(1)} %` : "–");
  function table(caption, head, rows) {
    const cell = (tag, value) =>
      make(tag, { class: typeof value === "object" || Number.isNaN(Number(value)) ? null : "number" }, value);
    return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
      make("table", {}, make("caption", {}, caption),
        make("thead", {}, make("tr", {}, ...head.map((h) => make("th", { scope: "col" }, h)))),
        make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((v) => cell("td", v)))))));
  }
  function download(name, text, type) {
    const url = URL.createObjectURL(new Blob([text], { type }));
    const link = make("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  /* Charts. A spec without a width fills its place; concatenated views wrap. */
  function sized(spec, element) {
    const copy = structuredClone(spec);
    const fit = copy.usermeta && copy.usermeta.fit;
    if (fit) {
      const room = element.clientWidth || 320;
      copy.columns = Math.max(1, Math.floor(room / (fit + 70)));
      const width = Math.min(420, Math.max(180, Math.floor(room / copy.columns) - 90));
      for (const view of copy.concat) view.width = width;
    } else if (copy.width === undefined || typeof copy.width !== "number") {
      copy.width = "container";
      copy.autosize = { type: "fit-x", contains: "padding" };
    } else if (copy.width > element.clientWidth - 60) {
      const width = Math.max(200, element.clientWidth - 60);
      if (copy.height) copy.height = Math.round((copy.height * width) / copy.width);
      copy.width = width;
    }
    return copy;
  }
  const embed = async (element, spec, renderer = "svg") => {
    const found = await window.vegaEmbed(element, sized(spec, element), {
      renderer, config, logLevel: 1, tooltip: { theme: "custom" },
      actions: { export: true, source: false, compiled: false, editor: false },
    });
    return found.view;
  };
  const fill = (view, name, rows) => view.data(name, rows);

  const waiting = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
  }, { rootMargin: "600px" });
  const drawn = new WeakMap();
  const draw = (element) => {
    if (!drawn.has(element)) {
      waiting.unobserve(element);
      drawn.set(element, embed(element, specs[Number(element.dataset.spec)]));
    }
    return drawn.get(element);
  };
  const all = [...document.querySelectorAll(".chart[data-spec]")];
  all.forEach((element) => waiting.observe(element));
  views.drawAll = () => Promise.all(all.map(draw));
  window.addEventListener("beforeprint", () => { views.drawAll(); });

  /* Layers. */
  const MEASURES = [
    ["weight", "weight"], ["similarity", "similarity"], ["ratio", "ρ = ‖τ‖ / ‖τ_instr‖"],
    ["cosine", "c = cos(τ, τ_instr)"], ["strength", "λ · w · ‖τ‖"],
    ["relative", "relative change λ · w · ‖τ‖ / ‖θ‖"], ["conflict", "sign conflict"],
  ];
  async function layers(root, settings) {
    const family = data.families[settings.family], { depths, kinds } = settings.places;
    const start = settings.start, several = family.tasks.length > 1;
    const given = Object.fromEntries(settings.tables.map((t, i) => [`table ${i}`, t]));
    const state = {
      scheme: start.scheme || (settings.tables.length ? "table 0" : family.has_base ? "logarithmic" : "equal"),
      granularity: start.granularity || "tensor", threshold: start.threshold ?? 0.95,
      normalize: start.normalize_weights || "none", measure: family.has_base ? "weight" : "strength",
      scales: Object.fromEntries(family.tasks.map((t) => [t, start.scales[t] ?? 1])),
      view: "map", paints: false, brush: 1, painted: {}, cell: null,
    };
    if (!family.has_base && state.scheme in { logarithmic: 0, linear: 0, threshold: 0 }) state.scheme = "equal";
    const cells = {};
    family.names.forEach((_, n) => (cells[`${depths[n]}\n${kinds[n]}`] ??= []).push(n));
    const known = {}; // statistics by task and granularity
    const stats = (task) =>
      (known[`${task}\n${state.granularity}`] ??= Layers.statistics(family, task, state.granularity));

    function weightsNow() {
      const out = {};
      for (const task of family.tasks) {
        const chosen = given[state.scheme];
        if (chosen) out[task] = [...chosen.weights[task]];
        else {
          const s = stats(task);
          const by = Layers.weights(s, state);
          out[task] = [...s.layers].map((l) => by[l]);
        }
        for (const [n, w] of Object.entries(state.painted[task] || {})) out[task][n] = w;
      }
      return out;
    }
    function conflicts(task, n) {
      let apart = 0, support = 0;
      for (const other of family.tasks) {
        if (other === task) continue;
        const [d, s] = Layers.conflict(family, task, other, n);
        apart += d; support += s;
      }
      return support ? apart / support : NaN;
    }
    function figures(task, n, weights) {
      const s = stats(task), l = s.layers[n], w = weights[task][n];
      const size = family.tasks.length + 2, t = 2 + family.tasks.indexOf(task);
      const own = Math.sqrt(family.gram[n][t * size - (t * (t - 1)) / 2]);
      const strength = state.scales[task] * w * own;
      return {
        weight: w, similarity: s.similarity[l], ratio: s.ratio[l], cosine: s.cosine[l], strength,
        relative: strength / Math.sqrt(family.gram[n][0]), conflict: conflicts(task, n), norm: own,
      };
    }
    /* What does not depend on weights, by task, granularity and cell. */
    const still = {};
    function stillOf(task) {
      const key = `${task}\n${state.granularity}`;
      if (still[key]) return still[key];
      const ones = { [task]: new Float64Array(family.names.length) };
      return (still[key] = Object.entries(cells).map(([place, members]) => {
        const [depth, kind] = place.split("\n");
        const found = members.map((n) => figures(task, n, ones));
        const mean = (name) => {
          let total = 0, over = 0;
          found.forEach((f, i) => {
            const size = family.sizes[members[i]];
            if (Number.isFinite(f[name])) { total += f[name] * size; over += size; }
          });
          return over ? total / over : NaN;
        };
        const means = Object.fromEntries(["similarity", "ratio", "cosine", "conflict"].map((name) => [name, mean(name)]));
        return {
          members, means, norms: found.map((f) => f.norm),
          size: members.reduce((sum, n) => sum + family.sizes[n], 0),
          anchor: Math.sqrt(members.reduce((sum, n) => sum + family.gram[n][0], 0)),
          row: {
            depth, kind, key: place, task,
            about: `${kind}, block ${depth}${members.length > 1 ? ` (${members.length} tensors)` : ""}`,
            similarity: digits(means.similarity), ratio: digits(means.ratio), cosine: digits(means.cosine),
          },
        };
      }));
    }
    function rows(task, weights) {
      const scale = state.scales[task], mine = weights[task], measure = state.measure;
      return stillOf(task).map(({ members, means, norms, size, anchor, row }) => {
        let weight = 0, energy = 0;
        members.forEach((n, i) => {
          weight += (mine[n] * family.sizes[n]) / size;
          energy += (scale * mine[n] * norms[i]) ** 2;
        });
        const value = measure === "weight" ? weight : measure === "strength" ? Math.sqrt(energy)
          : measure === "relative" ? Math.sqrt(energy) / anchor : means[measure];
        return { ...row, value: Number.isFinite(value) ? value : null, shown: digits(value), weight: digits(weight) };
      });
    }
    const last = Math.max(0, ...family.blocks.filter((b) => b !== null));
    const points = (task, weights) => family.names.map((layer, n) => {
      const f = figures(task, n, weights), depth = depths[n];
      return {
        layer, place: depth === "in" ? -1 : depth === "out" ? last + 1 : Number(depth),
        value: Number.isFinite(f[state.measure]) ? f[state.measure] : null,
        module: family.modules[n], norm: f.norm,
      };
    });

    /* Controls. */
    const schemes = [
      ...(family.has_base ? settings.schemes.map((s) => [s, `LATA, ${s}`]) : []), ["equal", "equal (task arithmetic)"],
      ...settings.tables.map((t, i) => [`table ${i}`, `table of ${t.name}`]),
    ];
    const again = () => { update(); };
    const sigma = make("input", { type: "range", min: -1, max: 1, step: 0.001, value: state.threshold,
      name: "sigma", oninput: () => { number.value = sigma.value; state.threshold = Number(sigma.value); again(); } });
    const number = make("input", { type: "number", min: -1, max: 1, step: "any", value: state.threshold,
      "aria-label": "σ as a number",
      oninput: () => { sigma.value = number.value; state.threshold = Number(number.value); again(); } });
    const sigmas = make("span", { class: "pair" }, labelled("σ", sigma), number);
    const set = (name) => (value) => { state[name] = value; again(); };
    const paint = make("input", { type: "checkbox", name: "paint", onchange: () => { state.paints = paint.checked; } });
    const brush = make("input", { type: "number", step: 0.05, value: 1, name: "brush",
      oninput: () => { state.brush = Number(brush.value) || 0; } });
    const undo = make("button", { type: "button", onclick: () => { state.painted = {}; again(); } }, "Remove painting");
    const form = make("form", { class: "controls", onsubmit: (event) => event.preventDefault() },
      labelled("Weights", select(schemes, state.scheme, set("scheme"))),
      labelled("Granularity", select(settings.granularities.map((g) => [g, g]), state.granularity, set("granularity"))),
      sigmas,
      labelled("Normalize", select([["none", "none"], ["mean", "mean"], ["norm", "norm"]], state.normalize, set("normalize"))),
      ...family.tasks.map((task) => {
        const box = make("input", { type: "number", step: 0.05, value: state.scales[task], "data-scale": task,
          oninput: () => { state.scales[task] = Number(box.value) || 0; again(); } });
        return labelled(`λ of ${task}`, box);
      }),
      labelled("Color by", select(
        MEASURES.filter(([k]) => (family.has_base || !["similarity", "ratio", "cosine"].includes(k)) && (several || k !== "conflict")),
        state.measure, (value) => { state.measure = value; rebuild(); })),
      labelled("View", select([["map", "map"], ["depth", "against depth"]], state.view, (value) => { state.view = value; rebuild(); })),
      make("label", { class: "check" }, paint, make("span", {}, "Paint weights")), labelled("Brush", brush), undo);
    const grid = make("div", { class: "panels" }), summary = make("div", { "aria-live": "polite" });
    const detail = make("div", { class: "detail" });
    const command = make("pre", { tabindex: 0 });
    const save = make("button", { type: "button", class: "main", name: "table",
      onclick: () => download("table.csv", Layers.csv(family, weightsNow()), "text/csv") }, "Download table.csv");
    const find = make("input", { type: "search", placeholder: "name of a tensor", "aria-label": "Find a tensor",
      list: `tensors-${settings.family}`, onchange: () => {
        const n = family.names.indexOf(find.value);
        if (n >= 0) { state.cell = [n]; show(weightsNow()); }
      } });
    const names = make("datalist", { id: `tensors-${settings.family}` }, ...family.names.map((n) => make("option", { value: n })));
    root.append(form, summary, grid, make("div", { class: "controls" }, save, labelled("Figures of a tensor", find), names), command, detail);

    /* Drawing. Many cells are drawn on a canvas, which is faster and follows no change of theme. */
    const renderer = family.names.length * family.tasks.length > 1500 ? "canvas" : "svg";
    let charts = [];
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => rebuild());
    async function rebuild() {
      charts.forEach((view) => view.finalize());
      grid.replaceChildren();
      const spec = structuredClone(specs[settings.specs[state.view]]);
      const title = MEASURES.find(([key]) => key === state.measure)[1];
      if (state.view === "map") {
        const scale = spec.encoding.color.scale;
        if (state.measure === "cosine") scale.scheme = "blueorange";
        if (state.measure === "conflict") scale.scheme = "magma";
      } else {
        spec.layer[0].encoding.y.title = title;
        if (state.measure === "similarity")
          spec.layer.push({ name: "sigma", data: { name: "sigma" }, mark: { type: "rule", strokeDash: [3, 3] },
            encoding: { y: { field: "sigma", type: "quantitative" } } });
        spec.datasets.sigma = [];
      }
      const places = family.tasks.map((task) => {
        const place = make("div", { class: "chart" });
        grid.append(make("figure", { class: "panel" }, make("h3", {}, `${task}: ${title}`), place));
        return place;
      });
      charts = await Promise.all(places.map((place) => embed(place, spec, renderer)));
      let down = false;
      charts.forEach((view, i) => {
        const task = family.tasks[i];
        const hit = (item, touch) => {
          if (!item || !item.datum || !item.datum.key) return;
          state.cell = cells[item.datum.key];
          if (state.paints) {
            const mine = (state.painted[task] ??= {});
            state.cell.forEach((n) => { mine[n] = state.brush; });
            again();
          } else if (touch) show(weightsNow());
        };
        view.addEventListener("mousedown", (event, item) => { down = true; hit(item, true); });
        view.addEventListener("touchstart", (event, item) => hit(item, true));
        view.addEventListener("mousemove", (event, item) => { if (down && state.paints && event.buttons) hit(item, false); });
      });
      window.addEventListener("mouseup", () => { down = false; });
      await update();
    }
    async function update() {
      const weights = weightsNow();
      if (state.view === "map") {
        const by = family.tasks.map((task) => rows(task, weights));
        const values = by.flat().map((r) => r.value).filter((v) => v !== null);
        let low = Math.min(...values), high = Math.max(...values);
        if (state.measure === "weight") [low, high] = [Math.min(0, low), Math.max(1, high)];
        if (state.measure === "cosine") [low, high] = [-Math.max(-low, high), Math.max(-low, high)];
        if (["strength", "relative", "conflict"].includes(state.measure)) low = 0;
        if (!(high > low)) high = low + 1;
        charts.forEach((view, i) => fill(view, "cells", by[i]).signal("low", low).signal("high", high));
      } else charts.forEach((view, i) => {
        fill(view, "points", points(family.tasks[i], weights));
        if (state.measure === "similarity") fill(view, "sigma", [{ sigma: state.threshold }]);
      });
      sigmas.hidden = state.scheme !== "threshold" && state.measure !== "similarity";
      tell(weights);
      if (state.cell) show(weights);
      await Promise.all(charts.map((view) => view.runAsync()));
    }
    function tell(weights) {
      const changes = Layers.change(family, state.scales, weights);
      const total = Math.sqrt(changes.reduce((x, y) => x + y, 0));
      const anchor = Math.sqrt(family.gram.reduce((sum, g) => sum + g[0], 0));
      const found = family.tasks.map((task) => {
        const kept = Layers.kept(family, task, weights), scale = state.scales[task];
        return [task, digits(scale), percent(kept.layers), percent(kept.parameters), percent(kept.energy),
          digits(kept.whole), digits(kept.norm), digits(Math.abs(scale) * kept.norm)];
      });
      summary.replaceChildren(
        table("What these weights keep", ["task", "λ", "tensors", "parameters", "‖τ'‖² of ‖τ‖²", "‖τ‖", "‖τ'‖", "λ‖τ'‖"], found),
        make("p", {}, `Predicted change of the merged model: ‖Σ λ w τ‖ = ${digits(total, 6)}, ${percent(total / anchor)} of ‖θ‖.`));
      const painted = Object.values(state.painted).reduce((sum, p) => sum + Object.keys(p).length, 0);
      undo.disabled = !painted;
      const scales = family.tasks.map((t) => `--set 'tasks.${t}.scale=${state.scales[t]}'`).join(" ");
      command.textContent = `taskvec merge ${settings.repeat} OUT --table table.csv ${scales}`;
      Object.assign((views.live[settings.family] ??= {}), { state, weights, total });
    }
    function show(weights) {
      const found = state.cell.flatMap((n) => family.tasks.map((task) => {
        const f = figures(task, n, weights);
        const box = make("input", { type: "number", step: "any", value: f.weight, "aria-label": `weight of ${task} for ${family.names[n]}`,
          onchange: () => { (state.painted[task] ??= {})[n] = Number(box.value) || 0; again(); } });
        return [family.names[n], task, box, digits(f.similarity), digits(f.ratio), digits(f.cosine), digits(f.norm),
          digits(f.strength), digits(f.relative), digits(f.conflict), family.sizes[n].toLocaleString("en")];
      }));
      detail.replaceChildren(table("Figures of the chosen tensors; weights can be edited",
        ["tensor", "task", "weight", "similarity", "ρ", "c", "‖τ‖", "λw‖τ‖", "relative", "sign conflict", "elements"], found));
    }
    await rebuild();
    views.live[settings.family].set = async (changes) => { Object.assign(state, changes); await rebuild(); };
  }

  /* Pairs of tasks, by layer. */
  async function pairs(root, settings) {
    const family = data.families[settings.family];
    const options = family.tasks.flatMap((a, i) => family.tasks.slice(i + 1).map((b) => [a, b]));
    const state = { pair: 0, what: "cosine" };
    const last = Math.max(0, ...family.blocks.filter((b) => b !== null));
    const place = make("div", { class: "chart" });
    root.append(make("div", { class: "controls" },
      labelled("Tasks", select(options.map(([a, b], i) => [String(i), `${a}, ${b}`]), "0", (v) => { state.pair = Number(v); update(); })),
      labelled("By layer", select([["cosine", "cosine"], ["conflict", "sign conflict"]], "cosine", (v) => { state.what = v; update(); }))),
      make("figure", { class: "panel wide" }, make("h3", {}, "By layer"), place));
    const view = await embed(place, specs[settings.specs.depth]);
    async function update() {
      const [a, b] = options[state.pair];
      const rows = family.names.map((layer, n) => {
        const [apart, support] = Layers.conflict(family, a, b, n);
        const value = state.what === "cosine" ? Layers.cosine(family, a, b, n) : apart / support;
        const block = family.blocks[n];
        const at = block !== null ? block : ["embedding", "norm"].includes(family.modules[n]) ? -1 : last + 1;
        return { layer, place: at, module: family.modules[n], norm: 1, value: Number.isFinite(value) ? value : null };
      });
      await fill(view, "points", rows).runAsync();
    }
    await update();
  }

  /* Scores. */
  async function scores(root, settings) {
    const evaluation = data.evaluations[settings.evaluation], index = settings.evaluation;
    const general = evaluation.findings.map((f, j) => [j, f]).filter(([, f]) => f.task === null);
    if (general.length)
      root.append(make("ul", { class: "findings" }, ...general.map(([j, f]) => make("li", { id: `finding-${index}-${j}` }, f.text))));
    const box = make("input", { type: "checkbox", onchange: () => rebuild() });
    if (Object.keys(settings.specs).some((name) => name.startsWith("difference")))
      root.append(make("div", { class: "controls" }, make("label", { class: "check" }, box,
        make("span", {}, `Show differences to ${evaluation.reference}`))));
    const grid = make("div", { class: "panels" });
    root.append(grid);
    const places = settings.tasks.map((task) => {
      const place = make("div", { class: "chart", role: "img", "aria-label": task.task });
      const findings = task.findings.map(([j, text]) => make("li", { id: `finding-${index}-${j}` }, text));
      grid.append(make("figure", { class: "panel" }, make("h3", {}, task.task), place,
        make("figcaption", {}, task.about), ...(findings.length ? [make("ul", { class: "findings" }, ...findings)] : [])));
      return place;
    });
    async function rebuild() {
      const kind = box.checked ? "difference" : "score";
      await Promise.all(places.map((place, i) => {
        const spec = settings.specs[`${kind}-${i}`] ?? settings.specs[`score-${i}`];
        return embed(place, specs[spec]);
      }));
    }
    await rebuild();
  }

  /* Words of two texts, each with whether the other lacks it (longest common subsequence). */
  function difference(one, other) {
    const a = one.split(/(\s+)/), b = other.split(/(\s+)/);
    if (a.length * b.length > 250000) return [a.map((w) => [w, false]), b.map((w) => [w, false])];
    const best = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    const left = a.map((w) => [w, true]), right = b.map((w) => [w, true]);
    for (let i = 0, j = 0; i < a.length && j < b.length; ) {
      if (a[i] === b[j]) { left[i++][1] = false; right[j++][1] = false; }
      else if (best[i + 1][j] >= best[i][j + 1]) i++;
      else j++;
    }
    return [left, right];
  }
  function samples(root, settings) {
    const evaluation = data.evaluations[settings.evaluation], parts = evaluation.samples;
    const directions = Object.fromEntries(evaluation.scores.map((s) => [s.task, s.higher_is_better === false ? -1 : 1]));
    const state = { task: 0, one: evaluation.reference, other: null, filter: "all", query: "", most: 8 };
    const filters = [["all", "all samples"], ["lost", "first model better"], ["won", "second model better"],
      ["differ", "scores differ"], ["failed", "both score 0"]];
    const bar = make("form", { class: "controls", onsubmit: (event) => event.preventDefault() });
    const list = make("div", { class: "samples" }), count = make("p", { "aria-live": "polite" });
    const more = make("button", { type: "button", onclick: () => { state.most += 20; update(); } }, "Show more");
    const query = make("input", { type: "search", placeholder: "search", oninput: () => { state.query = query.value.toLowerCase(); state.most = 8; update(); } });
    root.append(make("h3", {}, "Samples"), bar, count, list, more);
    function controls() {
      const models = parts[state.task].models;
      if (!models.includes(state.one)) state.one = models[0];
      if (!models.includes(state.other)) state.other = models.findLast((m) => m !== state.one) ?? state.one;
      const set = (name) => (v) => { state[name] = v; state.most = 8; update(); };
      const named = models.map((m) => [m, m]);
      bar.replaceChildren(
        labelled("Task", select(parts.map((p, i) => [String(i), p.task]), String(state.task), (v) => { state.task = Number(v); controls(); update(); })),
        labelled("First model", select(named, state.one, set("one"))),
        labelled("Second model", select(named, state.other, set("other"))),
        labelled("Filter", select(filters, state.filter, set("filter"))),
        labelled("Search", query));
    }
    function update() {
      const part = parts[state.task], i = part.models.indexOf(state.one), j = part.models.indexOf(state.other);
      const sign = directions[part.task] ?? 1;
      const found = part.samples.filter((s) => {
        const gain = sign * ((s.scores[j] ?? 0) - (s.scores[i] ?? 0));
        const fits = { all: true, lost: gain < 0, won: gain > 0, differ: gain !== 0, failed: !s.scores[i] && !s.scores[j] }[state.filter];
        return fits && (!state.query || [s.prompt, s.reference, s.replies[i], s.replies[j]].some((t) => t.toLowerCase().includes(state.query)));
      });
      count.textContent = `${found.length} of ${part.samples.length} samples` +
        (part.total > part.samples.length ? ` (of ${part.total} in the records)` : "");
      list.replaceChildren(...found.slice(0, state.most).map((s) => {
        const [left, right] = difference(s.replies[i], s.replies[j]);
        const reply = (model, words, score) => make("div", { class: "reply" },
          make("h4", {}, model, " ", make("span", { class: "score" }, digits(score))),
          make("p", {}, ...words.map(([w, apart]) => (apart && w.trim() ? make("mark", {}, w) : w))));
        return make("article", {}, make("p", { class: "prompt" }, s.prompt),
          s.reference ? make("p", { class: "reference" }, s.reference) : "",
          make("div", { class: "replies" }, reply(state.one, left, s.scores[i]), reply(state.other, right, s.scores[j])));
      }));
      more.hidden = found.length <= state.most;
    }
    controls();
    update();
  }

  /* Start. */
  const kinds = { layers, pairs, scores, samples };
  const live = [...document.querySelectorAll("[data-live]")].map(async (root) =>
    kinds[root.dataset.live](root, specs[Number(root.dataset.config)]));
  document.querySelectorAll("button.copy").forEach((button) => button.addEventListener("click", async () => {
    const pre = button.parentElement.querySelector("pre");
    try {
      await navigator.clipboard.writeText(pre.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(pre);
      button.textContent = "Selected";
    }
  }));
  document.getElementById("download-data").addEventListener("click", () =>
    download("taskvec-report.json", JSON.stringify(data), "application/json"));
  views.ready = Promise.all(live);
})();
