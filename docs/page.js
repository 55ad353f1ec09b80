"use strict";

// ---- What the widgets compute. docs/test_page.py compares it with PyTorch, under node. -----------

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

  // Eq. 2 for one group of centres c: weights, e, mean and lower median, with lengths in `unit` metres
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
    const decimals = String(number % 1e4).padStart(4, "0").replace(/0+$/, ""); // prettier-ignore
    return `${Math.floor(number / 1e4)}.${decimals || "0"}`;
  },

  // CLIP's ids of that text, from start to end token: "0" to "9" are 271 to 280, "." is 269
  numberTokens(e) {
    const ids = [...Cabins.numberText(e)].map((char) => (char === "." ? 269 : 271 + Number(char)));
    return [49406, ...ids, 49407];
  },

  // Eq. 3: the angle in degrees by which γ v turns t
  turn(t, v, gamma) {
    const after = t.map((value, i) => value + gamma * v[i]);
    const dot = (a, b) => Cabins.sum(a.map((value, i) => value * b[i]));
    const flat = dot(after, t) / dot(t, t);
    const rest = after.map((value, i) => value - flat * t[i]);
    return (Math.atan2(Math.sqrt(dot(rest, rest)), flat * Math.sqrt(dot(t, t))) * 180) / Math.PI;
  },

  // Eq. 5; and the centre of the likeliest bin
  expectedDepth: (c, p) => Cabins.sum(c.map((center, k) => center * p[k])),
  likeliest: (c, p) => c[p.indexOf(Math.max(...p))],

  // p over depth, smoothed by a Gaussian of 0.25 m, at each tenth of a metre
  smooth(c, p, high) {
    return Array.from({ length: Math.round(high * 10) + 1 }, (_, i) =>
      Cabins.sum(c.map((center, k) => p[k] * Math.exp(-((center - i / 10) ** 2) / 0.125))),
    );
  },

  // what p looks like: flat, or its hills in metres; and whether the mean lies between two of them
  shape(c, p, high) {
    const mean = Cabins.expectedDepth(c, p);
    const entropy = -Cabins.sum(p.map((value) => (value > 0 ? value * Math.log(value) : 0)));
    const flat = Math.exp(entropy) > 0.75 * p.length;
    const curve = Cabins.smooth(c, p, high);
    const top = Math.max(...curve);
    const hills = [];
    curve.forEach((y, i) => {
      const isTop = y > (curve[i - 1] ?? -1) && y >= (curve[i + 1] ?? -1);
      if (!isTop || y < 0.15 * top) return;
      const last = hills[hills.length - 1];
      const valley = last === undefined ? 0 : Math.min(...curve.slice(last, i));
      if (last === undefined || valley < 0.6 * Math.min(y, curve[last])) hills.push(i);
      else if (y > curve[last]) hills[hills.length - 1] = i;
    });
    const right = hills.findIndex((i) => i / 10 > mean);
    const beside = right > 0 && Math.min(curve[hills[right]], curve[hills[right - 1]]);
    const between = beside && curve[Math.round(mean * 10)] < 0.6 * beside;
    return { mean, flat, hills: hills.map((i) => i / 10), between: Boolean(between) };
  },

  // Eq. 6 out of the mean and the variance of g
  silog(mean, variance, lambda = 0.85, alpha = 10) {
    return alpha * Math.sqrt(Math.max(variance + (1 - lambda) * mean ** 2, 1e-12));
  },

  // Eq. 7 of depths x and centres c: who is whose nearest, both sums, and the gradient at c
  chamfer(x, c) {
    const nearest = (values, query) => {
      const gaps = values.map((value) => Math.abs(value - query));
      return gaps.indexOf(Math.min(...gaps));
    };
    const ofDepths = x.map((depth) => nearest(c, depth));
    const ofCenters = c.map((center) => nearest(x, center));
    const toCenters = Cabins.mean(x.map((depth, i) => (depth - c[ofDepths[i]]) ** 2));
    const toDepths = Cabins.mean(c.map((center, j) => (center - x[ofCenters[j]]) ** 2));
    const gradient = c.map((center, j) => (2 / c.length) * (center - x[ofCenters[j]]));
    ofDepths.forEach((j, i) => (gradient[j] += (2 / x.length) * (c[j] - x[i])));
    return { ofDepths, ofCenters, toCenters, toDepths, gradient };
  },

  // demo.json's base64 as an array of the given type; p of one location out of its bytes
  unpack(text, type) {
    const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
    return new globalThis[type](bytes.buffer);
  },
  probabilities(bytes, place, n) {
    const squares = Array.from(bytes.subarray(place * n, (place + 1) * n), (q) => q * q);
    const total = Cabins.sum(squares);
    return squares.map((square) => square / total);
  },
};

