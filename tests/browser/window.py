"""Chromium on the relay's page: windows that type, look and listen as a person does."""

import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
import trio
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from protocol import open_relay
from tests.support.processes import Place, Proc, a_place, a_relay

T = TypeVar("T")
#: For whatever a page is to show.
PATIENCE_S = 20
MOCK = ("--space", "tts", "--engine", "mock")

ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # the tests may run as root, and see no page but our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--lang=en-US",
    "--window-size=1000,1100",
    # Windows lie on top of each other here; none is to be throttled for that.
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
    # Sound without a click, and a microphone that beeps.
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--host-resolver-rules=MAP relay.test 127.0.0.1",  # to the browser another machine, so no secure context over HTTP
    "--ignore-certificate-errors",  # of the tests' own certificate, on this machine's own address
)

#: Loudness at which a page is heard.
LOUD = 0.02
#: That the newest request was heard while it ran.
HEARD_LIVE = "window.heardLive === document.querySelector('.request').dataset.id"
#: Put into every page before its own scripts: an AnalyserNode on whatever is led to the loudspeaker.
EARS = """
window.ears = [];
const connect = AudioNode.prototype.connect;
AudioNode.prototype.connect = function (to, ...rest) {
  if (to instanceof AudioDestinationNode) {
    const ear = new AnalyserNode(this.context, { fftSize: 2048 });
    connect.call(this, ear);
    window.ears.push(ear);
  }
  return connect.call(this, to, ...rest);
};
window.loudness = () => Math.max(0, ...window.ears.map((ear) => {
  const heard = new Float32Array(ear.fftSize);
  ear.getFloatTimeDomainData(heard);
  return Math.max(...heard.map(Math.abs));
}));
setInterval(() => {  // a slow driver may look only when it is over
  const request = document.querySelector(".request");
  if (request?.dataset.state === "running" && window.loudness() > LOUD) window.heardLive = request.dataset.id;
}, 20);
""".replace("LOUD", str(LOUD))

#: Looks at the page until a condition holds; a condition that throws does not hold yet.
UNTIL = """
const [source, values, patience, done] = arguments;
const look = new Function("...values", `return ${source}`);
const began = performance.now();
const again = () => {
  let found = null;
  try { found = look(...values); } catch (error) { /* not there yet */ }
  if (found) done({ found });
  else if (performance.now() - began > patience * 1000) done({ body: document.body.innerText });
  else setTimeout(again, 20);
};
again();
"""


@attrs.frozen
class Browser:
    """Chromium. It knows one window at a time, so whoever means one says so first."""

    driver: webdriver.Chrome
    downloads: Path

    @classmethod
    def start(cls, downloads: Path) -> "Browser":
        """Start it.

        Args:
            downloads: a folder for what pages download.
        """
        program, steering = shutil.which("chromium"), shutil.which("chromedriver")
        assert program, "there is no `chromium`; `make test` installs Debian's package"
        assert steering, "there is no `chromedriver`; `make test` installs Debian's package chromium-driver"
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for argument in ARGUMENTS:
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        return cls(webdriver.Chrome(options=options, service=Service(steering)), downloads)

    def errors(self) -> list[str]:
        """What the console has of errors and warnings since it was asked last."""
        told: list[dict[str, Any]] = self.driver.execute("getLog", {"type": "browser"})["value"]
        return [line["message"] for line in told if line["level"] in ("WARNING", "SEVERE")]


