"""The viewer in a real browser: opened, clicked, by keys, on a phone, compared with pictures.

VIEW_SCREENSHOTS=write writes the pictures anew: look at them before they are committed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from experiments.view import view
from tests.conftest import ROOT
from tests.experiments.made_runs import make_run, problem
from tests.experiments.test_view import HOSTILE

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PICTURES = ROOT / "tests" / "data" / "view"
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
# Pictures are compared as small grey ones: fonts differ from machine to machine, layout does not.
COMPARED = 64
MOST_DIFFERENCE = 6.0

if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip("there is no Chromium (apt-get install chromium)", allow_module_level=True)


@pytest.fixture(scope="module")
def chromium():
    assert CHROMIUM is not None, "CI installs Chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files by name: a run beside another, and one of long responses with hostile text."""
    folder = tmp_path_factory.mktemp("view")
    one = make_run(folder / "one", {k: [problem(k), problem(k + 10)] for k in (1, 2, 4)})
    other = make_run(
        folder / "other",
        {2: [problem(4, branching=False)], 9: [problem(4, branching=False)]},
        method="grpo",
    )
    view(one, folder / "compared.html", compare=other)
    long = problem(1, length=8000, step_tokens=40, name=HOSTILE, text=HOSTILE)
    long["leaves"][0]["steps"][0]["text"] = HOSTILE
    view(make_run(folder / "long", {1: [long]}), folder / "long.html")
    faint = problem(4)
    for leaf in faint["leaves"]:
        for step in leaf["steps"]:
            step["fci"] = step["fci"] and step["fci"] / 4
    view(
        make_run(folder / "strong", {1: [problem(4)]}),
        folder / "scales.html",
        compare=make_run(folder / "faint", {1: [faint]}),
    )
    inside = problem(3)
    for leaf in inside["leaves"]:
        if leaf["row"] != leaf["root"]:
            # As entropy branching has it: the first step of a continuation is one of its root's.
            root = inside["leaves"][leaf["root"]]
            [cut] = [step for step in root["steps"] if step["end"] == leaf["split"]]
            leaf["split"] -= 1
            leaf["steps"][0]["start"] = cut["start"]
    view(make_run(folder / "inside", {1: [inside]}), folder / "inside.html")
    return folder


