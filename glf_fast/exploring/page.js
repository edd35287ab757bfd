// The page of the explorer. Controls are read into arguments, which every run is asked with; a figure shows each answer.
"use strict";

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const one = (selector, within = document) => within.querySelector(selector);

function make(tag, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
}

async function ask(path, body, type = "application/json") {
  let response, answer;
  try {
    response = await fetch(path, body === undefined ? {} : { method: "POST", body, headers: { "Content-Type": type } });
    answer = await response.json();
  } catch {
    throw new Error("the explorer does not answer; is its command still running?");
  }
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// A figure for each run, which shows the answers to the newest arguments: while one is computed, only the last ones wait.
class Figure {
  constructor(run, place, action, container) {
    Object.assign(this, { run, place, action });
    this.image = make("img", { alt: "", draggable: false });
    this.picture = make("div", { className: "picture", hidden: true }, this.image);
    this.lines = make("ul", { className: "lines" });
    this.error = make("p", { className: "error", hidden: true });
    this.time = make("span", { className: "ms" });
    this.download = make("a", { textContent: "Download PNG", hidden: true });
    this.body = make("div", { className: "plane" }, this.picture);
    this.element = make("figure", {},
      make("figcaption", {}, make("strong", { textContent: run.name }),
        make("small", { textContent: `${run.title}, ${run.shape[1]} × ${run.shape[2]}, ${run.data}` })),
      this.body, this.error, this.lines, make("div", { className: "foot" }, this.download, this.time));
    container.append(this.element);
    this.able = run.abilities.includes(action);
    const reason = action === "edit" && run.encodes ? ": its data have no labels, and no file of attributes was given" : "";
    if (!this.able) this.fail(`${run.title} cannot do this${reason}.`);
  }

  async show(values, name) {
    if (!this.able) return;
    this.next = { values, name };
    if (this.busy) return;
    this.busy = true;
    while (this.next) {
      const { values, name } = this.next;
      this.next = null;
      try {
        this.fill(await ask(`runs/${this.place}/${this.action}`, JSON.stringify(values)), name);
      } catch (error) {
        this.fail(error.message);
      }
    }
    this.busy = false;
  }

  fill(answer, name) {
    this.answer = answer;
    this.image.src = this.download.href = `data:image/png;base64,${answer.picture}`;
    this.image.alt = `${this.action} of ${this.run.name}`;
    this.download.download = `${this.run.name}-${name}.png`;
    this.picture.hidden = this.download.hidden = this.time.hidden = false;
    this.error.hidden = true;
    this.time.textContent = `${answer.ms} ms on the server`;
    this.lines.replaceChildren(...answer.lines.map((line) => make("li", { textContent: line })));
    this.element.dataset.answers = 1 + Number(this.element.dataset.answers || 0);
  }

  fail(message) {
    this.picture.hidden = this.download.hidden = this.time.hidden = true;
    this.lines.replaceChildren();
    this.error.textContent = message;
    this.error.hidden = false;
  }
}

// A choice of a test image by its number, or of a file, which the server makes fit each run and the page keeps.
class Picker {
  constructor(element, tests, start, changed) {
    this.element = element;
    this.image = make("img", { alt: element.dataset.name });
    this.number = make("input", { type: "number", min: 0, max: tests - 1, value: start, name: "test" });
    this.file = make("input", { type: "file", accept: "image/*", hidden: true });
    this.error = make("span", { className: "error", hidden: true });
    const title = { start: "From", end: "To", image: "Image" }[element.dataset.name];
    const random = make("button", { type: "button", textContent: "Random" });
    const upload = make("button", { type: "button", textContent: "Upload …" });
    element.append(this.image, make("label", {}, `${title}: test image`, this.number), random, upload, this.file, this.error);
    this.number.addEventListener("change", () => this.take(changed));
    random.addEventListener("click", () => {
      this.number.value = Math.floor(Math.random() * tests);
      this.take(changed);
    });
    upload.addEventListener("click", () => this.file.click());
    this.file.addEventListener("change", () => this.upload(changed));
    this.take(() => {});
  }

  take(changed) {
    if (!this.number.checkValidity() || this.number.value === "") {
      return this.refuse(`Test images are 0 to ${this.number.max}.`);
    }
    this.error.hidden = true;
    this.uploaded = null;
    this.file.value = "";
    this.test = Number(this.number.value);
    this.image.src = `test/${this.test}`;
    changed();
  }

  async upload(changed) {
    const [file] = this.file.files;
    if (!file) return;
    try {
      const { images } = await ask("upload", file, "application/octet-stream");
      this.uploaded = images;
      this.number.value = "";
      this.image.src = `data:image/png;base64,${images[0]}`;
      this.error.hidden = true;
      changed();
    } catch (error) {
      this.refuse(`${file.name}: ${error.message}`);
    }
    this.file.value = "";
  }

  refuse(message) {
    this.error.textContent = message;
    this.error.hidden = false;
  }

  value(place) {
    return this.uploaded ? { png: this.uploaded[place] } : { test: this.test };
  }

  get name() {
    return this.uploaded ? "upload" : `test-${this.test}`;
  }
}

class Page {
  constructor(about) {
    Object.assign(this, about);
    this.figures = {};
    for (const container of all(".columns")) {
      const { action } = container.dataset;
      this.figures[action] = this.runs.map((run, place) => new Figure(run, place, action, container));
    }
    const refresh = { sample: this.sample, walk: this.plane, interpolate: this.interpolate, edit: this.edit, reconstruct: this.reconstruct };
    this.pickers = {};
    for (const element of all(".picker")) {
      const tab = element.closest("section").id;
      const start = element.dataset.name === "end" ? 1 : 0;
      const picker = new Picker(element, this.tests, start, () => refresh[tab].call(this));
      (this.pickers[tab] ??= {})[element.dataset.name] = picker;
    }
    this.prepareSample();
    this.preparePlane();
    this.prepareEdit();
    for (const form of all("form")) form.addEventListener("submit", (event) => event.preventDefault());
    for (const section of all("section")) {
      if (!this.runs.some((run) => run.abilities.includes(section.id))) continue;
      const button = make("button", { type: "button", textContent: section.dataset.title, id: `tab-${section.id}` });
      button.setAttribute("role", "tab");
      button.setAttribute("aria-controls", section.id);
      button.addEventListener("click", () => {
        this.select(section.id);
        refresh[section.id].call(this);
      });
      one("nav").append(button);
    }
    this.select("sample");
    this.sample();
  }

  select(id) {
    for (const section of all("section")) section.classList.toggle("shown", section.id === id);
    for (const tab of all("nav button")) tab.setAttribute("aria-selected", tab.id === `tab-${id}`);
  }

  show(action, values, name) {
    this.figures[action].forEach((figure, place) => figure.show(values(place), `${action}-${name}`));
  }

  // -- samples, and their neighbours ---------------------------------------------------------------------------------------

  prepareSample() {
    const form = one("#sample form").elements;
    for (const name of ["temperature", "seed"]) form[name].addEventListener("input", () => this.sample());
    form.count.addEventListener("change", () => this.sample());
    form.another.addEventListener("click", () => {
      form.seed.value = Math.floor(Math.random() * 100000);
      this.sample();
    });
    for (const figure of this.figures.nearest) figure.element.hidden = true;
    for (const figure of this.figures.sample) {
      figure.mark = make("div", { className: "mark", hidden: true });
      figure.picture.append(figure.mark);
      figure.image.addEventListener("click", (event) => this.nearest(figure, event));
    }
  }

  samples() {
    const form = one("#sample form").elements;
    one("#sample output").textContent = Number(form.temperature.value).toFixed(2);
    return { temperature: Number(form.temperature.value), seed: whole(form.seed), count: Number(form.count.value) };
  }

  sample() {
    const values = this.samples();
    for (const figure of this.figures.sample) figure.mark.hidden = true;
    for (const figure of this.figures.nearest) figure.element.hidden = true;
    this.show("sample", () => values, `seed-${values.seed}-temperature-${values.temperature}`);
  }

  nearest(figure, event) {
    const { columns, count } = figure.answer, rows = Math.ceil(count / columns);
    const column = Math.min(columns - 1, Math.floor((event.offsetX / figure.image.clientWidth) * columns));
    const row = Math.min(rows - 1, Math.floor((event.offsetY / figure.image.clientHeight) * rows));
    const place = row * columns + column, values = this.samples();
    if (place >= count) return;
    this.figures.sample.forEach(({ mark, image }) => {
      Object.assign(mark.style, {
        left: `${(100 * column) / columns}%`, top: `${(100 * row) / rows}%`, width: `${100 / columns}%`, height: `${100 / rows}%`,
      });
      mark.hidden = false;
    });
    for (const figure of this.figures.nearest) figure.element.hidden = false;
    this.show("nearest", () => ({ ...values, place }), `seed-${values.seed}-sample-${place}`);
  }

  // -- the plane -----------------------------------------------------------------------------------------------------------

  preparePlane() {
    const form = one("#walk form").elements;
    const names = new Set(this.runs.flatMap((run) => [...run.components, ...run.attributes]));
    for (const select of [form.right, form.up]) select.append(...[...names].map((name) => make("option", { textContent: name })));
    form.up.selectedIndex = 1;
    if (!this.runs.some((run) => run.encodes)) one("option[value=image]", form.through).remove();
    for (const name of ["right", "up", "through"]) form[name].addEventListener("change", () => this.plane());
    form.seed.addEventListener("input", () => this.plane());
    this.at = [0, 0];
    for (const figure of this.figures.walk) {
      if (!figure.able) continue;
      figure.map = make("img", { alt: "map of the plane", draggable: false });
      figure.dot = make("div", { className: "dot" });
      const pad = make("div", { className: "pad", tabIndex: 0 }, figure.map, figure.dot);
      figure.body.prepend(pad);
      pad.addEventListener("pointerdown", (event) => {
        pad.setPointerCapture(event.pointerId);
        this.drag(pad, event);
      });
      pad.addEventListener("pointermove", (event) => event.buttons && this.drag(pad, event));
      pad.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
        if (!step) return;
        event.preventDefault();
        this.move(this.at.map((value, axis) => value + step[axis]));
      });
    }
  }

  // The dot is over the middle of the map's image of its place.
  drag(pad, event) {
    const { left, top, width, height } = pad.getBoundingClientRect(), reach = (this.extent * this.map) / (this.map - 1);
    this.move([reach * (2 * (event.clientX - left) / width - 1), reach * (1 - 2 * (event.clientY - top) / height)]);
  }

  move(at) {
    this.at = at.map((value) => Math.max(-this.extent, Math.min(this.extent, value)));
    const reach = (this.extent * this.map) / (this.map - 1);
    for (const figure of this.figures.walk) {
      if (figure.able) Object.assign(figure.dot.style, { left: `${50 * (1 + this.at[0] / reach)}%`, top: `${50 * (1 - this.at[1] / reach)}%` });
    }
    const values = this.planeValues();
    this.show("walk", (place) => ({ ...values(place), at: this.at }), this.at.map((value) => value.toFixed(2)).join("-"));
  }

  planeValues() {
    const form = one("#walk form").elements;
    const axes = [form.right.value, form.up.value], seed = whole(form.seed), through = form.through.value;
    for (const element of all("#walk [data-for]")) element.hidden = element.dataset.for !== through;
    return (place) => ({ axes, seed, origin: through === "image" ? this.pickers.walk.image.value(place) : through });
  }

  plane() {
    const values = this.planeValues();
    this.move(this.at);
    for (const figure of this.figures.walk) {
      if (!figure.able) continue;
      const request = (figure.requests = 1 + (figure.requests || 0));
      ask(`runs/${figure.place}/plane`, JSON.stringify(values(figure.place))).then(
        (answer) => {
          if (request === figure.requests) figure.map.src = `data:image/png;base64,${answer.picture}`;
        },
        () => figure.map.removeAttribute("src"), // the reason is shown beside, by the picture of the dot's place
      );
    }
  }

  // -- images --------------------------------------------------------------------------------------------------------------

  interpolate() {
    const { start, end } = this.pickers.interpolate;
    this.show("interpolate", (place) => ({ start: start.value(place), end: end.value(place) }), `${start.name}-${end.name}`);
  }

  prepareEdit() {
    const names = new Set(this.runs.flatMap((run) => (run.abilities.includes("edit") ? run.attributes : [])));
    for (const name of names) {
      const input = make("input", { type: "range", min: -2, max: 2, step: 0.05, value: 0, name });
      const label = make("label", {}, make("span", { textContent: name, title: name }), input, make("output", { textContent: "0.00" }));
      input.addEventListener("input", () => this.edit());
      one("#amounts").append(label);
    }
    one("#edit form").elements.reset.addEventListener("click", () => {
      for (const input of all("#amounts input")) input.value = 0;
      this.edit();
    });
  }

  edit() {
    const { image } = this.pickers.edit, amounts = {};
    for (const input of all("#amounts input")) {
      one("output", input.parentElement).textContent = Number(input.value).toFixed(2);
      if (Number(input.value)) amounts[input.name] = Number(input.value);
    }
    this.show("edit", (place) => ({ image: image.value(place), amounts }), image.name);
  }

  reconstruct() {
    const { image } = this.pickers.reconstruct;
    this.show("reconstruct", (place) => ({ image: image.value(place) }), image.name);
  }
}

// A whole number for the server, or what it then refuses with the reason.
function whole(input) {
  return input.value === "" ? null : Number(input.value);
}

ask("about").then((about) => (window.page = new Page(about))).catch((error) => {
  one("#failure").textContent = error.message;
  one("#failure").hidden = false;
});
