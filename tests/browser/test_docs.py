"""`/docs`: the description of the HTTP API, drawn for people."""

import pytest

from relayd.http.requests_api.openapi import DOCUMENT
from tests.browser.test_access import nameless, pale
from tests.browser.window import Browser, BrowserPlace, a_window

METHODS = ("get", "put", "post", "delete")


@pytest.mark.trio
async def test_every_operation_of_the_openapi_document_is_drawn(site: BrowserPlace, browser: Browser) -> None:
    operations = [(path, key, item[key]) for path, item in DOCUMENT["paths"].items() for key in METHODS if key in item]
    async with a_window(browser) as window:
        await window.open(site.url)
        await window.click("footer a")  # from the page
        await window.until("document.querySelectorAll('details').length > 0")
        assert await window.js("location.pathname") == "/docs"
        drawn = await window.js("[...document.querySelectorAll('summary code')].map((each) => each.textContent)")
        assert drawn == [f"{method.upper()} {path}" for path, method, _operation in operations]
        assert {"POST /v1/audio/speech", "GET /health", "GET /metrics"} <= set(drawn)
        for _path, _method, operation in operations:
            told = await window.js("document.getElementById(values[0]).textContent", operation["operationId"])
            assert operation["summary"].replace("`", "") in told
            assert all(status in told for status in operation["responses"])
        told = await window.js("document.getElementById('speech').textContent")
        assert "response_format" in told
        assert f"{site.url}v1/audio/speech" in told
        assert "$ref" not in await window.js("document.body.textContent")
        await window.open(f"{site.url}docs#submit")
        await window.until("document.getElementById('submit').open")
        assert await nameless(window) == []
        assert await pale(window) == []
        metrics = {"width": 320, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        await window.cdp("Emulation.setDeviceMetricsOverride", **metrics)
        assert await window.js("document.documentElement.scrollWidth") <= 320
    assert browser.errors() == []