@pytest.fixture
def opened(chromium, pages):
    """Opens a page; at the end nothing was complained of and nothing asked of any network."""
    contexts, complaints = [], []

    def open_page(name, viewport=DESKTOP, scheme="light"):
        context = chromium.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        address = (pages / name).as_uri()
        page.on("request", lambda r: r.url != address and complaints.append(r.url))
        page.goto(address)
        page.wait_for_selector(".leaf.chosen")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def grey(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        small = picture.convert("L").resize((COMPARED, COMPARED), Image.Resampling.BOX)
    return np.asarray(small, float)


def compare(page, name, tmp_path):
    """With the picture of this name, as a person would from some steps away."""
    taken = tmp_path / f"{name}.png"
    page.screenshot(path=taken)
    kept = PICTURES / f"{name}.png"
    if os.environ.get("VIEW_SCREENSHOTS") == "write":
        PICTURES.mkdir(exist_ok=True)
        with Image.open(taken) as picture:
            picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(
                kept, optimize=True
            )
    difference = np.abs(grey(taken) - grey(kept))
    assert difference.mean() < MOST_DIFFERENCE, f"{taken} differs from {kept}"


def test_a_tree_is_drawn_and_read(opened, tmp_path):
    page = opened("compared.html")
    expect(page.locator("h1")).to_have_text("one")
    expect(page.locator("#about")).to_contain_text("held-out accuracy 0.400 → 0.700 after 4 steps")
    first = page.locator(".run").first
    assert first.locator(".leaf").count() == 30
    # Right and wrong are other shapes; two branch positions for each of six responses.
    marks = first.locator("use[href='#mark-right'], use[href='#mark-wrong']")
    assert marks.count() == 30
    assert first.locator("use.branch").count() == 12
    colours = first.locator(".leaf").first.locator(".steps rect")
    assert len({colours.nth(k).get_attribute("fill") for k in range(colours.count())}) > 3
    compare(page, "desktop", tmp_path)


def test_a_click_shows_the_path_of_a_branch(opened):
    page = opened("compared.html")
    branch = page.locator(".leaf", has_text="1.2").first
    branch.locator(".steps rect").first.click()
    is_right = branch.locator("use[href='#mark-right']").count() == 1
    said = "one: branch 1.2, " + ("right" if is_right else "wrong")
    expect(page.locator("#chosen")).to_have_text(said)
    lines = page.locator("#text .line")
    assert lines.count() > 5
    # The shared part has FCI bars, the branch has none; the branch begins at the mark.
    assert page.locator("#text .line.branch").count() == 1
    assert 0 < page.locator("#text .meter i").count() < lines.count()
    parts = page.locator("#text .part")
    assert parts.count() >= 2
    expect(parts.first).to_contain_text("value 0.33 over 3 leaves, advantage")
    expect(page.locator("#text .line.now")).to_have_count(1)
    # The curve under the text: a bar for each step, those of the branch are flat.
    bars = page.locator("#influence rect")
    expect(bars).to_have_count(lines.count())
    assert page.locator("#influence rect.none").count() > 0
    bars.first.dispatch_event("click")
    expect(page.locator("#text .line.now .number")).to_have_text("1")
    expect(page.locator("#influence rect.now")).to_have_count(1)
    branch.locator(".steps rect").first.hover()
    expect(page.locator("#tip")).to_contain_text("FCI not computed")
    page.locator(".leaf").first.locator(".steps rect").nth(1).hover()
    expect(page.locator("#tip")).to_contain_text("step 2, FCI 0.")
    expect(page.locator("#tip")).to_contain_text("value 0.33 over 3, advantage +0.25")


def test_keys_do_what_the_mouse_does(opened):
    page = opened("compared.html")
    chosen = page.locator("#chosen")
    expect(chosen).to_contain_text("response 1")
    page.keyboard.press("ArrowDown")
    expect(chosen).to_contain_text("branch 1.1")
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    page.keyboard.press("k")
    expect(chosen).to_contain_text("response 1")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#tip")).to_contain_text("step 3, FCI")
    expect(page.locator("#text .line.now .number")).to_have_text("3")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#tip")).to_contain_text("step 2, FCI")
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    before = page.locator("#question").inner_text()
    page.keyboard.press("n")
    expect(page.locator("#question")).not_to_have_text(before)
    page.keyboard.press("[")
    expect(page.locator("#step")).to_have_value("2")
    page.keyboard.press("t")
    expect(page.locator("#attention")).to_contain_text("was not computed")
    expect(page.locator("#text")).to_be_hidden()


def test_a_branch_inside_a_step_is_marked_in_the_text(opened):
    page = opened("inside.html")
    # The chosen response branches twice; each mark lies inside a step.
    expect(page.locator("#text .line.branch")).to_have_count(2)
    page.keyboard.press("j")
    expect(page.locator("#chosen")).to_contain_text("branch 1.1")
    expect(page.locator("#text .line.branch")).to_have_count(1)
    expect(page.locator("#influence rect.branch")).to_have_count(1)


def test_what_is_chosen_stays_when_the_window_changes(opened):
    """A phone's bars come and go as it scrolls, which once went back to the first response."""
    page = opened("compared.html")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#chosen")).to_contain_text("branch 1.2")
    expect(page.locator("#tip")).to_be_visible()
    drawn = page.locator(".run svg").first.element_handle()
    page.set_viewport_size({**DESKTOP, "height": 700})
    page.wait_for_timeout(400)
    assert drawn.evaluate("svg => svg.isConnected")
    page.set_viewport_size({**DESKTOP, "width": 1000})
    page.wait_for_function("svg => !svg.isConnected", arg=drawn)
    expect(page.locator("#chosen")).to_contain_text("branch 1.2")
    expect(page.locator(".leaf.chosen")).to_have_count(1)
    expect(page.locator("#text .line.now .number")).to_have_text("1")
    # What the pointer or a key asked about is gone with the drawing.
    expect(page.locator("#tip")).to_be_hidden()


def test_the_only_problem_stays_chosen(opened):
    page = opened("long.html")
    drawn = page.locator(".run svg").first.element_handle()
    page.keyboard.press("n")
    page.wait_for_function("svg => !svg.isConnected", arg=drawn)
    expect(page.locator(".leaf.chosen")).to_have_count(1)


def test_the_same_problem_of_another_run(opened, tmp_path):
    page = opened("compared.html")
    page.locator("#step").select_option("4")
    runs = page.locator(".run")
    expect(runs).to_have_count(2)
    # Problem 4 is in the other run at steps 2 and 9: the nearer one is shown.
    expect(runs.nth(1).locator("h2")).to_contain_text("grpo, step 2")
    assert runs.nth(1).locator(".leaf").count() == 6
    expect(runs.nth(1).locator(".steps .unknown").first).to_be_visible()
    runs.nth(1).locator(".leaf").first.locator(".steps rect").first.click()
    expect(page.locator("#chosen")).to_contain_text("other: response 1")
    page.locator("#next").click()
    expect(runs.nth(1)).to_contain_text("has not recorded this problem")
    page.locator("#previous").click()
    expect(runs.nth(1).locator("h2")).to_contain_text("grpo, step 2")
    compare(page, "compared", tmp_path)


def test_a_colour_says_the_same_in_both_runs(opened):
    """Each run once had a scale of its own, and the legend was that of one."""
    page = opened("scales.html")
    runs = page.locator(".run")
    expect(runs).to_have_count(2)
    fills = [
        run.locator(".leaf")
        .first.locator(".steps rect")
        .evaluate_all("all => all.map((one) => [one.__data__.fci, one.getAttribute('fill')])")
        for run in (runs.first, runs.nth(1))
    ]
    for (strong, theirs), (faint, ours) in zip(*fills, strict=True):
        assert faint == pytest.approx(strong / 4, rel=1e-3)
        assert ours == page.evaluate(f"colour({faint}, drawings[0].tree.highest)")
        assert theirs == page.evaluate(f"colour({strong}, drawings[0].tree.highest)")
    highest = page.evaluate("drawings[0].tree.highest.toFixed(3)")
    expect(page.locator("#scale-ends")).to_have_text(f"0 to {highest} and above")


def test_a_phone_and_the_dark(opened, tmp_path):
    page = opened("compared.html", PHONE, "dark")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    text = page.locator("#text")
    text.scroll_into_view_if_needed()
    assert text.bounding_box()["width"] > 300
    page.evaluate("scrollTo(0, 0)")
    compare(page, "phone_dark", tmp_path)


def test_long_responses_are_laid_out_as_they_are_read(opened):
    """30 leaves of 8,000 tokens, text that would like to be a script among them."""
    page = opened("long.html")
    assert page.evaluate("performance.getEntriesByName('first-contentful-paint').length") == 1
    assert page.locator(".leaf").count() == 30
    expect(page.locator("#question")).to_contain_text("</script><script>alert(1)")
    expect(page.locator("#text .line .words").first).to_have_text(HOSTILE)
    # Steps that are narrower than a few pixels are drawn together.
    steps = page.locator(".leaf").first.locator(".steps rect").count()
    width = page.locator(".run svg").first.bounding_box()["width"]
    assert 20 < steps <= width / 2
    lines = page.locator("#text .line").count()
    assert 0 < lines <= 200
    if page.locator("#text .more").is_visible():
        page.locator("#text").evaluate("box => { box.scrollTop = box.scrollHeight; }")
        page.wait_for_function(f"document.querySelectorAll('#text .line').length > {lines}")


def test_attention_is_a_map(chromium, finished, tmp_path):
    folder, _ = finished
    path = tmp_path / "page.html"
    view(folder, path, attention=3)
    context = chromium.new_context(viewport=DESKTOP)
    page = context.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector(".leaf.chosen")
    page.locator("#tab-attention").click()
    maps = page.locator("#attention canvas")
    expect(maps).to_have_count(2)
    box = maps.first.bounding_box()
    steps = page.locator("#text .line").count() + 1
    place = {"x": box["width"] * 1.5 / steps, "y": box["height"] * (1 - 0.5 / steps)}
    maps.first.hover(position=place)
    expect(page.locator("#tip")).to_contain_text("to step 1")
    expect(page.locator("#tip")).to_contain_text(f"from step {steps - 1}")
    drawn = maps.first.evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    )
    pixels = np.array(drawn).reshape(steps, steps, 4)
    # Nothing looks ahead; what is seen has more than one shade.
    assert (pixels[..., 3] == 255).sum() == steps * (steps + 1) / 2
    assert len({tuple(p) for p in pixels[np.tri(steps, dtype=bool)]}) > 3
    assert page.locator("#attention .bars").count() == steps - 1
    context.close()
