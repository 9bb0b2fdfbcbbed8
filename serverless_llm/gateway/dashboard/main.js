// The page: one status every two seconds while somebody looks at it, none while nobody does.

import { ask, dropKey, hasKey, keepKey, modelPath } from "./api.js";
import { Charts } from "./charts.js";
import { Devices } from "./devices.js";
import { Asking, deployBody } from "./dialogs.js";
import { byId, el, put, Rows, say } from "./dom.js";
import { Events } from "./events.js";
import { Models } from "./models.js";
import { Starts } from "./starts.js";

const EVERY = 2000; // ms between two looks at the status
const SLOWEST = 15000; // ms, while there is no server
const LATE = 10000; // ms until a look is given up

const models = new Models(act);
const devices = new Devices();
const starts = new Starts();
const charts = new Charts();
const events = new Events();
const watched = new Map(); // models that this operator told to load or unload, and the state that ends it

// --- the status ---

let timer = 0;
let failures = 0;
let asking = null;

async function look() {
  clearTimeout(timer);
  asking?.abort();
  const mine = (asking = new AbortController());
  try {
    show(await ask("GET", "admin/status", undefined, mine.signal, LATE));
    failures = 0;
    connected("connected", "");
    events.run();
  } catch (error) {
    if (mine.signal.aborted) return;
    if (needsKey(error)) return wantKey(error.message);
    failures += 1;
    connected("not connected", error.status ? error.message : "The server does not answer; trying again.");
  }
  if (!document.hidden) timer = setTimeout(look, Math.min(EVERY * 2 ** Math.max(0, failures - 1), SLOWEST));
}

function connected(word, trouble) {
  const link = byId("link");
  say(link, word);
  put(link, "data-state", word);
  byId("change-key").hidden = word !== "needs a key" && !hasKey();
  if (word !== "connected") showTrouble(trouble ? [trouble] : []);
}

function showTrouble(problems) {
  const place = byId("trouble");
  place.hidden = !problems.length;
  say(place, problems.join("; "));
}

function show(status) {
  showTrouble(status.problems);
  summarise(status);
  models.show(status.models);
  devices.show(status.nodes);
  starts.show(status.starts);
  charts.show(status.traffic);
  tellWatched(status.models);
}

const summary = new Rows(byId("summary"), (item) => item.term, ({ term }) => {
  const value = el("dd");
  return { root: el("div", {}, el("dt", {}, term), value), update: (item) => say(value, item.value) };
});

function summarise(status) {
  const sum = (name) => status.models.reduce((total, model) => total + model[name], 0);
  const loaded = status.models.filter((model) => model.state === "loaded").length;
  summary.show([
    { term: "loaded", value: `${loaded} of ${status.models.length}` },
    { term: "running", value: String(sum("running")) },
    { term: "waiting", value: String(sum("waiting")) },
  ]);
}

function pause() {
  clearTimeout(timer);
  asking?.abort();
  events.pause();
}

document.addEventListener("visibilitychange", () => (document.hidden ? pause() : look()));

// --- what the operator does ---

const tell = (text) => say(byId("said"), text);

const DOINGS = {
  load: { method: "POST", action: "load", words: "Loading" },
  unload: { method: "POST", action: "unload", words: "Unloading" },
  pin: { method: "POST", action: "pin", body: { pinned: true }, words: "Pinned" },
  unpin: { method: "POST", action: "pin", body: { pinned: false }, words: "No longer pinned:" },
};

async function act(action, name) {
  if (action === "remove") return askRemove(name);
  const { method, action: verb, body = {}, words } = DOINGS[action];
  try {
    await ask(method, modelPath(name, verb), body);
    tell(`${words} ${name}`);
    if (verb !== "pin") watched.set(name, action === "load" ? "loaded" : "unloaded");
  } catch (error) {
    failed(error, name);
  }
  return look();
}

function failed(error, name) {
  if (needsKey(error)) wantKey(error.message);
  else tell(`${name}: ${error.message}`);
}

/** Say how a load or an unload went that was asked for here. */
function tellWatched(shown) {
  const states = new Map(shown.map((model) => [model.name, model]));
  for (const [name, wanted] of watched) {
    const model = states.get(name);
    if (model && model.state !== wanted && model.state !== "failed") continue;
    watched.delete(name);
    if (model) tell(model.state === "failed" ? `${name} failed: ${model.error}` : `${name} is ${model.state}`);
  }
}

let replacing = ""; // the name whose replacement was asked about

const deploy = new Asking("deploy", async (fields) => {
  const name = fields.name.value.trim();
  if (models.has(name) && replacing !== name) {
    replacing = name;
    throw new Error(`${name} is deployed already. Deploy once more to replace it.`);
  }
  await ask("PUT", modelPath(name), deployBody(fields));
  tell(`${name} is deployed`);
  return look;
});
byId("deploy-open").addEventListener("click", () => {
  replacing = "";
  deploy.open();
});

let removing = "";
const remove = new Asking("remove", async () => {
  try {
    await ask("DELETE", modelPath(removing));
    tell(`${removing} is removed`);
  } catch (error) {
    failed(error, removing);
  }
  return () => {
    byId("models").focus(); // the button that had it is gone
    look();
  };
});

function askRemove(name) {
  removing = name;
  say(byId("remove-what"), `${name} loses its endpoint. Requests that run get their whole answer; those that wait are refused. Its files stay.`);
  remove.open();
}

// --- the key ---

const key = new Asking("key", async (fields) => {
  keepKey(fields.key.value.trim());
  try {
    await ask("GET", "admin/status");
  } catch (error) {
    dropKey();
    throw error;
  }
  return look;
});

/** Whether another key would help: this one is unknown, or lacks the scope. */
const needsKey = (error) => error.status === 401 || (error.status === 403 && hasKey());

function wantKey(complaint) {
  pause();
  connected("needs a key", "");
  key.open(hasKey() ? complaint : "");
  dropKey();
}

byId("change-key").addEventListener("click", () => key.open());

if (!document.hidden) look();
