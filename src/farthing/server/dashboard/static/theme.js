// Light, dark, or as the system has it. Charts ask for colours when they draw.

import { keep } from "./conversations.js";

const STORE = "farthing.theme";
const NAMES = ["auto", "light", "dark"];
const system = matchMedia("(prefers-color-scheme: dark)");
const listeners = [];
let chosen = NAMES.includes(localStorage.getItem(STORE)) ? localStorage.getItem(STORE) : "auto";

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
export const isDark = () => document.documentElement.dataset.theme === "dark";
export const onTheme = (listener) => listeners.push(listener);

function apply() {
  const dark = chosen === "dark" || (chosen === "auto" && system.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  for (const listener of listeners) listener();
}

export function setup(button) {
  const show = () => (button.textContent = chosen[0].toUpperCase() + chosen.slice(1));
  button.addEventListener("click", () => {
    chosen = NAMES[(NAMES.indexOf(chosen) + 1) % NAMES.length];
    keep(STORE, chosen);
    show();
    apply();
  });
  system.addEventListener("change", apply);
  show();
  apply();
}
