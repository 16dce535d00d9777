// The page of `camoe serve`. The query is kept in the URL after "#", so that the back button and sharing work.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const CORRECTIONS = { none: "count as they are", query_bank: "count less", dynamic: "count less where one is first" };
const NUMBERS = ["min_seconds", "max_seconds"];
const TEXTS = ["path", "after", "before"];
const TEXT_ONLY = { words: undefined, then: undefined };  // options that go with a text, not with a moment or picture
const HOVER = 350;  // milliseconds until a card plays

let about = null;
let shownQuery = {};  // the query of the results on the page
let shownHits = [];
let latest = 0;  // number of the latest search; answers to earlier ones are ignored
let shownMoment = null;  // in the player

// Seconds -> "1:02:03.4", as in a player.
function formatTime(seconds) {
  const tenths = Math.round(seconds * 10);
  const [hours, minutes, rest] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60, (tenths % 600) / 10];
  const tail = rest.toFixed(1).padStart(4, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${tail}` : `${minutes}:${tail}`;
}

function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// --- the query -------------------------------------------------------------------------------------------------------

function readForm() {
  const weights = {};
  for (const slider of $("experts").querySelectorAll("input")) {
    if (Number(slider.value) !== 1) weights[slider.name] = Number(slider.value);
  }
  const query = { page: 0 };
  const correction = document.querySelector("#corrections input:checked")?.value;
  if (correction) query.correction = correction;
  if (Object.keys(weights).length) query.experts = weights;
  for (const name of TEXTS) if ($(name).value) query[name] = $(name).value;
  for (const name of NUMBERS) if ($(name).value !== "") query[name] = Number($(name).value);
  if ($("by_file").checked) query.group_by = "file";
  if ($("words").checked) query.words = true;
  if ($("then").value.trim()) query.then = $("then").value;
  if ($("not").value.trim()) query.not = [$("not").value];
  if (about.indexes.length > 1) query.index = $("index").value;
  return query;
}

function showForm(query) {
  $("text").value = query.text ?? "";
  for (const radio of document.querySelectorAll("#corrections input")) {
    radio.checked = radio.value === (query.correction ?? about.correction);
  }
  for (const slider of $("experts").querySelectorAll("input")) {
    slider.value = query.experts?.[slider.name] ?? 1;
    slider.nextElementSibling.textContent = Number(slider.value).toFixed(1);
  }
  for (const name of [...TEXTS, ...NUMBERS]) $(name).value = query[name] ?? "";
  $("by_file").checked = query.group_by === "file";
  $("words").checked = Boolean(query.words);
  $("then").value = query.then ?? "";
  $("not").value = query.not?.[0] ?? "";
  markUsed();
}

function markUsed() {
  const { page, index, correction, ...used } = readForm();
  $("options").classList.toggle("used", Object.keys(used).length > 0 || (correction ?? about.correction) !== about.correction);
}

function place(query) {
  return "#" + encodeURIComponent(JSON.stringify(query));
}

// Put a new query into the URL, then search.
function navigate(query) {
  history.pushState(null, "", place(query));
  return search(query);
}

// The same query with the current options.
function searchAgain() {
  markUsed();
  if (shownQuery.like) navigate({ ...readForm(), ...TEXT_ONLY, like: shownQuery.like, of: shownQuery.of });
  else if (shownQuery.text) navigate({ ...readForm(), text: shownQuery.text });
  else showStart();
}

function findSimilar(hit) {
  showForm({ ...readForm(), text: "" });
  const of = `${hit.title} at ${formatTime(hit.start)}`;
  navigate({ ...readForm(), ...TEXT_ONLY, like: hit.key, of, before: true });
  scrollTo({ top: 0, behavior: "smooth" });
}

async function readUrl() {
  let query = {};
  try {
    query = JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}");
  } catch { /* a truncated URL: start with an empty page */ }
  if (query?.constructor !== Object || !["string", "undefined"].includes(typeof query.text)) query = {};
  if (query.index && query.index !== about.index && about.indexes.includes(query.index)) await showIndex(query.index);
  showForm(query);
  if ($("player").open) {
    shownMoment = null;  // what is closed is not in the address any more
    $("player").close();
  }
  await (query.text || query.like ? search(query) : showStart());
  if (query.open) openLinked(query);
}

// --- searching -------------------------------------------------------------------------------------------------------

function showStatus(text, isBad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", isBad);
}

async function fetchJson(place, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  return readJson(await fetch(place, options));
}

async function readJson(answer) {
  const content = await answer.json();
  if (answer.status === 401) {
    $("sign_in").hidden = false;
    $("token").focus();
  }
  if (!answer.ok) throw new Error(content.error);
  return content;
}

function why(error) {
  return error instanceof TypeError ? "The server does not answer: is `camoe serve` still running?" : error.message;
}

async function search(query) {
  const number = ++latest;
  $("hits").classList.add("waiting");
  leave($("start"), $("status"));
  $("start").hidden = true;
  showStatus("Searching …");
  const what = query.text ?? `Like ${query.of ?? "a moment"}`;
  document.title = `${query.then ? `${what}, then ${query.then}` : what} – CAMoE search`;
  const { of, before, open, at, ...asked } = query;
  try {
    const found = await fetchJson("api/search", asked);
    if (number !== latest) return;
    shownQuery = query;
    showResults(found);
  } catch (error) {
    if (number !== latest) return;
    shownQuery = query;
    clearHits();
    showStatus(why(error), true);
  } finally {
    if (number === latest) {
      $("hits").classList.remove("waiting");
      keepFocus();
    }
  }
}

function clearHits() {
  leave($("hits"), $("pager"));
  shownHits = [];
  $("hits").replaceChildren();
  $("pager").hidden = true;
}

// What goes away must not have the focus.
function leave(...nodes) {
  if (nodes.some((node) => node.contains(document.activeElement))) $("text").focus();
}

// A button that has gone, or that is disabled, leaves the focus nowhere.
function keepFocus() {
  const focused = document.activeElement;
  if (focused && focused !== document.body && !focused.disabled && !$("player").open) return;
  if (!$("player").open) (document.querySelector("#hits .open") ?? $("text")).focus();
}

function showResults({ hits, page, more, milliseconds }) {
  const values = hits.flatMap((hit) => Object.values(hit.experts ?? {}).map(Math.abs));
  const limit = Math.max(0.05, ...values);
  shownHits = hits;
  $("hits").replaceChildren(...hits.map((hit) => card(hit, limit)));
  if (!hits.length) showStatus(page ? "No more results." : "Nothing found: the filters leave no moment.");
  else if (shownQuery.like) {
    showStatus(`Moments like ${shownQuery.of ?? "yours"}, ${milliseconds} ms`);
    if (shownQuery.before) {
      const back = element("button", "", "Back to the query");
      back.type = "button";
      back.onclick = () => history.back();
      $("status").append(back);
    }
  } else showStatus(`Best moments first, found in ${milliseconds} ms`);
  $("pager").hidden = !(page || more);
  $("previous").disabled = page === 0;
  $("next").disabled = !more;
  $("page").textContent = `Page ${page + 1}`;
}

// A picture or clip from the disk or the clipboard.
async function searchWithFile(file) {
  showStatus(`Sending ${file.name} …`);
  try {
    const index = about.indexes.length > 1 ? `?index=${encodeURIComponent($("index").value)}` : "";
    const type = "application/octet-stream";
    const answer = await fetch(`api/uploads${index}`, { method: "POST", headers: { "Content-Type": type }, body: file });
    const { key } = await readJson(answer);
    showForm({ ...readForm(), text: "" });
    await navigate({ ...readForm(), ...TEXT_ONLY, like: key, of: file.name });
  } catch (error) {
    showStatus(why(error), true);
  }
}

// --- before a search -------------------------------------------------------------------------------------------------

async function showStart() {
  const number = ++latest;
  shownQuery = {};
  clearHits();
  document.title = "CAMoE search";
  showStatus("");
  const asked = new URLSearchParams({ index: about.index });
  if ($("path").value) asked.set("folder", $("path").value);
  let found;
  try {
    found = await fetchJson(`api/browse?${asked}`);
  } catch (error) {
    showStatus(why(error), true);
    return;
  }
  if (number !== latest) return;
  $("examples").replaceChildren(...found.examples.map((text) => {
    const button = element("button", "example", text);
    button.type = "button";
    button.onclick = () => { $("text").value = text; $("form").requestSubmit(); };
    return button;
  }));
  $("examples").hidden = !found.examples.length;
  shownHits = found.recent;
  leave($("start"));
  $("recent").replaceChildren(...found.recent.map((hit) => card(hit, 1)));
  $("recent_title").textContent = asked.has("folder") ? `Newest files in ${asked.get("folder")}` : "Newest files";
  $("folders").replaceChildren(...found.folders.map(({ path, depth, files }) => {
    const item = element("li");
    const button = element("button", "", depth ? path.slice(path.lastIndexOf("/") + 1) : path);
    button.type = "button";
    button.append(element("span", "", `  ${files.toLocaleString()}`));
    button.ariaPressed = String($("path").value === path);
    item.style.paddingLeft = `${1.2 * depth}rem`;
    button.onclick = () => {
      $("path").value = $("path").value === path ? "" : path;
      searchAgain();
      $("text").focus();
    };
    item.append(button);
    return item;
  }));
  $("start").hidden = false;
}

// --- a moment --------------------------------------------------------------------------------------------------------

function card(hit, limit) {
  const node = $("card").content.firstElementChild.cloneNode(true);
  const part = (name) => node.querySelector(name);
  node.dataset.key = hit.key;
  const open = part(".open");
  part("img").src = `thumbnail/${hit.key}`;
  part("img").onerror = () => part("img").remove();
  part(".time").textContent = `${formatTime(hit.start)} – ${formatTime(hit.end)}`;
  part(".name").textContent = hit.title;
  part(".name").title = hit.paths.join("\n");
  open.ariaLabel = `Play ${hit.title}, ${part(".time").textContent}`;  // with what is seen on it
  open.onclick = () => openPlayer(hit);
  let waiting = null;
  open.onmouseenter = () => { waiting = setTimeout(() => preview(open, hit), HOVER); };
  open.onmouseleave = () => { clearTimeout(waiting); open.querySelector("video")?.remove(); };
  part(".similar").onclick = () => findSimilar(hit);
  if (hit.match === undefined) part(".relevance").remove();
  else {
    part(".match").textContent = hit.match;
    part(".bar span").style.width = `${Math.round(100 * hit.relevance)}%`;
  }
  if (hit.experts) explain(part, hit, limit);
  else part(".why").remove();
  return node;
}

function explain(part, hit, limit) {
  about.experts.forEach((name, i) => part(".shares").append(...expertRow(name, hit.experts[name] ?? 0, limit, i)));
  const best = Object.keys(hit.experts).reduce((a, b) => (hit.experts[a] >= hit.experts[b] ? a : b));
  const sentences = [`Score ${hit.score.toFixed(3)}. The expert "${best}" says most for it.`];
  if (Math.abs(hit.correction) >= 0.0005) {
    const value = hit.correction.toFixed(3);
    part(".shares").append(element("dt", "", "correction"), element("dd"), element("dd", "value", value));
    sentences.push(hit.correction < 0
      ? "The correction takes something away, because this moment resembles many other queries too."
      : "The correction adds something, because this moment resembles few other queries.");
  }
  part(".plain").textContent = sentences.join(" ");
}

function preview(open, hit) {
  const video = element("video");
  const from = hit.peak?.[0] ?? hit.start;
  Object.assign(video, { muted: true, playsInline: true, loop: false, src: `media/${hit.key}#t=${from},${hit.end}` });
  video.setAttribute("aria-hidden", "true");
  video.onerror = () => video.remove();
  video.onloadedmetadata = () => { if (!video.videoWidth) video.remove(); };
  open.append(video);
  video.play().catch(() => video.remove());
}

