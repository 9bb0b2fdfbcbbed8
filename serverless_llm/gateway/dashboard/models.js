// The table of models: what each is doing, and what can be done about it.

import { byId, el, put, Rows, say } from "./dom.js";
import { bytes, span } from "./format.js";

const EMPTY = "No model is deployed. Deploy one here, or with: serverless-llm deploy NAME SOURCE";

/** `act(action, model)`: called for load, unload, pin, unpin and remove. */
export class Models {
  constructor(act) {
    this.act = act;
    this.models = [];
    this.rows = new Rows(byId("models-table").tBodies[0], (model) => model.name, (model) => this.row(model));
    this.filter = byId("filter");
    this.filter.addEventListener("input", () => this.draw());
  }

  show(models) {
    this.models = models;
    this.draw();
  }

  has(name) {
    return this.models.some((model) => model.name === name);
  }

  draw() {
    const wanted = this.filter.value.trim().toLowerCase();
    const shown = this.models.filter((model) => model.name.toLowerCase().includes(wanted));
    this.rows.show(shown);
    const empty = byId("models-empty");
    empty.hidden = shown.length > 0;
    say(empty, this.models.length ? `No model's name contains “${this.filter.value}”.` : EMPTY);
  }

  row({ name }) {
    const cells = Object.fromEntries(
      ["state", "tier", "device", "size", "running", "waiting", "until"].map((key) => [key, el("td")]),
    );
    for (const key of ["size", "running", "waiting", "until"]) cells[key].className = "number";
    const state = new StateCell(cells.state, name);
    const buttons = new Buttons(name, (action) => this.act(action, name));
    const root = el("tr", {}, el("th", { scope: "row" }, name), ...Object.values(cells), buttons.root);
    const update = (model) => {
      put(root.cells[0], "title", model.url || model.source);
      state.update(model);
      say(cells.tier, model.tier === "dram" ? "DRAM" : model.tier);
      say(cells.device, model.devices.join(", ") || "–");
      say(cells.size, bytes(model.bytes));
      say(cells.running, String(model.running));
      say(cells.waiting, String(model.waiting));
      say(cells.until, leaves(model));
      buttons.update(model);
    };
    return { root, update };
  }
}

/** When an unused replica leaves its device. */
function leaves(model) {
  if (model.pinned && model.state === "loaded") return "pinned";
  return model.until === null ? "–" : `in ${span(model.until - Date.now() / 1000)}`;
}

/** State in words, progress while it loads, and why it failed. */
class StateCell {
  constructor(cell, name) {
    this.word = el("span", { class: "state" });
    this.progress = el("progress", { max: "1", "aria-label": `Progress of ${name}` });
    this.error = el("p", { class: "why" });
    cell.append(this.word, this.progress, this.error);
  }

  update(model) {
    say(this.word, model.state);
    put(this.word, "data-state", model.state);
    this.progress.hidden = model.state !== "loading";
    this.progress.value = model.progress;
    this.error.hidden = !model.error;
    say(this.error, model.error);
  }
}

/** What can be done. Each button stays where it is while its meaning changes, and so does the focus. */
class Buttons {
  constructor(name, act) {
    this.name = name;
    this.load = el("button", { type: "button", click: () => act(this.load.dataset.action) });
    this.pin = el("button", {
      type: "button",
      "aria-label": `Pin ${name}`,
      click: () => act(this.pin.getAttribute("aria-pressed") === "true" ? "unpin" : "pin"),
    }, "Pin");
    const remove = el("button", { type: "button", "aria-label": `Remove ${name}`, click: () => act("remove") }, "Remove");
    this.root = el("td", { class: "actions" }, this.load, this.pin, remove);
  }

  update(model) {
    const action = model.state === "loaded" || model.state === "loading" ? "unload" : "load";
    const word = action === "load" ? "Load" : "Unload";
    put(this.load, "data-action", action);
    put(this.load, "aria-label", `${word} ${this.name}`);
    say(this.load, word);
    put(this.pin, "aria-pressed", String(model.pinned));
  }
}
