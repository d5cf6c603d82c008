"""Programs that use OpenAI's API, unchanged and with their default calls, in an environment of their own."""

import sys
from pathlib import Path

import pytest
import trio

from tests.support.processes import Place, Proc, a_place, a_relay, a_worker

#: Their dependencies are not ours, and hold each other's back: `make test` installs them beside .venv.
PYTHON = Path(f"{sys.prefix}-clients") / "bin" / "python"
#: Each prints how many seconds of audio it got. Address and key are in OPENAI_BASE_URL and OPENAI_API_KEY.
PROGRAMS = {
    "litellm": """
import io, os, av, litellm
answer = litellm.speech(model="openai/tts-1", voice="alloy", input="Hello there.")
with av.open(io.BytesIO(answer.content)) as file:
    print(sum(frame.samples / frame.sample_rate for frame in file.decode(audio=0)))
""",
    "LiveKit": """
import asyncio
import aiohttp
from livekit.agents import utils
from livekit.plugins import openai

async def main():
    async with openai.TTS() as tts, tts.synthesize("Hello there.") as stream:
        print(sum([event.frame.duration async for event in stream]))

asyncio.run(main())
""",
    "pipecat": """
import asyncio
from pipecat.frames.frames import EndFrame, TTSAudioRawFrame, TTSSpeakFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineTask
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.openai.tts import OpenAITTSService

class Listener(FrameProcessor):
    heard_s = 0.0

    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSAudioRawFrame):
            self.heard_s += len(frame.audio) / 2 / frame.sample_rate
        await self.push_frame(frame, direction)

async def main():
    listener = Listener()
    task = PipelineTask(Pipeline([OpenAITTSService(), listener]))
    await task.queue_frames([TTSSpeakFrame("Hello there."), EndFrame()])
    await PipelineRunner(handle_sigint=False).run(task)
    print(listener.heard_s)

asyncio.run(main())
""",
}

#: What was said so far, for each of `TALKING`, which print the reply.
TALK = """
TALK = [("user", "My number is 4711."), ("assistant", "I see."), ("user", "What number did I tell you?")]
"""
TALKING = {
    "litellm": """
import litellm
messages = [{"role": role, "content": text} for role, text in TALK]
chunks = litellm.completion(model="openai/gpt-4o", messages=messages, stream=True)
print("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
""",
    "LiveKit": """
import asyncio
from livekit.agents import llm
from livekit.plugins import openai

async def main():
    context = llm.ChatContext.empty()
    for role, text in TALK:
        context.add_message(role=role, content=text)
    async with openai.LLM() as model, model.chat(chat_ctx=context) as stream:
        deltas = [chunk.delta.content or "" async for chunk in stream if chunk.delta]
    print("".join(deltas))
    await model.aclose()

asyncio.run(main())
""",
    "pipecat": """
import asyncio
from pipecat.frames.frames import EndFrame, LLMContextFrame, LLMTextFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineTask
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.openai.llm import OpenAILLMService

class Reader(FrameProcessor):
    text = ""

    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        if isinstance(frame, LLMTextFrame):
            self.text += frame.text
        await self.push_frame(frame, direction)

async def main():
    reader = Reader()
    context = LLMContext([{"role": role, "content": text} for role, text in TALK])
    task = PipelineTask(Pipeline([OpenAILLMService(), reader]))
    await task.queue_frames([LLMContextFrame(context), EndFrame()])
    await PipelineRunner(handle_sigint=False).run(task)
    print(reader.text)

asyncio.run(main())
""",
}

