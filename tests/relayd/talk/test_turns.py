"""Turns through a real daemon: text as it comes, speech as it comes, and what becomes of failures."""

from pathlib import Path

import pytest

from relayd.talk.events import ReplyEnded, Speech, SpeechEnded, SpeechMark, SpeechStarted, TextDelta, TextEnded
from tests.support.fake_worker import FORMAT
from tests.support.talking import ended, events_of, speech_of, stage, text_of


@pytest.mark.trio
async def test_a_reply_comes_as_text_and_as_speech(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        writer, _ = await on.writer(), await on.speaker()
        talk = await on.open(instructions="Be brief.")
        events = await events_of(talk.say("Hello"))
        assert text_of(events) == "You said: Hello."
        assert b"".join(event.pcm for event in events if isinstance(event, Speech)) == speech_of("You said: Hello.")
        kinds = [type(event) for event in events]
        assert kinds[0] is TextDelta
        assert kinds[-2:] == [SpeechEnded, ReplyEnded]
        assert kinds.count(SpeechStarted) == kinds.count(TextEnded) == 1
        assert SpeechStarted(FORMAT) in events
        assert TextEnded("stop", {"prompt_tokens": 3, "completion_tokens": 5}) in events
        assert SpeechMark(16, 160) in events
        user, reply = talk.turns
        assert (user.role, user.content, user.state) == ("user", "Hello", "done")
        assert (reply.role, reply.content, reply.state, reply.code) == ("assistant", "You said: Hello.", "done", None)
        assert events[-1] == ReplyEnded(reply)
        again = await ended(talk.say("And now?"))
        assert again.content == "You said: And now?."
        assert writer.prompts[1] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "You said: Hello."},
            {"role": "user", "content": "And now?"},
        ]
        await on.daemon.at_rest()
