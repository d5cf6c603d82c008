"""Users of the page: an invitation, the login by name, the password, and what a page cannot get at."""

from pathlib import Path

import pytest
import trio

from tests.browser.test_access import PALE, nameless
from tests.browser.window import Browser, Window, a_site, a_window, steer

PASSWORD, NEW = "correct horse battery", "staple of another kind"
CONFIG = '[users]\nenabled = true\nregistration = "invite"\n[spaces.tts]\n'
DESK = "!document.getElementById('desk').hidden && document.getElementById('link').dataset.is === 'good'"


async def sure(window: Window, title: str, **fields: str) -> str:
    """Fill in the question that is being asked, and agree; the command that it shows."""
    await window.until("document.getElementById('sure').open")
    assert title in await window.js("document.getElementById('sure-title').textContent")
    for name, text in fields.items():
        await window.type(f"sure-{name}", text)
    assert (await nameless(window), await window.js(PALE)) == ([], [])
    command = str(await window.js("document.getElementById('sure-command').textContent"))
    await window.click("#sure-yes")
    return command


async def press(window: Window, selector: str) -> None:
    """Press a button of a list, which may be drawn anew at any time."""
    await window.js("document.querySelector(values[0]).click()", selector)


async def log_in(window: Window, password: str) -> None:
    await window.until("!document.getElementById('user-login').hidden")
    await window.js("document.getElementById('user-name').value = ''")
    await window.type("user-name", "berta")
    await window.type("user-password", password, "\n")


@pytest.mark.trio
async def test_an_invited_user_registers_changes_the_password_and_logs_in_with_it(
    tmp_path: Path, browser: Browser
) -> None:
    async with a_site(tmp_path, CONFIG) as (place, _), a_window(browser) as window:
        code = (await steer(place, "create_invite", ""))["code"]
        await window.open(f"{place.url}#invite={code}")
        await window.until("document.getElementById('user-enter').textContent === 'Register'")
        assert code not in await window.js("location.href")
        assert (await nameless(window), await window.js(PALE)) == ([], [])
        await log_in(window, PASSWORD)
        await window.until(DESK)
        assert "berta" in await window.js("document.getElementById('link').textContent")
        assert await window.js("document.cookie") == "", "no script can read it"
        assert await window.js("JSON.stringify({ ...sessionStorage, ...localStorage }).includes('rly_')") is False

        await window.open(place.url)
        await window.until(DESK)
        await window.click("#account")
        await window.type("old-password", PASSWORD)
        await window.type("new-password", NEW, "\n")
        await window.until("!document.getElementById('account-done').hidden")
        assert (await nameless(window), await window.js(PALE)) == ([], [])
        await window.click("#account-close")
        await window.until(DESK)

        await window.click("#leave")
        await log_in(window, PASSWORD)
        await window.until("document.getElementById('user-fault').textContent.includes('wrong')")
        await log_in(window, NEW)
        await window.until(DESK)
        await steer(place, "remove_user", "berta")
        await window.until("document.getElementById('user-fault').textContent.includes('ended')")
        told = await trio.to_thread.run_sync(browser.errors)  # the next test looks for errors of its own
        assert any("401" in line for line in told)


@pytest.mark.trio
async def test_an_operator_manages_users_tokens_and_spaces_and_sees_the_commands(
    tmp_path: Path, browser: Browser
) -> None:
    rows = "[...document.querySelectorAll('#{} tr')].some(({{ textContent }}) => textContent.includes('{}'))"
    async with a_site(tmp_path, CONFIG) as (place, _), a_window(browser) as window:
        await steer(place, "create_user", "berta", role="operator", password=PASSWORD)
        await window.open(place.url)
        await log_in(window, PASSWORD)
        await window.until(DESK)
        await window.click("#admin-open")
        await window.until(rows.format("user-rows", "berta"))

        await window.click("#add-user")
        assert await sure(window, "Add a user", name="carl", password=NEW) == "relayd user add carl --role client"
        await window.until(rows.format("user-rows", "carl"))
        await window.click("#add-invite")
        assert await sure(window, "Invite") == "relayd user invite --role client --expires 7d"
        await window.until("document.getElementById('sure-text').value.includes('/#invite=rly_i_')")
        await window.click("#sure-no")
        await press(window, "#user-rows tr:nth-child(2) button:last-child")
        assert await sure(window, "Remove carl?") == "relayd user remove carl"
        await window.until(f"!{rows.format('user-rows', 'carl')}")

        await window.click("#add-token")
        command = await sure(window, "Create a token", name="dora", spaces="tts lab*", max_queued="3")
        assert command == "relayd token create --role client --name dora --space tts --space 'lab*' --max-queued 3"
        await window.until("document.getElementById('sure-text').value.startsWith('rly_c_')")
        await window.click("#sure-no")
        await window.until(rows.format("token-rows", "dora"))
        await press(window, "#token-rows tr:last-child button")
        assert (await sure(window, "dora")).startswith("relayd token revoke tok_")
        await window.until(f"!{rows.format('token-rows', 'dora')}")

        await window.click("#add-space")
        assert await sure(window, "Create a space", name="lab", max_queued="7") == (
            "relayd space create lab --max-queued 7"
        )
        await window.until(rows.format("space-rows", "lab"))
        await press(window, "#space-rows tr:first-child button:nth-child(2)")
        assert await sure(window, "Settings of lab", description="Tries") == (
            "relayd space change lab --description Tries"
        )
        await window.until("!document.getElementById('sure').open")
        assert (await steer(place, "change_space", "lab"))["settings"]["description"] == "Tries"
        await press(window, "#space-rows tr:first-child button:first-child")
        assert await sure(window, "Pause lab?") == "relayd space pause lab"
        await window.until(rows.format("space-rows", "Paused"))
        await window.click("#admin-open")
        await window.until(DESK)
