// DOM helpers. They write only what has changed, so that rendering again does not clear a text selection
// or make a screen reader repeat itself.

export const byId = (id) => document.getElementById(id);

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (value === null || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

export function setHidden(element, hidden) {
  if (element.hidden !== hidden) element.hidden = hidden;
}

/** Disable a button with `aria-disabled`: the `disabled` attribute would make it lose the focus. */
export function setDisabled(button, disabled) {
  setAttribute(button, "aria-disabled", disabled ? "true" : null);
}

/** Call `handler` when a button is clicked, unless `setDisabled` has disabled it. */
export function onClick(button, handler) {
  button.addEventListener("click", () => {
    if (button.getAttribute("aria-disabled") !== "true") handler();
  });
}

/** Make `parent` have one child per item, in the order of `items`, and keep the child of a key that stays. */
export function reconcile(parent, items, { key, create, update }) {
  const previous = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, index) => {
    const itemKey = key(item);
    let child = previous.get(itemKey);
    previous.delete(itemKey);
    if (!child) {
      child = create(item);
      child.dataset.key = itemKey;
    }
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
    update(child, item);
  });
  for (const child of previous.values()) child.remove();
}

/** Create an element. `text` and string children are never parsed as HTML, so publishers cannot inject markup. */
export function createElement(name, { text = "", ...attributes } = {}, ...children) {
  const element = document.createElement(name);
  if (text) element.textContent = text;
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  element.append(...children);
  return element;
}
