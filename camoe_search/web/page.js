// The page of `camoe serve`. What is asked stands in the address after "#", so that going back and sharing work.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const CORRECTIONS = { none: "off", query_bank: "query bank", dynamic: "dynamic" };
const NUMBERS = ["min_seconds", "max_seconds"];

let about = null;
let asked = {};  // what the results shown belong to
let latest = 0;  // number of the latest search: answers to earlier ones are dropped

// "1:02:03.4", as a player shows it.
function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  const [hours, minutes, rest] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60, (tenths % 600) / 10];
  const tail = rest.toFixed(1).padStart(4, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${tail}` : `${minutes}:${tail}`;
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// --- what is asked ---------------------------------------------------------------------------------------------------

function readForm() {
  const weights = {};
  for (const slider of $("experts").querySelectorAll("input")) {
    if (Number(slider.value) !== 1) weights[slider.name] = Number(slider.value);
  }
  const wanted = { correction: document.querySelector("#corrections input:checked")?.value, page: 0 };
  if (Object.keys(weights).length) wanted.experts = weights;
  if ($("path").value) wanted.path = $("path").value;
  for (const name of NUMBERS) if ($(name).value !== "") wanted[name] = Number($(name).value);
  return wanted;
}

function showForm(wanted) {
  $("text").value = wanted.text ?? "";
  for (const radio of document.querySelectorAll("#corrections input")) {
    radio.checked = radio.value === (wanted.correction ?? about.correction);
  }
  for (const slider of $("experts").querySelectorAll("input")) {
    slider.value = wanted.experts?.[slider.name] ?? 1;
    slider.nextElementSibling.textContent = Number(slider.value).toFixed(1);
  }
  $("path").value = wanted.path ?? "";
  for (const name of NUMBERS) $(name).value = wanted[name] ?? "";
  markUsed();
}

function markUsed() {
  const wanted = readForm();
  $("weights").classList.toggle("used", Boolean(wanted.experts));
  $("filters").classList.toggle("used", "path" in wanted || NUMBERS.some((name) => name in wanted));
}

// A new search: remembered in the address, then made.
function go(wanted) {
  history.pushState(null, "", "#" + encodeURIComponent(JSON.stringify(wanted)));
  search(wanted);
}

// The same query with the options as they stand now.
function again() {
  markUsed();
  if (asked.like) go({ ...readForm(), like: asked.like, of: asked.of });
  else if (asked.text) go({ ...readForm(), text: asked.text });
}

function fromAddress() {
  let wanted = {};
  try {
    wanted = JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}");
  } catch { /* an address that was cut off: begin anew */ }
  if (wanted.text || wanted.like) {
    showForm(wanted);
    search(wanted);
  } else {
    asked = {};
    $("hits").replaceChildren();
    $("pager").hidden = true;
    say("");
  }
}

// --- searching -------------------------------------------------------------------------------------------------------

function say(text, isBad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", isBad);
}

async function ask(place, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(place, options);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

async function search(wanted) {
  const mine = ++latest;
  $("hits").classList.add("waiting");
  say("Searching …");
  try {
    const found = await ask("api/search", wanted);
    if (mine !== latest) return;
    asked = wanted;
    show(found);
  } catch (error) {
    if (mine !== latest) return;
    asked = wanted;
    $("hits").replaceChildren();
    $("pager").hidden = true;
    say(error instanceof TypeError ? "The server does not answer: is `camoe serve` still running?" : error.message, true);
  } finally {
    if (mine === latest) $("hits").classList.remove("waiting");
  }
}

function show({ hits, page, more, milliseconds }) {
  const first = hits.length ? $("page").dataset.size * page + 1 : 0;
  const limit = Math.max(0.05, ...hits.flatMap((hit) => Object.values(hit.experts).map(Math.abs)));
  $("hits").replaceChildren(...hits.map((hit, i) => card(hit, first + i, limit)));
  if (!hits.length) say(page ? "No more results." : "Nothing found: the filters leave no moment.");
  else if (asked.like) {
    say(`Moments like ${asked.of} (uncorrected), ${milliseconds} ms`);
    if (asked.before) {
      const back = element("button", "", "Back to the query");
      back.type = "button";
      back.onclick = () => history.back();
      $("status").append(back);
    }
  } else say(`Best moments first, found in ${milliseconds} ms`);
  $("pager").hidden = !(page || more);
  $("previous").disabled = page === 0;
  $("next").disabled = !more;
  $("page").textContent = `Page ${page + 1}`;
}

// --- a moment --------------------------------------------------------------------------------------------------------

function card(hit, rank, limit) {
  const made = $("card").content.firstElementChild.cloneNode(true);
  const part = (name) => made.querySelector(name);
  made.dataset.key = hit.key;
  part("video").poster = `thumbnail/${hit.key}`;
  part(".rank").textContent = rank;
  part(".time").textContent = `${clock(hit.start)} – ${clock(hit.end)}`;
  part(".name").textContent = hit.name;
  part(".name").title = `${hit.folder}/${hit.name}`;
  part(".score").textContent = hit.score.toFixed(3);
  part(".play").ariaLabel = `Play ${hit.name} from ${clock(hit.start)}`;
  part(".play").onclick = () => play(made, hit);
  part(".similar").onclick = () => {
    showForm({ ...readForm(), text: "" });
    go({ ...readForm(), like: hit.key, of: `${hit.name} at ${clock(hit.start)}`, before: true });
    scrollTo({ top: 0, behavior: "smooth" });
  };
  about.experts.forEach((name, i) => part(".shares").append(...share(name, hit.experts[name], limit, i)));
  if (Math.abs(hit.correction) >= 0.0005) {
    part(".shares").append(element("dt", "", "hub"), element("dd"), element("dd", "value", hit.correction.toFixed(3)));
  }
  return made;
}

// Name, bar and value of what an expert adds; a bar to the left is negative.
function share(name, value, limit, i) {
  const bar = element("dd");
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", "0 0 100 8");
  picture.setAttribute("preserveAspectRatio", "none");
  const length = (50 * Math.abs(value)) / limit;
  const parts = [[0, 100, "var(--line)", 3, 2], [value < 0 ? 50 - length : 50, length, `var(--expert-${i % 4})`, 0, 8]];
  for (const [x, width, fill, y, height] of parts) {
    const rectangle = document.createElementNS(SVG, "rect");
    for (const [key, number] of Object.entries({ x, y, width, height })) rectangle.setAttribute(key, number);
    rectangle.style.fill = fill;
    picture.append(rectangle);
  }
  bar.append(picture);
  return [element("dt", "", name), bar, element("dd", "value", value.toFixed(3))];
}

// Play a moment from its first second to its last; one at a time.
function play(made, hit) {
  for (const other of document.querySelectorAll(".card.playing video")) other.pause();
  const video = made.querySelector("video");
  made.classList.add("playing");
  video.controls = true;
  if (!video.src) {
    video.src = `media/${hit.key}#t=${hit.start},${hit.end}`;
    video.onloadedmetadata = () => { if (Math.abs(video.currentTime - hit.start) > 0.05) video.currentTime = hit.start; };
    video.onerror = () => made.querySelector(".screen").append(
      element("div", "note", `This browser cannot play the file. It is ${hit.folder}/${hit.name}, from ${clock(hit.start)}.`),
    );
  }
  video.play().catch(() => {});  // onerror says why
}

