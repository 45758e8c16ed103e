"""The book's interactive page in a browser: what it shows equals what `tucker_ref` computes, and no network is asked.

Needs the package playwright and a Chromium of the system; without one of them the tests say so and are skipped.
"""

import json
import math
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from reproduce.report.query import mean_loss, settled
from reproduce.store.records import COMMITTED, load
from tucker_ref import Rotary, gqa_cost, hosvd, mha_cost, mla_cost, tail_energies, tucker_cost
from tutorials.book import interactive

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; it is in the dev extra")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser: none of chromium, chromium-browser, google-chrome is in PATH"
)

START = dict(d=768, n_H=12, pre=(8, 128, 64), post=None, shared=False, n_KV=4, d_c=128, mla_shared=True)
SETTINGS = {  # what is moved away from the start, in this order
    "as it opens": {},
    "Llama": dict(d=2048, n_H=32, pre=(32, 64, 64), n_KV=8, mla_shared=False),
    "shared latents": dict(pre=(12, 200, 200), shared=True, n_KV=1),
    "other ranks after the softmax": dict(pre=(5, 77, 31), post=(9, 100, 45)),
    "other ranks, one latent": dict(post=(3, 20, 64), shared=True),
    "the smallest": dict(d=64, n_H=1, pre=(1, 1, 1), n_KV=1, d_c=1),
    "the largest": dict(d=4096, n_H=64, pre=(64, 4096, 4096), post=(64, 4096, 4096), n_KV=64, d_c=4096),
    "heads that do not divide the width": dict(n_H=7, n_KV=7, pre=(7, 50, 60)),
}
MODELS = ("table2", "table3")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return interactive.write(tmp_path_factory.mktemp("page"))


@pytest.fixture
def page(browser, file):
    """The page, opened from the disk; no error and no request to anywhere else may come of what is done with it."""
    page, amiss = browser.new_page(), []
    page.on("pageerror", lambda error: amiss.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or amiss.append(request.url))
    page.on("requestfailed", lambda request: amiss.append(f"failed: {request.url}"))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert amiss == []


# The rank explorer


def set_to(page, **changes) -> dict:
    """Moves the controls; returns the whole setting."""
    for name in ("shared", "mla_shared", "post"):
        if name in changes:
            identity = {"mla_shared": "mla-shared", "post": "own-post"}.get(name, name)
            page.set_checked(f"#{identity}", bool(changes[name]))
    for name in ("d", "n_H", "d_c"):
        if name in changes:
            page.fill(f"#{name}", str(changes[name]))
    for name in ("pre", "post"):
        for mode, rank in enumerate(changes.get(name) or (), start=1):
            page.fill(f"#{name}-{mode}", str(rank))
    if "n_KV" in changes:
        page.select_option("#n_KV", str(changes["n_KV"]))
    return START | changes


def expected_costs(now: dict) -> dict[str, list[int | None]]:
    """By `tucker_ref.costs`, row by row: parameters, cache, projections, attention, once. None where heads have no whole width."""
    d, heads = now["d"], now["n_H"]
    ranks = ",".join(map(str, now["pre"]))
    if now["post"] and now["post"] != now["pre"]:
        ranks += " / " + ",".join(map(str, now["post"]))
    rows = {
        f"Tucker [{ranks}]" + " shared" * now["shared"]: (tucker_cost, (d, heads, now["pre"], now["post"], now["shared"])),
        "MHA": (mha_cost, (d, heads)),
        "MQA" if now["n_KV"] == 1 else f"GQA n_KV={now['n_KV']}": (gqa_cost, (d, heads, now["n_KV"])),
        f"MLA {'shared' if now['mla_shared'] else 'separated'} d_c={now['d_c']}": (
            lambda d, heads, width, shared: mla_cost(d, heads, width, width, shared_kv=shared),
            (d, heads, now["d_c"], now["mla_shared"]),
        ),
    }
    found = {}
    for name, (cost_of, sizes) in rows.items():
        try:
            cost = cost_of(*sizes)
            found[name] = [cost.parameters, cost.cache_per_token, cost.projections, cost.attention, cost.once]
        except ValueError:
            found[name] = [None] * 5
    return found


def shown_costs(page) -> dict[str, list[int | None]]:
    rows = cells(page, "#costs")
    return {name: [number(text) for text in texts] for name, *texts in rows}


def cells(page, table: str) -> list[list[str]]:
    return page.locator(f"{table} tbody tr").evaluate_all("rows => rows.map(row => [...row.cells].map(c => c.textContent))")


