// Latent RoPE: channel j is paired with channel j + width / 2, and each pair turns by position times frequency.
{
  const { frequencies, query, key } = NUMBERS.rope;
  const PAIRS = frequencies.length, NAMES = "http://www.w3.org/2000/svg";
  const now = { query: 7, key: 2, both: 0 };

  const turned = (vector, position) => {
    const made = new Array(2 * PAIRS);
    frequencies.forEach((frequency, j) => {
      const [cos, sin] = [Math.cos(position * frequency), Math.sin(position * frequency)];
      const [x, y] = [vector[j], vector[j + PAIRS]];
      [made[j], made[j + PAIRS]] = [x * cos - y * sin, y * cos + x * sin];
    });
    return made;
  };
  const dot = (one, other) => one.reduce((sum, number, n) => sum + number * other[n], 0);

  const sliders = [["query", "n, the query's position", 200], ["key", "m, the key's position", 200], ["both", "both moved by", 100000]].map(
    ([name, label, max]) => [name, slider(byId("rope-positions"), `rope-${name}`, label, { min: 0, max }, (position) => {
      now[name] = position;
      show();
    })]);

  // One pair of channels as a dial with two hands: the query's solid, the key's dashed.
  function dial(j, q, k) {
    const svg = document.createElementNS(NAMES, "svg");
    svg.setAttribute("viewBox", "-1.1 -1.1 2.2 2.2");
    const add = (tag, attributes) => {
      const made = document.createElementNS(NAMES, tag);
      Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
      svg.append(made);
    };
    add("circle", { r: 1, class: "rim" });
    for (const [name, vector] of [["query", q], ["key", k]]) {
      const length = Math.hypot(vector[j], vector[j + PAIRS]);
      add("line", { x2: vector[j] / length, y2: -vector[j + PAIRS] / length, class: name });
    }
    return element("figure", {}, svg, element("figcaption", { textContent: `frequency ${frequencies[j]}` }));
  }

  function show() {
    sliders.forEach(([name, one]) => one.set(now[name]));
    const [n, m] = [now.query + now.both, now.key + now.both];
    const [q, k] = [turned(query, n), turned(key, m)];
    const logit = fixed(dot(q, k), 6);
    byId("rope-hands").replaceChildren(...frequencies.map((_, j) => dial(j, q, k)));
    byId("rope-said").textContent = `Query at ${count(n)}, key at ${count(m)}, distance ${fixed(n - m, 0)}: logit ${logit}.`;
    fill(byId("logits"), [
      ["both turned, each by its own position", logit],
      ["the query alone, turned by the distance n − m", fixed(dot(turned(query, n - m), key), 6)],
      ["control: the query turned, the key not", fixed(dot(q, key), 6)],
    ]);
  }
  show();
}