#: Each prints a reply that came over the Realtime API, and before it how many seconds of it were heard. LiveKit breaks
#: off another one first.
REALTIME = {
    "LiveKit": """
import asyncio
import aiohttp
from livekit.agents import llm
from livekit.plugins import openai

async def spoken(session):
    text, heard_s = "", 0.0
    async for message in (await session.generate_reply()).message_stream:
        heard_s += sum([frame.duration async for frame in message.audio_stream])
        text += "".join([delta async for delta in message.text_stream])
    return text, heard_s

async def main():
    async with aiohttp.ClientSession() as http:
        session = openai.realtime.RealtimeModel(http_session=http).session()
        session.on("error", lambda error: print("error:", error))
        context = llm.ChatContext.empty()
        context.add_message(role="user", content=TALK[0][1])
        await session.update_chat_ctx(context)
        reply = await session.generate_reply()
        async for message in reply.message_stream:
            await anext(aiter(message.audio_stream))
            session.interrupt()
            session.truncate(message_id=message.message_id, modalities=["audio"], audio_end_ms=10)
            async for frame in message.audio_stream:
                pass
        context = session.chat_ctx.copy()
        for role, text in TALK[1:]:
            context.add_message(role=role, content=text)
        await session.update_chat_ctx(context)
        text, heard_s = await spoken(session)
        print(heard_s)
        print(text)
        await session.aclose()

asyncio.run(main())
""",
    "pipecat": """
import asyncio, os
from pipecat.frames.frames import EndFrame, ErrorFrame, LLMContextFrame, LLMFullResponseEndFrame
from pipecat.frames.frames import TTSAudioRawFrame, TTSTextFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineTask
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService

class Listener(FrameProcessor):
    text, heard_s = "", 0.0

    def __init__(self):
        super().__init__()
        self.ended = asyncio.Event()

    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSTextFrame):
            self.text += frame.text
        elif isinstance(frame, TTSAudioRawFrame):
            self.heard_s += len(frame.audio) / 2 / frame.sample_rate
        elif isinstance(frame, (LLMFullResponseEndFrame, ErrorFrame)):
            self.ended.set()
        await self.push_frame(frame, direction)

async def main():
    listener = Listener()
    # One message, as pipecat sends a longer context in one text, which Eliza does not take apart.
    context = LLMContext([{"role": "user", "content": TALK[2][1]}])
    url = os.environ["OPENAI_BASE_URL"].replace("http", "ws", 1) + "/realtime"
    service = OpenAIRealtimeLLMService(api_key=os.environ["OPENAI_API_KEY"], base_url=url)
    task = PipelineTask(Pipeline([service, listener]))

    async def ask():
        await task.queue_frames([LLMContextFrame(context)])
        await listener.ended.wait()
        await task.queue_frames([EndFrame()])

    asking = asyncio.create_task(ask())
    await PipelineRunner(handle_sigint=False).run(task)
    await asking
    print(listener.heard_s)
    print(listener.text)

asyncio.run(main())
""",
}


@pytest.mark.trio
@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_program_speaks_with_its_default_calls(tmp_path: Path, program: str) -> None:
    place = a_place(tmp_path)
    async with a_relay(place) as relay, a_worker(place, relay, "--engine", "mock"):
        printed = await run_program(place, relay, PROGRAMS[program])
    assert float(printed.split()[-1]) == pytest.approx(2.1, abs=0.3)


@pytest.mark.trio
@pytest.mark.parametrize("program", TALKING)
async def test_a_program_talks_with_its_default_calls(tmp_path: Path, program: str) -> None:
    place = a_place(tmp_path, "[spaces.llm]\n")
    async with a_relay(place) as relay, a_worker(place, relay, "--engine", "eliza", "--space", "llm"):
        printed = await run_program(place, relay, TALK + TALKING[program])
    assert printed.splitlines()[-1] == b"You told me the number 4711."


@pytest.mark.trio
@pytest.mark.parametrize(
    ("program", "reply"),
    [("LiveKit", b"You told me the number 4711."), ("pipecat", b"You have not told me a number yet.")],
)
async def test_a_program_talks_over_the_realtime_api(tmp_path: Path, program: str, reply: bytes) -> None:
    place = a_place(tmp_path, '[talk]\nreply = "llm"\nspeech = "tts"\n[spaces.llm]\n[spaces.tts]\n')
    eliza = ("--engine", "eliza", "--space", "llm")
    async with a_relay(place) as relay, a_worker(place, relay, *eliza), a_worker(place, relay, "--engine", "mock"):
        *_, heard_s, text = (await run_program(place, relay, TALK + REALTIME[program])).splitlines()
    assert text == reply
    assert float(heard_s) > 1


async def run_program(place: Place, relay: Proc, program: str) -> bytes:
    """What a program prints, which finds the relay by OpenAI's own variables."""
    assert PYTHON.exists(), "`make test` installs the programs that are tried as clients"
    token, _ = await place.run("relayd", "token", "create", "--role", "client", "--name", "reader")
    url = (await relay.event("listening"))["openai_base_url"]
    environ = place.environ | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": token.decode().strip()}
    with trio.fail_after(120):
        done = await trio.run_process(
            [PYTHON, "-c", program], env=environ, capture_stdout=True, capture_stderr=True, check=False
        )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return bytes(done.stdout)
