// The HOSVD of lesson 00's photograph at the ranks that are set. Full factors are given; the core is computed once, here.
{
  const [ROWS, COLUMNS, COLOURS] = NUMBERS.photograph.shape;
  const SHAPE = [ROWS, COLUMNS, COLOURS], MODES = ["row", "column", "colour"];
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const pixels = bytes(NUMBERS.photograph.pixels);
  const factors = NUMBERS.photograph.factors.map((text) => new Float32Array(bytes(text).buffer));
  let ranks = [30, 30, 2];

  // The product of a tensor (flat, row by row) with a matrix on one mode. `entry(j, i)` is the matrix's.
  function modeProduct(tensor, shape, mode, size, entry) {
    const inner = shape.slice(mode + 1).reduce((a, b) => a * b, 1);
    const outer = shape.slice(0, mode).reduce((a, b) => a * b, 1);
    const made = new Float64Array(outer * size * inner);
    for (let a = 0; a < outer; a++)
      for (let j = 0; j < size; j++)
        for (let i = 0; i < shape[mode]; i++) {
          const factor = entry(j, i);
          const [to, from] = [(a * size + j) * inner, (a * shape[mode] + i) * inner];
          for (let b = 0; b < inner; b++) made[to + b] += factor * tensor[from + b];
        }
    return made;
  }

  let core = Float64Array.from(pixels, (pixel) => pixel / 255);
  factors.forEach((u, mode) => (core = modeProduct(core, SHAPE, mode, SHAPE[mode], (j, i) => u[i * SHAPE[mode] + j])));
  const squares = core.map((number) => number * number);
  const whole = squares.reduce((a, b) => a + b);

  // A singular value of an unfolding is the norm of the core's slice: the squares of all slices, mode by mode.
  const slices = SHAPE.map((size) => new Float64Array(size));
  squares.forEach((square, n) => {
    const place = [Math.floor(n / (COLUMNS * COLOURS)), Math.floor(n / COLOURS) % COLUMNS, n % COLOURS];
    place.forEach((index, mode) => (slices[mode][index] += square));
  });
  const tails = () => slices.map((mode, n) => mode.slice(ranks[n]).reduce((a, b) => a + b, 0) / whole);

  // The core's corner that is kept, and the squares outside of it: with orthonormal factors they are the squared error.
  function corner() {
    const kept = new Float64Array(ranks[0] * ranks[1] * ranks[2]);
    let lost = 0, at = 0;
    for (let n = 0; n < core.length; n++) {
      const inside = n % COLOURS < ranks[2] && Math.floor(n / COLOURS) % COLUMNS < ranks[1] && n < ranks[0] * COLUMNS * COLOURS;
      if (inside) kept[at++] = core[n];
      else lost += squares[n];
    }
    return { kept, error: Math.sqrt(lost / whole) };
  }

  function draw(canvas, tensor) {
    [canvas.width, canvas.height] = [COLUMNS, ROWS];
    const image = canvas.getContext("2d").createImageData(COLUMNS, ROWS);
    for (let n = 0; n < ROWS * COLUMNS; n++) {
      for (let colour = 0; colour < COLOURS; colour++) image.data[4 * n + colour] = tensor[n * COLOURS + colour]; // clamped
      image.data[4 * n + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  const sliders = MODES.map((name, mode) =>
    slider(byId("photograph-ranks"), `photograph-r${mode + 1}`, `r${"₁₂₃"[mode]}, ${name}`, { max: SHAPE[mode] }, (rank) => {
      ranks = ranks.with(mode, rank);
      show();
    }));

  function show() {
    sliders.forEach((one, mode) => one.set(ranks[mode]));
    const { kept, error } = corner();
    let small = kept;
    const shape = [...ranks];
    for (const mode of [2, 0, 1]) { // the cheapest first
      const size = SHAPE[mode];
      small = modeProduct(small, shape, mode, size, (j, i) => factors[mode][j * size + i]);
      shape[mode] = size;
    }
    draw(byId("photograph-small"), small.map((value) => 255 * value));
    const tail = tails();
    const [lower, upper] = [Math.sqrt(Math.max(...tail)), Math.sqrt(tail.reduce((a, b) => a + b))];
    const stored = kept.length + SHAPE.reduce((sum, size, mode) => sum + size * ranks[mode], 0);
    byId("photograph-said").textContent = `Ranks (${ranks.join(", ")}): ${count(stored)} numbers, ${percent(stored / pixels.length)} of `
      + `${count(pixels.length)}. Relative error ${error.toFixed(4)}, between the bounds ${lower.toFixed(4)} and ${upper.toFixed(4)}.`;
    byId("photograph-small").parentElement.lastElementChild.textContent = `${count(stored)} numbers`;
    fill(byId("tails"), MODES.map((name, mode) => [name, `${ranks[mode]} of ${SHAPE[mode]}`, tail[mode].toFixed(5)]));
    byId("photograph-note").textContent = tooWide(ranks);
    band(lower, error, upper);
  }

  // The error on a line from 0 to 1, its square root taken so that small ones are seen.
  function band(lower, error, upper) {
    const at = (number) => `${100 * Math.sqrt(Math.min(1, number))}%`;
    const style = byId("photograph-band").style;
    style.setProperty("--lower", at(lower));
    style.setProperty("--error", at(error));
    style.setProperty("--upper", at(upper));
  }

  draw(byId("photograph-whole"), pixels);
  byId("photograph-whole").parentElement.lastElementChild.textContent = `${count(pixels.length)} numbers`;
  show();
}
