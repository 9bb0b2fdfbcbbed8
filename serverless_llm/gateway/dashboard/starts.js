// Cold starts as stacked phases: those that go on, then the last that were.

import { byId, el, put, Rows, say, Stack } from "./dom.js";
import { clock, seconds } from "./format.js";

const PHASES = ["queue", "remote", "disk", "upload", "prefill"];
const SHOWN = 12;
const DOING = { claiming: "waiting for room", reserving: "waiting for room", loading: "loading" };

export class Starts {
  constructor() {
    this.rows = new Rows(byId("starts-table").tBodies[0], (start) => start.replica, () => startRow());
  }

  show(starts) {
    const shown = starts.slice(0, SHOWN);
    const longest = Math.max(...shown.map((start) => extent(start)), 1e-9);
    this.rows.show(shown.map((start) => ({ ...start, share: extent(start) / longest })));
    byId("starts-empty").hidden = shown.length > 0;
  }
}

/** Seconds that its bar stands for: of one that goes on, at least what is predicted. */
const extent = (start) => (start.phases ? start.seconds : Math.max(start.seconds, start.predicted_s));

function startRow() {
  const cells = ["model", "device", "from", "bar", ...PHASES, "total", "predicted", "began"].map((key) => {
    const numeric = !["model", "device", "from", "bar"].includes(key);
    return [key, key === "model" ? el("th", { scope: "row" }) : el("td", { class: numeric ? "number" : "" })];
  });
  const cell = Object.fromEntries(cells);
  const stack = new Stack([...PHASES, "ahead"]);
  cell.bar.append(stack.root);
  const root = el("tr", {}, ...cells.map(([, made]) => made));
  const update = (start) => {
    const phases = phasesOf(start);
    put(root, "class", start.phases ? null : "live");
    say(cell.model, start.model);
    say(cell.device, start.device);
    say(cell.from, start.source === "dram" ? "DRAM" : (start.source ?? DOING[start.state]));
    stack.show(phases, start.share);
    for (const name of PHASES) say(cell[name], start.phases ? seconds(start.phases[`${name}_s`]) : "…");
    say(cell.total, seconds(start.seconds));
    say(cell.predicted, seconds(start.predicted_s));
    say(cell.began, clock(start.began));
  };
  return { root, update };
}

/** Widths of the bar's parts. One that goes on shows what its bytes say: read, and still ahead. */
function phasesOf(start) {
  if (start.phases) return Object.fromEntries(PHASES.map((name) => [name, start.phases[`${name}_s`] ?? 0]));
  const whole = extent(start);
  if (start.state !== "loading") return { queue: start.seconds, ahead: whole - start.seconds };
  const done = whole * (start.done / Math.max(1, start.total));
  return { disk: done, ahead: whole - done };
}
