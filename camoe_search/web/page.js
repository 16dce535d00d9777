// The page of `camoe serve`. The query is kept in the URL after "#", so that the back button and sharing work.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const CORRECTIONS = { none: "off", query_bank: "query bank", dynamic: "dynamic" };
const NUMBERS = ["min_seconds", "max_seconds"];

let about = null;
let shownQuery = {};  // the query of the results on the page
let latest = 0;  // number of the latest search; answers to earlier ones are ignored

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
  const query = { correction: document.querySelector("#corrections input:checked")?.value, page: 0 };
  if (Object.keys(weights).length) query.experts = weights;
  if ($("path").value) query.path = $("path").value;
  for (const name of NUMBERS) if ($(name).value !== "") query[name] = Number($(name).value);
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
  $("path").value = query.path ?? "";
  for (const name of NUMBERS) $(name).value = query[name] ?? "";
  markUsed();
}

function markUsed() {
  const query = readForm();
  $("weights").classList.toggle("used", Boolean(query.experts));
  $("filters").classList.toggle("used", "path" in query || NUMBERS.some((name) => name in query));
}

// Put a new query into the URL, then search.
function navigate(query) {
  history.pushState(null, "", "#" + encodeURIComponent(JSON.stringify(query)));
  search(query);
}

// The same query with the current options.
function searchAgain() {
  markUsed();
  if (shownQuery.like) navigate({ ...readForm(), like: shownQuery.like, of: shownQuery.of });
  else if (shownQuery.text) navigate({ ...readForm(), text: shownQuery.text });
}

function searchFromUrl() {
  let query = {};
  try {
    query = JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}");
  } catch { /* a truncated URL: start with an empty page */ }
  if (query.text || query.like) {
    showForm(query);
    search(query);
  } else {
    shownQuery = {};
    $("hits").replaceChildren();
    $("pager").hidden = true;
    showStatus("");
  }
}

// --- searching -------------------------------------------------------------------------------------------------------

function showStatus(text, isBad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", isBad);
}

async function fetchJson(place, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(place, options);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

async function search(query) {
  const number = ++latest;
  $("hits").classList.add("waiting");
  showStatus("Searching …");
  try {
    const found = await fetchJson("api/search", query);
    if (number !== latest) return;
    shownQuery = query;
    showResults(found);
  } catch (error) {
    if (number !== latest) return;
    shownQuery = query;
    $("hits").replaceChildren();
    $("pager").hidden = true;
    showStatus(error instanceof TypeError ? "The server does not answer: is `camoe serve` still running?" : error.message, true);
  } finally {
    if (number === latest) $("hits").classList.remove("waiting");
  }
}

function showResults({ hits, page, more, milliseconds }) {
  const first = hits.length ? $("page").dataset.size * page + 1 : 0;
  const limit = Math.max(0.05, ...hits.flatMap((hit) => Object.values(hit.experts).map(Math.abs)));
  $("hits").replaceChildren(...hits.map((hit, i) => card(hit, first + i, limit)));
  if (!hits.length) showStatus(page ? "No more results." : "Nothing found: the filters leave no moment.");
  else if (shownQuery.like) {
    showStatus(`Moments like ${shownQuery.of} (uncorrected), ${milliseconds} ms`);
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

// --- a moment --------------------------------------------------------------------------------------------------------

function card(hit, rank, limit) {
  const node = $("card").content.firstElementChild.cloneNode(true);
  const part = (name) => node.querySelector(name);
  node.dataset.key = hit.key;
  part("video").poster = `thumbnail/${hit.key}`;
  part(".rank").textContent = rank;
  part(".time").textContent = `${formatTime(hit.start)} – ${formatTime(hit.end)}`;
  part(".name").textContent = hit.name;
  part(".name").title = `${hit.folder}/${hit.name}`;
  part(".score").textContent = hit.score.toFixed(3);
  part(".play").ariaLabel = `Play ${hit.name} from ${formatTime(hit.start)}`;
  part(".play").onclick = () => play(node, hit);
  part(".similar").onclick = () => {
    showForm({ ...readForm(), text: "" });
    navigate({ ...readForm(), like: hit.key, of: `${hit.name} at ${formatTime(hit.start)}`, before: true });
    scrollTo({ top: 0, behavior: "smooth" });
  };
  about.experts.forEach((name, i) => part(".shares").append(...expertRow(name, hit.experts[name], limit, i)));
  if (Math.abs(hit.correction) >= 0.0005) {
    part(".shares").append(element("dt", "", "hub"), element("dd"), element("dd", "value", hit.correction.toFixed(3)));
  }
  return node;
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

// Play a moment from its start to its end. Only one plays at a time.
function play(node, hit) {
  for (const other of document.querySelectorAll(".card.playing video")) other.pause();
  const video = node.querySelector("video");
  node.classList.add("playing");
  video.controls = true;
  if (!video.src) {
    video.src = `media/${hit.key}#t=${hit.start},${hit.end}`;
    const giveUp = (what) => {
      video.pause();
      if (node.querySelector(".note")) return;
      const where = `It is ${hit.folder}/${hit.name}, from ${formatTime(hit.start)}.`;
      node.querySelector(".screen").append(element("div", "note", `This browser cannot play ${what}. ${where}`));
    };
    video.onloadedmetadata = () => {
      if (!video.videoWidth) giveUp("the picture of the file, only its sound");  // HEVC and MPEG-4 in some browsers
      else if (Math.abs(video.currentTime - hit.start) > 0.05) video.currentTime = hit.start;
    };
    video.onerror = () => giveUp("the file");
  }
  video.play().catch(() => {});  // onerror says why
}

// --- start -----------------------------------------------------------------------------------------------------------

function buildOptions() {
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

async function start() {
  try {
    about = await fetchJson("api/about");
  } catch (error) {
    showStatus(error.message, true);
    return;
  }
  $("about").textContent = `${about.moments.toLocaleString()} moments, indexed with ${about.model}`;
  $("page").dataset.size = about.page_size;
  buildOptions();
  for (const name of ["path", ...NUMBERS]) $(name).onchange = searchAgain;
  const turn = (step) => { navigate({ ...shownQuery, page: (shownQuery.page ?? 0) + step }); scrollTo({ top: 0 }); };
  $("previous").onclick = () => turn(-1);
  $("next").onclick = () => turn(1);
  addEventListener("popstate", searchFromUrl);
  showForm({ text: $("text").value });  // keep what was typed before the answer came
  searchFromUrl();
}

const ready = start();
$("form").onsubmit = async (event) => {
  event.preventDefault();
  await ready;
  if (about) navigate({ ...readForm(), text: $("text").value });
};
