"use strict";
// What is under the pointer, which arms are drawn, and folded parts in print. The page is whole
// without it.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const hidden = new Set();

  const format = (value) => {
    if (value === null || value === undefined) return "–";
    if (Number.isInteger(value) || Math.abs(value) >= 1e5) return value.toLocaleString("en");
    return String(Number(value.toPrecision(5)));
  };

  // The index of the point nearest to a step; steps ascend, and null ones are holes.
  const nearest = (steps, x, level) => {
    let best = -1;
    steps.forEach((step, i) => {
      if (step === null || (level && step > x)) return;
      if (best < 0 || Math.abs(step - x) <= Math.abs(steps[best] - x)) best = i;
    });
    return best;
  };

  const line = (left, right, colour) => {
    const row = document.createElement("div");
    const name = row.appendChild(document.createElement("span"));
    const value = row.appendChild(document.createElement("span"));
    name.textContent = left; // text, whatever a label holds
    value.textContent = right;
    if (colour !== undefined) name.className = `k${colour % 8}`;
    return row;
  };

  const interactive = (svg) => {
    const name = svg.dataset.chart;
    const curves = data[name];
    if (!curves) return;
    const level = name.startsWith("scale"); // stairs: what holds at a step is the last change
    const [low, high, left, right] = svg.dataset.x.split(" ").map(Number);
    const cursor = svg.querySelector(".cursor");
    const width = svg.viewBox.baseVal.width;
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    tip.setAttribute("role", "status");
    svg.parentNode.append(tip);
    const all = curves.flatMap((curve) => curve.steps.filter((step) => step !== null));
    const stops = [...new Set(all)].sort((a, b) => a - b);
    let stop = -1;

    const hide = () => {
      tip.hidden = true;
      stop = -1;
      cursor.style.visibility = "hidden";
    };

    const show = (x) => {
      const visible = curves.filter((curve) => !hidden.has(curve.arm));
      const rows = [];
      let at = null;
      for (const curve of visible) {
        const i = nearest(curve.steps, x, level);
        if (i < 0) continue;
        if (at === null) at = level ? x : curve.steps[i];
        let text = format(curve.mean[i]);
        if (curve.low) text += `  [${format(curve.low[i])}, ${format(curve.high[i])}]`;
        const number = curve.arm ?? curves.indexOf(curve);
        rows.push([curve.mean[i], line(curve.name ?? data.arms[curve.arm], text, number)]);
      }
      if (at === null) return hide();
      rows.sort((a, b) => b[0] - a[0]);
      const head = document.createElement("b");
      head.textContent = `step ${format(Math.round(at * 10) / 10)}`;
      tip.replaceChildren(head, ...rows.slice(0, 14).map((row) => row[1]));
      if (rows.length > 14) tip.append(line(`and ${rows.length - 14} more`, ""));
      tip.hidden = false;
      const share = left + ((at - low) / (high - low)) * (right - left);
      cursor.setAttribute("transform", `translate(${share * width} 0)`);
      cursor.style.visibility = "visible";
      const room = svg.parentNode.clientWidth - tip.offsetWidth;
      const place = share * svg.parentNode.clientWidth;
      const beside = place + 14 > room ? place - tip.offsetWidth - 14 : place + 14;
      tip.style.left = `${Math.max(0, Math.min(room, beside))}px`;
    };

    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      const x = low + ((share - left) / (right - left)) * (high - low);
      show(Math.max(low, Math.min(high, level ? Math.floor(x) : x)));
    });
    svg.addEventListener("pointerleave", hide);
    svg.tabIndex = 0;
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const last = stops.length - 1;
      const leap = Math.max(1, Math.round(stops.length / 20));
      const moves = { ArrowRight: 1, ArrowLeft: -1, PageDown: leap, PageUp: -leap };
      if (event.key === "Escape") return hide();
      if (event.key === "Home") stop = 0;
      else if (event.key === "End") stop = last;
      else if (event.key in moves) stop = Math.max(0, Math.min(last, stop + moves[event.key]));
      else return;
      event.preventDefault();
      show(stops[stop]);
    });
  };

  for (const svg of document.querySelectorAll("svg[data-chart]")) interactive(svg);

  for (const button of document.querySelectorAll("button[data-arm]")) {
    button.disabled = false;
    button.addEventListener("click", () => {
      const arm = Number(button.dataset.arm);
      const off = !hidden.delete(arm);
      if (off) hidden.add(arm);
      button.setAttribute("aria-pressed", String(!off));
      for (const group of document.querySelectorAll(`g[data-arm="${arm}"]`)) {
        group.style.display = off ? "none" : "";
      }
    });
  }

  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const part of folded) part.open = true;
  });
  addEventListener("afterprint", () => {
    for (const part of folded) part.open = false;
  });
})();
