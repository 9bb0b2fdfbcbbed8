// What happened, the latest first: the server's stream of events.

import { follow } from "./api.js";
import { byId, el } from "./dom.js";
import { clock } from "./format.js";

const KEPT = 200;
const AGAIN = 5000; // ms until the stream is tried again

export class Events {
  constructor() {
    this.list = byId("events-list");
    this.stop = null;
  }

  /** Follow the stream until `pause`; a stream that ends is taken up again. */
  async run() {
    if (this.stop) return;
    const stop = (this.stop = new AbortController());
    while (!stop.signal.aborted) {
      try {
        await follow("admin/events", (type, data) => this.told(type, data), stop.signal);
      } catch (error) {
        if (error.status === 401 || error.status === 403) break; // the status asks for a key
      }
      await new Promise((resolve) => setTimeout(resolve, AGAIN));
    }
    if (this.stop === stop) this.stop = null;
  }

  pause() {
    this.stop?.abort();
    this.stop = null;
  }

  told(type, data) {
    const at = typeof data.at === "number" ? data.at : Date.now() / 1000;
    this.add(at, type, data);
  }

  add(at, kind, fields) {
    const time = el("time", { datetime: new Date(1000 * at).toISOString() }, clock(at));
    this.list.prepend(el("li", {}, time, " ", el("strong", {}, kind), " ", described(fields)));
    while (this.list.childElementCount > KEPT) this.list.lastElementChild.remove();
    byId("events-empty").hidden = true;
  }
}

function described(fields) {
  return Object.entries(fields)
    .filter(([name, value]) => name !== "at" && value !== null && value !== "")
    .map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`)
    .join(", ");
}