// Name, bar and value of what an expert adds to the score; a negative bar points left.
function expertRow(name, value, limit, i) {
  const bar = element("dd");
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", "0 0 100 8");
  picture.setAttribute("preserveAspectRatio", "none");
  const length = (50 * Math.abs(value)) / limit;
  const parts = [[0, 100, "var(--line)", 3, 2], [value < 0 ? 50 - length : 50, length, `var(--expert-${i % 4})`, 0, 8]];
  for (const [x, width, fill, y, height] of parts) {
    const rectangle = document.createElementNS(SVG, "rect");
    for (const [key, value] of Object.entries({ x, y, width, height })) rectangle.setAttribute(key, value);
    rectangle.style.fill = fill;
    picture.append(rectangle);
  }
  bar.append(picture);
  return [element("dt", "", name), bar, element("dd", "value", value.toFixed(3))];
}

// --- the player ------------------------------------------------------------------------------------------------------

// From its best window on: a moment may span several.
function openPlayer(hit, at = hit.peak?.[0] ?? hit.start) {
  const dialog = $("player");
  shownMoment = hit;
  if (!dialog.open) dialog.showModal();
  $("player_title").textContent = `${hit.title}, ${formatTime(hit.start)} – ${formatTime(hit.end)}`;
  $("player_paths").textContent = hit.paths.join("\n");
  $("download").href = `media/${hit.key}?download=true`;
  $("download").setAttribute("download", hit.name);
  const number = shownHits.findIndex((other) => other.key === hit.key);
  $("earlier").disabled = number < 1;
  $("later").disabled = number < 0 || number + 1 >= shownHits.length;
  playAt(hit, at);
  showTimeline(hit, hit.moments?.length ? hit.moments : [hit]);
  if ((shownQuery.text || shownQuery.like) && !shownQuery.then) loadTimeline(hit);
  history.replaceState(null, "", place({ ...shownQuery, open: hit.key, at }));
  if (document.activeElement?.disabled || document.activeElement === document.body) $("video").focus();
}

