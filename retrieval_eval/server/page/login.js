// Says that a token was wrong without leaving the page; without a script the form is sent as it is.
"use strict";
document.getElementById("login").addEventListener("submit", async event => {
  event.preventDefault();
  const status = document.getElementById("status");
  status.className = "";
  status.textContent = "";
  try {
    const body = new URLSearchParams(new FormData(event.target));
    const answer = await fetch("/login", { method: "POST", body });
    if (answer.ok) return location.assign("/");
    status.textContent = (await answer.json()).error.reason;
  } catch {
    status.textContent = "The server does not answer.";
  }
  status.className = "error";
});
