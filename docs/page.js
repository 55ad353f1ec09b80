"use strict";

// ---- The method's arithmetic. docs/test_page.py compares it with PyTorch, under node. -------------

const Cabins = {
  sum: (values) => values.reduce((total, value) => total + value, 0),
  mean: (values) => Cabins.sum(values) / values.length,

  // Eq. 1: centres in metres of the bins whose widths b have the sum 1
  binCenters(b, low, high) {
    let before = 0;
    return b.map((width) => {
      const center = low + (high - low) * (before + width / 2);
      before += width;
      return center;
    });
  },

  // the output of bin i whose right edge lies at `share` of the range, if the others stay
  dragged(outputs, i, share) {
    const before = Cabins.sum(outputs.slice(0, i));
    const others = Cabins.sum(outputs) - outputs[i];
    return Math.min(Math.max((share * others - before) / (1 - share), 0.1), 6);
  },

  // Eq. 2 for one group of centres c: weights, e, mean and lower median; lengths count in `unit` m
  distanceClass(c, unit = 1) {
    const m = Cabins.mean(c);
    const inverse = c.map((center) => 1 / (Math.abs(center - m) / unit + 1e-4));
    const top = Math.max(...inverse);
    const raised = inverse.map((value) => Math.exp(value - top));
    const total = Cabins.sum(raised);
    const w = raised.map((value) => value / total);
    const e = Cabins.sum(c.map((center, i) => w[i] * center));
    return { m, w, e, median: [...c].sort((a, b) => a - b)[Math.floor((c.length - 1) / 2)] };
  },

  // the prompt's text: e as float32, rounded to 4 decimals (half to even), as Python prints it
  numberText(e) {
    const exact = Math.fround(e) * 1e4;
    const below = Math.floor(exact);
    const rest = exact - below;
    const number = below + (rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? 1 : 0);
    const decimals = String(number % 1e4).padStart(4, "0").replace(/0+$/, "");
    return `${Math.floor(number / 1e4)}.${decimals || "0"}`;
  },

  // CLIP's ids of that text, from start to end token: "0" to "9" are 271 to 280, "." is 269
  numberTokens(e) {
    const ids = [...Cabins.numberText(e)].map((char) => (char === "." ? 269 : 271 + Number(char)));
    return [49406, ...ids, 49407];
  },

  // Eq. 3: the angle in rad by which γ v turns t
  turn(t, v, gamma) {
    const after = t.map((value, i) => value + gamma * v[i]);
    const dot = (a, b) => Cabins.sum(a.map((value, i) => value * b[i]));
    const flat = dot(after, t) / dot(t, t);
    const rest = after.map((value, i) => value - flat * t[i]);
    return Math.atan2(Math.sqrt(dot(rest, rest)), flat * Math.sqrt(dot(t, t)));
  },

  // Eq. 5; the centre of the likeliest bin; the first centre up to which p holds `share`
  expectedDepth: (c, p) => Cabins.sum(c.map((center, k) => center * p[k])),
  likeliest: (c, p) => c[p.indexOf(Math.max(...p))],
  quantile(c, p, share) {
    let held = 0;
    return c[p.findIndex((value) => (held += value) >= share)];
  },

  // what smooths p over depth by a Gaussian of 0.1 m, at each twentieth of a metre
  kernel: (c, high) =>
    Array.from({ length: Math.round(high * 20) + 1 }, (_, i) =>
      c.map((center) => Math.exp(-((center - i / 20) ** 2) / 0.02)),
    ),

  // Eq. 6 out of the mean and the variance of g
  silog(mean, variance, lambda = 0.85, alpha = 10) {
    return alpha * Math.sqrt(Math.max(variance + (1 - lambda) * mean ** 2, 1e-12));
  },

  nearest(values, query) {
    const gaps = values.map((value) => Math.abs(value - query));
    return gaps.indexOf(Math.min(...gaps));
  },

  // Eq. 7 of depths x and centres c: who is whose nearest, both sums, and the gradient at c
  chamfer(x, c) {
    const ofDepths = x.map((depth) => Cabins.nearest(c, depth));
    const ofCenters = c.map((center) => Cabins.nearest(x, center));
    const toCenters = Cabins.mean(x.map((depth, i) => (depth - c[ofDepths[i]]) ** 2));
    const toDepths = Cabins.mean(c.map((center, j) => (center - x[ofCenters[j]]) ** 2));
    const gradient = c.map((center, j) => (2 / c.length) * (center - x[ofCenters[j]]));
    ofDepths.forEach((j, i) => (gradient[j] += (2 / x.length) * (c[j] - x[i])));
    return { ofDepths, ofCenters, toCenters, toDepths, gradient };
  },

  // Eq. 8 of a room and of the same room enlarged: Eq. 6 has no unit, Eq. 7 is in square metres
  total: (loss, beta, factor) => [loss.pixel, beta * loss.bins * factor ** 2],

  // p of each location out of demo.json's bytes
  unpack({ size, data }, n) {
    const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
    return Array.from({ length: size[0] * size[1] }, (_, i) => {
      const squares = Array.from(bytes.subarray(i * n, (i + 1) * n), (q) => q * q);
      const total = Cabins.sum(squares);
      return squares.map((square) => square / total);
    });
  },
};

// ---- The drawings: functions of the state and a width, which give HTML by the names of its parts.
// docs/build.py calls them under node, so the page shows its first state without JavaScript. -------

