"use strict";

// ---- What the widgets compute: Eq. 1, 2, 5, 6, 7 and the tokens, in plain functions. ------------
// docs/test_widgets.py compares each with its namesake in cabins.py and clip_tokenizer.py.

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

  // Eq. 2, for each of k groups of centres c: mean m, weights w, distance e; and the lower median.
  // Lengths are divided by `unit` metres before they meet the softmax, which depends on it.
  distanceClasses(c, k, unit = 1) {
    const size = c.length / k;
    const found = { m: [], w: [], e: [], median: [] };
    for (let group = 0; group < k; group++) {
      const own = c.slice(group * size, (group + 1) * size);
      const m = Cabins.mean(own);
      const inverse = own.map((center) => 1 / (Math.abs(center - m) / unit + 1e-4));
      const top = Math.max(...inverse);
      const raised = inverse.map((value) => Math.exp(value - top));
      const total = Cabins.sum(raised);
      const w = raised.map((value) => value / total);
      found.m.push(m);
      found.w.push(w);
      found.e.push(Cabins.sum(own.map((center, i) => w[i] * center)));
      found.median.push([...own].sort((a, b) => a - b)[Math.floor((size - 1) / 2)]);
    }
    return found;
  },

  // e, first rounded to float32 as the network has it, in tenths of a millimetre; half to even
  tenths(e) {
    const exact = Math.fround(e) * 1e4;
    const below = Math.floor(exact);
    const rest = exact - below;
    return below + (rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? 1 : 0);
  },

  // what the prompt says: e rounded to 4 decimals, as Python prints it
  numberText(e) {
    const number = Cabins.tenths(e);
    const decimals = String(number % 1e4)
      .padStart(4, "0")
      .replace(/0+$/, "");
    return `${Math.floor(number / 1e4)}.${decimals || "0"}`;
  },

  // CLIP's ids of that text, from start to end token: "0" to "9" are 271 to 280, "." is 269
  numberTokens(e) {
    const ids = [...Cabins.numberText(e)].map((char) => (char === "." ? 269 : 271 + Number(char)));
    return [49406, ...ids, 49407];
  },

  // Eq. 5, and the standard deviation of the centres under p
  expectedDepth: (c, p) => Cabins.sum(c.map((center, k) => center * p[k])),
  std(c, p) {
    const mean = Cabins.expectedDepth(c, p);
    return Math.sqrt(Cabins.sum(c.map((center, k) => p[k] * (center - mean) ** 2)));
  },

  // Eq. 6: under the root stand the variance of g and what λ leaves of its squared mean
  silog(g, lambda = 0.85, alpha = 10) {
    const mean = Cabins.mean(g);
    const variance = Cabins.mean(g.map((value) => (value - mean) ** 2));
    const left = (1 - lambda) * mean ** 2;
    const loss = alpha * Math.sqrt(Math.max(variance + left, 1e-12));
    return { mean, variance, left, forgiven: lambda * mean ** 2, loss };
  },

  // the index of the value that is nearest to the query; of two, the lower value
  nearest(values, query) {
    let best = 0;
    values.forEach((value, i) => {
      const gain = Math.abs(values[best] - query) - Math.abs(value - query);
      if (gain > 0 || (gain === 0 && value < values[best])) best = i;
    });
    return best;
  },

  // Eq. 7 of depths x and centres c: both sums, square metres, and who is whose nearest
  chamfer(x, c) {
    const ofDepths = x.map((depth) => Cabins.nearest(c, depth));
    const ofCenters = c.map((center) => Cabins.nearest(x, center));
    const toCenters = Cabins.mean(x.map((depth, i) => (depth - c[ofDepths[i]]) ** 2));
    const toDepths = Cabins.mean(c.map((center, j) => (center - x[ofCenters[j]]) ** 2));
    return { ofDepths, ofCenters, toCenters, toDepths, loss: toCenters + toDepths };
  },

  // the centres after one step against the gradient of Eq. 7
  chamferStep(x, c, rate) {
    const { ofDepths, ofCenters } = Cabins.chamfer(x, c);
    const gradient = c.map((center, j) => (2 / c.length) * (center - x[ofCenters[j]]));
    ofDepths.forEach((j, i) => (gradient[j] += (2 / x.length) * (c[j] - x[i])));
    return c.map((center, j) => center - rate * gradient[j]);
  },

  // an increasing smooth curve through (from[k], to[k]), at each of the values (Fritsch, Carlson)
  warp(from, to, values) {
    const n = from.length - 1;
    const rise = Array.from({ length: n }, (_, k) => (to[k + 1] - to[k]) / (from[k + 1] - from[k]));
    const slope = from.map((_, k) => {
      if (k === 0 || k === n) return rise[Math.min(k, n - 1)];
      return (2 * rise[k - 1] * rise[k]) / (rise[k - 1] + rise[k]); // at most twice the smaller
    });
    let k = 0;
    return values.map((value) => {
      while (k > 0 && value < from[k]) k--;
      while (k < n - 1 && value > from[k + 1]) k++;
      const h = from[k + 1] - from[k];
      const t = (value - from[k]) / h;
      const start = to[k] * (1 + 2 * t) + h * slope[k] * t;
      const end = to[k + 1] * (3 - 2 * t) - h * slope[k + 1] * (1 - t);
      return start * (1 - t) ** 2 + end * t ** 2;
    });
  },

  // demo.json's base64, as an array of the given type ("Uint8Array" …)
  unpack(text, type) {
    const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
    return new globalThis[type](bytes.buffer);
  },

  // p of one place out of demo.p's bytes: their squares, divided by their sum
  probabilities(bytes, place, n) {
    const squares = Array.from(bytes.subarray(place * n, (place + 1) * n), (q) => q * q);
    const total = Cabins.sum(squares);
    return squares.map((square) => square / total);
  },
};

if (typeof module !== "undefined") module.exports = Cabins;

// ---- The widgets: each fills the figures whose data-widget is its name. --------------------------

