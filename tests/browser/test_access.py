"""The page for everybody: names for what cannot be seen, keys for who has no mouse, contrast, width, language."""

import pytest
from selenium.webdriver import ActionChains

from tests.browser.window import Browser, BrowserPlace, Window, a_window

OPERABLE = ("button", "checkbox", "combobox", "link", "slider", "spinbutton", "textbox")
#: All that says something, with the colours that it says it in; and how they contrast (WCAG 2.2, 1.4.3).
PALE = """(() => {
  const channel = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const parse = (colour) => (colour.match(/[0-9.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, alpha = 1] = parse(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const pale = [];
  for (const element of document.body.querySelectorAll("*")) {
    const says = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!says || !element.offsetHeight || element.closest(":disabled, .unseen, .skip, svg, option")) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) pale.push(`${element.tagName} ${element.className} ${element.textContent} ${contrast}`);
  }
  return pale;
})()"""


async def nameless(window: Window) -> list[str]:
    """What a screen reader would call nothing but "button"."""
    nodes = (await window.cdp("Accessibility.getFullAXTree"))["nodes"]
    shown = [node for node in nodes if not node["ignored"] and node["role"]["value"] in OPERABLE]
    assert shown
    return [str(node) for node in shown if not node["name"]["value"].strip()]


async def focused(window: Window) -> str:
    return str(await window.js("document.activeElement.id || document.activeElement.className"))


@pytest.mark.trio
async def test_it_works_by_keys_alone_and_everything_has_a_name(site: BrowserPlace, browser: Browser) -> None:
    async with a_window(browser) as window:
        await window.open(site.url)
        assert await nameless(window) == []
        assert await focused(window) == "token"
        await window.log_in(site)
        await window.js("document.getElementById('space').focus()")
        order: list[str] = []
        while "submit" not in order and len(order) < 12:  # behind the inputs and "More settings"
            await window.do(lambda driver: ActionChains(driver).send_keys("\ue004").perform())  # Tab
            order.append(await focused(window))
        assert order[0] == "text"
        assert order[-1] == "submit"
        await window.type("text", "keys")
        await window.type("submit", " ")
        await window.until("document.querySelector('.wave').offsetWidth > 0")
        await window.until_state("completed")
        assert await nameless(window) == []
        slider = "document.querySelector('.wave input')"
        await window.until("document.querySelector('.clock').textContent.startsWith('0:02.0')")  # it has been played
        await window.js(f"{slider}.focus()")
        await window.do(lambda driver: driver.switch_to.active_element.send_keys("\ue011"))  # Home
        assert await window.until(f"{slider}.getAttribute('aria-valuetext') === '0.00 s of 2.1 s'")
        await window.do(lambda driver: driver.switch_to.active_element.send_keys("\ue014"))  # to the right
        assert await window.until(f"{slider}.getAttribute('aria-valuetext') === '2.0 s of 2.1 s'")
        await window.do(lambda driver: driver.switch_to.active_element.send_keys("\ue004"))  # Tab
        assert await focused(window) == "download"
        await window.js("document.querySelector('.forget').focus()")
        await window.do(lambda driver: driver.switch_to.active_element.send_keys(" "))
        await window.until("document.getElementById('none').offsetHeight > 0")
        assert await focused(window) == "text"  # and not lost
        live = await window.js("[...document.querySelectorAll('[role=status], [role=alert], [aria-live]')].length")
        assert live >= 4
    assert browser.errors() == []


async def pale(window: Window) -> list[str]:
    """What is hard to read, in the light or in the dark scheme."""
    found: list[str] = []
    for scheme, ground in (("light", "rgb(244, 243, 240)"), ("dark", "rgb(19, 20, 25)")):
        await window.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        assert await window.js("getComputedStyle(document.body).backgroundColor") == ground
        found += await window.js(PALE)
    return found


@pytest.mark.trio
async def test_it_is_readable_at_a_phones_width_in_both_schemes(site: BrowserPlace, browser: Browser) -> None:
    async with a_window(browser) as window:
        metrics = {"width": 320, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        await window.cdp("Emulation.setDeviceMetricsOverride", **metrics)
        await window.open(site.url)
        await window.type("token", "rly_c_wrong", "\n")
        await window.until("document.getElementById('login-fault').offsetHeight > 0")
        assert await pale(window) == []
        await window.log_in(site)
        await window.click("#more summary")
        await window.type("param-duration_s", "60")
        await window.submit("x" * 200)
        await window.until_state("running")
        assert await pale(window) == []
        await window.click(".cancel")
        await window.until_state("cancelled")
        await window.type("space", "empty")
        await window.until("document.getElementById('form').disabled")
        assert await pale(window) == []
        assert await window.js("document.documentElement.scrollWidth") <= 320
    assert browser.errors() == []


@pytest.mark.trio
async def test_it_speaks_chinese_and_remembers_that(site: BrowserPlace, browser: Browser) -> None:
    async with a_window(browser) as window:
        await window.open(site.url)
        assert await window.js("document.documentElement.lang") == "en"
        await window.click("#language")
        assert await window.js("document.documentElement.lang") == "zh-CN"
        assert await window.words("#enter") == "登录"
        await window.do(lambda driver: driver.refresh())
        await window.log_in(site)
        assert await window.words("#link") == "✓ 已连接：anna"
        await window.submit("一首歌")
        await window.until("document.querySelector('.request .state').textContent === '✓ 已完成'")
        assert await window.words(".figures [data-name=rtf] dt") == "实时率"
        said = await window.js("document.body.innerText")
        assert not [word for word in ("Submit", "Connected", "Completed", "Text", "request") if word in said]
        await window.click("#language")
        assert await window.words(".request .state") == "✓ Completed"
    assert browser.errors() == []
