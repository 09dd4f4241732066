// The page of `videomamba serve`. What is shown follows the address, so that a search can be linked to and gone back to:
//   ?q=SENTENCE   ?like=NAME   ?clip=ID (one that was uploaded)   ?name=NAME (one clip)   ?shard=NAME   &page=N
// Everything from the server goes into the page as text, never as markup.
"use strict";

const at = id => document.getElementById(id);
const form = at("form"), query = at("query"), file = at("file"), drop = at("drop"), asked = at("asked");
const status_ = at("status"), hits = at("hits"), pager = at("pager");
const uploads = new Map();  // ID of an upload -> what to show of it: {url, name, image}; the last one only
let limits = { upload_bytes: Infinity, query_characters: 1000 };
let running = null;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node[name] = value;
  node.append(...children);
  return node;
}

function say(text, kind = "") {
  status_.className = kind;
  status_.textContent = text;
}

function link(text, parameters, label = text) {
  const node = make("a", { href: `?${new URLSearchParams(parameters)}`, textContent: text });
  if (label !== text) node.setAttribute("aria-label", label);
  node.addEventListener("click", event => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    go(parameters);
  });
  return node;
}

// A picture, or a video under a button that starts it; the player's own controls come with the first start.
function medium(url, image, name) {
  if (image) return make("img", { className: "medium", src: url, alt: name });
  const video = make("video", { className: "medium", src: url, preload: "metadata", loop: true, muted: true, playsInline: true });
  video.setAttribute("aria-label", name);
  const start = make("button", { type: "button", className: "start", textContent: "▶" });
  start.setAttribute("aria-label", `Play: ${name}`);
  const box = make("div", { className: "player" }, video, start);
  start.addEventListener("click", () => {
    video.controls = true;
    start.remove();
    video.focus();
    video.play().catch(() => {});  // what cannot be played has its own event
  });
  video.addEventListener("error", () => box.replaceChildren(make("div", { className: "medium broken" },
    "This browser cannot play the clip.", make("a", { href: url, textContent: "Download it", download: "" }))));
  return box;
}

function card(clip) {
  const item = make("li", { className: "hit card" });
  if (clip.fault) item.append(make("div", { className: "medium broken", textContent: "Its shard no longer gives it." }));
  else item.append(medium(clip.media, clip.kind === "image", clip.caption || clip.name));
  const words = make("div", { className: "words" });
  if (clip.rank) {
    words.append(make("div", { className: "line" }, make("b", { textContent: `${clip.rank}.` }),
      make("span", { className: "quiet", textContent: `score ${clip.score.toFixed(4)}` })));
  }
  if (clip.caption) words.append(make("p", { className: "caption", textContent: clip.caption }));
  words.append(make("p", { className: "links" }, link(clip.key, { name: clip.name }, `clip ${clip.key}`), " · ",
    link(clip.shard, { shard: clip.shard }), ` · ${clip.time} · `, link("similar", { like: clip.name }, `similar to ${clip.key}`)));
  item.append(words);
  return item;
}

async function ask(address, options = {}) {
  running?.abort();
  const mine = running = new AbortController();
  hits.setAttribute("aria-busy", "true");
  say(options.method === "POST" ? "Looking at the clip…" : "Searching…", "busy");
  try {
    const answer = await fetch(address, { ...options, signal: mine.signal });
    const body = await answer.json();
    if (answer.status === 401) location.assign("/login");
    if (!answer.ok) throw new Error(body.error.reason);
    return body;
  } catch (error) {
    if (error.name === "AbortError") return null;
    clear();
    say(error instanceof TypeError ? "The server does not answer." : error.message, "error");
    return null;
  } finally {
    if (running === mine) hits.removeAttribute("aria-busy");
  }
}

function clear() {
  hits.replaceChildren();
  pager.hidden = true;
}

function showAsked(...nodes) {
  asked.hidden = nodes.length === 0;
  asked.className = "";
  asked.replaceChildren(...nodes);
}

function showList(found, clips, sentence) {
  hits.replaceChildren(...clips.map(card));
  say(clips.length ? sentence : "Nothing was found.");
  pager.hidden = found.pages < 2;
  at("place").textContent = `Page ${found.page} of ${found.pages.toLocaleString()}`;
  at("previous").disabled = found.page <= 1;
  at("next").disabled = found.page >= found.pages;
}

function showHits(found) {
  const first = found.hits[0]?.rank, last = found.hits.at(-1)?.rank;
  showList(found, found.hits, `Clips ${first}–${last} of ${found.clips.toLocaleString()}, best first.`);
}

