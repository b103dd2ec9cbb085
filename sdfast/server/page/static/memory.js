// What the browser keeps from one visit to the next. One that keeps nothing must not stop the page.

export function recall(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // The settings are lost with this visit, and nothing else.
  }
}
