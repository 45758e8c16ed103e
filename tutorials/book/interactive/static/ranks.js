// The rank explorer. All that is set stands in `now`, and in the link; everything shown is computed from it.
{
  const START = { d: 768, n_H: 12, pre: [8, 128, 64], post: null, shared: false, n_KV: 4, d_c: 128, mla_shared: true };
  const WIDEST = 4096, STEP = 64, MOST_HEADS = 64, SHOWN = 3;
  let now = structuredClone(START);

  // The setting as a link, and back; what is no setting, or one that the sliders cannot show, is null.

  function asHash({ d, n_H, pre, post, shared, n_KV, d_c, mla_shared }) {
    const after = post ? `&post=${post}` : "";
    return `#d=${d}&n_H=${n_H}&pre=${pre}${after}&shared=${+shared}&n_KV=${n_KV}&d_c=${d_c}&mla_shared=${+mla_shared}`;
  }

  function fromHash(hash) {
    const given = new URLSearchParams(hash.slice(1));
    const wholes = (name) => (given.get(name) ?? "").split(",").map((text) => (/^[1-9]\d{0,4}$/.test(text) ? Number(text) : NaN));
    const whole = (name) => (wholes(name).length === 1 ? wholes(name)[0] : NaN);
    const flag = (name) => ({ 0: false, 1: true })[given.get(name)];
    const found = {
      d: whole("d"), n_H: whole("n_H"), pre: wholes("pre"), post: given.has("post") ? wholes("post") : null,
      shared: flag("shared"), n_KV: whole("n_KV"), d_c: whole("d_c"), mla_shared: flag("mla_shared"),
    };
    return isPossible(found) ? found : null;
  }

  function isPossible({ d, n_H, pre, post, shared, n_KV, d_c, mla_shared }) {
    const within = (number, most) => number >= 1 && number <= most;
    const fits = ([head, first, second, ...rest]) => within(head, n_H) && within(first, d) && within(second, d) && !rest.length;
    return within(d, WIDEST) && d % STEP === 0 && within(n_H, MOST_HEADS) && n_H % n_KV === 0 && within(d_c, d)
      && typeof shared === "boolean" && typeof mla_shared === "boolean" && fits(pre) && (!post || (fits(post) && (!shared || post[2] === pre[2])));
  }

  // After one number has changed: the others within what it allows.
  function bounded(setting) {
    const { d, n_H, shared } = setting;
    const cut = ([head, first, second]) => [Math.min(head, n_H), Math.min(first, d), Math.min(second, d)];
    const pre = cut(setting.pre);
    const post = setting.post && cut(setting.post);
    if (post && shared) post[2] = pre[2]; // one latent has one width
    const n_KV = divisors(n_H).filter((groups) => groups <= setting.n_KV).at(-1);
    return { ...setting, pre, post, n_KV, d_c: Math.min(setting.d_c, d) };
  }

  const divisors = (whole) => Array.from({ length: whole }, (_, n) => n + 1).filter((n) => whole % n === 0);

  // Controls

  const change = (what) => {
    now = bounded({ ...now, ...what });
    history.replaceState(null, "", asHash(now));
    show();
  };
  const changeRank = (which, mode) => (rank) => change({ [which]: (now[which] ?? now.pre).with(mode, rank) });
  const triple = (which, names, letter) =>
    names.map((name, mode) =>
      slider(byId(`ranks-${which}`), `${which}-${mode + 1}`, `${letter}${"₁₂₃"[mode]}, ${name}`, { max: mode ? WIDEST : MOST_HEADS }, changeRank(which, mode)));

  const width = slider(byId("ranks-model"), "d", "d, width", { min: STEP, max: WIDEST, step: STEP }, (d) => change({ d }));
  const heads = slider(byId("ranks-model"), "n_H", "n_H, heads", { max: MOST_HEADS }, (n_H) => change({ n_H }));
  const pre = triple("pre", ["head", "query", "key"], "r");
  const post = triple("post", ["head", "output", "value"], "r̃");
  const groups = element("select", { id: "n_KV" });
  byId("ranks-others").append(element("label", { htmlFor: "n_KV", textContent: "n_KV, GQA's groups" }), groups, element("span"));
  groups.addEventListener("change", () => change({ n_KV: Number(groups.value) }));
  const latent = slider(byId("ranks-others"), "d_c", "d_c, MLA's latents", { max: WIDEST }, (d_c) => change({ d_c }));
  byId("shared").addEventListener("change", (event) => change({ shared: event.target.checked }));
  byId("mla-shared").addEventListener("change", (event) => change({ mla_shared: event.target.checked }));
  byId("own-post").addEventListener("change", (event) => change({ post: event.target.checked ? [...now.pre] : null }));
  byId("ranks-reset").addEventListener("click", () => change(structuredClone(START)));
  byId("ranks-copy").addEventListener("click", async () => {
    const said = await navigator.clipboard.writeText(byId("ranks-link").href).then(() => "Copied", () => "Use the link");
    byId("ranks-copy").textContent = said;
    setTimeout(() => (byId("ranks-copy").textContent = "Copy the link"), 2000);
  });

  // What is shown

  function label() {
    const ranks = now.post && String(now.post) !== String(now.pre) ? `${now.pre} / ${now.post}` : now.pre;
    return `Tucker [${ranks}]${now.shared ? " shared" : ""}`;
  }

  function costsNow() {
    const { d, n_H, n_KV, d_c } = now;
    const whole = d % n_H === 0; // else heads have no whole width
    return {
      [label()]: tuckerCost(d, n_H, now.pre, now.post ?? now.pre, now.shared),
      MHA: whole ? mhaCost(d, n_H) : null,
      [n_KV === 1 ? "MQA" : `GQA n_KV=${n_KV}`]: whole ? gqaCost(d, n_H, n_KV) : null,
      [`MLA ${now.mla_shared ? "shared" : "separated"} d_c=${d_c}`]: whole ? mlaCost(d, n_H, d_c, now.mla_shared) : null,
    };
  }

  // A number with its share of multi-head attention's.
  function beside(number, base) {
    const share = element("small", { textContent: base ? percent(number / base) : "" });
    const cell = element("span", { className: "bar" }, count(number), " ", share);
    if (base) cell.style.setProperty("--share", `${Math.min(100, (100 * number) / base)}%`);
    return cell;
  }

  function show() {
    const { d, n_H } = now;
    showControls();
    const costs = costsNow();
    const base = gqaCost(d, 1, 1); // multi-head attention, for any number of heads that divides d
    fill(byId("costs"), Object.entries(costs).map(([name, cost]) =>
      cost
        ? [name, beside(cost.parameters, base.parameters), beside(cost.cache, base.cache), beside(cost.projections, base.projections),
          beside(cost.attention, base.attention), count(cost.once)]
        : [name, ...Array(5).fill("–")]));
    const mine = costs[label()];
    const shares = { parameters: mine.parameters / base.parameters, cache: mine.cache / base.cache };
    byId("ranks-said").textContent = `${label()}: ${count(mine.parameters)} parameters, ${percent(shares.parameters)} of MHA's; `
      + `${count(mine.cache)} cached numbers a token, ${percent(shares.cache)}.`;
    byId("ranks-note").textContent = notes().join(" ").trim();
    byId("nearest").replaceChildren(...NUMBERS.measured.flatMap((model) => nearest(model, shares)));
    byId("ranks-link").href = asHash(now);
  }

  function showControls() {
    const { d, n_H } = now;
    width.set(d);
    heads.set(n_H);
    latent.set(now.d_c, d);
    for (const [sliders, ranks] of [[pre, now.pre], [post, now.post ?? now.pre]]) sliders.forEach((one, mode) => one.set(ranks[mode], mode ? d : n_H));
    groups.replaceChildren(...divisors(n_H).map((n) => element("option", { value: n, textContent: n, selected: n === now.n_KV })));
    byId("shared").checked = now.shared;
    byId("mla-shared").checked = now.mla_shared;
    byId("own-post").checked = !!now.post;
    byId("ranks-post-box").hidden = !now.post;
  }

  function notes() {
    const { d, n_H, pre, post, shared } = now;
    const heads = d % n_H ? `n_H = ${n_H} does not divide d = ${d}: MHA, GQA and MLA need whole heads.` : "";
    return [...new Set([heads, tooWide(pre, shared), tooWide(post ?? pre, shared)])];
  }

  // Of one model's measured rows those whose shares of parameters and cache are the nearest, by logarithms.
  function nearest(model, shares) {
    const base = gqaCost(model.d, 1, 1);
    const [zero] = model.rows.filter((one) => one.row === "MHA");
    const far = (one) => Math.hypot(...["parameters", "cache"].map((what) => Math.log(one[what] / base[what] / shares[what])));
    const rows = [...model.rows].sort((one, other) => far(one) - far(other)).slice(0, SHOWN);
    const table = byId("costs").cloneNode(true);
    table.id = "";
    table.caption.textContent = `Nearest measured: ${model.title}, d = ${model.d}, n_H = ${model.n_H}, ${model.n_layers} layers, reduced budget. `
      + "By the shares of parameters and cache; loss in nats a token.";
    const headings = ["row", "parameters", "cache", "loss", "minus MHA's", "seeds"];
    headings.forEach((text, n) => (table.tHead.rows[0].cells[n].textContent = text));
    fill(table, rows.map((one) =>
      [named(one, model), percent(one.parameters / base.parameters), percent(one.cache / base.cache), one.loss.toFixed(3),
        one === zero ? "–" : signed(one.loss - zero.loss, 3), String(one.seeds)]));
    return [table];
  }

  // A measured row's name; a link where the sliders can show it.
  function named({ row, config }, { d, n_H }) {
    const ranks = config.ranks.length ? { pre: config.ranks, post: null, shared: config.shared_kv } : null;
    return ranks ? element("a", { href: asHash({ ...now, ...START, d, n_H, ...ranks }), textContent: row }) : row;
  }

  function load() {
    now = fromHash(location.hash) ?? structuredClone(START);
    show();
  }

  window.addEventListener("hashchange", () => location.hash.includes("=") && load()); // other links lead to places on the page
  load();
}