function drawings(demo, findings) {
  const c = demo.centers;
  const [rows, columns] = demo.p.size;
  const [h, w] = demo.similarity.size;
  const places = Cabins.unpack(demo.p, c.length);
  const kernel = Cabins.kernel(c, demo.max_depth);
  const maps = {
    mean: places.map((p) => Cabins.expectedDepth(c, p)),
    likeliest: places.map((p) => Cabins.likeliest(c, p)),
    truth: demo.truth.map((mm) => mm / 1000),
  };
  const startOutputs = [0.6, 1.0, 0.3, 1.2, 0.5, 0.8, 1.6, 2.0];
  const [depths, startCenters] = [[1.5, 1.5, 1.5, 4.2, 6, 8.4], [1.15, 3.4, 6.6, 9.3]];
  const state = {
    row: demo.pixel[0], column: demo.pixel[1], rule: "mean",
    bin: 4, outputs: [...startOutputs], group: 3, unit: 0, widths: "room",
    e: Math.fround(demo.cabins[2]), before: null, gamma: -4, scale: Math.log(1.3),
    centers: [...startCenters], choice: 3, beta: 0.1,
    get output() { return this.outputs[this.bin - 1]; },
    set output(value) { this.outputs[this.bin - 1] = value; },
    get center() { return this.centers[this.choice - 1]; },
    set center(value) { this.centers[this.choice - 1] = value; },
  }; // prettier-ignore

  // ---- SVG as text
  const fixed = (value, digits) => value.toFixed(digits).replace("-", "−");
  const metres = (value) => `${fixed(value, 2)}\u00a0m`;
  const short = (value) => value < 0.1 ? `${Number((1000 * value).toPrecision(2))}\u00a0mm` : metres(value); // prettier-ignore
  const power = (n) => `10${[...String(n)].map((d) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(d)]).join("")}`;
  const r = (value) => Math.round(value * 100) / 100;
  const line = (x1, y1, x2, y2, kind) =>
    `<line x1="${r(x1)}" y1="${r(y1)}" x2="${r(x2)}" y2="${r(y2)}" class="${kind}"/>`;
  const rect = (x, y, width, height, kind, more = "") =>
    `<rect x="${r(x)}" y="${r(y)}" width="${r(Math.max(width, 0))}" height="${r(Math.max(height, 0))}" class="${kind}" ${more}/>`;
  const dot = (x, y, radius, kind) => `<circle cx="${r(x)}" cy="${r(y)}" r="${radius}" class="${kind}"/>`; // prettier-ignore
  const label = (x, y, text, kind = "") => `<text x="${r(x)}" y="${r(y)}" class="${kind}">${text}</text>`; // prettier-ignore
  const group = (term, ...parts) => `<g data-t="${term}">${parts.flat(9).join("")}</g>`;
  const path = (points, kind) => `<path d="M${points.map(([x, y]) => `${r(x)} ${r(y)}`).join("L")}" class="${kind}"/>`; // prettier-ignore
  const stems = (bars, kind) => `<path d="${bars.map(([x, from, to]) => `M${r(x)} ${r(from)}V${r(to)}`).join("")}" class="${kind}"/>`; // prettier-ignore
  const arrow = (x1, y1, x2, y2) => `<line x1="${r(x1)}" y1="${r(y1)}" x2="${r(x2)}" y2="${r(y2)}" class="arrow" marker-end="url(#arrow)"/>`; // prettier-ignore
  const join = (...parts) => parts.flat(9).join("");
  const scale = (low, high, from, to) => (value) => from + ((value - low) / (high - low)) * (to - from); // prettier-ignore
  const axis = (x, low, high, y, unit) => {
    const rough = (high - low) / Math.min(5, (x(high) - x(low)) / (high - low < 0.1 ? 90 : 60));
    const ten = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * ten).find((n) => n >= rough);
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-6); i * step < high + 1e-6 * step; i++) ticks.push(i * step);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-6));
    return `<g class="axis">${line(x(low), y, x(high), y, "")}${join(ticks.map((tick, i) => [
      line(x(tick), y, x(tick), y + 4, ""),
      label(x(tick), y + 17, fixed(tick, digits) + (i === ticks.length - 1 ? ` ${unit}` : ""), tick > high - 0.4 * step ? "end" : tick > low + 0.4 * step ? "mid" : ""),
    ]))}</g>`; // prettier-ignore
  };

  // ---- p at the chosen pixel: for the opening, and for Eq. 5
  const here = (s) => s.row * columns + s.column;
  const drawP = (s, width, rule) => {
    const p = places[here(s)];
    const [mean, likeliest, truth] = ["mean", "likeliest", "truth"].map((name) => maps[name][here(s)]); // prettier-ignore
    const [low, high] = [0.25, 0.75].map((share) => Cabins.quantile(c, p, share));
    const [top, base] = [40, 138];
    const x = scale(0, demo.max_depth, 10, width - 10);
    const curve = kernel.map((row) => Cabins.expectedDepth(row, p));
    const [highest, most] = [Math.max(...curve), Math.max(...p)];
    const hill = curve.map((y, i) => [x(i / 20), base - (0.9 * (base - top) * y) / highest]);
    const mark = (value, text, kind, y, other) => {
      const left = value > 0.6 * demo.max_depth || (value < other && x(value) > 45);
      return line(x(value), y - 9, x(value), base, kind) + label(x(value) + (left ? -6 : 6), y, text, `${left ? "end " : ""}${kind}-text`); // prettier-ignore
    };
    const near = 100 * Cabins.sum(p.filter((_, k) => Math.abs(c[k] - mean) < 0.5));
    const half = low === high ? `${fixed(100 * most, 0)}\u00a0% of <b>p</b> lies in the bin at ${metres(low)}.` : `The middle half of <b>p</b> lies between ${fixed(low, 2)} and ${metres(high)}.`; // prettier-ignore
    const told = rule === "likeliest"
      ? `The likeliest bin has its centre at <b>${metres(likeliest)}</b> and holds ${fixed(100 * most, 0)}\u00a0% of <b>p</b>. The mean is ${metres(mean)}.`
      : `${half} Its mean, <b>${metres(mean)}</b>, is the depth; ${fixed(near, 0)}\u00a0% of <b>p</b> lies within half a metre of it.`; // prettier-ignore
    return {
      plot: join(
        path([[x(0), base], ...hill, [x(demo.max_depth), base]], "hill"),
        stems(p.map((value, k) => [x(c[k]), base, base - ((base - top) * value) / most]), "stem"),
        rect(x(low) - 1.5, base, x(high) - x(low) + 3, 7, "half"),
        axis(x, 0, demo.max_depth, base + 7, "m"),
        mark(truth, "truth", "true", 28, rule === "likeliest" ? likeliest : mean),
        rule === "likeliest" ? mark(likeliest, "likeliest bin", "mean", 13, 0) : mark(mean, "mean = depth", "mean", 13, 0),
      ),
      says: `${told} The truth is ${metres(truth)}.`,
      spoken: `row ${s.row + 1} of ${rows}, column ${s.column + 1} of ${columns}: depth ${fixed(mean, 2)} m, truth ${fixed(truth, 2)} m`,
    }; // prettier-ignore
  };
  const absRel = (name) => Cabins.mean(maps[name].map((d, i) => Math.abs(d - maps.truth[i]) / maps.truth[i])); // prettier-ignore

  // where the chosen pixel lies among the h x w locations of z
  const cellOf = (s) => Math.floor((s.row * h) / rows) * w + Math.floor((s.column * w) / columns);
  const sims = demo.similarity.values;
  const highest = Math.max(...sims.flat().map(Math.abs));

  const draw = {
    room: (s, width) => drawP(s, width, "mean"),

    // Eq. 1: eight bins
    bins(s, width) {
      const i = s.bin - 1;
      const [low, high] = [demo.min_depth, demo.max_depth];
      const share = (outputs) => outputs.map((value) => value / Cabins.sum(outputs));
      const b = share(s.outputs);
      const [centers, first] = [b, share(startOutputs)].map((widths) => Cabins.binCenters(widths, low, high)); // prettier-ignore
      const x = scale(low, high, 10, width - 10);
      const edges = [...b, 0].map((_, j) => low + (high - low) * Cabins.sum(b.slice(0, j)));
      const before = Cabins.sum(b.slice(0, i));
      const bracket = (from, to, y, text, term) => group(term,
        `<path d="M${r(from)} ${y}v7H${r(to)}v-7" class="bracket"/>`,
        label(Math.min(Math.max((from + to) / 2, 52), width - 44), y + 21, text, "mid")); // prettier-ignore
      const moved = centers.filter((center, j) => j !== i && Math.abs(center - first[j]) > 1e-9).length;
      return {
        plot: join(
          b.map((value, j) => rect(x(edges[j]), 34, value * (width - 20), 34, `bin ${j === i ? "on" : ""}`)),
          edges.slice(1, -1).map((edge) => line(x(edge), 30, x(edge), 72, "edge")),
          first.map((center) => dot(x(center), 51, 4.5, "ghost")),
          centers.map((center, j) => dot(x(center), 51, j === i ? 7 : 3.5, j === i ? "center on" : "center")),
          label(x(centers[i]), 24, `c${"₁₂₃₄₅₆₇₈"[i]}`, "mid it"),
          i ? bracket(x(low), x(edges[i]), 76, "widths before it", "sum") : "",
          bracket(x(edges[i]), x((edges[i] + edges[i + 1]) / 2), i ? 102 : 76, "half its own", "half"),
          axis(x, 0, high, 132, "m"),
        ),
        says: `<i>c</i><sub>${i + 1}</sub> = 0.001 + 9.999 · (${fixed(b[i] / 2, 4)} + ${fixed(before, 4)}) = <b>${fixed(centers[i], 3)}\u00a0m</b>. ${moved ? `${moved} of the 7 other centres have moved from where they were first (hollow).` : "Now drag an edge, and see which centres move."}`,
        "bin out": String(s.bin), "output out": fixed(s.outputs[i], 1),
      }; // prettier-ignore
    },

    // Eq. 2: one group and the unit
    group(s, width) {
      const unit = 10 ** -s.unit;
      const all = s.widths === "room" ? c : Cabins.binCenters(c.map(() => 1 / c.length), demo.min_depth, demo.max_depth); // prettier-ignore
      const centers = all.slice(32 * (s.group - 1), 32 * s.group);
      const { m, w: weights, e, median } = Cabins.distanceClass(centers, unit);
      const gap = 0.04 * (centers[31] - centers[0]);
      const [low, high] = [centers[0] - gap, centers[31] + gap];
      const x = scale(low, high, 34, width - 12);
      const [base, top] = [168, 24];
      const y = (weight) => base - weight * (base - top);
      const most = Math.max(...weights);
      const closest = Math.min(...centers.map((center) => Math.abs(center - m)));
      const nearest = centers.filter((center) => Math.abs(center - m) < closest + 1e-9);
      const lies = nearest.length > 1
        ? `Two centres are nearest to the mean. They tie, and <i>e</i> is the mean in any unit.`
        : `<i>e</i> lies ${short(Math.abs(e - nearest[0]))} from the centre nearest to the mean, and ${short(Math.abs(e - m))} from the mean itself.`; // prettier-ignore
      return {
        plot: join(
          [0, 0.5, 1].map((weight) => line(30, y(weight), width - 8, y(weight), "grid") + label(24, y(weight) + 4, weight, "end soft")),
          label(24, 14, "w", "end it"),
          group("w", stems(centers.map((center, i) => [x(center), base, y(weights[i])]), "weight"), centers.map((center, i) => dot(x(center), y(weights[i]), 3, "center"))),
          group("m", line(x(m), top - 6, x(m), base, "mark m")),
          line(x(median), top - 6, x(median), base, "mark med"),
          group("e", line(x(e), top - 12, x(e), base, "mark e"), `<path d="M${r(x(e) - 6)} ${base + 9}h12l-6 -9z" class="tip"/>`),
          axis(x, low, high, base + 10, "m"),
        ),
        says: `The largest weight is <b>${fixed(most, 2)}</b>. ${lies}`,
        e: `${fixed(e, 4)} m`, m: `${fixed(m, 4)} m`, median: `${fixed(median, 4)} m`,
        "group out": `${s.group}`,
        "unit out": unit > 0.99 ? "1 m" : unit < 0.0101 ? "1 cm" : `${fixed(100 * unit, unit > 0.1 ? 0 : 1)} cm`,
      }; // prettier-ignore
    },

    // the digits: tokens before and now, and the id of the last decimal
    stairs(s, width) {
      const row = (e, old, kind) => {
        const ids = Cabins.numberTokens(e);
        const chars = ["start", ...Cabins.numberText(e), "end"];
        const items = ids.map((id, i) => `<li class="${old && old[i] !== id ? "new" : ""}"><b>${chars[i]}</b> ${id}</li>`);
        items.splice(1, 0, '<li class="learned"><b>p₁ … p₈</b> learned</li>');
        return `<ul class="tokens ${kind}">${items.join("")}</ul>`;
      }; // prettier-ignore
      const [now, old] = [s.e, s.before].map((e) => e !== null && Cabins.numberTokens(e));
      const length = old ? Math.max(now.length, old.length) : 0;
      const same = Array.from({ length }, (_, i) => now[i] === old[i]);
      const n = same.filter((equal) => !equal).length;
      const kept = [...Cabins.numberText(s.e)].filter((_, i) => same[i + 1]).join("");
      const texts = [s.before, s.e].map((e) => e !== null && `“${Cabins.numberText(e)}”`);
      const center = Math.round(s.e * 1e4);
      const x = scale((center - 10.5) / 1e4, (center + 10.5) / 1e4, 44, width - 10);
      const y = scale(0, 9, 96, 26);
      const steps = Array.from({ length: 21 }, (_, i) => center - 10 + i).filter((k) => k >= 0 && k % 10);
      return {
        typed: `<i>e</i> = ${s.e.toFixed(6)} m → ${texts[1]}`,
        ids: (old ? row(s.before, null, "before") : "") + row(s.e, old, ""),
        plot: join(
          label(0, 12, "id of the fourth decimal. A gap: it is 0 and not written.", "soft"),
          [[1, 272], [9, 280]].map(([digit, id]) => label(38, y(digit) + 4, id, "end soft")),
          steps.map((k) => line(x((k - 0.5) / 1e4), y(k % 10), x((k + 0.5) / 1e4), y(k % 10), "step")),
          line(x(s.e), 20, x(s.e), 104, "mark e"),
          axis(x, (center - 10) / 1e4, (center + 10) / 1e4, 104, "m"),
        ),
        says: !old ? "Nudge <i>e</i>, and see which tokens change."
          : n ? `From ${texts[0]} to ${texts[1]}, <b>${n === 1 ? "one token changes" : `${n} tokens change or go`}</b>${kept === "." ? ", and the two texts share only the point" : ""}.`
          : `<b>No token changes.</b> Nothing behind the digits can notice: the derivative is 0.`,
      }; // prettier-ignore
    },

    // the digits: how far t turns at 64 distances
    angles(s, width) {
      const x = scale(0, 0.3, 66, width - 14);
      const y = { "0.1 mm": 40, "1 m": 104 };
      return {
        plot: join(
          Object.entries(demo.digits).map(([name, angles]) => [
            label(58, y[name] + 5, `+ ${name}`, "end strong"),
            angles.map((angle, i) => dot(x(angle), y[name] + ((i * 7) % 9) * 3 - 12, 3.5, "angle")),
            line(x(Cabins.mean(angles)), y[name] - 22, x(Cabins.mean(angles)), y[name] + 22, "mark e"),
            label(x(Cabins.mean(angles)) + 6, y[name] - 19, `mean ${fixed(Cabins.mean(angles), 3)}`, "mean-text halo"),
          ]),
          axis(x, 0, 0.3, 134, "rad"),
        ),
      }; // prettier-ignore
    },

    // Eq. 3: how far t turns as γ grows
    turn(s, width) {
      const turn = (gamma) => Cabins.mean(demo.t.map((t, k) => Cabins.turn(t, demo.v_post[k], gamma))); // prettier-ignore
      const gamma = 10 ** s.gamma;
      const x = scale(-4, 0, 52, width - 14);
      const y = scale(-6, 0.5, 196, 18);
      const at = (g, angle) => [x(Math.log10(g)), y(Math.log10(angle))];
      const curve = Array.from({ length: 33 }, (_, i) => 10 ** (-4 + i / 8));
      const digits = Object.values(demo.digits).map(Cabins.mean);
      const rms = Math.sqrt(Cabins.mean(demo.gamma.map((value) => value ** 2)));
      const trained = Cabins.mean(demo.t.map((t, k) => Cabins.turn(t, demo.v_post[k].map((v, i) => v * demo.gamma[i]), 1))); // prettier-ignore
      const now = turn(gamma);
      const times = now / digits[0];
      return {
        plot: join(
          [-6, -4, -2, 0].map((n) => line(52, y(n), width - 14, y(n), "grid") + label(44, y(n) + 4, power(n), "end soft")),
          label(0, 12, "t turns by, in rad", "soft"),
          rect(52, Math.min(...digits.map((d) => y(Math.log10(d)))) - 2, width - 66, Math.abs(y(Math.log10(digits[0])) - y(Math.log10(digits[1]))) + 4, "band"),
          label(58, y(Math.log10(digits[0])) - 8, "as far as 0.1 mm, or 1 m, more in the text", "soft"),
          path(curve.map((g) => at(g, turn(g))), "curve"),
          dot(...at(rms, trained), 6, "truth-dot"), label(at(rms, trained)[0] - 9, at(rms, trained)[1] - 8, "trained γ, at its RMS", "end true-text"),
          group("gamma", dot(...at(gamma, now), 8, "center on")),
          [-4, -3, -2, -1, 0].map((n) => line(x(n), 196, x(n), 201, "grid") + label(x(n), 215, power(n), n ? "mid soft" : "end soft")),
          label(width / 2, 232, "γ, the same in each channel", "mid soft"),
        ),
        says: `With γ = ${Number(gamma.toPrecision(2))} in each channel, Eq. 3 turns the texts of this room by <b>${Number(now.toPrecision(2))} rad</b>, ${times < 1 ? `1/${fixed(1 / times, 1 / times < 10 ? 1 : 0)} of` : `${fixed(times, 1)} times`} what 0.1 mm more in the text does.`,
        "gamma out": String(Number(gamma.toPrecision(2))),
      }; // prettier-ignore
    },

    // Eq. 4: eight maps
    maps(s, width) {
      const cell = cellOf(s);
      const best = sims[0].map((_, j) => sims.reduce((top, map, k) => (map[j] > sims[top][j] ? k : top), 0)); // prettier-ignore
      const winners = [...new Set(best)];
      const spread = (values) => Math.max(...values) - Math.min(...values);
      const within = Math.max(...sims.map(spread));
      const between = spread(sims.map(Cabins.mean));
      return {
        maps: join(sims.map((map, k) => `<div><svg viewBox="0 0 ${w} ${h}" aria-hidden="true">${join(
          map.map((value, j) => rect(j % w, Math.floor(j / w), 1.02, 1.02, "cell", `fill-opacity="${r(Math.max(value, 0) / highest)}"`)),
          dot((cell % w) + 0.5, Math.floor(cell / w) + 0.5, 0.22, "spot"),
        )}</svg>“${demo.texts[k]}”<br>${fixed(map[cell], 3)}</div>`)),
        says: `${winners.length === 1
          ? `One text, <b>“${demo.texts[winners[0]]}”</b>, fits best at all ${h * w} locations of this room.`
          : `At the chosen pixel “${demo.texts[best[cell]]}” fits best; ${winners.length} texts do so somewhere in this room.`} Inside one map the cosine varies by ${fixed(within, 3)} or less; the means of the maps differ by up to ${fixed(between, 3)}.`,
        high: fixed(highest, 2),
      }; // prettier-ignore
    },

    // the decoder's stages, as boxes that grow; docs/test_page.py knows the sizes of RN101
    ladder(s, width) {
      const stages = [["2048", "15 × 19"], ["1024", "26 × 34"], ["512", "52 × 68"], ["256", "104 × 136"], ["256", "208 × 272"]];
      const skips = ["x₄, s", "x₃", "x₂", "x₁"];
      const step = width / 5;
      const side = (i) => Math.min([46, 54, 66, 82, 104][i], step * 0.86);
      return {
        plot: join(stages.map(([channels, size], i) => {
          const x = (i + 0.5) * step;
          const top = 160 - side(i);
          return [
            rect(x - side(i) / 2, top, side(i), side(i), "stage"),
            label(x, top + side(i) / 2 + 5, channels, "mid strong"), label(x, 178, size, "mid soft"),
            skips[i] ? [label(x, 16, skips[i], "mid bold"), arrow(x, 24, x, top - 3)] : "",
            i ? arrow(x - step + side(i - 1) / 2 + 2, 150, x - side(i) / 2 - 3, 150) : "",
          ];
        }), label(0, 200, "1 × 1"), label(width / 2, 200, "enlarge, stack, 3 × 3 twice", "mid"), label(width, 200, "3 × 3, 1 × 1", "end"), label(width, 217, "softmax: p", "end")),
      }; // prettier-ignore
    },

    // Eq. 5: the mean or the likeliest bin
    mean(s, width) {
      const parts = drawP(s, width, s.rule);
      const values = new Set(maps.likeliest).size;
      parts.says += s.rule === "mean"
        ? ` Over the map, AbsRel of the mean is ${fixed(absRel("mean"), 2)}.`
        : ` The map has only ${values} different depths at ${places.length} pixels; its AbsRel is ${fixed(absRel("likeliest"), 2)}, and that of the mean ${fixed(absRel("mean"), 2)}.`; // prettier-ignore
      const shown = s.rule === "mean" ? "the mean" : "the likeliest bin";
      return { ...parts, chosen: `depth by ${shown}` };
    },

    // Eq. 6: a wrong scale
    silog(s, width) {
      const [variance, mean] = [demo.loss.var_g, demo.loss.mean_g + s.scale];
      const x = scale(0, 0.34, 68, width - 46);
      const bar = (lambda, y, name) => {
        const [kept, off] = [(1 - lambda) * mean ** 2, lambda * mean ** 2].map((v) => x(v) - x(0));
        const start = x(variance);
        const kind = `end ${lambda === 0.85 ? "strong" : ""}`;
        return [
          label(60, y + 16, name, kind),
          rect(x(0), y, start - x(0), 22, "var"),
          rect(start, y, kept, 22, "kept"),
          rect(start + kept, y, off, 22, "off"),
          label(width - 2, y + 16, fixed(Cabins.silog(mean, variance, lambda), 2), kind),
        ];
      };
      return {
        plot: join(
          label(68, 12, "Var(g)", "var-text"), label(118, 12, "(1 − λ) ḡ²", "kept-text"), label(194, 12, "forgiven", "soft"), label(width - 2, 12, "loss", "end soft"),
          bar(0, 22, "λ = 0"), bar(0.85, 60, "λ = 0.85"), bar(1, 98, "λ = 1"),
        ),
        says: `Var(<i>g</i>) = ${fixed(variance, 3)} stays as it is, and <i>ḡ</i>² = ${fixed(mean ** 2, 3)}. So <i>L</i> = 10 √(${fixed(variance, 3)} + 0.15 · ${fixed(mean ** 2, 3)}) = <b>${fixed(Cabins.silog(mean, variance), 2)}</b>.`,
        "scale out": fixed(Math.exp(s.scale), 2),
      }; // prettier-ignore
    },

    // Eq. 7: depths and centres pull each other
    chamfer(s, width) {
      const { ofDepths, ofCenters, toCenters, toDepths, gradient } = Cabins.chamfer(depths, s.centers); // prettier-ignore
      const x = scale(0, 10, 12, width - 12);
      const [top, bottom] = [40, 112];
      const flat = Math.max(...gradient.map(Math.abs)) < 0.01;
      const height = depths.map((depth, i) => top - 9 * depths.slice(0, i).filter((d) => d === depth).length); // prettier-ignore
      return {
        plot: join(
          label(0, 12, "true depths X", "soft"), label(0, 138, "bin centres c: drag one", "soft"),
          group("xc", depths.map((depth, i) => line(x(depth) - 2, top, x(s.centers[ofDepths[i]]) - 2, bottom, "pull xc"))),
          group("cx", s.centers.map((center, j) => line(x(center) + 2, bottom, x(depths[ofCenters[j]]) + 2, top, "pull cx"))),
          depths.map((depth, i) => dot(x(depth), height[i], 6, "truth-dot")),
          s.centers.map((center, j) => dot(x(center), bottom, j === s.choice - 1 ? 9 : 7, j === s.choice - 1 ? "center on" : "center")),
          axis(x, 0, 10, 150, "m"),
        ),
        says: `<span class="xc">X → c: ${fixed(toCenters, 3)}</span> + <span class="cx">c → X: ${fixed(toDepths, 3)}</span> = <b>${fixed(toCenters + toDepths, 3)} m²</b>.${flat ? toCenters + toDepths > 0.01 ? " The gradient is 0, and the loss is not: a local minimum." : " No centre is pulled any more." : ""}`,
        "center out": `${fixed(s.centers[s.choice - 1], 2)} m`,
      }; // prettier-ignore
    },

    // Eq. 8: β, in this room and in one eight times as large
    total(s, width) {
      const both = [1, 8].map((factor) => Cabins.total(demo.loss, s.beta, factor));
      const x = scale(0, Math.max(4, ...both.map(Cabins.sum)), 62, width - 52);
      const share = both.map(([pixel, bins]) => (100 * bins) / (pixel + bins));
      return {
        plot: join(both.map(([pixel, bins], i) => [
          label(54, 27 + 44 * i, ["10 m", "80 m"][i], "end strong"),
          group("pixel", rect(x(0), 10 + 44 * i, x(pixel) - x(0), 26, "var")),
          group("beta", rect(x(pixel), 10 + 44 * i, x(bins) - x(0), 26, "kept")),
          label(x(pixel + bins) + 6, 28 + 44 * i, fixed(pixel + bins, 2), "strong"),
        ]), label(62, 106, "L pixel", "var-text"), label(116, 106, "β L bins", "kept-text")),
        says: `In the drawn room, whose range is 10\u00a0m, β <i>L</i><sub>bins</sub> is <b>${fixed(share[0], 1)}\u00a0%</b> of the total. In the same room enlarged to 80\u00a0m, it is <b>${fixed(share[1], 0)}\u00a0%</b>.`,
        "beta out": fixed(s.beta, 2),
      }; // prettier-ignore
    },

    // who learns: γ and TransDecoder's share of a step, over the steps of training
    learns(s, width) {
      const kinds = { small_epsilon: ["blue", "ε = 10⁻¹⁵"], paper: ["orange", "γ and p trained"], released: ["grey", "γ and p not trained"] }; // prettier-ignore
      const stacked = width < 480;
      const size = stacked ? width : width / 2 - 8;
      const chart = (left, above, title, y, ticks, valueOf) => {
        const x = scale(0, findings.steps.at(-1), left + 40, left + size - 12);
        return [
          label(left, above + 14, title, "strong"),
          ticks.map(([value, text]) => line(left + 40, y(value), left + size - 12, y(value), "grid") + label(left + 34, y(value) + 4, text, "end soft")),
          Object.entries(kinds).map(([run, [kind]]) => {
            const found = findings.steps.map((step) => [x(step), valueOf(findings.runs[run])[step]]);
            return [
              `<polygon points="${[...found.map(([at, n]) => [at, y(n.least)]), ...found.reverse().map(([at, n]) => [at, y(n.greatest)])].map((point) => point.map(r)).join(" ")}" class="range ${kind}"/>`,
              path(found.reverse().map(([at, n]) => [at, y(n.mean)]), `run ${kind}`),
              found.map(([at, n]) => dot(at, y(n.mean), 3.5, `run-dot ${kind}`)),
            ];
          }),
          findings.steps.map((step) => label(x(step), above + 192, step, "mid soft")),
        ];
      };
      const low = stacked ? 210 : 0;
      const log = scale(-4, -1.7, 170, 34);
      const share = scale(0, 1, low + 170, low + 34);
      return {
        plot: join(
          chart(0, 0, "RMS of γ", (n) => log(Math.log10(n)), [[1e-4, power(-4)], [1e-3, power(-3)], [1e-2, power(-2)]], (run) => run.gamma_rms),
          chart(stacked ? 0 : width / 2 + 8, low, "TransDecoder’s share of a step", share, [[0, "0"], [0.5, "50 %"], [1, "100 %"]], (run) => run.step_share.TransDecoder),
        ),
        height: low + 200,
        key: Object.values(kinds).map(([kind, name]) => `<span><i class="swatch ${kind}"></i>${name}</span>`).join(" "),
      }; // prettier-ignore
    },

    // the strip: one pixel from the bins to its depth
    strip(s) {
      const p = places[here(s)];
      const [top, cell] = [Math.max(...p), cellOf(s)];
      const x = scale(0, demo.max_depth, 0, 80);
      const most = Math.max(...demo.widths);
      const mini = (...parts) => `<svg viewBox="0 0 80 20" aria-hidden="true">${join(...parts)}</svg>`;
      return {
        b: mini(stems(demo.widths.map((b, k) => [k * 0.3125, 20, 19 - 19 * Math.sqrt(b / most)]), "stem")),
        c: mini(stems(c.map((center) => [x(center), 4, 16]), "stem")),
        e: mini(demo.cabins.map((value, k) => line(x(value), k === 2 ? 0 : 5, x(value), k === 2 ? 20 : 15, k === 2 ? "mark e" : "stem wide"))),
        t: mini(demo.t[2].map((v, i) => rect(i * 1.25, 10 - Math.max(v, 0) * 4, 1, Math.abs(v) * 4, "bar"))),
        s: mini(sims.map((map, k) => rect(k * 10 + 1, 20 - (20 * Math.max(map[cell], 0)) / highest, 7, (20 * Math.max(map[cell], 0)) / highest, k === 2 ? "bar on" : "bar"))),
        p: mini(stems(p.map((value, k) => [x(c[k]), 20, 19 - (19 * value) / top]), "stem")),
        "s value": fixed(sims[2][cell], 4), "p value": `largest ${fixed(top, 2)}`,
        "d value": metres(maps.mean[here(s)]), "truth value": `truth ${metres(maps.truth[here(s)])}`,
      }; // prettier-ignore
    },
  };
  return { state, draw, rows, columns, depths, startCenters };
}

