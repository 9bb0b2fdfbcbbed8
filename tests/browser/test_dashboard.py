"""The dashboard in a real browser against a real server: what it shows, and that a keyboard is enough."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from serverless_llm.cli.make_checkpoint import make_checkpoint
from tests.browser.conftest import DEMOS, SMALL, OpenPage
from tests.serving import Server

pytestmark = pytest.mark.browser

AXE = Path(__file__).parent / "axe" / "axe.min.js"


def row(page: Page, table: str, name: str) -> Locator:
    return page.locator(f"#{table}-table tbody tr").filter(has=page.get_by_role("rowheader", name=name, exact=True))


def complete(server: Server, model: str, prompt: str = "1 2 3") -> None:
    server.put("/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 8}, "POST")


def reach(page: Page, name: str) -> None:
    """Go with the Tab key to the control of this accessible name."""
    wanted = page.get_by_label(name, exact=True).or_(page.get_by_role("button", name=name, exact=True)).first
    for _ in range(80):
        if wanted.evaluate("one => one === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"the Tab key never reaches {name!r}")


# --- what it shows ---


def test_models_and_devices(page: Page) -> None:
    expect(page.locator("#link")).to_have_text("connected")
    for name in ("demo-add", "demo-count", "demo-reverse"):
        expect(row(page, "models", name)).to_contain_text(" MB")
    devices = page.get_by_role("list", name="Devices of node0").locator("> li")
    expect(devices).to_have_count(2)
    expect(devices.first).to_contain_text(re.compile(r"weights .*, KV .*, free .* of 16.8 MB"))
    expect(page.get_by_role("heading", name="node0")).to_contain_text("67.1 MB")


def test_watching_wakes_no_model(page: Page, server: Server) -> None:
    before = server.metric("serverless_llm_cold_starts_total")
    page.reload()
    expect(page.locator("#link")).to_have_text("connected")
    assert server.metric("serverless_llm_cold_starts_total") == before


def test_a_request_makes_a_cold_start_appear_with_its_phases(page: Page, server: Server) -> None:
    server.put("/admin/models/demo-count/unload", {}, "POST")
    expect(row(page, "models", "demo-count")).to_contain_text("unloaded")
    began = page.locator("#starts-table tbody tr").count()
    complete(server, "demo-count")
    starts = page.locator("#starts-table tbody tr")
    expect(starts).to_have_count(began + 1)
    expect(starts.first).to_contain_text("demo-count")
    numbers = starts.first.locator("td.number")
    expect(numbers.nth(5)).to_have_text(re.compile(r"\d"))  # the whole
    for phase in range(5):
        expect(numbers.nth(phase)).to_have_text(re.compile(r"\d"))
    widths = starts.first.locator(".part").evaluate_all("parts => parts.map(part => parseFloat(part.style.width))")
    assert sum(widths) > 0
    expect(row(page, "models", "demo-count")).to_contain_text("loaded")
    expect(page.get_by_role("list", name="On node0/")).to_contain_text("demo-count")
    expect(page.get_by_role("log")).to_contain_text("demo-count is ready on node0/")
    expect(page.get_by_role("img", name=re.compile("^Latency over"))).to_have_accessible_name(re.compile(r"P50 \d"))


def test_a_load_that_goes_on_is_shown_live(page: Page, server: Server, tmp_path: Path) -> None:
    make_checkpoint("tiny-llama", tmp_path / "big", layers=48, dtype="float32")  # seconds, from such a disk
    server.put("/admin/models/big", {"source": str(tmp_path / "big"), "context": 64})
    server.put("/admin/models/big/load", {}, "POST")
    try:
        page.reload()
        start = row(page, "starts", "big")
        expect(start).to_contain_text("loading")
        expect(start).to_have_class("live")
        expect(page.get_by_role("progressbar", name="Progress of big")).to_be_visible()
        expect(start).not_to_have_class("live")
        expect(start.locator("td.number").nth(2)).to_have_text(re.compile(r"\d s"))  # disk -> DRAM
        expect(start.locator("td.number").nth(4)).to_have_text("\u2013")  # nobody asked it anything yet
    finally:
        server.put("/admin/models/big", {}, "DELETE")


QUANTITIES = [
    ("bytes", 0, "0 B"), ("bytes", 999, "999 B"), ("bytes", 1536, "1.5 KB"), ("bytes", 2 * 10**11, "200.0 GB"),
    ("bytes", 5 * 10**15, "5000.0 TB"), ("seconds", None, "\u2013"), ("seconds", 0, "0 ms"),
    ("seconds", 0.0002, "<1 ms"), ("seconds", 0.0123, "12.3 ms"), ("seconds", 0.123, "123 ms"),
    ("seconds", 4.2, "4.20 s"), ("seconds", 99.9, "99.90 s"), ("seconds", 240, "4 min"), ("span", -3, "0 s"),
    ("span", 89, "89 s"), ("span", 5400, "2 h"), ("span", 86400 * 3, "3 d"), ("number", 0, "0"),
    ("number", 1.2345, "1.23"), ("number", 1234.5, "1,235"), ("milliseconds", None, "\u2013"),
    ("milliseconds", 12.34, "12.3 ms"),
]  # fmt: skip


def test_quantities_as_people_read_them(page: Page) -> None:
    script = """async (asked) => {
      const format = await import(new URL("dashboard/format.js", document.baseURI));
      return asked.map(([name, value]) => format[name](value));
    }"""
    shown = page.evaluate(script, [[name, value] for name, value, _ in QUANTITIES])
    assert shown == [text for _, _, text in QUANTITIES]


# --- what can be done, by keyboard alone ---


def test_load_pin_and_unload_by_keyboard(page: Page) -> None:
    model = row(page, "models", "demo-reverse")
    expect(model).to_contain_text("unloaded")
    reach(page, "Load demo-reverse")
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_have_text("demo-reverse is loaded")
    expect(model).to_contain_text("device")
    expect(page.get_by_label("Unload demo-reverse")).to_be_focused()  # the button kept the focus through its change
    reach(page, "Pin demo-reverse")
    expect(page.get_by_label("Pin demo-reverse")).to_have_attribute("aria-pressed", "false")
    page.keyboard.press("Space")
    expect(page.get_by_label("Pin demo-reverse")).to_have_attribute("aria-pressed", "true")
    expect(model).to_contain_text("pinned")
    page.keyboard.press("Space")
    expect(page.get_by_label("Pin demo-reverse")).to_have_attribute("aria-pressed", "false")
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_label("Unload demo-reverse")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_have_text("demo-reverse is unloaded")


def test_deploy_and_remove_by_keyboard(page: Page, checkpoint: Path) -> None:
    reach(page, "Deploy a model")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Deploy a model")
    expect(dialog.get_by_label("Name")).to_be_focused()
    page.keyboard.type("team/mine")
    page.keyboard.press("Tab")
    page.keyboard.type(str(checkpoint))
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#said")).to_have_text("team/mine is deployed")
    expect(row(page, "models", "team/mine")).to_contain_text("unloaded")
    expect(page.get_by_role("log")).to_contain_text("team/mine deployed from")
    reach(page, "Remove team/mine")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Remove a model")).to_contain_text("Requests that run get their")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(row(page, "models", "team/mine")).to_have_count(0)
    expect(page.locator("#models")).to_be_focused()


def test_a_deploy_over_a_name_that_is_there_asks_first(page: Page) -> None:
    page.get_by_role("button", name="Deploy a model").click()
    dialog = page.get_by_role("dialog", name="Deploy a model")
    dialog.get_by_label("Name").fill("demo-add")
    dialog.get_by_label("Source").fill("demo-add")
    dialog.get_by_role("button", name="Deploy").click()
    expect(dialog.get_by_role("alert")).to_have_text("demo-add is deployed already. Deploy once more to replace it.")
    dialog.get_by_role("button", name="Deploy").click()
    expect(dialog).to_be_hidden()
    expect(page.locator("#said")).to_have_text("demo-add is deployed")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("Source", "relative/path", "source must be the absolute path"),
        ("Name", "no good name!", "is no name of a model"),
        ("Source", "", "Source is needed"),
        ("Context, tokens", "many", "a whole number is needed"),
    ],
)
def test_a_wrong_deploy_shows_what_the_server_says(
    server: Server, opened: OpenPage, checkpoint: Path, field: str, value: str, says: str
) -> None:
    page, _ = opened(server, expected="status of 400")
    page.get_by_role("button", name="Deploy a model").click()
    dialog = page.get_by_role("dialog", name="Deploy a model")
    dialog.get_by_text("Options").click()
    for name, good in (("Name", "mine"), ("Source", str(checkpoint)), (field, value)):
        dialog.get_by_label(name).fill(good)
    dialog.get_by_label("Name").press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text(says)
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_be_hidden()


def test_the_filter(page: Page) -> None:
    page.get_by_label("Filter").fill("COUNT")
    expect(page.locator("#models-table tbody tr")).to_have_count(1)
    page.get_by_label("Filter").fill("<b>")
    expect(page.locator("#models-empty")).to_have_text("No model's name contains “<b>”.")


# --- what it withstands ---


def test_markup_in_what_the_server_says_stays_text(page: Page, server: Server, checkpoint: Path) -> None:
    evil = checkpoint.parent / "<img src=x onerror='document.title=1'><b>"
    shutil.move(checkpoint, evil)
    server.put("/admin/models/evil", {"source": str(evil)})
    (evil / "model.safetensors").unlink()
    server.put("/admin/models/evil/load", {}, "POST")
    try:
        expect(row(page, "models", "evil")).to_contain_text("failed")
        expect(row(page, "models", "evil").locator(".why")).to_contain_text("<img src=x")
        expect(page.get_by_role("log")).to_contain_text("<img src=x")
        assert page.locator("img, main b").count() == 0
        assert page.title() == "serverless-llm"
    finally:
        server.put("/admin/models/evil", {}, "DELETE")


def test_a_hidden_page_asks_nothing_and_a_shown_one_little(opened: OpenPage, server: Server) -> None:
    page, watch = opened(server, before=lambda page: page.clock.install())
    expect(page.locator("#link")).to_have_text("connected")
    hide = "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
    hide += " document.dispatchEvent(new Event('visibilitychange')); }"
    before = watch.count("/admin/status")
    for _ in range(40):
        page.clock.run_for(500)
    assert before < watch.count("/admin/status") <= before + 11  # in 20 s, at most one in two
    page.evaluate(hide, True)
    before = watch.count("/admin/status")
    page.clock.run_for(600_000)
    assert watch.count("/admin/status") == before
    with page.expect_request("**/admin/status"), page.expect_request("**/admin/events?*"):
        page.evaluate(hide, False)
    assert watch.count("/metrics") == 0


def test_the_key_is_asked_for_and_kept_in_the_tab_only(opened: OpenPage, tmp_path: Path) -> None:
    config = tmp_path / "keyed.yaml"
    config.write_text("api_key: the-right-one\n")
    with Server(tmp_path / "state", "--config", str(config), *SMALL, *DEMOS[:2]) as server:
        page, watch = opened(server, expected="status of 401")
        dialog = page.get_by_role("dialog", name="This server needs a key")
        expect(dialog.get_by_label("API key")).to_be_focused()
        page.keyboard.type("a-wrong-one")
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_contain_text("a valid key is required")
        dialog.get_by_label("API key").fill("the-right-one")
        page.keyboard.press("Enter")
        expect(row(page, "models", "demo-add")).to_have_count(1)
        expect(page.get_by_role("log")).to_contain_text("demo-add deployed")
        page.reload()
        expect(row(page, "models", "demo-add")).to_have_count(1)
        assert "the-right-one" in page.evaluate("JSON.stringify({...sessionStorage})")
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert "the-right-one" not in "".join(watch.requests)


def test_a_server_that_goes_away_is_told_of(opened: OpenPage, tmp_path: Path) -> None:
    server = Server(tmp_path / "state", *SMALL, *DEMOS[:2])
    with server:
        page, _ = opened(server, expected="net::ERR_")
        expect(page.locator("#link")).to_have_text("connected")
    expect(page.locator("#link")).to_have_text("not connected")
    expect(page.get_by_role("alert").first).to_contain_text("does not answer")


def test_a_machine_that_says_nothing_any_more_is_told_of_and_asked_again(opened: OpenPage, server: Server) -> None:
    page, watch = opened(server, before=lambda page: page.clock.install())
    expect(page.locator("#link")).to_have_text("connected")
    page.route("**/admin/**", lambda route: None)  # taken, and never answered
    page.clock.run_for(13_000)
    expect(page.locator("#link")).to_have_text("not connected")
    expect(page.get_by_role("alert").first).to_contain_text("does not answer")
    page.unroute("**/admin/**")
    before = watch.count("/admin/events")
    page.clock.run_for(5_000)
    expect(page.locator("#link")).to_have_text("connected")
    for _ in range(8):
        page.clock.run_for(5_000)  # the stream that was there says nothing either, by this clock
    assert watch.count("/admin/events") > before


def test_a_page_that_is_opened_behind_another_asks_nothing_until_it_is_seen(opened: OpenPage, server: Server) -> None:
    behind = "Object.defineProperty(document, 'hidden', {value: true, configurable: true})"
    page, watch = opened(server, before=lambda page: page.add_init_script(behind))
    expect(page.locator("#link")).to_have_text("connecting")
    assert watch.count("/admin/status") == watch.count("/admin/events") == 0
    page.evaluate("() => { Object.defineProperty(document, 'hidden', {value: false}); }")
    page.evaluate("() => { document.dispatchEvent(new Event('visibilitychange')); }")
    expect(page.locator("#link")).to_have_text("connected")


def test_below_a_path_of_a_proxy(chrome: Browser, server: Server) -> None:
    def passed_on(route: Route) -> None:
        path = route.request.url.removeprefix("http://proxy.test/models-here/")
        if path.startswith("admin/events"):
            route.abort()  # a stream has no end that could be passed on
        else:
            route.fulfill(response=context.request.fetch(f"{server.url}/{path}"))

    context = chrome.new_context()
    context.route("http://proxy.test/models-here/**", passed_on)
    page = context.new_page()
    page.goto("http://proxy.test/models-here/")
    expect(page.locator("#link")).to_have_text("connected")
    expect(row(page, "models", "demo-add")).to_have_count(1)
    context.close()


# --- how it looks, and to whom ---


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_in_both_schemes(opened: OpenPage, server: Server, scheme: str) -> None:
    page, _ = opened(server, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")
    complete(server, "demo-add", "1+1=")
    expect(row(page, "starts", "demo-add").first).to_be_visible()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
    assert (lightness > 200) == (scheme == "light")
    page.evaluate(AXE.read_text())
    assert violations(page) == []
    page.get_by_role("button", name="Deploy a model").click()
    page.get_by_text("Options").click()
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.get_by_label("Remove demo-add").click()
    assert violations(page) == []


def violations(page: Page) -> list[str]:
    """What axe-core finds, best practices included, as rule: where."""
    found = page.evaluate("axe.run(document)")["violations"]
    return [f"{one['id']}: {[node['target'] for node in one['nodes']]}" for one in found]


def test_landmarks_and_live_regions(page: Page) -> None:
    for role in ("banner", "main", "log"):
        expect(page.get_by_role(role)).to_have_count(1)
    for name in ("Models", "Devices", "Cold starts", "The last five minutes", "Events"):
        expect(page.get_by_role("heading", name=name, exact=True)).to_have_count(1)
    assert page.locator("#said").get_attribute("role") == "status"
    assert page.locator("#trouble").get_attribute("role") == "alert"


def test_the_focus_is_seen(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the models")).to_be_in_viewport()
    reach(page, "Deploy a model")
    assert page.evaluate("getComputedStyle(document.activeElement).outline").endswith("solid 2px")


def test_narrow_screens_scroll_only_downwards(opened: OpenPage, server: Server) -> None:
    page, _ = opened(server, viewport={"width": 340, "height": 700})
    expect(page.locator("#models-table tbody tr")).not_to_have_count(0)
    assert page.evaluate("document.documentElement.scrollWidth") <= 340


def test_on_narrow_screens_what_can_be_done_is_in_sight(opened: OpenPage, server: Server) -> None:
    page, _ = opened(server, viewport={"width": 420, "height": 900})
    box = page.get_by_label("Remove demo-add").bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= 420


def test_text_is_only_ever_text(opened: OpenPage, server: Server) -> None:
    """The policy refuses markup from strings, whoever would write it."""
    page, _ = opened(server, expected="TrustedHTML")
    refused = page.evaluate("() => { try { document.body.innerHTML = '<b>x</b>'; } catch (e) { return e.name; } }")
    assert refused == "TypeError"
