// The three dialogs: deploy, remove, key. Each shows what the server says about what was typed.

import { Refusal } from "./api.js";
import { byId, put, say } from "./dom.js";

/** A dialog whose form calls `submit(fields)`, closes when that succeeds, and then calls what it gave. */
export class Asking {
  constructor(id, submit) {
    this.dialog = byId(id);
    this.form = this.dialog.querySelector("form");
    this.error = this.dialog.querySelector(".error");
    this.submit = submit;
    this.busy = false;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.form.querySelector("[value=cancel]")?.addEventListener("click", () => this.dialog.close());
  }

  open(complaint = "") {
    if (this.dialog.open) return;
    this.form.reset();
    this.complain(complaint);
    this.dialog.showModal();
  }

  async send() {
    if (this.busy) return;
    const blank = [...this.form.elements].find((field) => field.required && !field.value.trim());
    if (blank) {
      this.complain(`${blank.labels[0].firstChild.textContent.trim()} is needed`, blank.name);
      return;
    }
    this.busy = true;
    try {
      const then = await this.submit(this.form.elements);
      this.dialog.close();
      then();
    } catch (error) {
      this.complain(error.message, error instanceof Refusal ? error.param : null);
    } finally {
      this.busy = false;
    }
  }

  /** Show what is wrong, and lead to the field that it is about. */
  complain(message, field = null) {
    if (this.error) {
      this.error.hidden = !message;
      say(this.error, message);
    }
    for (const one of this.form.elements) put(one, "aria-invalid", one.name !== "" && one.name === field && "true");
    const wrong = field && this.form.elements[field];
    if (wrong) {
      wrong.closest("details")?.setAttribute("open", "");
      wrong.focus();
    }
  }
}

/** The body of a deploy: what was left empty takes the server's default. */
export function deployBody(fields) {
  const body = { source: fields.source.value.trim(), dtype: fields.dtype.value, pinned: fields.pinned.checked };
  const keep = fields.keep_alive.value.trim();
  if (keep) body.keep_alive = /^-?\d+(\.\d+)?$/.test(keep) ? Number(keep) : keep;
  for (const name of ["context", "max_replicas"]) {
    const text = fields[name].value.trim();
    if (text) body[name] = /^\d+$/.test(text) ? Number(text) : text;
  }
  return body;
}
