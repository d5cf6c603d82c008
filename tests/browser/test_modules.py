"""The page's modules by themselves: msgpack, the player's audio thread, and the policy that they run under."""

from typing import Any

import msgpack
import pytest

from tests.browser.window import Browser, BrowserPlace, Window, a_window

RATE = 1000
QUANTUM = 128


async def call(window: Window, body: str, *values: Any) -> Any:
    """What an async function returns; `values` are its arguments."""
    source = f"""
      const done = arguments[arguments.length - 1];
      const work = async (...values) => {{ {body} }};
      work(...arguments).then((told) => done({{ told }}), (error) => done({{ error: String(error) }}));
    """
    answer = await window.do(lambda driver: driver.execute_async_script(source, *values))
    assert "error" not in answer, answer["error"]
    return answer["told"]


@pytest.mark.trio
@pytest.mark.parametrize("rate", [8_000, 24_000, 44_100, 48_000])
async def test_the_microphone_is_resampled_however_it_comes(site: BrowserPlace, browser: Browser, rate: int) -> None:
    body = """
      const { resampler } = await import("/microphone.js");
      const [rate] = values;
      const sound = Float32Array.from({ length: rate }, (_, i) => Math.sin((2 * Math.PI * 440 * i) / rate));
      const [whole, pieces] = [resampler(rate)(sound), []];
      const inPieces = resampler(rate);
      for (let at = 0; at < rate; at += 777) pieces.push(...inPieces(sound.subarray(at, at + 777)));
      const crossings = whole.filter((sample, i) => i && whole[i - 1] < 0 && sample >= 0).length;
      return [whole.length, JSON.stringify(whole) === JSON.stringify(pieces), crossings];
    """
    async with a_window(browser) as window:
        await window.open(site.url)
        length, is_same, crossings = await call(window, body, rate)
    assert abs(length - 24_000) < 5
    assert is_same
    assert abs(crossings - 440) <= 1


SIZES = (0, 1, 15, 16, 31, 32, 255, 256, 65_535, 65_536, 300_000)
VALUES: list[Any] = [
    *(None, True, False, 0.5, -1e300, float("inf"), "", "ä你🎵", "\ufeffmark"),
    *(2**n + d for n in (0, 5, 7, 8, 15, 16, 31, 32, 52) for d in (-1, 0, 1)),
    *(-(2**n) + d for n in (0, 5, 7, 8, 15, 16, 31, 32, 52) for d in (-1, 0, 1)),
    *("x" * size for size in SIZES),
    *(b"\xff" * size for size in SIZES),
    *([1] * size for size in SIZES if size < 70_000),
    *({str(key): key for key in range(size)} for size in SIZES if size < 300),
    {"type": "x", "__proto__": {"toString": [b"a", {"b": None}]}},
]
REFUSED = [
    b"",
    b"\xc1",
    msgpack.packb(msgpack.ExtType(5, b"abcd")),
    msgpack.packb({1: 2}),
    msgpack.packb("whole") + b"\0",
    msgpack.packb("cut")[:-1],
    msgpack.packb([1, 2, 3])[:-1],
    b"\xc4\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xa1\xff",
    b"\x91" * 40 + b"\0",
]


