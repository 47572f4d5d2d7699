// Elements and numbers as text.

/** Whether the page is one of this machine. */
export const LOCAL = /^(?:localhost|127(?:\.\d+){3}|\[::1\])$/.test(location.hostname);

/** An element: h("p.note", {title: "…"}, "text", child). Text is set as text, never as markup. */
export function h(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(element.style, value);
    else if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A button that copies what `text()` returns, also where the page is not a secure context. */
export function copyButton(text, label = "Copy") {
  const button = h("button.copy", { type: "button" }, label);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      const area = h("textarea", { value: text() });
      button.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

/** A table's rows; cells know their column's name, which narrow screens show beside each. */
export function rows(names, cells, tag = "tr") {
  return cells.map((row) => h(tag, {}, ...row.map((cell, i) => h("td", { "data-name": names[i] }, cell))));
}

export const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

/** A number with three significant digits and k, M, G. */
export function short(value) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  for (const [unit, name] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return plain(value / (name === "k" ? 1e3 : unit)) + name;
  }
  return plain(value);
}

function plain(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 100) return Math.round(value).toLocaleString("en");
  if (size >= 10) return trim(value.toFixed(1));
  if (size >= 0.01) return trim(value.toFixed(size >= 1 ? 2 : 3));
  return value.toPrecision(2).replace("e-", "e−");
}

const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);

export function seconds(value) {
  if (!known(value)) return "–";
  if (value < 1) return plain(value * 1e3) + " ms";
  if (value < 120) return plain(value) + " s";
  if (value < 7200) return Math.round(value / 60) + " min";
  return value < 172800 ? plain(value / 3600) + " h" : plain(value / 86400) + " d";
}

export const percent = (value) => (known(value) ? plain(value * 100) + " %" : "–");

export function dollars(value) {
  if (!known(value)) return "–";
  if (value === 0) return "$0";
  if (Math.abs(value) >= 1) return "$" + (Math.abs(value) >= 1000 ? short(value) : value.toFixed(value >= 100 ? 0 : 2));
  return "$" + value.toPrecision(2).replace("e-", "e−");
}

export const joules = (value) =>
  !known(value) ? "–" : value >= 3.6e5 ? short(value / 3.6e6) + " kWh" : value >= 1e4 ? short(value / 1e3) + " kJ" : short(value) + " J";

export const bytes = (value) => (!known(value) ? "–" : value >= 1e9 ? short(value / 1e9) + " GB" : Math.round(value / 1e6) + " MB");

export const watts = (value) => (known(value) ? short(value) + " W" : "–");

export const clock = (time) =>
  new Date(time * 1e3).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
