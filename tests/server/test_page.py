"""The page: its files as the server sends them, and the page at work in a Chromium, where there is one."""

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from sdfast.manifest import ImageProcessor
from sdfast.schedulers import SAMPLERS
from sdfast.server.jobs import Failed, Job
from sdfast.server.page import samplers
from tests.server.conftest import KEY, problem
from tests.server.studio import FakeStudio, engine
from tests.server.test_live import served, wait_until

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "sdfast/server/page/static"
FILES = sorted(STATIC.iterdir())
MARKUP = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
TAB, ENTER, CONTROL, ESCAPE = "\ue004", "\ue007", "\ue009", "\ue00c"  # as WebDriver has them
END, LEFT, RIGHT = "\ue010", "\ue012", "\ue014"
HARD = 'it\'s "quoted" $HOME `id` \\n \\ %s !! {x}\nüñí 🎨 \u202eturned'
"""A prompt with something in it for every quoting to stumble over."""


# The files


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/", *(f"/page/{file.name}" for file in FILES)])
async def test_every_file_is_served_as_what_it_is(http: httpx.AsyncClient, path: str) -> None:
    file = STATIC / (path.removeprefix("/page/") if path != "/" else "index.html")
    kinds = {".html": "html", ".css": "css", ".js": "javascript", ".svg": "svg+xml"}
    answer = await http.get(path)
    assert answer.status_code == 200 and answer.content == file.read_bytes()
    assert answer.headers["content-type"].partition(";")[0].endswith(f"/{kinds[file.suffix]}")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    nothing = ("default-src", "base-uri", "form-action", "frame-ancestors")
    assert policy == {
        **dict.fromkeys(nothing, "'none'"),
        **dict.fromkeys(("script-src", "style-src", "connect-src"), "'self'"),
        "img-src": "'self' blob: data:",
    }


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/", "/page/page.js", "/page/known"])
async def test_the_page_asks_for_the_key_as_browsers_know_it(http: httpx.AsyncClient, path: str) -> None:
    del http.headers["authorization"]
    answer = await http.get(path)
    problem(answer, 401)
    assert answer.headers.get_list("www-authenticate") == ["Bearer", 'Basic realm="sdfast"']
    assert (await http.get(path, auth=("anybody", KEY))).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["..%2Froutes.py", "%2e%2e%2froutes.py", "__init__.py", "nothing.js"])
async def test_no_other_file_is_served(http: httpx.AsyncClient, name: str) -> None:
    problem(await http.get(f"/page/{name}"), 404)


def test_every_file_is_packaged() -> None:
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    found = {file for pattern in packaged["sdfast"] for file in (ROOT / "sdfast").glob(pattern)}
    assert found.issuperset(FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_file_leads_elsewhere(file: Path) -> None:
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"\w+://|[\"'(]//|@import|\burl\(", text)


@pytest.mark.anyio
async def test_the_models_tell_what_the_page_offers(http: httpx.AsyncClient, studio: FakeStudio) -> None:
    studio.engines = {"tiny": replace(engine(), edits=False), "editor": replace(engine("editor"), edits=True)}
    listed = (await http.get("/v1/models")).json()["data"]
    assert [(model["id"], model["edits"]) for model in listed] == [("tiny", False), ("editor", True)]
    assert (listed[0]["sizes"], listed[0]["default_size"]) == (["64x64", "96x64"], "64x64")


@pytest.mark.anyio
async def test_every_sampler_is_offered_by_its_known_name(http: httpx.AsyncClient) -> None:
    known = (await http.get("/page/known")).json()
    assert known["samplers"] == samplers.groups()
    names = [sampler["name"] for group in known["samplers"] for sampler in group["samplers"]]
    assert sorted(names) == sorted(sampler.name for sampler in SAMPLERS)
    assert known["scheduler"] in names and known["key"] is True


