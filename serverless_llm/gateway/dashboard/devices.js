// Nodes and their devices: memory by use, and what runs there.

import { byId, el, put, Rows, say, Stack } from "./dom.js";
import { bytes } from "./format.js";

export class Devices {
  constructor() {
    this.rows = new Rows(byId("nodes"), (node) => node.node, (node) => nodeCard(node));
  }

  show(nodes) {
    this.rows.show(nodes);
  }
}

function nodeCard({ node }) {
  const memory = el("span", { class: "detail" });
  const list = el("ul", { class: "devices", "aria-label": `Devices of ${node}` });
  const devices = new Rows(list, (device) => device.device, (device) => deviceCard(device));
  const update = (one) => {
    say(memory, `DRAM tier: ${bytes(one.dram_used)} of ${bytes(one.dram)}, ${plural(one.resident.length, "checkpoint")}`);
    devices.show(one.devices);
  };
  return { root: el("div", { class: "node" }, el("h3", {}, node, " ", memory), list), update };
}

function deviceCard({ device }) {
  const kind = el("span", { class: "detail" });
  const stack = new Stack(["weights", "kv", "free"]);
  const text = el("p", { class: "detail" });
  const problem = el("p", { class: "why" });
  const list = el("ul", { class: "replicas" });
  const replicas = new Rows(list, (replica) => replica.replica, () => replicaLine());
  const root = el("li", { class: "device" }, el("p", {}, el("strong", {}, device), " ", kind), stack.root, text, problem, list);
  const update = (one) => {
    const { weights, kv, free } = one.memory;
    say(kind, one.worker_pid === null ? `${one.kind}, no worker` : `${one.kind}, worker ${one.worker_pid}`);
    stack.show(one.memory);
    say(text, `weights ${bytes(weights)}, KV ${bytes(kv)}, free ${bytes(free)} of ${bytes(one.budget)}`);
    problem.hidden = !one.problem;
    say(problem, one.problem);
    replicas.show(one.replicas);
    list.hidden = !one.replicas.length;
    put(list, "aria-label", `On ${device}`);
  };
  return { root, update };
}

function replicaLine() {
  const name = el("span", { class: "name" });
  const doing = el("span", { class: "detail" });
  const update = (replica) => {
    say(name, replica.model);
    const running = replica.running ? `, ${replica.running} running` : "";
    const shared = replica.shared_bytes ? `, ${bytes(replica.shared_bytes)} of them shared` : "";
    say(doing, `${replica.state}${running}, ${bytes(replica.weight_bytes)}${shared}`);
  };
  return { root: el("li", {}, name, " ", doing), update };
}

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
