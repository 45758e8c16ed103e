// What the three parts share: sliders, rows of a table, numbers in words. Plain scripts, so that a page opened from a disk runs.

const byId = (id) => document.getElementById(id);

// An element with these properties and children.
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// A labelled slider and a field for the same whole number; `set` moves both, and calls nothing.
function slider(parent, id, label, { min = 1, max, step = 1 }, changed) {
  const range = element("input", { type: "range", id, min, max, step });
  const field = element("input", { type: "number", min, max, step });
  field.setAttribute("aria-label", `${label}, exactly`);
  parent.append(element("label", { htmlFor: id, textContent: label }), range, field);
  range.addEventListener("input", () => changed(Number(range.value)));
  field.addEventListener("change", () => {
    range.value = field.value; // the nearest number that the slider has
    changed(Number(range.value));
  });
  return {
    set(value, most = max) {
      range.max = field.max = most;
      range.value = field.value = value;
    },
  };
}

// The rows of a table: lists of cells, the first a heading; on a phone each cell carries its column's heading.
function fill(table, rows) {
  const headings = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const made = rows.map((cells) => {
    const row = element("tr");
    row.setAttribute("role", "row");
    cells.forEach((content, n) => {
      const cell = element(n ? "td" : "th", {}, content);
      cell.setAttribute("role", n ? "cell" : "rowheader");
      cell.dataset.heading = headings[n];
      row.append(cell);
    });
    return row;
  });
  table.tBodies[0].replaceChildren(...made);
}

const count = (number) => number.toLocaleString("en-US");

// A share in per cent, with a digit behind the point below ten.
function percent(share) {
  const hundred = 100 * share;
  return `${hundred.toFixed(hundred < 9.95 ? 1 : 0)} %`;
}

const fixed = (number, digits) => number.toFixed(digits).replace("-", "−");
const signed = (number, digits) => (number < 0 ? "−" : "+") + Math.abs(number).toFixed(digits);

// Where one of three ranks exceeds the product of the others, as `check_ranks` has it; a last one that is shared may.
function tooWide(ranks, lastIsFree = false) {
  const all = ranks[0] * ranks[1] * ranks[2];
  const wide = ranks.slice(0, lastIsFree ? 2 : 3).find((rank) => rank * rank > all);
  return wide ? `A rank of ${wide} is more than the product of the other two: no tensor has such ranks.` : "";
}