# The page at work

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SWITCHES = """--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync --window-size=1280,1000"""


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in [*SWITCHES.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page in the browser, as somebody sits before it."""

    def __init__(self, browser: Any, port: int) -> None:
        self.browser, self.port = browser, port
        self.url = f"http://anybody:{KEY}@127.0.0.1:{port}/"
        self.load()

    def load(self) -> None:
        self.browser.get(self.url)
        wait_until(lambda: self.text("curl") or self.seen("notice"))

    def run(self, script: str, *values: Any) -> Any:
        return self.browser.execute_script(script, *values)

    def __getitem__(self, id: str) -> Any:
        return self.browser.find_element("id", id)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.browser.find_elements("css selector", selector)
        return found

    def text(self, id: str) -> str:
        return str(self.run("return document.getElementById(arguments[0]).textContent", id))

    def seen(self, id: str) -> bool:
        return bool(self[id].is_displayed())

    def fill(self, **values: Any) -> None:
        """Put values into fields, at once, as typing would one by one."""
        self.run(
            """for (const [id, value] of Object.entries(arguments[0])) {
                 const field = document.getElementById(id);
                 field.value = value;
                 field.dispatchEvent(new Event("input", { bubbles: true }));
                 field.dispatchEvent(new Event("change", { bubbles: true }));
               }""",
            values,
        )

    def press(self, *keys: str) -> None:
        """Keys held together, for whatever has the focus."""
        from selenium.webdriver import ActionChains

        chain = ActionChains(self.browser, duration=0)
        for key in keys:
            chain.key_down(key)
        for key in reversed(keys):
            chain.key_up(key)
        chain.perform()

    @property
    def focused(self) -> Any:
        return self.browser.switch_to.active_element

    def draw(self, **values: Any) -> None:
        """Draw to the end."""
        before = len(self.all("#gallery li"))
        self.fill(**values)
        self["draw"].click()
        wait_until(lambda: len(self.all("#gallery li")) > before and not self.seen("working"))


@pytest.fixture
def page(browser: Any, studio: FakeStudio) -> Iterator[Page]:
    with served(studio) as port:
        page = Page(browser, port)
        yield page
        told = [entry["message"] for entry in browser.get_log("browser")]
        assert [message for message in told if "Failed to load resource" not in message] == []
        browser.get("about:blank")


def test_a_picture_is_drawn_with_previews_and_progress(page: Page, studio: FakeStudio) -> None:
    studio.seconds = 0.4
    page.fill(prompt="a boat", num_inference_steps=9, guidance_scale=3.5, size="96x64", scheduler="Euler a")
    page["draw"].click()
    wait_until(lambda: page["shown"].get_attribute("alt") == "A preview of the picture")
    bar = page["progress"]
    assert (bar.aria_role, bar.accessible_name) == ("progressbar", "Progress of the drawing")
    assert (bar.get_property("value"), bar.get_property("max")) == (1, 3)
    assert (page.text("counted"), page.text("status")) == ("step 1 of 3", "Drawing.")
    wait_until(lambda: page.text("status").startswith("One picture drawn in"))
    assert not page.seen("working")
    wait_until(lambda: page["shown"].get_property("naturalWidth") == 96)
    assert page["shown"].get_attribute("alt") == "a boat"
    request = studio.jobs[0].request
    assert (request.num_inference_steps, request.guidance_scale, request.scheduler) == (9, 3.5, "Euler a")
    assert (request.width, request.height, request.negative_prompts) == (96, 64, (None,))


def test_a_job_that_waits_says_how_long_and_is_cancelled_in_the_studio(
    page: Page, studio: FakeStudio
) -> None:
    studio.hang, studio.ahead = True, 2
    for end in ("escape", "button"):
        page["draw"].click()
        wait_until(lambda: page.text("status") == "Waiting: 2 jobs are before this one.")
        assert page.all("progress:indeterminate")
        page.press(ESCAPE) if end == "escape" else page["cancel"].click()
        wait_until(lambda: page.text("status") == "Cancelled.")
        wait_until(lambda: not studio.live)
    assert studio.cancelled == [job.id for job in studio.jobs]
    assert page.focused == page["draw"]


def test_errors_are_shown_by_their_field(page: Page, studio: FakeStudio) -> None:
    page.fill(num_inference_steps=5000)
    page["draw"].click()
    wait_until(lambda: page.seen("num_inference_steps-error"))
    field = page["num_inference_steps"]
    assert page.text("num_inference_steps-error").startswith("num_inference_steps: must be")
    assert field.get_attribute("aria-invalid") == "true" and page.focused == field
    assert field.get_attribute("aria-describedby") == "num_inference_steps-error"
    page.fill(num_inference_steps="", prompt="a")
    page["draw"].click()
    assert page.text("num_inference_steps-error") == "Steps: give a number."
    page.draw(num_inference_steps=5)
    assert not page.seen("num_inference_steps-error") and field.get_attribute("aria-invalid") is None
    assert len(studio.jobs) == 1


def test_what_looks_like_markup_is_text(page: Page, studio: FakeStudio) -> None:
    page.draw(prompt=MARKUP, negative_prompt=MARKUP)
    page["shown"].click()
    assert [dd.text for dd in page.all("#parameters dd")][:2] == [MARKUP, MARKUP]
    page["close"].click()
    studio.failure = Failed("engine", f"it broke: {MARKUP}")
    page["draw"].click()
    wait_until(lambda: page.seen("notice"))
    assert page.text("notice-text").endswith(MARKUP)
    studio.failure = Failed("request", f"prompt: {MARKUP}")
    page["draw"].click()
    wait_until(lambda: page.seen("prompt-error"))
    assert page.text("prompt-error").endswith(MARKUP)
    assert page.all("img[src=x], body script") == [] and page.browser.title == "sdfast"


COLOURS = {
    "control-1.png": "teal",
    "control-2.png": "navy",
    "like-1.png": "olive",
    "like-2.png": "purple",
}


def pixels(name: str) -> bytes:
    return Image.new("RGB", (64, 64), name).tobytes()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files lie that the snippets speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDFAST_API_KEY", KEY)
    for file, colour in {**COLOURS, "image.png": "white"}.items():
        Image.new("RGB", (64, 64), colour).save(file)
    return tmp_path


def test_a_control_image_is_chosen_where_the_engine_has_a_controlnet(
    page: Page, studio: FakeStudio, folder: Path
) -> None:
    assert not page.seen("controls")
    studio.engines["tiny"] = engine(controlnets=("canny [01234567]",))
    page.load()
    page["draw"].click()
    wait_until(lambda: page.seen("control_image-error"))
    assert page.text("control_image-error").startswith("control_image: is missing; tiny has a ControlNet")
    assert page.focused == page["control_image"] and studio.jobs == []
    page["control_image"].send_keys(str(folder / "control-1.png"))
    page.run("document.querySelector('input[value=fixed]').click()")
    assert page["control_mode"].accessible_name == "Mode of canny [01234567]"
    page.draw(prompt=HARD, seed=3, controlnet_conditioning_scale=0.25, control_mode="prompt")
    subprocess.run(["sh", "-c", page.text("curl")], check=True, timeout=20, capture_output=True)
    exec(page.text("python"), {})
    assert {job.control for job in studio.jobs} == {pixels("teal")} and len(studio.jobs) == 3
    asked = studio.jobs[0].request
    assert (asked.controlnet_conditioning_scale, asked.control_mode) == (0.25, "prompt")
    assert len({asked_for(job) for job in studio.jobs}) == 1
    page.draw(controlnet_conditioning_scale=2, control_mode="")
    assert studio.jobs[3].request.control_mode is None
    for picture, values in ((1, ["0.25", "prompt"]), (0, ["2", ""])):
        page.all("#gallery button")[picture].click()
        page["reuse"].click()
        names = ("controlnet_conditioning_scale", "control_mode")
        assert [page[name].get_property("value") for name in names] == values
    studio.failure = Failed("request", "control_mode: not with this one")
    page["draw"].click()
    wait_until(lambda: page.seen("control_mode-error"))
    assert page.focused == page["control_mode"]


def test_loras_have_a_scale_each(page: Page, studio: FakeStudio, folder: Path) -> None:
    """In the call, over an image too, and put back into the form."""
    assert not page.seen("loras-field")
    studio.engines["tiny"] = engine(loras=("oil", "it's ink"))
    page.load()
    page.run("document.querySelector('input[value=fixed]').click()")
    page.draw(prompt="a", seed=3, **{"lora-2": -0.5})
    subprocess.run(["sh", "-c", page.text("curl")], check=True, timeout=20, capture_output=True)
    exec(page.text("python"), {})
    page["image"].send_keys(str(folder / "image.png"))
    wait_until(lambda: page.seen("image-shown"))
    page.draw()
    subprocess.run(["sh", "-c", page.text("curl")], check=True, timeout=20, capture_output=True)
    exec(page.text("python"), {})
    assert [job.request.loras for job in studio.jobs] == [{"it's ink": -0.5}] * 6
    page.fill(**{"lora-1": 2, "lora-2": 0})
    page.all("#gallery button")[0].click()
    page["reuse"].click()
    assert [page[f"lora-{i}"].get_property("value") for i in (1, 2)] == ["0", "-0.5"]
    page.fill(**{"lora-1": ""})
    page["draw"].click()
    wait_until(lambda: page.seen("loras-error"))
    assert page.text("loras-error") == "oil: give a number."


def test_each_of_several_controlnets_has_a_control_image_a_scale_and_a_mode(
    page: Page, studio: FakeStudio, folder: Path
) -> None:
    """Alone, and beside an image that is drawn over; one without adds nothing."""
    studio.engines["tiny"] = engine(controlnets=("canny [01234567]", "pose [89abcdef]"))
    page.load()
    assert [label.text for label in page.all("#controlnets .label")] == [
        "Control image: canny [01234567]",
        "Control image: pose [89abcdef]",
    ]
    page["control_image-2"].send_keys(str(folder / "control-2.png"))
    page.run("document.querySelector('input[value=fixed]').click()")
    page.draw(prompt="a", seed=3, **{"controlnet_conditioning_scale-2": 0.5})
    subprocess.run(["sh", "-c", page.text("curl")], check=True, timeout=20, capture_output=True)
    exec(page.text("python"), {})
    alone, studio.jobs = studio.jobs, []
    assert {job.control for job in alone} == {bytes(64 * 64 * 3) + pixels("navy")} and len(alone) == 3
    assert alone[0].request.controlnet_conditioning_scale == (0.0, 0.5)
    assert alone[0].request.control_mode is None
    page["control_image"].send_keys(str(folder / "control-1.png"))
    page["image"].send_keys(str(folder / "image.png"))
    wait_until(lambda: page.seen("image-shown"))
    page.draw(**{"control_mode-2": "guess"})
    subprocess.run(["sh", "-c", page.text("curl")], check=True, timeout=20, capture_output=True)
    exec(page.text("python"), {})
    assert {job.control for job in studio.jobs} == {pixels("teal") + pixels("navy")} and len(studio.jobs) == 3
    assert {job.image for job in studio.jobs} == {pixels("white")}
    assert studio.jobs[0].request.controlnet_conditioning_scale == (1.0, 0.5)
    assert studio.jobs[0].request.control_mode == ("balanced", "guess")
    assert len({asked_for(job) for job in (*alone, *studio.jobs)}) == 2
    for picture, modes in ((1, ["", ""]), (0, ["balanced", "guess"])):
        page.all("#gallery button")[picture].click()
        page["reuse"].click()
        assert [page[f"control_mode{i}"].get_property("value") for i in ("", "-2")] == modes


def test_pictures_to_be_like_are_chosen_where_the_engine_has_ip_adapters(
    page: Page, studio: FakeStudio, folder: Path
) -> None:
    """Alone; beside a control image; and beside an image that is drawn over. Without one nothing is said."""
    assert not page.seen("adapters")
    ready = ImageProcessor(resize=8, crop=8)
    adapted = replace(engine(), ip_adapters=("style [01234567]", "face [89abcdef]"), image_processor=ready)
    studio.engines["tiny"] = adapted
    page.load()
    page.draw(prompt="a", seed=3)
    [without], studio.jobs = studio.jobs, []
    assert (without.ip_adapter, without.request.ip_adapter_scale) == (None, None)
    page["ip_adapter_image-2"].send_keys(str(folder / "like-2.png"))
    page.run("document.querySelector('input[value=fixed]').click()")
    page.draw(seed=3, **{"ip_adapter_scale-2": 0.5})
    subprocess.run(["sh", "-c", page.text("curl")], check=True, timeout=20, capture_output=True)
    exec(page.text("python"), {})
    small = [Image.new("RGB", (8, 8), name).tobytes() for name in ("black", "olive", "purple")]
    assert {job.ip_adapter for job in studio.jobs} == {small[0] + small[2]} and len(studio.jobs) == 3
    assert {job.request.ip_adapter_scale for job in studio.jobs} == {(0.0, 0.5)}
    studio.jobs, studio.engines["tiny"] = [], replace(adapted, controlnets=("canny [01234567]",))
    page.load()
    for field, file in (
        ("ip_adapter_image", "like-1.png"),
        ("ip_adapter_image-2", "like-2.png"),
        ("control_image", "control-1.png"),
        ("image", "image.png"),
    ):
        page[field].send_keys(str(folder / file))
    wait_until(lambda: page.seen("image-shown"))
    assert page.seen("control_mode") and page.all("#adapters select") == []
    page.draw(seed=3)
    subprocess.run(["sh", "-c", page.text("curl")], check=True, timeout=20, capture_output=True)
    exec(page.text("python"), {})
    assert {job.ip_adapter for job in studio.jobs} == {small[1] + small[2]} and len(studio.jobs) == 3
    assert {job.control for job in studio.jobs} == {pixels("teal")}
    assert {job.image for job in studio.jobs} == {pixels("white")}


def test_a_full_queue_is_tried_again_after_its_seconds(page: Page, studio: FakeStudio) -> None:
    studio.full = True
    page["draw"].click()
    wait_until(lambda: page.seen("notice"))
    assert "the queue is full" in page.text("notice-text")
    again = page["again"]
    assert (again.text, again.is_enabled()) == ("Try again in 3 s", False)
    studio.full = False
    page["draw"].click()
    assert page.text("status") == "" and page["draw"].get_attribute("aria-disabled") == "true"
    page.run("const now = performance.now.bind(performance); performance.now = () => now() + 3000")
    wait_until(again.is_enabled)
    again.click()
    wait_until(lambda: page.all("#gallery li"))
    assert not page.seen("notice") and len(studio.jobs) == 1


def test_a_lost_server_is_told(browser: Any, studio: FakeStudio) -> None:
    with served(studio) as port:
        page = Page(browser, port)
    page["draw"].click()
    wait_until(lambda: page.seen("notice"))
    assert page.text("notice-text") == "The connection to the server was lost."
    assert page["again"].is_enabled()


def test_everything_works_by_keyboard(page: Page, studio: FakeStudio) -> None:
    page["theme"].send_keys(TAB)
    assert page.focused == page["prompt"]
    page.focused.send_keys("a boat")
    page.press(CONTROL, ENTER)
    wait_until(lambda: page.all("#gallery li"))
    page.draw(prompt="a lighthouse")
    page.run("document.getElementById('code').open = true; document.getElementById('theme').focus()")
    reached, outlined = [], []
    while page.focused.tag_name != "body" and len(reached) < 40:
        reached.append(page.focused.get_attribute("id") or page.focused.accessible_name)
        outlined.append(page.focused.value_of_css_property("outline-style"))
        page.press(TAB)
    expected = (
        "theme prompt negative_prompt num_inference_steps guidance_scale scheduler size n reuse-seed draw"
    )
    assert [name for name in reached if name in expected.split()] == expected.split()
    assert {
        "Steps, slider",
        "Show large: a lighthouse, 20 steps, seed " + str(studio.jobs[1].request.seed),
    } <= {*reached}
    assert {"copy-curl", "copy-python"} <= {*reached}
    assert {*outlined[1:]} == {"solid"}  # the first was not reached by a key


def test_the_gallery_is_walked_by_arrow_keys(page: Page) -> None:
    page.draw(prompt="first")
    page.draw(prompt="second")
    newest, oldest = page.all("#gallery button")
    newest.send_keys(RIGHT)
    assert page.focused == oldest
    page.press(ENTER)
    assert page["large"].aria_role == "dialog" and page["large"].accessible_name == "Picture 1 of 2"
    page.press(RIGHT)
    assert page.all("#parameters dd")[0].text == "second"
    page.press(ESCAPE)
    assert not page.seen("large") and page.focused == newest
    page.press(LEFT)
    assert page.focused == newest
    page.press(END)
    assert page.focused == oldest


def test_a_picture_is_saved_and_its_parameters_are_reused(page: Page, studio: FakeStudio) -> None:
    page.draw(prompt="snow ü", negative_prompt="rain", n=2, num_inference_steps=7)
    page.fill(prompt="another", negative_prompt="", num_inference_steps=30)
    page.all("#gallery button")[0].click()
    link, seed = page["download"], studio.jobs[0].request.seed + 1
    assert link.get_attribute("download") == f"sdfast-{seed}.png"
    start = page.browser.execute_async_script(
        """const [link, done] = arguments;
           const picture = new Image();
           picture.onload = () => done(picture.naturalWidth);
           picture.src = link.href;""",
        link,
    )
    assert start == 64
    page.run("navigator.clipboard.writeText = async (text) => { document.body.dataset.copied = text; }")
    page["copy-parameters"].click()
    assert page.run("return document.body.dataset.copied").startswith("snow ü\nSteps: 7, ")
    page["reuse"].click()
    page.draw()
    first, again = studio.jobs[0].request, studio.jobs[1].request
    assert again.model_copy(update={"seed": first.seed, "num_images_per_prompt": 2}) == first
    assert again.seed == seed


def test_a_copy_button_pressed_twice_has_its_own_text_again(page: Page) -> None:
    page.run("document.getElementById('code').open = true")
    page.run("window.ends = []; window.setTimeout = (end) => window.ends.push(end)")
    for presses, copied in ((1, "Copied"), (2, "Could not copy")):
        ends = "resolve()" if copied == "Copied" else "reject()"
        page.run(f"navigator.clipboard.writeText = () => new Promise((resolve, reject) => {ends})")
        page["copy-curl"].click()
        wait_until(lambda presses=presses: page.run("return window.ends.length") == presses)
        assert page.text("copy-curl") == copied
    page.run("for (const end of window.ends) end()")
    assert page.text("copy-curl") == "Copy"


def test_the_code_asks_for_what_the_page_asks_for(
    page: Page, studio: FakeStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    page.run("document.querySelector('input[value=fixed]').click()")
    page.draw(prompt=HARD, negative_prompt=HARD[::-1], seed=7, n=2, guidance_scale=6.5, prompt_editing="true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDFAST_API_KEY", KEY)
    subprocess.run(["sh", "-c", page.text("curl")], check=True, timeout=20, capture_output=True)
    assert [picture["seed"] for picture in json.loads(Path("answer.json").read_text())["data"]] == [7, 8]
    exec(page.text("python"), {})
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["picture-0.png", "picture-1.png"]
    assert studio.jobs[0].request.prompts == (HARD,) and len(studio.jobs) == 3
    assert studio.jobs[0].request.prompt_editing
    assert len({asked_for(job) for job in studio.jobs}) == 1


def test_steps_are_cached_where_the_engine_can(page: Page, studio: FakeStudio) -> None:
    assert not page.seen("cache_interval")
    page.draw(cache_interval="3")  # kept of another engine
    studio.engines["tiny"] = engine(step_cache=True)
    page.load()
    assert page.seen("cache_interval")
    page.draw(cache_interval="3")
    page.all("#gallery button")[0].click()
    page.run("document.getElementById('close').click()")
    page.fill(cache_interval="1")
    page.draw()
    page.all("#gallery button")[1].click()
    page["reuse"].click()
    page.draw()
    assert [job.request.cache_interval for job in studio.jobs] == [1, 3, 1, 3]


def test_perturbed_attention_is_asked_for_where_the_engine_has_it(page: Page, studio: FakeStudio) -> None:
    assert not page.seen("pag_scale")
    page.draw(pag_scale="")  # not asked for, whatever is in it
    studio.engines["tiny"] = engine(pag=True)
    page.load()
    assert page.seen("pag_scale")
    assert page["pag_scale"].accessible_name == "PAG scale"
    page["draw"].click()
    assert page.text("pag_scale-error") == "PAG scale: give a number."
    page.run("localStorage.clear()")
    page.load()
    page.draw()
    page.draw(pag_scale=0)
    page.draw(pag_scale=4.5)
    page.load()
    page.draw()  # as the page remembers
    page.fill(pag_scale=101)
    page["draw"].click()
    wait_until(lambda: page.seen("pag_scale-error"))
    assert page.text("pag_scale-error").startswith("pag_scale: must be") and page.focused == page["pag_scale"]
    page.all("#gallery button")[0].click()
    page["reuse"].click()
    assert page["pag_scale"].get_property("value") == "4.5"
    assert [job.request.pag_scale for job in studio.jobs] == [0, 3, 0, 4.5, 4.5]
    page.run("document.getElementById('code').open = true")
    assert '"pag_scale": 4.5' in page["curl"].text and '"pag_scale": 4.5' in page["python"].text


def test_variations_are_drawn_of_one_seed(page: Page, studio: FakeStudio, folder: Path) -> None:
    """With a seed for them, which is told, or a random one."""
    page.run("document.querySelector('input[value=fixed]').click()")
    page.draw(prompt="a", seed=3, variation_seed=9)
    assert not page.seen("variation_seed")
    page.draw(variation_strength=0.25, n=2)
    assert page.seen("variation_seed")
    subprocess.run(["sh", "-c", page.text("curl")], check=True, timeout=20, capture_output=True)
    exec(page.text("python"), {})
    asked = [(job.request.variation_strength, job.request.variation_seed) for job in studio.jobs]
    assert asked == [(0, None), *[(0.25, 9)] * 3]
    assert len({asked_for(job) for job in studio.jobs[1:]}) == 1
    page.load()  # which forgets the pictures, and no settings
    page.draw(n=1, variation_seed="")
    [random] = studio.jobs[4].request.variation_seeds
    [button] = page.all("#gallery button")
    assert button.accessible_name == f"Show large: a, 20 steps, seed 3, variation seed {random}"
    page.draw(variation_strength=0)
    assert studio.jobs[5].request.variation_seeds == ()
    button.click()
    assert page["download"].get_attribute("download") == f"sdfast-3-{random}.png"
    page["reuse"].click()
    page.draw()
    assert asked_for(studio.jobs[6]) == asked_for(studio.jobs[4])
    page.all("#gallery button")[1].click()
    page["reuse"].click()
    assert page["variation_strength"].get_property("value") == "0" and not page.seen("variation_seed")
    for wrong in ({"variation_strength": 2}, {"variation_strength": 0.5, "variation_seed": -1}):
        page.fill(**wrong)
        page["draw"].click()
        field = [*wrong][-1]
        wait_until(lambda field=field: page.text(f"{field}-error").startswith(f"{field}: must be"))
        assert page.focused == page[field] and page.seen(f"{field}-error")
    page.fill(variation_seed=0.5)
    page["draw"].click()
    assert page.text("variation_seed-error").startswith("Variation seed: give a whole number")


def asked_for(job: Job) -> tuple[str, str]:
    return job.engine, job.request.model_dump_json()


def test_an_image_is_drawn_over_where_the_engine_takes_one(
    browser: Any, studio: FakeStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio.engines = {"plain": replace(engine("plain"), edits=False), "tiny": replace(engine(), edits=True)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDFAST_API_KEY", KEY)
    Image.new("RGB", (64, 64), "teal").save("image.png")
    with served(studio) as port:
        page = Page(browser, port)
        assert not page.seen("image-field")
        page.fill(model="tiny")
        page["image"].send_keys(str(tmp_path / "image.png"))
        wait_until(lambda: page.seen("image-shown") and page.seen("strength-field"))
        page.run("document.querySelector('input[value=fixed]').click()")
        page.draw(prompt="@file; type=x", strength=0.25, seed=3, guidance_scale=6.5)
        exec(page.text("python"), {})
        subprocess.run(["sh", "-c", page.text("curl")], check=True, timeout=20, capture_output=True)
        assert studio.jobs[0].request.strength == 0.25 and len(studio.jobs) == 3
        assert {job.image for job in studio.jobs} == {bytes((0, 128, 128)) * 64 * 64}
        assert len({asked_for(job) for job in studio.jobs}) == 1
        page["image-remove"].click()
        page.draw()
        assert studio.jobs[3].image is None and studio.jobs[3].request.strength is None
        studio.engines["tiny"] = replace(engine(), instructed=True)
        page.load()
        page.fill(model="tiny")
        page["image"].send_keys(str(tmp_path / "image.png"))
        wait_until(lambda: page.seen("image_guidance_scale-field") and not page.seen("strength-field"))
        page.draw(image_guidance_scale=2.5)
        assert studio.jobs[4].request.image_guidance_scale == 2.5 and studio.jobs[4].request.strength is None


def test_an_engine_of_a_range_of_sizes_takes_any_in_it(page: Page, studio: FakeStudio) -> None:
    studio.engines["tiny"] = replace(engine(), sizes=("64..96x64",))
    page.load()
    assert [option.text for option in page["size"].find_elements("tag name", "option")] == [
        "64 × 64",
        "Another, 64–96 × 64",
    ]
    assert not page.seen("width")
    page.fill(size="other", width=1000)
    page["draw"].click()
    wait_until(lambda: page.seen("size-error"))
    assert "1000x64 is not one of this engine's" in page.text("size-error")
    page.draw(width=96)
    assert (studio.jobs[0].request.width, studio.jobs[0].request.height) == (96, 64)


def test_settings_and_theme_outlive_a_reload(page: Page, studio: FakeStudio) -> None:
    studio.engines["other"] = engine("other")
    page.load()
    page.fill(model="other", prompt="kept", num_inference_steps=33, size="96x64", scheduler="UniPC", seed=5)
    page.load()
    page.draw()
    [job] = studio.jobs
    assert job.engine == "other" and job.request.scheduler == "UniPC"
    assert (job.request.prompts, job.request.num_inference_steps, job.request.width) == (("kept",), 33, 96)
    darkness = {"light": False, "dark": True}
    for theme, dark in darkness.items():
        features = [{"name": "prefers-color-scheme", "value": theme}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert (luminance(page, "body", "color") > 0.5) is dark
        for selector in ("h1", "label", ".hint", "#status", ".error", "#draw", "#theme", "summary", "pre"):
            assert contrast(page, selector) >= 4.5, (theme, selector)
    page["theme"].click()
    assert page["theme"].text == "Theme: light" and luminance(page, "body", "color") < 0.5
    page.load()
    assert page["theme"].text == "Theme: light" and luminance(page, "body", "color") < 0.5
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def luminance(page: Page, selector: str, name: str) -> float:
    """WCAG's relative luminance of an element's colour; of a background, the first that is not clear."""
    colour = page.run(
        """const [selector, name] = arguments;
           for (let node = document.querySelector(selector); node; node = node.parentElement) {
             const colour = getComputedStyle(node)[name];
             if (!colour.endsWith(", 0)")) return colour;
           }""",
        selector,
        name,
    )
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page: Page, selector: str) -> float:
    text, ground = luminance(page, selector, "color"), luminance(page, selector, "backgroundColor")
    return (max(text, ground) + 0.05) / (min(text, ground) + 0.05)
