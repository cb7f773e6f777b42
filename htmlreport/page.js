"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = id => document.getElementById(id);
  const make = (tag, className, text) => {
    const e = document.createElement(tag);
    if (className) e.className = className;
    if (text !== undefined) e.textContent = text;
    return e;
  };
  const button = (text, click) => {
    const b = make("button", "", text);
    b.type = "button";
    b.addEventListener("click", click);
    return b;
  };

  // The picture: a treemap of the layers, each within the frame of the run that it belongs to.

  const head = 20, least = 4;
  // A run's own layers stay together beside what is built on them.
  const node = run => {
    const layers = run.layers.map(layer => ({ layer, run }));
    return { run, children: run.runs ? [{ run, beginning: true, children: layers }, ...run.runs.map(node)] : layers };
  };
  const disk = d3.hierarchy({ children: data.runs.map(node) }, d => d.children)
    .sum(d => d.layer === undefined ? 0 : data.layers[d.layer].bytes)
    .sort((a, b) => b.value - a.value);
  const picture = $("picture");
  let root = disk, at = null, found = null;

  const images = d => d.data.run ? d.data.run.images : data.images.map((_, i) => i);
  const isLayer = d => d.data.layer !== undefined;
  const isShared = d => images(d).length > 1;
  const layerOf = d => data.layers[d.data.layer];
  const frameOf = d => d.parent.data.beginning ? d.parent.parent : d.parent;
  const title = d => d === disk ? "Whole disk" : isLayer(d) ? layerOf(d).label : d.data.run.label;

  const words = d => {
    const shared = isShared(d) ? `shared by ${images(d).length} images` : `of ${data.images[images(d)[0]].title}`;
    if (isLayer(d)) return `Layer ${layerOf(d).label}, ${layerOf(d).size}, ${shared}${layerOf(d).new ? ", new" : ""}`;
    const run = d.data.run;
    return isShared(d) ? `${run.label}, ${run.size}, with what is built on them ${run.whole}`
      : `${run.label}, ${run.size} of its own in ${run.layers.length} layers`;
  };

  function draw() {
    const hadFocus = picture.contains(document.activeElement);
    const w = picture.clientWidth, h = picture.clientHeight;
    // What is laid out is a copy: the layout of the whole disk starts from the one of a part.
    const laid = root.copy();
    const origin = new Map();
    const pair = (copy, from) => {
      origin.set(copy, from);
      (copy.children || []).forEach((c, i) => pair(c, from.children[i]));
    };
    pair(laid, root);
    const plain = d => d === laid || d.data.beginning;
    const wide = d => !plain(d) && d.children && d.x1 - d.x0 > 72 && d.y1 - d.y0 > head + 16;
    d3.treemap().size([w, h]).round(true).paddingInner(2)
      .paddingTop(d => wide(d) ? head : plain(d) ? 0 : 3)
      .paddingRight(d => plain(d) ? 0 : 3).paddingBottom(d => plain(d) ? 0 : 3).paddingLeft(d => plain(d) ? 0 : 3)(laid);

    const boxes = new Map();
    const put = (d, parent, x, y, level) => {
      if (d.data.beginning) return d.children.forEach(c => put(c, parent, x, y, level));
      const width = d.x1 - d.x0, height = d.y1 - d.y0;
      if (width < least || height < least) return;
      const from = origin.get(d);
      const b = make("div", "box " + (isLayer(d) ? "leaf " + (isShared(d) ? "shared" : "own") : "frame"));
      if (isLayer(d) && layerOf(d).new) b.classList.add("new");
      Object.assign(b.style, { left: d.x0 - x + "px", top: d.y0 - y + "px", width: width + "px", height: height + "px" });
      b.setAttribute("role", "treeitem");
      b.setAttribute("aria-level", level);
      b.setAttribute("aria-label", words(d));
      b.tabIndex = -1;
      if (found && !images(d).some(i => found.has(i))) b.classList.add("faded");
      // Asked again, wide would answer for what has been rounded since.
      const titled = d.children && Math.min(...d.children.map(c => c.y0)) - d.y0 >= head;
      if (isLayer(d) ? width > 60 && height > 20 : titled) {
        const name = make("span", "name");
        name.setAttribute("aria-hidden", "true");
        if (isLayer(d)) {
          name.append(make("code", "", layerOf(d).label));
          if (height > 38) name.append(make("br"), layerOf(d).size);
        } else {
          name.textContent = fitting(d, width);
        }
        b.append(name);
      }
      boxes.set(from, b);
      b.addEventListener("click", e => { e.stopPropagation(); choose(from); b.focus(); });
      b.addEventListener("dblclick", e => { e.stopPropagation(); enter(from); });
      parent.append(b);
      if (d.children) {
        const group = make("div");
        group.setAttribute("role", "group");
        b.setAttribute("aria-expanded", "true");
        b.append(group);
        // The border of a frame is inside of it, its boxes are placed within.
        for (const c of d.children) put(c, group, d.x0 + 1, d.y0 + 1, level + 1);
        if (!group.childElementCount) { group.remove(); b.removeAttribute("aria-expanded"); b.classList.add(isShared(d) ? "shared" : "own"); }
      }
    };
    picture.replaceChildren();
    for (const d of laid.children || []) put(d, picture, 0, 0, 1);
    draw.boxes = boxes;
    if (!boxes.has(at)) at = boxes.keys().next().value || null;
    mark();
    if (hadFocus && at) boxes.get(at).focus();
    drawPath();
  }

  // fitting is a name, or less where it would not fit: of an image the end, where its tag is.
  function fitting(d, width) {
    const name = title(d), room = width / 6.8 - 1;
    const short = isShared(d) ? `${images(d).length} images` : name.slice(name.lastIndexOf("/") + 1);
    return [`${name} · ${d.data.run.size}`, name].find(t => t.length < room) ?? short;
  }

  function mark() {
    for (const [d, b] of draw.boxes) {
      b.tabIndex = d === at ? 0 : -1;
      b.classList.toggle("chosen", d === mark.chosen);
      b.setAttribute("aria-selected", d === mark.chosen);
    }
  }

  function choose(d) {
    at = mark.chosen = d;
    mark();
    const panel = $("chosen");
    panel.replaceChildren();
    const list = images(d);
    if (isLayer(d)) {
      const l = layerOf(d), row = $("layer-" + d.data.layer);
      panel.append(make("h3", "", `Layer ${l.label}`), make("p", "", `${l.size}${l.new ? ", new since the last generation" : ""}`));
      const by = row.lastElementChild.textContent;
      if (by) panel.append(make("p", "by", by));
    } else {
      const run = d.data.run;
      panel.append(make("h3", "", run.label));
      panel.append(make("p", "", list.length > 1 ? `${run.size}; ${run.whole} with what is built on it`
        : `${run.size} of its own in ${run.layers.length} ${run.layers.length > 1 ? "layers" : "layer"}; ${data.images[list[0]].size} with those it shares`));
      const ways = make("p", "ways");
      if (d !== root) ways.append(button("Enlarge", () => enter(d)));
      if (list.length === 1) {
        const row = make("a", "", "In the list");
        row.href = "#image-" + list[0];
        ways.append(row);
      }
      panel.append(ways);
    }
    if (list.length > 1 || isLayer(d)) {
      panel.append(make("p", "", list.length > 1 ? `In ${list.length} images:` : "In"));
      const ul = make("ul");
      if (list.length > 8) ul.tabIndex = 0; // it scrolls
      for (const i of list) ul.append(make("li", "ref", data.images[i].title));
      panel.append(ul);
    }
  }

  function enter(d) {
    const frame = isLayer(d) ? frameOf(d) : d;
    const focus = picture.contains(document.activeElement) || document.activeElement === document.body || $("chosen").contains(document.activeElement);
    if (frame !== disk && frame !== root) choose(frame);
    root = frame;
    at = null;
    draw();
    if (focus && at) draw.boxes.get(at)?.focus();
  }

  function drawPath() {
    const path = $("path");
    path.replaceChildren();
    for (const d of root.ancestors().reverse()) {
      if (path.childElementCount) path.append(make("span", "", "›"));
      const b = button(title(d), () => { enter(d); $("path").lastChild.focus?.(); });
      if (d === root) { b.disabled = true; b.setAttribute("aria-current", "true"); }
      path.append(b);
    }
  }

  picture.addEventListener("focusin", e => {
    for (const [d, b] of draw.boxes) if (b === e.target && d !== mark.chosen) choose(d);
  });

  picture.addEventListener("keydown", e => {
    const all = [...draw.boxes.keys()], i = all.indexOf(at);
    let to;
    switch (e.key) {
      case "ArrowDown": to = all[i + 1]; break;
      case "ArrowUp": to = all[i - 1]; break;
      case "ArrowRight": to = !isLayer(at) && all[i + 1]; break;
      case "ArrowLeft": to = frameOf(at); break;
      case "Home": to = all[0]; break;
      case "End": to = all[all.length - 1]; break;
      case "Enter": if (!isLayer(at)) enter(at); break;
      case "Escape": if (root !== disk) enter(frameOf(root)); break;
      default: return;
    }
    e.preventDefault();
    if (to && draw.boxes.has(to)) draw.boxes.get(to).focus();
  });

  // The lists: each is sorted by its head and filtered by what is looked for.

  function list(section, filtered) {
    const table = section.querySelector("table"), body = table.tBodies[0];
    const rows = [...body.rows], texts = rows.map(r => r.textContent.toLowerCase());
    const status = section.querySelector("[role=status]");
    const [one, many] = status.dataset.words.split(" ");
    const heads = [...table.tHead.rows[0].cells];
    const sort = (head, ascending) => {
      const n = heads.indexOf(head);
      const value = r => r.cells[n].dataset.value ?? r.cells[n].textContent;
      const compare = head.dataset.by === "number" ? (a, b) => value(a) - value(b) : (a, b) => value(a).localeCompare(value(b), "en", { numeric: true });
      rows.sort((a, b) => ascending ? compare(a, b) : compare(b, a));
      body.append(...rows);
      for (const h of heads) h.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    };
    const textOf = new Map(rows.map((r, i) => [r, texts[i]]));
    for (const head of heads) {
      const b = button(head.textContent, () => {
        const now = head.getAttribute("aria-sort");
        sort(head, now ? now === "descending" : head.dataset.by === "text");
      });
      head.replaceChildren(b);
    }
    const input = section.querySelector("input");
    const find = () => {
      const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let n = 0;
      for (const r of rows) {
        r.hidden = !wanted.every(w => textOf.get(r).includes(w));
        if (!r.hidden) n++;
      }
      status.textContent = wanted.length ? `${n} of ${rows.length} ${many}` : `${rows.length} ${rows.length === 1 ? one : many}`;
      filtered(wanted.length ? rows.filter(r => !r.hidden) : null);
    };
    input.addEventListener("input", find);
    section.querySelector(".find").hidden = false;
    find();
  }

  $("drawing").hidden = false;
  let width = 0;
  new ResizeObserver(() => {
    if (picture.clientWidth !== width) { width = picture.clientWidth; draw(); }
  }).observe(picture);
  width = picture.clientWidth;
  draw();
  list($("images"), rows => {
    found = rows && new Set(rows.map(r => +r.id.slice("image-".length)));
    draw();
  });
  list($("layers"), () => {});
  if (disk.children) choose(disk.children[0]);
})();
