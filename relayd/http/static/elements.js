// The document's elements, by short names.

export const $ = (id) => document.getElementById(id);

export function make(tag, ...children) {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
}

/** Only what is different is written: a screen reader is told of every change. */
export function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** For screen readers, which are told what happens to a request but not every figure. */
export function announce(words) {
  $("says").append(make("p", words));
  while ($("says").childElementCount > 20) $("says").firstChild.remove();
}

/** The first button in an element that can be seen, so that the focus may go there. */
export function firstButton(element) {
  return [...element.querySelectorAll("button")].find((button) => button.offsetParent);
}