if (typeof document !== "undefined") {
  (() => {
    const COLOR = { bins: "var(--w-bins)", truth: "var(--w-truth)", result: "var(--w-result)" };
    COLOR.other = "var(--w-other)";

    // ---- Small tools: elements, numbers, axes

    function build(element, attributes, children) {
      for (const [name, value] of Object.entries(attributes || {})) {
        if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
        else if (value !== false && value !== undefined) element.setAttribute(name, value);
      }
      element.append(...children.flat(Infinity).filter((child) => child !== undefined));
      return element;
    }
    const html = (tag, attributes, ...children) =>
      build(document.createElement(tag), attributes, children);
    const svg = (tag, attributes, ...children) =>
      build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

    const fixed = (value, digits) =>
      value
        .toFixed(digits)
        .replace(/^-(?=.*[1-9])/, "−")
        .replace("-", "");
    const signed = (value, digits) => (value > 0 ? "+" : "") + fixed(value, digits);
    const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
    const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;
    const line = (x1, y1, x2, y2, more) => svg("line", { x1, y1, x2, y2, ...more });
    const label = (x, y, text, more) => svg("text", { x, y, ...more }, text);

    function ticks(low, high, most) {
      const raw = (high - low) / most;
      const power = 10 ** Math.floor(Math.log10(raw));
      const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
      const first = Math.ceil(low / step - 1e-9);
      const n = Math.floor(high / step + 1e-9) - first + 1;
      const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
      return Array.from({ length: n }, (_, i) => {
        const value = (first + i) * step;
        return { value, text: fixed(value, digits) };
      });
    }

    function axis(x, low, high, y, width, unit) {
      const marks = ticks(low, high, clamp(width / 70, 3, 10));
      return svg(
        "g",
        { class: "w-axis" },
        line(x(low), y, x(high), y),
        marks.map(({ value }) => line(x(value), y, x(value), y + 4)),
        marks.map(({ value, text }, i) =>
          label(x(value), y + 17, i === marks.length - 1 ? `${text} ${unit}` : text, {
            "text-anchor": x(value) > width - 24 ? "end" : x(value) < 12 ? "start" : "middle",
          }),
        ),
      );
    }

    // a drawing as wide as its place: `draw` is given the width in pixels, again when it changes
    function stage(name, height, draw) {
      const back = svg("g", { "aria-hidden": "true" });
      const front = svg("g");
      const root = svg("svg", { class: "w-stage", role: "group", "aria-label": name }, back, front);
      const own = { root, back, front, width: 0, height };
      own.draw = () => {
        if (!own.width) return;
        root.setAttribute("viewBox", `0 0 ${own.width} ${own.height}`);
        draw(own.width);
      };
      own.point = (event) => {
        const box = root.getBoundingClientRect();
        const scale = own.width / box.width;
        return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
      };
      own.place = html("div", { class: "w-place" }, root);
      new ResizeObserver(() => {
        const width = Math.round(own.place.clientWidth);
        if (width && width !== own.width) {
          own.width = width;
          own.draw();
        }
      }).observe(own.place);
      return own;
    }

    // a mark in a drawing that is dragged, or moved by keys. `at` is the value under the pointer.
    function handle(own, options, ...shapes) {
      const { name, min, max, step, at, get, set, text, vertical } = options;
      const mark = svg(
        "g",
        {
          class: `w-handle ${vertical ? "w-vertical" : ""}`,
          role: "slider",
          tabindex: 0,
          "aria-label": name,
          "aria-orientation": vertical ? "vertical" : "horizontal",
        },
        svg("circle", { r: 13, class: "w-hit" }),
        shapes,
      );
      const move = (value) => set(clamp(value, min(), max()));
      let held = false;
      mark.addEventListener("pointerdown", (event) => {
        held = true;
        mark.setPointerCapture(event.pointerId);
        mark.focus({ preventScroll: true });
        event.preventDefault();
      });
      mark.addEventListener("pointermove", (event) => held && move(at(...own.point(event))));
      for (const end of ["pointerup", "pointercancel"]) {
        mark.addEventListener(end, () => (held = false));
      }
      mark.addEventListener("keydown", (event) => {
        const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 };
        Object.assign(steps, { PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity });
        if (!(event.key in steps)) return;
        event.preventDefault();
        move(get() + steps[event.key] * step());
      });
      mark.show = (x, y) => {
        mark.setAttribute("transform", `translate(${x.toFixed(2)} ${y.toFixed(2)})`);
        mark.setAttribute("aria-valuemin", min().toFixed(4));
        mark.setAttribute("aria-valuemax", max().toFixed(4));
        mark.setAttribute("aria-valuenow", get().toFixed(4));
        mark.setAttribute("aria-valuetext", text());
      };
      own.front.append(mark);
      return mark;
    }

    // ---- Controls and readouts

    const unique = (
      (n) => () =>
        `w-${n++}`
    )(1);
    const button = (text, onclick) => html("button", { type: "button", onclick }, text);

    function choice(title, options, chosen, onchoose) {
      const group = unique();
      return html(
        "fieldset",
        { class: "w-choice" },
        html("legend", {}, title),
        Object.entries(options).map(([value, text]) => {
          const input = { type: "radio", name: group, value, checked: value === chosen && "" };
          return html(
            "label",
            {},
            html("input", { ...input, onchange: () => onchoose(value) }),
            html("span", {}, text),
          );
        }),
      );
    }

    function slider(title, attributes, oninput) {
      const input = html("input", { type: "range", id: unique(), ...attributes });
      const shown = html("output", { for: input.id });
      input.addEventListener("input", () => oninput(Number(input.value)));
      const name = html("label", { for: input.id }, title);
      return { input, shown, root: html("div", { class: "w-slider" }, name, input, shown) };
    }

    // numbers with their names, as a list; `mark` is the style of the line that shows one
    function readout(names) {
      const cells = {};
      const root = html(
        "dl",
        { class: "w-numbers" },
        Object.entries(names).map(([key, [title, mark]]) => {
          cells[key] = html("dd", { "data-key": key });
          const swatch = mark && html("i", { class: `w-swatch w-${mark}`, "aria-hidden": "true" });
          return html("div", {}, html("dt", {}, swatch || undefined, title), cells[key]);
        }),
      );
      return {
        root,
        show: (values) => Object.entries(values).forEach(([k, v]) => put(cells[k], v)),
      };
    }

    const put = (element, text) => element.textContent === text || (element.textContent = text);
    const row = (...children) => html("div", { class: "w-row" }, ...children);
    const symbol = (name, index) =>
      html(
        "span",
        { class: "w-math" },
        html("i", {}, name),
        index === undefined ? [] : html("sub", {}, String(index)),
      );
    const speech = () => html("p", { class: "w-says", "aria-live": "polite" });

    function fill(figure, title, text, ...children) {
      const caption = html("figcaption", {}, html("strong", {}, title), " ", text);
      figure.replaceChildren(caption, ...children.filter((child) => child !== undefined));
    }

    const scale = (low, high, from, to) => {
      const x = (value) => from + ((value - low) / (high - low)) * (to - from);
      x.back = (at) => low + ((at - from) / (to - from)) * (high - low);
      return x;
    };

    // ---- Pictures: maps painted in demo.colors

    const channels = (color) => [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));

    function between(stops, share) {
      const at = clamp(share, 0, 1) * (stops.length - 1);
      const i = Math.min(Math.floor(at), stops.length - 2);
      return stops[i].map((value, c) => value + (at - i) * (stops[i + 1][c] - value));
    }

    function paint(canvas, width, height, colorAt) {
      canvas.width = width;
      canvas.height = height;
      const context = canvas.getContext("2d");
      const image = context.createImageData(width, height);
      for (let i = 0; i < width * height; i++) image.data.set([...colorAt(i), 255], 4 * i);
      context.putImageData(image, 0, 0);
    }

    const gradient = (colors, left, right) =>
      html(
        "div",
        { class: "w-scale" },
        html("span", {}, left),
        html("i", { style: `background: linear-gradient(90deg, ${colors.join(", ")})` }),
        html("span", {}, right),
      );

    const meters = ({ data, unit }, type) => Array.from(Cabins.unpack(data, type), (v) => v * unit);

    // ---- (a) Eq. 1 and 2: bins, centres, and what becomes of a group

    function binsWidget(figure, demo) {
      const K = demo.cabins.length;
      const n = demo.widths.length;
      const size = n / K;
      const ends = (widths) => widths.reduce((all, b) => [...all, all[all.length - 1] + b], [0]);
      const borders = (edges) => Array.from({ length: K + 1 }, (_, k) => edges[k * size]);
      const state = { range: demo.max_depth, unit: 1, i: 0 };

      function start(widths) {
        state.edges = ends(widths).map((edge, i) => (i === n ? 1 : edge));
        state.from = borders(state.edges);
        state.to = [...state.from];
      }
      const low = demo.min_depth;
      const metres = (share) => low + (state.range - low) * share;
      const share = (depth) => (depth - low) / (state.range - low);
      const BAR = [56, 82];
      const knobAt = (k) => 32 + 13 * (k % 2); // two heights, for borders that are close
      const PLOT = [124, 264];
      let x = scale(0, 1, 0, 1);

      const own = stage("256 bins in 8 groups, and one group enlarged", 294, draw);
      const handles = Array.from({ length: K - 1 }, (_, k) =>
        handle(
          own,
          {
            name: `border of groups ${k + 1} and ${k + 2}`,
            min: () => metres(state.to[k] + 0.004),
            max: () => metres(state.to[k + 2] - 0.004),
            step: () => state.range / 200,
            at: (px) => x.back(px),
            get: () => metres(state.to[k + 1]),
            set: (depth) => {
              state.to[k + 1] = share(depth);
              own.draw();
            },
            text: () => `${fixed(metres(state.to[k + 1]), 2)} metres`,
          },
          line(0, 0, 0, BAR[1] - knobAt(k), { class: "w-stem" }),
          svg("circle", { r: 5, class: "w-knob" }),
        ),
      );
      own.root.addEventListener("pointerdown", (event) => {
        const [px, py] = own.point(event);
        if (py < BAR[0] || py > BAR[1] || event.target.closest(".w-handle")) return;
        const edges = widthsNow().edges;
        const at = share(x.back(px));
        choose(
          clamp(
            edges.findIndex((edge) => edge > at),
            1,
            n,
          ),
        );
      });

      const bin = slider("bin i", { min: 1, max: n, step: 1 }, choose);
      const numbers = readout({
        e: [[symbol("e", "k"), " by Eq. 2"], "result"],
        m: [["mean ", symbol("m", "k")], "truth w-dashed"],
        median: ["median", "other w-dotted"],
        effective: [["bins that count, 1 / Σ ", symbol("w"), "²"]],
      });
      const least = Math.min(...demo.widths) * (demo.max_depth - demo.min_depth);
      const narrow = demo.widths.filter((b) => b < 1.0001 * Math.min(...demo.widths)).length;
      const eq1 = html("p", { class: "w-sum" });
      const eq2 = html("p", { class: "w-sum" });
      const says = speech();
      fill(
        figure,
        "Bins and CaBins.",
        "Drag the seven knobs: the bins follow, and their widths still add up to 1. " +
          "Press “equal bins”, then count in centimetres, and watch the weights of Eq. 2.",
        own.place,
        bin.root,
        row(
          choice("Eq. 2 counts in", { 1: "metres", 0.01: "centimetres" }, "1", (unit) => {
            state.unit = Number(unit);
            own.draw();
          }),
          choice("depth up to", { 10: "10 m", 80: "80 m" }, String(state.range), (range) => {
            state.range = Number(range);
            own.draw();
          }),
          button("the demo’s bins", () => (start(demo.widths), own.draw())),
          button("equal bins", () => (start(Array(n).fill(1 / n)), own.draw())),
        ),
        html("div", { class: "w-sums" }, eq1, eq2),
        numbers.root,
        says,
        narrow > 1
          ? html(
              "p",
              { class: "w-note" },
              `Solid blocks in the bar are many narrow bins. In the demo ${narrow} of ${n} have the ` +
                `least width that ReLU + 0.1 leaves them, ${fixed(1000 * least, 1)} mm.`,
            )
          : undefined,
      );
      start(demo.widths);
      const { w } = Cabins.distanceClasses(demo.centers, K);
      state.i = 2 * size + 1 + w[2].indexOf(Math.max(...w[2])); // the heaviest bin of group 3

      function choose(i) {
        state.i = i;
        own.draw();
      }

      function widthsNow() {
        const still = state.to.every((border, k) => border === state.from[k]);
        const edges = still ? state.edges : Cabins.warp(state.from, state.to, state.edges);
        return { edges, b: edges.slice(1).map((edge, i) => edge - edges[i]) };
      }

      function draw(width) {
        const { edges, b } = widthsNow();
        const c = Cabins.binCenters(b, low, state.range);
        const found = Cabins.distanceClasses(c, K, state.unit);
        const k = Math.floor((state.i - 1) / size);
        x = scale(low, state.range, 8, width - 8);
        drawBar(edges, found.e, k, width);
        drawGroup(edges, c, found, k, width);
        handles.forEach((mark, j) => mark.show(x(metres(state.to[j + 1])), knobAt(j)));
        bin.input.value = state.i;
        put(bin.shown, `${state.i}, in group ${k + 1}`);
        write(b, c, found, k);
      }

      function drawBar(edges, e, k, width) {
        const [top, bottom] = BAR;
        const at = edges.map((edge) => x(metres(edge)));
        const group = (j) => ({ x: at[j * size], width: at[(j + 1) * size] - at[j * size] });
        const [left, right] = [at[k * size], at[(k + 1) * size]];
        const plot = [PLOT[0] - 8, width];
        own.back.replaceChildren(
          axisAbove(width),
          svg("path", {
            class: "w-beam",
            d: `M${left} ${bottom} L0 ${plot[0]} H${plot[1]} L${right} ${bottom} Z`,
          }),
          ...e.map((_, j) =>
            svg("rect", {
              ...group(j),
              y: top,
              height: bottom - top,
              fill: COLOR.bins,
              opacity: j === k ? 0.42 : j % 2 ? 0.2 : 0.1,
            }),
          ),
          svg("path", { class: "w-ticks", d: at.map((px) => `M${px} ${top}V${bottom}`).join("") }),
          ...e.map((value) =>
            svg("circle", { cx: x(value), cy: (top + bottom) / 2, r: 3.2, class: "w-e" }),
          ),
        );
      }

      function axisAbove(width) {
        const marks = ticks(0, state.range, clamp(width / 70, 3, 10));
        return svg(
          "g",
          { class: "w-axis" },
          marks.map(({ value, text }, i) =>
            label(x(Math.max(value, low)), 12, i === marks.length - 1 ? `${text} m` : text, {
              "text-anchor": i === 0 ? "start" : i === marks.length - 1 ? "end" : "middle",
            }),
          ),
        );
      }

      function drawGroup(edges, c, found, k, width) {
        const [top, bottom] = PLOT;
        const first = metres(edges[k * size]);
        const last = metres(edges[(k + 1) * size]);
        const across = scale(first, last, 36, width - 8);
        const most = Math.max(...found.w[k]);
        const ceiling = [0.05, 0.1, 0.2, 0.5, 1].find((value) => value * 1.01 >= most);
        const up = scale(0, ceiling, bottom, top + 6);
        const bars = found.w[k].map((w, j) => {
          const i = k * size + j;
          const from = across(metres(edges[i]));
          const to = across(metres(edges[i + 1]));
          return svg("rect", {
            class: i + 1 === state.i ? "w-bar w-chosen" : "w-bar",
            x: from + 0.5,
            width: Math.max(to - from - 1, 0.6),
            y: up(w),
            height: Math.max(bottom - up(w), 0.8),
          });
        });
        const own_c = c.slice(k * size, (k + 1) * size);
        const upright = (value, kind) =>
          line(across(value), top - 4, across(value), bottom, { class: kind });
        own.back.append(
          svg(
            "g",
            { class: "w-axis" },
            [ceiling, ceiling / 2].map((w) => [
              line(36, up(w), width - 8, up(w), { class: "w-grid" }),
              label(30, up(w) + 4, String(w), { "text-anchor": "end" }),
            ]),
            label(30, bottom, "w", { "text-anchor": "end", class: "w-symbol" }),
          ),
          ...bars,
          upright(found.m[k], "w-line w-truth w-dashed"),
          upright(found.median[k], "w-line w-other w-dotted"),
          upright(found.e[k], "w-line w-result"),
          axis(across, first, last, bottom, width, "m"),
          ...own_c.map((value, j) =>
            svg("circle", {
              class: k * size + j + 1 === state.i ? "w-dot w-chosen" : "w-dot",
              cx: across(value),
              cy: bottom,
              r: k * size + j + 1 === state.i ? 3.6 : 1.7,
            }),
          ),
        );
      }

      function write(b, c, found, k) {
        const j = state.i - 1;
        const before = Cabins.sum(b.slice(0, j));
        const w = found.w[k];
        const own_w = w[j - k * size];
        const unit = state.unit === 1 ? "m" : "cm";
        const off = Math.abs(c[j] - found.m[k]) / state.unit;
        const i = state.i;
        eq1.replaceChildren(
          ...[symbol("c", i), " = ", symbol("d", "min"), " + (", symbol("d", "max"), " − "],
          ...[symbol("d", "min"), ") (", symbol("b", i), "/2 + Σ", html("sub", {}, `j<${i}`), " "],
          ...[symbol("b", "j"), `) = ${low} + ${fixed(state.range - low, 3)} · (`],
          `${fixed(b[j] / 2, 4)} + ${fixed(before, 4)}) = ${fixed(c[j], 3)} m`,
        );
        eq2.replaceChildren(
          ...["1 / (|", symbol("c", i), " − ", symbol("m", k + 1), "| + ε) = 1 / ("],
          `${fixed(off, 4)} ${unit} + 0.0001) = ${fixed(1 / (off + 1e-4), 2)}; softmax gives `,
          ...[symbol("w", i), ` = ${weight(own_w)}`.replace("= <", "<")],
        );
        const effective = 1 / Cabins.sum(w.map((value) => value ** 2));
        numbers.show({
          e: `${fixed(found.e[k], 4)} m`,
          m: `${fixed(found.m[k], 4)} m`,
          median: `${fixed(found.median[k], 4)} m`,
          effective: `${fixed(effective, 1)} of ${size} bins`,
        });
        const [first, second, third] = [...w].sort((p, q) => q - p);
        const tops =
          `The largest weights of group ${k + 1} are ${weight(first)}, ${weight(second)} and ` +
          weight(third).replace("<", "less than");
        const nearest = effective < 1.5 ? "centre that is" : "two centres that are";
        const verdict =
          effective < 3
            ? `Eq. 2 nearly picks the ${nearest} nearest to the mean.`
            : effective > size / 2
              ? "Eq. 2 is nearly the mean: |c − m| is large in this unit, its inverse small for " +
                "all, and softmax sees little difference."
              : "Eq. 2 is something between a pick and the mean.";
        put(says, `${tops}. ${verdict}`);
      }

      const weight = (value) =>
        value >= 0.01 ? fixed(value, 3) : value >= 5e-5 ? fixed(value, 4) : "< 0.0001";
    }

    // ---- (b) The text of a distance, digit by digit

    function tokensWidget(figure, demo) {
      const MOST = 80;
      const SPAN = 20;
      const state = { number: 29999 };
      const input = html("input", {
        type: "number",
        id: unique(),
        min: 0,
        max: MOST,
        step: 0.0001,
        inputmode: "decimal",
        oninput: () => {
          const value = input.valueAsNumber;
          if (value >= 0 && value <= MOST) set(Cabins.tenths(value), true);
          else put(says, `Type a distance from 0 to ${MOST} m.`);
        },
      });
      const rows = [-1, 0, 1].map((step) => ({ step, root: html("tr") }));
      const own = stage("tokens that differ, for distances near e", 92, draw);
      const says = speech();
      const numbers = readout({
        differ: ["tokens that differ, one step up"],
        change: ["the number itself changes by"],
      });
      const head = ["distance", "text", "tokens and their ids in CLIP’s vocabulary"];
      fill(
        figure,
        "A distance becomes a text.",
        "Type a distance, or step through the fourth decimal. Marked tokens are not those of e.",
        row(
          html(
            "div",
            { class: "w-field" },
            html("label", { for: input.id }, "e, in metres"),
            input,
          ),
          button("− 0.0001", () => set(state.number - 1)),
          button("+ 0.0001", () => set(state.number + 1)),
        ),
        html(
          "table",
          { class: "w-tokens" },
          html(
            "thead",
            {},
            html(
              "tr",
              {},
              head.map((text) => html("th", { scope: "col" }, text)),
            ),
          ),
          html(
            "tbody",
            {},
            rows.map((line) => line.root),
          ),
        ),
        html(
          "p",
          { class: "w-note" },
          "Tokens that differ from those of e, for distances 2 mm below e to 2 mm above it:",
        ),
        own.place,
        numbers.root,
        html(
          "div",
          { class: "w-row w-chips" },
          html("span", { class: "w-hint" }, "the demo’s CaBins"),
          demo.texts.map((text) => button(text, () => set(Cabins.tenths(Number(text))))),
          html("span", { class: "w-hint" }, "or"),
          button("2.9999", () => set(29999)),
        ),
        says,
      );
      input.value = "2.9999";
      own.root.addEventListener("pointerdown", (event) => {
        const slot = Math.floor((own.point(event)[0] / own.width) * (2 * SPAN + 1)) - SPAN;
        set(state.number + slot);
      });

      function set(number, typed = false) {
        state.number = clamp(number, 0, MOST * 1e4);
        if (!typed) input.value = Cabins.numberText(state.number / 1e4);
        own.draw();
      }

      const idsOf = (number) => Cabins.numberTokens(number / 1e4).slice(1, -1);

      // positions at which two texts do not have the same token; the longer one counts
      function differing(number, other) {
        const [a, b] = [idsOf(number), idsOf(other)];
        const n = Math.max(a.length, b.length);
        return Array.from({ length: n }, (_, i) => a[i] !== b[i]);
      }

      function tile(name, id, kind) {
        const more = { class: `w-tile ${kind}` };
        return html("span", more, html("b", {}, name), html("small", {}, String(id)));
      }

      function fillRow({ step, root }) {
        const number = state.number + step;
        root.className = step === 0 ? "w-own" : "";
        if (number < 0 || number > MOST * 1e4) return root.replaceChildren();
        const text = Cabins.numberText(number / 1e4);
        const changed = differing(state.number, number);
        const tiles = changed.map((differs, i) => {
          const kind = step && differs ? "w-changed" : "";
          if (i < text.length) return tile(text[i], idsOf(number)[i], kind);
          return step ? tile("–", "none", `${kind} w-gone`) : []; // only the longer text goes on
        });
        const name = step === 0 ? "e" : step < 0 ? "e − 0.0001" : "e + 0.0001";
        root.replaceChildren(
          html("th", { scope: "row" }, name),
          html("td", { class: "w-text" }, `“${text}”`),
          html(
            "td",
            { class: "w-cell" },
            html(
              "div",
              { class: "w-tiles" },
              tile("start", 49406, "w-end"),
              tile("p₁…p₈", "learnt", "w-end w-context"),
              tiles,
              tile("end", 49407, "w-end"),
            ),
          ),
        );
      }

      function draw(width) {
        rows.forEach(fillRow);
        const slot = width / (2 * SPAN + 1);
        const marks = [];
        for (let step = -SPAN; step <= SPAN; step++) {
          const other = state.number + step;
          if (other < 0 || other > MOST * 1e4) continue;
          const n = differing(state.number, other).filter(Boolean).length;
          const left = (step + SPAN) * slot;
          marks.push(
            svg("rect", {
              class: "w-bar",
              x: left + 1,
              width: slot - 2,
              y: 66 - 9 * n,
              height: Math.max(9 * n, 1),
              opacity: step === 0 ? 1 : 0.75,
            }),
          );
          if (slot > 8 && n) {
            const more = { "text-anchor": "middle", class: "w-small" };
            marks.push(label(left + slot / 2, 62 - 9 * n, String(n), more));
          }
        }
        const x = scale(-SPAN / 10, SPAN / 10, slot / 2, width - slot / 2);
        own.back.replaceChildren(...marks, axis(x, -SPAN / 10, SPAN / 10, 68, width, "mm"));
        write();
      }

      function write() {
        const above = Math.min(state.number + 1, MOST * 1e4);
        const [text, next] = [state.number, above].map((number) => Cabins.numberText(number / 1e4));
        const changed = differing(state.number, above);
        const n = changed.filter(Boolean).length;
        const percent = state.number ? (100 / state.number).toPrecision(1) : "–";
        numbers.show({
          differ: `${n} of ${changed.length}`,
          change: `0.1 mm, ${Number(percent) ? Number(percent) : percent} % of e`,
        });
        const shared = [...next].filter((_, i) => !changed[i]);
        const what =
          shared.length === 0
            ? "no token"
            : shared.length === 1 && shared[0] === "."
              ? "only the point"
              : `${count(shared.length, "token")}, “${shared.join("")}”`;
        put(
          says,
          above === state.number
            ? ""
            : `“${text}” and “${next}” are 0.1 mm apart. They share ${what}.`,
        );
      }
    }

    // ---- (c) Eq. 5 at a pixel

    function pixelWidget(figure, demo) {
      const [rows, columns] = demo.p.size;
      const n = demo.centers.length;
      const bytes = Cabins.unpack(demo.p.data, "Uint8Array");
      const truth = meters(demo.truth, "Uint16Array");
      const [H, W] = demo.size;
      const [h, w] = demo.depth.size;
      const c = demo.centers;
      // where in the picture the middle of a decoder's pixel lies: corners lie on corners
      const along = (i, small, large) => Math.round((i * demo.p.step * (large - 1)) / (small - 1));
      const spreads = Array.from({ length: rows * columns }, (_, place) =>
        Cabins.std(c, Cabins.probabilities(bytes, place, n)),
      );
      const inside = spreads
        .map((_, i) => i)
        .filter((i) => {
          const [r, q] = [Math.floor(i / columns), i % columns];
          return r > 1 && r < rows - 2 && q > 1 && q < columns - 2;
        });
      const extreme = (better) => inside.reduce((a, b) => (better(spreads[b], spreads[a]) ? b : a));
      const state = { place: extreme((a, b) => a > b) };

      const image = html("img", { src: demo.picture, alt: "", draggable: "false" });
      const cross = html("span", {
        class: "w-cross",
        tabindex: 0,
        role: "slider",
        "aria-label": "pixel; arrow keys move it",
        "aria-valuemin": 0,
        "aria-valuemax": rows * columns - 1,
        onkeydown: (event) => {
          const steps = {
            ArrowLeft: [0, -1],
            ArrowRight: [0, 1],
            ArrowUp: [-1, 0],
            ArrowDown: [1, 0],
          };
          if (!(event.key in steps)) return;
          event.preventDefault();
          const [r, q] = steps[event.key];
          go(Math.floor(state.place / columns) + r, (state.place % columns) + q);
        },
      });
      const photo = html("div", { class: "w-photo" }, image, cross);
      const follow = (event) => {
        const box = photo.getBoundingClientRect();
        const y = ((event.clientY - box.top) / box.height) * H - 0.5;
        const x = ((event.clientX - box.left) / box.width) * W - 0.5;
        const at = (pixel, small, large) =>
          Math.round((pixel * (small - 1)) / (large - 1) / demo.p.step);
        go(at(y, h, H), at(x, w, W));
      };
      photo.addEventListener("pointermove", (event) => {
        if (event.pointerType === "mouse" || event.buttons) follow(event);
      });
      photo.addEventListener("pointerdown", follow);

      const own = stage("p over the bins at the pixel", 224, draw);
      const numbers = readout({
        depth: ["d = Σ c p, Eq. 5", "result"],
        spread: ["spread of p", "result w-thick"],
        truth: ["true depth", "truth w-dashed"],
        error: ["d − true"],
      });
      const says = speech();
      const views = { picture: "picture", depth_png: "predicted", truth_png: "true" };
      fill(
        figure,
        "One pixel.",
        "Move over the picture, or focus the cross and use the arrow keys. " +
          "Depth is the point on which the probabilities balance.",
        html(
          "div",
          { class: "w-pair" },
          html("div", {}, photo, gradient(demo.colors, "0 m", `${demo.shown_depth} m`)),
          own.place,
        ),
        numbers.root,
        row(
          choice("show", views, "picture", (view) => {
            image.src = demo[view];
            photo.classList.toggle("w-smooth", view !== "picture");
          }),
          button("least sure pixel", () => goTo(extreme((a, b) => a > b))),
          button("surest pixel", () => goTo(extreme((a, b) => a < b))),
        ),
        says,
      );

      function go(r, q) {
        goTo(clamp(r, 0, rows - 1) * columns + clamp(q, 0, columns - 1));
      }

      function goTo(place) {
        state.place = place;
        own.draw();
      }

      function draw(width) {
        const p = Cabins.probabilities(bytes, state.place, n);
        const [row_, column] = [Math.floor(state.place / columns), state.place % columns];
        const [y, x] = [along(row_, h, H), along(column, w, W)];
        const found = {
          depth: Cabins.expectedDepth(c, p),
          spread: Cabins.std(c, p),
          truth: truth[y * W + x],
        };
        cross.style.left = `${(100 * (x + 0.5)) / W}%`;
        cross.style.top = `${(100 * (y + 0.5)) / H}%`;
        drawChart(p, found, width);
        const place = `Row ${y + 1} of ${H}, column ${x + 1} of ${W}`;
        cross.setAttribute("aria-valuenow", state.place);
        cross.setAttribute("aria-valuetext", `${place}: ${fixed(found.depth, 2)} metres`);
        numbers.show({
          depth: `${fixed(found.depth, 3)} m`,
          spread: `${fixed(found.spread, 3)} m`,
          truth: `${fixed(found.truth, 3)} m`,
          error: `${signed(found.depth - found.truth, 3)} m`,
        });
        const near = Cabins.sum(p.filter((_, k) => Math.abs(c[k] - found.depth) < 0.5));
        const hint =
          near < 0.25
            ? " The mean lies where p itself has little: between two depths that are possible."
            : "";
        put(says, `${place}. Within 0.5 m of d lie ${Math.round(100 * near)} % of p.${hint}`);
      }

      function drawChart(p, found, width) {
        const [top, bottom] = [22, 168];
        const x = scale(demo.min_depth, demo.max_depth, 34, width - 8);
        const most = Math.max(...p);
        const ceiling =
          [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].find((v) => v >= most * 0.999) || 1;
        const up = scale(0, ceiling, bottom, top + 4);
        const d = x(found.depth);
        const [from, to] = [-1, 1].map((side) =>
          clamp(x(found.depth + side * found.spread), 34, width - 8),
        );
        own.back.replaceChildren(
          svg(
            "g",
            { class: "w-axis" },
            [ceiling, ceiling / 2].map((v) => [
              line(34, up(v), width - 8, up(v), { class: "w-grid" }),
              label(29, up(v) + 4, String(v), { "text-anchor": "end" }),
            ]),
            label(29, bottom, "p", { "text-anchor": "end", class: "w-symbol" }),
          ),
          svg("path", {
            class: "w-stems",
            d: c
              .map((center, k) => `M${x(center).toFixed(1)} ${bottom}V${up(p[k]).toFixed(1)}`)
              .join(""),
          }),
          line(x(found.truth), top - 8, x(found.truth), bottom, {
            class: "w-line w-truth w-dashed",
          }),
          label(x(found.truth), top - 11, "true", {
            "text-anchor": x(found.truth) > width - 30 ? "end" : "middle",
          }),
          axis(x, demo.min_depth, demo.max_depth, bottom, width, "m"),
          line(from, bottom + 28, to, bottom + 28, { class: "w-line w-result w-thick" }),
          svg("path", {
            class: "w-fulcrum",
            d: `M${d} ${bottom + 1} l7 12 h-14 Z M${d} ${bottom + 13} v15`,
          }),
          label(clamp(d, 40, width - 60), bottom + 46, `d = ${fixed(found.depth, 2)} m`, {
            "text-anchor": "middle",
            class: "w-strong",
          }),
        );
      }
    }

    // ---- (d) Eq. 4: eight similarity maps, and the text silenced

    function mapsWidget(figure, demo) {
      const [rows, columns] = demo.similarity.size;
      const maps = demo.similarity.values;
      const [H, W] = demo.size;
      const stops = demo.colors.map(channels);
      const depth = meters(demo.depth, "Uint16Array");
      const change = meters(demo.silenced.difference, "Int16Array");
      const all = maps.flat();
      const state = { k: 0, scale: "one", view: "with" };
      const signs = ["#0072b2", "#f4f4f4", "#d55e00"];
      let grey = new Float32Array(W * H).fill(160);

      const options = maps.map((_, k) => {
        const canvas = html("canvas", { "aria-hidden": "true" });
        const input = html("input", {
          type: "radio",
          name: figure.id || "maps",
          value: k,
          checked: k === 0 && "",
          onchange: () => {
            state.k = k;
            draw();
          },
        });
        const name = html("span", {}, demo.texts[k]);
        return { canvas, root: html("label", {}, input, canvas, name) };
      });
      const large = html("canvas", { role: "img", "aria-label": "" });
      const view = html("canvas", { role: "img", "aria-label": "" });
      const [legend, depthLegend] = [html("div"), html("div")];
      const numbers = readout({
        range: ["s of this text"],
        here: ["depth moved: mean, most"],
        rooms: [`in all ${demo.silenced.n_rooms} test rooms`],
        metric: ["AbsRel with s; with s = 0"],
      });
      const says = speech();
      fill(
        figure,
        "Eight similarity maps, and silence.",
        "Choose a text to see how much each place in the image is like it. " +
          "Then set s to 0: the depth decoder gets no text at all.",
        html(
          "fieldset",
          { class: "w-maps" },
          html("legend", {}, "text of each ", symbol("e", "k"), ", in metres"),
          options.map((o) => o.root),
        ),
        html(
          "div",
          { class: "w-pair" },
          html("div", {}, html("div", { class: "w-photo" }, large), legend),
          html("div", {}, html("div", { class: "w-photo" }, view), depthLegend),
        ),
        row(
          choice(
            "colours of s",
            { one: "one scale for all", own: "each its own" },
            "one",
            (value) => {
              state.scale = value;
              draw();
            },
          ),
          choice(
            "depth",
            { with: "with s", without: "s = 0", difference: "difference" },
            "with",
            (value) => {
              state.view = value;
              draw();
            },
          ),
        ),
        numbers.root,
        says,
        html(
          "p",
          { class: "w-note" },
          "Nothing in the loss asks s to mean anything, and this network’s text encoder is random. " +
            "So of the paper’s network this proves nothing; its weights have to be measured.",
        ),
      );
      const photo = new Image();
      photo.src = demo.picture;
      photo.decode().then(() => {
        const canvas = html("canvas", { width: W, height: H });
        const context = canvas.getContext("2d", { willReadFrequently: true });
        context.drawImage(photo, 0, 0);
        const { data } = context.getImageData(0, 0, W, H);
        grey = grey.map(
          (_, i) => 0.3 * data[4 * i] + 0.59 * data[4 * i + 1] + 0.11 * data[4 * i + 2],
        );
        draw();
      });
      draw();

      // z has one place for each 32 x 32 pixels, so a map has as few cells
      function paintMap(canvas, k, strength) {
        const values = state.scale === "one" ? all : maps[k];
        const [low, high] = [Math.min(...values), Math.max(...values)];
        paint(canvas, W, H, (i) => {
          const cell =
            Math.floor((Math.floor(i / W) * rows) / H) * columns +
            Math.floor(((i % W) * columns) / W);
          const color = between(stops, (maps[k][cell] - low) / (high - low));
          return color.map((value) => strength * value + (1 - strength) * (40 + 0.8 * grey[i]));
        });
        return [low, high];
      }

      function draw() {
        options.forEach(({ canvas }, k) => paintMap(canvas, k, 0.75));
        const [low, high] = paintMap(large, state.k, 0.62);
        const own = maps[state.k];
        const text = demo.texts[state.k];
        large.setAttribute(
          "aria-label",
          `similarity of the text ${text} to each of ${rows} x ${columns} places`,
        );
        legend.replaceChildren(gradient(demo.colors, fixed(low, 3), fixed(high, 3)));
        drawDepth();
        const { silenced } = demo;
        numbers.show({
          range: `${fixed(Math.min(...own), 3)} to ${fixed(Math.max(...own), 3)}`,
          here: `${fixed(silenced.mean_mm, 1)}, ${fixed(silenced.max_mm, 1)} mm`,
          rooms: `${fixed(silenced.all_mean_mm, 1)}, ${fixed(silenced.all_max_mm, 1)} mm`,
          metric: [silenced.metrics.whole, silenced.metrics["s = 0"]]
            .map((metrics) => fixed(metrics.abs_rel, 4))
            .join("; "),
        });
        const seen = {
          with: "depth as it is",
          without: "depth with s = 0",
          difference: "depth with s = 0, minus depth",
        };
        put(
          says,
          `“${text}”: its map and the mean of the other seven have a correlation of ` +
            `${fixed(likeness(state.k), 2)}. On the right: ${seen[state.view]}.`,
        );
      }

      // correlation of a map with the mean of the others: 1 says that it has their pattern
      function likeness(k) {
        const others = maps[k].map((_, i) => Cabins.sum(maps.map((m, j) => (j === k ? 0 : m[i]))));
        const [a, b] = [maps[k], others].map((values) => {
          const mean = Cabins.mean(values);
          return values.map((value) => value - mean);
        });
        const dot = (x, y) => Cabins.sum(x.map((value, i) => value * y[i]));
        return dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
      }

      function drawDepth() {
        const [h, w] = demo.depth.size;
        const top = demo.silenced.max_mm / 1000;
        const [signal, names] = [
          signs.map(channels),
          { with: "depth", without: "depth with s = 0", difference: "difference" },
        ];
        paint(view, w, h, (i) => {
          if (state.view === "difference") return between(signal, 0.5 + change[i] / top / 2);
          const value = depth[i] + (state.view === "without" ? change[i] : 0);
          return between(stops, value / demo.shown_depth);
        });
        view.setAttribute("aria-label", names[state.view]);
        view.parentNode.classList.add("w-smooth");
        const most = fixed(demo.silenced.max_mm, 1);
        depthLegend.replaceChildren(
          state.view === "difference"
            ? gradient(signs, `−${most} mm`, `+${most} mm`)
            : gradient(demo.colors, "0 m", `${demo.shown_depth} m`),
        );
      }
    }

    // ---- (e) Eq. 6: errors of a few pixels

    function silogWidget(figure) {
      const FIRST = [0.16, -0.08, 0.05, 0.21, -0.17, 0.1, -0.02, 0.13];
      const LIMIT = 1.2;
      const FACTOR = Math.log(1.3);
      const state = { g: [...FIRST], lambda: 0.85, before: null };
      const [TOP, BOTTOM] = [14, 206];
      const y = scale(-LIMIT, LIMIT, BOTTOM, TOP);
      let x = scale(0, 1, 0, 1);

      const own = stage("error g of eight pixels", 226, drawErrors);
      const curve = stage("loss over λ", 226, drawCurve);
      const bar = stage("what stands under the root", 64, drawBar);
      const handles = FIRST.map((_, i) =>
        handle(
          own,
          {
            name: `g of pixel ${i + 1}`,
            vertical: true,
            min: () => -LIMIT,
            max: () => LIMIT,
            step: () => 0.01,
            at: (_, py) => y.back(py),
            get: () => state.g[i],
            set: (value) => {
              state.g[i] = Math.round(value * 100) / 100;
              state.before = null;
              draw();
            },
            text: () =>
              `${fixed(state.g[i], 2)}: depth is ${fixed(Math.exp(state.g[i]), 2)} times the truth`,
          },
          svg("circle", { r: 6, class: "w-knob" }),
        ),
      );
      const lambda = slider("λ", { min: 0, max: 1, step: 0.01, value: 0.85 }, (value) => {
        state.lambda = value;
        draw();
      });
      const numbers = readout({
        variance: ["variance of g", "block-bins"],
        left: ["(1 − λ) · mean²", "block-result"],
        forgiven: ["λ · mean², forgiven", "block-none"],
        loss: [["loss ", symbol("L", "pixel")], "result w-round"],
      });
      const grow = button("all depths × 1.3", () => shift(FACTOR));
      const shrink = button("all depths ÷ 1.3", () => shift(-FACTOR));
      const says = speech();
      fill(
        figure,
        "What λ forgives.",
        "Drag the errors g = log d − log d* of eight pixels. Then make all depths 1.3 times as " +
          "large, and move λ from 0 to 1.",
        html("div", { class: "w-pair w-uneven" }, own.place, curve.place),
        bar.place,
        lambda.root,
        numbers.root,
        row(
          grow,
          shrink,
          button("back to the start", () => {
            Object.assign(state, { g: [...FIRST], before: null });
            draw();
          }),
        ),
        says,
      );

      function shift(by) {
        state.before = { g: [...state.g], name: by > 0 ? "× 1.3" : "÷ 1.3" };
        state.g = state.g.map((value) => value + by);
        draw();
      }

      function draw() {
        own.draw();
        curve.draw();
        bar.draw();
      }

      function drawErrors(width) {
        const { mean } = Cabins.silog(state.g, state.lambda);
        x = scale(0, state.g.length - 1, 62, width - 62);
        const marks = [-1, -0.5, 0, 0.5, 1];
        own.back.replaceChildren(
          svg(
            "g",
            { class: "w-axis" },
            marks.map((g) => [
              line(34, y(g), width - 40, y(g), { class: g ? "w-grid" : "" }),
              label(28, y(g) + 4, fixed(g, 1), { "text-anchor": "end" }),
              label(width - 34, y(g) + 4, `×${fixed(Math.exp(g), 2)}`),
            ]),
            label(28, TOP - 2, "g", { "text-anchor": "end", class: "w-symbol" }),
            label(width - 34, TOP - 2, "d / d*"),
          ),
          line(34, y(mean), width - 40, y(mean), { class: "w-line w-result w-dashed" }),
          ...state.g.map((g, i) => line(x(i), y(0), x(i), y(g), { class: "w-stem-g" })),
          label(width / 2, BOTTOM + 17, `mean of g ${signed(mean, 3)} (dashed)`, {
            "text-anchor": "middle",
          }),
        );
        handles.forEach((mark, i) => mark.show(x(i), y(state.g[i])));
        write();
      }

      function drawCurve(width) {
        const losses = (g) => Array.from({ length: 51 }, (_, i) => Cabins.silog(g, i / 50).loss);
        const [now, old] = [losses(state.g), state.before && losses(state.before.g)];
        const top = ticks(0, Math.max(now[0], old ? old[0] : 0, 1) * 1.05, 4);
        const step = top[1].value;
        const ceiling = step * Math.ceil(Math.max(now[0], old ? old[0] : 0, 1) / step);
        const across = scale(0, 1, 30, width - 10);
        const up = scale(0, ceiling, BOTTOM, TOP + 6);
        const path = (values) =>
          "M" + values.map((v, i) => `${across(i / 50).toFixed(1)} ${up(v).toFixed(1)}`).join("L");
        const { loss } = Cabins.silog(state.g, state.lambda);
        curve.back.replaceChildren(
          svg(
            "g",
            { class: "w-axis" },
            ticks(0, ceiling, 4).map(({ value, text }) => [
              line(30, up(value), width - 10, up(value), { class: value ? "w-grid" : "" }),
              label(24, up(value) + 4, text, { "text-anchor": "end" }),
            ]),
            [0, 0.5, 1].map((v) =>
              label(across(v), BOTTOM + 17, String(v), { "text-anchor": "middle" }),
            ),
            label(30, TOP - 2, "loss"),
            label(across(0.75), BOTTOM + 17, "λ", { "text-anchor": "middle", class: "w-symbol" }),
          ),
          ...(old ? [svg("path", { d: path(old), class: "w-line w-ghost" })] : []),
          svg("path", { d: path(now), class: "w-line w-curve" }),
          svg("circle", { cx: across(state.lambda), cy: up(loss), r: 5, class: "w-e" }),
        );
      }

      function drawBar(width) {
        const { variance, left, forgiven } = Cabins.silog(state.g, state.lambda);
        const total = variance + left + forgiven;
        const ceiling = [0.05, 0.1, 0.2, 0.5, 1, 2].find((value) => value >= total) || 2;
        const across = scale(0, ceiling, 8, width - 8);
        const part = (from, size, kind) =>
          svg("rect", {
            x: across(from),
            width: across(size) - across(0),
            y: 22,
            height: 16,
            class: kind,
          });
        bar.back.replaceChildren(
          part(0, variance, "w-block-bins"),
          part(variance, left, "w-block-result"),
          part(variance + left, forgiven, "w-block-none"),
          label(8, 13, "mean of g² = variance + squared mean"),
          axis(across, 0, ceiling, 44, width, ""),
        );
      }

      function write() {
        const now = Cabins.silog(state.g, state.lambda);
        lambda.input.value = state.lambda;
        put(lambda.shown, fixed(state.lambda, 2) + (state.lambda === 0.85 ? ", the paper’s" : ""));
        numbers.show({
          variance: fixed(now.variance, 4),
          left: fixed(now.left, 4),
          forgiven: fixed(now.forgiven, 4),
          loss: fixed(now.loss, 3),
        });
        grow.disabled = Math.max(...state.g) + FACTOR > LIMIT;
        shrink.disabled = Math.min(...state.g) - FACTOR < -LIMIT;
        const at = (g, value) => fixed(Cabins.silog(g, value).loss, 2);
        const text = state.before
          ? `All depths ${state.before.name}: the variance stays. The loss goes from ` +
            `${at(state.before.g, state.lambda)} to ${at(state.g, state.lambda)}; with λ = 0 from ` +
            `${at(state.before.g, 0)} to ${at(state.g, 0)}, with λ = 1 it stays ${at(state.g, 1)}.`
          : `The mean of g² is ${fixed(now.variance + now.mean ** 2, 4)}. λ takes ` +
            `${fixed(now.forgiven, 4)} of it off, ${Math.round(100 * state.lambda)} % of the squared mean.`;
        put(says, text);
      }
    }

    // ---- (f) Eq. 7: depths and centres on one line

    function chamferWidget(figure) {
      const FIRST = { x: [0.9, 1.3, 1.6, 3.3, 3.6, 5.8], c: [0.6, 2.2, 4.3, 7.2, 8.8] };
      const HIGH = 10;
      const state = { x: [...FIRST.x], c: [...FIRST.c] };
      const LINE = 104;
      let across = scale(0, HIGH, 0, 1);

      const own = stage("true depths above a line, bin centres below it", 230, draw);
      const mark = (key, title, y, i, shape) =>
        handle(
          own,
          {
            name: `${title} ${i + 1}`,
            min: () => 0,
            max: () => HIGH,
            step: () => 0.05,
            at: (px) => across.back(px),
            get: () => state[key][i],
            set: (value) => {
              state[key][i] = value;
              own.draw();
            },
            text: () => `${fixed(state[key][i], 2)} metres`,
          },
          shape,
        );
      const circle = () => svg("circle", { r: 6, class: "w-knob w-knob-truth" });
      const diamond = () =>
        svg("path", { d: "M0 -7 L7 0 L0 7 L-7 0 Z", class: "w-knob w-knob-bins" });
      const depths = FIRST.x.map((_, i) => mark("x", "true depth", 0, i, circle()));
      const centers = FIRST.c.map((_, i) => mark("c", "bin centre", 0, i, diamond()));
      const numbers = readout({
        toCenters: ["chamfer(X, c)", "truth"],
        toDepths: ["chamfer(c, X)", "bins"],
        loss: [[symbol("L", "bins"), ", their sum"]],
        total: [["β ", symbol("L", "bins"), ", in Eq. 8"]],
      });
      const says = speech();
      fill(
        figure,
        "Chamfer.",
        "Drag true depths (circles) and bin centres (diamonds). Arcs lead to the nearest of the " +
          "other kind. Then let the centres step downhill.",
        own.place,
        numbers.root,
        row(
          button("one step downhill", () => descend(1)),
          button("twenty steps", () => descend(20)),
          button("back to the start", () => {
            Object.assign(state, { x: [...FIRST.x], c: [...FIRST.c] });
            own.draw();
          }),
        ),
        says,
      );

      function descend(steps) {
        for (let i = 0; i < steps; i++) state.c = Cabins.chamferStep(state.x, state.c, 0.4);
        own.draw();
      }

      function arc(from, to, side, kind) {
        const [a, b] = [across(from), across(to)];
        const y = LINE + side * 12;
        const top = y + side * Math.min(10 + Math.abs(a - b) * 0.5, 78);
        // it leaves the mark, and ends on the line
        return svg("path", {
          class: `w-line ${kind}`,
          d: `M${a} ${y} C${a} ${top} ${b} ${top} ${b} ${LINE}`,
        });
      }

      function draw(width) {
        across = scale(0, HIGH, 12, width - 12);
        const found = Cabins.chamfer(state.x, state.c);
        own.back.replaceChildren(
          ...state.x.map((x, i) => arc(x, state.c[found.ofDepths[i]], -1, "w-truth")),
          ...state.c.map((c, j) => arc(c, state.x[found.ofCenters[j]], 1, "w-bins")),
          line(12, LINE, width - 12, LINE, { class: "w-axis-line" }),
          axis(across, 0, HIGH, 206, width, "m"),
          label(12, 12, "true depths X: each to its nearest centre"),
          label(12, 194, "bin centres c: each to its nearest depth"),
        );
        depths.forEach((handle_, i) => handle_.show(across(state.x[i]), LINE - 10));
        centers.forEach((handle_, j) => handle_.show(across(state.c[j]), LINE + 10));
        numbers.show({
          toCenters: `${fixed(found.toCenters, 3)} m²`,
          toDepths: `${fixed(found.toDepths, 3)} m²`,
          loss: `${fixed(found.loss, 3)} m²`,
          total: fixed(0.1 * found.loss, 3),
        });
        const idle = state.c.filter((_, j) => !found.ofDepths.includes(j)).length;
        const text = idle
          ? `${count(idle, "centre is", "centres are")} nearest to no depth. Only the second sum moves ${idle === 1 ? "it" : "them"}.`
          : "Every centre is some depth’s nearest: both sums move it.";
        put(says, text);
      }
    }

    // ---- Start

    const WIDGETS = {
      bins: binsWidget,
      tokens: tokensWidget,
      pixel: pixelWidget,
      maps: mapsWidget,
    };
    Object.assign(WIDGETS, { silog: silogWidget, chamfer: chamferWidget });

    document.addEventListener("DOMContentLoaded", () => {
      const demo = JSON.parse(document.getElementById("demo").textContent);
      for (const figure of document.querySelectorAll("figure[data-widget]")) {
        WIDGETS[figure.dataset.widget](figure, demo);
      }
    });
  })();
}
