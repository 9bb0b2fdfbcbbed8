// Elements from values. Text is only ever set as text: nothing that a server or a model says becomes markup.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** A new element: `el("td", {class: "number", title: name}, text, child)`. Functions become listeners. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else put(made, name, value);
  }
  made.append(...children);
  return made;
}

/** Set an attribute if it changed; null or false removes it, true is the empty attribute. */
export function put(element, name, value) {
  if (value === null || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
    return;
  }
  const text = value === true ? "" : String(value);
  if (element.getAttribute(name) !== text) element.setAttribute(name, text);
}

/** Set an element's text if it changed, so that focus, selection and screen readers are left alone. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * Rows of a parent by key: kept while their key is there, in the order of `items`.
 * `make(item)` gives {root, update}; `update(item)` is called each time.
 */
export class Rows {
  constructor(parent, keyOf, make) {
    this.parent = parent;
    this.keyOf = keyOf;
    this.make = make;
    this.rows = new Map();
  }

  show(items) {
    const wanted = new Set(items.map(this.keyOf));
    for (const [key, row] of this.rows) {
      if (!wanted.has(key)) {
        row.root.remove();
        this.rows.delete(key);
      }
    }
    let place = this.parent.firstElementChild;
    for (const item of items) {
      const key = this.keyOf(item);
      let row = this.rows.get(key);
      if (!row) this.rows.set(key, (row = this.make(item)));
      row.update(item);
      if (row.root === place) place = place.nextElementSibling;
      else this.parent.insertBefore(row.root, place);
    }
  }
}

/** A stacked bar: parts in the order of `names`, each as wide as its value. The text beside it says the same. */
export class Stack {
  constructor(names) {
    this.parts = new Map(names.map((name) => [name, el("span", { class: `part ${name}` })]));
    this.root = el("div", { class: "stack", "aria-hidden": "true" }, ...this.parts.values());
  }

  /** `values`: by name; `share`: of the whole width that they take together, 0 ... 1. */
  show(values, share = 1) {
    const total = [...this.parts.keys()].reduce((sum, name) => sum + (values[name] ?? 0), 0);
    for (const [name, part] of this.parts) {
      const width = total > 0 ? (100 * share * (values[name] ?? 0)) / total : 0;
      const text = `${width.toFixed(2)}%`;
      if (part.style.width !== text) part.style.width = text;
    }
  }
}