def number(text: str) -> int | None:
    """The first of a cell; behind it stands its share."""
    return None if text == "–" else int(re.match(r"[\d,]+", text)[0].replace(",", ""))


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_counted_equals_the_library(page, name):
    now = set_to(page, **SETTINGS[name])
    assert shown_costs(page) == expected_costs(now)
    said = page.text_content("#ranks-said")
    tucker, parameters = next((row, costs[0]) for row, costs in expected_costs(now).items())
    assert said.startswith(f"{tucker}: {parameters:,} parameters, ")
    assert ("does not divide" in page.text_content("#ranks-note")) == (now["d"] % now["n_H"] != 0)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("n_H * (r + u)", "n_H * r"),
        ("shared ? 0 : d * v", "d * v"),
        ("shared ? t : t + v", "t + v"),
        ("n_H * (s * t + o * v)", "s * t + o * v"),
        ("once: n_H * (r * s * t + u * o * v)", "once: r * s * t + u * o * v"),
        ("const latents = shared ? 1 : 2", "const latents = 1"),
        ("d_c * 2 * width", "d_c * width"),
        ("2 * d * inner + 2 * d * kv", "2 * d * inner + d * kv"),
        ("cache: 2 * kv", "cache: kv"),
    ],
)
def test_control_a_wrong_formula_is_seen(browser, file, tmp_path, right, wrong):
    shutil.copytree(file.parent, tmp_path, dirs_exist_ok=True)
    costs = tmp_path / "_static" / "costs.js"
    text = costs.read_text(encoding="utf-8")
    assert text.count(right) == 1
    costs.write_text(text.replace(right, wrong), encoding="utf-8")
    for other in ("photograph.js", "rope.js"):
        (tmp_path / "_static" / other).write_text("", encoding="utf-8")
    page = browser.new_page()
    assert any(differs(page, (tmp_path / file.name).as_uri(), changes) for changes in SETTINGS.values())
    page.close()


def differs(page, address: str, changes: dict) -> bool:
    """Whether the page, opened anew and set to this, shows other costs than the library."""
    page.goto(address)
    now = set_to(page, **changes)
    return shown_costs(page) != expected_costs(now)


@cache
def runs_on_record(model: str) -> dict:
    return settled(load(COMMITTED), model)


def nearest(model: str, now: dict) -> list[list[str]]:
    """Of one table's measured rows the three with the nearest shares of multi-head attention's parameters and cache, as they are shown."""
    cost = tucker_cost(now["d"], now["n_H"], now["pre"], now["post"], now["shared"])
    mine = cost.parameters / (4 * now["d"] ** 2), cost.cache_per_token / (2 * now["d"])
    found, runs_of_row = [], runs_on_record(model)
    for row, runs in runs_of_row.items():
        if mean_loss(runs) is None:
            continue
        d, layers = runs[0].config["d_model"], runs[0].config["n_layers"]
        shares = runs[0].attention_parameters / layers / (4 * d**2), runs[0].metrics["cache_per_token"] / layers / (2 * d)
        above = mean_loss(runs) - mean_loss(runs_of_row["MHA"])
        texts = [row, f"{mean_loss(runs):.3f}", "–" if row == "MHA" else f"{above:+.3f}".replace("-", "−"), str(len(runs))]
        found.append((math.dist(np.log(shares), np.log(mine)), texts))
    return [texts for _, texts in sorted(found, key=lambda one: one[0])[:3]]


def shown_nearest(page) -> list[list[list[str]]]:
    tables = [cells(page, f"#nearest table:nth-of-type({n})") for n in (1, 2)]
    return [[[row, *texts] for row, _, _, *texts in table] for table in tables]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_nearest_measured_losses_are_those_of_the_records(page, name):
    now = set_to(page, **SETTINGS[name])
    assert shown_nearest(page) == [nearest(model, now) for model in MODELS]
    page.evaluate("NUMBERS.measured.forEach(model => model.rows.forEach(one => (one.loss += 0.001)))")  # control
    page.fill("#d_c", "2")
    assert shown_nearest(page) != [nearest(model, now) for model in MODELS]


def test_the_link_keeps_the_setting(page, file):
    now = set_to(page, d=1024, n_H=16, pre=(9, 70, 30), post=(4, 50, 30), shared=True, n_KV=2, d_c=96, mla_shared=False)
    link, shown = page.evaluate("document.querySelector('#ranks-link').href"), shown_costs(page)
    assert page.url == link  # the address bar has it as well
    page.goto("about:blank")
    page.goto(link)
    assert shown_costs(page) == shown == expected_costs(now)
    page.goto("about:blank")
    page.goto(link.replace(",", "%2C"))  # as some mail programs write it
    assert shown_costs(page) == shown
    page.click("#ranks-reset")
    assert shown_costs(page) == expected_costs(START)
    page.click("#nearest a >> nth=0")  # a measured row opens as a setting, and the way back leads back
    assert shown_costs(page) == expected_costs(START)
    page.evaluate("location.hash = '#d=512&n_H=8&pre=8,64,32&shared=0&n_KV=8&d_c=64&mla_shared=1'")
    wanted = expected_costs(START | dict(d=512, n_H=8, pre=(8, 64, 32), n_KV=8, d_c=64))
    page.wait_for_function("document.querySelector('#d').value === '512'")
    assert shown_costs(page) == wanted
    page.evaluate("location.hash = '#photograph'")  # a place on the page is no setting
    page.wait_for_timeout(100)
    assert shown_costs(page) == wanted


