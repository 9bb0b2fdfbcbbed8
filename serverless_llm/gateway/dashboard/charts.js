// Throughput and latency of the last minutes. The caption says in words what the latest points are.

import uPlot from "./vendor/uPlot.esm.js";
import { byId, el, put, Rows, say } from "./dom.js";
import { clock, milliseconds, number } from "./format.js";

const HEIGHT = 180;

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function axis(more) {
  const grid = { stroke: color("line"), width: 1 };
  return { stroke: color("muted"), grid, ticks: grid, font: "12px system-ui, sans-serif", ...more };
}

const TIMES = { size: 30, space: 60, values: (_chart, ticks) => ticks.map((tick) => clock(tick, "minute")) };

const line = (label, name, more = {}) => ({
  label,
  stroke: color(name),
  width: 2,
  points: { show: true, size: 5, fill: color(name) },
  ...more,
});

/** Whole decades around what is there: a warm request and a cold start fit on one chart. */
function decades(_chart, least, most) {
  if (least === null || most === null) return [1, 1000];
  const low = 10 ** Math.floor(Math.log10(Math.max(least, 0.01)));
  return [low, Math.max(10 ** Math.ceil(Math.log10(Math.max(most, 0.01))), 10 * low)];
}

const decade = (tick) => (tick < 1000 ? `${tick} ms` : `${tick / 1000} s`);

function everyDecade(_chart, _axis, least, most) {
  const count = Math.round(Math.log10(most / least));
  return Array.from({ length: count + 1 }, (_, place) => Number((least * 10 ** place).toPrecision(3)));
}

const THROUGHPUT = {
  title: "Throughput",
  columns: ["tokens_per_s"],
  series: () => [line("tokens/s", "chart-1", { fill: color("chart-fill"), points: { show: false } })],
  scale: { range: (_chart, _least, most) => [0, Math.max(1, (most ?? 0) * 1.1)] },
  axis: { size: 50, values: (_chart, ticks) => ticks.map(number) },
  words: (last) => [
    `${number(last("tokens_per_s"))} tokens/s`,
    `${number(last("requests_per_s"))} requests/s`,
    `${number(last("errors_per_s"))} errors/s`,
  ],
};

const LATENCY = {
  title: "Latency",
  columns: ["first_token_p50_ms", "first_token_p95_ms", "token_gap_p50_ms"],
  series: () => [
    line("first token P50", "chart-1"),
    line("first token P95", "chart-2", { dash: [6, 3] }),
    line("between tokens P50", "chart-3", { dash: [2, 2] }),
  ],
  scale: { distr: 3, range: decades },
  axis: { size: 64, splits: everyDecade, filter: (_chart, ticks) => ticks, values: (_chart, ticks) => ticks.map(decade) },
  words: (_last, known) => [
    `first token P50 ${milliseconds(known("first_token_p50_ms"))}`,
    `first token P95 ${milliseconds(known("first_token_p95_ms"))}`,
    `between tokens P50 ${milliseconds(known("token_gap_p50_ms"))}`,
  ],
};

class Chart {
  constructor(figure, kind) {
    this.kind = kind;
    const list = el("ul", { class: "legend", "aria-label": kind.title });
    figure.querySelector("figcaption").append(list);
    this.keys = new Rows(list, (key) => key.place, ({ place }) => {
      const root = el("li", { class: place < kind.columns.length ? `line-${place + 1}` : "plain" });
      return { root, update: (key) => say(root, key.text) };
    });
    this.place = figure.querySelector(".chart");
    this.data = [[], ...kind.columns.map(() => [])];
    this.plot = null;
    new ResizeObserver(() => this.resize()).observe(this.place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.build());
  }

  build() {
    this.plot?.destroy();
    const { kind } = this;
    const options = {
      width: this.place.clientWidth || 400,
      height: HEIGHT,
      legend: { show: false },
      padding: [12, 28, 0, 0],
      cursor: { drag: { x: false, y: false } },
      scales: { x: { time: true }, y: kind.scale },
      axes: [axis(TIMES), axis(kind.axis)],
      series: [{}, ...kind.series()],
    };
    this.plot = new uPlot(options, this.data, this.place);
  }

  resize() {
    const width = this.place.clientWidth;
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  show(times, traffic) {
    this.data = [times, ...this.kind.columns.map((name) => traffic[name])];
    if (this.plot) this.plot.setData(this.data);
    else this.build();
    const words = this.kind.words(
      (name) => traffic[name].at(-1),
      (name) => traffic[name].findLast((value) => value !== null) ?? null,
    );
    this.keys.show(words.map((text, place) => ({ place, text })));
    put(this.place, "aria-label", `${this.kind.title} over the last five minutes; now ${words.join(", ")}`);
  }
}

export class Charts {
  constructor() {
    this.charts = [new Chart(byId("throughput"), THROUGHPUT), new Chart(byId("latency"), LATENCY)];
  }

  show(traffic) {
    const count = traffic.tokens_per_s.length;
    const last = Date.now() / 1000 - traffic.age_s - traffic.step_s / 2;
    const times = Array.from({ length: count }, (_, place) => last - (count - 1 - place) * traffic.step_s);
    for (const chart of this.charts) chart.show(times, traffic);
  }
}
