// What happened, the latest first: the server's stream of events.

import { follow } from "./api.js";
import { byId, el } from "./dom.js";
import { clock, seconds } from "./format.js";

const KEPT = 100;
const AGAIN = 5000; // ms until the stream is tried again

export class Events {
  constructor() {
    this.list = byId("events-list");
    this.stop = null;
  }

  /** Follow the stream until `pause`; one that ends is taken up again, from what the server still knows. */
  async run() {
    if (this.stop) return;
    const stop = (this.stop = new AbortController());
    while (!stop.signal.aborted) {
      this.list.replaceChildren();
      try {
        await follow(`admin/events?recent=${KEPT}`, (event) => this.add(event), stop.signal);
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

  add(event) {
    const at = event.time;
    const time = el("time", { datetime: new Date(1000 * at).toISOString() }, clock(at));
    const bad = /failed|lost/.test(event.event) ? "why" : "";
    this.list.prepend(el("li", {}, time, " ", el("span", { class: bad }, sentence(event))));
    while (this.list.childElementCount > KEPT) this.list.lastElementChild.remove();
    byId("events-empty").hidden = true;
  }
}

const SENTENCES = {
  deployed: (e) => `${e.model} ${e.replaces ? "replaced by" : "deployed from"} ${e.url || e.source}`,
  deleted: (e) => `${e.model} removed`,
  pinned: (e) => `${e.model} ${e.pinned ? "pinned" : "no longer pinned"}`,
  load_decided: (e) => `${e.model} is to start on ${e.device}, predicted ${seconds(e.predicted_s)}`,
  load_started: (e) => `${e.model} loads on ${e.device}`,
  load_ready: (e) => `${e.model} is ready on ${e.device} after ${seconds(e.actual_s)}, from ${e.source}`,
  load_failed: (e) => `${e.model} could not be loaded on ${e.device}: ${e.error}`,
  model_failed: (e) => `${e.model} failed: ${e.error}`,
  given_back: (e) => `A request for ${e.model} waits: ${e.why}`,
  evicted: (e) => `${e.model} left ${e.device} (${e.reason})`,
  agent_joined: (e) => `${e.node} joined with ${e.devices} devices`,
  agent_lost: (e) => `${e.node} was lost`,
  worker_up: (e) => `The worker of ${e.device} is up`,
  worker_lost: (e) => `The worker of ${e.device} was lost: ${e.cause}`,
};

/** An event in words; one that this page does not know by its fields. */
function sentence(event) {
  const tell = SENTENCES[event.event];
  if (tell) return tell(event);
  const fields = Object.entries(event).filter(([name]) => name !== "event" && name !== "time");
  return [event.event, ...fields.map(([name, value]) => `${name} ${JSON.stringify(value)}`)].join(" ");
}