// --- beginning -------------------------------------------------------------------------------------------------------

function buildOptions() {
  for (const name of about.corrections) {
    const label = element("label");
    const radio = element("input");
    Object.assign(radio, { type: "radio", name: "correction", value: name, onchange: again });
    label.append(radio, element("span", "", CORRECTIONS[name] ?? name));
    $("corrections").append(label);
  }
  $("corrections").hidden = about.corrections.length < 2;
  for (const name of about.experts) {
    const label = element("label", "", name);
    const slider = element("input");
    Object.assign(slider, { type: "range", name, min: 0, max: 3, step: 0.1, value: 1, onchange: again });
    const shown = element("output", "", "1.0");
    slider.oninput = () => { shown.textContent = Number(slider.value).toFixed(1); };
    label.append(slider, shown);
    $("experts").append(label);
  }
}

async function begin() {
  try {
    about = await ask("api/about");
  } catch (error) {
    say(error.message, true);
    return;
  }
  $("about").textContent = `${about.moments.toLocaleString()} moments, indexed with ${about.model}`;
  $("page").dataset.size = about.page_size;
  buildOptions();
  for (const name of ["path", ...NUMBERS]) $(name).onchange = again;
  const turn = (step) => { go({ ...asked, page: (asked.page ?? 0) + step }); scrollTo({ top: 0 }); };
  $("previous").onclick = () => turn(-1);
  $("next").onclick = () => turn(1);
  addEventListener("popstate", fromAddress);
  showForm({ text: $("text").value });  // typed before the answer came
  fromAddress();
}

const ready = begin();
$("form").onsubmit = async (event) => {
  event.preventDefault();
  await ready;
  if (about) go({ ...readForm(), text: $("text").value });
};
