"use strict";
// Playing: scenes, frames and events, by buttons, keys, the scrubber, a search and links.

const FRAME_MS = 1100;  // at speed 1

class Player {
  constructor(data) {
    this.data = data;
    this.stage = document.getElementById("stage");
    this.at = 0;
    this.isAsking = false;
    this.timer = null;
    this.met = new Set();  // kinds of events that playing has paused at, in this scene
    for (const id of ["caption", "why", "where", "question", "asked", "choices", "scrubber", "speed", "ask", "said",
                      "intro", "scenes", "wanted"]) this[id] = document.getElementById(id);
    this.button = document.getElementById("play");
    this.eventKind = document.getElementById("event-kind");
    document.getElementById("title").textContent = data.title;
    this.tabs = data.scenes.map((scene, i) => element("button", {role: "tab", "aria-controls": "stage",
                                                                 onclick: () => this.open(i)}, scene.title));
    this.scenes.append(...this.tabs);
    this.scenes.hidden = data.scenes.length < 2;
    this.listen();
    this.follow() || this.open(0);
  }

  listen() {
    const press = (id, deed) => document.getElementById(id).addEventListener("click", deed);
    press("play", () => this.timer ? this.pause() : this.play());
    press("next", () => this.forward());
    press("previous", () => this.show(this.at - 1));
    press("next-event", () => this.jump(1));
    press("previous-event", () => this.jump(-1));
    press("help-button", event => {
      const help = document.getElementById("help");
      help.hidden = !help.hidden;
      event.target.setAttribute("aria-expanded", String(!help.hidden));
    });
    this.scrubber.addEventListener("input", () => this.show(+this.scrubber.value));
    this.speed.addEventListener("change", () => this.timer && this.play());
    document.getElementById("search").addEventListener("submit", event => {
      event.preventDefault();
      this.search();
    });
    document.addEventListener("keydown", event => this.key(event));
    window.addEventListener("hashchange", () => this.follow());
    let again = 0;
    window.addEventListener("resize", () => {
      cancelAnimationFrame(again);
      again = requestAnimationFrame(() => this.redraw());
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  redraw() {
    this.scene.resized?.();
    this.scene.draw(this.at);
  }

  // "#scene=2&step=120.2", or a part of it. Whether there is such a place.
  follow() {
    const wanted = new URLSearchParams(location.hash.slice(1)), number = Number(wanted.get("scene") ?? 1) - 1;
    if (![...wanted.keys()].length) return false;
    if (!this.data.scenes[number]) {
      if (!this.scene) this.open(0);
      this.said.textContent = `there is no scene ${wanted.get("scene")}`;
      return true;
    }
    if (number !== this.number) this.open(number, false);
    const frame = wanted.has("step") ? this.scene.find(wanted.get("step")) : 0;
    this.show(Math.max(0, frame));
    if (frame < 0) this.said.textContent = `there is no step ${wanted.get("step")} in this scene; this is its first`;
    return true;
  }

  open(number, show = true) {
    this.pause();
    this.number = number;
    const scene = this.data.scenes[number];
    this.tabs.forEach((tab, i) => tab.setAttribute("aria-selected", String(i === number)));
    this.intro.textContent = scene.intro;
    this.stage.replaceChildren();
    this.scene = scene.kind === "twin" ? new TwinPlayer(scene, this.stage)
      : new PoolScene(scene, this.stage, i => this.show(i), i => this.linkTo(i));
    this.met = new Set();
    this.scrubber.max = this.scene.length - 1;
    const kinds = this.scene.kinds();
    this.eventKind.replaceChildren(element("option", {value: ""}, "of any kind"),
                                   ...kinds.map(kind => element("option", {value: kind}, kind)));
    this.eventKind.parentElement.hidden = !kinds.length;
    for (const id of ["ask", "search"]) document.getElementById(id).closest("label, form").hidden = scene.kind !== "pool";
    if (show) this.show(0);
  }

  linkTo(i) {
    return `#scene=${this.number + 1}&step=${this.scene.name(i)}`;
  }

  // Shows a frame; any question is over.
  show(i) {
    this.at = Math.max(0, Math.min(this.scene.length - 1, i));
    this.said.textContent = "";
    this.isAsking = false;
    this.question.hidden = true;
    this.caption.hidden = this.why.hidden = false;
    const {caption, why} = this.scene.telling(this.at);
    this.caption.textContent = caption;
    this.why.textContent = why;
    this.where.textContent = this.scene.where(this.at);
    this.scrubber.value = this.at;
    this.scrubber.setAttribute("aria-valuetext", `${this.where.textContent}: ${caption}`);
    this.scene.draw(this.at);
    if (!this.timer) this.address();
  }

  // A link to this frame, a moment later: browsers refuse many changes in a row, as scrubbing would make them.
  address() {
    clearTimeout(this.late);
    this.late = setTimeout(() =>
      history.replaceState(null, "", this.linkTo(this.at)), 200);
  }

  // One frame on; if it can be guessed, the question comes first.
  forward() {
    if (this.isAsking) return this.show(this.at + 1);
    const next = this.at + 1;
    if (next >= this.scene.length) return this.pause();
    const {question} = this.scene.telling(next);
    if (question && this.ask.checked) this.pose(question, next);
    else this.show(next);
  }

  pose([text, choices, answer], next) {
    this.pause();
    this.scene.anticipate(next);
    this.isAsking = true;
    this.caption.hidden = this.why.hidden = true;
    this.question.hidden = false;
    this.asked.textContent = text;
    this.choices.replaceChildren(...choices.map((choice, i) => element("button", {onclick: () => {
      this.show(this.at + 1);
      this.caption.textContent = `${i === answer ? "Yes" : `No, but: ${choices[answer]}`}. ${this.caption.textContent}`;
      this.button.focus({preventScroll: true});
    }}, `${i + 1}: ${choice}`)));
  }

  playing() {
    if (this.at >= this.scene.length - 1 && !this.isAsking) return this.pause();
    this.forward();
    if (this.isAsking) return;
    const fresh = this.scene.telling(this.at).names.filter(name => this.scene.kinds().includes(name) && !this.met.has(name));
    fresh.forEach(name => this.met.add(name));
    if (fresh.length) {
      this.pause();
      this.said.textContent = `paused at the first event of this kind (${fresh[0]}); play goes on`;
    }
  }

  play() {
    clearInterval(this.timer);
    if (this.at >= this.scene.length - 1) this.show(0);
    this.timer = setInterval(() => this.playing(), FRAME_MS / Number(this.speed.value));
    this.button.textContent = "❚❚ pause";
    this.said.textContent = "";
  }

  pause() {
    if (!this.timer) return;
    clearInterval(this.timer);
    this.timer = null;
    this.button.textContent = "▶ play";
    this.address();
  }

  jump(by) {
    this.pause();
    for (let i = this.at + by; i >= 0 && i < this.scene.length; i += by)
      if (this.scene.isEvent(i, this.eventKind.value)) return this.show(i);
    this.said.textContent = `there is no ${by > 0 ? "later" : "earlier"} event of this kind`;
  }

  search() {
    const text = this.wanted.value, found = this.scene.search(text);
    if (found) this.show(found.to);
    this.said.textContent = found ? found.said : text.trim() ? `no request has the number or the words “${text}”`
      : "type the number of a request, or words of it";
  }

  key(event) {
    const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) && event.target.type !== "checkbox";
    if (event.key === "Escape" && typing) return event.target.blur();
    if (event.ctrlKey || event.metaKey || event.altKey || typing) return;
    const pressed = event.target.matches("button, [type=checkbox]") && (event.key === " " || event.key === "Enter");
    const deed = {
      " ": () => this.timer ? this.pause() : this.play(), ArrowRight: () => event.shiftKey ? this.jump(1) : this.forward(),
      ArrowLeft: () => event.shiftKey ? this.jump(-1) : this.show(this.at - 1), Home: () => this.show(0),
      End: () => this.show(this.scene.length - 1), "/": () => this.wanted.focus(), "+": () => this.faster(1),
      "-": () => this.faster(-1),
    }[event.key] ?? (this.isAsking && "123".includes(event.key) ? () => this.choices.children[event.key - 1]?.click() : null);
    if (!deed || pressed) return;
    event.preventDefault();
    deed();
  }

  faster(by) {
    this.speed.selectedIndex = Math.max(0, Math.min(this.speed.length - 1, this.speed.selectedIndex + by));
    if (this.timer) this.play();
  }
}

// A scene that compares servers: see twin.js.
class TwinPlayer {
  constructor(scene, root) {
    Object.assign(this, twinScene(scene, root));
  }
  name(i) { return String(i + 1); }
  find(name) { return parseInt(name, 10) - 1 < this.length ? parseInt(name, 10) - 1 : -1; }
  where(i) { return `second ${this.timeOf(i).toFixed(2)}, the same for all`; }
  telling(i) { return {caption: this.caption(i), names: [], why: "", question: null}; }
  kinds() { return []; }
  search() { return null; }
}

window.player = new Player(JSON.parse(document.getElementById("data").textContent));
