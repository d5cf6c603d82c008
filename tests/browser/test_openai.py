"""npm's `openai`, unchanged, in pages of other origins: a listed one speaks, any other is refused by the browser."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.browser.window import MOCK, Browser, Window, a_window, steer
from tests.support.audio_compare import decoded
from tests.support.processes import a_place, a_relay, a_worker

MODULES = Path(__file__).parents[2] / "docs" / "examples" / "node_modules"
#: The package's default call. It sends headers of its own, so that the browser asks the relay before it sends.
SPEAK = """
  const [baseURL, apiKey, done] = arguments;
  const speak = async () => {
    const { default: OpenAI } = await import("/openai/index.mjs");
    const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, dangerouslyAllowBrowser: true });
    const asked = { model: "gpt-4o-mini-tts", voice: "alloy", input: "Good morning." };
    const speech = await client.audio.speech.create(asked);
    const bytes = new Uint8Array(await speech.arrayBuffer());
    return { space: speech.headers.get("x-relay-space"), audio: Array.from(bytes) };
  };
  speak().then(done, (error) => done({ error: `${error.name}: ${error.message}`, kind: error.constructor.name }));
"""


class Quiet(SimpleHTTPRequestHandler):
    """The packages that npm has installed."""

    def log_message(self, *_told: Any) -> None:
        """Say nothing."""


@pytest.fixture
def packages() -> Iterator[int]:
    """The port of a server of npm's packages on this machine."""
    assert (MODULES / "openai").is_dir(), "`make test` installs npm's openai"
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(MODULES))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


async def spoken(window: Window, origin: str, base_url: str, token: str) -> dict[str, Any]:
    """What the package gets, or its error, in a page of `origin`."""
    await window.open(f"{origin}/openai/")  # any page of that origin
    answer: dict[str, Any] = await window.do(lambda driver: driver.execute_async_script(SPEAK, base_url, token))
    return answer


@pytest.mark.trio
async def test_the_npm_package_speaks_in_a_page_of_a_listed_origin_only(
    tmp_path: Path, browser: Browser, packages: int
) -> None:
    listed, other = f"http://127.0.0.1:{packages}", f"http://localhost:{packages}"
    place = a_place(tmp_path)
    file = tmp_path / "relayd.toml"
    file.write_text(f'allowed_origins = ["{listed}"]\n{file.read_text()}')
    async with a_relay(place) as relay, a_worker(place, relay, *MOCK), a_window(browser) as window:
        base_url = (await relay.event("listening"))["openai_base_url"]
        token = (await steer(place, "create_token", "anna", role="client"))["token"]
        answer = await spoken(window, listed, base_url, token)
        assert answer.get("space") == "tts", answer
        assert decoded(bytes(answer["audio"]), "mp3").duration_s > 1
        assert [error for error in browser.errors() if "favicon" not in error] == []
        refused = await spoken(window, other, base_url, token)
        assert refused["kind"] == "APIConnectionError"
        [error, *_] = [error for error in browser.errors() if "favicon" not in error]
        assert f"from origin '{other}' has been blocked by CORS policy" in error
        assert "No 'Access-Control-Allow-Origin' header" in error
        assert (await relay.event("origin refused"))["origin"] == other