async function showClip(name) {
  const clip = await ask(`/api/clips/${encodeURIComponent(name)}`);
  if (!clip) return;
  clear();
  say("");
  const facts = make("dl");
  const rows = { key: clip.key, caption: clip.captions.join(" | "), shard: link(clip.shard, { shard: clip.shard }),
    time: clip.time, "bytes": clip.bytes?.toLocaleString(), "at byte": clip.offset.toLocaleString(), source: clip.source,
    ...clip.probe, fault: clip.fault };
  for (const [what, value] of Object.entries(rows)) {
    if (value !== undefined && value !== "" && value !== null) facts.append(make("dt", { textContent: what }), make("dd", {}, value));
  }
  const links = make("p", {}, link("Similar clips", { like: clip.name }), " · ",
    make("a", { href: clip.media, download: clip.key, textContent: "Download" }));
  showAsked(clip.fault ? "" : medium(clip.media, clip.kind === "image", clip.caption || clip.name), make("div", {}, facts, links));
  asked.classList.add("one");
}

async function showUpload(name, page) {
  const found = await ask(`/api/search?${new URLSearchParams({ clip: name, page })}`);
  if (found) showFoundByClip(found);
}

function showFoundByClip(found) {
  const known = uploads.get(found.query.clip);
  showAsked(...(known ? [medium(known.url, known.image, known.name), make("div", { textContent: `Clips like ${known.name}` })]
    : [make("div", { textContent: "Clips like the one that was sent" })]));
  showHits(found);
}

async function upload(chosen) {
  query.value = "";
  if (chosen.size > limits.upload_bytes) {
    clear();
    showAsked();
    return say(`${chosen.name} is larger than ${Math.floor(limits.upload_bytes / 2 ** 20)} MiB.`, "error");
  }
  const type = /^(video|image)\//.test(chosen.type) ? chosen.type : "application/octet-stream";
  showAsked();
  const found = await ask("/api/search", { method: "POST", body: chosen, headers: { "Content-Type": type } });
  if (!found) return;
  for (const [name, old] of uploads) { URL.revokeObjectURL(old.url); uploads.delete(name); }
  uploads.set(found.query.clip, { url: URL.createObjectURL(chosen), name: chosen.name, image: type.startsWith("image/") });
  history.pushState(null, "", `?${new URLSearchParams({ clip: found.query.clip })}`);
  showFoundByClip(found);
}

async function show() {
  const address = new URLSearchParams(location.search);
  const page = address.get("page") || "1";
  query.value = address.get("q") || "";
  const kind = ["q", "like", "clip", "name", "shard"].find(name => address.has(name));
  const value = address.get(kind) ?? "";
  document.title = value ? `${value} – Find clips` : "Find clips";
  const apis = { name: `/api/clips/${encodeURIComponent(value)}`, shard: `/api/shards/${encodeURIComponent(value)}?page=${page}` };
  at("json").href = kind ? apis[kind] ?? `/api/search?${new URLSearchParams({ [kind]: value, page })}` : "/api/health";
  if (!kind) { running?.abort(); clear(); showAsked(); return say(""); }
  if (kind === "name") return showClip(value);
  if (kind === "clip") return showUpload(value, page);
  if (kind === "q" && !value.trim()) { clear(); showAsked(); return say("Type a sentence first.", "error"); }
  if (kind === "shard") {
    const found = await ask(apis.shard);
    if (!found) return;
    showAsked(make("div", { textContent: `${value}: ${found.total.toLocaleString()} clips` }));
    return showList(found, found.clips, "In the shard's order.");
  }
  const found = await ask(`/api/search?${new URLSearchParams({ [kind]: value, page })}`);
  if (!found) return;
  showAsked(...(kind === "like" ? [make("div", {}, "Clips like ", link(value, { name: value }))] : []));
  showHits(found);
}

function go(parameters) {
  history.pushState(null, "", `?${new URLSearchParams(parameters)}`);
  return show();
}

function turn(by) {
  const address = new URLSearchParams(location.search);
  address.set("page", String(Number(address.get("page") || "1") + by));
  go(address).then(() => { form.scrollIntoView(); at(by > 0 ? "next" : "previous").focus({ preventScroll: true }); });
}

form.addEventListener("submit", event => { event.preventDefault(); go({ q: query.value }); });
file.addEventListener("change", () => { if (file.files[0]) upload(file.files[0]); file.value = ""; });
for (const name of ["dragenter", "dragover"]) addEventListener(name, event => { event.preventDefault(); drop.classList.add("over"); });
for (const name of ["dragleave", "drop"]) addEventListener(name, event => { event.preventDefault(); drop.classList.remove("over"); });
addEventListener("drop", event => { if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]); });
addEventListener("popstate", show);
at("previous").addEventListener("click", () => turn(-1));
at("next").addEventListener("click", () => turn(1));

fetch("/api/health").then(answer => answer.json()).then(about => {
  limits = about.limits;
  at("about").textContent = `${about.clips.toLocaleString()} clips in ${about.shards.toLocaleString()} shard${about.shards === 1 ? "" : "s"}, index “${about.index}” of ` +
    `${about.made.slice(0, 10)}, checkpoint ${about.checkpoint.digest} at step ${about.checkpoint.step.toLocaleString()}`;
}).catch(() => {});
show();