if (typeof module !== "undefined") module.exports = { Cabins, drawings };
else document.addEventListener("DOMContentLoaded", start);

// ---- The page ------------------------------------------------------------------------------------

function start() {
  const [demo, findings] = ["demo", "findings"].map((id) => JSON.parse(document.getElementById(id).textContent)); // prettier-ignore
  const { state, draw, rows, columns, depths, startCenters } = drawings(demo, findings);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  document.documentElement.classList.add("js");

  // ---- Widgets: what is on screen is drawn, once a frame
  let printing = false;
  const widgets = Object.fromEntries(all("[data-widget]").map((figure) => [figure.dataset.widget,
    { figure, plot: figure.querySelector("svg.plot"), stale: true, seen: false }])); // prettier-ignore
  const pixels = all("[data-ring]");
  const redraw = (name) => {
    const { figure, plot } = widgets[name];
    const width = printing ? 340 : Math.round(plot?.clientWidth || 1);
    const parts = draw[name](state, width);
    widgets[name].stale = false;
    if (plot) {
      const height = parts.height ?? Number(plot.dataset.height);
      plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
      plot.style.height = printing ? "auto" : `${height}px`;
    }
    for (const element of all("[data-part]", figure)) {
      const html = parts[element.dataset.part];
      if (html !== undefined && element.drawn !== html) element.innerHTML = element.drawn = html;
    }
    for (const input of all("input[type=range]", figure)) {
      const text = figure.querySelector(`[data-part="${input.dataset.in} out"]`)?.textContent;
      if (text) input.setAttribute("aria-valuetext", text);
    }
    for (const pad of all("[data-pad][role]", figure)) {
      pad.setAttribute("aria-valuetext", parts.spoken);
      pad.setAttribute("aria-valuenow", state.row * columns + state.column);
    }
  };
  let lit = null; // the term that is lit, and its section
  const light = () => {
    all(".lit").forEach((element) => element.classList.remove("lit"));
    if (lit) all(`[data-t="${lit[0]}"]`, lit[1]).forEach((e) => e.classList.add("lit"));
  };
  let [waiting, ringed] = [false, ""];
  const frame = () => {
    waiting = false;
    const at = `translate(${((state.column + 0.25) * 128) / columns} ${((state.row + 0.25) * 96) / rows})`;
    if (at !== ringed) pixels.forEach((ring) => ring.setAttribute("transform", at));
    ringed = at;
    const due = Object.keys(widgets).filter((name) => widgets[name].stale && widgets[name].seen);
    due.forEach(redraw);
    if (lit && due.length) light();
  };
  const changed = (...names) => {
    names.forEach((name) => (widgets[name].stale = true));
    if (!waiting) requestAnimationFrame(frame);
    waiting = true;
  };
  const see = (entries) => {
    entries.forEach((entry) => (widgets[entry.target.dataset.widget].seen = entry.isIntersecting));
    changed();
  };
  const sight = new IntersectionObserver(see, { rootMargin: "150px" });
  for (const [name, { figure, plot }] of Object.entries(widgets)) {
    sight.observe(figure);
    if (plot) new ResizeObserver(() => changed(name)).observe(plot);
  }
  const print = ({ type }) => {
    printing = type === "beforeprint";
    Object.keys(widgets).forEach(redraw);
  };
  for (const event of ["beforeprint", "afterprint"]) addEventListener(event, print);

  // ---- Pixels
  const choose = (row, column) => {
    const [old, clamp] = [[state.row, state.column], (v, n) => Math.min(Math.max(v, 0), n - 1)];
    [state.row, state.column] = [clamp(row, rows), clamp(column, columns)];
    if (state.row === old[0] && state.column === old[1]) return;
    changed("room", "maps", "mean", "strip");
  };
  for (const pad of all("[data-pad]")) {
    const at = (event) => {
      const box = pad.getBoundingClientRect();
      choose(Math.floor(((event.clientY - box.top) / box.height) * rows), Math.floor(((event.clientX - box.left) / box.width) * columns)); // prettier-ignore
    };
    // a finger only taps, so that a swipe over a picture scrolls the page
    pad.addEventListener("pointermove", (event) => event.pointerType === "mouse" && at(event));
    pad.addEventListener("click", at);
    pad.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      if (!step[event.key]) return;
      event.preventDefault();
      choose(state.row + step[event.key][0], state.column + step[event.key][1]);
    });
  }

  // ---- Sliders, choices and buttons
  const sync = (name) => {
    all("input[type=range]", widgets[name].figure).forEach((e) => (e.value = state[e.dataset.in]));
    changed(name);
  };
  for (const input of all("[data-in]")) {
    const [key, name] = [input.dataset.in, input.closest("[data-widget]").dataset.widget];
    input.addEventListener("input", () => {
      state[key] = input.type === "range" ? Number(input.value) : input.value;
      if (key === "rule") all("[data-rule]").forEach((map) => (map.hidden = map.dataset.rule !== state.rule)); // prettier-ignore
      sync(name);
    });
  }
  const acts = {
    edge: () => choose(...demo.edge),
    nudge: (by) => ([state.before, state.e] = [state.e, Math.max(state.e + Number(by), 0)]),
    example: () => ([state.before, state.e] = [2.9999, 3]),
    back: () => ([state.before, state.e] = [null, Math.fround(demo.cabins[2])]),
    downhill() {
      const { gradient } = Cabins.chamfer(depths, state.centers);
      state.centers = state.centers.map((center, j) => center - 0.5 * gradient[j]);
    },
    twice: () => (state.centers = [1.5, 1.5, 33 / 7, 8.4]),
    again: () => (state.centers = [...startCenters]),
  };
  for (const button of all("[data-act]")) {
    button.addEventListener("click", () => {
      const [act, by] = button.dataset.act.split(" ");
      acts[act](by);
      sync(button.closest("[data-widget]").dataset.widget);
    });
  }

  // ---- Things that are dragged: an edge of Eq. 1, a centre of Eq. 7
  const grips = {
    bins: {
      take(share) {
        const total = Cabins.sum(state.outputs);
        const edges = state.outputs.slice(0, -1).map((_, i) => Cabins.sum(state.outputs.slice(0, i + 1)) / total); // prettier-ignore
        state.bin = Cabins.nearest(edges, share) + 1;
      },
      move: (share) => (state.output = Cabins.dragged(state.outputs, state.bin - 1, Math.min(share, 0.98))), // prettier-ignore
      inset: 10,
    },
    chamfer: {
      take: (share) => (state.choice = Cabins.nearest(state.centers, 10 * share) + 1),
      move: (share) => (state.center = 10 * Math.min(Math.max(share, 0.02), 0.98)),
      inset: 12,
    },
  };
  for (const [name, grip] of Object.entries(grips)) {
    const plot = widgets[name].plot;
    const share = (event) => {
      const box = plot.getBoundingClientRect();
      return (event.clientX - box.left - grip.inset) / (box.width - 2 * grip.inset);
    };
    plot.addEventListener("pointerdown", (event) => {
      plot.setPointerCapture(event.pointerId);
      sync(name, grip.take(share(event)));
    });
    plot.addEventListener("pointermove", (event) => {
      if (plot.hasPointerCapture(event.pointerId)) sync(name, grip.move(share(event)));
    });
  }

  // ---- The strip shows which section is read
  const list = document.querySelector("#strip ol");
  const stations = all("#strip [data-of]");
  const reading = new Set();
  const follow = (entries) => {
    entries.forEach(({ target, isIntersecting }) => reading[isIntersecting ? "add" : "delete"](target.id)); // prettier-ignore
    const on = stations.filter((e) => e.dataset.of.split(" ").some((id) => reading.has(id)));
    stations.forEach((station) => station.setAttribute("aria-current", on.includes(station)));
    if (on.length) list.scrollTo({ left: on[0].parentElement.offsetLeft - 0.3 * list.clientWidth });
  };
  const sections = new IntersectionObserver(follow, { rootMargin: "-30% 0px -69% 0px" });
  all(".story > section").forEach((section) => sections.observe(section));

  // ---- Terms: an equation's part, its code, its name and its mark light up together
  const point = ({ target }) => {
    const term = target.closest?.("[data-t]");
    if (!term && !lit) return;
    lit = term ? [term.dataset.t, term.closest("section")] : null;
    light();
  };
  for (const event of ["pointerover", "focusin", "click"]) document.addEventListener(event, point);
  document.addEventListener("keydown", ({ key }) => key === "Escape" && point({ target: document }));
}