function playAt(hit, at) {
  const video = $("video");
  $("note").textContent = "";
  const file = `media/${hit.key}`;
  if (video.dataset.file === file && !video.error && video.videoWidth) {
    video.currentTime = at;
  } else {
    video.dataset.file = file;
    video.onloadedmetadata = () => {
      if (!video.videoWidth) convert(hit, at);  // HEVC and MPEG-4 in some browsers: the sound alone
      else if (Math.abs(video.currentTime - at) > 0.05) video.currentTime = at;
    };
    video.onerror = () => convert(hit, at);
    video.src = `${file}#t=${at}`;
  }
  video.play().catch(() => {});  // onerror says why
}

// The moment alone as MP4: copied by the server if it can be, and encoded again where that cannot be played either.
function convert(hit, at, encode = false) {
  const video = $("video");
  const end = Math.max(hit.end, at + 1);
  $("note").textContent = "This browser cannot play the file as it is. The moment is converted …";
  video.dataset.file = "";
  video.onloadedmetadata = () => {
    $("note").textContent = "This browser cannot play the file as it is. This is the moment alone; download the file to see all of it.";
  };
  video.onerror = () => {
    if (!encode) { convert(hit, at, true); return; }
    $("note").textContent = "This browser cannot play the file, and it cannot be converted. Download it, or open it where it is.";
  };
  video.src = `clip/${hit.key}?start=${at}&end=${end}&encode=${encode}`;
  video.play().catch(() => {});
}