GOOD = "#d=512&n_H=8&pre=8,64,32&shared=0&n_KV=8&d_c=64&mla_shared=1"


@pytest.mark.parametrize(
    "old, new",
    [
        (GOOD, "#"), (GOOD, "#photograph"), (GOOD, "#%"), (GOOD, "#=&=;<script>"), ("d=512", "d=513"), ("d=512", "d=8192"),
        ("d=512", "d=-512"), ("d=512", "d=5e2"), ("d=512", "d=512,1"), ("n_H=8", "n_H=0"), ("n_H=8", "n_H=99"), ("n_H=8&", ""),
        ("pre=8,64,32", "pre=9,64,32"), ("pre=8,64,32", "pre=8,64"), ("pre=8,64,32", "pre=8,64,32,1"), ("pre=8,64,32", "pre=8,64,x"),
        ("pre=8,64,32", "pre=8,64,32&post=8,64"), ("pre=8,64,32&shared=0", "pre=8,64,32&post=8,64,31&shared=1"),
        ("shared=0", "shared=yes"), ("n_KV=8", "n_KV=3"), ("d_c=64", "d_c=513"), ("mla_shared=1", "mla_shared="),
    ],
)  # fmt: skip
def test_a_malformed_link_opens_the_default(page, file, old, new):
    assert old in GOOD
    for link, opened in (
        (GOOD, START | dict(d=512, n_H=8, pre=(8, 64, 32), n_KV=8, d_c=64)),
        (GOOD.replace(old, new, 1), START),
    ):
        page.goto("about:blank")
        page.goto(file.as_uri() + link)
        assert shown_costs(page) == expected_costs(opened)


def test_one_number_bounds_the_others(page):
    set_to(page, n_H=5, d=64)  # fewer heads than r1 and n_KV, narrower than r2 and d_c
    assert shown_costs(page) == expected_costs(START | dict(n_H=5, d=64, pre=(5, 64, 64), n_KV=1, d_c=64))
    set_to(page, pre=(5, 2, 1))
    assert "A rank of 5 is more than the product of the other two" in page.text_content("#ranks-note")
    page.set_checked("#own-post", True)
    page.set_checked("#shared", True)
    page.fill("#post-3", "40")  # one latent has one width: the key's
    assert list(shown_costs(page))[0] == "Tucker [5,2,1] shared"


# By keyboard, and on a phone


def test_every_control_is_reached_and_moved_by_keyboard(page):
    controls = page.locator(".live :is(input, select, button, a[href])")
    visible = [controls.nth(n) for n in range(controls.count()) if controls.nth(n).is_visible()]
    assert len(visible) > 25
    for control in visible:
        page.keyboard.press("Tab")
        assert control.evaluate("one => one === document.activeElement")
        assert control.evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
    page.focus("#pre-2")
    page.keyboard.press("ArrowRight")
    assert list(shown_costs(page))[0] == "Tucker [8,129,64]"
    page.keyboard.press("Home")
    page.keyboard.press("Tab")  # to the field beside it
    page.keyboard.type("99")
    page.keyboard.press("Enter")
    assert shown_costs(page) == expected_costs(START | dict(pre=(8, 99, 64)))
    page.focus("#shared")
    page.keyboard.press("Space")
    assert shown_costs(page) == expected_costs(START | dict(pre=(8, 99, 64), shared=True))


def test_everything_has_a_name_and_results_are_announced(page):
    nameless = page.locator(".live :is(input, select)").evaluate_all(
        "all => all.filter(one => !one.labels.length && !one.getAttribute('aria-label')).map(one => one.outerHTML)"
    )
    assert nameless == []
    said = page.locator(".live output[aria-live=polite]")
    assert said.count() == 3 and all(said.all_text_contents())


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_nothing_is_wider_than_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 700})
    set_to(page, **SETTINGS["the largest"])
    assert wider_than(page, width) == []
    page.evaluate("document.querySelector('#costs').style.width = '2000px'")  # control
    assert wider_than(page, width)


