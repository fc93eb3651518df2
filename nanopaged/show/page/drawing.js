"use strict";
// What pictures are made of: elements, colours of the page, and charts over all frames of a scene.

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [property, to] of Object.entries(value)) made.style.setProperty(property, to);
    else made.setAttribute(key, value);
  made.append(...children);  // a string becomes text, never markup
  return made;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function svgPath(d, attributes) {
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", d);
  for (const [key, value] of Object.entries(attributes)) path.setAttribute(key, value);
  return path;
}

// A canvas whose drawing coordinates are the page's pixels.
function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

function hatch(context, stroke, gap) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = gap;
  const pen = tile.getContext("2d");
  pen.strokeStyle = stroke;
  pen.lineWidth = 1.2;
  for (const shift of [-gap, 0, gap]) {
    pen.beginPath();
    pen.moveTo(shift, gap);
    pen.lineTo(shift + gap, 0);
    pen.stroke();
  }
  return context.createPattern(tile, "repeat");
}

// A chart whose x axis is the frames of a scene: it is drawn once, a line marks the present frame, and a press or a
// drag goes to another. `paint(context, width, height, x)`, where x(i) is the left edge of frame i.
class Timeline {
  constructor(length, height, label, paint, seek) {
    Object.assign(this, {length, height, paint, seek});
    this.canvas = element("canvas", {role: "img", "aria-label": label});
    this.cursor = element("div", {class: "cursor", "aria-hidden": "true", style: {
      position: "absolute", top: "0", bottom: "0", width: "2px", background: "var(--accent)", "pointer-events": "none"}});
    this.root = element("div", {style: {position: "relative"}}, this.canvas, this.cursor);
    const press = event => {
      if (event.type === "pointermove" && !event.buttons) return;
      const box = this.canvas.getBoundingClientRect();
      const i = Math.floor((event.clientX - box.left - this.left) / (box.width - this.left) * length);
      if (i >= 0) seek(Math.min(length - 1, i), event.clientY - box.top);
      else if (event.type === "pointerdown") seek(null, event.clientY - box.top);
    };
    this.canvas.addEventListener("pointerdown", press);
    this.canvas.addEventListener("pointermove", press);
  }

  left = 0;  // pixels before the first frame, for names

  draw() {
    const width = this.root.clientWidth;
    if (!width) return;
    const context = sized(this.canvas, width, this.height);
    this.step = (width - this.left) / this.length;
    this.paint(context, width, this.height, i => this.left + i * this.step);
  }

  show(i) {
    this.cursor.style.left = `${this.left + (i + 0.5) * this.step - 1}px`;
  }
}
