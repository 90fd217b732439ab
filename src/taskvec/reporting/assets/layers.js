"use strict";
/* Layer weights in the page: the formulas of taskvec.statistics.scan and taskvec.methods.lata, in
   their order of operations, so that the numbers are those of the command line. Pure functions. */
const Layers = (() => {
  /* Place of (i, j), i <= j, in an upper triangle with `size` rows. */
  const place = (size, i, j) => i * size - (i * (i - 1)) / 2 + (j - i);

  /* Similarity, rho, c and norms of each layer for one task, after statistics/scan.py. */
  function statistics(family, task, granularity) {
    const size = family.tasks.length + 2, t = 2 + family.tasks.indexOf(task);
    const layers = family.layers[granularity], count = Math.max(...layers) + 1;
    const zeros = () => new Float64Array(count);
    const [a, b, d, p, sizes] = [zeros(), zeros(), zeros(), zeros(), zeros()];
    family.gram.forEach((gram, n) => {
      const layer = layers[n];
      a[layer] += gram[place(size, 1, 1)];
      b[layer] += gram[place(size, t, t)];
      d[layer] += gram[place(size, 1, t)];
      p[layer] += gram[0];
      sizes[layer] += family.sizes[n];
    });
    const clip = (x) => Math.min(1, Math.max(-1, x));
    const similarity = a.map((_, l) => {
      if (!(b[l] > 0)) return NaN;
      const norm = Math.sqrt(Math.max(a[l] + 2 * d[l] + b[l], 0));
      return a[l] > 0 && norm > 0 ? clip((a[l] + d[l]) / (norm * Math.sqrt(a[l]))) : 0;
    });
    return {
      layers, sizes, similarity,
      ratio: a.map((_, l) => (a[l] > 0 ? Math.sqrt(b[l]) / Math.sqrt(a[l]) : b[l] > 0 ? Infinity : 0)),
      cosine: a.map((_, l) =>
        a[l] > 0 && b[l] > 0 ? clip(d[l] / (Math.sqrt(a[l]) * Math.sqrt(b[l]))) : 0),
      norm: b.map(Math.sqrt),
      anchor: p.map(Math.sqrt),
    };
  }

  /* Rank of each value, 1 for the largest; ties share the mean of their ranks. */
  function rank(values) {
    const order = [...values.keys()].sort((i, j) => values[j] - values[i]);
    const ranks = new Float64Array(values.length);
    for (let i = 0; i < order.length; ) {
      let end = i;
      while (end < order.length && values[order[end]] === values[order[i]]) end++;
      for (let j = i; j < end; j++) ranks[order[j]] = (i + end + 1) / 2;
      i = end;
    }
    return ranks;
  }

  /* Weight of each layer; layers that the task did not change have 0. */
  function weights(stats, { scheme, threshold, normalize }) {
    const count = stats.similarity.length, out = new Float64Array(count);
    const ranked = [...Array(count).keys()].filter((l) => !Number.isNaN(stats.similarity[l]));
    if (!ranked.length) return out;
    const similarity = ranked.map((l) => stats.similarity[l]);
    const ranks = rank(similarity), ties = ranks.every((r) => r === ranks[0]);
    const last = ranks.length;
    let chosen = similarity.map((s, i) => {
      if (scheme === "equal") return 1;
      if (scheme === "threshold") return s <= threshold ? 1 : 0;
      if (ties) return 1;
      return scheme === "linear" ? (ranks[i] - 1) / (last - 1) : Math.log(ranks[i]) / Math.log(last);
    });
    if (normalize !== "none" && chosen.some((w) => w !== 0)) {
      const sum = (f) => ranked.reduce((total, l, i) => total + f(l, i), 0);
      const factor = normalize === "mean"
        ? sum((l) => stats.sizes[l]) / sum((l, i) => chosen[i] * stats.sizes[l])
        : Math.sqrt(sum((l) => stats.norm[l] ** 2)) /
          Math.sqrt(sum((l, i) => (chosen[i] * stats.norm[l]) ** 2));
      chosen = chosen.map((w) => w * factor);
    }
    ranked.forEach((l, i) => { out[l] = chosen[i]; });
    return out;
  }

  /* Squared norm of the sum of lambda w tau over tasks, for each tensor. */
  function change(family, scales, table) {
    const size = family.tasks.length + 2;
    return family.gram.map((gram, n) => {
      let total = 0;
      family.tasks.forEach((one, i) => family.tasks.forEach((other, j) => {
        const inner = gram[place(size, 2 + Math.min(i, j), 2 + Math.max(i, j))];
        total += scales[one] * table[one][n] * scales[other] * table[other][n] * inner;
      }));
      return Math.max(total, 0);
    });
  }

  /* What a table keeps of a task: shares of layers, parameters and squared norm; norms. */
  function kept(family, task, table) {
    const size = family.tasks.length + 2, t = 2 + family.tasks.indexOf(task);
    let layers = 0, changed = 0, parameters = 0, all = 0, energy = 0, whole = 0;
    family.gram.forEach((gram, n) => {
      const own = gram[place(size, t, t)], w = table[task][n];
      if (!(own > 0)) return;
      changed++; all += family.sizes[n]; whole += own; energy += w * w * own;
      if (w !== 0) { layers++; parameters += family.sizes[n]; }
    });
    return {
      layers: layers / changed, parameters: parameters / all, energy: energy / whole,
      norm: Math.sqrt(energy), whole: Math.sqrt(whole),
    };
  }

  /* Share of the entries that this and another task change in which their signs differ. */
  function conflict(family, task, other, n) {
    const k = family.tasks.length, i = family.tasks.indexOf(task), j = family.tasks.indexOf(other);
    const at = place(k, Math.min(i, j), Math.max(i, j));
    return [family.support[n][at] - family.agree[n][at], family.support[n][at]];
  }

  function cosine(family, task, other, n) {
    const size = family.tasks.length + 2;
    const i = 2 + family.tasks.indexOf(task), j = 2 + family.tasks.indexOf(other);
    const gram = family.gram[n], get = (x, y) => gram[place(size, Math.min(x, y), Math.max(x, y))];
    return get(i, j) / Math.sqrt(get(i, i) * get(j, j));
  }

  /* A field of a CSV file. */
  const field = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

  function csv(family, table) {
    const lines = [["tensor", ...family.tasks].map(field).join(",")];
    for (const n of family.order)
      lines.push([field(family.names[n]), ...family.tasks.map((t) => String(table[t][n]))].join(","));
    return lines.join("\n") + "\n";
  }

  return { statistics, rank, weights, change, kept, conflict, cosine, csv };
})();
