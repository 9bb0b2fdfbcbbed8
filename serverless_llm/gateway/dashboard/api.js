// Requests to the server that sent this page, with the operator's key where it wants one.

const KEY = "serverless-llm-key"; // in sessionStorage: gone with the tab
const ANSWER = 150000; // ms; the server itself gives up before
const SILENCE = 30000; // ms without a byte of a stream, which has one at least every ten seconds

export class Refusal extends Error {
  /** What the server said: status, code, and the field that it is about. */
  constructor(status, message, code = "", param = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const keepKey = (key) => sessionStorage.setItem(KEY, key);
export const dropKey = () => sessionStorage.removeItem(KEY);

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key === null ? {} : { Authorization: `Bearer ${key}` };
}

async function refusal(response) {
  try {
    const { error } = await response.json();
    return new Refusal(response.status, error.message, error.code, error.param);
  } catch {
    return new Refusal(response.status, `the server answered ${response.status}`);
  }
}

/** `signal` fires with the given one, or when `begin` was not called for so long: of a machine that is gone nothing comes. */
class Patience {
  constructor(ms, signal) {
    const late = new AbortController();
    this.late = () => late.abort(new TypeError("the server does not answer"));
    this.signal = AbortSignal.any(signal ? [signal, late.signal] : [late.signal]);
    this.ms = ms;
    this.begin();
  }

  begin() {
    this.end();
    this.timer = setTimeout(this.late, this.ms);
  }

  end() {
    clearTimeout(this.timer);
  }
}

async function send(method, path, { body, signal } = {}) {
  const options = { method, signal, headers: headers(), cache: "no-store", credentials: "omit" };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  const response = await fetch(new URL(path, document.baseURI), options);
  if (!response.ok) throw await refusal(response);
  return response;
}

/** One request, answered in JSON. Throws `Refusal` where the server refuses, `TypeError` where there is none. */
export async function ask(method, path, body, signal, most = ANSWER) {
  const patience = new Patience(most, signal);
  try {
    return await (await send(method, path, { body, signal: patience.signal })).json();
  } finally {
    patience.end();
  }
}

/** The path of a model's admin route. Slashes stay: names may have one. */
export function modelPath(name, action = "") {
  const path = name.split("/").map(encodeURIComponent).join("/");
  return `admin/models/${path}${action && `/${action}`}`;
}

/**
 * Follow a stream of server-sent events until it ends; `told` gets the data of each, parsed.
 * Not EventSource, which cannot send a key.
 */
export async function follow(path, told, signal) {
  const patience = new Patience(SILENCE, signal);
  try {
    const response = await send("GET", path, { signal: patience.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      patience.begin();
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data: ")) told(JSON.parse(line.slice("data: ".length)));
      }
    }
  } finally {
    patience.end();
  }
}