@pytest.mark.trio
async def test_its_msgpack_reads_and_writes_what_the_reference_does(site: BrowserPlace, browser: Browser) -> None:
    again = """
      const { encode, decode } = await import("/msgpack.js");
      const bytes = (hex) => Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
      const hex = (all) => Array.from(all, (byte) => byte.toString(16).padStart(2, "0")).join("");
      return values[0].map((packed) => {
        try { return hex(encode(decode(bytes(packed)))); } catch { return null; }
      });
    """
    async with a_window(browser) as window:
        await window.open(site.url)
        packed = [msgpack.packb(value) for value in VALUES]
        told = await call(window, again, [message.hex() for message in packed])
        assert [msgpack.unpackb(bytes.fromhex(message)) for message in told] == VALUES
        assert [len(message) // 2 for message in told] == [len(message) for message in packed]  # the shortest form
        assert await call(window, again, [message.hex() for message in REFUSED]) == [None] * len(REFUSED)
        left_out = "return Array.from((await import('/msgpack.js')).encode({ a: undefined, b: 1 }))"
        assert bytes(await call(window, left_out)) == msgpack.packb({"b": 1})


@pytest.mark.trio
async def test_its_digest_is_the_browsers_own(site: BrowserPlace, browser: Browser) -> None:
    both = """
      const { sha256 } = await import("/digest.js");
      const same = async (size) => {
        const bytes = crypto.getRandomValues(new Uint8Array(size + 3)).subarray(3); // unaligned
        return String(sha256(bytes)) === String(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)));
      };
      return Promise.all(values[0].map(same));
    """
    sizes = [0, 1, 55, 56, 63, 64, 65, 119, 120, 60_000]  # around the ends of its blocks
    async with a_window(browser) as window:
        await window.open(site.url)
        assert await call(window, both, sizes) == [True] * len(sizes)


#: A request of the page, given messages by hand: what it has, and what it says to the relay.
REQUEST = """
  const { Request } = await import("/request.js");
  const said = [];
  const link = { open: true, waiting: 0, send: (message) => said.push(message), drop: () => said.push("drop") };
  const row = { id: "a", space: "tts", params: { text: "hi" }, made: Date.now() };
  const request = new Request(link, row, () => {});
  for (const message of values[0]) {
    if (message.pcm) message.pcm = Uint8Array.from(message.pcm);
    request.take(message);
  }
  const { state, failure, track } = request;
  const asked = said.map(({ type, attempt, after_seq }) => [type, attempt, after_seq]);
  return { state, code: failure?.code, samples: track.pieces.map((piece) => [...piece]).flat(), asked };
"""
STARTED = {"type": "started", "seq": 0, "format": {"sample_rate": 1000, "channels": 1}}


def heard(attempt: int, *samples: int) -> list[dict[str, Any]]:
    """The frames of an attempt without its last."""
    audio = [{"type": "audio", "seq": seq, "pcm": [sample, 0]} for seq, sample in enumerate(samples, 1)]
    return [{**frame, "attempt": attempt} for frame in (STARTED, *audio)]


@pytest.mark.trio
async def test_an_end_reaches_whoever_heard_an_attempt_that_a_killed_relay_forgot(
    site: BrowserPlace, browser: Browser
) -> None:
    failed = {"type": "failed", "attempt": 1, "seq": 0, "code": "worker_lost", "message": "it did not come back"}
    completed = {"type": "completed", "attempt": 1, "seq": 2, "result": {}}
    async with a_window(browser) as window:
        await window.open(site.url)
        told = await call(window, REQUEST, [*heard(2, 7, 8), failed])
        assert told == {"state": "failed", "code": "worker_lost", "samples": [7, 8], "asked": []}
        again = [*heard(2, 7, 8), heard(1, 5)[1], completed, *heard(1, 5), completed]
        told = await call(window, REQUEST, again)
        assert told == {"state": "completed", "code": None, "samples": [5], "asked": [["attach", 0, -1]]}


#: The audio thread, driven by hand: `steps` are lists of messages, and after each so many quanta are asked for.
PLAYER = """
  window.sampleRate = 1000;
  window.AudioWorkletProcessor = class { port = { told: [], postMessage(message) { this.told.push(message); } }; };
  const kinds = {};
  window.registerProcessor = (name, kind) => (kinds[name] = kind);
  await import(`/worklet.js?${Math.random()}`);
  const [channels, at, steps] = values;
  const player = new kinds["relay-player"]({ processorOptions: { channels, at } });
  const heard = [];
  let goes = true;
  for (const [messages, quanta] of steps) {
    for (const message of messages) {
      if (message.pcm) message.pcm = Int16Array.from(message.pcm);
      player.port.onmessage({ data: message });
    }
    for (let i = 0; goes && i < quanta; i++) {
      const output = Array.from({ length: channels }, () => new Float32Array(128));
      goes = player.process([], [output]);
      for (let frame = 0; frame < 128; frame++) heard.push(output.map((channel) => Math.round(channel[frame] * 32768)));
    }
  }
  return { heard, goes, last: player.port.told.at(-1) };
"""
#: Of the first samples, that rise from silence.
RISE = 4
FIRST = 30_000
Step = tuple[list[dict[str, Any]], int]


def ramp(first: int, last: int) -> dict[str, list[int]]:
    """Samples that tell which they are, up to number 600; what fades from them is below the first at once."""
    return {"pcm": [FIRST + number for number in range(first, last)]}


async def play(window: Window, *steps: Step, channels: int = 1, at: int = 0) -> Any:
    return await call(window, PLAYER, channels, at, [list(step) for step in steps])


def numbers(heard: list[list[int]]) -> list[int]:
    """Which samples were heard as they are: not those that rise or fade."""
    return [frame[0] - FIRST for frame in heard if frame[0] >= FIRST]


@pytest.mark.trio
async def test_what_comes_in_time_is_played_without_a_gap(site: BrowserPlace, browser: Browser) -> None:
    async with a_window(browser) as window:
        await window.open(site.url)
        pieces: list[Step] = [([ramp(0, 149)], 2), ([ramp(149, 280)], 1), ([ramp(280, 281), ramp(281, 500)], 1)]
        pieces.append(([{"over": True}], 9))
        played = await play(window, *pieces)
        assert numbers(played["heard"]) == list(range(RISE - 1, 500))  # whole, in order, none twice
        start = played["heard"].index([FIRST + RISE])
        assert [frame[0] for frame in played["heard"][start : start + 496]] == list(
            range(FIRST + RISE, FIRST + 500)
        )  # no gap in it
        assert played["goes"] is False
        assert played["last"]["ended"] is True
        assert played["last"]["pauses"] == 0


@pytest.mark.trio
async def test_what_comes_late_is_waited_for_and_nothing_is_lost(site: BrowserPlace, browser: Browser) -> None:
    async with a_window(browser) as window:
        await window.open(site.url)
        late: list[Step] = [([ramp(0, 200)], 8), ([ramp(200, 250)], 4), ([ramp(250, 600), {"over": True}], 9)]
        played = await play(window, *late)
        assert numbers(played["heard"]) == [*range(RISE - 1, 200), *range(200 + RISE - 1, 600)]
        assert played["last"]["pauses"] == 1
        assert played["last"]["at"] == 600
        one_by_one = [played["heard"][i][0] - played["heard"][i - 1][0] for i in range(1, len(played["heard"]))]
        assert max(map(abs, one_by_one)) < FIRST / RISE + 100  # no click: silence comes and goes over some samples


@pytest.mark.trio
async def test_what_is_made_anew_is_not_heard_twice(site: BrowserPlace, browser: Browser) -> None:
    async with a_window(browser) as window:
        await window.open(site.url)
        anew: list[Step] = [
            ([ramp(0, 300)], 1),
            ([{"cut": 50}, ramp(50, 90)], 1),
            ([ramp(90, 400)], 2),
            ([{"over": True}], 9),
        ]
        played = await play(window, *anew)
        assert numbers(played["heard"])[-1] == 399
        assert sorted(set(numbers(played["heard"]))) == numbers(played["heard"])
        kept: list[Step] = [([ramp(0, 200), ramp(200, 400), {"cut": 250}, ramp(250, 300)], 3), ([{"over": True}], 9)]
        assert numbers((await play(window, *kept))["heard"]) == list(range(RISE - 1, 300))
        from_there = await play(window, ([ramp(100, 400), {"over": True}], 9), at=100)
        assert numbers(from_there["heard"]) == list(range(100 + RISE - 1, 400))
        two = {"pcm": [value for number in range(300) for value in (FIRST + number, -FIRST - number)]}
        heard = (await play(window, ([two, {"over": True}], 9), channels=2))["heard"]
        assert [frame for frame in heard if frame[0] >= FIRST + RISE] == [
            [FIRST + n, -FIRST - n] for n in range(RISE, 300)
        ]
        stopped = await play(window, ([ramp(0, 900)], 2), ([{"stop": True}], 9))
        assert stopped["goes"] is False
        assert numbers(stopped["heard"])[-1] < 2 * QUANTUM


@pytest.mark.trio
async def test_no_script_but_its_own_runs_there(site: BrowserPlace, browser: Browser) -> None:
    inline = """
      window.refused = [];
      document.addEventListener("securitypolicyviolation", (event) => window.refused.push(event.effectiveDirective));
      const script = document.createElement("script");
      try { script.textContent = "window.evil = 1"; } catch (error) { return error.name; }
      document.body.append(script);
      return window.evil ?? null;
    """
    async with a_window(browser) as window:
        await window.open(site.url)
        assert await call(window, inline) in ("TypeError", None)
        assert await window.js("window.evil ?? null") is None
        await window.js("void fetch('http://127.0.0.1:9/').catch(() => 0)")
        await window.until("window.refused.includes('connect-src')")
    assert browser.errors() != []  # Chromium tells of both