def wider_than(page, width: int) -> list[str]:
    return page.locator(".live *").evaluate_all(
        "(all, width) => all.filter(one => one.getBoundingClientRect().right > width).map(one => one.outerHTML)", width
    )


# The photograph


@pytest.mark.parametrize("ranks", [(30, 30, 2), (143, 214, 3), (1, 1, 1), (12, 12, 2), (60, 60, 1), (15, 5, 3)])
def test_the_photograph_has_the_error_and_the_bounds_of_the_library(page, ranks):
    for mode, rank in enumerate(ranks, start=1):
        page.fill(f"#photograph-r{mode}", str(rank))
    photo = interactive.photograph() / 255.0
    small, norm = hosvd(photo, ranks), np.linalg.norm(photo)
    tails = tail_energies(photo, ranks) / norm**2
    error = np.linalg.norm(photo - small.to_tensor()) / norm
    said = page.text_content("#photograph-said").replace(",", "")
    stored, shown_error, lower, upper = re.search(
        r": (\d+) numbers .* error ([\d.]+) between the bounds ([\d.]+) and ([\d.]+)\.$", said
    ).groups()
    assert int(stored) == small.size
    wanted = [error, math.sqrt(tails.max()), math.sqrt(tails.sum())]
    assert [float(text) for text in (shown_error, lower, upper)] == pytest.approx(wanted, abs=6e-5)
    assert [float(row[2]) for row in cells(page, "#tails")] == pytest.approx(tails.tolist(), abs=6e-6)
    drawn = page.evaluate("[...document.querySelector('#photograph-small').getContext('2d').getImageData(0, 0, 214, 143).data]")
    picture = np.array(drawn).reshape(143, 214, 4)[..., :3]
    assert np.abs(picture - 255 * small.to_tensor().clip(0, 1)).max() < 0.51
    if ranks != (143, 214, 3):  # control: the photograph as it was
        assert np.abs(picture - 255 * photo).max() > 10


def test_ranks_that_the_library_refuses_are_named(page):
    for ranks, at_fault in (((60, 100, 1), 100), ((143, 5, 3), 143), ((30, 30, 2), None)):
        for mode, rank in enumerate(ranks, start=1):
            page.fill(f"#photograph-r{mode}", str(rank))
        note = page.text_content("#photograph-note")
        assert note.startswith(f"A rank of {at_fault} is more than the product of the other two") if at_fault else note == ""
        if at_fault:
            with pytest.raises(ValueError, match=f"is {at_fault}; .* may be at most"):
                hosvd(interactive.photograph() / 255.0, ranks)


def test_the_photograph_is_that_of_lesson_00():
    lesson = json.loads((interactive.FOLDER.parents[1] / "00_tensors_and_tucker.ipynb").read_text(encoding="utf-8"))
    lines = "".join("".join(cell["source"]) + "\n" for cell in lesson["cells"] if cell["cell_type"] == "code").splitlines()
    (line,) = (line for line in lines if line.startswith("photo = "))
    names = {"load_sample_image": interactive.load_sample_image}
    exec(line, names)
    assert (names["photo"] == interactive.photograph() / 255.0).all()


# Latent RoPE


@pytest.mark.parametrize("query, key, both", [(7, 2, 0), (7, 2, 1000), (7, 2, 100000), (0, 0, 0), (2, 7, 5), (200, 1, 99999)])
def test_logits_are_those_of_rotary_and_know_the_distance_alone(page, query, key, both):
    for name, position in (("query", query), ("key", key), ("both", both)):
        page.fill(f"#rope-{name}", str(position))
    given = interactive.numbers()["rope"]
    rotary = Rotary.latent(interactive.LATENT)
    vectors = torch.tensor([given["query"], given["key"]], dtype=torch.float64)
    q, k = rotary(vectors[None], torch.tensor([query + both, key + both]))[0]
    shown = [float(row[1].replace("−", "-")) for row in cells(page, "#logits")]
    assert shown[:2] == pytest.approx([float(q @ k)] * 2, abs=6e-7)
    assert shown[2] == pytest.approx(float(q @ vectors[1]), abs=6e-7)
    assert shown[0] == pytest.approx(float(rotary(vectors[None], torch.tensor([query, key]))[0].prod(0).sum()), abs=6e-7)
    if key + both:  # controls: the key left as it was, and another distance
        assert abs(shown[2] - shown[0]) > 1e-4
    page.fill("#rope-query", str(query + 1 if query < 200 else 199))
    assert cells(page, "#logits")[0][1] != cells(page, "#logits")[2][1] or not key + both
    assert float(cells(page, "#logits")[0][1].replace("−", "-")) != shown[0]