function showTimeline(hit, moments) {
  const length = Math.max(...moments.map((moment) => moment.end), hit.end, $("video").dataset.file ? $("video").duration || 0 : 0);
  $("timeline").replaceChildren(...moments.map((moment) => {
    const button = element("button");
    button.type = "button";
    button.ariaLabel = button.title = `From ${formatTime(moment.start)} to ${formatTime(moment.end)}`;
    if (moment.start < hit.end && moment.end > hit.start) button.setAttribute("aria-current", "true");
    button.style.left = `min(${(100 * moment.start) / length}%, 100% - 24px)`;
    button.style.width = `${(100 * (moment.end - moment.start)) / length}%`;
    button.onclick = () => {
      for (const other of $("timeline").children) other.removeAttribute("aria-current");
      button.setAttribute("aria-current", "true");
      playAt({ ...hit, ...moment, key: hit.key }, moment.peak?.[0] ?? moment.start);
    };
    return button;
  }));
}

// All moments of the file that stand out for this query.
async function loadTimeline(hit) {
  const { text, like, not, experts, correction, index } = shownQuery;
  const query = { text, like, not, experts, correction, index, group_by: "file", path: `${hit.folder}/${hit.name}` };
  try {
    const { hits } = await fetchJson("api/search", query);
    const file = hits.find((other) => other.key.split(".")[0] === hit.key.split(".")[0]);
    if (file && shownMoment === hit) showTimeline(hit, file.moments.length ? file.moments : [hit]);
  } catch { /* the moment itself stays on the timeline */ }
}