@attrs.frozen
class Window:
    """A window of it. Its calls run in a thread, so that the test's processes are heard meanwhile."""

    browser: Browser
    handle: str

    async def do(self, work: Callable[[webdriver.Chrome], T]) -> T:
        """Something that the driver does, in this window."""

        def here() -> T:
            self.browser.driver.switch_to.window(self.handle)
            return work(self.browser.driver)

        return await trio.to_thread.run_sync(here)

    async def js(self, source: str, *values: Any) -> Any:
        """The value of an expression; `values` are `values[0]` and so on in it."""
        return await self.do(
            lambda driver: driver.execute_script(f"const values = [...arguments]; return {source}", *values)
        )

    async def until(self, source: str, *values: Any) -> Any:
        """The first true value of an expression, looked at every 20 ms."""

        def look(driver: webdriver.Chrome) -> Any:
            driver.set_script_timeout(PATIENCE_S + 5)
            return driver.execute_async_script(UNTIL, source, values, PATIENCE_S)

        answer = await self.do(look)
        assert "found" in answer, f"it was never so: {source}\non the page:\n{answer['body']}"
        return answer["found"]

    async def cdp(self, command: str, **parameters: Any) -> dict[str, Any]:
        """A command of Chromium's own protocol."""
        answer: dict[str, Any] = await self.do(lambda driver: driver.execute_cdp_cmd(command, parameters))
        return answer

    async def open(self, url: str) -> None:
        """Go to a page."""
        await self.do(lambda driver: driver.get(url))

    async def type(self, element: str, *keys: str) -> None:
        """Press keys in an element, by its id."""
        await self.do(lambda driver: driver.find_element("id", element).send_keys(*keys))

    async def click(self, selector: str) -> None:
        """Click on the first that a CSS selector finds."""
        await self.do(lambda driver: driver.find_element("css selector", selector).click())

    async def log_in(self, place: "BrowserPlace", space: str = "tts") -> None:
        """Log in, choose a space, and wait for the form."""
        await self.open(place.url)
        await self.type("token", place.token, "\n")
        await self.until(
            "[...document.getElementById('space').options].some(({ value }) => value === values[0])", space
        )
        await self.type("space", space)
        await self.until("!document.getElementById('form').disabled")

    async def submit(self, text: str) -> str:
        """Submit a text; the id of its request."""
        before = await self.js("document.querySelectorAll('.request').length")
        await self.js("document.getElementById('text').value = ''")
        await self.type("text", text)
        await self.click("#submit")
        await self.until("document.querySelectorAll('.request').length > values[0]", before)
        return str(await self.js("document.querySelector('.request').dataset.id"))

    async def until_state(self, state: str, number: int = 0) -> None:
        """Wait until a request of the list, the newest first, is in a state."""
        await self.until("document.querySelectorAll('.request')[values[0]].dataset.state === values[1]", number, state)

    async def words(self, selector: str) -> str:
        """What an element says."""
        return str(await self.js("document.querySelector(values[0]).textContent.trim()", selector))

    async def download(self, suffix: str = "wav") -> bytes:
        """What the first request's download brings."""
        request_id = await self.js("document.querySelector('.request').dataset.id")
        path = self.browser.downloads / f"relay-{request_id[:8]}.{suffix}"
        path.unlink(missing_ok=True)
        await self.click(".request .download")
        await trio.to_thread.run_sync(_until_there, path)
        return path.read_bytes()


def _until_there(path: Path) -> None:
    """Wait for a download; Chromium gives it its name when it is whole."""
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was never downloaded"
        time.sleep(0.02)


@attrs.frozen
class BrowserPlace(Place):
    """A place with a relay that runs, and what it takes to log in there."""

    url: str
    token: str


async def steer(place: Place, action: str, target: str, **options: Any) -> dict[str, Any]:
    """What an operator does, on the relay's own socket."""
    async with open_relay(f"unix:{place.folder}/state/relayd.sock", token="", role="operator") as relay:
        return await relay.steer(action, target, **options)


@asynccontextmanager
async def a_site(folder: Path, config: str = "[spaces.tts]\n") -> AsyncIterator[tuple[BrowserPlace, Proc]]:
    """A relay of a test's own, to be killed."""
    place = a_place(folder, config)
    async with a_relay(place) as relay:
        [url, *_] = (await relay.event("listening"))["urls"]
        token = (await steer(place, "create_token", "anna", role="client"))["token"]
        yield BrowserPlace(place.folder, place.environ, url.replace("ws:", "http:") + "/", token), relay


@asynccontextmanager
async def a_window(browser: Browser) -> AsyncIterator[Window]:
    """A window of its own, on top of the others."""

    def open_it() -> str:
        browser.driver.switch_to.window(browser.driver.window_handles[0])
        browser.driver.switch_to.new_window("window")
        browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": EARS})
        return browser.driver.current_window_handle

    window = Window(browser, await trio.to_thread.run_sync(open_it))
    try:
        yield window
    finally:
        with trio.CancelScope(shield=True):
            await window.do(lambda driver: driver.close())