if (typeof module !== "undefined") module.exports = Cabins;
else document.addEventListener("DOMContentLoaded", start);

// ---- The page ------------------------------------------------------------------------------------

function start() {
  const demo = JSON.parse(document.getElementById("demo").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const c = demo.centers;
  const [rows, columns] = demo.p.size;
  const bytes = Cabins.unpack(demo.p.data, "Uint8Array");
  const metres = (map) => Array.from(Cabins.unpack(map.data, "Uint16Array"), (v) => v * demo.unit);
  const places = Array.from({ length: rows * columns }, (_, i) =>
    Cabins.probabilities(bytes, i, c.length),
  );
  const maps = { depth: places.map((p) => Cabins.expectedDepth(c, p)) };
  maps.likeliest = places.map((p) => Cabins.likeliest(c, p));
  const truth = metres(demo.truth);
  const factor = demo.size[1] / columns; // image pixels from one location of p to the next
  maps.truth = maps.depth.map((_, i) => {
    const [row, column] = [Math.floor(i / columns), i % columns];
    return truth[factor * (row * demo.size[1] + column)];
  });
  const state = { row: demo.pixel[0], column: demo.pixel[1], choice: "depth" };
  const here = () => state.row * columns + state.column;
  const listeners = [];
  const choose = (row, column) => {
    state.row = Math.min(Math.max(row, 0), rows - 1);
    state.column = Math.min(Math.max(column, 0), columns - 1);
    listeners.forEach((listen) => listen());
  };

  // ---- Small tools

  const fixed = (value, digits) => value.toFixed(digits).replace("-", "−");
  const svg = (tag, attributes = {}, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
    element.append(...children.flat());
    return element;
  };
  const line = (x1, y1, x2, y2, kind, more) => svg("line", { x1, y1, x2, y2, class: kind, ...more });
  const rect = (x, y, width, height, kind, more) =>
    svg("rect", { x, y, width: Math.max(width, 0), height: Math.max(height, 0), class: kind, ...more }); // prettier-ignore
  const dot = (cx, cy, r, kind, more) => svg("circle", { cx, cy, r, class: kind, ...more });
  const label = (x, y, text, kind = "", more) => svg("text", { x, y, class: kind, ...more }, text);
  const scale = (low, high, from, to) => (value) =>
    from + ((value - low) / (high - low)) * (to - from);
  const axis = (x, low, high, step, y, unit, digits = 0) => {
    const ticks = Array.from({ length: Math.round((high - low) / step) + 1 }, (_, i) => low + i * step);
    return svg("g", { class: "axis" }, line(x(low), y, x(high), y), ticks.map((tick, i) => [
      line(x(tick), y, x(tick), y + 4),
      label(x(tick), y + 17, fixed(tick, digits) + (i === ticks.length - 1 ? ` ${unit}` : ""),
        i === ticks.length - 1 ? "end" : i ? "mid" : ""),
    ]).flat()); // prettier-ignore
  };

  // the figure of a widget: its plots are drawn again when their width changes, and for paper
  let printing = false;
  const print = (event) => {
    printing = event.type === "beforeprint";
    plots.forEach((again) => again());
  };
  const plots = [];
  addEventListener("beforeprint", print);
  addEventListener("afterprint", print);
  const widget = (name, draw) => {
    const figure = document.querySelector(`[data-widget="${name}"]`);
    const plot = figure.querySelector(".plot");
    const inputs = Object.fromEntries(all("[data-in]", figure).map((e) => [e.dataset.in, e]));
    const values = Object.fromEntries(all("[data-value]", figure).map((e) => [e.dataset.value, e]));
    const says = figure.querySelector("[data-says]");
    const say = (text) => (says.innerHTML = text.replace(/(\d) (m|%)/g, "$1\u00a0$2"));
    const show = (input, text) => (input.parentElement.querySelector("output").textContent = text);
    const again = () => {
      const width = plot ? (printing ? 350 : Math.round(plot.clientWidth)) : 1;
      if (!width) return;
      const height = plot && Number(plot.dataset.height);
      if (plot) plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
      if (plot) plot.style.height = `${height}px`;
      const shapes = draw({ width, height, inputs, values, say, show, again, figure });
      if (plot) plot.replaceChildren(...shapes.flat(3));
    };
    if (plot) plots.push(again) && new ResizeObserver(again).observe(plot);
    else again();
    figure.addEventListener("input", again);
    return { figure, inputs, again };
  };

  // ---- Maps: pictures with the chosen pixel

  const STOPS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"]; // prettier-ignore
  const stops = STOPS.map((color) => [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16)));
  const colorOf = (share) => {
    const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const i = Math.min(Math.floor(at), stops.length - 2);
    return stops[i].map((value, k) => value + (at - i) * (stops[i + 1][k] - value));
  };
  const painted = (values, width, height, low, high) => {
    const small = document.createElement("canvas");
    [small.width, small.height] = [width, height];
    const image = new ImageData(width, height);
    values.forEach((v, i) => image.data.set([...colorOf((v - low) / (high - low)), 255], 4 * i));
    small.getContext("2d").putImageData(image, 0, 0);
    return small;
  };
  const pictures = Object.fromEntries(
    Object.entries(maps).map(([name, map]) => [name, painted(map, columns, rows, 0, demo.shown_depth)]),
  );
  const ring = (context, x, y, r) => {
    for (const [color, width] of [["#fff", 5], ["#000", 2]]) {
      context.strokeStyle = color;
      context.lineWidth = width;
      context.beginPath();
      context.arc(x, y, r, 0, 7);
      context.stroke();
    }
  }; // prettier-ignore
  const drawMap = (canvas) => {
    [canvas.width, canvas.height] = [512, 384];
    const context = canvas.getContext("2d");
    const name = canvas.dataset.map === "chosen" ? state.choice : canvas.dataset.map;
    context.imageSmoothingEnabled = false;
    if (pictures[name]) context.drawImage(pictures[name], 0, 0, 512, 384);
    const cell = 512 / columns;
    ring(context, (state.column + 0.5) * cell, (state.row + 0.5) * cell, 12);
  };
  const picture = new Image();
  picture.onload = () => {
    pictures.picture = picture;
    all("[data-map]").forEach(drawMap);
  };
  picture.src = demo.picture;
  for (const canvas of all("[data-map]")) {
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      const share = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
      choose(Math.floor(share[0] * rows), Math.floor(share[1] * columns));
    };
    // a finger only taps, so that a swipe over a picture scrolls the page
    canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && at(event));
    canvas.addEventListener("click", at);
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      if (!step[event.key]) return;
      event.preventDefault();
      choose(state.row + step[event.key][0], state.column + step[event.key][1]);
    });
  }
  listeners.push(() => all("[data-map]").forEach(drawMap));

  // ---- p at the chosen pixel: for the opening, and for Eq. 5

  const drawP = ({ width, height, say }, choice) => {
    const p = places[here()];
    const [mean, likeliest, real] = [maps.depth, maps.likeliest, maps.truth].map((m) => m[here()]);
    const x = scale(0, demo.max_depth, 10, width - 10);
    const [top, base] = [40, height - 24];
    const curve = Cabins.smooth(c, p, demo.max_depth);
    const high = Math.max(...curve);
    const most = Math.max(...p);
    const points = curve.map((y, i) => `${x(i / 10)},${base - (0.92 * (base - top) * y) / high}`);
    const mark = (value, text, kind, y) => {
      const side = value > 0.6 * demo.max_depth ? "end" : "";
      return [line(x(value), y - 10, x(value), base, kind), label(x(value) + (side ? -5 : 5), y, text, `${side} ${kind}-text`)]; // prettier-ignore
    };
    const shape = Cabins.shape(c, p, demo.max_depth);
    const m = `${fixed(mean, 2)} m`;
    const list = shape.hills.map((hill) => fixed(hill, 1));
    const hills = `${list.slice(0, -1).join(", ")} and ${list.at(-1)} m`;
    let text = `<b>One hill.</b> The mean, ${m}, speaks for it.`;
    if (shape.flat) text = `<b>Nearly flat.</b> The network does not know; its mean, ${m}, says little.`;
    else if (list.length > 1)
      text = `<b>${list.length === 2 ? "Two" : "Several"} hills</b>, near ${hills}. The mean, ${m}, lies ${shape.between ? "between them, where hardly any probability is" : "near one of them"}.`;
    if (choice === "likeliest") text = `The likeliest bin has its centre at ${fixed(likeliest, 2)} m and holds ${fixed(100 * most, most > 0.1 ? 0 : 1)} % of <b>p</b>. The mean is ${m}.`;
    say(`${text} The truth is ${fixed(real, 2)} m.`);
    return [
      svg("polygon", { points: `${x(0)},${base} ${points.join(" ")} ${x(demo.max_depth)},${base}`, class: "hill" }),
      p.map((value, k) => line(x(c[k]), base, x(c[k]), base - ((base - top) * value) / most, "stem")),
      axis(x, 0, demo.max_depth, 2, base, "m"),
      mark(real, "truth", "true", 24),
      choice === "likeliest" ? mark(likeliest, "likeliest bin", "mean", 12) : mark(mean, "mean = depth", "mean", 12),
    ]; // prettier-ignore
  };
  const room = widget("room", (given) => drawP(given));
  const mean = widget("mean", (given) => drawP(given, state.choice));
  listeners.push(room.again, mean.again);
  mean.figure.addEventListener("change", (event) => {
    state.choice = event.target.value === "argmax" ? "likeliest" : "depth";
    listeners.forEach((listen) => listen());
  });

  // ---- Eq. 1: eight bins

  const outputs = [0.6, 1.0, 0.3, 1.2, 0.1, 0.5, 1.6, 2.4];
  const bins = widget("bins", ({ width, inputs, say, show }) => {
    const i = Number(inputs.i.value) - 1;
    outputs[i] = Number(inputs.width.value);
    const b = outputs.map((value) => value / Cabins.sum(outputs));
    const [low, high] = [demo.min_depth, demo.max_depth];
    const centers = Cabins.binCenters(b, low, high);
    const x = scale(low, high, 8, width - 8);
    const edges = b.map((_, j) => low + (high - low) * Cabins.sum(b.slice(0, j)));
    const end = edges[i] + b[i] * (high - low);
    const bracket = (from, to, y, text, term) => {
      const middle = Math.min(Math.max((from + to) / 2, 30), width - 40);
      return svg("g", { "data-t": term, class: "bracket" },
        svg("path", { d: `M${from} ${y}v7H${to}v-7` }), label(middle, y + 22, text, "mid"));
    }; // prettier-ignore
    show(inputs.i, i + 1);
    show(inputs.width, fixed(outputs[i], 1));
    const sum = Cabins.sum(b.slice(0, i));
    say(`<i>c</i><sub>${i + 1}</sub> = 0.001 + 9.999 · (${fixed(b[i] / 2, 4)} + ${fixed(sum, 4)}) = <b>${fixed(centers[i], 3)} m</b>`);
    return [
      b.map((share, j) => rect(x(edges[j]), 34, share * (width - 16), 34, `bin ${j === i ? "on" : ""}`)),
      centers.map((center, j) => dot(x(center), 51, j === i ? 6 : 3.5, j === i ? "center on" : "center")),
      label(x(centers[i]), 24, `c${"₁₂₃₄₅₆₇₈"[i]}`, "mid it"),
      i ? bracket(x(low), x(edges[i]), 72, "widths before it", "sum") : [],
      bracket(x(edges[i]), x((edges[i] + end) / 2), i ? 98 : 72, "half its own", "half"),
      axis(x, 0, high, 2, 128, "m"),
    ]; // prettier-ignore
  });
  bins.inputs.i.addEventListener("input", () => {
    bins.inputs.width.value = outputs[Number(bins.inputs.i.value) - 1];
    bins.again();
  });

  // ---- Eq. 2: group 3 of the room, and the unit

  const group = c.slice(64, 96);
  widget("group", ({ width, inputs, values, say, show }) => {
    const unit = 10 ** -Number(inputs.unit.value);
    const { m, w, e, median } = Cabins.distanceClass(group, unit);
    const [low, high] = [Math.floor(group[0] * 10) / 10, Math.ceil(group[31] * 10) / 10];
    const x = scale(low, high, 34, width - 12);
    const [base, top] = [178, 24];
    const y = (weight) => base - weight * (base - top);
    show(inputs.unit, unit > 0.99 ? "1 m" : unit < 0.0101 ? "1 cm" : `${fixed(100 * unit, unit > 0.1 ? 0 : 1)} cm`);
    for (const [name, value] of Object.entries({ e, m, median })) values[name].textContent = `${fixed(value, 4)} m`;
    const most = Math.max(...w);
    const count = 1 / Cabins.sum(w.map((weight) => weight ** 2));
    say(count < 1.5 ? `The largest weight is ${fixed(most, 3)}: Eq. 2 picks the centre nearest to the mean.`
      : count > 20 ? `The largest weight is ${fixed(most, 3)}, and 1/32 is 0.031: nearly a plain mean.`
      : `The largest weight is ${fixed(most, 3)}: about ${fixed(count, 0)} centres share in ${"e"}.`);
    return [
      [0, 0.5, 1].map((weight) => [line(30, y(weight), width - 8, y(weight), "grid"), label(24, y(weight) + 4, String(weight), "end soft")]),
      label(24, 14, "w", "end it"),
      group.map((center, i) => [line(x(center), base, x(center), y(w[i]), "weight"), dot(x(center), y(w[i]), 3, "center")]),
      line(x(m), top - 6, x(m), base, "mark m", { "data-t": "m" }),
      line(x(median), top - 6, x(median), base, "mark med"),
      svg("g", { "data-t": "e" }, line(x(e), top - 12, x(e), base, "mark e"), svg("path", { d: `M${x(e) - 6} ${base + 9}h12l-6 -9z`, class: "tip" })),
      axis(x, low, high, 0.2, base + 10, "m", 1),
    ]; // prettier-ignore
  });

  // ---- The digits: two staircases

  const start3 = Math.fround(demo.cabins[2]);
  let [e, before] = [start3, null];
  const stairs = widget("stairs", ({ width, values, say }) => {
    const text = Cabins.numberText(e);
    const tokens = Cabins.numberTokens(e);
    const chars = ["start", ...text, "end"];
    values.typed.innerHTML = `<i>e</i> = ${e.toFixed(6)} m → “${text}”`;
    const old = before === null ? tokens : Cabins.numberTokens(before);
    const items = tokens.map((id, i) => {
      const changed = old[i] !== id ? ' class="new"' : "";
      return `<li${changed}><b>${chars[i]}</b> ${id}</li>`;
    });
    items.splice(1, 0, "<li class='learned'><b>p₁ … p₈</b> learned</li>");
    values.ids.innerHTML = items.join("");
    const n = tokens.filter((id, i) => id !== old[i]).length + Math.max(old.length - tokens.length, 0);
    const middle = Math.round(start3 * 1e4);
    const near = Math.abs(e * 1e4 - middle) < 10;
    const turned = near ? `t is now ${fixed(demo.nudge[Math.round(e * 1e4) - middle + 20], 2)} rad from that of <i>e</i>₃.` : "";
    say(before === null ? "Nudge <i>e</i>, and see what the text encoder notices."
      : n ? `${n === 1 ? "One token" : `${n} tokens`} changed: another row of the table is read, at once and entirely. ${turned}`
      : `No token changed. Nothing behind the digits can notice: the derivative is zero.`);
    const center = near ? middle : Math.round(e * 1e4);
    const x = scale((center - 10.5) / 1e4, (center + 10.5) / 1e4, 44, width - 10);
    const steps = Array.from({ length: 21 }, (_, i) => center - 10 + i);
    const stair = (y) => steps.map((k) => line(x((k - 0.5) / 1e4), y(k), x((k + 0.5) / 1e4), y(k), "step"));
    const id = (k) => scale(0, 9, 92, 22)(k % 10);
    const most = Math.max(...demo.nudge);
    const turn = (k) => scale(0, most, 212, 140)(demo.nudge[k - middle + 20]);
    return [
      label(0, 12, "id of the fourth decimal", "soft"),
      [[0, 271], [9, 280]].map(([digit, name]) => label(38, id(digit) + 4, String(name), "end soft")),
      stair(id),
      label(0, 128, near ? "how far t turns, in rad" : "how far t turns: measured only around e₃", "soft"),
      near ? [[0, "0"], [most, fixed(most, 2)]].map(([v, name]) => label(38, scale(0, most, 212, 140)(v) + 4, name, "end soft")) : [],
      near ? stair(turn) : [],
      line(x(e), 18, x(e), 216, "mark e"),
      axis(x, (center - 10) / 1e4, (center + 10) / 1e4, 0.001, 222, "m", 4),
    ]; // prettier-ignore
  });
  stairs.figure.addEventListener("click", ({ target }) => {
    if (!target.closest("[data-nudge]")) return;
    const nudge = Number(target.closest("[data-nudge]").dataset.nudge);
    before = e;
    if (nudge === 0) [e, before] = [start3, null];
    else if (nudge === 3) [e, before] = [2.9999, null];
    else e = Math.max(e + nudge, 0);
    stairs.again();
  });

  // ---- Eq. 3: eight queries on 1 + h w keys, and γ

  const [h, w] = demo.similarity.size;
  widget("attention", ({ width, inputs, say, show }) => {
    const gamma = 10 ** Number(inputs.gamma.value);
    const turn = Cabins.mean(demo.t.map((t, k) => Cabins.turn(t, demo.v_post[k], gamma)));
    const flat = demo.attention.flat();
    const side = Math.min(46, (width - 190) / w);
    const left = width - w * side - 4;
    const key = (j) => j === 0 ? [left - side - 6, 20 + (h * side) / 2] : [left + (((j - 1) % w) + 0.5) * side, 20 + (Math.floor((j - 1) / w) + 0.5) * side]; // prettier-ignore
    show(inputs.gamma, gamma < 0.001 ? fixed(gamma, 5) : fixed(gamma, 3));
    say(`Each of the ${flat.length} weights is between ${fixed(Math.min(...flat), 5)} and ${fixed(Math.max(...flat), 5)}; 1/${demo.attention[0].length} is ${fixed(1 / demo.attention[0].length, 5)}. With this γ, Eq. 3 turns the texts by <b>${turn < 0.1 ? fixed(turn, 4) : fixed(turn, 1)}°</b>.`);
    const [angle, long] = [(turn * Math.PI) / 180, Math.min(width - 28, 260)];
    return [
      label(0, 12, "queries: 8 texts", "soft"),
      label(width - 2, 12, `keys: z̄, and z at ${h} × ${w} locations`, "end soft"),
      svg("image", { href: demo.picture, x: left, y: 20, width: w * side, height: h * side, preserveAspectRatio: "none", opacity: 0.45 }),
      demo.attention.map((row, k) => row.map((a, j) => line(62, 30 + k * 17, ...key(j), k === 2 ? "look on" : "look", { "stroke-width": 13 * a * (k === 2 ? 1.4 : 0.6) }))),
      demo.texts.map((text, k) => label(56, 34 + k * 17, `“${text}”`, k === 2 ? "end mean-text" : "end")),
      demo.attention[0].map((_, j) => dot(...key(j), j ? 4 : 7, "key")),
      label(0, 182, "t, before and after", "soft"),
      line(8, 236, 8 + long, 236, "vector"),
      line(8, 236, 8 + long * Math.cos(angle), 236 - long * Math.sin(angle), "vector on"),
    ]; // prettier-ignore
  });

  // ---- Eq. 4: eight maps

  const sims = demo.similarity.values;
  const [lowest, highest] = [Math.min(...sims.flat()), Math.max(...sims.flat())];
  const mapsOf = widget("maps", ({ values, say }) => {
    const cell = Math.floor((state.row * h) / rows) * w + Math.floor((state.column * w) / columns);
    values.maps.replaceChildren(...sims.map((map, k) => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [32 * w, 32 * h];
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = false;
      context.drawImage(painted(map, w, h, lowest, highest), 0, 0, canvas.width, canvas.height);
      ring(context, ((cell % w) + 0.5) * 32, (Math.floor(cell / w) + 0.5) * 32, 9);
      const item = document.createElement("div");
      item.append(canvas, `“${demo.texts[k]}”`, document.createElement("br"), fixed(map[cell], 3));
      return item;
    })); // prettier-ignore
    values.low.textContent = fixed(lowest, 2);
    values.high.textContent = fixed(highest, 2);
    const best = sims.map((map) => map[cell]);
    say(`At the chosen pixel “${demo.texts[best.indexOf(Math.max(...best))]}” fits best; the truth is ${fixed(maps.truth[here()], 2)} m.`);
  });
  listeners.push(mapsOf.again);

  // ---- Eq. 6: a wrong scale

  widget("silog", ({ width, inputs, say, show }) => {
    const shift = Number(inputs.scale.value);
    const [variance, mean] = [demo.loss.var_g, demo.loss.mean_g + shift];
    show(inputs.scale, fixed(Math.exp(shift), 2));
    const x = scale(0, 0.38, 84, width - 50);
    const bar = (lambda, y, name) => {
      const kept = (1 - lambda) * mean ** 2;
      const loss = Cabins.silog(mean, variance, lambda);
      return [
        label(76, y + 15, name, `end ${lambda === 0.85 ? "strong" : ""}`),
        rect(x(0), y, x(variance) - x(0), 22, "var"),
        rect(x(variance), y, x(kept) - x(0), 22, "kept"),
        rect(x(variance + kept), y, x(lambda * mean ** 2) - x(0), 22, "off"),
        label(width, y + 15, fixed(loss, 2), `end ${lambda === 0.85 ? "strong" : ""}`),
      ];
    };
    const paper = Cabins.silog(mean, variance);
    say(`Var(<i>g</i>) = ${fixed(variance, 3)} stays as it is. <i>ḡ</i>² = ${fixed(mean ** 2, 3)}, of which 0.85 is forgiven (dashed). <i>L</i> = 10 √${fixed(variance + 0.15 * mean ** 2, 3)} = <b>${fixed(paper, 2)}</b>; without a wrong scale it would be ${fixed(Cabins.silog(0, variance), 2)}.`);
    return [
      label(84, 12, "Var(g)", "var-text"), label(138, 12, "(1 − λ) ḡ²", "kept-text"), label(218, 12, "forgiven", "soft"), label(width, 12, "loss", "end soft"),
      bar(0, 22, "λ = 0"), bar(0.85, 64, "λ = 0.85"), bar(1, 106, "λ = 1"),
    ]; // prettier-ignore
  });

  // ---- Eq. 7: depths and centres pull each other

  const depths = [1, 1.3, 1.7, 5, 5.4, 6];
  let centers = [1.15, 3.4, 7.4, 9.3];
  const chamfer = widget("chamfer", ({ width, inputs, say, show }) => {
    centers[2] = Number(inputs.centre.value);
    const { ofDepths, ofCenters, toCenters, toDepths } = Cabins.chamfer(depths, centers);
    const x = scale(0, 10, 10, width - 10);
    const [top, bottom] = [34, 106];
    show(inputs.centre, `${fixed(centers[2], 2)} m`);
    say(`<span class="xc">X → c: ${fixed(toCenters, 3)}</span> + <span class="cx">c → X: ${fixed(toDepths, 3)}</span> = <b>${fixed(toCenters + toDepths, 3)} m²</b>`);
    return [
      label(0, 14, "true depths X", "soft"), label(0, 132, "bin centres c", "soft"),
      depths.map((depth, i) => line(x(depth) - 2, top, x(centers[ofDepths[i]]) - 2, bottom, "pull xc", { "data-t": "xc" })),
      centers.map((center, j) => line(x(center) + 2, bottom, x(depths[ofCenters[j]]) + 2, top, "pull cx", { "data-t": "cx" })),
      depths.map((depth) => dot(x(depth), top, 6, "truth-dot")),
      centers.map((center, j) => dot(x(center), bottom, j === 2 ? 8 : 6, j === 2 ? "center on" : "center")),
      axis(x, 0, 10, 2, 146, "m"),
    ]; // prettier-ignore
  });
  chamfer.figure.querySelector("[data-step]").addEventListener("click", () => {
    const { gradient } = Cabins.chamfer(depths, centers);
    centers = centers.map((center, j) => center - 0.5 * gradient[j]);
    chamfer.inputs.centre.step = "any";
    chamfer.inputs.centre.value = centers[2];
    chamfer.again();
  });

  // ---- Who learns

  widget("learns", ({ width }) => {
    const x = scale(-10, -3, 110, width - 62);
    const at = (power) => x(power);
    const parts = Object.entries(demo.rms);
    return [
      rect(at(-10), 26, at(-8) - at(-10), 212, "below"),
      line(at(-8), 20, at(-8), 238, "mark m"),
      label(at(-8), 14, "Adam’s ε", "mid"),
      label(width, 14, "step", "end soft"),
      parts.map(([part, value], i) => {
        const y = 48 + i * 35;
        const share = demo.step_share[part];
        const kind = value < 1e-8 ? "mean" : "center";
        return [
          label(0, y + 4, part), line(at(-10), y, at(-3), y, "grid"),
          dot(at(Math.log10(value)), y, 7, kind === "mean" ? "center on" : "center"),
          label(width, y + 4, `${fixed(100 * share, 0)} %`, share < 0.5 ? "end mean-text" : "end"),
        ];
      }),
      [-10, -8, -6, -4].map((power) => [line(at(power), 238, at(power), 243, "grid"), svg("text", { x: at(power), y: 258, class: "mid soft" }, "10", svg("tspan", { dy: -5, "font-size": 10 }, `−${-power}`))]),
    ]; // prettier-ignore
  });

  // ---- The strip: small pictures of the stations, and which one is read

  const mini = (name, ...shapes) => {
    const drawing = document.querySelector(`[data-mini="${name}"]`);
    drawing.setAttribute("viewBox", "0 0 80 20");
    drawing.setAttribute("aria-hidden", "true");
    drawing.replaceChildren(...shapes.flat());
  };
  const most = Math.max(...demo.widths);
  const x10 = scale(0, demo.max_depth, 0, 80);
  mini("b", demo.widths.map((b, k) => line(k * 0.3125, 20, k * 0.3125, 19 - 19 * Math.sqrt(b / most), "stem")));
  mini("c", c.map((center) => line(x10(center), 4, x10(center), 16, "stem")));
  mini("e", demo.cabins.map((value, k) => line(x10(value), k === 2 ? 0 : 5, x10(value), k === 2 ? 20 : 15, k === 2 ? "mark e" : "stem wide")));
  mini("t", demo.t[2].map((v, i) => rect(i * 1.25, 10 - Math.max(v, 0) * 4, 1, Math.abs(v) * 4, "bar")));
  const put = (name, text) => (document.querySelector(`#strip [data-value="${name}"]`).textContent = text);
  put("tokens", demo.tokens[2].slice(1, -1).join(" "));
  const follow = () => {
    const p = places[here()];
    const top = Math.max(...p);
    const cell = Math.floor((state.row * h) / rows) * w + Math.floor((state.column * w) / columns);
    mini("s", sims.map((map, k) => rect(k * 10 + 1, 20 - (20 * map[cell]) / highest, 7, (20 * map[cell]) / highest, k === 2 ? "bar on" : "bar")));
    mini("p", p.map((value, k) => line(x10(c[k]), 20, x10(c[k]), 19 - (19 * value) / top, "stem")));
    put("s", fixed(sims[2][cell], 4));
    put("p", `largest ${fixed(top, 2)}`);
    put("d", `${fixed(maps.depth[here()], 2)} m`);
    put("truth", `truth ${fixed(maps.truth[here()], 2)} m`);
  };
  listeners.push(follow);
  const strip = document.getElementById("strip");
  const stations = all("[data-of]", strip);
  const sections = all("main > section");
  const light = () => {
    const lead = strip.offsetHeight + 0.3 * innerHeight;
    const read = sections.filter((section) => section.getBoundingClientRect().top < lead).pop();
    let first = null;
    for (const station of stations) {
      const on = Boolean(read) && station.dataset.of.split(" ").includes(read.id);
      on ? station.setAttribute("aria-current", "true") : station.removeAttribute("aria-current");
      first ??= on ? station.parentElement : null;
    }
    const list = strip.firstElementChild;
    if (first) list.scrollTo({ left: first.offsetLeft - 0.3 * list.clientWidth });
  };
  addEventListener("scroll", light, { passive: true });
  light();

  // ---- Terms: an equation's part, its code, its name and its mark light up together

  const names = (target) => target.closest?.("[data-t]");
  const lit = (target) => {
    all(".lit").forEach((element) => element.classList.remove("lit"));
    const term = names(target);
    if (!term) return;
    const section = term.closest("section");
    all(`[data-t="${term.dataset.t}"]`, section).forEach((element) => element.classList.add("lit"));
  };
  for (const event of ["pointerover", "focusin", "click"]) {
    document.addEventListener(event, ({ target }) => lit(target));
  }
  document.addEventListener("keydown", ({ key }) => key === "Escape" && lit(document.body));

  choose(state.row, state.column);
}