// A link to a moment is valid as long as the content is in the index, whatever is found now, and wherever it is cut.
async function openLinked({ open, at }) {
  let hit = shownHits.find((other) => other.key === open && other.start <= at && at <= other.end);
  try {
    hit ??= await fetchJson(`api/moment/${encodeURIComponent(open)}${at >= 0 ? `?at=${at}` : ""}`);
    openPlayer(hit, at);
  } catch (error) {
    showStatus(error.message, true);
  }
}

function step(by) {
  const next = shownHits[shownHits.findIndex((other) => other.key === shownMoment.key) + by];
  if (next) openPlayer(next);
}

function closed() {
  const video = $("video");
  video.onerror = video.onloadedmetadata = null;
  video.pause();
  video.removeAttribute("src");
  video.dataset.file = "";
  video.load();
  if (shownMoment) history.replaceState(null, "", shownQuery.text || shownQuery.like ? place(shownQuery) : location.pathname);
  const opener = shownMoment && document.querySelector(`.card[data-key="${CSS.escape(shownMoment.key)}"] .open`);
  shownMoment = null;
  (opener ?? $("text")).focus();
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    $("note").textContent = `${what} copied.`;
  } catch {  // only with https, or on this machine
    $("note").textContent = text;
  }
}

// --- keys ------------------------------------------------------------------------------------------------------------

function columns() {
  const cards = [...document.querySelectorAll(".cards .open")].filter((open) => open.offsetParent);
  const top = cards[0]?.getBoundingClientRect().top;
  return [cards, Math.max(1, cards.filter((open) => Math.abs(open.getBoundingClientRect().top - top) < 2).length)];
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !about) return;
  const focused = document.activeElement;
  const isTyping = focused.matches("input:not([type=radio]):not([type=checkbox]):not([type=range]), select");
  if ($("player").open) {
    if (event.key === " " && !focused.matches("button, a, video")) $("video").paused ? $("video").play() : $("video").pause();
    else if (event.key === "ArrowLeft" && focused !== $("video")) step(-1);
    else if (event.key === "ArrowRight" && focused !== $("video")) step(1);
    else return;
    event.preventDefault();
    return;
  }
  if (event.key === "/" && (!isTyping || (focused === $("text") && !focused.value))) {  // no query begins with it
    $("text").focus();
    $("text").select();
    event.preventDefault();
    return;
  }
  if (event.key === "Escape" && isTyping) {
    const [cards] = columns();
    cards[0]?.focus();
    return;
  }
  const [cards, width] = columns();
  const number = cards.indexOf(focused);
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width };
  if (focused === $("text") && event.key === "ArrowDown" && cards.length) cards[0].focus();
  else if (number >= 0 && event.key in steps) {
    const next = number + steps[event.key];
    if (next < 0 && event.key === "ArrowUp") $("text").focus();
    else cards[Math.min(Math.max(next, 0), cards.length - 1)].focus();
  } else return;
  event.preventDefault();
});

addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file && about) { event.preventDefault(); searchWithFile(file); }
});
addEventListener("dragover", (event) => {
  if ([...event.dataTransfer.types].includes("Files")) { event.preventDefault(); document.body.classList.add("dropping"); }
});
addEventListener("dragleave", () => document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (file && about) { event.preventDefault(); searchWithFile(file); }
});

// --- start -----------------------------------------------------------------------------------------------------------

function buildOptions() {
  for (const node of document.querySelectorAll("#corrections label, #experts label")) node.remove();
  for (const name of about.corrections) {
    const label = element("label");
    const radio = element("input");
    Object.assign(radio, { type: "radio", name: "correction", value: name, onchange: searchAgain });
    label.append(radio, element("span", "", CORRECTIONS[name] ?? name));
    $("corrections").append(label);
  }
  $("corrections").hidden = about.corrections.length < 2;
  for (const name of about.experts) {
    const label = element("label", "", name);
    const slider = element("input");
    Object.assign(slider, { type: "range", name, min: 0, max: 3, step: 0.1, value: 1, onchange: searchAgain });
    const shown = element("output", "", "1.0");
    slider.oninput = () => { shown.textContent = Number(slider.value).toFixed(1); };
    label.append(slider, shown);
    $("experts").append(label);
  }
}

async function showIndex(name) {
  about = await fetchJson("api/about" + (name === undefined ? "" : `?index=${encodeURIComponent(name)}`));
  $("about").textContent = `${about.moments.toLocaleString()} moments, indexed with ${about.model}`;
  $("index").replaceChildren(...about.indexes.map((each) => new Option(each, each, false, each === about.index)));
  $("indexes").hidden = about.indexes.length < 2;
  buildOptions();
}

async function start() {
  try {
    await showIndex();
  } catch (error) {
    showStatus(why(error), true);
    return;
  }
  for (const name of [...TEXTS, ...NUMBERS, "by_file", "words", "then", "not"]) $(name).onchange = searchAgain;
  $("index").onchange = async () => {
    const text = $("text").value;
    await showIndex($("index").value);
    showForm({ text });
    if (text) navigate({ ...readForm(), text });
    else showStart();
  };
  const turn = (step) => { navigate({ ...shownQuery, page: (shownQuery.page ?? 0) + step }); scrollTo({ top: 0 }); };
  $("previous").onclick = () => turn(-1);
  $("next").onclick = () => turn(1);
  $("pick").onclick = () => $("file").click();
  $("file").onchange = () => { if ($("file").files[0]) searchWithFile($("file").files[0]); $("file").value = ""; };
  $("close").onclick = () => $("player").close();
  $("player").onclose = closed;
  $("earlier").onclick = () => step(-1);
  $("later").onclick = () => step(1);
  $("copy_path").onclick = () => copy(`${shownMoment.folder}/${shownMoment.name}`, "Path");
  $("copy_link").onclick = () => copy(location.href, "Link");
  $("player_similar").onclick = () => {
    const hit = shownMoment;
    $("player").addEventListener("close", () => findSimilar(hit), { once: true });  // after `closed`
    $("player").close();
  };
  addEventListener("popstate", readUrl);
  const typed = $("text").value;  // before the answer came
  await readUrl();
  if (typed && !$("text").value) $("text").value = typed;
}

$("sign_in").onsubmit = async (event) => {
  event.preventDefault();
  const headers = { Authorization: `Bearer ${$("token").value}` };
  try {
    const answer = await fetch("api/session", { method: "POST", headers });
    if (answer.ok) location.reload();
    else showStatus("That is not the token.", true);
  } catch (error) {
    showStatus(why(error), true);
  }
};

const ready = start();
$("form").onsubmit = async (event) => {
  event.preventDefault();
  const text = $("text").value;
  await ready;
  if (about) navigate({ ...readForm(), text });
};
