// The button that chooses light, dark, or what the system says. Without a script the system's choice stands.
"use strict";
(() => {
  const button = document.querySelector(".theme");
  const order = ["auto", "light", "dark"];
  let chosen = "auto";
  try { chosen = localStorage.getItem("theme") || "auto"; } catch { /* a page opened as a file may have no storage */ }
  const show = () => {
    if (chosen === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    button.textContent = `Theme: ${chosen}`;
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    chosen = order[(order.indexOf(chosen) + 1) % order.length];
    try { localStorage.setItem("theme", chosen); } catch { /* then it lasts as long as the page */ }
    show();
  });
  show();
})();
